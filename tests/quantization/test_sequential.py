"""Every stage is packed on moments of the right inputs: the original's, and the quantized so far.

The judge knows no stages and no shortcuts: it runs whole copies of the original, one of them with
all that is packed so far, and sums moments in float64.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model
from torch import Tensor, nn

import fgmp
from fgmp import Recipe
from fgmp.assign.policy import POLICIES
from fgmp.assign.weights import pack_weights, score_weights
from fgmp.formats.activation import fake_quantize
from fgmp.model.convert import install
from fgmp.model.linear import MixedLinear, sites
from fgmp.model.losses import Loss, causal_lm_loss
from fgmp.model.select import linearize, quantizable, routers
from fgmp.model.store import config_of
from fgmp.pack.planes import PackedWeight
from fgmp.quantization import sequential
from fgmp.quantization.sequential import Stage, block_of, bytes_needed, pack_in_turn, stages
from fgmp.quantization.sharing import readers
from fgmp.sensitivity.moments import Moments, add_moments, new_moments
from fgmp.storage.resume import PartialResults


class Setting:
    """A linearized model whose sites keep everything in FP4, and what packs its weights."""

    def __init__(self, model: nn.Module, samples: Any, loss: Loss) -> None:
        linearize(model)
        self.model, self.samples, self.loss = model, samples, loss
        quantized = fgmp.quantize(
            copy.deepcopy(model), samples, Recipe(fp4=1.0, clip="off", compensate=False), loss=loss
        )
        self.records = {owner: site.record for owner, site in sites(quantized).items()}
        config = config_of(quantized)
        self.linears_of = {o: s.linears for o, s in config.sites.items()}
        self.shared = config.shared
        self.readers = readers(self.linears_of, self.shared)
        linears = quantizable(model).items()
        self.weights = {n: m.weight.detach() for n, m in linears if n not in self.shared}

    def pack(self, groups: Any, moments: dict[str, Moments]) -> dict[str, PackedWeight]:
        policy = POLICIES["error"]
        scored = score_weights(
            self.weights, self.weights, groups, policy, rule="benefit", clipped=True
        )
        none = {n: torch.zeros_like(s, dtype=torch.bool) for n, s in scored.scales.items()}
        return pack_weights(self.weights, self.weights, groups, policy, scored, none, moments)

    def in_turn(
        self,
        pack: Callable[..., dict[str, PackedWeight]] | None = None,
        results: PartialResults | None = None,
    ) -> dict[str, PackedWeight]:
        return pack_in_turn(
            self.model,
            self.linears_of,
            self.records,
            self.samples,
            self.loss,
            {"only": pack or self.pack},
            results=results,
            shared=self.shared,
        )["only"]

    def with_weights(self, packed: dict[str, PackedWeight]) -> nn.Module:
        """A copy with these weights and their sites."""
        model = copy.deepcopy(self.model)
        done = {o: n for o, n in self.linears_of.items() if self.shared.get(o, o) in packed}
        install(model, packed, self.records, done, self.shared)
        return model

    @torch.no_grad()
    def inputs(self, model: nn.Module, owner: str, choices: Iterator[Any] | None) -> Tensor:
        """All that a site reads, float64 (tokens, K); routers repeat ``choices``."""
        seen: list[Tensor] = []
        with ExitStack() as stack:
            hook = model.get_submodule(owner).register_forward_pre_hook(
                lambda _, args: seen.append(args[0].flatten(0, -2).clone())
            )
            stack.callback(hook.remove)
            if choices is not None:
                for name in routers(model):
                    router = model.get_submodule(name)
                    repeat = router.register_forward_hook(lambda *_: next(choices))
                    stack.callback(repeat.remove)
            for sample in self.samples:
                self.loss(model, sample)
        return torch.cat(seen) if seen else torch.zeros(0, len(self.records[owner].sensitivity))

    @torch.no_grad()
    def choices(self) -> list[Any]:
        """What the original's routers give, call by call."""
        outputs: list[Any] = []
        hooks = [
            self.model.get_submodule(name).register_forward_hook(
                lambda _, __, out: outputs.append(out)
            )
            for name in routers(self.model)
        ]
        for sample in self.samples:
            self.loss(self.model, sample)
        for hook in hooks:
            hook.remove()
        return outputs


