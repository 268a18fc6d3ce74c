"""What a study came to: `summary.json`, and the same as a table in the terminal and in Markdown."""

import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from clagrange.metrics.efficiency import area_under_curve, time_to_threshold
from clagrange.metrics.forgetting import average_accuracy, backward_transfer, forgetting, forward_transfer
from clagrange.metrics.plasticity import plasticity_slope
from clagrange.study.files import FileProblem, replacing
from clagrange.study.reporting.aggregates import interquartile_interval
from clagrange.study.reporting.comparison import NO_INTERVAL, best, compare, compare_streams, judged_by_loss
from clagrange.study.reporting.statistics import interval, tenths
from clagrange.study.results import MethodResult

SCHEMA = 1
"""Version of the form of `summary.json`; raised when a key changes its meaning or goes away."""

COLUMNS = {
    "method": "name of the method in the configuration",
    "told of switches": "whether the method uses the announcement that a new task begins; others never hear it",
    "online accuracy %": (
        "accuracy on each batch before learning from it, mean over all tasks and seeds, in per cent; "
        "in brackets the 95 % bootstrap interval over seeds; where targets are numbers, the online loss instead"
    ),
    "first tenth": "the same over the first tenth of the tasks",
    "last tenth": "the same over the last tenth of the tasks",
    "change": (
        "last tenth minus first tenth, in percentage points, with the interval over seeds; an interval below 0 "
        "(of a loss: above 0) is a loss of plasticity, where the tasks are equally hard"
    ),
    "seconds": "wall time of the training steps of all seeds together",
    "model-steps/s": "optimizer steps of one network, times seeds, per second",
    "diverged": "number of seeds whose loss was ever not finite",
}
"""Columns of the tables and what they mean."""

FORGETTING = {
    "average_accuracy": "average accuracy %",
    "forgetting": "forgetting",
    "backward_transfer": "backward transfer",
    "forward_transfer": "forward transfer",
}
"""What the accuracies on the test examples of all tasks say, and the columns of their table."""

OVER_TASKS = ("plasticity_slope", "area_under_curve", "samples_to_threshold", "seconds_to_threshold")
"""What the curve over the tasks says."""

_HEADERS = (
    "method",
    "told of\nswitches",
    "online\naccuracy %",
    "first\ntenth",
    "last\ntenth",
    "change",
    "seconds",
    "model-\nsteps/s",
)
# Of the printed table, which names diverged seeds below instead.
_NOTHING = "-"
_LOSS = "online loss"
_PRINTED_COLUMNS = 100
_NARROW_NAME = 15


def summarize(
    results: Sequence[MethodResult],
    *,
    status: str,
    environment: Mapping[str, object],
    planned: Mapping[str, Sequence[str]] | None = None,
    tasks: Mapping[str, int] | None = None,
    equally_hard: Mapping[str, bool] | None = None,
    thresholds: Mapping[str, float] | None = None,
    reference: str | None = None,
) -> dict[str, Any]:
    """The study in the form of `summary.json`, strictly JSON: null where there is no number, never NaN.

    ``{"schema": 1, "status", "environment", "streams": [{"name", "tasks", "measure", "equally_hard", "methods":
    [{"name", "told_of_switches", "seeds": [...], "online_accuracy": {"mean", "low", "high"}, "loss": {...},
    "by_seed": [...], "interquartile_mean": {...}, "first_tenth", "last_tenth", "change": {...},
    "model_steps_per_second", "seconds", "diverged", "plasticity_slope": {...}, "area_under_curve": {...},
    "samples_to_threshold": {...}, "seconds_to_threshold": {...}, "average_accuracy": {...}, "forgetting": {...},
    "backward_transfer": {...}, "forward_transfer": {...}}], "comparisons": {...}}], "all_streams": {...}}``

    ``measure`` says what methods are judged by, the "online_accuracy", or the "loss" where targets are numbers;
    ``by_seed``, the interquartile mean, the tenths and their change are of that; ``equally_hard`` whether the
    tasks are, so that a change is one of the network. Accuracies are fractions, means over seeds; ``change`` is
    the last minus the first tenth, paired by seed; ``diverged`` is a number of seeds. The slope (per task, by
    least squares for each seed), the area, and the samples and seconds until a threshold is first reached are
    those of what methods are judged by, one point for each task, at its end. ``comparisons`` are those of
    `compare`, ``all_streams`` those of `compare_streams`. What is null has no number: times to a threshold where
    none is given or a seed never reached it, the last four without test examples, everything of a method that
    has no result, or fewer tasks than planned.

    Args:
        results: in the order of the study.
        status: how the study ended, for instance "complete" or "interrupted".
        environment: what `clagrange.study.machine.environment` gave.
        planned: names of the methods of each stream; by default those with a result.
        tasks: number of tasks of each stream; by default the largest among its results.
        equally_hard: `clagrange.tasks.TaskStream.equally_hard` of each stream; by default True.
        thresholds: of the online accuracy (of the loss, where targets are numbers) of streams.
        reference: the method that the others are compared with; default: the best Euler-Lagrange method.

    Raises:
        ValueError: if a method has two results on a stream.

    Example:
        >>> summary = summarize([], status="interrupted", environment={}, planned={"digits": ["sgd"]})
        >>> summary["streams"][0]["methods"][0]["online_accuracy"]
        {'mean': None, 'low': None, 'high': None}
    """
    by_stream: dict[str, dict[str, MethodResult]] = {}
    for result in results:
        methods = by_stream.setdefault(result.stream, {})
        if result.method in methods:
            raise ValueError(
                f"results: expected one result for each method and stream, got two of {result.method!r} "
                f"on {result.stream!r}; join their seeds into one result"
            )
        methods[result.method] = result
    planned, tasks, equally_hard, thresholds = planned or {}, tasks or {}, equally_hard or {}, thresholds or {}
    streams = []
    for stream in dict.fromkeys([*planned, *by_stream]):
        found = by_stream.get(stream, {})
        total = tasks.get(stream) or max((result.tasks for result in found.values()), default=None)
        names = dict.fromkeys([*planned.get(stream, ()), *found])
        measure = next((result.measure for result in found.values()), "online_accuracy")
        judged = [_method(name, found.get(name), total, measure, thresholds.get(stream)) for name in names]
        about = {"name": stream, "tasks": total, "measure": measure}
        summarized = {**about, "equally_hard": equally_hard.get(stream, True), "methods": judged}
        streams.append({**summarized, "comparisons": compare(summarized, reference)})
    return {
        "schema": SCHEMA,
        "status": status,
        "environment": dict(environment),
        "streams": streams,
        "all_streams": compare_streams(streams, reference),
    }


