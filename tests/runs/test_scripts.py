"""Every script of runs/ and benchmarks/ explains itself, and uses no private names of the package.

Scripts are run in this process with ``--help``, which shows that they import.
"""

import ast
import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(
    path
    for folder in ("runs", "benchmarks")
    for path in (ROOT / folder).glob("*.py")
    if "\ndef main(" in path.read_text()
)
LONGEST = 60
"""Lines of a function."""


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_help(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, script)  # dataclasses look their module up
    spec.loader.exec_module(script)
    monkeypatch.setattr(sys, "argv", [path.name, "--help"])
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 0
    first_line = script.__doc__.split("\n")[0]
    assert "".join(first_line.split()) in "".join(capsys.readouterr().out.split())


def test_runs_use_public_names_only() -> None:
    """No patched module, no replaced class, no private attribute of another object."""
    for path in (ROOT / "runs").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names]
                assert not any(name.startswith("_") or name == "mock" for name in names), path
            elif isinstance(node, ast.Attribute):
                ours = isinstance(node.value, ast.Name) and node.value.id == "self"
                dunder = node.attr in ("__doc__", "__init__", "__version__", "__name__")
                private = node.attr.startswith("_") and not dunder
                assert ours or not private, f"{path.name}:{node.lineno}: {node.attr}"


def test_scripts_import_from_their_own_folder() -> None:
    """Run as a script, a file sees its own folder; the tests see both."""
    modules = {
        folder: {path.stem for path in (ROOT / folder).glob("*.py")}
        for folder in ("runs", "benchmarks")
    }
    for folder, other in (("runs", "benchmarks"), ("benchmarks", "runs")):
        for path in (ROOT / folder).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom):
                    names = [node.module or ""]
                strangers = set(names) & (modules[other] - modules[folder])
                assert not strangers, f"{path}: {strangers}"


def test_functions_are_short() -> None:
    for folder in ("runs", "benchmarks"):
        for path in (ROOT / folder).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.FunctionDef):
                    lines = (node.end_lineno or 0) - node.lineno + 1
                    assert lines <= LONGEST, f"{path.name}: {node.name} has {lines} lines"
