"""What holds for every stream: counts, seeds, random access, views, workers, adapters."""

import copy
import hashlib
import io
import pickle
from typing import Any

import pytest
import torch
from avalanche_runs import naive
from streams import STREAMS, Maker
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import clagrange
from clagrange.networks import LOSSES, build
from clagrange.study.engine import Run
from clagrange.study.methods import METHODS
from clagrange.tasks import Task, TaskStream

each = pytest.mark.parametrize("make", STREAMS.values(), ids=STREAMS)
TIMED = ("table of classes", "table of numbers")
"""Streams whose order is that of time, whatever the seed."""
UNTESTED = (*TIMED, "permuted digits", "random label digits", "random labels", "slowly changing")
"""Streams without test examples: memorisation, and those whose next examples are the test."""
TESTED = {name: make for name, make in STREAMS.items() if name not in UNTESTED}
BY_CHANCE = {name: make for name, make in STREAMS.items() if name not in TIMED}


def same(one: Task, other: Task) -> bool:
    return torch.equal(one.inputs, other.inputs) and torch.equal(one.targets, other.targets)


def shown(task: Task) -> set[bytes]:
    """The shared examples that a task shows, each as bytes."""
    rows = task.data if task.rows is None else task.data[task.rows]
    return {row.numpy().tobytes() for row in rows}


@each
def test_counts_shapes_and_types(make: Maker, root: str) -> None:
    stream = make(root)
    assert len(stream) == len(list(stream)) == 3
    for number, task in enumerate(stream):
        examples = stream.examples_of(number)
        assert task.inputs.shape == (examples, *stream.input_shape)
        assert task.inputs.dtype == torch.float32
        assert task.inputs.isfinite().all()
        assert task.targets.shape == (examples,)
        if stream.loss == "mse":
            assert task.targets.dtype == torch.float32
            assert stream.classes == 1
        else:
            assert task.targets.dtype == torch.int64
            assert 0 <= task.targets.min() <= task.targets.max() < stream.classes
        if task.classes is not None:
            assert set(task.targets.tolist()) <= set(task.classes.tolist())
        if task.test is not None:
            assert task.test.inputs.shape == (len(task.test.targets), *stream.input_shape)
            assert set(task.test.targets.tolist()) <= set(task.targets.tolist())


@pytest.mark.parametrize("make", BY_CHANCE.values(), ids=BY_CHANCE)
def test_same_seed_same_stream_other_seed_another(make: Maker, root: str) -> None:
    stream, again, other = make(root, seed=3), make(root, seed=3), make(root, seed=4)
    for number in range(3):
        assert same(stream.task(number), again.task(number))
        assert torch.equal(stream.order(number, 0), again.order(number, 0))
        assert not torch.equal(stream.order(number, 0), other.order(number, 0))
    if "angle" not in dir(stream) or stream.hidden_switches is False:  # a gradual turn is the same for every seed
        assert not all(same(stream.task(number), other.task(number)) for number in range(3))


@each
def test_random_access_equals_iteration_and_tasks_differ(make: Maker, root: str) -> None:
    iterated = list(make(root))
    for number in (2, 0, 1, 2):
        assert same(make(root).task(number), iterated[number])
    assert not any(same(iterated[i], iterated[j]) for i in range(3) for j in range(i))
    for number in (3, -1):
        with pytest.raises(IndexError, match="number: expected a task from 0 to 2"):
            make(root).task(number)


@each
def test_a_shorter_stream_is_the_beginning(make: Maker, root: str) -> None:
    whole, beginning = make(root), make(root, tasks=2)
    for number in range(2):
        assert same(whole.task(number), beginning.task(number))
        assert torch.equal(whole.order(number, 1), beginning.order(number, 1))


@each
def test_global_random_streams_play_no_part(make: Maker, root: str) -> None:
    first = make(root).task(1)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    again = make(root).task(1)
    again.batch(torch.arange(8), epoch=0)
    assert same(again, first)
    assert torch.equal(torch.get_rng_state(), state)


@each
def test_an_epoch_shows_every_example_at_most_once_in_whole_batches(make: Maker, root: str) -> None:
    stream = make(root)
    for number in range(3):
        order = stream.order(number, 0)
        assert order.shape == (stream.steps_of(number), 8)
        assert len(set(order.flatten().tolist())) == order.numel()
        assert stream.examples_of(number) - order.numel() < 8
        assert 0 <= order.min() <= order.max() < stream.examples_of(number)