def judged(setting: Setting) -> Callable[..., dict[str, PackedWeight]]:
    """Packs as the setting does, after every moment was found right."""
    packed: dict[str, PackedWeight] = {}
    choices = setting.choices()

    def pack(groups: Any, moments: dict[str, Moments]) -> dict[str, PackedWeight]:
        quantized = setting.with_weights(packed)
        for first, sums in moments.items():
            h, d = torch.zeros(2, *sums.h.shape, dtype=torch.float64)
            for owner in setting.readers[first]:
                x = setting.inputs(setting.model, owner, None)
                y = setting.inputs(quantized, owner, iter(choices))
                site = setting.records[owner]
                q = (fake_quantize(y, site)[0] * site.t).double() if len(y) else y.double()
                h += q.T @ q
                d += (x.double() - q).T @ q
            if sums.rows:
                d = torch.cat([setting.weights[name] for name in sums.rows]).double() @ d
            # Sums in fp32, of a few hundred tokens.
            close = {"rtol": 1e-5, "atol": 1e-5 * float(h.trace() / len(h))}
            torch.testing.assert_close(sums.h.double(), h, **close)
            torch.testing.assert_close(sums.d.double(), d, **close)
        packed.update(setting.pack(groups, moments))
        return {name: packed[name] for names in groups for name in names}

    return pack


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "mixtral"])
def test_moments_are_those_of_two_whole_models(family: str, tokens: Tensor) -> None:
    setting = Setting(make_model(family), tokens[:3], causal_lm_loss)
    packed = setting.in_turn(judged(setting))
    assert packed.keys() == setting.weights.keys()


class Chain(nn.Module):
    """Blocks that add to what they read; ``skip`` sends the first one's output past the others."""

    def __init__(self, blocks: int = 4, *, skip: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 32)) for _ in range(blocks)
        )
        self.head, self.skip = nn.Linear(32, 16), skip

    def forward(self, x: Tensor) -> Tensor:
        first = None
        for block in self.blocks:
            x = x + block(x)
            if first is None:
                first = x
            if self.skip:
                x = x + 0.5 * first
        return self.head(x)


class Gated(nn.Module):
    """Blocks with one site of two linears and one of one, some of whose weights are shared."""

    def __init__(self, *pairs: str, width: int = 48) -> None:
        super().__init__()
        torch.manual_seed(0)
        shapes = {"up": (32, width), "side": (32, width), "down": (width, 32)}
        self.blocks = nn.ModuleList(_Gate(shapes) for _ in range(4))
        for pair in pairs:
            one, other = (self.get_submodule(f"blocks.{name}") for name in pair.split())
            other.weight = one.weight

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


class _Gate(nn.ModuleDict):
    def __init__(self, shapes: dict[str, tuple[int, int]]) -> None:
        super().__init__({name: nn.Linear(*shape) for name, shape in shapes.items()})

    def forward(self, x: Tensor) -> Tensor:
        return self["down"](self["up"](x) * self["side"](x).tanh())


SHARING = {
    "one of a site": ["0.up 2.up"],
    "few rows": ["0.down 2.down"],
    "whole blocks": ["0.up 2.up", "0.side 2.side", "0.down 2.down"],
    "the last stage of a block": ["1.down 3.down"],
    "crossed": ["0.up 2.side", "0.side 3.up"],
    "one site": ["1.up 1.side"],
    "three": ["0.up 1.up", "0.up 3.side"],
}


