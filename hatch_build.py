"""Compile the C++ kernels while fgmp is installed or its wheel is built, where that is possible.

Without a compiler, or where it fails, the package is complete but for the fast CPU kernels, and
says so when it misses them.
"""

import subprocess
import sys
import sysconfig
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CompileKernels(BuildHookInterface):
    """Put the compiled library beside its sources and into the wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile; tell the wheel's builder that it holds machine code, of no Python version."""
        if self.target_name != "wheel":
            return
        try:
            library = _builder(Path(self.root)).build()
        except (FileNotFoundError, subprocess.CalledProcessError) as reason:
            print(f"fgmp: the C++ kernels were not compiled: {reason}", file=sys.stderr)
            return
        build_data["artifacts"].append(str(library.relative_to(self.root)))
        build_data["pure_python"] = False
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform}"


def _builder(root: Path) -> ModuleType:
    """The module fgmp.kernels.cpu.build, without importing fgmp: its dependencies may be absent."""
    spec = spec_from_file_location("build", root / "src" / "fgmp" / "kernels" / "cpu" / "build.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
