"""docs/extending.md: its examples run, and its table of files is right.

The registries belong to the process. What the examples register is removed again.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from fgmp.assign import policy
from fgmp.assign.policy import POLICIES
from fgmp.formats import rules
from fgmp.formats.activation import Site, fake_quantize
from fgmp.formats.rules import RULES
from fgmp.kernels import ops
from fgmp.model.linear import mixed_linears

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "extending.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", TEXT, flags=re.DOTALL | re.MULTILINE)
MOST_FILES = 3


@contextmanager
def restored(*registries: dict[str, Any]) -> Iterator[None]:
    """Restore these registries on exit, also after an error."""
    before = [dict(registry) for registry in registries]
    try:
        yield
    finally:
        for registry, entries in zip(registries, before, strict=True):
            registry.clear()
            registry.update(entries)


@pytest.fixture(scope="module")
def names() -> Iterator[dict[str, Any]]:
    """Names that the examples define, after all of them ran in order."""
    names: dict[str, Any] = {}
    with restored(RULES, POLICIES):
        for number, block in enumerate(BLOCKS):
            exec(compile(block, f"docs/extending.md, block {number}", "exec"), names)
        yield names


def test_registries_are_restored() -> None:
    before = dict(RULES), dict(POLICIES)
    with pytest.raises(ValueError, match="stop"), restored(RULES, POLICIES):
        rules.register("one", rules.Rule(score=lambda x: x.q4.sum(-1)))
        policy.register("two", policy.Policy(sensitivity="none"))
        assert "one" in rules.recipe_rules() and "two" in POLICIES
        raise ValueError("stop")
    assert before == (RULES, POLICIES)


def test_every_example_runs(names: dict[str, Any]) -> None:
    headings = re.findall(r"^## (A .*)$", TEXT, flags=re.MULTILINE)
    assert len(headings) == 5 and len(BLOCKS) >= 6
    for example in ("worst_element", "two_scales", "largest_square", "calibration"):
        assert example in names
    assert "largest" in RULES and "error-per-layer" in POLICIES


def test_replaced_steps_change_the_result(names: dict[str, Any]) -> None:
    """Examples that the product ignored would run as well."""
    fgmp, methods = names["fgmp"], names["Methods"]
    recipe = fgmp.Recipe(fp4=0.7, clip="on", compensate=False)
    other = names["replace"](names["calibration"], weights=names["weights"])

    def planes(**options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Formats and scale bytes of all blocks."""
        model = fgmp.quantize(names["tiny_llama"](), names["samples"], recipe, **options)
        packed = [linear.packed for linear in mixed_linears(model).values()]
        formats = torch.cat([p.is_fp8().flatten() for p in packed])
        return formats, torch.cat([p.scale.flatten() for p in packed if p.scale is not None])

    formats, scales = planes()
    assert not torch.equal(planes(methods=methods(weight_score=names["worst_element"]))[0], formats)
    assert not torch.equal(planes(methods=methods(search_scales=names["two_scales"]))[1], scales)
    assert not torch.equal(planes(calibration=other)[0], formats)


def test_operators_fall_back_to_the_definition(names: dict[str, Any]) -> None:
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    site = Site(100.0, torch.full((64,), 0x38, dtype=torch.uint8), 1.0, 2**44, "largest")
    expected = fake_quantize(x, site)
    assert 0 < int(expected[1].sum()) < expected[1].numel()
    threshold = torch.tensor(site.threshold)
    units, is_fp8 = ops.fake_quantize_activation(
        x, torch.tensor(site.r), site.sensitivity, threshold, site.rule, site.scales
    )
    assert torch.equal(units.float(), expected[0]) and torch.equal(is_fp8, expected[1])


def additions() -> dict[str, list[str]]:
    """Files by addition, from the last table."""
    rows = TEXT.rpartition("|---|---|\n")[2].partition("\n\n")[0].splitlines()
    cells = [row.strip("| ").split(" | ") for row in rows]
    return {name: re.findall(r"`(src/[\w/.]+)`", files) for name, files in cells}


def test_files_of_an_addition_exist_and_are_few() -> None:
    table = additions()
    assert len(table) == 10
    for addition, files in table.items():
        assert 1 <= len(files) <= MOST_FILES, addition
        for file in files:
            assert (ROOT / file).is_file(), f"{addition}: {file}"


def test_names_of_the_table_exist() -> None:
    for addition, line in re.findall(r"^\| ([\w +,']+) \| (`src/.*) \|$", TEXT, flags=re.MULTILINE):
        for file, described in re.findall(r"`(src/[\w/.]+)`: ([^;|]*)", line):
            source = (ROOT / file).read_text()
            for name in re.findall(r"`([\w.]+)`", described):
                if not name.startswith("nn."):
                    assert re.search(rf"\b{name}\b", source), f"{addition}: {file}: {name}"
