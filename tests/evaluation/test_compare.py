"""What a comparison reports, against numbers worked by hand and definitions spelt out."""

import copy
import gc
import json
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from conftest import make_model
from torch import Tensor, nn

import fgmp
from fgmp import Recipe
from fgmp.evaluation import compare as comparison
from fgmp.evaluation.compare import (
    Row,
    _interval,
    _Measured,
    _quantile,
    _row,
    activation_bits,
    compare,
    table,
)
from fgmp.evaluation.perplexity import (
    Losses,
    divergence_of,
    evaluate,
    loss_of,
    next_token_log_probabilities,
)
from fgmp.model.linear import mixed_linears, sites
from fgmp.quantization.uniform import uniform


def measured(nll: float, kl: float = 0.0) -> _Measured:
    """Ten windows of four predictions with this mean loss."""
    return _Measured(
        Losses(torch.full((10,), 4 * nll, dtype=torch.float64), 4),
        kl,
        9 * kl,
        0.8,
        5.0,
        6.0,
        2.5,
        0.7,
    )


def rows(fp8: float, nvfp4: float, fgmp: float, kls: tuple[float, ...] = (1, 3, 2)) -> Row:
    """The fgmp row of a comparison of perplexities."""
    by_name = {
        "original": measured(math.log(10.0)),
        "fp8": measured(math.log(fp8), kls[0]),
        "nvfp4": measured(math.log(nvfp4), kls[1]),
        "fgmp": measured(math.log(fgmp), kls[2]),
    }
    return _row("fgmp", by_name["fgmp"], by_name)


# The arithmetic of the gap.


def test_gap_by_hand() -> None:
    row = rows(fp8=20.0, nvfp4=24.0, fgmp=21.0, kls=(0.01, 0.05, 0.02))
    assert row.perplexity == pytest.approx(21.0)
    assert row.vs_fp8_percent == pytest.approx(5.0)  # 21 / 20 - 1
    assert row.gap_recovered_percent == pytest.approx(75.0)  # 3 of 4
    assert row.kl_gap_recovered_percent == pytest.approx(75.0)  # 0.03 of 0.04
    assert (row.bits_per_weight, row.bits_per_activation, row.compression) == (5.0, 6.0, 2.5)
    assert (row.kl, row.kl_p99, row.top1_agreement_percent) == (0.02, 9 * 0.02, 80.0)


def test_the_ends_of_the_gap() -> None:
    assert rows(20.0, 24.0, 20.0).gap_recovered_percent == pytest.approx(100)
    assert rows(20.0, 24.0, 24.0).gap_recovered_percent == pytest.approx(0, abs=1e-9)
    assert rows(20.0, 24.0, 25.0).gap_recovered_percent == pytest.approx(-25)


@pytest.mark.parametrize(
    ("nvfp4", "reported"), [(20.11, True), (20.09, False), (20.0, False), (19.0, False)]
)
def test_a_gap_under_half_a_percent_is_none(nvfp4: float, reported: bool) -> None:
    """NVFP4 may even be better by chance; a ratio of noises would mean nothing."""
    assert (rows(20.0, nvfp4, 20.05).gap_recovered_percent is not None) == reported


def test_a_kl_gap_must_be_one() -> None:
    assert rows(20, 24, 21, kls=(0.05, 0.05, 0.04)).kl_gap_recovered_percent is None
    assert rows(20, 24, 21, kls=(0.06, 0.05, 0.04)).kl_gap_recovered_percent is None


def test_table_shows_missing_numbers_as_dashes() -> None:
    by_name = {
        "original": _Measured(measured(2.0).losses, 0, 0, 1.0, 16, 16, 1.0, None),
        "fp8": measured(2.0),
        "nvfp4": measured(2.0),
    }
    header, line = table([_row("original", by_name["original"], by_name)])
    shown = dict(zip(header, line, strict=True))
    assert shown["model"] == "original" and shown["perplexity"] == "7.389"
    missing = [value for value in line if value == "-"]
    assert len(missing) == 3 and shown["FP4 act"] == "-"
    assert (shown["KL p99"], shown["top-1"]) == ("0.000", "100.0%")
    assert shown["vs FP8"] == "+0.00%" and shown["compression"] == "1.00x"


