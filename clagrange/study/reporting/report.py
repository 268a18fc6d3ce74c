"""A study as one self-contained page, in Markdown, and as LaTeX tables: `report.html`, `.md`, `.tex`."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clagrange.study.files import file_name, replacing
from clagrange.study.reporting.comparison import NO_INTERVAL, best, judged_by_loss
from clagrange.study.reporting.document import (
    Block,
    Code,
    Grid,
    Heading,
    Picture,
    Points,
    Terms,
    Text,
    as_html,
    as_latex,
    as_markdown,
)
from clagrange.study.reporting.findings import findings, in_short
from clagrange.study.reporting.plots import PICTURES, write_figure, write_plots
from clagrange.study.reporting.sensitivity import LOSS_FACTOR, MethodTrials, Sensitivity, sensitivity_figure
from clagrange.study.reporting.significance import pairs_needed, smallest_p
from clagrange.study.reporting.summary import (
    COLUMNS,
    FORGETTING,
    columns,
    forgetting_rows,
    heading,
    number,
    rows,
    spread,
)
from clagrange.study.results import METRICS, MethodResult

LEVEL = 0.05
"""Of significance, about which the report says whether the seeds can reach it."""
INTERQUARTILE, SLOPE, P = "interquartile mean", "slope", "p (Holm)"
_MORE_COLUMNS = {
    INTERQUARTILE: (
        "mean of the middle half of the seeds (all of them with fewer than 4), which single runs move less; with "
        "its bootstrap interval"
    ),
    SLOPE: (
        "change for each task, in percentage points (of a loss: its unit), of the straight line through all "
        "tasks, fitted to each seed; with the interval over seeds"
    ),
    P: "of the paired permutation test, corrected for the number of methods in the table",
}
_PICTURES = {
    "Learning curves": {
        "accuracy.png": "Online accuracy (the loss, where targets are numbers) over the tasks of each stream.",
        "plasticity.png": (
            "Dead and dormant units, effective rank, weights and variances over the tasks of each stream."
        ),
    },
    "Runs against each other": {
        "profile.png": (
            "Performance profiles: the share of runs (a run is a seed) whose score, the mean over all tasks, is "
            "above τ (below it, where the score is a loss). A marker stands at the median. Bands: 95 % "
            "stratified bootstrap intervals, for each τ by itself."
        ),
        "improvement.png": (
            "Probability, in per cent, that a run of the row's method is better than a run of the column's on "
            "the same stream; the pairing by seed is not used."
        ),
    },
    "Cost": {
        "cost.png": (
            "Score against the wall time of the training steps, divided by the seeds that were trained together. "
            "Higher (lower, where it is a loss) and further left is better."
        ),
    },
}


def write_report(
    directory: Path,
    summary: Mapping[str, Any],
    results: Sequence[MethodResult],
    config_text: str,
    searches: Mapping[str, Sequence[MethodTrials]] | None = None,
) -> Path:
    """Write ``report.html``, ``report.md`` and ``report.tex`` into a folder; return the path of the first.

    The page needs no other file, for the pictures of the folder are embedded; they are drawn first where there
    are results and one is missing. The Markdown names the pictures beside it. The LaTeX file holds the tables.

    Args:
        directory: the study's folder.
        summary: what `clagrange.study.reporting.summary.summarize` gave for the results, also an older one that
            knows less.
        results: in the order of the study; none where only the summary is known.
        config_text: the resolved configuration; empty if it is not known.
        searches: what `read_searches` gave, of which the streams of the study are shown.
    """
    if results and any(not (directory / name).exists() for name in PICTURES):
        write_plots(directory, results)
    blocks = contents(directory, summary, results, config_text, searches or {})
    path = directory / "report.html"
    for target, text in {
        path: as_html("clagrange: study report", blocks),
        directory / "report.md": as_markdown(blocks, directory),
        directory / "report.tex": as_latex(blocks),
    }.items():
        with replacing(target) as partial:
            partial.write_text(text, encoding="utf-8")
    return path


def contents(
    directory: Path,
    summary: Mapping[str, Any],
    results: Sequence[MethodResult],
    config_text: str,
    searches: Mapping[str, Sequence[MethodTrials]],
) -> list[Block]:
    """What the report says, in order; writes the pictures of the searches."""
    pictures: list[Block] = []
    for title, of_title in _PICTURES.items():
        existing = [
            Picture(directory / name, text) for name, text in of_title.items() if (directory / name).is_file()
        ]
        pictures += [Heading(title), *existing] if existing else []
    return [
        Heading("Continual learning: a comparison of methods", 1),
        *_introduction(summary),
        *(block for stream in summary["streams"] for block in _stream_section(stream, results)),
        *_all_streams(summary),
        *pictures,
        *_sensitivity(directory, summary, searches),
        Heading("How to read this"),
        *_reading(),
        *_settings(config_text),
        Heading("Environment"),
        Grid(["what", "value"], [[key, str(value)] for key, value in summary["environment"].items()]),
    ]


def _settings(config_text: str) -> list[Block]:
    return [Heading("Settings"), Code(config_text, "yaml")] if config_text else []


def _introduction(summary: Mapping[str, Any]) -> list[Block]:
    runs = "; ".join(f"{heading(stream)}, {len(stream['methods'])} methods" for stream in summary["streams"])
    complete = summary["status"] == "complete"
    return [
        *(Text(sentence) for sentence in map(in_short, summary["streams"]) if sentence),
        Text(f"What was run: {runs or 'nothing'}. Status: {summary['status']}."),
        *([] if complete else [Text("The study is not complete.", "bad")]),
        Text(
            "Each method learns the same sequence of tasks, one after the other, judged by its accuracy on each "
            "batch before it learns from it (its loss, where targets are numbers). The same seed means the same "
            "data, order and initial weights for every method.",
            "note",
        ),
    ]


def _stream_section(stream: Mapping[str, Any], results: Sequence[MethodResult]) -> list[Block]:
    forgotten = forgetting_rows(stream)
    measured = "online loss" if judged_by_loss(stream) else "online accuracy in per cent"
    blocks: list[Block] = [
        Heading(heading(stream)),
        Grid(
            *score_table(stream),
            best=best(stream),
            caption=f"{heading(stream)}: {measured}, 95 % bootstrap intervals over seeds in brackets.",
            label=f"{stream['name']}:scores",
        ),
        *(
            [
                Grid(
                    ["method", *FORGETTING.values()],
                    forgotten,
                    label=f"{stream['name']}:forgetting",
                    caption=(
                        f"{heading(stream)}: accuracy on the test examples of all tasks, in per cent and points."
                    ),
                )
            ]
            if forgotten
            else []
        ),
        Heading("What the numbers say", 3),
        Points(_said(stream, results)),
    ]
    judged = stream.get("comparisons") or {"methods": []}
    if judged["methods"]:
        seeds = next(len(m["seeds"]) for m in stream["methods"] if m["name"] == judged["reference"])
        blocks += _comparison_blocks(judged, pairs=seeds, stream=stream, unit="seed by seed")
    return blocks


def _said(stream: Mapping[str, Any], results: Sequence[MethodResult]) -> list[str]:
    if results:
        return findings(stream, results)
    missing = "The results by task are not stored here, so that methods are not compared with each other."
    return [missing, *findings(stream)]


def score_table(stream: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of scores; what no method has is left out."""
    loss = judged_by_loss(stream)
    judged = stream.get("comparisons") or {"reference": None, "methods": []}
    p_values = {method["name"]: p_value(method["p_holm"]) for method in judged["methods"]}
    shown = []
    for method, cells in zip(stream["methods"], rows(stream), strict=True):
        own = dict(zip(columns(stream), cells, strict=True))
        middle = spread(method.get("interquartile_mean", NO_INTERVAL), loss=loss)
        slope = method.get("plasticity_slope", NO_INTERVAL)
        extra = {
            INTERQUARTILE: middle,
            SLOPE: spread(slope, signed=True, loss=True) if loss else _points_per_task(slope),
            f"{P} against {judged['reference']}": p_values.get(method["name"], "-"),
        }
        names = list(own)
        order = [*names[:3], INTERQUARTILE, *names[3:6], SLOPE, f"{P} against {judged['reference']}", *names[6:]]
        shown.append({name: {**own, **extra}[name] for name in order})
    if not shown:
        return columns(stream), []
    added = [INTERQUARTILE, SLOPE, f"{P} against {judged['reference']}"]
    empty = {name for name in added if all(row[name] == "-" for row in shown)}
    header = [name for name in shown[0] if name not in empty]
    return header, [[row[name] for name in header] for row in shown]


