"""The pictures of a study: curves over its tasks, together and of each stream, and how the methods compare."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from clagrange.study.files import file_name, replacing
from clagrange.study.reporting.document import PICTURE_DOTS_PER_INCH
from clagrange.study.reporting.statistics import Array, band
from clagrange.study.results import MethodResult

# Tol's "muted" palette, which colour-blind readers can tell apart, its palest darkened for lines, and black.
_COLOURS = (
    "#CC6677",
    "#332288",
    "#C4A93A",
    "#117733",
    "#79BFE6",
    "#882255",
    "#44AA99",
    "#8A8A2B",
    "#AA4499",
    "#000000",
)
# Methods after the tenth get the colours again, with a marker.
_MARKERS = ("", "o", "s")
INK = "#333333"
_PANELS = {
    "dead_units": "dead units (fraction)",
    "dormant_units": "dormant units (fraction)",
    "effective_rank": "effective rank of features",
    "weight_magnitude": "mean |weight|",
    "mean_variance": "mean variance / prior's",
}
_OF_STREAM = ("dormant_units", "effective_rank")
PICTURES = ("accuracy.png", "plasticity.png", "profile.png", "improvement.png", "cost.png")
"""Files of the pictures of all streams."""
MEASURES = {"online_accuracy": ("online accuracy %", 100.0), "loss": ("online loss", 1.0)}
# Spans of more than this factor are shown on a logarithmic axis.
_LOGARITHMIC_SPAN = 50.0
# The height of a label at the end of a line, as a part of that of a panel of the usual height.
LABEL = 0.062
# Lines that crowd the others into less than one part of so many are cut off.
_CROWDED = 3.0


def write_plots(directory: Path, results: Sequence[MethodResult]) -> list[Path]:
    """Write the pictures of a study into its folder, and remove earlier ones that are not written again.

    ``accuracy.png``, ``plasticity.png``, ``profile.png``, ``improvement.png``, ``cost.png``, and
    ``streams/STREAM.png`` of every stream.

    Returns:
        The paths, none without results.

    Example:
        >>> write_plots(Path("no such folder"), [])
        []
    """
    figures = _figures(results) if results else {}
    for name, figure in figures.items():
        write_figure(directory / name, figure)
    written = [directory / name for name in figures]
    for earlier in {directory / name for name in PICTURES} | set((directory / "streams").glob("*.png")):
        if earlier not in written:
            earlier.unlink(missing_ok=True)
    return written


def _figures(results: Sequence[MethodResult]) -> dict[str, Any]:
    """The pictures by the names of their files."""
    from clagrange.study.reporting.comparison_plots import cost_figure, improvement_figure, profile_figure

    makers = (accuracy_figure, plasticity_figure, profile_figure, improvement_figure, cost_figure)
    figures = {name: make(results) for name, make in zip(PICTURES, makers, strict=True)}
    for stream, of_stream in by_stream(results).items():
        figures[f"streams/{file_name(stream)}.png"] = stream_figure(of_stream)
    return figures


def write_figure(path: Path, figure: Any) -> None:
    """Write a matplotlib figure as PNG, whole or not at all."""
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=PICTURE_DOTS_PER_INCH, facecolor="white")


def accuracy_figure(results: Sequence[MethodResult]) -> Any:
    """Online accuracy (or loss) per task, one panel for each stream, methods labelled at the end of their lines.

    Lines are the mean over seeds of a running mean over ⌈tasks/20⌉ tasks; bands are the 95 % bootstrap interval
    over seeds; dashed methods are told of switches.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ValueError: if there are no results.
    """
    from matplotlib.figure import Figure

    streams, styles = by_stream(results), method_styles(results)
    heights = [max(1.0, len(of_stream) * LABEL) for of_stream in streams.values()]
    figure = Figure(figsize=(10, 0.7 + 4.3 * sum(heights)), layout="constrained")
    panels = figure.subplots(len(streams), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, height, (stream, of_stream) in zip(panels, heights, streams.items(), strict=True):
        window = smoothing_window(max(result.tasks for result in of_stream))
        label, scale = MEASURES[of_stream[0].measure]
        ends = [
            (_draw(panel, result, result.measure, styles[result.method], window, scale=scale), result.method)
            for result in of_stream
        ]
        _decorate(panel, stream, of_stream)
        _fit_to_lines(panel)
        panel.set_ylabel(f"{label}\n({_smoothed(window)})", fontsize=11, color=INK)
        panel.set_xlabel("task", fontsize=11, color=INK)
        label_ends(panel, ends, styles, gap=LABEL / height)
    figure.supxlabel(f"Beside each line its last value. {_explanation(results)}", fontsize=9.5, color=INK)
    return figure


def plasticity_figure(results: Sequence[MethodResult]) -> Any:
    """Dead and dormant units, effective rank, weight magnitude and variance per task, one row for each stream.

    Drawn as `accuracy_figure` draws; the axis of a quantity that spans a factor of more than 50 is logarithmic.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ValueError: if there are no results.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    streams, styles = by_stream(results), method_styles(results)
    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08)
    figure = Figure(figsize=(15, 1.5 + 3.1 * len(streams)), layout=layout)
    grid = figure.subplots(len(streams), len(_PANELS), squeeze=False)
    windows = []
    for row, (stream, of_stream) in zip(grid, streams.items(), strict=True):
        windows.append(smoothing_window(max(result.tasks for result in of_stream)))
        for panel, (metric, label) in zip(row, _PANELS.items(), strict=True):
            _draw_panel(panel, of_stream, metric, label, styles, windows[-1])
        row[0].set_ylabel(stream, fontsize=12, fontweight="bold", color=INK)
    draw_legend(figure, styles)
    smoothed = " and ".join(dict.fromkeys(_smoothed(window) for window in windows))
    figure.suptitle(f"Lines: {smoothed}. {_explanation(results)}", fontsize=10, color=INK)
    return figure


