"""The harness of ``runs/accuracy.py``: its original, its rows, its table and its cache."""

import argparse
from dataclasses import replace
from pathlib import Path

import accuracy
import headroom
import measuring
import pytest
import rows
import torch
from conftest import make_model
from measuring import Measured, Original
from setting import Setting
from summary import summarize
from tiny_setting import measured, tiny_setting, windows

from fgmp.errors import InputError
from fgmp.evaluation.compare import weight_bits
from fgmp.evaluation.perplexity import batches, loss_of, next_token_log_probabilities
from fgmp.model.linear import mixed_linears
from fgmp.pack.planes import packed_bytes


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return tiny_setting(tmp_path)


def test_the_original_is_what_its_head_returns() -> None:
    """Log-probabilities recomputed from stored inputs are the same bits; a cap is refused."""
    model = make_model("llama")
    expected = [next_token_log_probabilities(model, batch) for batch in batches(windows())]
    original = Original(model, windows())
    for _ in range(2):
        recomputed = list(original)
        assert len(recomputed) == len(expected)
        assert all(torch.equal(x, y) for x, y in zip(recomputed, expected, strict=True))
        assert not any(x.requires_grad for x in recomputed)
    assert torch.equal(original.losses, loss_of(torch.cat(expected), windows()))
    assert not model.get_output_embeddings()._forward_pre_hooks
    capped = make_model("llama")
    head = capped.get_output_embeddings()
    head.register_forward_hook(lambda module, args, out: 30 * torch.tanh(out / 30))
    with pytest.raises(InputError, match=r"^LlamaForCausalLM: logits must be what its head return"):
        Original(capped, windows())


def test_rows_are_measured_and_ordered(setting: Setting) -> None:
    names = ("fp8", "nvfp4", "paper 70%", "nvfp4, GPTQ", "nvfp4, four over six", "70% by channel")
    measurements = {name: [measured(rows.ROWS[name](setting))] for name in names}
    original = Original(make_model("llama"), windows()).losses
    table = {row["name"]: row for row in summarize(measurements, original, 23, rows.VERSUS)}
    assert table["fp8"]["kl_gap_recovered_percent"] == 100
    assert table["nvfp4"]["kl_gap_recovered_percent"] == 0
    for name, row in table.items():
        low, high = row["kl_gap_recovered_ci95"]
        assert low <= row["kl_gap_recovered_percent"] <= high
        assert row["kl_gap_recovered_by_seed"] == pytest.approx([row["kl_gap_recovered_percent"]])
        assert (row["fp4_activations"] == 1) == name.startswith("nvfp4")
    assert table["paper 70%"]["kl"] < table["nvfp4, GPTQ"]["kl"] < table["nvfp4"]["kl"]
    assert 4.5 <= table["nvfp4, four over six"]["bits_per_weight"] < 4.6
    assert 5 < table["70% by channel"]["bits_per_weight"] < 6.5


def test_a_row_with_another_method_changes_no_other_row(setting: Setting) -> None:
    """Both share one recipe and one calibration file."""
    before = mixed_linears(rows.ROWS["ours 100%"](setting))
    other = mixed_linears(rows.ABLATIONS["ours 100%, local Hessian"](setting))
    after = mixed_linears(rows.ROWS["ours 100%"](setting))
    assert all(torch.equal(before[n].packed.low, after[n].packed.low) for n in before)
    assert any(not torch.equal(before[n].packed.low, other[n].packed.low) for n in before)


def row(*means: float) -> list[Measured]:
    """Measurements of a row whose KL is ``means`` by calibration, with noise that rows share."""
    noise = torch.linspace(-0.1, 0.1, 50, dtype=torch.float64)
    return [Measured(10 + noise, 10 * (mean + noise), 5.0, 0.5, "x") for mean in means]


def table_of(measurements: dict[str, list[Measured]]) -> dict[str, dict]:
    original = torch.full((50,), 9.0, dtype=torch.float64)
    return {r["name"]: r for r in summarize(measurements, original, 10, rows.VERSUS)}


def test_rows_are_compared_on_the_seeds_they_share() -> None:
    table = table_of(
        {
            "fp8": row(1.0, 2.0),
            "nvfp4": row(5.0, 10.0),
            "ours 100%": row(2.0, 4.0),
            "nvfp4, GPTQ": row(3.0),
        }
    )
    assert table["ours 100%"]["seeds"] == 2
    assert table["ours 100%"]["kl_gap_recovered_by_seed"] == pytest.approx([75, 75])
    assert table["nvfp4, GPTQ"]["kl_gap_recovered_percent"] == pytest.approx(50)
    over = table["ours 100%"]["kl_gap_recovered_points_over"]["nvfp4, GPTQ"]
    assert over["points"] == pytest.approx(25)
    # Noise that both rows share cancels: a difference of means alone would not be this certain.
    assert over["ci95"] == pytest.approx([25, 25])


