"""One method, three ways: the runner, Avalanche and Lightning make the same weights of the same batches."""

import pytest
import torch
from avalanche_runs import naive
from cases import assert_same_tensors, study_methods
from lightning_runs import Classifier, trainer
from parity import DoubleDigits
from torch import nn

import clagrange as cl
from clagrange.strategies import InterventionPlugin
from clagrange.study.engine import Run
from clagrange.study.methods import METHODS

STREAM = DoubleDigits(tasks=2, examples=200, batch_size=8, seed=5)  # 2 × 25 steps
SETTINGS = {
    "continual_backprop": {"replacement_rate": 0.02, "maturity": 3},
    "graded_continual_backprop": {"rate": 0.5, "every": 5},
    "redo": {"threshold": 0.5, "every": 5},
    "self_normalized_resets": {"rejection": 0.1, "longest": 8},
    "soap": {"largest": 1},  # the axes of a null space are those of rounding, which differs between the three
}


OFTEN = {"threshold": 2.0}
VARIANTS = {
    "euler_lagrange_injection, cusum": {"detector": "cusum", **OFTEN},
    "euler_lagrange_injection, energy_jump": {"detector": "energy_jump", "over": 3, **OFTEN},
    "euler_lagrange_injection, predictive_surprise": {"detector": "predictive_surprise", **OFTEN},
}
"""Methods under further settings: alarms of detectors come at the same steps in every framework."""


def method(name):
    return METHODS[name.partition(",")[0]](**SETTINGS.get(name, {}), **VARIANTS.get(name, {}))


def network(name):
    net = cl.networks.mlp(64, [12, 8], 10, seed=STREAM.seed).double()
    method(name).prepare(net, STREAM.seed)
    return net


def through_runner(name) -> nn.Module:
    run = Run(method(name), [STREAM], [12, 8], dtype=torch.float64)
    while run.next_task < run.tasks:
        run.run_task()
    return cl.replicas.unstack(run.network)[0]


def through_avalanche(name) -> nn.Module:
    net = network(name)
    plugin = InterventionPlugin(*method(name).interventions(STREAM.seed))
    strategy = naive(
        net, optimizer=method(name).optimizer(net), plugins=[plugin], train_mb_size=STREAM.batch_size
    )
    for experience in STREAM.as_benchmark().train_stream:
        strategy.train(experience, shuffle=False)
    return net


def through_lightning(name, folder) -> nn.Module:
    module = Classifier(network(name), method(name).optimizer)
    interventions = method(name).interventions(STREAM.seed)
    callbacks = [cl.callbacks.InterventionCallback(interventions)] if interventions else []
    trainer(folder, callbacks=callbacks).fit(module, STREAM.as_datamodule())
    return module.net


@pytest.mark.parametrize("name", [*study_methods(), *VARIANTS])
# a data module that holds its batches in memory has no use for the loader workers that Lightning misses
@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
def test_same_weights_in_the_runner_in_avalanche_and_in_lightning(name, tmp_path):
    runner = through_runner(name).state_dict()
    for other in (through_avalanche(name), through_lightning(name, tmp_path)):
        assert_same_tensors(other.state_dict(), runner, rtol=1e-8, atol=1e-14)
    start = network(name).state_dict()
    assert all(not torch.equal(runner[key], start[key]) for key in start if key.endswith(".weight"))
