"""Calibration: the Fisher information of weights and activations.

With L the summed token losses of one sequence and n all predicted tokens (nats^2 a token):

    F_w    = (1/n) sum over sequences (dL/dw)^2                       one value a weight
    F_x[k] = (1/n) sum over sequences, tokens (dL/dx[token, k])^2     one value a channel

F_w may be kept as two factors instead, :mod:`fgmp.sensitivity.squares`.

Squares of sums need one sequence's gradient at a time, so sequences go through the model one by
one: that is right for every architecture, also those that flatten tokens (experts), and makes
the result independent of any batch size. Parameters are frozen and only activations carry
gradients; each linear's weight gradient is formed in a hook and squared on the spot (if it is
formed at all), so no gradient of the whole model ever exists.

A *site* is one activation tensor that one or more linears read. Sites are found by tensor
identity: before the first linear that reads a tensor, the tensor is replaced by an alias whose
gradient is the total that reaches it through those linears.
"""

import contextlib
import hashlib
import json
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fgmp.errors import InputError
from fgmp.files import replacing
from fgmp.fingerprint import bytes_of, parts
from fgmp.sensitivity.squares import SQUARES

Loss = Callable[[nn.Module, Any], tuple[Tensor, int]]
"""(model, sample) to (summed loss in nats of one sequence, number of predictions in it)."""

SAVE_EVERY_SECONDS = 120


@dataclass
class SiteStatistics:
    """What calibration learnt of one activation tensor.

    Attributes:
        linears: names of the linears that read it, in the order they did.
        g2: F_x, fp32 (K,).
        amax: largest magnitude after rounding to bf16.
        tokens: rows that passed through.
    """

    linears: list[str]
    g2: Tensor
    amax: float = 0.0
    tokens: int = 0


@dataclass
class Calibration:
    """The result: F_w by linear (fp32, the weight's shape), statistics by site, predictions n."""

    weights: Mapping[str, Tensor] = field(default_factory=dict)
    sites: dict[str, SiteStatistics] = field(default_factory=dict)
    predictions: int = 0


def next_token_logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """Logits, fp32 (T - 1, V), for the tokens after the first of one sequence, int64 (T,)."""
    tokens = tokens.to(next(model.parameters()).device)
    logits: Tensor = model(input_ids=tokens.unsqueeze(0), use_cache=False).logits[0, :-1]
    return logits.float()


def causal_lm_loss(model: nn.Module, tokens: Tensor) -> tuple[Tensor, int]:
    """Summed next-token loss of one sequence, int64 (T,), in nats; T - 1 predictions."""
    logits = next_token_logits(model, tokens)
    loss = nn.functional.cross_entropy(logits, tokens[1:].to(logits.device), reduction="sum")
    return loss, len(tokens) - 1


def drawn_label_loss(model: nn.Module, tokens: Tensor) -> tuple[Tensor, int]:
    """:func:`causal_lm_loss` with labels drawn from the model's own predictions.

    Summed over one sequence, int64 (T,), in nats; T - 1 predictions. Its squared gradients have the
    true Fisher information as their mean, the curvature of the KL from the model, where labels of
    the text have the empirical one (arXiv 1905.12558). The same tokens draw the same labels.
    """
    logits = next_token_logits(model, tokens)
    seed = int.from_bytes(hashlib.sha256(bytes_of(tokens)).digest()[:7], "little")
    source = torch.Generator(logits.device).manual_seed(seed)
    likely = logits.detach().softmax(-1)
    if likely.isnan().any():  # nothing can be drawn: the loss says so
        return likely.sum(), len(likely)
    labels = likely.multinomial(1, generator=source).squeeze(-1)
    del likely  # as large as the logits
    return nn.functional.cross_entropy(logits, labels, reduction="sum"), len(labels)