def _points_per_task(slope: Mapping[str, float | None]) -> str:
    said = {key: "-" if value is None else format(100 * value, "+.3f") for key, value in slope.items()}
    return said["mean"] if said["low"] == "-" else f"{said['mean']} [{said['low']}, {said['high']}]"


def p_value(p: float | None) -> str:
    """A p value with the digits that matter, "-" for None.

    Example:
        >>> p_value(0.0078125), p_value(0.21), p_value(1.0), p_value(0.00001), p_value(None)
        ('.008', '.21', '1', '<.001', '-')
    """
    if p is None:
        return "-"
    if p < 0.001:
        return "<.001"
    text = format(p, ".3f" if p < 0.0995 else ".2f")
    return "1" if float(text) == 1 else text.removeprefix("0")


def _comparison_blocks(
    judged: Mapping[str, Any], *, pairs: int, stream: Mapping[str, Any] | None, unit: str
) -> list[Block]:
    """One method against each other: differences, tests, and what the tests can tell at all."""
    reference = judged["reference"]
    loss = stream is not None and judged_by_loss(stream)
    where = heading(stream) if stream is not None else "all streams"
    others = [method for method in judged["methods"] if method["name"] != reference]
    tested = [method for method in others if method["p"] is not None]
    table = Grid(
        ["method", "difference", "p", P, "P(better) %"],
        [
            [
                method["name"],
                spread(method["difference"], signed=True, loss=loss),
                p_value(method["p"]),
                p_value(method["p_holm"]),
                spread(method["improvement"]),
            ]
            for method in others
        ],
        caption=(
            f"{where}: {reference} minus each other method in {'online loss' if loss else 'points'}; paired "
            f"permutation tests, corrected by Holm; probability that a run of {reference} is the better one."
        ),
        label=f"{stream['name'] if stream is not None else 'all'}:comparisons",
    )
    blocks: list[Block] = [
        Heading(f"{reference} minus each other method", 3),
        Text(
            f"{'Online loss' if loss else 'Online accuracy, in percentage points,'} over all tasks, differences "
            f"taken {unit}, with the 95 % bootstrap interval over seeds; p of the paired permutation test; p "
            f"corrected by Holm for {len(tested)} comparisons; the probability that a run of {reference} is "
            "better than one of the other method, with its interval. A reference that was chosen because it is "
            "the best of its kind in these very numbers is favoured a little.",
            "note",
        ),
        table,
    ]
    if tested:
        least = smallest_p(pairs, len(tested))
        text = (
            f"{pairs} pairs of runs allow no p below {p_value(smallest_p(pairs))}, and no corrected p below "
            f"{p_value(least)} with {len(tested)} comparisons."
        )
        if least >= LEVEL:
            text += (
                f" So no difference can count as significant at {LEVEL:g} here, however large it is; that takes "
                f"{pairs_needed(len(tested), LEVEL)} pairs."
            )
        blocks.append(Text(text, "note"))
    return blocks


