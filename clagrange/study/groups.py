"""Replicas of large networks in several batched runs, as many in each as are fastest together."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from clagrange.networks import build
from clagrange.study.engine import Resumable, Run
from clagrange.study.methods import Method
from clagrange.study.results import MethodResult
from clagrange.study.side_by_side import of_replicas
from clagrange.tasks import TaskStream

TOGETHER_BYTES = 32 << 20
"""Bytes of the weights of all replicas up to which they run together without a trial.

So far more replicas in a group were never slower on a CPU: small operations are shared out over more work, and
the rest takes as long. Beyond it the tensors of a step can exceed what the C library keeps when they are freed,
and fetching fresh memory for every step took longer than training (three hidden layers of 2,000 units at batch
1, eight together: 25 ms for a step of one network, of which 10 in the system; four or fewer: 16 ms); and a GPU
can run out of memory.
"""

TRIED_STEPS = 16
"""Training steps of a trial: at batch 1 as many as wide weights are kept waiting for, see `PerceptronSGD`."""

WORTH = 0.9
"""A smaller group is taken if it needs at most this share of the time."""


def start(
    method: Method, streams: Sequence[TaskStream], network: Mapping[str, Any], **settings: Any
) -> "Run | Groups":
    """A run of all replicas together, or in groups where the networks are large.

    Args:
        method: the method; its numbers may be tensors of shape (R,).
        streams: one for each replica.
        network: settings of `clagrange.networks.build`.
        settings: further ones of `Run`.
    """
    one = build(network, streams[0].input_shape, streams[0].classes)
    size = sum(parameter.nbytes for parameter in one.parameters())
    if len(streams) == 1 or len(streams) * size <= TOGETHER_BYTES:
        return Run(method, streams, network, **settings)
    return Groups(method, streams, network, **settings)


def group_size(start_run: Callable[[int], Run], replicas: int) -> int:
    """The number of replicas that are best trained together, by trials of a few steps.

    All are tried, half as many, half of these, down to one. Fewer are taken if they need at most 90 % of the time
    for a step of one network that the best so far needs, or where a GPU's memory is too short for more.

    Args:
        start_run: makes a run of so many replicas, which is thrown away.
        replicas: the number of all.
    """
    best, least, size = 1, math.inf, replicas
    while True:
        try:
            seconds = start_run(size).try_steps(TRIED_STEPS) / size
        except torch.OutOfMemoryError:
            seconds = math.inf
        if seconds <= WORTH * least:
            best, least = size, seconds
        if size == 1:
            return best
        size = math.ceil(size / 2)


class Groups(Resumable):
    """A method on a stream like `Run`, its replicas in groups that take each task one after the other.

    Every replica's numbers are those of a run alone, up to rounding. The size of the groups is found by a trial
    before the first task, and is part of the checkpoint: what goes on from there has the same groups, and so the
    same numbers to the last bit.

    Args:
        method: the method; its numbers may be tensors of shape (R,).
        streams: one for each replica, of one shape.
        network: settings of `clagrange.networks.build`.
        settings: further ones of `Run`.
    """

    def __init__(
        self, method: Method, streams: Sequence[TaskStream], network: Mapping[str, Any], **settings: Any
    ) -> None:
        self.streams = list(streams)
        self.device = torch.device(settings.get("device", "cpu"))
        self._method, self._network, self._settings = method, network, settings
        self.runs: list[Run] = []

    def _start(self, first: int, size: int) -> Run:
        """A run of so many replicas from the first on, or as many as there are."""
        replicas = slice(first, first + size)
        return Run(of_replicas(self._method, replicas), self.streams[replicas], self._network, **self._settings)

    def _split(self, size: int) -> None:
        """Make the runs of groups of a size; the last may be smaller."""
        self.runs = [self._start(first, size) for first in range(0, len(self.streams), size)]

    @property
    def size(self) -> int | None:
        """Replicas in a group; None before the first task."""
        return len(self.runs[0].streams) if self.runs else None

    def run_task(self, on_step: Callable[[], None] | None = None) -> None:
        """Train every group on the next task; ``on_step`` is called when a step of all has been made."""
        if not self.runs:
            self._split(group_size(lambda size: self._start(0, size), len(self.streams)))
        made = 0

        def count() -> None:
            nonlocal made
            made += 1
            if on_step is not None and made % len(self.runs) == 0:
                on_step()

        for run in self.runs:
            run.run_task(count)

    @property
    def tasks(self) -> int:
        """Number of tasks."""
        return self.streams[0].tasks

    @property
    def next_task(self) -> int:
        """Number of tasks that are done."""
        return self.runs[0].next_task if self.runs else 0

    @property
    def steps_done(self) -> int:
        """Optimizer steps of one network over the tasks that are done."""
        return self.streams[0].first_step(self.next_task)

    @property
    def seconds(self) -> float:
        """Seconds of training so far, evaluation left out."""
        return sum(run.seconds for run in self.runs)

    @property
    def metrics(self) -> dict[str, np.ndarray]:
        """By name, (R, tasks)."""
        return _joined([run.metrics for run in self.runs])

    def state(self, key: str) -> dict[str, Any]:
        """All that a checkpoint between two tasks holds; ``key`` says which settings it belongs to."""
        groups = [run.state(key) for run in self.runs]
        return {"key": key, "next_task": self.next_task, "size": self.size, "groups": groups}

    def load_state(self, checkpoint: Mapping[str, Any]) -> None:
        """Go on from what `state` gave, in groups of the same size."""
        self._split(checkpoint["size"])
        for run, state in zip(self.runs, checkpoint["groups"], strict=True):
            run.load_state(state)

    def result(self, stream: str, method: str, origin: dict[str, Any] | None = None) -> MethodResult:
        """The results so far, with what they follow from."""
        parts = [run.result(stream, method, origin) for run in self.runs]
        matrices = [part.matrix for part in parts if part.matrix is not None]
        return dataclasses.replace(
            parts[0],
            seeds=tuple(seed for part in parts for seed in part.seeds),
            metrics=_joined([part.metrics for part in parts]),
            diverged=tuple(flag for part in parts for flag in part.diverged),
            seconds=self.seconds,
            matrix=np.concatenate(matrices) if matrices else None,
            elapsed=np.sum([part.elapsed for part in parts if part.elapsed is not None], axis=0),
        )


def _joined(metrics: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Metrics of all groups, the replicas of one after those of the other."""
    return {name: np.concatenate([part[name] for part in metrics]) for name in metrics[0]}
