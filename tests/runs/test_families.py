"""Every family of docs/families.md is quantized, written and read back as its table says."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import families
import figures
import pytest


def recorded() -> dict[str, Any]:
    facts = json.loads((figures.DOCS / "results" / "families.json").read_text())
    return {row["family"]: row for row in facts["rows"]}


def test_the_table_has_every_family_and_all_of_them_read_back() -> None:
    rows = recorded()
    assert list(rows) == list(families.FAMILIES) and len(rows) >= 21
    for row in rows.values():
        assert row["reload_equal"] and row["generation_equal"] and not row["refused"], row


@pytest.mark.slow
@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_family_is_as_recorded(family: str, tmp_path: Path) -> None:
    assert asdict(families.measure(family, tmp_path)) == recorded()[family]