@pytest.mark.parametrize("kind", SHARING)
def test_moments_of_a_shared_weight_are_sums_over_all_its_uses(kind: str) -> None:
    model = Gated(*SHARING[kind], width=96 if kind == "few rows" else 48)
    samples = torch.randn(3, 20, 32, generator=torch.Generator().manual_seed(1))
    setting = Setting(model, samples, squares)
    assert len(setting.shared) == len(SHARING[kind])
    packed = setting.in_turn(judged(setting))
    assert packed.keys() == setting.weights.keys()


def test_variants_share_weights_and_their_h(tmp_path: Path) -> None:
    """And a run that stopped goes on with the same bits."""
    samples = torch.randn(3, 20, 32, generator=torch.Generator().manual_seed(1))
    setting = Setting(Gated(*SHARING["whole blocks"]), samples, squares)
    alone = setting.in_turn()
    results, stop = PartialResults(tmp_path, "a" * 16), True
    seen: list[dict[str, Moments]] = []

    def pack(groups: Any, moments: dict[str, Moments]) -> dict[str, PackedWeight]:
        if stop and len(seen) == 5:
            raise KeyboardInterrupt
        seen.append(moments)
        return setting.pack(groups, moments)

    def both() -> dict[str, dict[str, PackedWeight]]:
        arguments = setting.linears_of, setting.records, samples, squares
        packers = {"other": pack, "one": pack}
        return pack_in_turn(
            setting.model, *arguments, packers, results=results, shared=setting.shared
        )

    with pytest.raises(KeyboardInterrupt):
        both()
    stop = False
    packed = both()
    assert same(packed["one"], alone) and same(packed["other"], alone)
    assert all(seen[0][name].h is sums.h for name, sums in seen[1].items())


def squares(model: nn.Module, x: Tensor) -> tuple[Tensor, int]:
    return model(x).square().sum(), len(x)


def twice(model: nn.Module, x: Tensor) -> tuple[Tensor, int]:
    """A loss that runs the model on two halves, as those of pairs do."""
    return (model(x[:5]).sum() - model(x[5:]).sum()).square(), len(x)


@pytest.mark.parametrize("loss", [squares, twice])
@pytest.mark.parametrize("skip", [False, True])
def test_any_module_and_any_loss(loss: Loss, skip: bool) -> None:
    """Blocks here do not hand on all there is, so that shortcuts would be wrong."""
    samples = torch.randn(3, 20, 32, generator=torch.Generator().manual_seed(1))
    setting = Setting(Chain(skip=skip), samples, loss)
    setting.in_turn(judged(setting))


