"""How much the score of a method depends on each of its settings, read off the trials of a search."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clagrange.study.files import FileProblem
from clagrange.study.reporting.plots import INK, decorate

POINTS = 0.01
"""A trial is good whose accuracy is within this of the method's best."""
LOSS_FACTOR = 1.05
"""Where targets are numbers, a trial is good whose loss is at most this times the method's best."""
_LOGARITHMIC_SPAN = 10.0


@dataclass(frozen=True)
class Sensitivity:
    """One setting of a method over all trials of a search, the other settings being tried at the same time.

    Attributes:
        variant: the method, with its settings in words where the trials differ in them ("l2_init, base adam").
        setting: name of the setting.
        values: of the setting, one for each trial.
        scores: accuracy, or minus the loss, of the trials; NaN of those that have no number.
        good: whether each trial is within `POINTS` (or `LOSS_FACTOR`) of the method's best trial, whatever its
            variant.
        scale: "log" where the values are positive and span a factor of more than 10, "linear", or "choice" where
            few different values were tried.
        share: of the tried range, from the smallest to the largest value on that scale, that lies between the
            smallest and the largest value of good trials; of a choice, the share of the values with a good trial.
    """

    variant: str
    setting: str
    values: tuple[float, ...]
    scores: tuple[float, ...]
    good: tuple[bool, ...]
    scale: str
    share: float


@dataclass(frozen=True)
class MethodTrials:
    """What a search found out about a method on a stream.

    Attributes:
        method: name in the search.
        best: score of the best trial: its accuracy, or minus its loss; NaN if all trials have none.
        good: number of good trials in the first round, whose settings are spread evenly over the ranges.
        tried: number of trials in the first round; good / tried estimates the share of the searched space that
            is good.
        settings: one for each variant and setting.
    """

    method: str
    best: float
    good: int
    tried: int
    settings: tuple[Sensitivity, ...]


def read_searches(paths: Iterable[Path]) -> dict[str, list[MethodTrials]]:
    """The sensitivities of every stream in the files of `clagrange tune`; of two files the later one counts.

    Raises:
        FileProblem: if a file is missing, damaged or was not written by clagrange.
    """
    found: dict[str, dict[str, MethodTrials]] = {}
    for path in paths:
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
            for stream, body in report["streams"].items():
                for method, entry in body["methods"].items():
                    trials = method_trials(
                        method, entry["trials"], first_round=entry.get("spread", report["trials"])
                    )
                    found.setdefault(stream, {})[method] = trials
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise FileProblem(
                f"search: expected a file that clagrange tune wrote, got {path} ({type(error).__name__}: {error})"
            ) from error
    return {stream: list(methods.values()) for stream, methods in found.items()}


def method_trials(method: str, trials: Sequence[Mapping[str, Any]], *, first_round: int) -> MethodTrials:
    """How the score of a method varies over the range of each of its settings.

    Of every setting the share of the tried range is taken within which trials came within 1 point of the best,
    the other settings being whatever they were in those trials. A share near 1 says that the setting hardly
    matters once the others fit, or that it can be made up for by others; a small share that it must be met. With
    few trials a share is too small rather than too large: good trials may be missing.

    Args:
        method: its name.
        trials: each with "settings" and "online_accuracy" (or "loss").
        first_round: the number of trials at the beginning that are spread over the ranges; the others lie around
            the best of them.

    Example:
        >>> found = {0.1: 0.8, 1.0: 0.79, 10.0: 0.2}
        >>> trials = [{"settings": {"lr": lr}, "online_accuracy": score} for lr, score in found.items()]
        >>> lr = method_trials("sgd", trials, first_round=3).settings[0]
        >>> lr.scale, round(lr.share, 3)
        ('log', 0.5)
    """
    scores = [_score(trial) for trial in trials]
    finite = [score for score in scores if math.isfinite(score)]
    best = max(finite, default=math.nan)
    least = best * LOSS_FACTOR if any("loss" in trial for trial in trials) else best - POINTS
    good = [score >= least - 1e-12 for score in scores]
    variants: dict[tuple[tuple[str, Any], ...], list[int]] = {}
    for at, trial in enumerate(trials):
        words = tuple((key, value) for key, value in trial["settings"].items() if not _is_number(value))
        variants.setdefault(words, []).append(at)
    settings = []
    for words, members in variants.items():
        named = [
            f"{key} {value}" for key, value in words if len({dict(other).get(key) for other in variants}) > 1
        ]
        for name in [key for key in trials[members[0]]["settings"] if key not in dict(words)]:
            values = [float(trials[at]["settings"][name]) for at in members]
            if len(set(values)) > 1:
                settings.append(
                    _sensitivity(
                        ", ".join([method, *named]),
                        name,
                        values,
                        [scores[at] for at in members],
                        [good[at] for at in members],
                    )
                )
    return MethodTrials(method, best, sum(good[:first_round]), min(first_round, len(trials)), tuple(settings))


def _sensitivity(
    variant: str, setting: str, values: list[float], scores: list[float], good: list[bool]
) -> Sensitivity:
    reached = [value for value, is_good in zip(values, good, strict=True) if is_good]
    low, high = min(values), max(values)
    if 2 * len(set(values)) <= len(values):
        scale, share = "choice", len(set(reached)) / len(set(values))
    elif low > 0 and high > _LOGARITHMIC_SPAN * low:
        scale, share = "log", math.log(max(reached) / min(reached)) / math.log(high / low) if reached else 0.0
    else:
        scale, share = "linear", (max(reached) - min(reached)) / (high - low) if reached else 0.0
    return Sensitivity(variant, setting, tuple(values), tuple(scores), tuple(good), scale, share)