@each
def test_a_batch_is_cut_from_the_inputs(make: Maker, root: str) -> None:
    stream = make(root)
    task, rows = stream.task(1), stream.order(1, 0)
    inputs, targets = task.batch(rows)
    assert torch.equal(inputs, task.inputs[rows])
    assert torch.equal(targets, task.targets[rows])
    whole, _ = task.batch(rows, epoch=1)
    for step in range(stream.steps_of(1)):  # augmentation does not depend on the batch that an example is in
        assert torch.equal(task.batch(rows[step], epoch=1)[0], whole[step])
    memory = torch.full((2, *inputs.shape), torch.nan)
    assert inputs.shape[2:] == stream.input_shape
    assert torch.equal(task.batch(rows, out=memory[0])[0], inputs)
    assert torch.equal(task.batch(rows, epoch=1, out=memory[1])[0], whole)
    assert torch.equal(memory, torch.stack([inputs, whole]))
    assert torch.equal(task.batch(torch.tensor([-1]))[0], task.inputs[-1:])


@pytest.mark.parametrize("make", TESTED.values(), ids=TESTED)
def test_nothing_leaks_from_test_to_train(make: Maker, root: str) -> None:
    tasks = list(make(root))
    trained = set.union(*(shown(task) for task in tasks))
    for task in tasks:
        assert task.test is not None
        assert len(task.test.targets) > 0
        assert not shown(task.test) & trained


@each
def test_data_are_held_once_and_tasks_are_views(make: Maker, root: str) -> None:
    tasks = list(make(root)) + list(make(root, seed=7))
    if len({task.data.data_ptr() for task in tasks}) > 1:
        assert isinstance(make(root), clagrange.tasks.SlowlyChangingRegression)  # each has fresh examples
        return
    for task in tasks:
        views = (task.targets, task.rows, task.pixels, task.classes)
        owned = sum(view.untyped_storage().nbytes() for view in views if view is not None)
        assert owned <= 16 * len(task.targets) + 8 * task.data[0].numel() + 8 * 12


