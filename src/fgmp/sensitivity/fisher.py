"""Calibration: the Fisher information of weights and activations, which are the *sensitivities*.

A sensitivity is the weight of a squared error: per element for weights, per input channel for
activations. With L the summed token losses of one sequence and n the number of all predicted
tokens, in nats^2 per token,

    F_w    = (1/n) sum over sequences (dL/dw)^2                       per weight
    F_x[k] = (1/n) sum over sequences, tokens (dL/dx[token, k])^2     per channel

F_w can be stored as two factors instead: see :mod:`fgmp.sensitivity.squares`.

The square is of a sum over one sequence, so sequences run through the model one by one. This is
right for every architecture, also those that flatten tokens (experts), and the result does not
depend on a batch size. Parameters are frozen and only activations carry gradients. A hook forms
each linear's weight gradient, if it is needed at all, and squares it at once, so the gradient of
the whole model never exists.

A *site* is one activation tensor that one or more linears read. Sites are found by tensor identity.
Before the first linear that reads a tensor, the tensor is replaced by an alias, whose gradient is
the total that reaches the tensor through those linears.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fgmp.errors import InputError
from fgmp.model.losses import Loss, causal_lm_loss
from fgmp.model.observe import frozen
from fgmp.model.precision import stored_dtypes
from fgmp.model.select import shared_weights
from fgmp.sensitivity.squares import SQUARES
from fgmp.storage.fingerprint import sha256
from fgmp.storage.resume import (
    PartialResults,
    Periodic,
    State,
    StateFile,
    StateMismatchError,
    uninterrupted,
)


@dataclass
class SiteStatistics:
    """Statistics of one activation tensor over the calibration set.

    Attributes:
        linears: names of the linears that read it, in the order of reading.
        g2: F_x, fp32 (K,), in nats^2 per token.
        amax: largest magnitude after rounding to bf16.
        tokens: number of rows.
    """

    linears: list[str]
    g2: Tensor
    amax: float = 0.0
    tokens: int = 0


@dataclass
class Calibration:
    """Result of calibration.

    Attributes:
        weights: F_w by linear, fp32 (N, K), in nats^2 per token; a shared one's under its first
            linear.
        sites: statistics by site.
        predictions: number n of predicted tokens.
    """

    weights: Mapping[str, Tensor] = field(default_factory=dict)
    sites: dict[str, SiteStatistics] = field(default_factory=dict)
    predictions: int = 0


def calibrate(
    model: nn.Module,
    linears: dict[str, nn.Linear],
    samples: Sequence[Any] | Tensor,
    loss: Loss = causal_lm_loss,
    *,
    fisher: str = "exact",
    groups: dict[str, list[str]] | None = None,
    file: Path | None = None,
    resume: PartialResults | None = None,
    advance: Callable[[], None] = lambda: None,
) -> Calibration:
    """Run ``samples`` forward and backward and collect the Fisher information.

    Args:
        model: any module; restored on return, also after an error.
        linears: the linears to calibrate, by name.
        samples: sequences; each is passed to ``loss`` unchanged.
        loss: (model, sample) to the summed loss and the number of predictions.
        fisher: how F_w is stored, a key of :data:`fgmp.sensitivity.squares.SQUARES`.
        groups: linears by site, overriding the sites found by tensor identity.
        file: stores the sums for later calls with the same model, samples, groups and loss; these
            resume from an incomplete file and reuse a complete one. Written every few minutes, on
            an interruption and at the end.
        resume: stores the sums for this run only; ignored if ``file`` is given.
        advance: called after each sample.

    Raises:
        InputError: an activation, the loss or a gradient is not finite, sites are inconsistent, or
            ``file`` is damaged or belongs to other inputs.
    """
    recorder = _Recorder(linears, fisher, groups or {})
    state, start = None, 0
    if file is not None:
        fingerprint = _fingerprint(model, linears, samples, groups or {}, loss, fisher)
        state = StateFile(file, fingerprint)
        start = recorder.restore(_load(state))
    elif resume is not None:
        state = resume.file("calibration")
        start = recorder.restore(resume.load("calibration"))
    for _ in range(start):
        advance()
    periodic, completed = Periodic(), start
    try:
        with frozen(model), recorder.hooks():
            for index in range(start, len(samples)):
                with uninterrupted():
                    recorder.run(model, samples[index], loss, index)
                    completed = index + 1
                advance()
                if state and periodic.due():
                    recorder.store(state, completed)
    finally:
        if state and completed > start and recorder.whole:
            recorder.store(state, completed)
    return recorder.result()


class _Recorder:
    """Hooks on the linears, and the sums that the hooks accumulate."""

    def __init__(
        self, linears: dict[str, nn.Linear], fisher: str, groups: dict[str, list[str]]
    ) -> None:
        self.linears = linears
        self.fisher = fisher
        self.shared = shared_weights(linears)
        holders = {name: m for name, m in linears.items() if name not in self.shared}
        self.squares = SQUARES[fisher](holders)
        self.forced: dict[str, str] = {}
        for group, members in groups.items():
            for name in members:
                if name not in linears:
                    raise InputError(f"site {group}: {name!r} is not a quantized linear")
                self.forced[name] = group
        self.sums = Calibration()
        self.site_by_linear: dict[str, str] = {}
        self.whole = True  # the sums contain whole sequences only

    def run(self, model: nn.Module, sample: Any, loss: Loss, index: int) -> None:
        """Run one sequence forward and backward, and add its squared gradients to the sums."""
        self.begin()
        total, predictions = loss(model, sample)
        if not total.isfinite():
            raise InputError(f"calibration: the loss of sequence {index} is {total.item()}")
        if total.requires_grad:  # else no linear ran
            total.backward()
        self.end(predictions)

    # Per sequence: begin, forward (pre hook and hook of every linear), backward, end.

    def begin(self) -> None:
        self.whole = False
        self.aliases: dict[tuple[Any, ...], tuple[str, Tensor, Tensor]] = {}
        self.calls = dict.fromkeys(self.linears, 0)
        self.uses: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def before(self, name: str, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0]
        if not x.numel():  # an expert without tokens; empty tensors have no address to compare
            return args
        key = (x.data_ptr(), x.shape, x.stride(), x._version, self.forced.get(name))
        if key not in self.aliases:
            site = self._site(name)
            alias = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
            if alias.requires_grad:  # else the model runs this part without gradients
                alias.register_hook(partial(self._site_gradient, site))
            self._site_input(site, x)
            self.aliases[key] = (site, alias, x)  # holding x keeps its address from being reused
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
        if not args[0].numel():
            return
        holder = self.shared.get(name, name)
        self.calls[holder] += 1
        if out.requires_grad:
            out.register_hook(partial(self._weight_gradient, holder, args[0].detach()))

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
        else:  # a weight that is used more than once: its gradient is the sum over all uses
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
        """Divide the sums by n; a linear that never ran gets a site of its own."""
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

    # Resumable state: the sums, and the number of samples in them.

    def store(self, file: StateFile, completed: int) -> None:
        tensors = self.squares.tensors()
        tensors |= {f"site.{name}": site.g2 for name, site in self.sums.sites.items()}
        facts = {
            "done": completed,
            "predictions": self.sums.predictions,
            "sites": {n: [s.linears, s.amax, s.tokens] for n, s in self.sums.sites.items()},
        }
        file.store(tensors, facts)

    def restore(self, state: State | None) -> int:
        """Continue from stored sums, if any; return the number of samples in them."""
        if state is None:
            return 0
        for key, sums in self.squares.tensors().items():
            sums.copy_(state.tensors[key])
        for name, (linears, amax, tokens) in state.facts["sites"].items():
            device = self.linears[linears[0]].weight.device
            g2 = state.tensors[f"site.{name}"].to(device)
            self.sums.sites[name] = SiteStatistics(linears, g2, amax, tokens)
            self.site_by_linear |= dict.fromkeys(linears, name)
        self.sums.predictions = state.facts["predictions"]
        return int(state.facts["done"])


def _load(file: StateFile) -> State | None:
    try:
        return file.load()
    except StateMismatchError as error:
        meaning = _MEANING.get(error.differing, "of another kind")
        raise InputError(
            f"{file.path}: a calibration {meaning}; name another file, or delete it"
        ) from error


def _check_gradient(name: str, squares: Tensor) -> None:
    if not squares.isfinite().all():
        raise InputError(f"calibration: the gradient of {name} is not finite")


def _fingerprint(
    model: nn.Module,
    linears: dict[str, nn.Linear],
    samples: Sequence[Any] | Tensor,
    groups: dict[str, list[str]],
    loss: Loss,
    fisher: str,
) -> dict[str, str]:
    """Digests of the inputs of a calibration, by kind; a function is identified by its name."""
    return {
        "linears": sha256([list(linears), shared_weights(linears)]),
        "sites": sha256(groups),
        "loss": sha256(loss),
        "weights": sha256(_stored_tensors(model)),
        "sequences": sha256(list(samples)),
        "fisher": fisher,
    }


def _stored_tensors(model: nn.Module) -> dict[str, str]:
    """Digests of a model's tensors in their stored dtypes, by name.

    The dtype in which passes run does not count: calibration in another differs in last digits.
    """
    dtypes = stored_dtypes(model)
    return {name: sha256(t.to(dtypes[name])) for name, t in model.state_dict().items()}


_MEANING = {
    "linears": "of other layers (another model, or another include or exclude)",
    "sites": "with other sites",
    "loss": "of another loss, or with other labels",
    "weights": "of other weights",
    "sequences": "on other token sequences (text, tokenizer, samples, seq_len or seed)",
    "fisher": "with another form of the Fisher information than the recipe's `fisher`",
}
"""Meaning of a difference in the fingerprint, by kind. Where several kinds differ, the first is
reported: other layers, for example, also have other weights."""
