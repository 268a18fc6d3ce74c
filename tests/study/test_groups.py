"""Groups of replicas: numbers of one run of all, a size found by trials and kept by checkpoints."""

import types

import numpy as np
import pytest
import torch

from clagrange.study import groups
from clagrange.study.engine import Run
from clagrange.study.groups import Groups, group_size, start
from clagrange.study.methods import METHODS
from clagrange.tasks import PermutedDigits, SplitClasses

NETWORK = {"kind": "mlp", "hidden": [8, 6]}


def streams(replicas=5):
    return [PermutedDigits(tasks=3, examples=80, batch_size=8, seed=seed) for seed in range(replicas)]


def finished(run):
    while run.next_task < run.tasks:
        run.run_task()
    return run


def fix_size(monkeypatch, size):
    monkeypatch.setattr(groups, "group_size", lambda start_run, replicas: size)


def with_times(seconds):
    """What `group_size` asks, answered from a table of seconds of a step by number of replicas."""
    asked = []

    def start_run(size):
        def try_steps(steps):
            asked.append(size)
            if seconds[size] is None:
                raise torch.OutOfMemoryError
            return seconds[size] * size

        return types.SimpleNamespace(try_steps=try_steps)

    return start_run, asked


@pytest.mark.parametrize(
    ("seconds", "best"),
    [
        ({5: 1.0, 3: 1.0, 2: 1.2, 1: 3.0}, 5),
        ({5: 1.0, 3: 0.95, 2: 0.92, 1: 0.91}, 5),
        ({5: 1.0, 3: 0.5, 2: 0.49, 1: 0.47}, 3),
        ({5: 1.0, 3: 0.95, 2: 0.85, 1: 0.84}, 2),
        ({5: None, 3: None, 2: 1.0, 1: 1.2}, 2),
        ({5: None, 3: None, 2: None, 1: None}, 1),
    ],
)
def test_a_smaller_group_has_to_be_worth_it(seconds, best):
    start_run, asked = with_times(seconds)
    assert group_size(start_run, 5) == best
    assert asked == [5, 3, 2, 1]


@pytest.mark.parametrize("name", ["continual_backprop", "euler_lagrange_kronecker"])
def test_groups_have_the_numbers_of_one_run_of_all(name, monkeypatch):
    fix_size(monkeypatch, 2)
    both = [kind(METHODS[name](), streams(), NETWORK, dtype=torch.float64) for kind in (Groups, Run)]
    ours, whole = (finished(run).result("digits", name) for run in both)
    assert [len(run.streams) for run in both[0].runs] == [2, 2, 1]
    for metric, values in whole.metrics.items():
        np.testing.assert_allclose(ours.metrics[metric], values, rtol=1e-8, atol=1e-12, err_msg=metric)
    assert (ours.seeds, ours.diverged, ours.steps) == (whole.seeds, whole.diverged, whole.steps)
    assert ours.elapsed[-1] == pytest.approx(ours.seconds)


def test_each_group_has_the_settings_of_its_replicas(monkeypatch):
    """As in a search, whose trials differ in them."""
    fix_size(monkeypatch, 2)
    method = METHODS["adam_l2"](lr=torch.tensor([1e-3, 2e-3, 3e-3, 4e-3, 5e-3]))
    ours, whole = (finished(kind(method, streams(), NETWORK, dtype=torch.float64)) for kind in (Groups, Run))
    np.testing.assert_allclose(ours.metrics["loss"], whole.metrics["loss"], rtol=1e-8)
    assert ours.seconds == pytest.approx(sum(run.seconds for run in ours.runs))


def test_the_matrix_of_test_accuracies_is_that_of_one_run(monkeypatch):
    fix_size(monkeypatch, 1)
    shape = {"tasks": 2, "classes_per_task": 5, "examples": 40, "batch_size": 8}
    split = [SplitClasses("digits", **shape, seed=seed) for seed in (0, 1)]
    ours, whole = (
        finished(kind(METHODS["sgd"](), split, NETWORK, dtype=torch.float64)).result("split", "sgd").matrix
        for kind in (Groups, Run)
    )
    assert whole.shape[0] == 2
    np.testing.assert_allclose(ours, whole)


def test_what_goes_on_from_a_checkpoint_has_its_groups_and_the_same_numbers(tmp_path, monkeypatch):
    fix_size(monkeypatch, 2)
    whole = finished(Groups(METHODS["adam"](), streams(), NETWORK))
    first = Groups(METHODS["adam"](), streams(), NETWORK)
    first.run_task()
    first.save(tmp_path / "run.pt", "key")
    fix_size(monkeypatch, 5)
    second = Groups(METHODS["adam"](), streams(), NETWORK)
    second.load(tmp_path / "run.pt", "key")
    assert (second.size, second.next_task, second.steps_done) == (2, 1, 10)
    for name, values in finished(second).metrics.items():
        np.testing.assert_array_equal(values, whole.metrics[name], err_msg=name)


def test_trials_leave_no_trace(monkeypatch):
    """The run that follows them has the numbers of one without."""
    tried = Groups(METHODS["continual_backprop"](replacement_rate=0.05, maturity=5), streams(3), NETWORK)
    finished(tried)
    fix_size(monkeypatch, tried.size)
    untried = finished(
        Groups(METHODS["continual_backprop"](replacement_rate=0.05, maturity=5), streams(3), NETWORK)
    )
    for name, values in tried.metrics.items():
        np.testing.assert_array_equal(values, untried.metrics[name], err_msg=name)


def test_a_step_is_told_when_all_groups_have_made_it(monkeypatch):
    fix_size(monkeypatch, 2)
    run, told = Groups(METHODS["sgd"](), streams(), NETWORK), []
    run.run_task(lambda: told.append(1))
    assert len(told) == run.steps_done == 10


def test_only_large_networks_are_grouped(monkeypatch):
    weights = 8 * (64 + 1) + 6 * (8 + 1) + 10 * (6 + 1)
    monkeypatch.setattr(groups, "TOGETHER_BYTES", 5 * 4 * weights)
    assert isinstance(start(METHODS["sgd"](), streams(5), NETWORK), Run)
    assert isinstance(start(METHODS["sgd"](), streams(6), NETWORK), Groups)
    monkeypatch.setattr(groups, "TOGETHER_BYTES", 0)
    assert isinstance(start(METHODS["sgd"](), streams(1), NETWORK), Run)