def stream_figure(results: Sequence[MethodResult]) -> Any:
    """What a stream is judged by, dormant units and effective rank per task, side by side.

    Drawn as `plasticity_figure` draws.

    Args:
        results: of one stream.

    Returns:
        A `matplotlib.figure.Figure`.
    """
    from matplotlib.figure import Figure

    styles, window = method_styles(results), smoothing_window(max(result.tasks for result in results))
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    panels = figure.subplots(1, 1 + len(_OF_STREAM))
    measure = results[0].measure
    label, scale = MEASURES[measure]
    _draw_panel(panels[0], results, measure, label, styles, window, scale=scale)
    for panel, metric in zip(panels[1:], _OF_STREAM, strict=True):
        _draw_panel(panel, results, metric, _PANELS[metric], styles, window)
    draw_legend(figure, styles)
    figure.suptitle(
        f"{results[0].stream}. Lines: {_smoothed(window)}. {_explanation(results)}", fontsize=10, color=INK
    )
    return figure


def _draw_panel(
    panel: Any,
    results: Sequence[MethodResult],
    metric: str,
    label: str,
    styles: dict[str, dict[str, Any]],
    window: int,
    *,
    scale: float = 1.0,
) -> None:
    """Draw a measure of all methods that have it."""
    drawn = [result for result in results if np.isfinite(band(result.metrics[metric])[0]).any()]
    for result in drawn:
        _draw(panel, result, metric, styles[result.method], window, scale=scale)
    _decorate(panel, label, results, size=10.5)
    panel.set_xlabel("task", fontsize=10, color=INK)
    _scale(panel, metric)
    if not drawn:
        panel.text(0.5, 0.5, "no method has this", ha="center", va="center", transform=panel.transAxes, color=INK)


def draw_legend(figure: Any, styles: dict[str, dict[str, Any]]) -> None:
    """The lines of the methods, in the order of the study, below everything."""
    figure.legend(
        handles=[_handle(style, method) for method, style in styles.items()],
        loc="outside lower center",
        ncols=min(4 if figure.get_figwidth() > 11 else 3, len(styles)),
        fontsize=10.5,
        frameon=False,
        handlelength=3.0,
    )


def smoothing_window(tasks: int) -> int:
    """Number of tasks of the running mean: ⌈tasks/20⌉.

    Example:
        >>> smoothing_window(100), smoothing_window(1)
        (5, 1)
    """
    return math.ceil(tasks / 20)


