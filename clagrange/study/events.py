"""A study's curves as TensorBoard events."""

import math
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from clagrange.study.files import PARTIAL, file_name
from clagrange.study.results import MethodResult
from clagrange.study.statistics import band


def write_events(directory: Path, results: Sequence[MethodResult]) -> None:
    """Write one TensorBoard run ``directory/stream/method`` for each result; an old folder is replaced.

    Each metric is a scalar of its name, the mean over seeds, with the task (from 0) as the step; for the online
    accuracy also ``online_accuracy_low`` and ``online_accuracy_high``, the 95 % bootstrap interval over seeds.
    Tasks where a seed has no finite number have no point. The folder is written beside its target and then
    renamed.
    """
    from torch.utils.tensorboard import SummaryWriter

    directory.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{directory.name}.{PARTIAL}", dir=directory.parent))
    try:
        new = beside / "new"
        new.mkdir()
        for result in results:
            run = new / file_name(result.stream) / file_name(result.method)
            writer = SummaryWriter(str(run), max_queue=10_000)
            try:
                for tag, values in _curves(result).items():
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


def _curves(result: MethodResult) -> dict[str, list[float]]:
    """Values per task for each tag."""
    curves = {}
    for name, values in result.metrics.items():
        mean, low, high = band(values)
        curves[name] = mean.tolist()
        if name == "online_accuracy":
            curves[f"{name}_low"], curves[f"{name}_high"] = low.tolist(), high.tolist()
    return curves
