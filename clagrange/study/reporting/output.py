"""Everything that a study shows, written from its stored results."""

import json
from collections.abc import Sequence
from pathlib import Path

import yaml
from rich.console import Console

from clagrange._checks import did_you_mean
from clagrange.study.problems import SettingsError
from clagrange.study.results import MethodResult
from clagrange.study.settings import STREAMS
from clagrange.study.store import Folder, stored_results
from clagrange.tasks import TaskStream


def write_output(
    folder: Folder,
    *,
    status: str | None = None,
    results: Sequence[MethodResult] | None = None,
    console: Console | None = None,
    markdown: bool = False,
    reference: str | None = None,
    searches: Sequence[Path] = (),
) -> None:
    """Write summary.json, pictures, TensorBoard events and the report, and print the table.

    Of a folder that holds no study, but its summary.json, only the report is written.

    Args:
        folder: of a study.
        status: "complete" or "interrupted", of a run that has just ended. None for stored results: then it is
            read off what is there, and the environment is the one that was stored.
        results: the finished runs; default: read from the folder.
        console: where to print the table; None for nowhere.
        markdown: print the table in Markdown.
        reference: the method that the others are compared with.
        searches: files of `clagrange tune`, whose trials show how sensitive methods are.

    Raises:
        SettingsError: if no stream has a method of the name ``reference``.
        FileProblem: if a file is damaged.
    """
    from clagrange.study.reporting.events import write_events
    from clagrange.study.reporting.plots import write_plots
    from clagrange.study.reporting.report import write_report
    from clagrange.study.reporting.sensitivity import read_searches
    from clagrange.study.reporting.summary import markdown as as_markdown
    from clagrange.study.reporting.summary import read_summary, summarize, table, write_summary

    found_searches = read_searches(searches)
    if folder.config.is_file():
        config_text = folder.config.read_text()
        streams = yaml.safe_load(config_text)["streams"]
        planned = {name: list(body["methods"]) for name, body in streams.items()}
        known = list(dict.fromkeys(method for methods in planned.values() for method in methods))
        if reference is not None and reference not in known:
            raise SettingsError(
                f"reference: expected one of {', '.join(known)}; got {reference!r}"
                f"{did_you_mean(reference, known)}"
            )
        runs = [(name, method) for name, methods in planned.items() for method in methods]
        found = list(stored_results(folder, runs) if results is None else results)
        summary = summarize(
            found,
            status=status or ("complete" if len(found) == len(runs) else "interrupted"),
            environment=(status is None and _stored_environment(folder)) or _environment(found),
            planned=planned,
            tasks={name: body["stream"]["tasks"] for name, body in streams.items()},
            equally_hard={
                name: STREAMS.get(body["stream"]["kind"], TaskStream).equally_hard
                for name, body in streams.items()
            },
            thresholds={name: body["threshold"] for name, body in streams.items() if "threshold" in body},
            reference=reference,
        )
        write_summary(folder.path, summary)
        write_plots(folder.path, found)
        write_events(folder.path / "tensorboard", found)
    else:
        summary, found, config_text = read_summary(folder.path), [], ""
        if reference is not None:
            raise SettingsError(
                f"reference: expected results by task to compare, {folder.path} has a summary only"
            )
    write_report(folder.path, summary, found, config_text, found_searches)
    if console is None:
        return
    if markdown:
        print(as_markdown(summary))
    else:
        table(summary, console)
        console.print(f"Report: {folder.path / 'report.html'}", markup=False, highlight=False, soft_wrap=True)


def _environment(results: Sequence[MethodResult]) -> dict[str, object]:
    """This machine, with the device and the threads of the runs."""
    from clagrange.study.executors import one_thread
    from clagrange.study.machine import environment

    devices = {(result.origin or {}).get("settings", {}).get("device", "cpu") for result in results}
    with one_thread():
        return environment("cuda" if "cuda" in devices else "cpu")


def _stored_environment(folder: Folder) -> dict[str, object] | None:
    """Where the study ran, if it was summarised before."""
    try:
        stored: dict[str, object] = json.loads((folder.path / "summary.json").read_text())["environment"]
    except (OSError, ValueError, KeyError):
        return None
    return stored