@pytest.mark.parametrize("room", [0, 20_000])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_variants_side_by_side_are_those_packed_alone(
    family: str, room: int, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where outputs of linears are kept for some samples only, or for none."""
    setting = Setting(make_model(family), tokens[:3], causal_lm_loss)

    seen: dict[str, list[Moments]] = {"other": [], "one": []}

    def recorded(variant: str) -> Callable[..., dict[str, PackedWeight]]:
        def pack(groups: Any, moments: dict[str, Moments]) -> dict[str, PackedWeight]:
            seen[variant] += moments.values()
            if variant == "other":  # another weight, which changes the inputs of later stages
                moments = {owner: replace(m, d=m.d * 0.9) for owner, m in moments.items()}
            return setting.pack(groups, moments)

        return pack

    alone = setting.in_turn(recorded("one"))
    moments_alone = seen.pop("one")
    seen["one"] = []
    monkeypatch.setattr(sequential, "_CACHED_BYTES", room)
    packed = pack_in_turn(
        setting.model,
        setting.linears_of,
        setting.records,
        setting.samples,
        setting.loss,
        {variant: recorded(variant) for variant in seen},
    )
    assert same(packed["one"], alone) and not same(packed["other"], alone)
    shared = [one.h is m.h and one.roots is m.roots for m, one in zip(*seen.values(), strict=True)]
    assert shared == [True] + [False] * (len(shared) - 1)
    for one, expected in zip(seen["one"], moments_alone, strict=True):
        assert torch.equal(one.h, expected.h) and torch.equal(one.d, expected.d)
    assert torch.equal(seen["one"][0].d, seen["other"][0].d)
    assert not torch.equal(seen["one"][-1].d, seen["other"][-1].d)


def test_a_linear_runs_once_where_its_output_is_kept(
    tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: dict[str, int] = {}
    forward = MixedLinear.forward

    def counted(linear: MixedLinear, x: Tensor) -> Tensor:
        shape = f"{linear.out_features}x{linear.in_features}"
        runs[shape] = runs.get(shape, 0) + 1
        return forward(linear, x)

    monkeypatch.setattr(MixedLinear, "forward", counted)
    setting = Setting(make_model("llama"), tokens, causal_lm_loss)
    runs.clear()
    setting.in_turn()
    first = [name for name in setting.weights if name.startswith("model.layers.0.")]
    last = [n for n in setting.weights if n.startswith("model.layers.1.") and "down" not in n]
    assert sum(runs.values()) == len(tokens) * len(first + last)


def test_a_stage_is_of_one_block_and_one_kind() -> None:
    model = make_model("mixtral")
    linearize(model)
    names = list(quantizable(model))
    assert block_of(model, names[0]) == "model.layers.0"
    first = [stage for stage in stages(model, names) if stage.block == "model.layers.0"]
    experts = "model.layers.0.mlp.experts"
    assert first[-2:] == [
        Stage("model.layers.0", [f"{experts}.{e}.gate_up_proj" for e in range(4)]),
        Stage("model.layers.0", [f"{experts}.{e}.down_proj" for e in range(4)]),
    ]
    assert [len(stage.owners) for stage in first] == [1, 1, 1, 1, 4, 4]
    plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    assert stages(plain, ["0", "1"]) == [Stage("", ["0"]), Stage("", ["1"])]


def test_each_block_runs_once_a_stage_of_its_own_and_once_more(tokens: Tensor) -> None:
    """In both models and for every sample; the first sample runs whole once besides."""
    setting = Setting(make_model("llama"), tokens, causal_lm_loss)
    layers = setting.model.model.layers
    runs = [0] * len(layers)

    def count(index: int) -> None:
        runs[index] += 1

    for index, layer in enumerate(layers):
        layer.self_attn.register_forward_pre_hook(lambda *_, index=index: count(index))
    setting.in_turn()
    assert len(stages(setting.model, list(setting.linears_of))) == 8
    assert runs == [len(tokens) * (4 + 5) + 1, len(tokens) * (4 + 4) + 1]


def test_beats_moments_of_the_original_alone() -> None:
    """In the output's error, on inputs it has not seen: 0.73 of it, where errors pass through."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 400, 4, generator=g) @ torch.randn(4, 32, generator=g) / 2
    seen, unseen = x + torch.randn(x.shape, generator=g) * 0.03
    weights = torch.randn(7, 32, 32, generator=g) / 32**0.5
    net = nn.Sequential(*(m for _ in weights for m in (nn.Linear(32, 32), nn.Tanh())))
    for linear, weight in zip(net[::2], weights, strict=True):
        linear.weight.data.copy_(weight)
    setting = Setting(net, seen.view(4, 100, 32), squares)
    alone = {}
    for owner, names in setting.linears_of.items():
        x, site = setting.inputs(net, owner, None), setting.records[owner]
        moments = new_moments(32, x.device)
        add_moments(moments, x, fake_quantize(x, site)[0] * site.t)
        alone |= setting.pack([names], {owner: moments})

    @torch.no_grad()
    def error(packed: dict[str, PackedWeight]) -> float:
        return (setting.with_weights(packed)(unseen) - net(unseen)).square().mean().item()

    assert error(setting.in_turn()) < 0.85 * error(alone)


@pytest.mark.parametrize("call", [1, 2, 7, 30])
def test_an_interrupted_run_leaves_the_model_alone(call: int, tokens: Tensor) -> None:
    calls = 0

    def loss(model: nn.Module, sample: Tensor) -> tuple[Tensor, int]:
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt
        return causal_lm_loss(model, sample)

    setting = Setting(make_model("mixtral").train(), tokens[:2], causal_lm_loss)
    before = dict(setting.model.named_modules())
    setting.loss = loss
    with pytest.raises(KeyboardInterrupt):
        setting.in_turn()
    assert dict(setting.model.named_modules()) == before and setting.model.training
    for module in before.values():
        assert "forward" not in module.__dict__
        assert not module._forward_hooks and not module._forward_pre_hooks


@pytest.mark.parametrize("stop", [1, 5, -1])
@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
def test_an_interrupted_run_goes_on(family: str, stop: int, tokens: Tensor, tmp_path: Path) -> None:
    """Wherever it stopped, also a block on: the same bits, and no stage is packed twice."""
    setting = Setting(make_model(family), tokens, causal_lm_loss)
    expected = setting.in_turn()
    count = len(stages(setting.model, list(setting.linears_of)))
    results, packed, allowed = PartialResults(tmp_path, "a" * 16), 0, stop % count

    def pack(groups: Any, moments: dict[str, Moments]) -> dict[str, PackedWeight]:
        nonlocal packed
        if packed == allowed:
            raise KeyboardInterrupt
        packed += 1
        return setting.pack(groups, moments)

    with pytest.raises(KeyboardInterrupt):
        setting.in_turn(pack, results)
    allowed = count + 1
    weights = setting.in_turn(pack, results)
    assert packed == count
    assert same(weights, expected)


def same(one: dict[str, PackedWeight], other: dict[str, PackedWeight]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[name].tensors()[key], plane)
        for name, weight in other.items()
        for key, plane in weight.tensors().items()
    )