def _all_streams(summary: Mapping[str, Any]) -> list[Block]:
    """The methods over all streams together."""
    judged = summary.get("all_streams")
    if judged is None:
        return []
    seeds = next(
        len(method["seeds"])
        for stream in summary["streams"]
        for method in stream["methods"]
        if stream["name"] == judged["streams"][0] and method["name"] == judged["reference"]
    )
    means = {method["name"]: method["mean"] for method in judged["methods"]}
    return [
        Heading("All streams together"),
        Text(
            f"Over {', '.join(judged['streams'])}, each counting the same, {seeds} seeds each. Accuracies are "
            "taken as they are: a point on an easy stream counts like one on a hard stream.",
            "note",
        ),
        Grid(
            ["method", "mean %", INTERQUARTILE],
            [
                [method["name"], number(method["mean"]), spread(method["interquartile_mean"])]
                for method in judged["methods"]
            ],
            best=max(means, key=means.__getitem__),
            caption="All streams: online accuracy in per cent, 95 % stratified bootstrap intervals in brackets.",
            label="all:scores",
        ),
        *_comparison_blocks(
            judged,
            pairs=seeds * len(judged["streams"]),
            stream=None,
            unit="by seed and stream",
        ),
    ]


def _sensitivity(
    directory: Path, summary: Mapping[str, Any], searches: Mapping[str, Sequence[MethodTrials]]
) -> list[Block]:
    """How the searches say that scores depend on settings."""
    blocks: list[Block] = []
    for stream in summary["streams"]:
        found = [method for method in searches.get(stream["name"], ()) if method.settings]
        if not found:
            continue
        path = directory / "sensitivity" / f"{file_name(stream['name'])}.png"
        loss = found[0].best < 0
        near = f"within {LOSS_FACTOR:g} times the best loss" if loss else "within 1 point of the best"
        title = (
            f"{stream['name']}, of the search: {'loss' if loss else 'online accuracy %'} of each trial against "
            f"each setting. Filled and shaded: {near}; triangles: far below."
        )
        write_figure(path, sensitivity_figure(found, title=title))
        shares = [
            [
                setting.variant if at == 0 or setting.variant != method.settings[at - 1].variant else "",
                setting.setting,
                f"{min(setting.values):g} to {max(setting.values):g}",
                _reached(setting),
                f"{100 * setting.share:.0f}",
            ]
            for method in found
            for at, setting in enumerate(method.settings)
        ]
        tried = [
            [method.method, number(abs(method.best), loss=method.best < 0), f"{method.good} of {method.tried}"]
            for method in found
            if math.isfinite(method.best)
        ]
        blocks += [
            Heading(f"Sensitivity to settings: {stream['name']}"),
            Text(
                "From the trials of the search, on other seeds. Of each setting: between which values there "
                f"were trials {near} of the method, whatever the other settings were in them, and which share of "
                "the tried range that is (on a logarithmic scale where the values span more than a factor of "
                "10). A small share is a setting that must be met. With few trials a share is too small rather "
                "than too large. The first table counts such trials among those that are spread evenly over the "
                "ranges.",
                "note",
            ),
            Grid(
                ["method", "best trial", f"trials {near}"],
                tried,
                caption=f"{stream['name']}: best trial of the search, how many evenly spread trials came near.",
                label=f"{stream['name']}:search",
            ),
            Grid(
                ["method", "setting", "tried", "good", "share %"],
                shares,
                caption=f"{stream['name']}: range of each setting in which trials came {near}.",
                label=f"{stream['name']}:sensitivity",
            ),
            Picture(path, f"Trials of the search on {stream['name']}: score against each setting."),
        ]
    return blocks


