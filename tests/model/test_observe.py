"""What runs through a frozen model leaves it as it was."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from fgmp.model.observe import differentiable_inputs, frozen, observed_inputs, run_all


class Net(nn.Module):
    """Two linears that run in turn, the second one twice, with dropout between."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.dropout = nn.Dropout(0.5)
        self.second.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.second(self.dropout(self.first(x))))


@pytest.fixture
def net() -> Net:
    net = Net().train()
    net.second.eval()
    return net


def state(net: nn.Module) -> list[object]:
    """Modes, what requires gradients, and hooks."""
    return [
        [module.training for module in net.modules()],
        [parameter.requires_grad for parameter in net.parameters()],
        [len(module._forward_pre_hooks) for module in net.modules()],
    ]


def test_frozen_is_without_gradients_and_dropout(net: Net) -> None:
    x = torch.ones(1, 4)
    before = state(net)
    with frozen(net):
        assert not any(m.training for m in net.modules())
        assert not any(p.requires_grad for p in net.parameters())
        assert torch.equal(net(x), net(x))
    assert state(net) == before
    assert not torch.equal(net(x), net(x))


@contextmanager
def failing() -> Iterator[None]:
    with pytest.raises(RuntimeError, match="inside"):
        yield


def test_everything_is_restored_after_an_error(net: Net) -> None:
    before = state(net)
    with (
        failing(),
        frozen(net),
        observed_inputs(net, ["first"], lambda name, x: None),
        differentiable_inputs([net.second]),
    ):
        raise RuntimeError("inside")
    assert state(net) == before


def test_inputs_are_observed_in_order_of_execution(net: Net) -> None:
    seen: list[tuple[str, Tensor]] = []
    x = torch.ones(2, 4)
    with frozen(net), observed_inputs(net, ["second", "first"], lambda n, x: seen.append((n, x))):
        y = net(x)
    assert [name for name, _ in seen] == ["first", "second", "second"]
    assert seen[0][1] is x
    assert torch.equal(net.second(seen[2][1]), y)
    net(x)
    assert len(seen) == 3  # nobody looks any more


def test_an_observer_may_end_the_run(net: Net) -> None:
    """By an exception, which removes the hooks."""
    before = state(net)

    def observe(name: str, x: Tensor) -> None:
        raise RuntimeError("inside")

    with failing(), frozen(net), observed_inputs(net, ["second"], observe):
        net(torch.ones(1, 4))
    assert state(net) == before


def test_gradients_reach_frozen_layers(net: Net) -> None:
    """An input that requires no gradient is replaced by one that does; others pass unchanged."""
    inputs: list[Tensor] = []

    def seen(x: Tensor) -> Tensor:
        inputs.append(x)
        return x * 1.0

    with frozen(net), differentiable_inputs([net.first, net.second], seen):
        net(torch.ones(2, 4)).sum().backward()
    assert len(inputs) == 3
    leaf = inputs[0]
    assert leaf.is_leaf and not inputs[1].is_leaf
    expected = net.second.weight.sum(0) @ net.second.weight @ net.first.weight
    assert torch.allclose(leaf.grad, expected.expand(2, 4), atol=1e-6)
    assert net.first.weight.grad is None


def test_what_a_layer_reads_can_be_replaced(net: Net) -> None:
    with frozen(net), differentiable_inputs([net.first], lambda x: x * 0):
        assert torch.equal(net(torch.ones(1, 4)), net(torch.full((1, 4), 9.0)))


def test_all_sequences_run_without_gradients(net: Net) -> None:
    """In evaluation mode, in order; each advances once."""
    outputs: list[Tensor] = []
    steps: list[int] = []

    def loss(model: nn.Module, sample: object) -> None:
        assert not model.training
        outputs.append(model(sample))

    samples = [torch.full((1, 4), float(i)) for i in range(3)]
    before = state(net)
    run_all(net, samples, loss, lambda: steps.append(len(outputs)))
    assert steps == [1, 2, 3] and not any(y.requires_grad for y in outputs)
    assert state(net) == before
    net.eval()
    assert all(torch.equal(net(x), y) for x, y in zip(samples, outputs, strict=True))
