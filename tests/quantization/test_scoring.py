"""Scores are those of the definitions, and an interrupted scoring resumes to the same bits."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model
from small_runs import Watch, same_state
from torch import Tensor, nn

import fgmp
from fgmp import Recipe
from fgmp.assign.methods import Methods
from fgmp.assign.policy import POLICIES, site_constants
from fgmp.assign.scale_search import search_scale_codes
from fgmp.assign.weights import ScoredWeights, score_weights
from fgmp.formats.activation import scores as activation_scores
from fgmp.model.linear import mixed_linears
from fgmp.quantization import scoring
from fgmp.quantization.pipeline import prepare
from fgmp.quantization.scoring import score
from fgmp.quantization.task import Scores, Task
from fgmp.sensitivity.fisher import Calibration, calibrate
from fgmp.sensitivity.histogram import new_histogram
from fgmp.storage.resume import Periodic, forget


def prepared(tokens: Tensor, **recipe: object) -> tuple[Task, Calibration]:
    """A task on five sequences, and its calibration."""
    recipe = {"compensate": False, **recipe}
    task = prepare(make_model("llama"), tokens[:5], Recipe(**recipe), held_out=tokens[5:]).task
    return task, calibrate(task.model, task.linears, task.samples, task.fisher_loss)


def same(one: Scores, other: Scores) -> bool:
    return (
        one.linears_of == other.linears_of
        and all(
            torch.equal(h.counts, other.histograms[name].counts)
            for name, h in one.histograms.items()
        )
        and all(
            a.t == b.t and a.clipped == b.clipped and torch.equal(x[name], y[name])
            for a, b in zip(one.variants, other.variants, strict=True)
            for x, y in ((a.scales, b.scales), (a.scores, b.scores))
            for name in a.t
        )
    )


@pytest.mark.parametrize(
    ("clip", "searched"), [("on", [True]), ("off", [False]), ("auto", [False, True])]
)
def test_weights_are_scored_under_every_choice_of_scales(
    clip: str, searched: list[bool], tokens: Tensor
) -> None:
    task, calibration = prepared(tokens, clip=clip, fp4=1.0)
    result = score(task, calibration)
    assert [variant.clipped for variant in result.variants] == searched
    assert result.predictions == 5 * 23
    for variant in result.variants:
        expected = score_weights(
            task.weights,
            calibration.weights,
            list(result.linears_of.values()),
            POLICIES["fisher"],
            rule="benefit",
            clipped=variant.clipped,
        )
        assert variant.t == expected.t
        for name in task.linears:
            assert torch.equal(variant.scales[name], expected.scales[name])
            assert torch.equal(variant.scores[name], expected.scores[name])


def test_sites_are_named_by_their_first_linear(tokens: Tensor) -> None:
    task, calibration = prepared(tokens, clip="off", fp4=1.0, headroom=2.0, policy="error")
    result = score(task, calibration)
    q, k, v = (f"model.layers.1.self_attn.{n}_proj" for n in "qkv")
    assert result.linears_of[q] == [q, k, v]
    assert list(result.linears_of) == list(result.sites) == list(result.histograms)
    for owner, site in result.sites.items():
        statistics = calibration.sites[owner]
        expected = site_constants(
            POLICIES["error"], task.recipe.quantizer, statistics.g2, statistics.amax, 2.0
        )
        assert (site.r, site.gamma, site.rule) == (expected.r, expected.gamma, expected.rule)
        assert torch.equal(site.sensitivity, expected.sensitivity)


def test_every_activation_block_is_counted(tokens: Tensor) -> None:
    task, calibration = prepared(tokens, clip="off")
    result = score(task, calibration)
    histograms = {owner: new_histogram(site) for owner, site in result.sites.items()}

    def count(owner: str, _: nn.Module, args: tuple[Tensor]) -> None:
        histograms[owner].add(activation_scores(args[0], result.sites[owner]))

    for owner in histograms:
        task.linears[owner].register_forward_pre_hook(partial(count, owner))
    with torch.no_grad():
        for sample in task.samples:
            task.model(input_ids=sample[None])
    for owner, histogram in histograms.items():
        assert torch.equal(result.histograms[owner].counts, histogram.counts)
        blocks = 5 * 24 * -(-task.linears[owner].in_features // 16)
        assert result.histograms[owner].total == blocks


@pytest.mark.parametrize(
    ("recipe", "counted"),
    [
        ({"fp4": 0.5}, True),
        ({"fp4": 1.0}, False),
        ({"fp4": 0.0}, False),
        ({"fp4": 1.0, "fp4_activations": 0.5}, True),
        ({"fp4": 0.5, "policy": "nvfp4"}, False),
        ({"bits": 5.0}, True),
    ],
)
def test_activations_are_scored_where_a_threshold_follows(
    recipe: dict[str, object], counted: bool, tokens: Tensor
) -> None:
    task, calibration = prepared(tokens, clip="off", **recipe)
    watch = Watch(task.model)
    score(replace(task, progress=watch), calibration)
    assert [s.sequences for s in watch.of("scoring activations")] == [5] * counted
    assert [s.sequences for s in watch.of("scoring weights")] == [0]


# Interrupted and resumed.


def quantized(tokens: Tensor, watch: Watch, policy: str, resume: Path | None) -> nn.Module:
    recipe = Recipe(policy=policy, fp4=0.6, clip="auto", compensate=False)
    return fgmp.quantize(
        watch.model, tokens[:5], recipe, held_out=tokens[5:], resume=resume, progress=watch
    )


@pytest.fixture
def weights_scored(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """One entry for each weight that is scored: whether its scales are searched."""
    scored: list[bool] = []

    def counted(*args: Any, **options: Any) -> ScoredWeights:
        result = score_weights(*args, **options)
        scored.extend([options["clipped"]] * len(result.t))
        return result

    monkeypatch.setattr(scoring, "score_weights", counted)
    return scored


@pytest.mark.parametrize("policy", ["fisher", "random"])
@pytest.mark.parametrize(
    ("stop", "samples", "nearest", "searched"),
    [
        (("scoring activations", 0, 1), 1, 0, 0),
        (("scoring activations", 0, 3), 3, 0, 0),
        (("scoring weights", 0, 2), 5, 0, 0),  # within the site of q, k and v
        (("scoring weights", 0, 6), 5, 4, 0),
        (("scoring weights", 1, 5), 5, 14, 4),
    ],
)
def test_an_interrupted_scoring_resumes_to_equal_bits(
    stop: tuple[str, int, int],
    samples: int,
    nearest: int,
    searched: int,
    policy: str,
    tokens: Tensor,
    tmp_path: Path,
    weights_scored: list[bool],
) -> None:
    """After some samples, after some weights, or within a site, whose weights are scored again."""
    expected = quantized(tokens, Watch(make_model("llama")), policy, None)
    assert len(mixed_linears(expected)) == 14
    with pytest.raises(KeyboardInterrupt):
        quantized(tokens, Watch(make_model("llama"), stop), policy, tmp_path)
    weights_scored.clear()
    resumed = Watch(make_model("llama"))
    assert same_state(quantized(tokens, resumed, policy, tmp_path), expected)
    assert [s.sequences for s in resumed.of("calibrating")] == [0]
    assert [s.sequences for s in resumed.of("scoring activations")] == [5 - samples]
    assert (weights_scored.count(False), weights_scored.count(True)) == (
        14 - nearest,
        14 - searched,
    )
    assert all(stage.done == stage.steps for stage in resumed.stages)


@pytest.mark.parametrize("policy", ["fisher", "random"])
def test_a_second_ctrl_c_within_a_site_loses_that_site_only(
    policy: str, tokens: Tensor, weights_scored: list[bool], tmp_path: Path
) -> None:
    """The first waits for the end of a site; here it comes from within the search of scales."""
    calls = 0

    def pressing(weight: Tensor, sensitivity: Tensor, t: float) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 6:  # in the site of gate and up
            signal.raise_signal(signal.SIGINT)
            if twice:
                signal.raise_signal(signal.SIGINT)
        return search_scale_codes(weight, sensitivity, t)

    task, calibration = prepared(tokens, clip="on", fp4=1.0, policy=policy)
    task = replace(task, methods=Methods(search_scales=pressing))
    twice = False
    expected = score(replace(task, methods=Methods()), calibration)
    for twice, done in ((False, 6), (True, 4)):
        calls = 0
        task = replace(task, resume=tmp_path / str(twice))
        with pytest.raises(KeyboardInterrupt):
            score(task, calibration)
        weights_scored.clear()
        assert same(score(task, calibration), expected)
        assert len(weights_scored) == 14 - done


def test_an_error_within_a_sequence_leaves_whole_sequences_only(
    tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first layer has counted the third sequence, and the second has not."""
    task, calibration = prepared(tokens, clip="off")
    task = replace(task, resume=tmp_path)
    expected = score(replace(task, resume=None), calibration)
    sequences = 0

    def stumble(*_: object) -> None:
        nonlocal sequences
        sequences += 1
        if sequences == 3:
            raise MemoryError

    for seconds, resumed_from in ((1000, 0), (-1, 2)):
        sequences = 0
        monkeypatch.setattr(scoring, "Periodic", partial(Periodic, seconds))
        hook = task.model.model.layers[1].register_forward_pre_hook(stumble)
        with pytest.raises(MemoryError):
            score(task, calibration)
        hook.remove()
        watch = Watch(task.model)
        assert same(score(replace(task, progress=watch), calibration), expected)
        assert [s.sequences for s in watch.of("scoring activations")] == [5 - resumed_from]
        forget(tmp_path)


