"""Pictures of streams: samples of the first tasks, with what they are to be learnt as."""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from clagrange.study.files import replacing
from clagrange.tasks import Task, TaskStream

_INK = "#333333"
_DOTS_PER_INCH = 150
_LONGEST_NAME = 14
"""Letters of a class name that fit above a sample."""


def write_samples(path: Path, stream: TaskStream, *, title: str, tasks: int = 5, samples: int = 10) -> None:
    """Write `sample_figure` as a PNG."""
    figure = sample_figure(stream, title=title, tasks=tasks, samples=samples)
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=_DOTS_PER_INCH, facecolor="white")


def sample_figure(stream: TaskStream, *, title: str, tasks: int = 5, samples: int = 10) -> Any:
    """The first examples of the first tasks in the order of training, one row for each task.

    Above each sample stands its target: the name of the class where the stream knows it, else the number.
    Examples that are no images are drawn as columns of values, one picture for each task.

    Args:
        stream: what to draw.
        title: above the picture.
        tasks: number of tasks; fewer where the stream has no more.
        samples: number of examples of each.

    Returns:
        A `matplotlib.figure.Figure`.
    """
    numbers = range(min(tasks, stream.tasks))
    shown = [_first(stream, number, samples) for number in numbers]
    images = [image_of(inputs) for inputs, _ in shown]
    labels = [[_label(stream, target) for target in targets] for _, targets in shown]
    if any(image is None for image in images):
        figure = _columns(stream, [inputs for inputs, _ in shown], labels)
    else:
        figure = _grid([image for image in images if image is not None], labels)
    width = int(11 * figure.get_figwidth())  # letters that fit
    figure.suptitle(textwrap.fill(title, width), fontsize=10, fontweight="bold", color=_INK, x=0.01, ha="left")
    return figure


def _first(stream: TaskStream, number: int, samples: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets of the first examples that are trained on, with the augmentation of the first epoch."""
    order = stream.order(number, 0).flatten()[:samples]
    task: Task = stream.task(number)
    inputs, targets = task.batch(order, epoch=0)
    return inputs.float(), targets


def image_of(inputs: Tensor) -> np.ndarray | None:
    """Inputs (n, ...) as pictures (n, height, width) or (n, height, width, 3) from 0 to 1; None if they are none.

    Flat inputs are pictures where they fill a square, of one colour or of three.

    Example:
        >>> image_of(torch.zeros(2, 64)).shape, image_of(torch.zeros(2, 3, 8, 8)).shape
        ((2, 8, 8), (2, 8, 8, 3))
    """
    if inputs.dim() == 2:
        for channels in (1, 3):
            side = math.isqrt(inputs.shape[1] // channels)
            if channels * side**2 == inputs.shape[1] and side >= 4:
                inputs = inputs.reshape(-1, channels, side, side)
                break
    if inputs.dim() != 4 or inputs.shape[1] not in (1, 3):
        return None
    low, high = inputs.min(), inputs.max()
    if low < 0 or high > 1:  # standardised
        inputs = (inputs - low) / (high - low)
    pictures: np.ndarray = inputs.permute(0, 2, 3, 1).cpu().numpy()
    return pictures[..., 0] if pictures.shape[-1] == 1 else pictures


def _label(stream: TaskStream, target: Tensor) -> str:
    if target.is_floating_point():
        return f"{float(target):.2g}"
    if stream.class_names is None:
        return str(int(target))
    name = stream.class_names[int(target)].partition(",")[0]
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"


def _grid(images: Sequence[np.ndarray], labels: Sequence[Sequence[str]]) -> Any:
    """One small picture for each sample."""
    from matplotlib.figure import Figure

    columns = max(len(row) for row in labels)
    figure = Figure(figsize=(0.9 + 1.05 * columns, 0.5 + 1.25 * len(images)), layout="constrained")
    panels = figure.subplots(len(images), columns, squeeze=False)
    size = 9 if max(len(label) for row in labels for label in row) <= 8 else 6.5
    for number, (row, pictures, names) in enumerate(zip(panels, images, labels, strict=True)):
        for panel in row:
            panel.set_xticks([])
            panel.set_yticks([])
            panel.spines[:].set_color("#cccccc")
        for panel, picture, name in zip(row, pictures, names, strict=False):
            panel.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            panel.set_title(name, fontsize=size, color=_INK, pad=3)
        row[0].set_ylabel(f"task {number}", fontsize=10, color=_INK)
    return figure


def _columns(stream: TaskStream, inputs: Sequence[Tensor], labels: Sequence[Sequence[str]]) -> Any:
    """One picture for each task: a column for each sample, a row for each value."""
    from matplotlib.figure import Figure

    values = [task.flatten(1).T.cpu().numpy() for task in inputs]
    names: Sequence[str] = getattr(stream, "columns", ())
    height = max(1.5, (0.16 if names else 0.08) * len(values[0]))
    figure = Figure(figsize=(10, 0.9 + (height + 0.6) * len(values)), layout="constrained")
    largest = max(float(np.abs(task).max()) for task in values)
    colours = {"cmap": "Greys", "vmin": 0} if min(task.min() for task in values) >= 0 else {"cmap": "RdBu_r"}
    for number, (panel, task, row) in enumerate(
        zip(figure.subplots(len(values), 1, squeeze=False)[:, 0], values, labels, strict=True)
    ):
        picture = panel.imshow(
            task, aspect="auto", interpolation="nearest", **{"vmin": -largest, "vmax": largest, **colours}
        )
        panel.set_title(f"task {number}", loc="left", fontsize=10, color=_INK)
        panel.set_xticks(range(len(row)), row, fontsize=8)
        panel.set_yticks(range(len(names)), names, fontsize=7)
        panel.set_xlabel("target of each sample", fontsize=8.5, color=_INK)
        if not names:
            panel.set_ylabel("input", fontsize=8.5, color=_INK)
        figure.colorbar(picture, ax=panel, pad=0.01)
    return figure
