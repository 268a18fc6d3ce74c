"""Consolidation: when it acts, beside an injection, in the runner, Avalanche and Lightning, after a restart."""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import test_three_ways
import torch
from cases import assert_same_tensors, batch, mlp, step_with, tensors_of
from torch import nn
from torch.optim import Optimizer

from clagrange import gaussianize
from clagrange.gaussian import gaussian_blocks
from clagrange.interventions import Consolidation, Intervention, VarianceInjection
from clagrange.optim import EulerLagrange
from clagrange.study.engine import Run
from clagrange.study.methods import METHODS, Method


def network(precision: str = "diagonal") -> tuple[nn.Module, Optimizer]:
    net = gaussianize(mlp(), precision)
    return net, EulerLagrange(net, lr=0.02, temperature=1e-2)


def centred(net: nn.Module) -> list[bool]:
    """Whether the prior of each layer stands at its weights."""
    return [torch.equal(block.precision.prior_mean, block.joint_mean()) for _, block in gaussian_blocks(net)]


def test_at_every_switch_and_at_no_step() -> None:
    net, optimizer = network()
    method = Consolidation()
    for step in range(6):
        step_with(net, optimizer, method, *batch(step))
        assert not any(centred(net))
        if step == 3:
            method.on_switch(net, optimizer)
            assert all(centred(net))


def test_every_three_steps_and_at_no_switch() -> None:
    net, optimizer = network()
    method = Consolidation(every=3)
    for step in range(1, 8):
        step_with(net, optimizer, method, *batch(step))
        assert all(centred(net)) == any(centred(net)) == (step % 3 == 0)
        before = tensors_of(net)
        method.on_switch(net, optimizer)
        assert_same_tensors(tensors_of(net), before)


def test_of_chosen_layers_with_a_weight() -> None:
    net, optimizer = network()
    step_with(net, optimizer, Consolidation(every=1, weight=0.0, layers=["2"]), *batch())
    assert centred(net) == [False, False, True, True, False, False]
    precision = net[2].weight_precision
    assert torch.equal(precision.precision, torch.full_like(precision.precision, 6 / 2))


def test_before_an_injection_the_prior_keeps_what_the_task_has_taught() -> None:
    net, optimizer = network()
    step_with(net, optimizer, Consolidation(), *batch())
    weight = net[0].weight.detach().clone()
    for method in (Consolidation(), VarianceInjection(0.5)):
        method.on_start(net, optimizer)
        method.on_switch(net, optimizer)
    assert torch.equal(net[0].weight_precision.prior_mean, weight)
    assert not torch.allclose(net[0].weight, weight)


@dataclass(frozen=True)
class Consolidating(Method):
    """Consolidation and injection at every switch, or consolidation every few steps."""

    precision: str
    every: int | None = None

    def prepare(self, network: nn.Module, seeds: int | Sequence[int]) -> None:
        gaussianize(network, self.precision)

    def optimizer(self, network: nn.Module) -> Optimizer:
        return EulerLagrange(network, lr=0.02, temperature=1e-3)

    def interventions(self, seeds: int | Sequence[int]) -> list[Intervention]:
        return [Consolidation(0.5, self.every), VarianceInjection(0.3, seed=seeds)]


@pytest.fixture(
    params=[("diagonal", None), ("kronecker", None), ("diagonal", 7)], ids=["diagonal", "kronecker", "steps"]
)
def name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A method that consolidates, known to studies for the time of a test."""
    monkeypatch.setitem(METHODS, "consolidating", lambda: Consolidating(*request.param))
    return "consolidating"


@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
def test_same_weights_in_the_runner_in_avalanche_and_in_lightning(name: str, tmp_path) -> None:
    test_three_ways.test_same_weights_in_the_runner_in_avalanche_and_in_lightning(name, tmp_path)


def test_a_run_goes_on_from_a_checkpoint_of_consolidated_networks(name: str, tmp_path) -> None:
    """Between the second and the third task; the fresh network that loads it has consolidated nothing yet."""
    streams = [test_three_ways.DoubleDigits(tasks=3, examples=80, batch_size=8, seed=seed) for seed in range(2)]
    runs = [Run(METHODS[name](), streams, [8, 6]) for _ in range(2)]
    for _ in range(2):
        runs[0].run_task()
    runs[0].save(tmp_path / "run.pt", "key")
    runs[1].load(tmp_path / "run.pt", "key")
    for run in runs:
        run.run_task()
    assert_same_tensors(runs[1].network.state_dict(), runs[0].network.state_dict())
