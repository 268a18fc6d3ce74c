"""Continual backprop: which units go and when, and their utilities."""

import math
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from cases import R, assert_same_tensors, backward, batch, convnet, images, mlp, step_with, still
from scipy import stats
from torch import Tensor, nn
from torch.optim import Optimizer

from clagrange import replicas
from clagrange.interventions import ContinualBackprop
from clagrange.interventions.continual_backprop import UTILITIES
from clagrange.wiring import Connection, connections


def ages(method: ContinualBackprop, layer: str = "0") -> Tensor:
    return method.state[layer]["age"]


# ------------------------------------------------------------------------------------------ which units go
def test_a_dead_unit_comes_back() -> None:
    net = mlp()
    with torch.no_grad():
        net[0].bias[2] = -100.0
    before = {name: value.clone() for name, value in net.state_dict().items()}
    method, inputs = ContinualBackprop(replacement_rate=1 / 6, maturity=4, layers=["0", "2"]), batch(size=64)
    optimizer = still(net)
    method.on_start(net, optimizer)
    assert not net[:2](inputs[0])[:, 2].any()
    for _ in range(4):
        step_with(net, optimizer, method, *inputs)
    assert_same_tensors(dict(net.state_dict()), before)
    step_with(net, optimizer, method, *inputs)

    assert net[:2](inputs[0])[:, 2].any()
    bound = math.sqrt(2) * math.sqrt(3 / 5)
    assert net[0].weight[2].abs().max() <= bound
    assert not torch.equal(net[0].weight[2], before["0.weight"][2])
    assert net[0].bias[2] == 0
    assert not net[2].weight[:, 2].any()
    others = torch.arange(6) != 2
    assert torch.equal(net[0].weight[others], before["0.weight"][others])
    assert torch.equal(net[2].weight[:, others], before["2.weight"][:, others])
    assert torch.equal(net[2].bias, before["2.bias"])  # the dead unit contributed nothing
    assert ages(method).tolist() == [5, 5, 0, 5, 5, 5]


@pytest.mark.parametrize("rate", [0.5, 1 / 6, 0.04, 1e-3])
@pytest.mark.parametrize("maturity", [0, 20])
def test_planning_ahead_changes_nothing(monkeypatch: pytest.MonkeyPatch, rate: float, maturity: int) -> None:
    """When units are due is known beforehand, and not looked for in the steps until then."""

    def trained() -> dict[str, Tensor]:
        torch.manual_seed(0)
        net = mlp()
        method, optimizer = ContinualBackprop(rate, maturity=maturity), torch.optim.SGD(net.parameters(), lr=0.01)
        method.on_start(net, optimizer)
        looked.clear(), replaced.clear()
        for _ in range(300):
            step_with(net, optimizer, method, *inputs)
        return {**net.state_dict(), **{f"age of {name}": ages(method, name) for name in method.state}}

    def note(method: ContinualBackprop, part: Any, mask: Tensor, optimizer: Optimizer) -> None:
        replaced.extend(mask.nonzero())
        replace(method, part, mask, optimizer)

    inputs, looked, replaced = batch(size=4), [], []
    replace, replace_due = ContinualBackprop._replace, ContinualBackprop._replace_due
    monkeypatch.setattr(ContinualBackprop, "_replace", note)
    monkeypatch.setattr(ContinualBackprop, "_replace_due", lambda *a: looked.append(1) or replace_due(*a))
    ahead = trained()
    assert len(looked) <= 2 + 2 * len(replaced)  # when units are due, and when they mature
    monkeypatch.setattr(ContinualBackprop, "_plan", lambda *_: None)
    assert_same_tensors(trained(), ahead)
    assert len(looked) == 300


def test_new_weights_are_uniform_within_the_bound() -> None:
    net = nn.Sequential(nn.Linear(50, 40), nn.ReLU(), nn.Linear(40, 2)).double()
    method = ContinualBackprop(replacement_rate=1.0, maturity=0, gain=2.0)
    optimizer = still(net)
    method.on_start(net, optimizer)
    step_with(net, optimizer, method, torch.randn(8, 50, dtype=torch.float64), torch.randint(2, (8,)))
    bound = 2 * math.sqrt(3 / 50)
    law = stats.uniform(-bound, 2 * bound)
    assert stats.kstest(net[0].weight.detach().flatten().numpy(), law.cdf).pvalue > 0.01


@pytest.mark.parametrize("utility", ["contribution", "zero_contribution", "adaptable_contribution"])
def test_a_planted_useless_unit_goes_first(utility: str) -> None:
    net = mlp()
    with torch.no_grad():
        net[2].weight[:, 4] *= 1e-3
        net[0].bias.fill_(1.0)
    method = ContinualBackprop(replacement_rate=1 / 6, maturity=2, utility=utility)
    optimizer = still(net)
    method.on_start(net, optimizer)
    for _ in range(3):
        step_with(net, optimizer, method, *batch())
    assert ages(method).tolist() == [3, 3, 3, 3, 0, 3]