@pytest.mark.parametrize(
    ("title", "left"), [("scoring activations", (2, 1)), ("scoring weights", (11, 1))]
)
def test_scores_are_stored_now_and_then(
    title: str,
    left: tuple[int, int],
    tokens: Tensor,
    tmp_path: Path,
    weights_scored: list[bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A run that is killed, not interrupted, resumes from its last periodic state."""
    task, calibration = prepared(tokens, clip="on", policy="random", fp4=0.6)
    task = replace(task, resume=tmp_path)
    expected = score(replace(task, resume=None), calibration)
    monkeypatch.setattr(scoring, "Periodic", partial(Periodic, -1))
    on_disk: list[dict[str, bytes]] = []  # after every step, what a killed run would leave

    @contextmanager
    def progress(name: str, steps: int) -> Iterator[Callable[[], None]]:
        def advance() -> None:
            if name == title:
                on_disk.append({p.name: p.read_bytes() for p in tmp_path.iterdir()})

        yield advance

    score(replace(task, progress=progress), calibration)
    for step, steps_left in zip((3, -1), left, strict=True):
        folder = tmp_path / str(step)
        folder.mkdir()
        for name, content in on_disk[step].items():
            (folder / name).write_bytes(content)
        weights_scored.clear()
        watch = Watch(task.model)
        assert same(score(replace(task, resume=folder, progress=watch), calibration), expected)
        (stage,) = watch.of("scoring activations")
        if title == "scoring activations":
            assert (stage.sequences, len(weights_scored)) == (steps_left, 14)
        else:
            assert (stage.sequences, len(weights_scored)) == (0, steps_left)
