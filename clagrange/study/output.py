"""Everything that a study shows, written from its stored results."""

import json
from collections.abc import Sequence

import yaml
from rich.console import Console

from clagrange.study.results import MethodResult
from clagrange.study.runner import Folder, stored_results
from clagrange.tasks import TaskStream


def write_output(
    folder: Folder,
    *,
    status: str | None = None,
    results: Sequence[MethodResult] | None = None,
    console: Console | None = None,
    markdown: bool = False,
) -> None:
    """Write summary.json, pictures, TensorBoard events and report.html, and print the table.

    Args:
        folder: of a study.
        status: "complete" or "interrupted", of a run that has just ended. None for stored results: then it is
            read off what is there, and the environment is the one that was stored.
        results: the finished runs; default: read from the folder.
        console: where to print the table; None for nowhere.
        markdown: print the table in Markdown.
    """
    from clagrange.study.events import write_events
    from clagrange.study.plots import write_plots
    from clagrange.study.report import write_report
    from clagrange.study.settings import STREAMS
    from clagrange.study.summary import environment, summarize, table, write_summary
    from clagrange.study.summary import markdown as as_markdown

    streams = yaml.safe_load(folder.config.read_text())["streams"]
    planned = {name: list(body["methods"]) for name, body in streams.items()}
    runs = [(name, method) for name, methods in planned.items() for method in methods]
    found = list(stored_results(folder, runs) if results is None else results)
    summary = summarize(
        found,
        status=status or ("complete" if len(found) == len(runs) else "interrupted"),
        environment=(status is None and _stored_environment(folder)) or environment(),
        planned=planned,
        tasks={name: body["stream"]["tasks"] for name, body in streams.items()},
        equally_hard={
            name: STREAMS.get(body["stream"]["kind"], TaskStream).equally_hard for name, body in streams.items()
        },
        thresholds={name: body["threshold"] for name, body in streams.items() if "threshold" in body},
    )
    write_summary(folder.path, summary)
    write_plots(folder.path, found)
    write_events(folder.path / "tensorboard", found)
    write_report(folder.path, summary, found, folder.config.read_text())
    if console is None:
        return
    if markdown:
        print(as_markdown(summary))
    else:
        table(summary, console)
        console.print(f"Report: {folder.path / 'report.html'}", highlight=False, soft_wrap=True)


def _stored_environment(folder: Folder) -> dict[str, object] | None:
    """Where the study ran, if it was summarised before."""
    try:
        stored: dict[str, object] = json.loads((folder.path / "summary.json").read_text())["environment"]
    except (OSError, ValueError, KeyError):
        return None
    return stored
