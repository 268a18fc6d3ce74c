"""The abstract task stream, its tasks, and the presets of publications."""

import functools
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from clagrange._checks import check_choice

if TYPE_CHECKING:
    from avalanche.benchmarks import CLScenario

    from clagrange.callbacks import StreamDataModule

_COPIES = WeakTensorKeyDictionary()
"""Shared data by device: {tensor: {device: its copy there}}."""


@dataclass(frozen=True, eq=False)
class Task:
    """The examples of one task: a view of data that all tasks share.

    A task copies nothing of the data. It says which examples it shows and how, and makes them, as float, when
    they are asked for: all of them (`inputs`) or a batch.

    Args:
        data: shared examples (N, ...), float, or uint8 from 0 to 255 for inputs from 0 to 1.
        targets: of each example of the task, (examples,): class numbers as int64, or numbers as float.
        rows: which of the shared examples the task shows, (examples,); default: all.
        pixels: places of the values of a flattened example from which those of an input come, (values,).
        transform: what is done to inputs (n, ...), each by itself.
        augmentation: of inputs in training, from (inputs, their places in the task, epoch).
        classes: numbers of the outputs that take part in loss and accuracy; default: all.
        test: examples of the same task that are for evaluation only.

    Example:
        >>> images = torch.tensor([[0, 255], [51, 102]], dtype=torch.uint8)
        >>> task = Task(images, targets=torch.tensor([7]), rows=torch.tensor([1]))
        >>> task.inputs
        tensor([[0.2000, 0.4000]])
    """

    data: Tensor
    targets: Tensor
    rows: Tensor | None = None
    pixels: Tensor | None = None
    transform: Callable[[Tensor], Tensor] | None = None
    augmentation: Callable[[Tensor, Tensor, int], Tensor] | None = None
    classes: Tensor | None = None
    test: "Task | None" = None

    @functools.cached_property
    def inputs(self) -> Tensor:
        """All inputs (examples, ...) as float, without augmentation; made when first asked for, and kept."""
        return self.batch(torch.arange(len(self.targets)))[0]

    def batch(
        self, rows: Tensor, epoch: int | None = None, *, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Some examples of the task, on the device of the data.

        Args:
            rows: places in the task, whole numbers of any shape.
            epoch: whose augmentation to use; default: none, as in evaluation.
            out: contiguous memory of the inputs' shape, in which they take its type; default: new memory.

        Returns:
            Inputs (*rows.shape, ...) as float, targets (*rows.shape).
        """
        rows = rows.to(self.data.device)
        places = rows.flatten()
        chosen = places if self.rows is None else self.rows[places]
        augmentation = None if epoch is None else self.augmentation
        as_it_is = self.pixels is None and self.transform is None and augmentation is None
        if out is not None and as_it_is and out.dtype == self.data.dtype:
            torch.index_select(self.data, 0, chosen, out=out.view(len(places), *self.data.shape[1:]))
            return out, self.targets[rows]
        inputs = self.data[chosen]
        if self.pixels is not None:
            inputs = inputs.flatten(1)[:, self.pixels]
        if inputs.dtype == torch.uint8:
            inputs = inputs.float().div_(255.0)
        if self.transform is not None:
            inputs = self.transform(inputs)
        if augmentation is not None and epoch is not None:
            inputs = augmentation(inputs, places, epoch)
        inputs = inputs.reshape(*rows.shape, *inputs.shape[1:])
        return inputs if out is None else out.copy_(inputs), self.targets[rows]

    def to(self, device: torch.device | str) -> "Task":
        """The task on a device; the shared data are copied there once for all tasks."""
        device = torch.device(device)
        if device == self.data.device:
            return self
        copies = _COPIES.setdefault(self.data, {})
        if device not in copies:
            copies[device] = self.data.to(device)
        return replace(
            self,
            data=copies[device],
            targets=self.targets.to(device),
            rows=None if self.rows is None else self.rows.to(device),
            pixels=None if self.pixels is None else self.pixels.to(device),
            classes=None if self.classes is None else self.classes.to(device),
            test=None if self.test is None else self.test.to(device),
        )


@dataclass(frozen=True)
class Preset:
    """A protocol, as data: what a publication ran.

    Args:
        source: the publication; or what the preset is for.
        stream: arguments of the stream.
        network: settings of `clagrange.networks.build`.
        optimizer: the base optimizer: its name under "kind", and its settings; a tuple where the publication
            searched over several values, by the name of the optimizer where they differ.
        at_switch: what the publication does to network and optimizer when a task ends.
    """

    source: str
    stream: Mapping[str, Any]
    network: Mapping[str, Any]
    optimizer: Mapping[str, Any]
    at_switch: str = "nothing"

    @property
    def written(self) -> dict[str, Any]:
        """All of it as plain containers, for JSON and YAML."""
        return {
            "source": self.source,
            "stream": dict(self.stream),
            "network": dict(self.network),
            "optimizer": dict(self.optimizer),
            "at_switch": self.at_switch,
        }


def data_folder(root: str | None) -> Path:
    """The folder of the data: ``root``, else the environment variable CLAGRANGE_DATA, else ``data``."""
    return Path(root or os.environ.get("CLAGRANGE_DATA") or "data")


class TaskStream(ABC):
    """An ordered sequence of tasks, the same for every method that gets the same seed.

    Task n and the order of its batches depend on the seed and n alone, so that any task is reached without
    walking through those before it. Streams are immutable and cheap to copy: they hold the data once.

    Args:
        tasks: number of tasks.
        examples: examples of each task.
        batch_size: examples of a batch; a last incomplete batch is left out.
        epochs: how often each task is gone through.
        seed: of permutations, labels and order.

    Attributes:
        input_shape: shape of one example.
        classes: number of classes; of outputs, where targets are numbers.
        loss: "cross_entropy" for targets that are classes, "mse" for numbers.
        hidden_switches: whether no method is to be told when a task ends, because the change is gradual.
        equally_hard: whether a fresh network would do as well on any task, so that a change over the tasks is one
            of the network.
        multi_head: whether a network is told which task an example is of, in evaluation too.
        class_names: what the target numbers mean, where that is known.
        PRESETS: protocols of publications, by name.
    """

    input_shape: tuple[int, ...]
    classes: int
    loss: str = "cross_entropy"
    hidden_switches: bool = False
    equally_hard: bool = True
    multi_head: bool = False
    class_names: tuple[str, ...] | None = None
    PRESETS: ClassVar[Mapping[str, Preset]] = {}

    def __init__(self, tasks: int, examples: int, batch_size: int, epochs: int, seed: int) -> None:
        for name, value in (
            ("tasks", tasks),
            ("examples", examples),
            ("batch_size", batch_size),
            ("epochs", epochs),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a whole number of at least 1, got {value!r}")
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ValueError(f"seed: expected a whole number of at least 0, got {seed!r}")
        if batch_size > examples:
            raise ValueError(f"batch_size: expected at most the {examples} examples of a task, got {batch_size}")
        self.tasks = tasks
        self.examples = examples
        self.batch_size = batch_size
        self.epochs = epochs
        self.seed = seed

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Self:
        """The stream of a preset, with changed arguments.

        Raises:
            ValueError: if there is no such preset; those that there are, are named.
        """
        check_choice("preset", name, cls.PRESETS)
        return cls(**{**cls.PRESETS[name].stream, **changes})

    @abstractmethod
    def task(self, number: int) -> Task:
        """The examples of task ``number``, 0 to tasks − 1, in a fixed order."""

    def order(self, number: int, epoch: int) -> Tensor:
        """Which examples make the batches of an epoch of a task: indices (steps, batch_size)."""
        self._check(number)
        shuffled = self.random("order", number, epoch).permutation(self.examples_of(number))
        return self._batches(torch.from_numpy(shuffled))

    def _batches(self, order: Tensor) -> Tensor:
        """An order of examples cut into whole batches."""
        steps = len(order) // self.batch_size
        return order[: steps * self.batch_size].view(steps, self.batch_size)

    def examples_of(self, number: int) -> int:
        """Number of examples of a task, where tasks grow not the same for all."""
        return self.examples

    def steps_of(self, number: int) -> int:
        """Number of batches in an epoch of a task."""
        return self.examples_of(number) // self.batch_size

    @property
    def steps(self) -> int:
        """Number of batches in an epoch of the first task, and of each where they do not grow."""
        return self.steps_of(0)

    def first_step(self, number: int) -> int:
        """Number of batches in all tasks before this one."""
        return self.epochs * sum(self.steps_of(earlier) for earlier in range(number))

    @property
    def total_steps(self) -> int:
        """Number of batches in all tasks."""
        return self.first_step(self.tasks)

    def locate(self, position: int) -> tuple[int, int, int]:
        """Task, epoch and step of the batch at a position in the stream, counted from 0.

        Raises:
            IndexError: if the stream ends before it.

        Example:
            >>> from clagrange.tasks import PermutedDigits
            >>> PermutedDigits(tasks=3, examples=40, batch_size=4, epochs=2).locate(33)
            (1, 1, 3)
        """
        left = position
        for number in range(self.tasks):
            steps = self.steps_of(number)
            if 0 <= left < steps * self.epochs:
                return number, *divmod(left, steps)
            left -= steps * self.epochs
        raise IndexError(f"position: expected a batch from 0 to {self.total_steps - 1}, got {position}")

    def __len__(self) -> int:
        return self.tasks

    def __iter__(self) -> Iterator[Task]:
        return (self.task(number) for number in range(self.tasks))

    def random(self, purpose: str, *key: int) -> np.random.Generator:
        """A random stream that depends on the seed, a purpose and numbers such as the task's."""
        words = [self.seed, *purpose.encode(), *key]
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence(words)))

    def as_benchmark(self) -> "CLScenario":
        """An Avalanche benchmark with one experience per task, in the order of the first epoch.

        Loop with ``shuffle=False`` and ``train_mb_size=stream.batch_size`` to get the stream's own batches.
        """
        from clagrange.strategies.benchmark import benchmark

        return benchmark(self)

    def as_datamodule(self, **settings: Any) -> "StreamDataModule":
        """A Lightning data module; see `clagrange.callbacks.StreamDataModule` for the settings."""
        from clagrange.callbacks import StreamDataModule

        return StreamDataModule(self, **settings)

    def _check(self, number: int) -> None:
        if not 0 <= number < self.tasks:
            raise IndexError(f"number: expected a task from 0 to {self.tasks - 1}, got {number}")