def calibrate(
    model: nn.Module,
    linears: dict[str, nn.Linear],
    samples: Sequence[Any] | Tensor,
    loss: Loss = causal_lm_loss,
    *,
    fisher: str = "exact",
    groups: dict[str, list[str]] | None = None,
    state: Path | None = None,
    reuse: bool = False,
    advance: Callable[[], None] = lambda: None,
) -> Calibration:
    """Run ``samples`` forward and backward and collect the Fisher information.

    Args:
        model: any module; left as it was, also after an error.
        linears: the linears to calibrate, by name.
        samples: each one sequence, given to ``loss`` as it is.
        loss: summed loss and predictions of a sample.
        fisher: how F_w is kept, a key of :data:`fgmp.sensitivity.squares.SQUARES`.
        groups: sites that override those found by tensor identity: a name and its linears.
        state: file that keeps the sums, written now and then, on an interruption and at the end;
            a later call with the same model, samples and groups goes on from there. The caller
            removes it.
        reuse: refuse a ``state`` of another run instead of starting anew over it.
        advance: called after each sample.

    Raises:
        InputError: an activation, the loss or a gradient is not finite, sites are inconsistent,
            or ``state`` is not such a file, or under ``reuse`` one of another run or with another
            ``fisher``.
    """
    recorder = _Recorder(linears, fisher, groups or {})
    fingerprint = _fingerprint(model, linears, samples, groups or {}, loss) if state else {}
    start = recorder.restore(state, fingerprint, reuse) if state else 0
    for _ in range(start):
        advance()
    saved = time.monotonic()
    done = start
    try:
        with frozen(model), recorder.hooks():
            for index in range(start, len(samples)):
                with _uninterrupted():
                    recorder.begin()
                    total, predictions = loss(model, samples[index])
                    if not total.isfinite():
                        raise InputError(
                            f"calibration: the loss of sequence {index} is {total.item()}"
                        )
                    total.backward()
                    recorder.end(predictions)
                    done = index + 1
                advance()
                if state and time.monotonic() - saved > SAVE_EVERY_SECONDS:
                    recorder.store(state, fingerprint, done)
                    saved = time.monotonic()
    finally:
        if state and done > start and recorder.whole:
            recorder.store(state, fingerprint, done)
    return recorder.result()


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter takes a gradient and no dropout drops, for a while."""
    training = [module for module in model.modules() if module.training]
    wanted = [p for p in model.parameters() if p.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
        for parameter in wanted:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait for the end: half a sequence's sums could not be gone on from.

    A second one does not wait.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # other threads get no signals
        return
    received = []

    def note(number: int, _: object) -> None:
        received.append(number)
        signal.signal(number, usual[number])

    usual = {int(n): signal.signal(n, note) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for ended, handler in usual.items():
            signal.signal(ended, handler)
    for number in received:
        signal.raise_signal(number)


class _Recorder:
    """Hooks on the linears and the sums that they feed."""

    def __init__(
        self, linears: dict[str, nn.Linear], fisher: str, groups: dict[str, list[str]]
    ) -> None:
        self.linears = linears
        self.fisher = fisher
        self.squares = SQUARES[fisher](linears)
        self.forced: dict[str, str] = {}
        for group, members in groups.items():
            for name in members:
                if name not in linears:
                    raise InputError(f"site {group}: {name!r} is not a quantized linear")
                self.forced[name] = group
        self.sums = Calibration()
        self.site_by_linear: dict[str, str] = {}
        self.whole = True  # the sums hold no part of a sequence

    # One sequence: begin, forward (pre hook, then hook, of every linear), backward, end.

    def begin(self) -> None:
        self.whole = False
        self.aliases: dict[tuple[Any, ...], tuple[str, Tensor, Tensor]] = {}
        self.calls = dict.fromkeys(self.linears, 0)
        self.uses: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def before(self, name: str, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0]
        key = (x.data_ptr(), x.shape, x.stride(), x._version, self.forced.get(name))
        if key not in self.aliases:
            site = self._site(name)
            alias = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
            alias.register_hook(partial(self._site_gradient, site))
            self._site_input(site, x)
            self.aliases[key] = (site, alias, x)  # x stays alive, so its address stays taken
        site, alias, _x = self.aliases[key]
        if name not in self.site_by_linear:
            self.site_by_linear[name] = site
            self.sums.sites[site].linears.append(name)
        elif self.site_by_linear[name] != site:
            raise InputError(
                f"{name} read the tensor of site {site}, earlier that of "
                f"{self.site_by_linear[name]}; name the sites explicitly"
            )
        return (alias, *args[1:])

    def after(self, name: str, _: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        self.calls[name] += 1
        out.register_hook(partial(self._weight_gradient, name, args[0].detach()))

    def end(self, predictions: int) -> None:
        for name, uses in self.uses.items():
            self.squares.add(name, *(torch.cat(part) for part in zip(*uses, strict=True)))
        self.sums.predictions += predictions
        self.aliases.clear()
        self.uses.clear()
        self.whole = True

    def _site(self, name: str) -> str:
        site = self.forced.get(name) or self.site_by_linear.get(name) or name
        if site not in self.sums.sites:
            k = self.linears[name].in_features
            device = self.linears[name].weight.device
            self.sums.sites[site] = SiteStatistics(linears=[], g2=torch.zeros(k, device=device))
        return site

    def _site_input(self, site: str, x: Tensor) -> None:
        statistics = self.sums.sites[site]
        if x.numel() == 0:
            return
        amax = x.detach().to(torch.bfloat16).abs().max().item()
        if not amax < float("inf"):
            raise InputError(f"calibration: the activations of {site} are not finite")
        statistics.amax = max(statistics.amax, amax)
        statistics.tokens += x.numel() // x.shape[-1]

    def _site_gradient(self, site: str, gradient: Tensor) -> None:
        flat = gradient.flatten(0, -2).float()
        self.sums.sites[site].g2 += flat.square().sum(0)

    def _weight_gradient(self, name: str, x: Tensor, gradient: Tensor) -> None:
        use = x.flatten(0, -2).float(), gradient.flatten(0, -2).float()
        if self.calls[name] == 1:
            self.squares.add(name, *use)
        else:  # a linear used more than once: its gradient is a sum over all uses
            self.uses.setdefault(name, []).append(use)

    @contextlib.contextmanager
    def hooks(self) -> Iterator[None]:
        handles = []
        for name, linear in self.linears.items():
            handles.append(linear.register_forward_pre_hook(partial(self.before, name)))
            handles.append(linear.register_forward_hook(partial(self.after, name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def result(self) -> Calibration:
        """Divide the sums by n and give linears that were never reached a site of their own."""
        n = max(self.sums.predictions, 1)
        for key, sums in self.squares.tensors().items():
            _check_gradient(key.partition(".")[2], sums)
        self.sums.weights = self.squares.result(n)
        for name, site in self.sums.sites.items():
            _check_gradient(name, site.g2)
            site.g2 /= n
        for name in self.linears:
            if name not in self.site_by_linear:
                self.sums.sites[self._site(name)].linears.append(name)
        return self.sums

    # An interrupted run's sums, as one safetensors file.

    def store(self, state: Path, fingerprint: dict[str, str], done: int) -> None:
        tensors = self.squares.tensors()
        tensors |= {f"site.{name}": site.g2 for name, site in self.sums.sites.items()}
        facts = {
            "fingerprint": fingerprint,
            "fisher": self.fisher,
            "done": done,
            "predictions": self.sums.predictions,
            "sites": {n: [s.linears, s.amax, s.tokens] for n, s in self.sums.sites.items()},
        }
        try:
            with replacing(state) as draft:
                save_file(tensors, draft, metadata={"state": json.dumps(facts)})
        except (OSError, SafetensorError) as error:
            # The sums are safe in memory: a full disk must not cost the run.
            warnings.warn(
                f"{state}: could not be written ({error}); this calibration could not be resumed",
                stacklevel=3,
            )

    def restore(self, state: Path, fingerprint: dict[str, str], reuse: bool) -> int:
        """Load an interrupted run's sums if they are of this very run; samples already done."""
        if not state.exists():
            return 0
        if state.is_dir():
            raise InputError(f"{state}: is a folder, not a calibration state")
        advice = "name another file, or move this one away"  # which may be anything
        try:
            with safe_open(state, framework="pt") as file:
                metadata = file.metadata() or {}
                if "state" not in metadata:
                    raise ValueError("no state in its metadata")
                advice = "delete it"
                facts = json.loads(metadata["state"])
                if facts["fingerprint"] != fingerprint:
                    if reuse:
                        raise InputError(_mismatch(state, facts["fingerprint"], fingerprint))
                    return 0
                predictions, done = facts["predictions"], int(facts["done"])
                held = facts.get("fisher", "exact")
                if held != self.fisher:
                    if reuse:
                        raise InputError(
                            f"{state}: holds the {held} Fisher information, the recipe asks for "
                            f"fisher: {self.fisher}; name another file, or ask for fisher: {held}"
                        )
                    return 0
                for key, sums in self.squares.tensors().items():
                    sums.copy_(file.get_tensor(key))
                for name, (linears, amax, tokens) in facts["sites"].items():
                    self.sums.sites[name] = SiteStatistics(
                        linears, file.get_tensor(f"site.{name}").to(sums.device), amax, tokens
                    )
                    self.site_by_linear |= dict.fromkeys(linears, name)
        except InputError:
            raise
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{state}: not a calibration state ({error}); {advice}") from error
        self.sums.predictions = predictions
        return done