# The interval.


def test_a_constant_difference_has_a_narrow_interval() -> None:
    """Windows differ widely in loss, but a model is always 0.1 nats a token worse."""
    original = Losses(torch.linspace(1, 100, 50).double(), 8)
    worse = Losses(original.by_window + 0.8, 8)
    low, high = _interval(worse, original)
    assert low == pytest.approx(worse.perplexity) and high == pytest.approx(worse.perplexity)


def test_the_interval_is_that_of_a_mean() -> None:
    g = torch.Generator().manual_seed(0)
    original = Losses(torch.full((400,), 80.0).double(), 8)
    noise = torch.randn(400, generator=g, dtype=torch.float64)
    low, high = _interval(Losses(original.by_window + 8 * 0.2 * noise, 8), original)
    # 0.2 nats of scatter over 400 windows: 0.01, times 1.96 to either side, in the logarithm.
    width = math.log(high / low) / 2
    assert width == pytest.approx(1.96 * 0.2 * noise.std().item() / 20, rel=0.08)
    middle = math.log(high * low) / 2
    assert middle == pytest.approx(10 + 0.2 * noise.mean().item(), abs=0.002)


# The whole comparison.


@pytest.fixture(scope="module")
def compared() -> tuple[dict[str, Row], dict[str, nn.Module], Tensor]:
    tokens = torch.randint(128, (8, 24), generator=torch.Generator().manual_seed(1))
    mixed = fgmp.quantize(make_model("llama"), tokens, Recipe(clip="off", compensate=False))
    models = {
        "fp8": uniform(make_model("llama"), mixed, "fp8"),
        "nvfp4": uniform(make_model("llama"), mixed, "nvfp4"),
        "fgmp": mixed,
    }
    return compared_with(make_model("llama"), models, tokens), models, tokens


def compared_with(
    original: nn.Module, models: dict[str, nn.Module], tokens: Tensor
) -> dict[str, Row]:
    """Rows by name."""
    pairs = {"original": original, **models}
    return {row.name: row for row in compare(pairs.items(), tokens)}


def test_rows(compared: tuple[dict[str, Row], dict[str, nn.Module], Tensor]) -> None:
    rows_by_name, models, tokens = compared
    assert list(rows_by_name) == ["original", "fp8", "nvfp4", "fgmp"]
    for name, model in {"original": make_model("llama"), **models}.items():
        assert rows_by_name[name].perplexity == pytest.approx(evaluate(model, tokens).perplexity)
        low, high = rows_by_name[name].ci95
        assert low <= rows_by_name[name].perplexity <= high
    assert [rows_by_name[n].fp4_activations for n in ("original", "fp8", "nvfp4")] == [
        None,
        0.0,
        1.0,
    ]
    assert rows_by_name["fgmp"].fp4_activations == pytest.approx(0.7, abs=0.02)
    assert rows_by_name["fp8"].gap_recovered_percent in (None, pytest.approx(100))
    assert rows_by_name["nvfp4"].kl_gap_recovered_percent == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("sharpness", [1, 20])