class Batches(Dataset[str]):
    """Every batch of a stream by its position, as a hash."""

    def __init__(self, stream: TaskStream) -> None:
        self.stream = stream

    def __len__(self) -> int:
        return self.stream.total_steps

    def __getitem__(self, position: int) -> str:
        number, epoch, step = self.stream.locate(position)
        inputs, targets = self.stream.task(number).batch(self.stream.order(number, epoch)[step], epoch)
        return hashlib.sha256(inputs.numpy().tobytes() + targets.numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("name", ["permuted images", "incremental", "rotated at once", "slowly changing"])
def test_two_workers_see_what_none_sees(name: str, root: str) -> None:
    batches = Batches(STREAMS[name](root, seed=1))
    alone = [batches[position] for position in range(len(batches))]
    assert len(set(alone)) == len(alone)
    torch.manual_seed(5)
    assert list(DataLoader(batches, batch_size=None, num_workers=2)) == alone
    with pytest.raises(IndexError, match="position: expected a batch from 0 to"):
        batches[len(batches)]


@each
def test_copies_and_pickles_show_the_same(make: Maker, root: str) -> None:
    stream = make(root, seed=2)
    for again in (copy.deepcopy(stream), pickle.loads(pickle.dumps(stream))):
        assert same(again.task(2), stream.task(2))
    file = io.BytesIO()
    pickle.dump(stream.task(1), file)
    file.seek(0)
    assert same(pickle.load(file), stream.task(1))


@each
def test_as_datamodule(make: Maker, root: str) -> None:
    stream = make(root)
    data = stream.as_datamodule(mode="endless")
    batches = list(data.train_dataloader())
    assert len(batches) == len(data.train_dataloader()) == stream.total_steps
    assert [batch[2] for batch in batches] == [stream.locate(at)[0] for at in range(len(batches))]
    for position in (0, len(batches) // 2, len(batches) - 1):
        number, epoch, step = stream.locate(position)
        inputs, targets = stream.task(number).batch(stream.order(number, epoch)[step], epoch)
        assert torch.equal(batches[position][0], inputs)
        assert torch.equal(batches[position][1], targets)
    assert len(list(stream.as_datamodule().train_dataloader())) == stream.steps_of(0)
    last = stream.as_datamodule(mode="task")
    last.start(2)
    assert torch.equal(next(iter(last.train_dataloader()))[0], stream.task(2).batch(stream.order(2, 0)[0], 0)[0])
    outputs = torch.randn(8, stream.classes)
    expected = expected_loss(stream, outputs, batches[0][1])
    torch.testing.assert_close(data.loss(outputs, batches[0][1]), expected)


def expected_loss(stream: TaskStream, outputs: Tensor, targets: Tensor) -> Tensor:
    if stream.loss == "mse":
        return torch.nn.functional.mse_loss(outputs[:, 0], targets)
    classes = stream.task(0).classes
    if classes is None:
        return torch.nn.functional.cross_entropy(outputs, targets)
    places = torch.stack([(classes == target).nonzero()[0, 0] for target in targets])
    return torch.nn.functional.cross_entropy(outputs[:, classes], places)


@each
def test_as_benchmark(make: Maker, root: str) -> None:
    stream = make(root)
    scenario = stream.as_benchmark()
    assert len(scenario.train_stream) == len(scenario.test_stream) == 3
    for number in (0, 2):
        train, test = scenario.train_stream[number], scenario.test_stream[number]
        task = stream.task(number)
        inputs, targets, labels = zip(*train.dataset, strict=True)
        order = stream.order(number, 0).flatten()
        assert torch.equal(torch.stack(inputs), task.inputs[order])
        assert torch.equal(torch.as_tensor(targets), task.targets[order])
        assert set(labels) == {number if stream.multi_head else 0} == set(train.task_labels)
        held_out = task.test or task
        inputs, targets, _ = zip(*test.dataset, strict=True)
        assert torch.equal(torch.stack(inputs), held_out.inputs)
        assert torch.equal(torch.as_tensor(targets), held_out.targets)


def test_avalanche_trains_on_numbers(root: str) -> None:
    stream = STREAMS["slowly changing"](root)
    network = build({"kind": "mlp", "hidden": [5]}, stream.input_shape, 1)
    plain = copy.deepcopy(network)
    strategy = naive(network, criterion=LOSSES["mse"], train_mb_size=8)
    strategy.train(stream.as_benchmark().train_stream[0], shuffle=False)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05)
    for rows in stream.order(0, 0):
        inputs, targets = stream.task(0).batch(rows)
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(plain(inputs)[:, 0], targets).backward()
        optimizer.step()
    for ours, expected in zip(network.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, expected)


@each
def test_the_engine_runs_it_and_replicas_equal_runs_alone(make: Maker, root: str) -> None:
    def finished(*seeds: int) -> Run:
        streams = [make(root, seed=seed) for seed in seeds]
        run = Run(METHODS["sgd"](lr=0.01), streams, [6], dtype=torch.float64)
        while run.next_task < run.tasks:
            run.run_task()
        return run

    both, alone = finished(0, 5), finished(5)
    losses, accuracy = both.metrics["loss"], both.metrics["online_accuracy"]
    torch.testing.assert_close(losses[1], alone.metrics["loss"][0], rtol=1e-8, atol=0)
    assert both.result("s", "m").steps == both.streams[0].total_steps
    if both.streams[0].loss == "mse":
        assert all(value != value for value in accuracy.flat)
    else:
        assert ((accuracy >= 0) & (accuracy <= 1)).all()
        assert accuracy.any()


def test_presets_are_arguments_of_the_stream_and_networks_that_can_be_built(root: str) -> None:
    kinds = {type(make(root)) for make in STREAMS.values()} | {clagrange.tasks.PermutedMNIST}
    exported = {getattr(clagrange.tasks, name) for name in clagrange.tasks.__all__} - {
        clagrange.tasks.Preset,
        Task,
        TaskStream,
    }
    assert kinds == exported
    for kind in kinds:
        assert kind.PRESETS
        for preset in kind.PRESETS.values():
            unknown = set(preset.stream) - set(kind.__init__.__annotations__)
            assert not unknown, (kind, unknown)
            shape = (3, 32, 32) if preset.network["kind"] != "mlp" else (7,)
            outputs: Any = build(preset.network, shape, 4)(torch.zeros(2, *shape))
            assert outputs.shape == (2, 4)
            assert preset.source
            assert {"kind"} <= set(preset.optimizer)
