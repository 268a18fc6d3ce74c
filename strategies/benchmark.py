"""A task stream as an Avalanche benchmark."""

import functools
from typing import Any

from avalanche.benchmarks import CLScenario, DatasetExperience
from avalanche.benchmarks.scenarios.generic_scenario import SequenceCLStream
from avalanche.benchmarks.utils import (
    ConstantSequence,
    DataAttribute,
    TaskAwareSupervisedClassificationDataset,
    TaskLabels,
)
from torch import Tensor
from torch.utils.data import Dataset

from clagrange.tasks import TaskStream


def benchmark(stream: TaskStream) -> CLScenario:
    """An Avalanche benchmark with one experience for each task.

    ``train_stream`` has the examples in the order of the stream's first epoch: loop with ``shuffle=False`` and
    ``train_mb_size=stream.batch_size`` to get the stream's own batches. ``test_stream`` has the test examples of
    the task, or, where there are none, all its examples in their fixed order. Both are sequences (length, index,
    slice), and hold no data: a task is made when its dataset is asked for, and only the last two are kept.

    Task labels are all 0, or the task's number where the stream tells it (`TaskStream.multi_head`). Targets are
    class numbers, or float32 tensors where the stream's loss is "mse", which wants
    ``criterion=clagrange.networks.LOSSES[stream.loss]``. Images are shown without augmentation. Experiences carry
    ``hidden_switches`` of the stream: where it is true, `InterventionPlugin` announces none.

    Example:
        >>> scenario = benchmark(clagrange.tasks.PermutedDigits(tasks=3))
        >>> len(scenario.train_stream), scenario.test_stream[1].task_labels
        (3, [0])
    """
    scenario = CLScenario(
        [_TaskSequence("train", stream, ordered=True), _TaskSequence("test", stream, ordered=False)]
    )
    for sequence in scenario.streams.values():
        sequence.benchmark = scenario
    return scenario


class _TaskSequence(SequenceCLStream):  # type: ignore[misc]
    """The experiences of a task stream, made when they are asked for."""

    def __init__(self, name: str, stream: TaskStream, ordered: bool) -> None:
        super().__init__(name, benchmark=None, set_stream_info=False)
        self._stream = stream
        self._ordered = ordered
        self.dataset = functools.lru_cache(maxsize=2)(self._make_dataset)

    def _full_length(self) -> int:
        return len(self._stream)

    def _make_experience(self, experience_idx: int) -> "_TaskExperience":
        return _TaskExperience(range(len(self._stream))[experience_idx], self)

    @property
    def hidden_switches(self) -> bool:
        """Whether no method is to be told when a task ends."""
        return self._stream.hidden_switches

    def label(self, number: int) -> int:
        """The task label of an experience."""
        return number if self._stream.multi_head else 0

    def _make_dataset(self, number: int) -> TaskAwareSupervisedClassificationDataset:
        task = self._stream.task(number)
        if self._ordered:
            inputs, targets = task.batch(self._stream.order(number, 0).flatten())
        else:
            shown = task.test or task
            inputs, targets = shown.inputs, shown.targets
        return TaskAwareSupervisedClassificationDataset(
            [_Examples(inputs, targets)],
            data_attributes=[
                DataAttribute(targets.tolist(), "targets"),
                TaskLabels(ConstantSequence(self.label(number), len(targets))),
            ],
        )


class _TaskExperience(DatasetExperience):  # type: ignore[misc]
    """One task; its dataset is made when it is asked for."""

    def __init__(self, number: int, sequence: _TaskSequence) -> None:
        super().__init__(dataset=None, current_experience=number)
        self._number = number
        self.origin_stream = sequence
        self.task_label = sequence.label(number)
        self.task_labels = [self.task_label]
        self.hidden_switches = sequence.hidden_switches

    @property
    def dataset(self) -> Any:
        """The examples."""
        return self._origin_stream.dataset(self._number)

    @property
    def classes_in_this_experience(self) -> list[int]:
        """The labels that occur; a list, because Avalanche's heads index with it."""
        return sorted(self.dataset.targets.uniques)


class _Examples(Dataset[tuple[Tensor, int | Tensor]]):
    """Pairs of inputs and target; classes are whole numbers, as Avalanche expects."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self._inputs = inputs
        self._targets = targets

    def __len__(self) -> int:
        return len(self._targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int | Tensor]:
        target = self._targets[index]
        return self._inputs[index], target if target.is_floating_point() else int(target)