def _reached(setting: Sensitivity) -> str:
    """The values of good trials, from the smallest to the largest."""
    good = sorted({value for value, is_good in zip(setting.values, setting.good, strict=True) if is_good})
    if not good:
        return "none"
    if setting.scale == "choice" or len(good) == 1:
        return ", ".join(f"{value:g}" for value in good)
    return f"{good[0]:g} to {good[-1]:g}"


def _reading() -> list[Block]:
    terms = {
        **COLUMNS,
        **_MORE_COLUMNS,
        **{
            name.replace("_", " "): text
            for name, text in METRICS.items()
            if name not in ("online_accuracy", "loss")
        },
    }
    return [
        Terms(terms),
        Text(
            "Told of switches: some methods act when a new task begins and need someone to announce it; the "
            "others see one unbroken stream of examples. The first kind has an easier problem, so compare within "
            "a kind first."
        ),
        Text(
            "The intervals are over seeds only: they say how much the mean would move with other seeds of the "
            "same streams, networks and settings, not how a method would do on other data. With fewer than about "
            "10 seeds a percentile bootstrap interval is too narrow (with 5, a nominal 95 % interval covers in "
            "about 85 % of cases), and among many comparisons some will lie beside 0 by chance. With one seed "
            "there is no interval, and nothing is claimed."
        ),
        Text(
            "Interquartile means, performance profiles and probabilities of improvement are those of Agarwal et "
            "al., Deep reinforcement learning at the edge of the statistical precipice (NeurIPS 2021). p values "
            "are two-sided, of the exchange of labels within pairs, exact up to 13 pairs, corrected by Holm "
            "(1979) within one table."
        ),
    ]