def test_intervals_cover_windows_and_calibrations() -> None:
    table = table_of(
        {
            "fp8": row(1.0, 1.0, 1.0),
            "nvfp4": row(5.0, 5.0, 5.0),
            "ours 70%": row(2.0, 2.0, 2.0),
            "ours 90%": row(1.0, 2.0, 3.0),
            "paper 80%": row(3.0),
        }
    )
    same, apart, once = (table[n] for n in ("ours 70%", "ours 90%", "paper 80%"))
    assert same["kl_gap_recovered_percent"] == apart["kl_gap_recovered_percent"] == 75
    # Noise is the same in all rows, so windows alone leave a share as it is.
    assert same["kl_gap_recovered_ci95"] == pytest.approx([75, 75])
    assert once["kl_gap_recovered_ci95"] == pytest.approx([50, 50])
    # Of 27 equally likely draws of three calibrations one takes the first or last throughout.
    assert apart["kl_gap_recovered_ci95"] == pytest.approx([50, 100])


def test_a_share_of_no_perplexity_gap_is_not_reported() -> None:
    def losses(loss: float) -> list[Measured]:
        return [Measured(torch.full((50,), loss).double(), m.kl, 5.0, 0.5, "x") for m in row(loss)]

    # Perplexities e, e^1.05 and e^1.1; then a gap of 0.4%.
    table = table_of({"fp8": losses(10.0), "ours 70%": losses(10.5), "nvfp4": losses(11.0)})
    e = 2.718281828459045
    share = 100 * (e**1.1 - e**1.05) / (e**1.1 - e)
    assert table["ours 70%"]["gap_recovered_percent"] == pytest.approx(share)
    table = table_of({"fp8": losses(10.0), "nvfp4": losses(10.04)})
    assert table["fp8"]["gap_recovered_percent"] is None


def test_weight_bits_count_row_counters(setting: Setting) -> None:
    model = rows.at_weight_bits(setting, 5.999)  # which no whole number of blocks comes to
    # Of weights this small some are all FP4 or all FP8, and need no row counters.
    assert 5.85 < weight_bits(model) <= 5.999
    packed = [linear.packed for linear in mixed_linears(model).values()]
    fp8_blocks = sum(int(p.is_fp8().sum()) for p in packed)
    if_all_mixed = sum(packed_bytes(p.n, p.k, 1) for p in packed) + 8 * (fp8_blocks - len(packed))
    room = 5.999 / 8 * sum(p.n * p.k for p in packed) - if_all_mixed
    assert 0 <= room < 8  # not another block


def test_a_known_row_is_read_from_the_cache(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = Original(make_model("llama"), windows())
    first = accuracy.measured_rows(["nvfp4"], setting, reference, windows())["nvfp4"]
    assert accuracy.row_file(setting, "nvfp4").exists()
    monkeypatch.setattr(accuracy, "measure", None)
    again = accuracy.measured_rows(["nvfp4"], setting, reference, windows())["nvfp4"]
    assert torch.equal(first.kl, again.kl) and first.revision == again.revision


def test_names_of_rows(tmp_path: Path) -> None:
    def names(only: str | None = None, rows_of: Path | None = None) -> list[str]:
        return accuracy.names_of(argparse.Namespace(only=only, rows_of=rows_of))

    assert names() == [*rows.ROWS, *rows.ABLATIONS]
    assert names("ours 90%;ours 70%") == ["fp8", "nvfp4", "ours 70%", "ours 90%"]
    with pytest.raises(InputError, match=r"^no such row: ours 75%; there are fp8, nvfp4, paper"):
        names("ours 75%")
    file = tmp_path / "rows.json"
    file.write_text('{"rows": [{"name": "paper 80%"}]}')
    assert names(rows_of=file) == ["fp8", "nvfp4", "paper 80%"]
    file.write_text("[]")
    with pytest.raises(InputError, match=r"^--rows-of .*rows.json: no JSON of this script"):
        names(rows_of=file)


def test_headroom_ends_saturation(setting: Setting) -> None:
    text = replace(setting.text, samples=setting.text.samples[:, :8])
    short = replace(setting, text=text, seq_len=8)
    needed = headroom.largest_over_calibrated(short, windows())
    assert needed > 1
    table = headroom.rows_of(short, windows(), (1.0, 1.5 * needed))
    assert [(r["length"], r["headroom"] == 1) for r in table] == [
        (8, True),
        (8, False),
        (24, True),
        (24, False),
    ]
    assert table[2]["largest_over_calibrated"] == needed
    assert table[2]["saturated_per_million"] > 0 and table[3]["saturated_per_million"] == 0
    assert table[2]["kl_over_plain"] == 0 and table[2]["kl_over_plain_ci95"] == [0, 0]
    assert table[3]["kl"] - table[2]["kl"] == pytest.approx(table[3]["kl_over_plain"])


def test_measuring_counts_bits_and_formats(setting: Setting) -> None:
    one = measured(rows.ROWS["nvfp4"](setting))
    assert one.fp4_activations == 1 and one.bits_per_weight == pytest.approx(4.5, abs=0.05)
    assert (one.kl > 0).all() and one.revision == measuring.provenance()["revision"]
