"""The batched engine: each replica equals its run alone, checkpoints are exact, divergence stays at home."""

import dataclasses
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from cases import study_methods

from clagrange import _magnitudes
from clagrange.metrics import PlasticityMeter, variance_by_layer
from clagrange.networks import mlp
from clagrange.optim import perceptron_sgd
from clagrange.replicas import unstack
from clagrange.study import engine
from clagrange.study.engine import Run
from clagrange.study.files import FileProblem
from clagrange.study.methods import METHODS
from clagrange.study.reporting.summary import summarize
from clagrange.study.results import METRICS, MethodResult
from clagrange.study.side_by_side import stacked
from clagrange.tasks import (
    IncrementalCIFAR,
    PermutedDigits,
    RandomLabelDigits,
    RotatedMNIST,
    SlowlyChangingRegression,
    SplitClasses,
)

FAST = {
    "continual_backprop": {"replacement_rate": 0.05, "maturity": 5},
    "graded_continual_backprop": {"rate": 0.5, "every": 4},
    "redo": {"threshold": 0.5, "every": 4},
    "self_normalized_resets": {"rejection": 0.1, "longest": 6},
}


def stream(seed, tasks=3):
    return PermutedDigits(tasks=tasks, examples=80, batch_size=8, seed=seed)


def finished(method, streams, **settings):
    run = Run(method, streams, [8, 6], **settings)
    while run.next_task < run.tasks:
        run.run_task()
    return run


