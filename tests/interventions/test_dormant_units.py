"""Methods that find dormant units, and those that renew a little or the last layers: what each exists for."""

import math

import pytest
import torch
from cases import backward, batch, convnet, images, mlp, step_with, still, tensors_of
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from clagrange import gaussianize
from clagrange.interventions import (
    ContinualBackprop,
    GradedContinualBackprop,
    HeadReset,
    LastLayerReset,
    ReDo,
    SelfNormalizedResets,
)
from clagrange.optim import EulerLagrange
from clagrange.replicas import generators_from_seeds


def with_a_dead_unit(unit: int = 2) -> nn.Sequential:
    net = mlp()
    with torch.no_grad():
        net[0].bias.fill_(1.0)
        net[0].bias[unit] = -100.0
    return net


def train_still(net: nn.Module, method, steps: range, size: int = 64) -> None:
    optimizer = still(net)
    if not method._connections:
        method.on_start(net, optimizer)
    for number in steps:
        backward(net, optimizer, *batch(number, size))
        method.on_gradient(net, optimizer)
        optimizer.step()
        method.on_step(net, optimizer)


def assert_only_the_unit_changed(net: nn.Module, before: dict[str, Tensor], unit: int = 2) -> None:
    after, others = net.state_dict(), [other for other in range(6) if other != unit]
    assert after["0.weight"][unit].abs().max() <= math.sqrt(2) * math.sqrt(3 / 5)
    assert not torch.equal(after["0.weight"][unit], before["0.weight"][unit])
    assert after["0.bias"][unit] == 0
    assert not after["2.weight"][:, unit].any()
    for name, rows in (("0.weight", (others,)), ("0.bias", (others,)), ("2.weight", (slice(None), others))):
        assert torch.equal(after[name][rows], before[name][rows]), name
    for name in ("2.bias", "4.weight", "4.bias"):
        assert torch.equal(after[name], before[name]), name


# --------------------------------------------------------------------------------------------------- ReDo
@pytest.mark.parametrize(
    "settings", [{}, {"score": "gradient"}, {"window": 1}, {"score": "gradient", "window": 1}]
)
def test_redo_brings_a_dead_unit_back_at_the_check(settings: dict) -> None:
    net = with_a_dead_unit()
    before = tensors_of(net)
    method = ReDo(threshold=0.01, every=5, layers=["0", "2"], **settings)
    train_still(net, method, range(4))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    train_still(net, method, range(4, 5))
    assert_only_the_unit_changed(net, before)
    assert net[:2](batch(size=64)[0])[:, 2].any()