def _check_gradient(name: str, squares: Tensor) -> None:
    if not squares.isfinite().all():
        raise InputError(f"calibration: the gradient of {name} is not finite")


def _fingerprint(
    model: nn.Module,
    linears: dict[str, nn.Linear],
    samples: Sequence[Any] | Tensor,
    groups: dict[str, list[str]],
    loss: Loss,
) -> dict[str, str]:
    """What a calibration is of, each part by itself; of a loss only the name can be told."""
    weights, sequences = hashlib.sha256(), hashlib.sha256()
    for tensor in model.state_dict().values():
        weights.update(bytes_of(tensor))
    for sample in samples:
        for part in parts(sample):
            sequences.update(part)
    name = getattr(loss, "__qualname__", type(loss).__qualname__)
    named = {"linears": list(linears), "sites": groups, "loss": name}
    return {
        **{key: hashlib.sha256(json.dumps(v).encode()).hexdigest() for key, v in named.items()},
        "weights": weights.hexdigest(),
        "sequences": sequences.hexdigest(),
    }


_MEANING = {
    "linears": "other layers (another model, or another include or exclude)",
    "sites": "other sites",
    "loss": "another loss, or other labels",
    "weights": "other weights",
    "sequences": "other token sequences (text, tokenizer, samples, seq_len or seed)",
}


def _mismatch(state: Path, held: object, wanted: dict[str, str]) -> str:
    known = held if isinstance(held, dict) else {}
    # Other layers have other weights: the first difference says it all.
    differing = next(key for key in _MEANING if known.get(key) != wanted[key])
    return f"{state}: a calibration of {_MEANING[differing]}; name another file, or delete it"
