"""A study's curves as TensorBoard events."""

import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from clagrange.study.files import file_name, partial_prefix
from clagrange.study.reporting.statistics import band
from clagrange.study.results import MethodResult

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def write_events(directory: Path, results: Sequence[MethodResult]) -> None:
    """Write one TensorBoard run ``directory/stream/method`` for each result; an old folder is replaced.

    Each metric is a scalar of its name, the mean over seeds, with the task (from 0) as the step; for the online
    accuracy also ``online_accuracy_low`` and ``online_accuracy_high``, the 95 % bootstrap interval over seeds.
    Tasks where a seed has no finite number have no point. The folder is written beside its target and then
    renamed.
    """
    from torch.utils.tensorboard import SummaryWriter

    directory.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=partial_prefix(directory), dir=directory.parent))
    try:
        new = beside / "new"
        new.mkdir()
        for result in results:
            run = new / file_name(result.stream) / file_name(result.method)
            writer = SummaryWriter(str(run), max_queue=10_000)
            try:
                for tag, values in _curves(result.metrics).items():
                    for task, value in enumerate(values):
                        if math.isfinite(value):
                            writer.add_scalar(tag, value, task)
            finally:
                writer.close()
        if directory.exists():
            directory.rename(beside / "old")
        new.rename(directory)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


class LiveEvents:
    """The curves of runs that are under way, a task at a time; `write_events` replaces them in the end.

    Args:
        directory: as `write_events` takes it.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._writers: dict[tuple[str, str], SummaryWriter] = {}

    def add(self, stream: str, method: str, first: int, metrics: Mapping[str, np.ndarray]) -> int:
        """Add tasks of a run, (seeds, tasks) of each metric from task ``first`` on.

        Returns:
            Number of seeds whose loss was not finite so far.
        """
        run = (stream, method)
        if run not in self._writers:
            from torch.utils.tensorboard import SummaryWriter

            path = self._directory / file_name(stream) / file_name(method)
            if first == 0:
                shutil.rmtree(path, ignore_errors=True)
            self._writers[run] = SummaryWriter(str(path), flush_secs=10)
        for tag, values in _curves(metrics).items():
            for task, value in enumerate(values, first):
                if math.isfinite(value):
                    self._writers[run].add_scalar(tag, value, task)
        return int((~np.isfinite(metrics["loss"][:, -1])).sum())  # what has diverged has no loss from then on

    def close(self, stream: str, method: str) -> None:
        """A run has ended."""
        if (stream, method) in self._writers:
            self._writers.pop((stream, method)).close()

    def close_all(self) -> None:
        """All runs have ended."""
        for run in list(self._writers):
            self.close(*run)


def _curves(metrics: Mapping[str, np.ndarray]) -> dict[str, list[float]]:
    """Values per task for each tag."""
    curves = {}
    for name, values in metrics.items():
        finite = np.isfinite(values).all(0)
        curves[name] = np.where(finite, np.where(finite, values, 0.0).mean(0), np.nan).tolist()
    _, low, high = band(metrics["online_accuracy"])
    curves["online_accuracy_low"], curves["online_accuracy_high"] = low.tolist(), high.tolist()
    return curves