def running_mean(curves: Array, window: int) -> Array:
    """Mean over the last ``window`` tasks at each task, or over those there are.

    It never looks ahead, so that a drop stands where it happened or later.

    Args:
        curves: shape (seeds, tasks).
        window: number of tasks, at least 1.

    Returns:
        Shape (seeds, tasks); NaN where a task in the window has no finite number.

    Example:
        >>> running_mean(np.array([[1.0, 3.0, 5.0]]), 2)
        array([[1., 2., 4.]])
    """
    values = np.where(np.isfinite(curves), curves, np.nan)
    return np.stack([values[:, max(0, at + 1 - window) : at + 1].mean(1) for at in range(values.shape[1])], 1)


def by_stream(results: Sequence[MethodResult]) -> dict[str, list[MethodResult]]:
    """The results of each stream.

    Raises:
        ValueError: if there are none.
    """
    if not results:
        raise ValueError("results: expected at least one, got none; a picture needs a finished method")
    streams: dict[str, list[MethodResult]] = {}
    for result in results:
        streams.setdefault(result.stream, []).append(result)
    return streams


def method_styles(results: Sequence[MethodResult]) -> dict[str, dict[str, Any]]:
    """The line of each method, the same in every panel: in the order of the study, dashed if told of switches."""
    told: dict[str, bool] = {}
    for result in results:
        told.setdefault(result.method, result.told_of_switches)
    return {
        method: {
            "color": _COLOURS[at % len(_COLOURS)],
            "marker": _MARKERS[at // len(_COLOURS) % len(_MARKERS)],
            "linestyle": (0, (4, 1.6)) if dashed else "-",
            "linewidth": 1.8,
            "markersize": 4.5,
        }
        for at, (method, dashed) in enumerate(told.items())
    }


def _draw(
    panel: Any, result: MethodResult, metric: str, style: dict[str, Any], window: int, *, scale: float = 1.0
) -> float:
    """Draw a line with its band; return the last finite height, or NaN."""
    mean, low, high = band(scale * running_mean(result.metrics[metric], window))
    tasks = np.arange(1, result.tasks + 1)
    panel.fill_between(tasks, low, high, color=style["color"], alpha=0.15, linewidth=0)
    every = max(1, result.tasks // 8)
    marker = style["marker"] or ("o" if result.tasks == 1 else "")
    panel.plot(tasks, mean, **{**style, "marker": marker}, markevery=every, solid_capstyle="round")
    finite = mean[np.isfinite(mean)]
    return float(finite[-1]) if finite.size else math.nan


def _decorate(panel: Any, title: str, results: Sequence[MethodResult], *, size: float = 13) -> None:
    """Frame and title of a panel over tasks."""
    from matplotlib.ticker import MaxNLocator

    tasks = max(result.tasks for result in results)
    decorate(panel, title, size=size)
    panel.set_xlim((0.5, 1.5) if tasks == 1 else (1, tasks))
    if tasks < 10:
        panel.set_xticks(range(1, tasks + 1))
    else:
        panel.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def decorate(panel: Any, title: str, *, size: float, weight: str = "bold", tick_size: float = 9.5) -> None:
    """Frame and title of a panel."""
    panel.set_title(title, loc="left", fontsize=size, fontweight=weight, color=INK)
    panel.tick_params(which="both", labelsize=tick_size, colors=INK, length=3)
    panel.grid(axis="y", color="#e3e3e3", linewidth=0.8)
    panel.set_axisbelow(True)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        panel.spines[side].set_color("#999999")


def _heights(panel: Any) -> Array:
    """All finite heights of the panel's lines."""
    lines = [np.asarray(line.get_ydata(), dtype=np.float64) for line in panel.lines]
    heights: Array = np.concatenate([np.empty(0), *lines])
    return heights[np.isfinite(heights)]


def _fit_to_lines(panel: Any) -> None:
    """Let the lines fill the panel; the wide band of a method with a diverged seed may be cut off.

    So may one line of eight, if without these the others have three times as much room.
    """
    heights = [np.asarray(line.get_ydata(), dtype=np.float64) for line in panel.lines]
    spans = [(float(np.nanmin(line)), float(np.nanmax(line))) for line in heights if np.isfinite(line).any()]
    if not spans:
        return
    lows, highs = (sorted(ends) for ends in zip(*spans, strict=True))
    low, high = lows[0], highs[-1]
    room = (high - low) / _CROWDED
    for few in range(1, 1 + len(spans) // 8):
        if high - lows[few] < room:
            low = lows[few]
            break
        if highs[-1 - few] - low < room:
            high = highs[-1 - few]
            break
    margin = 0.06 * max(high - low, 1.0)
    panel.set_ylim(low - margin, high + margin)


def _scale(panel: Any, metric: str) -> None:
    """Logarithmic axis for wide spans; fractions start at 0."""
    heights = _heights(panel)
    if metric in ("dead_units", "dormant_units", "mean_variance"):
        panel.set_ylim(bottom=0)
        if heights.size == 0 or heights.max() <= 0:
            panel.set_ylim(0, 1)
    elif heights.size and heights.min() > 0 and heights.max() > _LOGARITHMIC_SPAN * heights.min():
        panel.set_yscale("log")


def label_ends(
    panel: Any,
    ends: Sequence[tuple[float, str]],
    styles: dict[str, dict[str, Any]],
    *,
    starts: Mapping[str, float] | None = None,
    gap: float = LABEL,
) -> None:
    """Write each method's name and last height beside the end of its line, so that no two overlap.

    An arrow says where a line goes on that the panel cuts off.

    Args:
        panel: in the limits that it keeps.
        ends: height and method.
        styles: of the methods.
        starts: where on the x axis the methods end; default: at the right edge.
        gap: from one label to the next, as a part of the panel's height.
    """
    from matplotlib.colors import to_rgb

    low, high = panel.get_ylim()
    shown = sorted((end, method) for end, method in ends if math.isfinite(end))
    places = spread_apart([(end - low) / (high - low) for end, _ in shown], gap=gap)
    right = panel.get_xlim()[1]
    for place, (end, method) in zip(places, shown, strict=True):
        seen = min(max(end, low), high)
        arrow = "" if end == seen else "↓ " if end < seen else "↑ "
        colour = styles[method]["color"]
        ink = tuple(0.75 * part for part in to_rgb(colour))
        panel.annotate(
            f"{arrow}{method}  {end:.1f}",
            xy=((starts or {}).get(method, right), seen),
            xycoords="data",
            xytext=(1.035, place),
            textcoords="axes fraction",
            fontsize=10.5,
            color=ink,
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 1.0 if starts is None else 0.7,
                "shrinkA": 1,
                "shrinkB": 1,
                "relpos": (0, 0.5),
            },
        )


def spread_apart(places: Sequence[float], *, gap: float) -> list[float]:
    """Ascending places moved as little as this simple rule can, so that neighbours are ``gap`` apart.

    Places that touch form a group, spaced evenly around the mean of where they wanted to be; groups that touch
    are joined. What lies outside [0, 1] is pushed into it, if all fits.

    Example:
        >>> spread_apart([0.5, 0.5], gap=0.2)
        [0.4, 0.6]
    """
    groups: list[list[float]] = []
    for place in places:
        groups.append([place])
        while len(groups) > 1 and (
            fmean(groups[-1]) - fmean(groups[-2]) < gap * (len(groups[-1]) + len(groups[-2])) / 2
        ):
            groups[-2:] = [groups[-2] + groups[-1]]
    moved = [fmean(group) + gap * (at - (len(group) - 1) / 2) for group in groups for at in range(len(group))]
    last = len(moved) - 1
    return [max(min(place, 1.0 - gap * (last - index)), gap * index) for index, place in enumerate(moved)]


def _handle(style: dict[str, Any], label: str) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], label=label, **style)


def _smoothed(window: int) -> str:
    return "value of each task" if window == 1 else f"running mean over {window} tasks"


def _explanation(results: Sequence[MethodResult]) -> str:
    single = all(len(result.seeds) == 1 for result in results)
    bands = "One seed, so no bands." if single else "Bands: 95 % bootstrap interval over seeds."
    return bands + (
        " Dashed: told of task switches." if any(result.told_of_switches for result in results) else ""
    )
