"""Who may import whom, what depends on what, and that tests mirror the source."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fgmp

ROOT = Path(fgmp.__file__).parent
TESTS = Path(__file__).parent
ARCHITECTURE = TESTS.parent / "docs" / "architecture.md"

MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "progress": set(),
    "storage": {"errors"},
    "demo": set(),
    "documents": {"errors"},
    "data": {"errors", "documents"},
    "formats": {"errors"},
    "pack": {"errors", "formats"},
    "kernels": {"errors", "formats", "pack"},
    "model": {"errors", "storage", "formats", "pack", "kernels"},
    "sensitivity": {"errors", "storage", "formats", "model"},
    "assign": {"errors", "formats", "pack", "kernels", "sensitivity"},
    "recipe": {"errors", "formats", "assign"},
    "hardware": {"errors", "progress", "storage", "formats", "pack"},
    "evaluation": {"errors", "progress", "formats", "pack", "model"},
    "export": {"errors", "formats", "pack", "model", "evaluation"},
    "quantization": {
        *("errors", "progress", "storage", "formats", "pack", "model", "sensitivity", "assign"),
        *("recipe", "hardware"),
    },
    "serving": {"errors", "formats", "pack", "kernels", "model"},
    "report": {"errors", "storage", "formats", "pack", "hardware", "evaluation"},
    "app": {
        *("errors", "progress", "storage", "demo", "documents", "data", "formats", "pack"),
        *("kernels", "model", "assign", "recipe", "hardware", "evaluation", "export"),
        *("quantization", "serving", "report"),
    },
}
"""A part is a package or a module below ``fgmp``. Each may import those named, which all stand
above it; docs/architecture.md has the same table."""

ONLY_IN = {
    "transformers": {"model", "app"},
    "rich": {"progress", "app"},
    "typer": {"app"},
    "amaranth": {"hardware"},
    "platformdirs": {"hardware"},
    "yaml": {"recipe", "report", "evaluation"},
    "datasets": {"documents"},
    "lm_eval": {"evaluation"},
    "peft": {"model"},
    "safetensors": {"storage", "pack", "model"},
    "huggingface_hub": {"pack", "serving"},
    "psutil": {"pack", "model", "quantization", "serving", "app"},
    "triton": {"kernels"},
    "vllm": {"serving"},
    "numpy": {"storage", "hardware", "pack", "report"},
    "jinja2": {"report"},
    "markupsafe": {"report"},
}
"""Where third-party packages may show up; ``torch`` may everywhere but in ``formats.spec``."""

CYCLES = [
    {
        "fgmp.hardware.datapath",
        *(f"fgmp.hardware.rtl.{name}" for name in ("dot", "lane", "registers")),
    },
    {
        "fgmp.hardware.array",
        *(f"fgmp.hardware.rtl.{name}" for name in ("accelerator", "ppu", "schedule", "tiles")),
    },
]
"""Modules that may import each other: a record of parameters creates the RTL that reads it."""

TESTED_AS: dict[str, str] = {
    "fgmp": "test_exports.py: its public names",
    "fgmp.kernels.triton.launch": "kernels/triton/test_quantize.py: every launch goes through it",
    "fgmp.kernels.triton.planes": "kernels/triton/test_linear.py: device functions of its kernels",
    "fgmp.pack.checksums": "pack/test_checkpoint.py: seen through the files that it protects",
    "fgmp.pack.folder": "test_cases.py: through every reader of a folder",
    "fgmp.pack.reader": "pack/test_checkpoint.py: reads what the writer wrote",
    "fgmp.progress": "app/test_cli.py: bars are seen on a terminal",
    **dict.fromkeys(
        (f"fgmp.hardware.{name}" for name in ("array", "image", "run", "simulate")),
        "hardware/test_accelerator.py: an array runs images in a simulator",
    ),
    **dict.fromkeys(
        (f"fgmp.hardware.{name}" for name in ("export", "plot", "verify", "yosys")),
        "app/test_hw.py: what the commands write and compare",
    ),
    **dict.fromkeys(
        (f"fgmp.hardware.{name}" for name in ("cells", "netlist", "silicon", "timing")),
        "hardware/test_synthesis.py: netlists and their cells",
    ),
    "fgmp.hardware.stimulus": "hardware/test_power.py: what drives the gates",
    **dict.fromkeys(
        (f"fgmp.hardware.rtl.{name}" for name in ("accelerator", "schedule", "table", "tiles")),
        "hardware/test_accelerator.py: units of the array, in the array",
    ),
    **dict.fromkeys(
        (f"fgmp.hardware.rtl.{name}" for name in ("decode", "dot", "lane", "registers", "unpack")),
        "hardware/test_lane.py: units of the lane, in the lane",
    ),
    **dict.fromkeys(
        (
            f"fgmp.hardware.rtl.{name}"
            for name in ("elements", "encode", "pipeline", "ppu", "rules", "score", "search")
        ),
        "hardware/test_quantizer.py: steps of the quantizer, in the quantizer",
    ),
    "fgmp.hardware.rtl.epilogue": "hardware/test_epilogue.py: one level up",
    "fgmp.hardware.rtl.floats": "hardware/test_epilogue.py: roundings, in the epilogue",
    "fgmp.hardware.rtl.verilog": "hardware/test_verilator.py: what it writes is run",
}
"""Modules whose tests lie elsewhere, each with the file that has them and the reason."""


def files() -> list[Path]:
    """Source files, but those that only assemble or start the package."""
    return [path for path in sorted(ROOT.rglob("*.py")) if len(module_of(path).split(".")) > 1
            and path.name != "__main__.py"]  # fmt: skip


def part_of(module: str) -> str:
    """``fgmp.formats.codec`` is of the part ``formats``."""
    return module.split(".")[1]


def module_of(path: Path) -> str:
    names = ("fgmp", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


def nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those that only a type checker sees."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        yield from nodes(node)


def imports(path: Path, *, types: bool = True) -> Iterator[str]:
    """Dotted names of what a file imports, in functions too.

    A module of this package has its full name, also where it is imported from its package.
    """
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree) if types else nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: relative imports hide their target"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if submodule in MODULES else node.module


MODULES = {module_of(path): path for path in ROOT.rglob("*.py")}


def test_the_package_root_is_small() -> None:
    """What a reader sees first; everything else belongs to a part."""
    names = [path.name for path in ROOT.glob("*.py")]
    assert len(names) <= 8, names


def test_the_parts_are_in_order() -> None:
    before: set[str] = set()
    for part, allowed in MAY_IMPORT.items():
        assert allowed <= before, f"{part} would import what comes after it"
        before.add(part)


def test_every_file_belongs_to_a_part() -> None:
    assert {part_of(module_of(path)) for path in files()} == set(MAY_IMPORT)


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    part = part_of(module_of(path))
    for name in imports(path):
        top = name.partition(".")[0]
        if top == "fgmp":
            assert name != "fgmp", f"{path} imports the package, which imports everything"
            assert part_of(name) in {part, *MAY_IMPORT[part]}, f"{path} imports {name}"
        elif top not in sys.stdlib_module_names and top not in ("torch", "pydoc_data"):
            assert part in ONLY_IN.get(top, set()), f"{path} imports {name}"


def test_every_permission_is_needed() -> None:
    """A table that allows more than happens would not notice what comes new."""
    used: dict[str, set[str]] = {part: set() for part in MAY_IMPORT}
    packages: dict[str, set[str]] = {package: set() for package in ONLY_IN}
    for path in files():
        part = part_of(module_of(path))
        for name in imports(path):
            top = name.partition(".")[0]
            if top == "fgmp":
                used[part].add(part_of(name))
            elif top in packages:
                packages[top].add(part)
    for part, allowed in MAY_IMPORT.items():
        assert allowed <= used[part], f"{part} does not import {sorted(allowed - used[part])}"
    assert packages == ONLY_IN


def test_the_documented_table_is_this_one() -> None:
    text = ARCHITECTURE.read_text().partition("\n## Who may import whom\n")[2]
    section = text.partition("\n## ")[0]
    rows = re.findall(r"^\|([^|\n]+)\|([^|\n]*)\|$", section, re.MULTILINE)
    header, rule, *parts = rows
    assert [cell.strip() for cell in header] == ["part", "may import"]
    assert set("".join(rule)) <= set("-: ")
    documented = {}
    for part, allowed in parts:
        names = [name.strip() for name in allowed.split(",") if name.strip()]
        for name in (part.strip(), *names):
            assert re.fullmatch(r"`[a-z]+`", name), f"{name} must be one part in backticks"
        documented[part.strip(" `")] = {name.strip("`") for name in names}
    assert list(documented) == list(MAY_IMPORT), "the parts, in order"
    assert documented == MAY_IMPORT


def test_no_modules_import_each_other() -> None:
    """Neither at the top nor in functions, nor by way of others, but for CYCLES."""
    graph = {
        module: {name for name in imports(path, types=False) if name in MODULES}
        for module, path in MODULES.items()
    }
    cycles = [component for component in components(graph) if len(component) > 1]
    assert sorted(cycles, key=sorted) == sorted(CYCLES, key=sorted)
    for module, targets in graph.items():
        assert module not in targets, f"{module} imports itself"


def components(graph: dict[str, set[str]]) -> list[set[str]]:
    """Strongly connected components: sets of modules that can all reach each other."""
    reach = {module: reachable(graph, module) for module in graph}
    done: set[str] = set()
    result = []
    for module in graph:
        if module not in done:
            component = {module} | {other for other in reach[module] if module in reach[other]}
            result.append(component)
            done |= component
    return result


def reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    pending = [start]
    while pending:
        for target in graph[pending.pop()] - seen:
            seen.add(target)
            pending.append(target)
    return seen


def has_logic(path: Path) -> bool:
    """Whether a file defines a function or a class with a method, not only names and records."""
    tree = ast.parse(path.read_text())
    return any(isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) for node in ast.walk(tree))


def test_tests_mirror_the_source() -> None:
    """A module with logic has a test file of its name in the folder of its name."""
    missing = []
    for module, path in MODULES.items():
        relative = path.relative_to(ROOT)
        test = TESTS / relative.parent / f"test_{relative.name}"
        if has_logic(path) and module not in TESTED_AS and not test.exists():
            missing.append(str(test.relative_to(TESTS)))
    assert not missing, missing
    for module, elsewhere in TESTED_AS.items():
        relative = MODULES[module].relative_to(ROOT)
        assert not (TESTS / relative.parent / f"test_{relative.name}").exists(), module
        file = elsewhere.partition(":")[0]
        assert (TESTS / file).exists(), f"{module}: {file}"


def test_the_specification_needs_no_torch() -> None:
    tops = {name.partition(".")[0] for name in imports(ROOT / "formats" / "spec.py")}
    assert tops <= sys.stdlib_module_names
