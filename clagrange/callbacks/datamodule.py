"""The Lightning data module over a task stream."""

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from clagrange._checks import check_choice
from clagrange.networks import LOSSES
from clagrange.tasks import TaskStream

MODES = ("task", "reload", "endless")

Batch = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, int]


class StreamDataModule(pl.LightningDataModule):
    """The tasks of a stream, in its own order of batches, for Lightning.

    The three ways to run a stream:

    - "task": a Trainer per task. `start` chooses the task; an epoch is an epoch of the task.

          for number in range(stream.tasks):
              data.start(number)
              pl.Trainer(max_epochs=stream.epochs, callbacks=callbacks).fit(model, data)

      One Trainer can fit several tasks too, if its ``fit_loop.max_epochs`` is raised for each.
    - "reload": one Trainer, whose epochs are the epochs of the first task, then of the second, and so on.
      Training ends with the stream. ``reload_dataloaders_every_n_epochs`` may be set and is not needed.
    - "endless": one Trainer with one epoch that goes through all tasks; batches carry the number of the task.

    Where the stream stands is what Lightning counts as trained batches, so that training from a checkpoint goes
    on with the right batch, wherever it was stopped. Batches are (inputs, targets), in "endless" mode
    (inputs, targets, task); they are cut from tensors that are in memory, which needs no worker processes. With
    several processes each takes its share of every batch.

    Args:
        stream: the tasks.
        mode: "task", "reload" or "endless".

    Raises:
        ValueError: for an unknown mode; in training, if batches cannot be shared out evenly.

    Example:
        >>> from clagrange.tasks import PermutedDigits
        >>> data = StreamDataModule(PermutedDigits(tasks=3))
        >>> inputs, targets = next(iter(data.train_dataloader()))
        >>> inputs.shape
        torch.Size([4, 64])
    """

    def __init__(self, stream: TaskStream, mode: str = "reload") -> None:
        super().__init__()
        check_choice("mode", mode, MODES)
        self.stream = stream
        self.mode = mode
        self._task = 0
        self._chosen = True
        self._batches_before = 0

    @property
    def current_task(self) -> int:
        """The task of the batch that is trained on, or of the next one."""
        if self.mode == "task":
            return self._task
        return self.stream.locate(min(self.trained_batches, self.stream.total_steps - 1))[0]

    @property
    def hidden_switches(self) -> bool:
        """Whether no method is to be told when a task ends: then `InterventionCallback` announces no switch."""
        return self.stream.hidden_switches

    @property
    def trained_batches(self) -> int:
        """How many batches the Trainer has finished, in all its epochs and fits."""
        if self.trainer is None:
            return 0
        return self.trainer.fit_loop.epoch_loop.batch_progress.total.completed

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The stream's loss of a batch of the current task, mean over its examples.

        Outputs of classes that take no part in the task are left out.
        """
        classes = self.stream.task(self.current_task).classes
        if classes is not None:
            part = torch.zeros(outputs.shape[-1], dtype=torch.bool, device=outputs.device)
            part[classes.to(outputs.device)] = True
            outputs = outputs.masked_fill(~part, -torch.inf)
        return LOSSES[self.stream.loss](outputs, targets)

    def start(self, number: int) -> None:
        """Choose the task for the next `fit`, in "task" mode.

        Raises:
            RuntimeError: in another mode.
            IndexError: if there is no such task.
        """
        if self.mode != "task":
            raise RuntimeError(f"start: expected a data module with mode='task', got mode={self.mode!r}")
        if not 0 <= number < self.stream.tasks:
            raise IndexError(f"number: expected a task from 0 to {self.stream.tasks - 1}, got {number}")
        self._task = number
        self._chosen = True

    def setup(self, stage: str) -> None:
        """Note how many batches the Trainer had finished before a task that was just chosen."""
        if stage == "fit" and (self._chosen or self.trained_batches < self._batches_before):
            self._chosen = False
            self._batches_before = self.trained_batches

    def train_dataloader(self) -> "StreamLoader":
        """The batches from where the stream stands."""
        return StreamLoader(self)

    def state_dict(self) -> dict[str, Any]:
        """Mode, task, and batches before it; the position is in Lightning's own counters."""
        return {"mode": self.mode, "task": self._task, "batches_before": self._batches_before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            ValueError: if it was saved in another mode.
        """
        if state_dict["mode"] != self.mode:
            raise ValueError(
                f"mode: expected {state_dict['mode']!r}, with which the checkpoint was saved, got {self.mode!r}"
            )
        self._task = state_dict["task"]
        self._batches_before = state_dict.get("batches_before", 0)  # checkpoints of a Trainer per task have none


class StreamLoader:
    """The batches of one Lightning epoch of a `StreamDataModule`.

    The position is looked up when the first batch is asked for: Lightning makes iterators early, and some that
    it never uses.
    """

    def __init__(self, data: StreamDataModule) -> None:
        self.data = data

    def __len__(self) -> int:
        stream = self.data.stream
        return stream.total_steps if self.data.mode == "endless" else stream.steps_of(self.data.current_task)

    def __iter__(self) -> Iterator[Batch]:
        data, stream = self.data, self.data.stream
        first, end = data.trained_batches, stream.total_steps
        if data.mode == "task":
            before, end = stream.first_step(data._task), stream.first_step(data._task + 1)
            first = before + (first - data._batches_before) % (end - before)
        if first >= end:
            self._end_training()
            return
        number, _, step = stream.locate(first)
        last = end if data.mode == "endless" else first - step + stream.steps_of(number)
        share = self._share()
        position = first
        while position < last:
            number, epoch, step = stream.locate(position)
            task = stream.task(number)
            for chosen in stream.order(number, epoch)[step : step + last - position]:
                batch = task.batch(chosen[share], epoch)
                position += 1
                if position == end:
                    self._end_training()
                yield (*batch, number) if data.mode == "endless" else batch

    def _share(self) -> slice:
        trainer = self.data.trainer
        rank, processes = (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
        if self.data.stream.batch_size % processes:
            raise ValueError(
                f"batch_size: expected a multiple of the {processes} processes, got {self.data.stream.batch_size}"
            )
        return slice(rank, None, processes)

    def _end_training(self) -> None:
        if self.data.trainer is not None and self.data.mode != "task":
            self.data.trainer.should_stop = True

    # Lightning takes a loader with these for one that can resume: ours asks Lightning where it stands.
    def state_dict(self) -> dict[str, Any]:
        """Nothing: the position is in Lightning's own counters."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to do."""
