"""Pictures that compare methods by their scores: profiles, who beats whom, cost against score."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from clagrange.metrics.intervals import interval
from clagrange.study.reporting.aggregates import improvement, performance_profile
from clagrange.study.reporting.plots import (
    INK,
    LABEL,
    MEASURES,
    by_stream,
    decorate,
    draw_legend,
    label_ends,
    method_styles,
)
from clagrange.study.reporting.statistics import Array
from clagrange.study.results import MethodResult

THRESHOLDS = 301
_PANELS_IN_A_ROW = 2
_SCATTER_MARKERS = {"": "o", "o": "s", "s": "^"}
"""Of points, by the marker of the method's line."""


def profile_figure(results: Sequence[MethodResult]) -> Any:
    """`performance_profile` of every method: a panel for each stream, and one over all streams of accuracies.

    A run is one seed on one stream, its score the mean over all tasks; of a loss the share of runs below τ.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ValueError: if there are no results.
    """
    from matplotlib.figure import Figure

    streams, styles = by_stream(results), method_styles(results)
    panels = {stream: {result.method: _scores(result) for result in found} for stream, found in streams.items()}
    together = _together(streams)
    if together:
        panels["all streams"] = together
    figure = Figure(figsize=_size(len(panels), height=3.4, legend=len(styles)), layout="constrained")
    for panel, (stream, scores) in zip(_grid(figure, len(panels)), panels.items(), strict=True):
        measure = streams[stream][0].measure if stream in streams else "online_accuracy"
        label, scale = MEASURES[measure]
        _draw_profiles(panel, scores, styles, scale if measure == "online_accuracy" else -scale)
        decorate(panel, stream, size=11.5)
        panel.set_xlabel(f"τ: {label}", fontsize=10, color=INK)
        panel.set_ylabel("share of runs " + ("above τ" if scale == 100.0 else "below τ"), fontsize=10, color=INK)
    draw_legend(figure, styles)
    return figure


def _draw_profiles(
    panel: Any, scores: Mapping[str, Array], styles: Mapping[str, dict[str, Any]], scale: float
) -> None:
    """Profiles of scores of which more is better; ``scale`` gives them the unit of the axis."""
    finite = {method: of for method, of in scores.items() if np.isfinite(of).all()}
    panel.set_ylim(-0.03, 1.03)
    if not finite:
        return
    low = min(float(of.min()) for of in finite.values())
    high = max(float(of.max()) for of in finite.values())
    margin = 0.04 * (high - low) or 0.01
    taus = np.linspace(low - margin, high + margin, THRESHOLDS)
    for method, of in finite.items():
        share, lower, upper = performance_profile(of, taus)
        middle = [int(np.abs(share - 0.5).argmin())]  # a marker at the median
        style = {**styles[method], "linewidth": 1.5, "markevery": middle, "drawstyle": "steps-mid"}
        panel.fill_between(scale * taus, lower, upper, color=style["color"], alpha=0.12, linewidth=0, step="mid")
        panel.plot(scale * taus, share, **style)


