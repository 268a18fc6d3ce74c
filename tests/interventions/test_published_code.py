"""Continual backprop beside an independent account of what the published code does, defects included."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from clagrange.interventions import ContinualBackprop
from clagrange.networks import initialize
from clagrange.replicas import generators_from_seeds

STEPS = 2000
RATE, MATURITY, DECAY = 2e-3, 30, 0.99


class PublishedAdam(Optimizer):
    """Adam as it comes out there: a step counter for every entry, and lr·(1 − β₂^t)·m/(√v + ε) for a step."""

    def __init__(self, params, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            for name in ("step", "exp_avg", "exp_avg_sq"):
                state.setdefault(name, torch.zeros_like(parameter))
            state["step"] += 1
            state["exp_avg"] += 0.1 * (parameter.grad - state["exp_avg"])
            state["exp_avg_sq"] += 0.001 * (parameter.grad**2 - state["exp_avg_sq"])
            size = 1 - 0.999 ** state["step"]
            lr = self.param_groups[0]["lr"]
            parameter -= lr * size * state["exp_avg"] / (state["exp_avg_sq"].sqrt() + 1e-8)


class Published:
    """Generate and test: first all layers are judged, then units are replaced; f is lost before use."""

    def __init__(self, net: nn.Sequential, utility: str, seed: int) -> None:
        self.layers = [layer for layer in net if isinstance(layer, nn.Linear)]
        self.utility = utility
        self.generator = generators_from_seeds(seed, purpose="ContinualBackprop")
        widths = [layer.out_features for layer in self.layers[:-1]]
        self.age, self.mean, self.value = ([torch.zeros(width).double() for width in widths] for _ in range(3))
        self.counter = [0.0] * len(widths)

    @torch.no_grad()
    def step(self, features: list[Tensor], optimizer: Optimizer) -> list[tuple[int, int]]:
        chosen = [self.judge(number, h) for number, h in enumerate(features)]
        for number, units in enumerate(chosen):
            for unit in units:
                self.replace(number, unit, optimizer)
        return [(number, unit) for number, units in enumerate(chosen) for unit in units]

    def judge(self, number: int, h: Tensor) -> list[int]:
        self.age[number] += 1
        correction = 1 - DECAY ** self.age[number]
        self.mean[number] = DECAY * self.mean[number] + (1 - DECAY) * h.mean(0)
        out, into = self.layers[number + 1].weight.abs().mean(0), self.layers[number].weight.abs().mean(1)
        deviation = (h - self.mean[number] / correction).abs().mean(0)
        now = {
            "contribution": out * h.abs().mean(0),
            "zero_contribution": out * deviation,
            "adaptable_contribution": out * deviation / into,
            "weight": out,
            "adaptation": 1 / into,
        }[self.utility]
        self.value[number] = DECAY * self.value[number] + (1 - DECAY) * now
        corrected = (self.value[number] / correction).tolist()
        mature = (self.age[number] > MATURITY).nonzero().flatten().tolist()
        self.counter[number] += RATE * len(mature)
        count = math.floor(self.counter[number])
        self.counter[number] -= count
        return sorted(mature, key=lambda unit: corrected[unit])[:count]

    def replace(self, number: int, unit: int, optimizer: Optimizer) -> None:
        layer, following = self.layers[number], self.layers[number + 1]
        bound = math.sqrt(2) * math.sqrt(3 / layer.in_features)
        layer.weight[unit] = torch.empty_like(layer.weight[unit]).uniform_(
            -bound, bound, generator=self.generator
        )
        layer.bias[unit] = 0
        following.weight[:, unit] = 0  # and nothing is added to its bias
        for state in optimizer.state[layer.weight].values():
            state[unit] = 0
        for state in optimizer.state[layer.bias].values():
            state[unit] = 0
        for state in optimizer.state[following.weight].values():
            state[:, unit] = 0
        for kept in (self.age, self.mean, self.value):
            kept[number][unit] = 0.0


def make(seed: int = 3) -> nn.Sequential:
    net = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 2)).double()
    initialize(net, torch.Generator().manual_seed(seed))
    return net


def inputs_of(step: int) -> tuple[Tensor, Tensor]:
    """A regression whose target changes every 500 steps."""
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    turn = torch.Generator().manual_seed(10_000 + step // 500)
    return inputs, (inputs @ torch.randn(6, 2, generator=turn, dtype=torch.float64)).tanh()


@pytest.mark.parametrize(
    ("utility", "form"),
    [
        ("contribution", "sgd"),
        *(
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in (
                ("contribution", "adam"),
                ("adaptable_contribution", "adam"),
                ("zero_contribution", "sgd"),
                ("adaptable_contribution", "sgd"),
                ("weight", "adam"),
                ("adaptation", "sgd"),
            )
        ),
    ],
)
def test_the_same_units_at_the_same_steps(utility: str, form: str) -> None:
    """2,000 steps from the same weights, data and random numbers; weights agree to 1e-9."""
    nets, replaced = [make(), make()], ([], [])

    def optimizer_of(net: nn.Module) -> Optimizer:
        return (
            PublishedAdam(net.parameters(), 3e-3) if form == "adam" else torch.optim.SGD(net.parameters(), 0.02)
        )

    optimizers = [optimizer_of(net) for net in nets]
    ours = ContinualBackprop(RATE, MATURITY, utility, DECAY, seed=5, as_published=True)
    ours.on_start(nets[0], optimizers[0])
    theirs = Published(nets[1], utility, seed=5)
    for step in range(STEPS):
        inputs, targets = inputs_of(step)
        for net, optimizer in zip(nets, optimizers, strict=True):
            optimizer.zero_grad()
            nn.functional.mse_loss(net(inputs), targets).backward()
        with torch.no_grad():
            features = [nets[1][:2](inputs), nets[1][:4](inputs)]
        for optimizer in optimizers:
            optimizer.step()
        ours.on_step(nets[0], optimizers[0])
        for number, layer in enumerate(("0", "2")):
            replaced[0].extend((step, number, int(u)) for u in (ours.state[layer]["age"] == 0).nonzero())
        replaced[1].extend((step, *place) for place in theirs.step(features, optimizers[1]))
    assert replaced[0] == replaced[1]
    assert len(replaced[0]) > 50
    for first, second in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-9)


def test_without_the_defects_other_units_go() -> None:
    """Guards the test above: its runs are long enough to tell."""
    ends = []
    for as_published in (True, False):
        net = make()
        optimizer = torch.optim.SGD(net.parameters(), 0.02)
        method = ContinualBackprop(RATE, MATURITY, decay=DECAY, seed=5, as_published=as_published)
        method.on_start(net, optimizer)
        for step in range(300):
            optimizer.zero_grad()
            inputs, targets = inputs_of(step)
            nn.functional.mse_loss(net(inputs), targets).backward()
            optimizer.step()
            method.on_step(net, optimizer)
        ends.append(net[4].bias.detach())
    assert not torch.allclose(*ends)