@pytest.mark.parametrize("tasks", [3, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", study_methods())
def test_replicas_equal_runs_alone(name, tasks):
    """Over 30 steps, and over 200."""
    method = METHODS[name](**FAST.get(name, {}))
    together = finished(method, [stream(3, tasks), stream(8, tasks)], dtype=torch.float64)
    for index, seed in enumerate((3, 8)):
        alone = finished(method, [stream(seed, tasks)], dtype=torch.float64)
        for key in METRICS:
            np.testing.assert_allclose(together.metrics[key][index], alone.metrics[key][0], rtol=1e-8, atol=1e-12)
        for (tensor_name, many), one in zip(
            together.network.named_parameters(), alone.network.parameters(), strict=True
        ):
            torch.testing.assert_close(many[index], one[0], rtol=1e-8, atol=1e-12, msg=tensor_name)


@pytest.mark.parametrize("name", study_methods())
def test_a_search_trial_equals_its_run_alone(name):
    """Settings as tensors: what one replica gets is what a run with that number gets."""
    first = METHODS[name](**FAST.get(name, {}))
    number = next(field.name for field in dataclasses.fields(first))
    second = dataclasses.replace(first, **{number: getattr(first, number) * 0.5})
    both = finished(stacked([first, second], 1), [stream(1), stream(1)], dtype=torch.float64)
    alone = finished(second, [stream(1)], dtype=torch.float64)
    np.testing.assert_allclose(both.metrics["loss"][1], alone.metrics["loss"][0], rtol=1e-8)
    assert both.metrics["loss"][0, -1] != both.metrics["loss"][1, -1]


@pytest.mark.parametrize("name", study_methods())
def test_going_on_from_a_checkpoint_is_exact(name, tmp_path):
    method = METHODS[name](**FAST.get(name, {}))
    whole = finished(method, [stream(0), stream(1)])
    first = Run(method, [stream(0), stream(1)], [8, 6])
    first.run_task()
    first.save(tmp_path / "run.pt", "key")
    second = Run(method, [stream(0), stream(1)], [8, 6])
    second.load(tmp_path / "run.pt", "key")
    assert second.next_task == 1
    while second.next_task < second.tasks:
        second.run_task()
    for key in METRICS:
        np.testing.assert_array_equal(second.metrics[key], whole.metrics[key])
    assert [path.name for path in tmp_path.iterdir()] == ["run.pt"]


def test_checkpoints_of_other_settings_or_damaged_ones_are_refused(tmp_path):
    run = Run(METHODS["sgd"](), [stream(0)], [8])
    path = tmp_path / "run.pt"
    run.save(path, "key")
    with pytest.raises(FileProblem, match="of these settings"):
        run.load(path, "another key")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(FileProblem, match="damaged"):
        run.load(path, "key")


def test_same_data_and_start_for_every_method():
    runs = [Run(METHODS[name](), [stream(5)], [8]) for name in ("sgd", "euler_lagrange")]
    for name, weight in runs[0].network.named_parameters():
        torch.testing.assert_close(weight, dict(runs[1].network.named_parameters())[name], rtol=0, atol=0)
    for run in runs:
        run.run_task()
    np.testing.assert_array_equal(runs[0].metrics["dead_units"][:, 0], runs[1].metrics["dead_units"][:, 0])


def test_online_accuracy_counts_predictions_before_the_update():
    """A learning rate of 0 leaves the fresh network: its accuracy on the task is the online accuracy."""
    run = Run(METHODS["sgd"](lr=0.0), [stream(2, tasks=1)], [8])
    task = run.streams[0].task(0)
    order = run.streams[0].order(0, 0).flatten()
    with torch.no_grad():
        right = run.network(task.inputs[order].unsqueeze(0)).argmax(-1)[0] == task.targets[order]
    run.run_task()
    assert run.metrics["online_accuracy"][0, 0] == pytest.approx(float(right.float().mean()))


def test_a_diverged_replica_is_marked_and_disturbs_no_other():
    method = dataclasses.replace(METHODS["sgd"](), lr=torch.tensor([0.03, 1e38], dtype=torch.float64))
    run = finished(method, [stream(4), stream(4)])
    alone = finished(METHODS["sgd"](lr=0.03), [stream(4)])
    result = run.result("digits", "sgd")
    assert result.diverged == (False, True)
    np.testing.assert_allclose(run.metrics["loss"][0], alone.metrics["loss"][0], rtol=1e-4)
    assert run.metrics["online_accuracy"][1, -1] == 0.0


@pytest.mark.parametrize("name", study_methods())
def test_a_diverged_replica_is_frozen_and_disturbs_no_other(name, tmp_path):
    """Bit for bit, also when the run goes on from a checkpoint; of the diverged one there are no numbers.

    Kronecker precisions give replicas shares of their own from then on: that rounds otherwise.
    """
    method = METHODS[name](**FAST.get(name, {}))
    runs = [Run(method, [stream(3), stream(8)], [8, 6], sharpness_every=1) for _ in range(3)]
    steps = []

    @torch.no_grad()
    def poison():
        steps.append(1)
        if len(steps) == 4:
            for parameter in runs[1].network.parameters():
                parameter[1] = torch.nan

    for run in runs[:2]:
        run.run_task()
    runs[0].run_task()
    runs[1].run_task(poison)
    runs[1].save(tmp_path / "run.pt", "key")
    runs[2].load(tmp_path / "run.pt", "key")
    for run in runs:
        run.run_task()
    whole, *broken = runs
    rounding = {"rtol": 1e-4, "atol": 1e-6} if "kronecker" in name else {"rtol": 0.0, "atol": 0.0}
    for run in broken:
        for key in METRICS:
            np.testing.assert_allclose(run.metrics[key][0], whole.metrics[key][0], err_msg=key, **rounding)
            accuracy = key in ("online_accuracy", "task_accuracy")
            assert (run.metrics[key][1, 2] == 0.0) if accuracy else np.isnan(run.metrics[key][1, 2]), key
        np.testing.assert_array_equal(run.metrics["loss"][:, 0], whole.metrics["loss"][:, 0])
        assert run.result("s", "m").diverged == (False, True)
        for key, parameter in run.network.named_parameters():
            assert torch.equal(parameter[1], run._initial[key][1]), key
            torch.testing.assert_close(parameter[0], whole.network.get_parameter(key)[0], **rounding)


def test_epochs_and_steps_are_counted():
    labels = RandomLabelDigits(tasks=2, examples=50, batch_size=20, epochs=3)
    run = Run(METHODS["adam"](), [labels], [8])
    calls = []
    run.run_task(lambda: calls.append(1))
    assert len(calls) == 3 * 2
    run.run_task()
    assert run.result("labels", "adam").steps == 12


def test_results_survive_parquet_and_damage_is_named(tmp_path):
    run = finished(METHODS["euler_lagrange_injection"](), [stream(0), stream(1)])
    result = run.result("digits", "mine")
    path = tmp_path / "digits.mine.parquet"
    result.write(path)
    again = MethodResult.read(path)
    assert (again.stream, again.method, again.seeds, again.steps) == ("digits", "mine", (0, 1), 30)
    assert again.told_of_switches
    for key in METRICS:
        np.testing.assert_array_equal(again.metrics[key], result.metrics[key])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(FileProblem, match="remove it"):
        MethodResult.read(path)


def test_told_of_switches_is_said_of_those_that_use_them():
    told = {name for name, kind in METHODS.items() if kind.extra is None and kind().told_of_switches}
    assert told == {
        "head_reset",
        "last_layer_reset",
        "fresh_network",
        "euler_lagrange_injection",
        "euler_lagrange_kronecker_injection",
    }


def test_sgd_steps_in_the_backward_pass_where_nothing_needs_the_gradients():
    of_itself = {name for name, kind in METHODS.items() if kind.extra is None and _in_backward(kind())}
    assert {"sgd", "continual_backprop", "shrink_and_perturb", "redo", "head_reset"} < of_itself
    assert not {"l2_init", "spectral_regularization", "graded_continual_backprop", "adam"} & of_itself
    assert not _in_backward(METHODS["redo"](score="gradient"))
    assert not _in_backward(METHODS["head_reset"](base="adam"))


def _in_backward(method):
    return Run(method, [stream(0)], [8, 6])._rates_in_backward


@pytest.mark.parametrize("name", ["sgd", "continual_backprop", "shrink_and_perturb", "redo", "layer_norm"])
def test_steps_in_the_backward_pass_come_to_the_same(name, monkeypatch):
    method = METHODS[name](**FAST.get(name, {}))
    inside = finished(method, [stream(0), stream(1)], dtype=torch.float64)
    monkeypatch.setattr(engine, "rates_of_plain_sgd", lambda network, optimizer: {})
    apart = finished(method, [stream(0), stream(1)], dtype=torch.float64)
    for key in METRICS:
        np.testing.assert_allclose(inside.metrics[key], apart.metrics[key], rtol=1e-8, atol=1e-12)


def test_plain_sgd_of_perceptrons_needs_no_graph():
    def without_graph(name, **settings):
        run = Run(METHODS[name](**settings), [stream(0)], [8, 6])
        run.run_task()
        return run._perceptron is not None

    assert without_graph("sgd")
    assert without_graph("shrink_and_perturb")
    assert not without_graph("continual_backprop")  # it looks at activations
    assert not without_graph("layer_norm")
    assert not without_graph("adam")


def test_weights_that_wait_come_to_the_same_and_are_right_between_tasks(monkeypatch):
    apart = finished(METHODS["sgd"](lr=0.1), [stream(0), stream(1)], dtype=torch.float64)
    monkeypatch.setattr(perceptron_sgd, "WIDE", 1)
    monkeypatch.setattr(perceptron_sgd, "KEPT", 40)
    waiting = finished(METHODS["sgd"](lr=0.1), [stream(0), stream(1)], dtype=torch.float64)
    for key in METRICS:
        np.testing.assert_allclose(waiting.metrics[key], apart.metrics[key], rtol=1e-8, atol=1e-12)
    assert any((waiting.metrics[key] != apart.metrics[key]).any() for key in METRICS)


def test_large_weights_that_step_in_parts_learn_the_same(monkeypatch):
    """Continual backprop at batch 1: the backward pass, the step and what it looks at, a few rows at a time."""
    method = METHODS["continual_backprop"](utility="adaptable_contribution", **FAST["continual_backprop"])
    streams = [PermutedDigits(tasks=2, examples=60, batch_size=1, seed=seed) for seed in (0, 1)]
    whole = finished(method, streams, dtype=torch.float64)
    parted = []
    step = _magnitudes._add_in_parts
    monkeypatch.setattr(
        _magnitudes, "_add_in_parts", lambda weight, *rest: parted.append(weight) or step(weight, *rest)
    )
    monkeypatch.setattr(_magnitudes, "PART", 50)
    apart = finished(method, streams, dtype=torch.float64)
    assert {tuple(weight.shape) for weight in parted} == {(2, 8, 64), (2, 10, 6)}
    for key in METRICS:
        np.testing.assert_allclose(apart.metrics[key], whole.metrics[key], rtol=1e-8, atol=1e-12)


def test_an_interrupted_task_leaves_no_weights_waiting(monkeypatch):
    def interrupted():
        steps = []

        def interrupt():
            steps.append(1)
            if len(steps) == 3:
                raise KeyboardInterrupt

        run = Run(METHODS["sgd"](lr=0.1), [stream(0)], [8, 6], dtype=torch.float64)
        with pytest.raises(KeyboardInterrupt):
            run.run_task(interrupt)
        return run.network.state_dict()

    at_once = interrupted()
    monkeypatch.setattr(perceptron_sgd, "WIDE", 1)
    monkeypatch.setattr(perceptron_sgd, "KEPT", 40)
    torch.testing.assert_close(interrupted(), at_once, rtol=1e-10, atol=1e-12)


def test_a_frozen_layer_is_left_alone():
    run = Run(METHODS["sgd"](lr=0.1), [stream(0)], [8, 6])
    *_, last = run.network.parameters()
    before = last.detach().clone()
    last.requires_grad_(False)
    run._rates_in_backward = engine.rates_of_plain_sgd(run.network, run.optimizer)
    run.run_task()
    assert torch.equal(last, before)


def test_what_weights_wait_for_neither_spoils_nor_is_spoilt(monkeypatch, tmp_path):
    """The cases above, with weights that wait."""
    monkeypatch.setattr(perceptron_sgd, "WIDE", 1)
    monkeypatch.setattr(perceptron_sgd, "KEPT", 40)
    test_a_diverged_replica_is_frozen_and_disturbs_no_other("sgd", tmp_path)
    test_measuring_leaves_training_as_it_is("sgd")
    test_replicas_equal_runs_alone("sgd", 3)
    test_going_on_from_a_checkpoint_is_exact("sgd", tmp_path)


def test_how_much_is_made_at_once_plays_no_part(monkeypatch):
    whole = finished(METHODS["adam"](), [stream(0), stream(1)])
    monkeypatch.setattr(engine, "CHUNK", 1)
    chunked = finished(METHODS["adam"](), [stream(0), stream(1)])
    for key in METRICS:
        np.testing.assert_array_equal(whole.metrics[key], chunked.metrics[key])


def test_a_stream_of_numbers_is_learnt_by_squared_error():
    numbers = SlowlyChangingRegression(tasks=2, examples=40, batch_size=4, seed=3)
    run = Run(METHODS["sgd"](lr=0.02), [numbers], [5], dtype=torch.float64)
    net = mlp(20, [5], 1, seed=3).double()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02)
    for number in range(2):
        run.run_task()
        losses = []
        for rows in numbers.order(number, 0):
            inputs, targets = numbers.task(number).batch(rows)
            optimizer.zero_grad()
            loss = torch.nn.functional.mse_loss(net(inputs.double())[:, 0], targets.double())
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert run.metrics["loss"][0, number] == pytest.approx(np.mean(losses), rel=1e-9)
    assert np.isnan(run.metrics["online_accuracy"]).all()
    assert run.result("slow", "sgd").diverged == (False,)


@pytest.mark.parametrize("name", ["sgd", "euler_lagrange"])
def test_outputs_that_take_no_part_are_left_alone(name):
    """Rows of the last layer of classes that a task does not show keep their start."""
    streams = [SplitClasses("digits", tasks=2, scenario="task", epochs=1, seed=seed) for seed in (1, 2)]
    run = Run(METHODS[name](), streams, [8])
    start = [head.clone() for head in list(run.network.parameters())[-2]]
    run.run_task()
    assert np.isfinite(run.metrics["loss"][:, 0]).all()
    assert (run.metrics["online_accuracy"][:, 0] > 0.6).all()
    if name == "sgd":
        for before, after, shown in zip(start, list(run.network.parameters())[-2], streams, strict=True):
            moved = (before != after).any(1).nonzero().flatten()
            assert torch.equal(moved, shown.task(0).classes)


def test_examples_that_are_measured_are_of_all_classes(monkeypatch):
    """Those of a task lie class by class."""
    monkeypatch.setattr(engine, "PROBE", 40)
    monkeypatch.setattr(engine, "TEST", 40)
    streams = [SplitClasses(source="digits", tasks=2, classes_per_task=5, batch_size=8, seed=s) for s in range(2)]
    run = Run(METHODS["sgd"](lr=0.0), streams, [8])
    tasks = run._tasks(0)
    for task, targets in zip(tasks, run._probe(tasks)[1], strict=True):
        assert len(targets) == 40
        assert set(targets.tolist()) == set(task.targets.tolist())
        assert len(set(task.targets[:40].tolist())) < 5
    with torch.no_grad():
        for replica, task in enumerate(tasks):  # always answers the first class
            run.network[-1].weight.zero_()
            run.network[-1].bias[replica, int(task.test.targets[0])] = 1e3
    assert (run._accuracy([task.test for task in tasks], 40) < 0.5).all()


def test_what_an_intervention_draws_is_not_what_the_weights_began_with():
    for name, settings in (
        ("fresh_network", {}),
        ("shrink_and_perturb", {"shrink": 0.0, "noise": 1.0, "every": "switch", "perturbation": "initial"}),
        ("euler_lagrange_injection", {"strength": 1.0}),
    ):
        run = Run(METHODS[name](**settings), [stream(seed) for seed in range(2)], [64])
        begun = run.network[1].weight.detach().clone()
        (method,) = run.interventions
        method.on_start(run.network, run.optimizer)
        method.on_switch(run.network, run.optimizer)
        drawn = run.network[1].weight.detach() - (begun if name == "shrink_and_perturb" else 0.0)
        for replica in range(2):
            both = torch.stack([begun[replica].flatten(), drawn[replica].flatten()])
            assert abs(float(torch.corrcoef(both)[0, 1])) < 0.1, name


def test_hidden_switches_are_told_to_nobody():
    runs = {}
    for drift in ("gradual", "abrupt"):
        turning = [RotatedMNIST("digits", tasks=3, examples=80, drift=drift)]
        for name in ("adam", "fresh_network"):
            runs[drift, name] = finished(METHODS[name](lr=0.01), turning)
    loss = {key: run.metrics["loss"][0] for key, run in runs.items()}
    np.testing.assert_array_equal(loss["gradual", "adam"], loss["gradual", "fresh_network"])
    assert loss["abrupt", "adam"][1] != loss["abrupt", "fresh_network"][1]
    told = {key: run.result("s", "m").told_of_switches for key, run in runs.items() if key[1] != "adam"}
    assert told == {("gradual", "fresh_network"): False, ("abrupt", "fresh_network"): True}


@pytest.mark.parametrize(
    "network",
    [{"kind": "resnet18", "norm": "batch", "width": 2}, {"kind": "vit", "width": 8, "depth": 1, "heads": 2}],
    ids=lambda network: network["kind"],
)
def test_other_networks_and_growing_tasks(network, tmp_path):
    def growing(seed):
        return IncrementalCIFAR(
            "digits", tasks=2, classes_per_task=3, examples_per_class=12, batch_size=9, epochs=2, seed=seed
        )

    def run(*seeds):
        return Run(METHODS["sgd"](), [growing(seed) for seed in seeds], network, dtype=torch.float64)

    whole, alone = run(0, 1), run(1)
    for each in (whole, alone):
        each.run_task()
    whole.save(tmp_path / "run.pt", "key")
    for each in (whole, alone):
        each.run_task()
    np.testing.assert_allclose(whole.metrics["loss"][1], alone.metrics["loss"][0], rtol=1e-7)
    again = run(0, 1)
    again.load(tmp_path / "run.pt", "key")
    assert again.steps_done == 2 * 4
    again.run_task()
    np.testing.assert_array_equal(again.metrics["loss"], whole.metrics["loss"])
    assert again.result("s", "m").steps == 2 * (4 + 8)


def test_training_images_are_augmented_anew_in_each_epoch():
    images = IncrementalCIFAR(
        "digits", tasks=1, classes_per_task=3, examples_per_class=12, batch_size=9, epochs=3
    )
    run = Run(METHODS["sgd"](lr=0.0), [images], [6], dtype=torch.float64)
    net, task = mlp(64, [6], 10, seed=0).double(), images.task(0)
    losses = []
    for epoch in range(3):
        for rows in images.order(0, epoch):
            inputs, targets = task.batch(rows, epoch)
            places = torch.searchsorted(task.classes, targets)
            losses.append(torch.nn.functional.cross_entropy(net(inputs.double())[:, task.classes], places))
    run.run_task()
    assert run.metrics["loss"][0, 0] == pytest.approx(float(torch.stack(losses).mean().detach()), rel=1e-9)


@pytest.mark.parametrize("name", study_methods())
def test_measuring_leaves_training_as_it_is(name):
    method = METHODS[name](**FAST.get(name, {}))
    runs = [
        finished(method, [stream(1), stream(2)], **settings)
        for settings in ({"measured": False}, {"sharpness_every": 2, "sample_plasticity_every": 2})
    ]
    for blind, seen in zip(*(run.network.state_dict().items() for run in runs), strict=True):
        assert blind[0] == seen[0]
        if isinstance(blind[1], torch.Tensor):
            assert torch.equal(blind[1], seen[1]), blind[0]
    for measure in ("online_accuracy", "loss"):
        np.testing.assert_array_equal(runs[0].metrics[measure], runs[1].metrics[measure])
    assert np.isnan(runs[0].metrics["weight_norm"]).all()
    assert np.isfinite(runs[1].metrics["weight_norm"]).all()
    for scheduled in ("sharpness", "sample_plasticity"):
        assert (np.isfinite(runs[1].metrics[scheduled]) == [False, True, False]).all()
    assert np.isnan(runs[0].metrics["brier_score"]).all()
    assert np.isfinite(runs[1].metrics["brier_score"]).all()


@pytest.mark.parametrize("together", [3, 4, 32])
def test_what_is_counted_batch_by_batch_is_what_a_meter_counts(together, monkeypatch):
    monkeypatch.setattr(engine, "TOGETHER", together)
    names = ["calibration_error", "brier_score", "sample_plasticity"]
    digits = stream(4, tasks=2)
    run = Run(METHODS["sgd"](lr=0.1), [stream(9, tasks=2), digits], [8], sample_plasticity_every=1)
    net, meter = mlp(64, [8], 10, seed=4), PlasticityMeter(names)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for number, task in enumerate(digits):
        meter.begin_task()
        for rows in digits.order(number, 0):
            inputs, targets = task.batch(rows)
            meter.before(net, inputs)
            optimizer.zero_grad()
            scores = net(inputs)
            torch.nn.functional.cross_entropy(scores, targets).backward()
            optimizer.step()
            meter.after(net, inputs, scores, targets)
        run.run_task()
        found = {name: float(value) for name, value in meter.online().items()}
        assert {name: run.metrics[name][1, number] for name in names} == pytest.approx(found, rel=1e-4)


def test_gaussian_weights_have_a_variance_for_each_layer(tmp_path):
    run = Run(METHODS["euler_lagrange_injection"](), [stream(0), stream(1)], [8])
    layers = [f"variance_by_layer/{name}" for name in variance_by_layer(run.network)]
    assert len(layers) == 2
    for number in range(2):
        run.run_task()
        for name, values in variance_by_layer(run.network).items():
            found = run.metrics[f"variance_by_layer/{name}"][:, number]
            np.testing.assert_allclose(found, values.numpy(), rtol=1e-6)
    run.save(tmp_path / "run.pt", "key")
    again = Run(METHODS["euler_lagrange_injection"](), [stream(0), stream(1)], [8])
    again.load(tmp_path / "run.pt", "key")
    again.run_task()
    path = tmp_path / "digits.mine.parquet"
    again.result("digits", "mine").write(path)
    read = MethodResult.read(path)
    for name in layers:
        assert np.isfinite(again.metrics[name]).all()
        np.testing.assert_array_equal(read.metrics[name], again.metrics[name])
    assert read.samples.tolist() == [80, 160, 240]
    assert (np.diff(read.elapsed) > 0).all()
    assert read.elapsed[-1] == read.seconds


def test_results_of_older_versions_are_read(tmp_path):
    result = finished(METHODS["sgd"](), [stream(0), stream(1)]).result("digits", "mine")
    path = tmp_path / "digits.mine.parquet"
    result.write(path)
    table = pq.read_table(path)
    about = json.loads(table.schema.metadata[b"clagrange"])
    old = {key: value for key, value in about.items() if key not in ("samples", "elapsed", "checksum")}
    table = table.drop_columns(["calibration_error", "brier_score", "sample_plasticity"])
    pq.write_table(table.replace_schema_metadata({"clagrange": json.dumps(old)}), path)
    read = MethodResult.read(path)
    assert np.isnan(read.metrics["brier_score"]).all()
    assert (read.samples, read.elapsed) == (None, None)
    np.testing.assert_array_equal(read.metrics["loss"], result.metrics["loss"])
    summary = summarize([read], status="complete", environment={})["streams"][0]["methods"][0]
    assert summary["plasticity_slope"]["mean"] is not None
    assert summary["area_under_curve"]["mean"] is None
    pq.write_table(table.drop_columns(["loss"]), path)
    with pytest.raises(FileProblem, match="damaged"):
        MethodResult.read(path)


@pytest.mark.parametrize("scenario", ["class", "task"])
def test_the_matrix_holds_the_accuracies_on_all_test_examples_after_every_task(scenario, tmp_path):
    def run():
        streams = [SplitClasses("digits", tasks=3, scenario=scenario, epochs=1, seed=seed) for seed in (1, 2)]
        return Run(METHODS["adam"](), streams, [8])

    whole, rows = run(), []
    for done in range(4):
        row = []
        for net, split in zip(unstack(whole.network), whole.streams, strict=True):
            for number in range(3):
                test = split.task(number).test
                inputs, targets = test.batch(torch.arange(len(test.targets)))
                outputs = net(inputs)
                if scenario == "task":
                    outputs[:, [label not in test.classes for label in range(10)]] = -torch.inf
                row.append((outputs.argmax(-1) == targets).double().mean().item())
        rows.append(np.reshape(row, (2, 3)))
        if done == 1:
            whole.save(tmp_path / "run.pt", "key")
        if done < 3:
            whole.run_task()
            np.testing.assert_allclose(whole.metrics["task_accuracy"][:, done], whole._matrix[:, done + 1, done])
    result = whole.result("s", "m")
    np.testing.assert_allclose(result.matrix, np.stack(rows, 1), rtol=1e-6)
    assert result.matrix[:, 3].mean() > result.matrix[:, 0].mean()
    again = run()
    again.load(tmp_path / "run.pt", "key")
    while again.next_task < again.tasks:
        again.run_task()
    np.testing.assert_array_equal(again.result("s", "m").matrix, result.matrix)
    for key in METRICS:
        np.testing.assert_array_equal(again.metrics[key], whole.metrics[key])
