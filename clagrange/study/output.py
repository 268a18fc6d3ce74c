"""Everything that a study shows, written from its stored results."""

import json
from collections.abc import Sequence

from rich.console import Console

from clagrange.study.results import MethodResult
from clagrange.study.runner import Folder, stored_results
from clagrange.study.settings import Study


def write_output(
    study: Study,
    folder: Folder,
    *,
    status: str | None = None,
    results: Sequence[MethodResult] | None = None,
    console: Console | None = None,
    markdown: bool = False,
) -> None:
    """Write summary.json, pictures, TensorBoard events and report.html, and print the table.

    Args:
        study: what was run.
        folder: where its results are.
        status: "complete" or "interrupted", of a run that has just ended. None for stored results: then it is
            read off what is there, and the environment is the one that was stored.
        results: the finished runs; default: read from the folder.
        console: where to print the table; None for nowhere.
        markdown: print the table in Markdown.
    """
    from clagrange.study.events import write_events
    from clagrange.study.plots import write_plots
    from clagrange.study.report import write_report
    from clagrange.study.summary import environment, summarize, table, write_summary
    from clagrange.study.summary import markdown as as_markdown

    found = list(stored_results(study, folder) if results is None else results)
    summary = summarize(
        found,
        status=status or ("complete" if len(found) == len(study.runs()) else "interrupted"),
        environment=(status is None and _stored_environment(folder)) or environment(),
        planned={name: list(stream.methods) for name, stream in study.streams.items()},
        tasks={name: stream.settings["tasks"] for name, stream in study.streams.items()},
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
