"""What a checkpoint stores of its scores: histograms that give the fractions it has."""

import base64

import torch
from conftest import make_model
from torch import Tensor

import fgmp
from fgmp import Recipe
from fgmp.assign.frontier import Fractions
from fgmp.assign.policy import POLICIES
from fgmp.assign.weights import ScoredWeights
from fgmp.model.linear import mixed_linears
from fgmp.model.store import config_of
from fgmp.quantization.score_summary import WINDOW, score_summaries
from fgmp.quantization.task import Scores


def summaries_of(tokens: Tensor, **recipe: object) -> tuple[dict, torch.nn.Module]:
    model = fgmp.quantize(make_model("llama"), tokens, Recipe(**{"clip": "on", **recipe}))
    return config_of(model).scores, model


def below(entry: dict, threshold: float) -> float:
    """Blocks in bins that end at or below a threshold."""
    edges = (2 ** ((entry["first"] + i + 1) / 4) for i in range(len(entry["counts"])))
    return entry["zeros"] + sum(n for n, e in zip(entry["counts"], edges, strict=True)
                                if e <= threshold)  # fmt: skip


def test_weights_have_one_entry_each_with_all_blocks(tokens: Tensor) -> None:
    scores, model = summaries_of(tokens, fp4=0.6)
    assert scores["weights"].keys() == mixed_linears(model).keys()
    for name, module in mixed_linears(model).items():
        entry, flags = scores["weights"][name], module.packed.is_fp8()
        assert entry["zeros"] + sum(entry["counts"]) == flags.numel()
        fp4 = int((~flags).sum())
        next_bin = entry["threshold"] * 2 ** (1 / 4)
        assert below(entry, entry["threshold"]) <= fp4 <= below(entry, next_bin)


def test_stored_scores_decide_the_format(tokens: Tensor) -> None:
    """The stored scores of the first blocks, in bf16, lie on the side of their format."""
    scores, model = summaries_of(tokens, fp4=0.6)
    for name, module in mixed_linears(model).items():
        entry, flags = scores["weights"][name], module.packed.is_fp8()[: WINDOW[0], : WINDOW[1]]
        raw = torch.frombuffer(bytearray(base64.b64decode(entry["scores"])), dtype=torch.bfloat16)
        stored = raw.view(flags.shape).float()
        clear = (stored / entry["threshold"] - 1).abs() > 2**-8  # the rounding of bf16
        assert clear.float().mean() > 0.9
        assert torch.equal((stored > entry["threshold"])[clear], flags[clear])


def test_activations_are_counted_over_all_tokens(tokens: Tensor) -> None:
    scores, model = summaries_of(tokens, fp4=0.6)
    assert scores["tokens"] == len(tokens) * (tokens.shape[1] - 1)  # predictions
    for owner, entry in scores["activations"].items():
        width = mixed_linears(model)[owner].in_features
        blocks = entry["zeros"] + sum(entry["counts"])
        assert blocks == tokens.numel() * width / 16
        share = config_of(model).sites[owner].fp4_fraction
        next_bin = entry["threshold"] * 2 ** (1 / 4)
        assert below(entry, entry["threshold"]) <= share * blocks <= below(entry, next_bin)


def test_one_format_needs_no_scores_of_activations(tokens: Tensor) -> None:
    scores, _ = summaries_of(tokens, policy="nvfp4")
    assert scores["activations"] == {}
    assert all(entry["threshold"] is None for entry in scores["weights"].values())


def test_very_many_weights_have_smaller_windows() -> None:
    scores = {f"w{i}": torch.ones(64, 16, dtype=torch.float64) for i in range(3000)}
    variant = ScoredWeights({}, scores, {}, clipped=False)
    summary = score_summaries(
        Scores({}, {}, {}, [variant], POLICIES["fisher"], 1), Fractions(0.5, 0.5), clipped=True
    )
    rows, blocks = summary["window"]
    assert (rows, blocks) == (10, 16)
    encoded = [base64.b64decode(entry["scores"]) for entry in summary["weights"].values()]
    assert all(len(raw) == 2 * rows * blocks for raw in encoded)
    assert sum(map(len, encoded)) <= 1 << 20
