"""Who may import whom: every part knows only parts that come before it."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fgmp

ROOT = Path(fgmp.__file__).parent

MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "fingerprint": set(),
    "files": set(),
    "progress": set(),
    "console": set(),
    "demo.text": set(),
    "data": {"errors"},
    "formats": {"errors"},
    "recipe": {"errors", "formats"},
    "unfinished": {"errors", "files"},
    "sensitivity": {"errors", "fingerprint", "files", "formats"},
    "pack": {"errors", "formats"},
    "hardware": {"console", "errors", "files", "progress", "formats", "pack"},
    "assign": {"formats", "sensitivity", "pack"},
    "kernels": {"errors", "formats", "pack"},
    "model": {"errors", "formats", "sensitivity", "pack", "kernels"},
    "evaluation": {"formats", "pack", "model", "progress"},
    "report": {"evaluation"},
    "sequential": {"unfinished", "formats", "sensitivity", "pack", "model"},
    "heldout": {"sensitivity", "model"},
    "task": {
        *("fingerprint", "unfinished", "progress", "recipe", "formats", "sensitivity", "assign"),
    },
    "solve": {
        *("errors", "recipe", "formats", "sensitivity", "pack", "hardware", "assign", "model"),
        "task",
    },
    "candidates": {
        *("formats", "pack", "assign", "model", "sequential", "heldout", "task", "solve"),
    },
    "tune": {
        *("unfinished", "recipe", "sensitivity", "model", "heldout", "task", "candidates"),
    },
    "pipeline": {
        *("errors", "progress", "recipe", "formats", "sensitivity", "pack", "assign", "model"),
        *("sequential", "task", "solve", "candidates", "tune"),
    },
    "workflow": {
        *("errors", "progress", "unfinished", "recipe", "data", "demo.text"),
        *("pack", "model", "evaluation", "pipeline"),
    },
    "accelerator": {
        *("errors", "data", "demo.text", "formats", "hardware", "pack", "model", "workflow"),
    },
    "demo.quickstart": {"demo.text", "recipe", "pack", "evaluation", "report", "workflow"},
    "cli": {
        *("errors", "progress", "console", "recipe"),
        *("hardware", "evaluation", "workflow", "accelerator", "demo.quickstart"),
    },
}
"""A part is a package or a module of the top level; the two halves of ``demo`` lie on either side
of ``workflow``. Each part may import those named, which all stand above it."""

ONLY_IN = {
    "transformers": {"model", "workflow", "cli"},
    "rich": {"progress", "console", "cli"},
    "typer": {"console", "hardware", "cli"},
    "amaranth": {"hardware"},
    "platformdirs": {"hardware"},
    "yaml": {"recipe"},
    "datasets": {"data"},
    "safetensors": {"unfinished", "pack", "sensitivity", "model"},
    "huggingface_hub": {"pack"},
    "psutil": {"sensitivity"},
    "triton": {"kernels"},
    "numpy": {"fingerprint", "hardware", "pack"},
}
"""Where third-party packages may show up; ``torch`` may everywhere but in ``formats.spec``."""


def files() -> list[Path]:
    """Source files, but those that only describe or assemble a package."""
    return [p for p in sorted(ROOT.rglob("*.py")) if p.parent != ROOT or p.name != "__init__.py"]


def part_of(module: str) -> str:
    """``fgmp.formats.codec`` is of the part ``formats``."""
    names = module.split(".")[1:]
    return ".".join(names[:2]) if names[0] == "demo" and len(names) > 1 else names[0]


def module_of(path: Path) -> str:
    names = ("fgmp", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


def imports(path: Path) -> Iterator[str]:
    """Dotted names of what a file imports, in functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide their target"
            submodules = (f"{node.module}.{alias.name}" for alias in node.names)
            is_package = node.module == "fgmp" or (
                node.module.startswith("fgmp.")
                and (ROOT / node.module[5:].replace(".", "/")).is_dir()
            )
            yield from submodules if is_package else [node.module]


def test_the_parts_are_in_order() -> None:
    before: set[str] = set()
    for part, allowed in MAY_IMPORT.items():
        assert allowed <= before, f"{part} would import what comes after it"
        before.add(part)


def test_every_file_belongs_to_a_part() -> None:
    parts = {part_of(module_of(path)) for path in files()}
    assert parts - {"demo", "__main__"} == set(MAY_IMPORT)


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    part = part_of(module_of(path))
    for name in imports(path):
        top = name.partition(".")[0]
        if top == "fgmp":
            assert part_of(name) in {part, *MAY_IMPORT.get(part, set())}, f"{path} imports {name}"
        elif top not in sys.stdlib_module_names and top not in ("torch", "pydoc_data"):
            assert part in ONLY_IN.get(top, set()), f"{path} imports {name}"


def test_every_permission_is_needed() -> None:
    """A table that allows more than happens would not notice what comes new."""
    used: dict[str, set[str]] = {part: set() for part in MAY_IMPORT}
    for path in files():
        part = part_of(module_of(path))
        for name in imports(path):
            if name.startswith("fgmp.") and part in used:
                used[part].add(part_of(name))
    for part, allowed in MAY_IMPORT.items():
        assert allowed <= used[part], f"{part} does not import {sorted(allowed - used[part])}"


def test_the_specification_needs_no_torch() -> None:
    tops = {name.partition(".")[0] for name in imports(ROOT / "formats" / "spec.py")}
    assert tops <= sys.stdlib_module_names
