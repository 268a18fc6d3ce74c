"""A study as one self-contained page: `report.html`."""

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from clagrange.study.comparison import OWN_METHODS, best, judged_by_loss, own_best
from clagrange.study.files import replacing
from clagrange.study.plots import write_plots
from clagrange.study.results import METRICS, MethodResult
from clagrange.study.statistics import Interval, paired_difference
from clagrange.study.summary import (
    COLUMNS,
    FORGETTING,
    columns,
    forgetting_rows,
    heading,
    number,
    rows,
    spread,
)

_PICTURES = {
    "accuracy.png": "Online accuracy (the loss, where targets are numbers) over the tasks of each stream.",
    "plasticity.png": "Dead and dormant units, effective rank, weights and variances over the tasks.",
}
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 68rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.8rem; margin-bottom: 0.2rem; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd; }
h3 { margin-bottom: 0.4rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.7rem; text-align: right; border-bottom: 1px solid #e6e6e6; white-space: nowrap; }
th { border-bottom: 2px solid #999; vertical-align: bottom; white-space: normal; }
th:first-child, td:first-child { text-align: left; }
tr.best td { background: #eef5ff; } tr.best td:first-child, tr.best td:nth-child(3) { font-weight: bold; }
.bad { color: #a11; font-weight: bold; }
img { width: 100%; height: auto; } figure { margin: 1.5rem 0; } figcaption { color: #555; font-size: 0.9rem; }
dt { font-weight: bold; float: left; clear: left; margin-right: 0.5rem; } dd { margin: 0 0 0.3rem 0; }
pre { background: #f6f6f6; padding: 1rem; overflow-x: auto; font-size: 0.85rem; }
.note { color: #555; font-size: 0.95rem; }
"""


def write_report(
    directory: Path, summary: Mapping[str, Any], results: Sequence[MethodResult], config_text: str
) -> Path:
    """Write ``directory/report.html`` and return its path.

    The page needs no other file: it embeds ``accuracy.png`` and ``plasticity.png`` of the directory, which are
    drawn first where one is missing.

    Args:
        directory: the study's folder.
        summary: what `clagrange.study.summary.summarize` gave for the results.
        results: in the order of the study.
        config_text: the resolved configuration.
    """
    if any(not (directory / name).exists() for name in _PICTURES):
        write_plots(directory, results)
    parts = [
        "<h1>Continual learning: a comparison of methods</h1>",
        _introduction(summary),
        *(_stream_section(stream, results) for stream in summary["streams"]),
        _pictures(directory) if results else "",
        "<h2>How to read this</h2>",
        _reading(),
        "<h2>Environment</h2>",
        _table(["what", "value"], ([key, str(value)] for key, value in summary["environment"].items())),
        "<h2>Configuration</h2>",
        f"<pre>{html.escape(config_text)}</pre>",
    ]
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>clagrange: study report</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body>\n</html>\n"
    )
    path = directory / "report.html"
    with replacing(path) as partial:
        partial.write_text(page, encoding="utf-8")
    return path


def comparisons(stream: Mapping[str, Any], results: Sequence[MethodResult]) -> dict[str, Interval | None]:
    """Paired difference of the best Euler-Lagrange method to each other finished method of a stream.

    Returns:
        For each other method the interval of (best Euler-Lagrange method − method) in what the stream is judged
        by; None where the two were not run on the same seeds. Empty if no Euler-Lagrange method is finished.
    """
    own = own_best(stream)
    finished = {method["name"] for method in stream["methods"] if method["seeds"]}
    of_stream = {
        result.method: result
        for result in results
        if result.stream == stream["name"] and result.method in finished
    }
    if own is None or own not in of_stream:
        return {}
    return {
        name: paired_difference(of_stream[own], other) if other.seeds == of_stream[own].seeds else None
        for name, other in of_stream.items()
        if name != own
    }


def findings(stream: Mapping[str, Any], results: Sequence[MethodResult]) -> list[str]:
    """What the numbers of a stream say, in sentences: nothing is claimed where an interval contains 0."""
    finished = [method for method in stream["methods"] if method["seeds"]]
    if not finished:
        return ["No method is finished."]
    loss = judged_by_loss(stream)
    sentences = []
    changes = {method["name"]: method["change"] for method in finished}
    worse, better = ("above", "below") if loss else ("below", "above")
    lose = [name for name, change in changes.items() if _sign(change) == worse]
    gain = [name for name, change in changes.items() if _sign(change) == better]
    neither = [name for name, change in changes.items() if _sign(change) == "undecided"]
    unknown = [name for name, change in changes.items() if _sign(change) is None]
    said = {
        name: f"{name} ({number(change['mean'], signed=True, loss=loss)})" for name, change in changes.items()
    }
    unit = "of the loss" if loss else "(in points)"
    if lose:
        sentences.append(
            f"Lose plasticity; the change from the first to the last tenth {unit} lies {worse} 0: "
            f"{_listed(said, lose)}."
        )
    elif neither or gain:
        sentences.append(f"No method shows a loss of plasticity: no interval of the change lies {worse} 0.")
    if neither:
        sentences.append(f"Show no change that the seeds can tell from 0: {_listed(said, neither)}.")
    if gain:
        sentences.append(f"Become better; the interval of the change lies {better} 0: {_listed(said, gain)}.")
    if unknown:
        sentences.append(
            f"Without an interval, so nothing is claimed about their change: {_listed(said, unknown)}."
        )
    sentences += _findings_about_own(stream, results)
    diverged = [f"{m['name']} ({m['diverged']} of {len(m['seeds'])} seeds)" for m in finished if m["diverged"]]
    if diverged:
        sentences.append(
            f"Diverged: {', '.join(diverged)}. Their numbers include the diverged seeds; if one has no number, "
            f"neither has the method."
        )
    unfinished = [method["name"] for method in stream["methods"] if not method["seeds"]]
    if unfinished:
        sentences.append(f"Not finished, so not judged: {', '.join(unfinished)}.")
    return sentences


def _findings_about_own(stream: Mapping[str, Any], results: Sequence[MethodResult]) -> list[str]:
    own, against = own_best(stream), comparisons(stream, results)
    if not any(method["name"].startswith(OWN_METHODS) for method in stream["methods"]):
        return []
    if own is None:
        return ["No Euler-Lagrange method is finished, so there is nothing to compare it with."]
    if not against:
        return [f"{own} is alone, so there is nothing to compare it with."]
    loss = judged_by_loss(stream)
    said = {
        name: f"{name} ({number(difference.mean, signed=True, loss=loss)})" if difference else name
        for name, difference in against.items()
    }
    measured = "in online loss" if loss else "in online accuracy, in points"
    signs = {name: _sign(difference.as_dict()) if difference else None for name, difference in against.items()}
    sentences = []
    for sign, words in {
        "above": "is above",
        "below": "is below",
        "undecided": "cannot be told apart, with these seeds, from",
    }.items():
        names = [name for name, of_name in signs.items() if of_name == sign]
        if names:
            sentences.append(f"{own} {words} {_listed(said, names)} {measured}, paired by seed.")
    unknown = [name for name, sign in signs.items() if sign is None]
    if unknown:
        sentences.append(
            f"Without an interval, so {own} is not judged against them: {_listed(said, unknown)} "
            f"(an interval needs two seeds at least, the same for both methods, all with finite numbers)."
        )
    return sentences


def _sign(of: Mapping[str, float | None]) -> str | None:
    """Where the interval lies: above 0, below 0, undecided; None without an interval."""
    if of["low"] is None or of["high"] is None:
        return None
    return "above" if of["low"] > 0 else "below" if of["high"] < 0 else "undecided"


def _listed(said: Mapping[str, str], names: Sequence[str]) -> str:
    return ", ".join(said[name] for name in names)


def _introduction(summary: Mapping[str, Any]) -> str:
    runs = "; ".join(f"{heading(stream)}, {len(stream['methods'])} methods" for stream in summary["streams"])
    status = summary["status"]
    warning = "" if status == "complete" else ' <span class="bad">The study is not complete.</span>'
    return (
        f"<p>What was run: {html.escape(runs or 'nothing')}. Status: {html.escape(status)}.{warning}</p>\n"
        '<p class="note">Each method learns the same sequence of tasks, one after the other, judged by its '
        "accuracy on each batch before it learns from it (its loss, where targets are numbers). The same seed "
        "means the same data, order and initial weights for every method.</p>"
    )


def _stream_section(stream: Mapping[str, Any], results: Sequence[MethodResult]) -> str:
    winner = best(stream)
    parts = [
        f"<h2>{html.escape(heading(stream))}</h2>",
        _table(columns(stream), rows(stream), winner),
        _table(["method", *FORGETTING.values()], forgetting_rows(stream)) if forgetting_rows(stream) else "",
        "<h3>What the numbers say</h3>",
        "<ul>" + "".join(f"<li>{html.escape(text)}</li>" for text in findings(stream, results)) + "</ul>",
    ]
    own, against = own_best(stream), comparisons(stream, results)
    loss = judged_by_loss(stream)
    if own is not None and against:
        cells = (
            [name, "not paired" if difference is None else spread(difference.as_dict(), signed=True, loss=loss)]
            for name, difference in against.items()
        )
        parts += [
            f"<h3>{html.escape(own)} minus each other method</h3>",
            f'<p class="note">{"Online loss" if loss else "Online accuracy, in percentage points,"} over all '
            "tasks, differences taken seed by seed, with the 95 % bootstrap interval over seeds. "
            f"{html.escape(own)} is the Euler-Lagrange method with the best mean in this very table, which "
            "favours it a little if there are several.</p>",
            _table(["method", "difference"], cells),
        ]
    return "\n".join(parts)


def _pictures(directory: Path) -> str:
    figures = []
    for name, caption in _PICTURES.items():
        data = base64.b64encode((directory / name).read_bytes()).decode("ascii")
        figures.append(
            f'<figure><img alt="{html.escape(caption)}" src="data:image/png;base64,{data}">'
            f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        )
    return "\n".join(["<h2>Over the tasks</h2>", *figures])


def _reading() -> str:
    terms = {
        **COLUMNS,
        **{
            name.replace("_", " "): text
            for name, text in METRICS.items()
            if name not in ("online_accuracy", "loss")
        },
    }
    listed = "\n".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>" for name, text in terms.items()
    )
    return (
        f"<dl>{listed}</dl>\n"
        "<p>Told of switches: some methods act when a new task begins and need someone to announce it; the "
        "others see one unbroken stream of examples. The first kind has an easier problem, so compare within a "
        "kind first.</p>\n"
        "<p>The intervals are over seeds only: they say how much the mean would move with other seeds of the "
        "same streams, networks and settings, not how a method would do on other data. With fewer than about 10 "
        "seeds a percentile bootstrap interval is too narrow (with 5, a nominal 95 % interval covers in "
        "about 85 % of cases), and among many comparisons some will lie beside 0 by chance. With one seed there "
        "is no interval, and nothing is claimed.</p>"
    )


def _table(header: Sequence[str], body: Iterable[Sequence[str]], winner: str | None = None) -> str:
    """An HTML table with every cell escaped; the row that begins with ``winner`` stands out."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    lines = [
        ('<tr class="best">' if winner is not None and cells[0] == winner else "<tr>")
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        + "</tr>"
        for cells in body
    ]
    return f'<div class="scroll"><table>\n<tr>{head}</tr>\n' + "\n".join(lines) + "\n</table></div>"