@pytest.mark.parametrize("damage", ["another linear", "no shape", "cut", "tensors", "header"])
def test_a_damaged_stage_is_reported_and_packed_again(
    damage: str, tokens: Tensor, tmp_path: Path
) -> None:
    setting = Setting(make_model("llama"), tokens[:2], causal_lm_loss)
    lines: list[str] = []
    results = PartialResults(tmp_path, "a" * 16, lines.append)
    expected = setting.in_turn(setting.pack, results)
    part, packed = "stage 00003", 0
    path = results.file(part).path
    whole = path.read_bytes()
    if damage in ("another linear", "no shape"):  # intact, but not what this run stored
        state = results.load(part)
        assert state is not None
        name = next(n for n in state.tensors if n.endswith(".shape"))
        shape = state.tensors.pop(name)
        if damage == "another linear":
            state.tensors[f"only:another.{name}"] = shape
        results.store(part, state.tensors)
    else:
        content = bytearray(whole)
        content[whole.index(b"crc32") + 30 if damage == "header" else -100] ^= 1
        path.write_bytes(content[: len(content) // 2] if damage == "cut" else content)

    def pack(groups: Any, moments: dict[str, Moments]) -> dict[str, PackedWeight]:
        nonlocal packed
        packed += 1
        return setting.pack(groups, moments)

    assert same(setting.in_turn(pack, results), expected)
    assert packed == 1 and path.read_bytes() == whole
    (line,) = lines
    assert line.startswith(f"{path}: ") and line.endswith("done again")


def test_bytes_are_moments_of_a_stage_and_outputs_of_a_block() -> None:
    model, samples = Chain(), torch.zeros(3, 20, 32)
    needed = bytes_needed(model, quantizable(model), samples, squares)
    moments, factors = 8 * 48**2, 4 * 48**2
    outputs, kept = 3 * (20 * 32 * 4), 3 * (20 * (48 + 32) * 4)
    assert needed == moments + factors + 2 * outputs + kept
    needed = bytes_needed(model, quantizable(model), samples, squares, variants=2)
    assert needed == 2 * moments + factors + 3 * outputs + 2 * kept