def test_a_constant_unit_is_useless_to_the_utility_that_subtracts_the_mean() -> None:
    """Unit 1 is large and constant: most useful by its contribution, least by what varies."""
    gone = {}
    for utility in ("contribution", "zero_contribution"):
        net = mlp()
        with torch.no_grad():
            net[0].weight[1] = 0.0
            net[0].bias.fill_(1.0)
            net[0].bias[1] = 50.0
        method = ContinualBackprop(replacement_rate=1 / 6, maturity=2, utility=utility)
        optimizer = still(net)
        method.on_start(net, optimizer)
        for _ in range(3):
            step_with(net, optimizer, method, *batch())
        gone[utility] = (ages(method) == 0).nonzero().flatten().tolist()
    assert gone["zero_contribution"] == [1]
    assert gone["contribution"] != [1]


def test_only_mature_units_are_replaced_and_all_in_turn() -> None:
    net, method = mlp(), ContinualBackprop(replacement_rate=1.0, maturity=7)
    optimizer = still(net)
    method.on_start(net, optimizer)
    replaced_at = []
    for number in range(1, 25):
        step_with(net, optimizer, method, *batch(number))
        if not ages(method).any():
            replaced_at.append(number)
        else:
            assert len(set(ages(method).tolist())) == 1
        assert ages(method).max() <= 8
    assert replaced_at == [8, 16, 24]


@pytest.mark.parametrize(("rate", "maturity"), [(1 / 64, 10), (3 / 64, 0), (19 / 64, 5)])  # exact in binary
def test_exact_number_over_many_steps(rate: float, maturity: int) -> None:
    """The counter loses nothing: after n steps floor(Σ rate · mature units) units were replaced."""
    net, method = mlp(), ContinualBackprop(replacement_rate=rate, maturity=maturity)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    method.on_start(net, optimizer)
    owed = {"0": 0.0, "2": 0.0}
    replaced = {"0": 0, "2": 0}
    for number in range(300):
        before = {layer: ages(method, layer).clone() for layer in owed}
        step_with(net, optimizer, method, *batch(number % 5))
        for layer in owed:
            owed[layer] += rate * int((before[layer] + 1 > maturity).sum())
            replaced[layer] += int((ages(method, layer) == 0).sum())
            assert replaced[layer] == math.floor(owed[layer])
    assert min(replaced.values()) > 5


def test_rate_zero_replaces_nothing() -> None:
    nets = [mlp() for _ in range(2)]
    for net, rate in zip(nets, (0.0, None), strict=True):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        method = ContinualBackprop(replacement_rate=rate, maturity=0) if rate is not None else None
        if method:
            method.on_start(net, optimizer)
        for number in range(10):
            backward(net, optimizer, *batch(number))
            optimizer.step()
            if method:
                method.on_step(net, optimizer)
    assert_same_tensors(dict(nets[0].state_dict()), dict(nets[1].state_dict()))


# -------------------------------------------------------------------------------------- utilities and order
class Watcher:
    """Records the inputs of every consumer by hooks of its own."""

    def __init__(self, links: list[Connection]) -> None:
        self.entering: dict[str, Tensor] = {}
        for link in links:
            link.consumer.register_forward_pre_hook(self._hook(link.name))

    def _hook(self, name: str):
        def note(_: nn.Module, args: tuple[Tensor]) -> None:
            self.entering[name] = args[0].detach()

        return note