def test_kl_against_its_definition(
    sharpness: int, compared: tuple[dict[str, Row], dict[str, nn.Module], Tensor]
) -> None:
    """From a sharper model, too: of small differences KL is nearly symmetric."""
    _, models, tokens = compared
    original = make_model("llama")
    original.lm_head.weight.data *= sharpness
    rows_by_name = compared_with(original, models, tokens)
    assert rows_by_name["original"].kl == rows_by_name["original"].kl_p99 == 0
    assert rows_by_name["original"].top1_agreement_percent == 100
    with torch.no_grad():
        p = original(input_ids=tokens).logits[:, :-1].double().log_softmax(-1)
        for name, model in models.items():
            q = model(input_ids=tokens).logits[:, :-1].double().log_softmax(-1)
            by_token = (p.exp() * (p - q)).sum(-1)
            expected = by_token.mean().item()
            assert rows_by_name[name].kl == pytest.approx(expected, rel=1e-3)  # fp32 logarithms
            p99 = by_token.flatten().quantile(0.99).item()
            assert rows_by_name[name].kl_p99 == pytest.approx(p99, rel=1e-3)
            agreement = (p.argmax(-1) == q.argmax(-1)).double().mean().item()
            assert rows_by_name[name].top1_agreement_percent == pytest.approx(100 * agreement)
            assert sharpness == 1 or 0 < agreement < 1
            backward = (q.exp() * (q - p)).sum(-1).mean().item()
            assert sharpness == 1 or abs(backward / expected - 1) > 0.1


def test_kl_is_in_order(compared: tuple[dict[str, Row], dict[str, nn.Module], Tensor]) -> None:
    rows_by_name = compared[0]
    assert 0 < rows_by_name["fp8"].kl < rows_by_name["fgmp"].kl < rows_by_name["nvfp4"].kl


def test_bits(compared: tuple[dict[str, Row], dict[str, nn.Module], Tensor]) -> None:
    rows_by_name, models, _ = compared
    elements = sum(m.packed.n * m.packed.k for m in mixed_linears(models["fgmp"]).values())
    # shape and t, 20 bytes a linear, are all that is stored beside the codes.
    extra = 8 * 20 * 14 / elements
    assert rows_by_name["fp8"].bits_per_weight == pytest.approx(8 + extra)
    assert rows_by_name["nvfp4"].bits_per_weight == pytest.approx(4.5 + extra)
    assert rows_by_name["original"].bits_per_weight == 32
    assert (rows_by_name["fp8"].bits_per_activation, rows_by_name["nvfp4"].bits_per_activation) == (
        8,
        4.5,
    )
    share = rows_by_name["fgmp"].fp4_activations
    assert rows_by_name["fgmp"].bits_per_activation == pytest.approx(8 - 3.5 * share + 1 / 16)
    # Uniform rows have the same bits for weights and activations, so those alone count.
    assert rows_by_name["original"].compression == 0.5
    for name, bits in (("fp8", 8.0), ("nvfp4", 4.5)):
        assert rows_by_name[name].compression == pytest.approx(16 / bits, rel=0.03)


def test_counters_and_drift(
    compared: tuple[dict[str, Row], dict[str, nn.Module], Tensor],
) -> None:
    _, models, tokens = compared
    model = models["fgmp"]
    comparison.start_counting(model)
    assert comparison.activation_fraction(model) == 0
    assert comparison.drift(model, {}) == {}
    with torch.no_grad():
        model(input_ids=tokens[:2])
    counts = {name: site.counts for name, site in sites(model).items()}
    fp4, blocks, saturated = (sum(c) for c in zip(*counts.values(), strict=True))
    assert comparison.activation_fraction(model) == fp4 / blocks
    assert comparison.saturated_elements(model) == saturated
    calibrated = dict.fromkeys(counts, 0.25)
    for name, by in comparison.drift(model, calibrated).items():
        assert by == counts[name][0] / counts[name][1] - 0.25


