"""Plain SGD without a graph: the steps of torch's SGD, also where weights are kept waiting."""

import copy

import pytest
import torch
from torch import Tensor, nn

from clagrange import gaussianize, replicas
from clagrange.optim import StackedSGD
from clagrange.optim import perceptron_sgd as module
from clagrange.optim.perceptron_sgd import PerceptronSGD, perceptron
from clagrange.optim.stacked import rates_of_plain_sgd

R = 3


def network(*, bias: bool = True) -> nn.Module:
    """Stacked perceptrons for inputs (R, batch, 2, 3)."""
    torch.manual_seed(0)
    return replicas.stack(
        [
            nn.Sequential(
                nn.Flatten(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4, bias=bias), nn.ReLU(), nn.Linear(4, 2)
            )
            for _ in range(R)
        ]
    ).double()


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("examples", [1, 2, 5])
@pytest.mark.parametrize("lr", [0.1, torch.tensor([0.1, 0.0, 0.4])], ids=["a number", "one for each replica"])
def test_it_is_sgd(monkeypatch: pytest.MonkeyPatch, lr: float | Tensor, examples: int, waits: bool) -> None:
    monkeypatch.setattr(module, "WIDE", 20)  # so that of the first two layers is, that of the last is not
    monkeypatch.setattr(module, "KEPT", 5)
    ours = network(bias=waits)
    theirs = copy.deepcopy(ours)
    optimizer = StackedSGD(theirs.parameters(), lr=lr)
    layers = perceptron(ours)
    assert layers is not None
    sgd = PerceptronSGD(layers, rates_of_plain_sgd(ours, StackedSGD(ours.parameters(), lr=lr)), waits=waits)
    waited = False
    for step in range(8):
        inputs, slope = torch.randn(2, R, examples, 2, 3).double(), torch.randn(R, examples, 2).double()
        expected = theirs(inputs[0])
        expected.backward(slope)
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(sgd.outputs(inputs[0]), expected.detach(), rtol=1e-12, atol=1e-14)
        sgd.step(slope)
        waited |= not torch.allclose(ours[1].weight, theirs[1].weight)
        if step in (0, 6):
            sgd.settle()
            torch.testing.assert_close(list(ours.parameters()), list(theirs.parameters()), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(sgd.outputs(inputs[1]), theirs(inputs[1]).detach(), rtol=1e-12, atol=1e-14)
    assert waited == (waits and examples <= 2)


def test_batches_of_any_sizes_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WIDE", 1)
    monkeypatch.setattr(module, "KEPT", 6)
    ours, theirs = network(), network()
    layers = perceptron(ours)
    assert layers is not None
    sgd = PerceptronSGD(layers, {layer.weight: 0.1 for layer in layers}, waits=True)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1)
    for examples in (2, 2, 3, 1, 6, 1):
        inputs = torch.randn(R, examples, 6).double()
        sgd.step(torch.ones_like(sgd.outputs(inputs)))
        optimizer.zero_grad()
        theirs(inputs).sum().backward()
        optimizer.step()
    sgd.settle()
    torch.testing.assert_close(list(ours.parameters()), list(theirs.parameters()), rtol=1e-12, atol=1e-14)


def test_half_precision() -> None:
    layer = replicas.stack([nn.Linear(4, 3) for _ in range(2)]).bfloat16()
    before = layer.weight.detach().clone()
    sgd = PerceptronSGD([layer], {layer.weight: torch.tensor([0.0, 0.5])})
    sgd.step(torch.ones_like(sgd.outputs(torch.ones(2, 1, 4, dtype=torch.bfloat16))))
    assert torch.equal(layer.weight[0], before[0])
    torch.testing.assert_close(layer.weight[1], before[1] - 0.5)


def test_what_a_perceptron_is() -> None:
    def stacked(*layers: nn.Module) -> nn.Module:
        return replicas.stack([nn.Sequential(*layers)])

    assert perceptron(stacked(nn.Linear(3, 2))) is not None
    assert perceptron(stacked(nn.Flatten(), nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))) is not None
    for other in (
        nn.Sequential(nn.Linear(3, 2)),  # not stacked
        replicas.stack([nn.Linear(3, 2)]),
        stacked(nn.Linear(3, 2), nn.ReLU()),
        stacked(nn.Linear(3, 2), nn.Linear(2, 2)),
        stacked(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)),
        stacked(nn.Linear(3, 2), nn.LayerNorm(2), nn.Linear(2, 2)),
        gaussianize(stacked(nn.Linear(3, 2))),
    ):
        assert perceptron(other) is None
    tied = stacked(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    tied[2].weight = tied[0].weight
    assert perceptron(tied) is None


@pytest.mark.parametrize(
    "register",
    ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"],
)
def test_hooks_are_not_passed_over(register: str) -> None:
    net = network()
    handle = getattr(net[2], register)(lambda *_: None)
    assert perceptron(net) is None
    handle.remove()
    assert perceptron(net) is not None