def as_units(link: Connection, entering: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(samples, units) activations, (units, inputs) and (units, outputs) weights, by plain loops."""
    units = link.producer.weight.shape[0]
    if isinstance(link.consumer, nn.Conv2d):
        columns = [entering[:, unit].flatten() for unit in range(units)]
        outgoing = [link.consumer.weight[:, unit].flatten() for unit in range(units)]
    else:
        copies = entering.shape[1] // units
        spans = [slice(unit * copies, (unit + 1) * copies) for unit in range(units)]
        columns = [entering[:, span].flatten() for span in spans]
        outgoing = [link.consumer.weight[:, span].flatten() for span in spans]
    incoming = link.producer.weight.flatten(1).clone()
    return tuple(x.detach().numpy() for x in (torch.stack(columns, 1), incoming, torch.stack(outgoing)))


@pytest.mark.parametrize("utility", [utility for utility in UTILITIES if utility != "random"])
@pytest.mark.parametrize(("make", "data"), [(mlp, batch), (convnet, images)], ids=["linear", "convolution"])
def test_utilities_and_choice_against_the_oracle(utility: str, make, data) -> None:
    """40 training steps; after each, ages, averages, utilities and the replaced units agree."""
    net = make()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    method = ContinualBackprop(replacement_rate=0.03, maturity=5, utility=utility, decay=0.9)
    method.on_start(net, optimizer)
    links = connections(net)
    watcher = Watcher(links)
    units = {link.name: oracles.UnitUtilities(link.units, utility, 0.9) for link in links}
    owed = dict.fromkeys(units, 0.0)
    total = 0
    for number in range(40):
        backward(net, optimizer, *data(number))
        optimizer.step()
        # layers are handled in order, and a replacement changes the outgoing weights that the next layer takes
        # for its incoming ones: the oracle sees each layer as the method is about to
        expected_incoming = {link.name: as_units(link, watcher.entering[link.name]) for link in links}
        method.on_step(net, optimizer)
        for link in links:
            oracle = units[link.name]
            activations, incoming, outgoing = expected_incoming[link.name]
            incoming = _after_replacement(links, link, units, incoming)
            corrected = oracle.update(activations, incoming, outgoing)
            mature = np.flatnonzero(oracle.age > 5)
            owed[link.name] += 0.03 * len(mature)
            count = math.floor(owed[link.name])
            owed[link.name] -= count
            chosen = sorted(mature, key=lambda unit: corrected[unit])[:count]
            oracle.replaced = chosen
            for unit in chosen:
                oracle.forget(unit)
            total += count
            state = method.state[link.name]
            np.testing.assert_array_equal(state["age"].numpy(), oracle.age)
            np.testing.assert_allclose(state["mean_activation"].numpy(), oracle.mean_activation, rtol=1e-10)
            np.testing.assert_allclose(state["utility"].numpy(), oracle.utility, rtol=1e-10)
    assert total >= 6


def _after_replacement(
    links: list[Connection], link: Connection, units: dict[str, oracles.UnitUtilities], incoming: np.ndarray
) -> np.ndarray:
    """The incoming weights with the columns of units that the layer before has just replaced at 0."""
    position = links.index(link)
    if position == 0:
        return incoming
    before = units[links[position - 1].name]
    width = incoming.shape[1] // len(before.age)
    changed = incoming.copy()
    for unit in before.replaced:
        changed[:, unit * width : (unit + 1) * width] = 0
    return changed


def test_a_random_choice_is_uniform_and_of_the_seed() -> None:
    """Of 6 mature units one goes at a time; 300 runs."""
    gone = []
    for seed in [*range(300), 0]:
        net, method = mlp(), ContinualBackprop(1 / 6, maturity=0, utility="random", layers=["0", "2"], seed=seed)
        optimizer = still(net)
        method.on_start(net, optimizer)
        step_with(net, optimizer, method, *batch())
        gone.append(int((ages(method) == 0).nonzero()))
    assert stats.chisquare(np.bincount(gone[:300], minlength=6)).pvalue > 0.01
    assert gone[-1] == gone[0]


@pytest.mark.parametrize(
    ("stacked", "widths"), [(1, (1100, 1000)), (1, (1100, 10)), (3, (1100, 1000)), (3, (300, 400))]
)
def test_magnitudes_of_large_weights_are_the_same(stacked: int, widths: tuple[int, int]) -> None:
    """They are added up in another way."""
    wide, out = widths
    nets = [nn.Sequential(nn.Linear(700, wide), nn.ReLU(), nn.Linear(wide, out)) for _ in range(stacked)]
    net, data = nets[0], (torch.randn(2, 700), torch.randint(2, (2,)))
    if stacked > 1:
        net, data = replicas.stack(nets), (torch.randn(stacked, 2, 700), torch.randint(2, (stacked, 2)))
    for utility, expected in (
        ("weight", net[2].weight.detach().abs().mean(-2)),
        ("adaptation", 1 / net[0].weight.detach().abs().mean(-1)),
    ):
        method = ContinualBackprop(utility=utility, decay=0.0)
        optimizer = still(net)
        method.on_start(net, optimizer)
        step_with(net, optimizer, method, *data)
        torch.testing.assert_close(method.state["0"]["utility"], expected)
        method.detach()


# ---------------------------------------------------------------------------------- replicas, structure, use
def test_stacked_convolutions_equal_separate_runs() -> None:
    nets = [convnet(seed) for seed in range(R)]
    stacked = replicas.stack(nets)

    def start(net: nn.Module, seed: int | list[int]) -> tuple[Optimizer, ContinualBackprop]:
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        method = ContinualBackprop(0.1, maturity=3, utility="zero_contribution", decay=0.9, seed=seed)
        method.on_start(net, optimizer)
        return optimizer, method

    optimizer, method = start(stacked, [5, 6, 7])
    singles = [start(net, 5 + r) for r, net in enumerate(nets)]
    for number in range(15):
        batches = [images(100 * r + number) for r in range(R)]
        step_with(stacked, optimizer, method, *(torch.stack(part) for part in zip(*batches, strict=True)))
        for net, single, data in zip(nets, singles, batches, strict=True):
            step_with(net, *single, *data)
    for net, single in zip(nets, replicas.unstack(stacked), strict=True):
        assert_same_tensors(dict(single.state_dict()), dict(net.state_dict()), rtol=1e-10, atol=1e-10)


def test_evaluation_leaves_no_trace() -> None:
    net, method = mlp(), ContinualBackprop(maturity=0)
    optimizer = still(net)
    method.on_start(net, optimizer)
    backward(net, optimizer, *batch())
    with torch.no_grad():
        net(1e6 * batch(1)[0])
    net.eval()
    net(1e6 * batch(1)[0])
    net.train()
    method.on_step(net, optimizer)
    assert ages(method).tolist() == [1] * 6
    assert method.state["0"]["mean_activation"].max() < 1
    method.on_step(net, optimizer)  # no training step in between
    assert ages(method).tolist() == [1] * 6
