"""Any module with a loss: a real sentence encoder, by runs/encoder.py (docs/measurements.md).

The drift of the embeddings must order as the formats do, and mixing must recover most of the gap.
"""

import encoder
import pytest

from fgmp.errors import InputError


def test_mixing_keeps_embeddings_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = {"ours 70%": encoder.RECIPES["ours 70%"]}
    monkeypatch.setattr(encoder, "RECIPES", ours)
    facts = encoder.run(encoder.sentences(), evaluated=16, seeds=1, samples=16)
    assert facts["quantized_share"] == 1.0
    rows = {row["name"]: row for row in facts["rows"]}
    fp8, mixed, nvfp4 = (rows[n]["drift"] for n in ("fp8", "ours 70%", "nvfp4"))
    assert fp8 < mixed < nvfp4
    # Well over that with 256 sentences (docs/measurements.md); half leaves room for 16 noisy ones.
    assert rows["ours 70%"]["gap_recovered_percent"] > 50


def test_calibrations_share_no_sentence_with_each_other_or_the_evaluation() -> None:
    lines = [f"sentence {i}" for i in range(20)]
    lines += ["", *lines]
    parts = encoder.split_lines(lines, evaluated=5, seeds=3, samples=4)
    assert [len(part) for part in parts] == [5, 4, 4, 4]
    assert len({line for part in parts for line in part}) == 17
    assert parts == encoder.split_lines(lines, evaluated=5, seeds=3, samples=4)
    with pytest.raises(InputError, match=r"^3 x 5 .*which takes 21; there are 20$"):
        encoder.split_lines(lines, evaluated=6, seeds=3, samples=5)
