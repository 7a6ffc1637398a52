"""Any module with a loss: a real pretrained sentence encoder, by the script of docs/results.md.

The drift of the embeddings must order as the formats do, and mixing must recover most of the gap.
"""

import encoder
import pytest


def test_mixing_keeps_embeddings_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = {"ours 70%": encoder.RECIPES["ours 70%"]}
    monkeypatch.setattr(encoder, "RECIPES", ours)
    lines = encoder.sentences(32)
    found = encoder.run(lines[0::2], lines[1::2])
    assert found["quantized_share"] == 1.0
    rows = {row["name"]: row for row in found["rows"]}
    fp8, mixed, nvfp4 = (rows[n]["drift"] for n in ("fp8", "ours 70%", "nvfp4"))
    assert fp8 < mixed < nvfp4
    # Well over that with 128 sentences (docs/results.md); half leaves room for 16 noisy ones.
    assert rows["ours 70%"]["gap_recovered_percent"] > 50