@pytest.mark.parametrize("score", ["activation", "gradient"])
@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize(("make", "data"), [(mlp, batch), (convnet, images)], ids=["linear", "convolution"])
def test_redo_takes_the_units_below_the_threshold(score: str, window: int | None, make, data) -> None:
    """The scores by their definition; the threshold lies between them."""
    net = make()
    names = ["0", "2"]
    producer, units = net[0], len(net[0].weight)
    totals = torch.zeros(units, dtype=torch.float64)
    for number in range(5):
        backward(net, still(net), *data(number))
        if window is None or number >= 5 - window:
            if score == "gradient":
                totals += producer.weight.grad.flatten(1).abs().mean(1)
            else:
                totals += net[:2](data(number)[0]).detach().transpose(0, 1).flatten(1).abs().mean(1)
    scores = totals / totals.mean()
    threshold = float(scores.sort().values[units // 2 - 1 : units // 2 + 1].mean())
    before = producer.weight.detach().clone()
    method, optimizer = ReDo(threshold, every=5, score=score, window=window, layers=names, seed=1), still(net)
    method.on_start(net, optimizer)
    for number in range(5):
        backward(net, optimizer, *data(number))
        method.on_gradient(net, optimizer)
        method.on_step(net, optimizer)
    changed = (producer.weight != before).flatten(1).any(1)
    assert changed.tolist() == (scores <= threshold).tolist()
    assert 0 < changed.sum() < units


def test_redo_revives_a_layer_that_is_dead_as_a_whole() -> None:
    net = mlp()
    with torch.no_grad():
        net[0].bias.fill_(-100.0)
    train_still(net, ReDo(every=2, layers=["0", "2"]), range(2))
    assert net[:2](batch(size=64)[0]).any(0).all()


# ------------------------------------------------------------------------------------ self-normalised resets
class Firing(nn.Module):
    """Two layers between which units fire as they are told."""

    def __init__(self, units: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(units, units), nn.Linear(units, 3)
        self.double()

    def forward(self, told: Tensor) -> Tensor:
        return self.second(told + 0.0 * self.first(told))


def resets_by_definition(fires: list[bool], rejection: float, longest: int) -> list[int]:
    """The steps at which one unit starts over."""
    past, silent, resets = [], 0, []
    for step, fired in enumerate(fires):
        silent += 1
        unlikely = len(past) * rejection >= 1 and sum(gap > silent for gap in past) <= rejection * len(past)
        if not fired and (unlikely or silent >= longest):
            resets.append(step)
        if fired or (resets and resets[-1] == step):
            past.append(silent)
            silent = 0
    return resets


def test_snr_resets_at_the_steps_of_its_definition() -> None:
    """Units that fire at rates from .02 to .98, half of which become slower on the way; 600 steps."""
    units, steps, rejection, longest = 8, 600, 0.125, 40
    generator = torch.Generator().manual_seed(0)
    rates = torch.linspace(0.02, 0.98, units).double()
    rates = torch.stack([rates if step < 400 else rates * torch.tensor([1.0, 0.2] * 4) for step in range(steps)])
    fires = torch.rand(steps, units, generator=generator, dtype=torch.float64) < rates
    net = Firing(units)
    optimizer = still(net)
    method = SelfNormalizedResets(rejection, longest, layers=["first", "second"])
    method.on_start(net, optimizer)
    resets: list[list[int]] = [[] for _ in range(units)]
    for step in range(steps):
        optimizer.zero_grad()
        net(torch.stack([fires[step].double(), -torch.ones(units).double()])).sum().backward()
        with torch.no_grad():
            net.second.weight.fill_(1.0)
        method.on_step(net, optimizer)
        for unit in (net.second.weight == 0).all(0).nonzero().flatten().tolist():
            resets[unit].append(step)
    expected = [resets_by_definition(fires[:, unit].tolist(), rejection, longest) for unit in range(units)]
    assert resets == expected
    assert sum(map(len, expected)) > 20


def test_snr_brings_a_unit_back_that_has_died() -> None:
    """It fired at every step; once dead it goes at the first check of its past, and nothing else does."""
    net, method = mlp(), SelfNormalizedResets(rejection=0.1, layers=["0", "2"])
    with torch.no_grad():
        net[0].bias.fill_(2.0)
    train_still(net, method, range(20))
    with torch.no_grad():
        net[0].bias[2] = -100.0
    before = tensors_of(net)
    train_still(net, method, range(20, 21))
    assert_only_the_unit_changed(net, before)


def test_snr_without_a_past_waits_for_the_longest_silence() -> None:
    net, method = with_a_dead_unit(), SelfNormalizedResets(rejection=0.1, longest=15, layers=["0", "2"])
    before = tensors_of(net)
    train_still(net, method, range(14))
    assert torch.equal(net[0].weight, before["0.weight"])
    train_still(net, method, range(14, 15))
    assert_only_the_unit_changed(net, before)


class Questions(TorchDispatchMode):
    """How often a number is fetched from the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("method", "expected"), [(SelfNormalizedResets(), 1), (ContinualBackprop(1e-6, maturity=100), 0)]
)
def test_a_quiet_step_hardly_waits_for_the_device(method, expected: int) -> None:
    """Two hidden layers, of which no unit starts over."""
    net = mlp()
    optimizer = still(net)
    method.on_start(net, optimizer)
    for step in range(4):
        backward(net, optimizer, *batch(step))
        with Questions() as questions:
            method.on_step(net, optimizer)
    assert questions.count == expected


# -------------------------------------------------------------------------------- graded continual backprop
def test_graded_update_on_a_fixed_example() -> None:
    """Two moves, by the equations in numbers of this test's own; to 1e-6 of float32."""
    net = mlp(dtype=torch.float32)
    rate, decay, steepness = 0.3, 0.9, 16.0
    method = GradedContinualBackprop(rate, every=2, decay=decay, layers=["0", "2"], seed=3)
    optimizer = still(net)
    method.on_start(net, optimizer)
    w_in, b_in, w_out = (p.detach().double() for p in (net[0].weight, net[0].bias, net[2].weight))
    generator = generators_from_seeds(3, purpose="GradedContinualBackprop")
    bound = math.sqrt(2) * math.sqrt(3 / 5)
    u = torch.ones(6, dtype=torch.float64)
    for step in range(4):
        backward(net, optimizer, *batch(step, dtype=torch.float32))
        now = net[0].weight.grad.double().abs().mean(1)
        u = decay * u + (1 - decay) * now / now.mean()
        method.on_gradient(net, optimizer)
        method.on_step(net, optimizer)
        if step % 2:
            alpha = rate * torch.exp(-steepness * (u - 0.95)).clamp(max=1)
            assert 0 < int((u < 0.95).sum()) < 6
            fresh = torch.empty(6, 5).uniform_(-bound, bound, generator=generator).double()
            w_in = (1 - alpha)[:, None] * w_in + alpha[:, None] * fresh
            w_out = (1 - alpha) * w_out
            u = torch.ones_like(u)
    for actual, expected in ((net[0].weight, w_in), (net[0].bias, b_in), (net[2].weight, w_out)):
        torch.testing.assert_close(actual.detach().double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(method.state["0"]["utility"].double(), u, rtol=1e-5, atol=1e-6)


def test_graded_moves_a_dead_unit_most() -> None:
    net = with_a_dead_unit()
    before = net[2].weight.detach().clone()
    train_still(net, GradedContinualBackprop(0.5, every=30, layers=["0", "2"]), range(30))
    left = (net[2].weight.detach() / before)[0]
    assert int(left.argmin()) == 2
    assert 0.99**30 < 0.95
    assert float(left[2]) == pytest.approx(1 - 0.5)


# ------------------------------------------------------------------------------------------- the last layer
def test_head_reset_zeroes_the_head_alone() -> None:
    net = mlp()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    method = HeadReset()
    method.on_start(net, optimizer)
    for step in range(3):
        step_with(net, optimizer, method, *batch(step))
    before = tensors_of(net)
    method.on_switch(net, optimizer)
    assert not net[4].weight.any()
    assert not net[4].bias.any()
    for name in ("0.weight", "0.bias", "2.weight", "2.bias"):
        assert torch.equal(net.state_dict()[name], before[name])
    for parameter in net.parameters():
        head = parameter is net[4].weight or parameter is net[4].bias
        assert bool(optimizer.state[parameter]["exp_avg_sq"].any()) != head


def test_last_layer_reset_draws_it_afresh() -> None:
    for forget in (True, False):
        net = mlp()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
        method = LastLayerReset(every=3, forget=forget, seed=4)
        method.on_start(net, optimizer)
        for step in range(2):
            step_with(net, optimizer, method, *batch(step))
        assert net[4].bias.any()
        step_with(net, optimizer, method, *batch(2))
        expected = torch.empty(3, 4, dtype=torch.float64)
        bound = math.sqrt(2) * math.sqrt(3 / 4)
        expected.uniform_(-bound, bound, generator=generators_from_seeds(4, purpose="LastLayerReset"))
        assert torch.equal(net[4].weight, expected)
        assert not net[4].bias.any()
        assert bool(optimizer.state[net[4].weight]["momentum_buffer"].any()) != forget
        assert optimizer.state[net[2].weight]["momentum_buffer"].any()


@pytest.mark.parametrize("make", [HeadReset, LastLayerReset])
@pytest.mark.parametrize("precision", ["diagonal", "kronecker"])
def test_the_precision_of_the_head_returns_to_its_prior(make, precision: str) -> None:
    net = gaussianize(mlp(), precision)
    optimizer, method = EulerLagrange(net, lr=0.02, temperature=1e-2), make(layers=["4"])
    method.on_start(net, optimizer)
    for step in range(3):
        step_with(net, optimizer, method, *batch(step))
    block = net[4].block_of("weight").precision
    fresh = gaussianize(mlp(), precision)[4].block_of("weight").precision
    assert not torch.allclose(block.variance(), fresh.variance(), rtol=1e-3)
    method.on_switch(net, optimizer)
    torch.testing.assert_close(block.variance(), fresh.variance())