def improvement_figure(results: Sequence[MethodResult]) -> Any:
    """The probability, in per cent, that a run of the row's method beats one of the column's: a panel a stream.

    Methods are in the order of their mean score, the best first, so that large numbers stand above the diagonal.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ValueError: if there are no results.
    """
    from matplotlib.figure import Figure

    panels = {
        stream: {result.method: _scores(result) for result in found}
        for stream, found in by_stream(results).items()
    }
    together = _together(by_stream(results))
    if together:
        panels["all streams"] = together
    finite = {
        stream: {method: of for method, of in scores.items() if np.isfinite(of).all()}
        for stream, scores in panels.items()
    }
    most = max(2, *map(len, finite.values())) if finite else 2
    side = 1.9 + 0.42 * most
    row = max(1, min(len(finite), int(11 // side)))
    lines = math.ceil(len(finite) / row)
    figure = Figure(figsize=(max(5.0, side * row), 0.3 + (side + 0.2) * lines), layout="constrained")
    grid = figure.subplots(lines, row, squeeze=False).flatten()
    for panel in grid[len(finite) :]:
        panel.set_visible(False)
    for panel, (stream, scores) in zip(grid, finite.items(), strict=False):
        means = {method: float(of.mean()) for method, of in scores.items()}
        order = sorted(means, key=means.__getitem__, reverse=True)
        shares = np.array([[100 * improvement(scores[a], scores[b]) for b in order] for a in order])
        shares = shares.reshape(len(order), len(order))
        np.fill_diagonal(shares, np.nan)
        panel.imshow(np.ma.masked_invalid(shares), cmap="BrBG", vmin=-60, vmax=160)
        for at, of_row in enumerate(shares):
            for against, share in enumerate(of_row):
                if math.isfinite(share):
                    panel.text(against, at, f"{share:.0f}", ha="center", va="center", fontsize=9, color="black")
        panel.set_xticks(range(len(order)), order, rotation=50, ha="right", rotation_mode="anchor", fontsize=9)
        panel.set_yticks(range(len(order)), order, fontsize=9)
        panel.tick_params(length=0, colors=INK)
        panel.spines[:].set_visible(False)
        panel.set_title(stream, loc="left", fontsize=11.5, fontweight="bold", color=INK)
    return figure


def cost_figure(results: Sequence[MethodResult]) -> Any:
    """Score, with its interval over seeds, against the seconds of training of one seed: a panel for each stream.

    The best methods that cost no more lie on the upper left; methods are named at the right in the order of their
    score.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ValueError: if there are no results.
    """
    from matplotlib.figure import Figure

    streams, styles = by_stream(results), method_styles(results)
    most = max(map(len, streams.values()))
    figure = Figure(figsize=(10, (0.8 + max(1.9, 0.29 * most)) * len(streams)), layout="constrained")
    for panel, (stream, found) in zip(
        figure.subplots(len(streams), 1, squeeze=False)[:, 0], streams.items(), strict=True
    ):
        label, scale = MEASURES[found[0].measure]
        ends = []
        for result in found:
            of, seconds = (
                interval(scale * result.metrics[result.measure].mean(1)),
                result.seconds / len(result.seeds),
            )
            if of.mean is None or not seconds > 0:
                continue
            style = styles[result.method]
            marker = _SCATTER_MARKERS[style["marker"]]
            if of.low is not None and of.high is not None:
                panel.plot([seconds, seconds], [of.low, of.high], color=style["color"], linewidth=1.6)
            filled = "white" if result.told_of_switches else style["color"]
            panel.plot([seconds], [of.mean], marker, color=style["color"], mfc=filled, markersize=8, mew=1.8)
            ends.append((of.mean, result.method, seconds))
        decorate(panel, stream, size=11.5)
        panel.set_xscale("log")
        _plain_seconds(panel)
        panel.set_xlabel("seconds of training for each seed", fontsize=10, color=INK)
        panel.set_ylabel(label, fontsize=10, color=INK)
        starts = {method: seconds for _, method, seconds in ends}
        named = [(end, method) for end, method, _ in ends]
        label_ends(panel, named, styles, starts=starts, gap=min(LABEL, 1.0 / most))
    figure.supxlabel(
        "Open: told of task switches. Bars: 95 % bootstrap interval over seeds.", fontsize=9.5, color=INK
    )
    return figure


def _plain_seconds(panel: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    panel.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.xaxis.set_minor_formatter(NullFormatter())


def _scores(result: MethodResult) -> Array:
    """A number for each seed, more is better."""
    scores: Array = result.metrics[result.measure].mean(1)
    return -scores if result.measure == "loss" else scores


def _together(streams: Mapping[str, Sequence[MethodResult]]) -> dict[str, Array]:
    """Scores (seeds, streams) of the methods that are on all streams of accuracies; none with one such stream."""
    chosen = [found for found in streams.values() if found[0].measure == "online_accuracy"]
    if len(chosen) < 2:
        return {}
    scores: dict[str, list[Array]] = {}
    for found in chosen:
        for result in found:
            scores.setdefault(result.method, []).append(_scores(result))
    return {
        method: np.stack(of, 1)
        for method, of in scores.items()
        if len(of) == len(chosen) and len({len(column) for column in of}) == 1
    }


def _size(panels: int, *, height: float, legend: int) -> tuple[float, float]:
    return 10.0, 0.4 + height * math.ceil(panels / _PANELS_IN_A_ROW) + 0.24 * math.ceil(legend / 3)


def _grid(figure: Any, panels: int) -> Sequence[Any]:
    row = min(panels, _PANELS_IN_A_ROW)
    grid = figure.subplots(math.ceil(panels / row), row, squeeze=False).flatten()
    for panel in grid[panels:]:
        panel.set_visible(False)
    chosen: Sequence[Any] = grid[:panels]
    return chosen
