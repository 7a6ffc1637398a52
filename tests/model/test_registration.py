"""The format is registered with Transformers in whatever order the two are imported, and late."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(code: str) -> str:
    """Output of a new interpreter, in which nothing is imported yet."""
    paths = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_imports_neither_torch_nor_transformers() -> None:
    loaded = run("import fgmp, sys; print(*{'torch', 'transformers', 'numpy'} & set(sys.modules))")
    assert loaded == ""


REGISTERED = """
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as configs
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as quantizers
from fgmp.model.transformers import FgmpConfig, FgmpQuantizer
assert configs["fgmp"] is FgmpConfig and quantizers["fgmp"] is FgmpQuantizer
print("registered")
"""


@pytest.mark.parametrize(
    "imports",
    [
        "import fgmp; from transformers import AutoModelForCausalLM",
        "import fgmp; import transformers.modeling_utils",
        "import transformers; import fgmp; transformers.AutoModelForCausalLM",
        "from transformers import AutoModelForCausalLM; import fgmp",
        "import fgmp; fgmp.load",
    ],
    ids=lambda imports: imports,
)
def test_every_order_of_imports(imports: str) -> None:
    """Once the loader of models is there, so is the format; without our own import of it."""
    check = "import transformers.modeling_utils\nimport sys\n"
    check += "assert 'fgmp.model.transformers' in sys.modules\n"
    assert run(f"{imports}\n{check}{REGISTERED}") == "registered"


def test_the_import_hook_removes_itself() -> None:
    """And there is one, however often the package is imported."""
    code = """
import sys
before = len(sys.meta_path)
import fgmp
from fgmp.model.registration import register
register(); register()
assert len(sys.meta_path) == before + 1
import transformers.modeling_utils
assert not any("fgmp" in type(finder).__module__ for finder in sys.meta_path)
print("removed")
"""
    assert run(code) == "removed"


def test_without_transformers_the_package_can_be_imported() -> None:
    """Where it is not installed, what does not need it works."""
    code = """
import sys
sys.modules["transformers"] = None
import fgmp
print(fgmp.Recipe(fp4=0.5).fp4)
"""
    assert run(code) == "0.5"