def _score(trial: Mapping[str, Any]) -> float:
    value = trial["online_accuracy"] if "online_accuracy" in trial else trial["loss"]
    score = math.nan if value is None else float(value)
    if not math.isfinite(score):
        return math.nan
    return score if "online_accuracy" in trial else -score


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# ------------------------------------------------------------------------------------------------ picture
_SHOWN_POINTS = 0.15
"""Accuracies further than this below the best are drawn at the lower edge."""
_GOOD, _OTHER = "#117733", "#8a8a8a"
_PANEL = (2.3, 2.0)
"""Width and height, in inches, of a panel with what belongs to it."""
_LEFT, _TOP = 0.55, 0.5
_COLUMNS = 5
_LETTER = 0.1
"""Width in inches of a letter of a block's title."""


def sensitivity_figure(methods: Sequence[MethodTrials], *, title: str) -> Any:
    """Score of every trial against each setting: a block for each method and variant, a panel for each setting.

    Good trials are filled, the range between them is shaded; what is far below the best stands as a triangle at
    the lower edge.

    Args:
        methods: of one stream, at least one with a setting that was varied.
        title: above the picture.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ValueError: if nothing was varied.
    """
    from matplotlib.figure import Figure

    rows: dict[str, list[tuple[MethodTrials, Sensitivity]]] = {}
    for method in methods:
        for setting in method.settings:
            rows.setdefault(setting.variant, []).append((method, setting))
    if not rows:
        raise ValueError("methods: expected one with a setting that its trials vary, got none")
    places, columns, lines = _blocks({variant: len(of_variant) for variant, of_variant in rows.items()})
    width, height = _LEFT + columns * _PANEL[0], _TOP + lines * _PANEL[1]
    figure = Figure(figsize=(width, height))  # placed by hand: a layout engine takes minutes over so many panels
    for (line, column), (variant, of_variant) in zip(places, rows.items(), strict=True):
        top, left = height - _TOP - line * _PANEL[1], _LEFT + column * _PANEL[0]
        figure.text(
            (left - 0.4) / width, top / height, variant, fontsize=10.5, fontweight="bold", color=INK, va="top"
        )
        for at, (method, setting) in enumerate(of_variant):
            corner = ((left + at * _PANEL[0]) / width, (top - _PANEL[1] + 0.4) / height)
            size = ((_PANEL[0] - 0.55) / width, (_PANEL[1] - 0.85) / height)
            _draw_setting(figure.add_axes((*corner, *size)), method, setting)
    figure.text(0.15 / width, 1 - 0.12 / height, title, fontsize=10, color=INK, va="top")
    return figure


def _blocks(sizes: Mapping[str, int]) -> tuple[list[tuple[int, int]], int, int]:
    """Line and column of blocks of so many panels, side by side as far as they fit; columns and lines of all."""
    columns = max(_COLUMNS, *sizes.values())
    places, line, column = [], 0, 0
    for title, panels in sizes.items():
        wide = max(panels, math.ceil(_LETTER * len(title) / _PANEL[0]))
        if column + wide > columns:
            line, column = line + 1, 0
        places.append((line, column))
        column += wide
    return places, columns, line + 1


def _draw_setting(panel: Any, method: MethodTrials, setting: Sensitivity) -> None:
    """The trials of one setting."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    values, scores, good = np.array(setting.values), np.array(setting.scores), np.array(setting.good)
    by_loss = method.best < 0
    scale = -1.0 if by_loss else 100.0
    reach = 2 * abs(method.best) if by_loss else _SHOWN_POINTS
    floor = method.best - reach
    low = ~(scores >= floor)  # NaN as well
    panel.plot(values[low], np.full(low.sum(), scale * floor), "v", color=_OTHER, markersize=4.5, mfc="none")
    for chosen, colour, filled in ((~low & ~good, _OTHER, "none"), (good, _GOOD, _GOOD)):
        panel.plot(values[chosen], scale * scores[chosen], "o", color=colour, mfc=filled, markersize=4.5)
    if good.any() and setting.scale != "choice":
        panel.axvspan(values[good].min(), values[good].max(), color=_GOOD, alpha=0.12, linewidth=0)
    if setting.scale == "log":
        panel.set_xscale("log")
        decades = math.log10(max(setting.values) / min(setting.values))
        panel.xaxis.set_major_locator(LogLocator(subs=(1.0,) if decades > 1.5 else (1.0, 3.0), numticks=5))
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.xaxis.set_minor_locator(NullLocator())
    elif setting.scale == "choice":
        panel.set_xticks(sorted(set(setting.values)), [f"{value:g}" for value in sorted(set(setting.values))])
        panel.margins(x=0.4)
    else:
        panel.xaxis.set_major_locator(MaxNLocator(4))
    edges = sorted((scale * (floor - 0.06 * reach), scale * (method.best + 0.1 * reach)))
    panel.set_ylim(*(edges[::-1] if by_loss else edges))
    decorate(panel, setting.setting, size=10, weight="normal", tick_size=8.5)
