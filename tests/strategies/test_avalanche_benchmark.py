"""A task stream as an Avalanche benchmark."""

from typing import Any

import pytest
import torch
from avalanche.core import SupervisedPlugin
from avalanche_runs import naive, small_benchmark

import clagrange as cl


class Batches(SupervisedPlugin):  # type: ignore[misc]
    """Keeps what the network was fed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def before_forward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        self.seen.append((strategy.mb_x.clone(), strategy.mb_y.clone(), strategy.mb_task_id.clone()))


def test_an_unshuffled_loop_sees_the_batches_of_the_stream() -> None:
    stream = cl.tasks.PermutedDigits(tasks=3, examples=100, batch_size=16, seed=3)  # 4 examples are left over
    batches = Batches()
    strategy = naive(cl.networks.mlp(64, [8], 10), plugins=[batches])
    strategy.train(stream.as_benchmark().train_stream, shuffle=False)
    expected = [
        (stream.task(number).inputs[batch], stream.task(number).targets[batch])
        for number in range(3)
        for batch in stream.order(number, 0)
    ]
    assert len(batches.seen) == len(expected) == 18
    for (inputs, targets, labels), (stream_inputs, stream_targets) in zip(batches.seen, expected, strict=True):
        assert torch.equal(inputs, stream_inputs)
        assert torch.equal(targets, stream_targets)
        assert not labels.any()


def test_the_test_stream_has_every_task_in_its_fixed_order() -> None:
    stream = cl.tasks.PermutedDigits(tasks=2, examples=100, batch_size=16, seed=3)
    for number, experience in enumerate(stream.as_benchmark().test_stream):
        inputs, targets, labels = zip(*experience.dataset, strict=True)
        task = stream.task(number)
        assert torch.equal(torch.stack(inputs), task.inputs)
        assert list(targets) == task.targets.tolist() == list(experience.dataset.targets)
        assert set(labels) == {0}


def test_streams_are_sequences() -> None:
    scenario = small_benchmark()
    train = scenario.train_stream
    assert len(train) == 3
    assert [experience.current_experience for experience in train] == [0, 1, 2]
    assert [experience.current_experience for experience in train[1:]] == [1, 2]
    assert train[-1].current_experience == 2
    assert train[1].origin_stream is train
    assert train.benchmark is scenario
    assert train[0].classes_in_this_experience == list(range(10))
    with pytest.raises(IndexError):
        train[3]


def test_tasks_are_made_when_asked_for_and_not_kept() -> None:
    made: list[int] = []

    class Counted(cl.tasks.PermutedDigits):
        def task(self, number: int) -> cl.tasks.Task:
            made.append(number)
            return super().task(number)

    scenario = Counted(tasks=1000, examples=32, batch_size=16).as_benchmark()
    experiences = list(scenario.train_stream)
    assert len(experiences) == 1000
    assert made == []
    strategy = naive(cl.networks.mlp(64, [8], 10))
    for experience in experiences[:5]:
        strategy.train(experience)
    assert made == [0, 1, 2, 3, 4]
    assert scenario.train_stream.dataset.cache_info().currsize <= 2