def test_progress_counts_batches(
    compared: tuple[dict[str, Row], dict[str, nn.Module], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every model sees every batch once, and is in evaluation mode."""
    _, models, tokens = compared
    stages: list[tuple[str, int]] = []
    steps: list[int] = []

    @contextmanager
    def progress(title: str, count: int) -> Iterator[Callable[[], None]]:
        stages.append((title, count))
        yield lambda: steps.append(1)

    monkeypatch.setattr(comparison, "batches", lambda windows, vocabulary: windows.split(3))
    models["fgmp"].train()
    original = make_model("llama").train()
    pairs = {"original": original, **models}
    rows = {row.name: row for row in compare(pairs.items(), tokens, progress)}
    assert stages == [(f"comparing {name}", 3) for name in pairs] and len(steps) == 3 * len(pairs)
    assert not original.training and not models["fgmp"].training
    assert rows["fgmp"].kl == pytest.approx(compared[0]["fgmp"].kl, rel=1e-6)


def direct(original: nn.Module, model: nn.Module, tokens: Tensor) -> tuple[float, float]:
    """Perplexity and KL with the log-probabilities of all windows in memory."""
    reference, predicted = (
        next_token_log_probabilities(m.eval(), tokens) for m in (original, model)
    )
    losses = Losses(loss_of(predicted, tokens), tokens.shape[1] - 1)
    kl = divergence_of(predicted, reference).sum().item() / losses.predicted_tokens
    return losses.perplexity, kl


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_streaming_changes_nothing(family: str, tokens: Tensor) -> None:
    """Logits recomputed from the head's input give the figures of logits that were kept."""
    mixed = fgmp.quantize(make_model(family), tokens, Recipe(clip="off", compensate=False))
    models = {
        "fp8": uniform(make_model(family), mixed, "fp8"),
        "nvfp4": uniform(make_model(family), mixed, "nvfp4"),
        "fgmp": mixed,
    }
    rows = compared_with(make_model(family), models, tokens)
    for name, model in models.items():
        perplexity, kl = direct(make_model(family), model, tokens)
        # Only sums of float64 numbers are in another order.
        assert rows[name].perplexity == pytest.approx(perplexity, rel=1e-12)
        assert rows[name].kl == pytest.approx(kl, rel=1e-12)


def test_chunks_of_tokens_change_nothing(
    compared: tuple[dict[str, Row], dict[str, nn.Module], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, models, tokens = compared
    monkeypatch.setattr(comparison, "_CHUNK", 7 * 128)  # 7 of 23 tokens at a time
    for name, row in compared_with(make_model("llama"), models, tokens).items():
        assert row.kl == pytest.approx(rows[name].kl, rel=1e-12)
        assert row.top1_agreement_percent == rows[name].top1_agreement_percent


def test_one_model_is_in_memory_at_a_time(
    compared: tuple[dict[str, Row], dict[str, nn.Module], Tensor],
) -> None:
    _, models, tokens = compared
    alive: list[weakref.ref[nn.Module]] = []

    def one_by_one() -> Iterator[tuple[str, nn.Module]]:
        for name, model in {"original": make_model("llama"), **models}.items():
            gc.collect()
            assert not any(ref() for ref in alive), name
            fresh = copy.deepcopy(model)
            alive.append(weakref.ref(fresh))
            yield name, fresh
            del fresh

    rows = compare(one_by_one(), tokens)
    assert [row.name for row in rows] == ["original", "fp8", "nvfp4", "fgmp"] and len(alive) == 4
    assert {row.name: row for row in rows} == compared[0]


@pytest.mark.parametrize(
    ("values", "fraction", "expected"),
    [([3.0, 1.0, 2.0], 0.5, 2.0), ([0.0, 1.0], 0.99, 0.99), ([5.0], 0.99, 5.0)],
)
def test_quantiles(values: list[float], fraction: float, expected: float) -> None:
    assert _quantile(torch.tensor(values, dtype=torch.float64), fraction) == pytest.approx(expected)


def test_bits_of_one_format_per_site() -> None:
    """A site's format is known beforehand, so its stream needs no flags; a mixed one does."""
    assert activation_bits("uniform", 0.5) == 6.25
    assert activation_bits("fgmp", 0.5) == 6.25 + 1 / 16


def test_a_row_as_json_types() -> None:
    row = rows(20.0, 24.0, 21.0)
    facts = json.loads(json.dumps(row.to_dict()))
    assert facts == {**vars(row), "ci95": list(row.ci95)}