def write_summary(directory: Path, summary: Mapping[str, Any]) -> Path:
    """Write ``directory/summary.json``, whole or not at all; return its path.

    Raises:
        ValueError: if the summary holds a NaN or an infinity.
    """
    path = directory / "summary.json"
    text = json.dumps(summary, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return path


def read_summary(directory: Path) -> dict[str, Any]:
    """Read ``directory/summary.json``, also of an earlier version.

    Raises:
        FileProblem: if it is missing, damaged or foreign.
    """
    path = directory / "summary.json"
    try:
        summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        known = summary["schema"] <= SCHEMA and isinstance(summary["streams"], list) and "environment" in summary
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileProblem(f"{path}: expected the summary of a study, got a damaged or foreign file") from error
    if not known:
        raise FileProblem(f"{path}: expected a summary of schema {SCHEMA}; it is from a later version")
    return summary


def columns(stream: Mapping[str, Any]) -> list[str]:
    """The headings of a stream's table, as `COLUMNS` explains them."""
    return [_LOSS if judged_by_loss(stream) and "%" in name else name for name in COLUMNS]


def rows(stream: Mapping[str, Any]) -> list[list[str]]:
    """The cells of a stream's table, one row for each method, in the order of `COLUMNS`."""
    loss = judged_by_loss(stream)
    return [
        [
            method["name"],
            {True: "yes", False: "no", None: _NOTHING}[method["told_of_switches"]],
            spread(method["loss" if loss else "online_accuracy"], loss=loss),
            number(method["first_tenth"], loss=loss),
            number(method["last_tenth"], loss=loss),
            spread(method["change"], signed=True, loss=loss),
            _number(method["seconds"]),
            _number(method["model_steps_per_second"]),
            _NOTHING if method["diverged"] is None else str(method["diverged"]),
        ]
        for method in stream["methods"]
    ]


def forgetting_rows(stream: Mapping[str, Any]) -> list[list[str]]:
    """The cells of the table of what is forgotten, below "method" and `FORGETTING`; none without a matrix."""
    return [
        [method["name"], *(spread(method[key], signed=key != "average_accuracy") for key in FORGETTING)]
        for method in stream["methods"]
        if method.get("average_accuracy", NO_INTERVAL)["mean"] is not None
    ]


def table(summary: Mapping[str, Any], console: Console) -> None:
    """Print one table for each stream, in the order of the study; the best mean is bold and named below.

    A table fits into 100 columns; a narrower terminal gets names and intervals on two lines. Where the output
    is no terminal it is at least 100 columns wide, whatever the console guesses.
    """
    before = console.width
    if not console.is_terminal:
        console.width = max(before, _PRINTED_COLUMNS)
    try:
        for stream in summary["streams"]:
            console.print(Text(heading(stream), style="bold"))
            console.print(_printed(stream, narrow=console.width < _PRINTED_COLUMNS))
            if forgetting_rows(stream):
                console.print(_printed_forgetting(stream))
            for note in _notes(stream):
                console.print(Text(note))
            console.print()
    finally:
        if not console.is_terminal:
            console.width = before


def _printed(stream: Mapping[str, Any], *, narrow: bool) -> Table:
    """The printed table of a stream."""
    printed = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for header in _HEADERS:
        textual = header == "method"
        if judged_by_loss(stream) and "%" in header:
            header = _LOSS.replace(" ", "\n")
        printed.add_column(
            Text(header), justify="left" if textual else "right", no_wrap=narrow or not textual, overflow="fold"
        )
    winner = best(stream)
    for cells in rows(stream):
        strong = cells[0] == winner
        shown = cells[: len(_HEADERS)]
        if narrow:
            shown = [cell.replace(" [", "\n[") for cell in shown]
            shown[0] = "\n".join(textwrap.wrap(shown[0].replace("_", "_ "), _NARROW_NAME)).replace("_ ", "_")
        printed.add_row(
            *(Text(cell, style="bold" if strong and at in (0, 2) else "") for at, cell in enumerate(shown))
        )
    return printed


def _printed_forgetting(stream: Mapping[str, Any]) -> Table:
    """The printed table of what is forgotten."""
    printed = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for header in ("method", *FORGETTING.values()):
        printed.add_column(Text(header.replace(" ", "\n", 1)), justify="left" if header == "method" else "right")
    for cells in forgetting_rows(stream):
        printed.add_row(*map(Text, cells))
    return printed


def _notes(stream: Mapping[str, Any]) -> list[str]:
    """What stands below a printed table."""
    notes = ["In brackets: 95 % bootstrap interval over seeds. Change: last tenth minus first tenth."]
    winner = best(stream)
    if winner is not None:
        notes.append(f"{'Lowest' if judged_by_loss(stream) else 'Highest'} mean: {winner}.")
    diverged = [
        f"{m['name']} ({m['diverged']} of {len(m['seeds'])} seeds)" for m in stream["methods"] if m["diverged"]
    ]
    if diverged:
        notes.append(f"Diverged: {', '.join(diverged)}.")
    unfinished = [m["name"] for m in stream["methods"] if not m["seeds"]]
    if unfinished:
        notes.append(f"Not finished: {', '.join(unfinished)}.")
    return notes


def markdown(summary: Mapping[str, Any]) -> str:
    """The tables in GitHub's Markdown, the best mean bold, for a README."""
    parts = []
    for stream in summary["streams"]:
        winner = best(stream)
        lines = [
            "| " + " | ".join(columns(stream)) + " |",
            "| --- | :-: |" + " --: |" * (len(COLUMNS) - 2),
        ]
        for cells in rows(stream):
            escaped = [cell.replace("|", "\\|").replace("\n", " ") for cell in cells]
            if cells[0] == winner:
                escaped[0], escaped[2] = f"**{escaped[0]}**", f"**{escaped[2]}**"
            lines.append("| " + " | ".join(escaped) + " |")
        forgotten = forgetting_rows(stream)
        if forgotten:
            lines += ["", "| " + " | ".join(["method", *FORGETTING.values()]) + " |"]
            lines += [
                "| --- |" + " --: |" * len(FORGETTING),
                *("| " + " | ".join(cells) + " |" for cells in forgotten),
            ]
        parts.append(f"**{heading(stream)}**\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def heading(stream: Mapping[str, Any]) -> str:
    """Name, number of tasks and number of seeds of a stream."""
    counts = {len(method["seeds"]) for method in stream["methods"] if method["seeds"]}
    seeds = "" if not counts else f", {min(counts)}" if len(counts) == 1 else f", {min(counts)} to {max(counts)}"
    tasks = "" if stream["tasks"] is None else f": {stream['tasks']} task{'s' * (stream['tasks'] != 1)}"
    return f"{stream['name']}{tasks}" + (f"{seeds} seed{'s' * (counts != {1})}" if seeds else "")


def percent(fraction: float | None, *, signed: bool = False) -> str:
    """A fraction in per cent with one decimal, or "-" for None.

    Example:
        >>> percent(0.8341), percent(-0.02, signed=True), percent(None)
        ('83.4', '-2.0', '-')
    """
    if fraction is None:
        return _NOTHING
    return format(round(100 * fraction, 1) + 0.0, "+.1f" if signed else ".1f")


def number(value: float | None, *, signed: bool = False, loss: bool = False) -> str:
    """A fraction in per cent, or a loss with three digits.

    Example:
        >>> number(0.834), number(0.0123456, loss=True)
        ('83.4', '0.0123')
    """
    if not loss or value is None:
        return percent(value, signed=signed)
    return format(value, "+.3g" if signed else ".3g")


def spread(of: Mapping[str, float | None], *, signed: bool = False, loss: bool = False) -> str:
    """Mean and interval, in per cent or of a loss.

    Example:
        >>> spread({"mean": 0.834, "low": 0.83, "high": 0.84}), spread({"mean": 0.5, "low": None, "high": None})
        ('83.4 [83.0, 84.0]', '50.0')
    """
    mean = number(of["mean"], signed=signed, loss=loss)
    if of["low"] is None or of["high"] is None:
        return mean
    low, high = (number(of[end], signed=signed, loss=loss) for end in ("low", "high"))
    return f"{mean} [{low}, {high}]"


def _method(
    name: str, result: MethodResult | None, tasks: int | None, measure: str, threshold: float | None
) -> dict[str, Any]:
    if result is None or (tasks is not None and result.tasks < tasks):
        return {
            "name": name,
            "told_of_switches": None if result is None else result.told_of_switches,
            "seeds": [],
            "online_accuracy": dict(NO_INTERVAL),
            "loss": dict(NO_INTERVAL),
            "by_seed": [],
            "interquartile_mean": dict(NO_INTERVAL),
            "first_tenth": None,
            "last_tenth": None,
            "change": dict(NO_INTERVAL),
            "model_steps_per_second": None,
            "seconds": None,
            "diverged": None,
            **{key: dict(NO_INTERVAL) for key in (*OVER_TASKS, *FORGETTING)},
        }
    by_seed = result.metrics[measure].mean(1)
    first, last = tenths(result.metrics[measure])
    seconds = float(result.seconds) if math.isfinite(result.seconds) else None
    with np.errstate(invalid="ignore"):  # of losses that are not finite
        change = last - first
    return {
        "name": name,
        "told_of_switches": result.told_of_switches,
        "seeds": list(result.seeds),
        "online_accuracy": interval(result.metrics["online_accuracy"].mean(1)).as_dict(),
        "loss": interval(result.metrics["loss"].mean(1)).as_dict(),
        "by_seed": [float(score) if math.isfinite(score) else None for score in by_seed],
        "interquartile_mean": interquartile_interval(by_seed).as_dict(),
        "first_tenth": interval(first).mean,
        "last_tenth": interval(last).mean,
        "change": interval(change).as_dict(),
        "model_steps_per_second": result.steps * len(result.seeds) / seconds if seconds else None,
        "seconds": seconds,
        "diverged": sum(bool(seed) for seed in result.diverged),
        **_over_tasks(result, threshold),
        **_forgetting(result),
    }


def _over_tasks(result: MethodResult, threshold: float | None) -> dict[str, dict[str, float | None]]:
    """What the curve over the tasks says: how it slopes, how high it is, and when it crosses a threshold."""
    found = {key: dict(NO_INTERVAL) for key in OVER_TASKS}
    curve = torch.tensor(result.metrics[result.measure])
    if result.tasks > 1:
        found["plasticity_slope"] = interval(plasticity_slope(curve).slope.numpy()).as_dict()
    for unit, points in (("samples", result.samples), ("seconds", result.elapsed)):
        if points is None:
            continue
        at = torch.tensor(points)
        if unit == "samples" and result.tasks > 1:
            found["area_under_curve"] = interval(area_under_curve(curve, at).numpy()).as_dict()
        if threshold is not None:
            times = time_to_threshold(curve, at, threshold, higher_is_better=result.measure != "loss")
            found[f"{unit}_to_threshold"] = interval(times.numpy()).as_dict()
    return found


def _forgetting(result: MethodResult) -> dict[str, dict[str, float | None]]:
    """What the accuracies on the test examples of all tasks say."""
    if result.matrix is None or result.tasks < 2:
        return {key: dict(NO_INTERVAL) for key in FORGETTING}
    untrained, matrix = (torch.from_numpy(part) for part in (result.matrix[:, 0], result.matrix[:, 1:]))
    found = {
        "average_accuracy": average_accuracy(matrix),
        "forgetting": forgetting(matrix),
        "backward_transfer": backward_transfer(matrix),
        "forward_transfer": forward_transfer(matrix, untrained),
    }
    return {key: interval(values.numpy()).as_dict() for key, values in found.items()}


def _number(value: float | None) -> str:
    """Three digits at least, thousands apart; one decimal below 10."""
    if value is None:
        return _NOTHING
    return f"{value:.1f}" if value < 10 else f"{value:,.0f}"
