"""The command line: compare, report, tune, list, show, figure, verify."""

import contextlib
import dataclasses
import importlib.metadata
import inspect
import json
import math
import re
import sys
import time
from argparse import ArgumentError
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells expect it."""


class _Parser(ArgumentParser):
    """A parser that raises on bad arguments, so that one line can say what is wrong."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **{"exit_on_error": False, **settings})


def _parser() -> ArgumentParser:
    parser = _Parser(prog="clagrange", description="Continual learning with Gaussian weights.")
    parser.add_argument("--version", action="version", version=importlib.metadata.version("clagrange"))
    commands = parser.add_subcommands(dest="command")

    compare = _Parser(description="Run methods × seeds over streams; table, plots, report and summary.json.")
    compare.add_argument("config", type=str, help="a study file, or the name of one in the package: demo")
    compare.add_argument(
        "overrides",
        type=str,
        nargs="*",
        help="key=value, as in tasks=10 or sgd.lr=0.1: the end of a setting's path",
    )
    compare.add_argument("--out", type=str, default=None, help="folder for the results; default runs/CONFIG")
    compare.add_argument("--methods", type=str, default=None, help="names to keep, separated by commas")
    compare.add_argument("--streams", type=str, default=None, help="names to keep, separated by commas")
    compare.add_argument("--workers", type=int, default=None, help="processes; default one for each core")
    compare.add_argument("--resume", action="store_true", help="go on with the study in the folder")
    compare.add_argument("--overwrite", action="store_true", help="replace the study in the folder")
    compare.add_argument("--fresh", action="store_true", help="go on, but run again what another version did")
    compare.add_argument("--executor", type=str, default="processes", help="processes (of this machine) or ray")
    compare.add_argument(
        "--address", type=str, default=None, help="of a Ray cluster; default: this machine alone"
    )
    compare.add_argument("--device", type=str, default="cpu", help="cpu; or cuda, with one process for each GPU")
    commands.add_subcommand("compare", compare, help="run a study")

    report = _Parser(description="Write table, plots and report again from stored results.")
    report.add_argument("folder", type=str, help="the folder of a study, or the name of one in runs/")
    report.add_argument("--reference", type=str, default=None, help="compare the other methods with this one")
    report.add_argument(
        "--search", type=str, default=None, help="files of tune, separated by commas: sensitivity"
    )
    report.add_argument("--markdown", action="store_true", help="print the table in Markdown")
    commands.add_subcommand("report", report, help="the report of a study again")

    tune = _Parser(
        description="Search for good settings, with the same number of trials for every method and on other "
        "seeds than the winners are compared on. The search file names a sampler: halton (the default: few trials"
        " without gaps; scrambled Halton sequence of scipy), random (independent), grid (every combination, for "
        "one or two settings), optuna, {optuna: gp} or {optuna: cmaes} (each round learns from the trials before "
        "it; Akiba et al. 2019; needs pip install 'clagrange[optuna]')."
    )
    tune.add_argument("config", type=str, help="a search file, or the name of one in the package: demo_search")
    tune.add_argument("--out", type=str, required=True, help="JSON file for all trials; goes on where it stopped")
    tune.add_argument(
        "--study", type=str, default=None, help="study file for the winners; default beside OUT: OUT_winners.yaml"
    )
    tune.add_argument("--device", type=str, default="cpu", help="cpu or cuda")
    commands.add_subcommand("tune", tune, help="search for good settings")

    listing = _Parser(description="What study files can name.")
    listing.add_argument("what", type=str, help="methods, streams or metrics")
    listing.add_argument("--json", action="store_true", help="for programs")
    commands.add_subcommand("list", listing, help="methods, streams or metrics")

    show = _Parser(description="Draw samples of the first tasks of a stream, with their labels.")
    show.add_argument("stream", type=str, help="a stream, as clagrange list streams names it")
    show.add_argument("settings", type=str, nargs="*", help="key=value, as in source=cifar10 or drift=abrupt")
    show.add_argument("--preset", type=str, default=None, help="start from a preset of the stream")
    show.add_argument("--tasks", type=int, default=5, help="how many tasks to draw")
    show.add_argument("--seed", type=int, default=0, help="of the stream")
    show.add_argument("--out", type=str, required=True, help="PNG file")
    commands.add_subcommand("show", show, help="see what a stream shows")

    figure = _Parser(description="Draw a figure: PNG, SVG and its numbers in numbers.json.")
    figure.add_argument("number", type=str, help="1, 2 or 3 (the paper's) or 6 (a task switch)")
    figure.add_argument("--out", type=str, default="runs/figures", help="folder for the files")
    commands.add_subcommand("figure", figure, help="the paper's figures")

    verify = _Parser(description="Check closed forms, conservation laws, exact gradients and samplers here.")
    verify.add_argument("--json", action="store_true", help="for programs")
    verify.add_argument("--device", type=str, default="cpu", help="where to compute: cpu, cuda, …")
    verify.add_argument("--dtype", type=str, default="float64", help="float64 or float32")
    commands.add_subcommand("verify", verify, help="check the mathematics on this machine")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; bad input gives a line on standard error for each problem and exit code 2."""
    parser = _parser()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments:
        parser.print_help()
        return 2
    try:
        chosen = parser.parse_args(arguments)
    except ArgumentError as error:
        from clagrange._checks import one_line

        remedy = "see clagrange --help"
        if arguments[0] in ("compare", "show") and re.match(r"unrecognized arguments: \w[^ ]*=", str(error)):
            remedy = "key=value goes before the options"
        return _fail(f"{one_line(error)}; {remedy}")
    command: dict[str, Callable[[Namespace, Console], int]] = {
        "compare": _compare,
        "report": _report,
        "tune": _tune,
        "list": _list,
        "show": _show,
        "verify": _verify,
        "figure": _figure,
    }
    from clagrange.study.files import FileProblem
    from clagrange.study.problems import SettingsError

    try:
        return command[chosen.command](chosen[chosen.command], Console())
    except (SettingsError, FileProblem) as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)


def _print(console: Console, line: str) -> None:
    """A line as it is: not broken at the width of the console, which cuts paths and the lines of a log in two."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def _fail(message: str, code: int = 2) -> int:
    for line in message.splitlines():
        print(f"clagrange: {line}", file=sys.stderr)
    return code


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def _compare(chosen: Namespace, console: Console) -> int:
    from clagrange.study.cluster import OnRay, require_ray
    from clagrange.study.problems import SettingsError
    from clagrange.study.reporting.output import write_output
    from clagrange.study.runner import Interrupted, RunsFailed, run_study
    from clagrange.study.settings import load_study
    from clagrange.study.store import Folder

    if chosen.workers is not None and chosen.workers < 1:
        raise SettingsError(f"workers: expected a whole number of at least 1, got {chosen.workers}")
    if chosen.executor not in ("processes", "ray"):
        raise SettingsError(f"executor: expected processes or ray, got {chosen.executor!r}")
    if chosen.executor == "ray":
        require_ray()
    if chosen.address is not None and chosen.executor != "ray":
        raise SettingsError(f"address: expected only with --executor ray, got {chosen.address!r}")
    if chosen.overwrite and (chosen.resume or chosen.fresh):
        raise SettingsError("overwrite: expected without --resume and --fresh, got both; choose one")

    study = load_study(
        chosen.config,
        chosen.overrides,
        methods=_names(chosen.methods),
        streams=_names(chosen.streams),
        left_out=lambda reason: _say(f"left out: {reason}"),
    )
    study = dataclasses.replace(study, device=_study_device(chosen.device))
    folder = Folder(Path(chosen.out or Path("runs") / Path(chosen.config).stem))
    folder.prepare(study, resume=chosen.resume, overwrite=chosen.overwrite, fresh=chosen.fresh, say=_say)
    _print(console, f"{len(study.runs())} runs of {len(study.seeds)} seeds each into {folder.path}")
    try:
        with _progress_bar(console) as show:
            executor = OnRay(study, folder, chosen.address, chosen.workers) if chosen.executor == "ray" else None
            results = run_study(study, folder, workers=chosen.workers, executor=executor, show=show, say=_say)
    except Interrupted as stop:
        with folder.alone():
            write_output(folder, status="interrupted")
        return _fail(f"interrupted; {stop} and kept in {folder.path}; go on with --resume", INTERRUPTED)
    except RunsFailed as error:
        with folder.alone():
            write_output(folder, status="interrupted", console=console)
        return _fail(str(error), 1)
    with folder.alone():
        folder.require(study)
        write_output(folder, status="complete", results=results, console=console)
    return 0


def _study_device(name: str) -> str:
    """The kind of device of a study.

    Raises:
        SettingsError: for another one, or one that this machine does not have.
    """
    import torch

    from clagrange.study.problems import SettingsError

    if name not in ("cpu", "cuda"):
        raise SettingsError(f"device: expected cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise SettingsError("device: expected cpu, got cuda, of which torch finds none on this machine")
    return name


PLAIN_SECONDS = 60.0
"""How often running runs have a line of their own where there is no terminal."""


@contextlib.contextmanager
def _progress_bar(console: Console) -> Iterator[Callable[[Any], None]]:
    """A live line for each run that is under way and one for all; where there is no terminal, plain lines."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    finished: set[tuple[str, str]] = set()
    lines: dict[tuple[str, str], Any] = {}
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[speed]}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        everything = bar.add_task("all runs", total=None, speed="")
        said = time.monotonic()

        def show(progress: Any) -> None:
            nonlocal said
            for job, steps in progress.done.items():
                if job not in finished and steps >= progress.planned[job]:
                    finished.add(job)
                    parts = [f"[{len(finished)}/{len(progress.planned)}] {job[0]}: {job[1]}"]
                    parts += [progress.speed(job)] if job in progress.first else ["stored"]
                    if progress.diverged.get(job):
                        parts.append(f"{progress.diverged[job]} of {progress.replicas} seeds diverged")
                    _print(console, ", ".join(parts))
            running = progress.running
            for job in running:
                if job not in lines:
                    lines[job] = bar.add_task(f"{job[0]}: {job[1]}", total=progress.planned[job], speed="")
                bar.update(lines[job], completed=progress.done[job], speed=progress.speed(job))
            for job in [job for job in lines if job not in running]:
                bar.remove_task(lines.pop(job))
            total, done = sum(progress.planned.values()), sum(progress.done.values())
            bar.update(everything, total=total, completed=done, speed=progress.speed())
            if not console.is_terminal and time.monotonic() - said > PLAIN_SECONDS:
                said = time.monotonic()
                for job in running:
                    share = progress.done[job] / progress.planned[job]
                    line = f"{job[0]}: {job[1]} {share:.0%}, {progress.speed(job)}"
                    _print(console, line)

        yield show


def _report(chosen: Namespace, console: Console) -> int:
    from clagrange.study.problems import SettingsError
    from clagrange.study.reporting.output import write_output
    from clagrange.study.store import Folder

    found = [path for path in (Path(chosen.folder), Path("runs") / chosen.folder) if path.is_dir()]
    folder = Folder(found[0] if found else Path(chosen.folder))
    if not folder.config.is_file() and not (folder.path / "summary.json").is_file():
        raise SettingsError(
            f"folder: expected the folder of a study (with config.yaml or summary.json), got {chosen.folder!r}"
        )
    searches = [Path(name) for name in _names(chosen.search) or ()]
    write_output(folder, console=console, markdown=chosen.markdown, reference=chosen.reference, searches=searches)
    return 0


def _tune(chosen: Namespace, console: Console) -> int:
    import torch

    from clagrange.study.files import replacing, require_writable
    from clagrange.study.problems import SettingsError
    from clagrange.study.search import MethodsFailed, run_search, study_of_winners
    from clagrange.study.search_file import load_search

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    config, out = Path(chosen.config), Path(chosen.out)
    winners = Path(chosen.study or out.with_name(f"{out.stem}_winners.yaml"))
    taken = {config.resolve()}
    for name, path in (("out", out), ("study", winners)):
        if path.resolve() in taken:
            raise SettingsError(f"{name}: expected a file of its own, got {path}; choose another")
        taken.add(path.resolve())
    device = _study_device(chosen.device)
    search = load_search(chosen.config, left_out=lambda reason: _say(f"left out: {reason}"))
    require_writable(winners.parent)
    failed: str | None = None
    try:
        report = run_search(search, out, lambda line: _print(console, line), device)
    except MethodsFailed as error:
        report, failed = error.report, str(error)
    if any(body["methods"] for body in report["streams"].values()):
        with replacing(winners) as partial:
            partial.write_text(study_of_winners(search, report), encoding="utf-8")
        _print(console, f"winners: {winners}")
    return 0 if failed is None else _fail(failed, 1)


def _say(line: str) -> None:
    print(f"clagrange: {line}", file=sys.stderr)


def _list(chosen: Namespace, console: Console) -> int:
    from rich.markup import escape

    from clagrange._checks import did_you_mean
    from clagrange.metrics.registry import listing
    from clagrange.study.methods import METHODS
    from clagrange.study.problems import SettingsError
    from clagrange.study.results import logged
    from clagrange.study.settings import STREAMS

    entries: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "methods": lambda: [_describe(name, kind) for name, kind in METHODS.items()],
        "streams": lambda: [
            {**_describe(name, kind), "presets": {key: preset.written for key, preset in kind.PRESETS.items()}}
            for name, kind in STREAMS.items()
        ],
        "metrics": lambda: [{**entry, "logged": logged(entry["name"])} for entry in listing()],
    }
    if chosen.what not in entries:
        raise SettingsError(
            f"list: expected one of {', '.join(entries)}; got {chosen.what!r}{did_you_mean(chosen.what, entries)}"
        )
    found = entries[chosen.what]()
    if chosen.json:
        print(json.dumps(found, indent=1))
        return 0
    for entry in found:
        console.print(f"[bold]{entry['name']}[/bold]  {escape(entry['summary'])}", highlight=False)
        for note in ("source", "logged"):
            if entry.get(note):
                console.print(f"    {entry[note]}", highlight=False, style="dim", markup=False)
        if entry.get("parameters"):
            defaults = ", ".join(f"{name}={_yaml(value)}" for name, value in entry["parameters"].items())
            console.print(f"    {defaults}", highlight=False, markup=False)
        if entry.get("extra"):
            console.print(f"    needs pip install 'clagrange[{entry['extra']}]'", highlight=False, markup=False)
        for name, preset in entry.get("presets", {}).items():
            console.print(f"    preset {name}: {preset['source']}", highlight=False, markup=False)
    return 0


def _show(chosen: Namespace, console: Console) -> int:
    import yaml

    from clagrange.study.files import require_writable
    from clagrange.study.problems import SettingsError
    from clagrange.study.reporting.pictures import write_samples
    from clagrange.study.settings import STREAMS, construct, preset_of

    if chosen.tasks < 1:
        raise SettingsError(f"tasks: expected a whole number of at least 1, got {chosen.tasks}")
    settings = {} if chosen.preset is None else dict(preset_of(chosen.stream, chosen.preset, ("show",)).stream)
    for item in chosen.settings:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise SettingsError(f"settings: expected key=value, got {item!r}")
        settings[key] = yaml.safe_load(text)
    stream = construct(STREAMS, chosen.stream, {**settings, "seed": chosen.seed}, ("show",))
    out = Path(chosen.out)
    require_writable(out.parent)
    about = ", ".join(f"{key}={value}" for key, value in settings.items() if key != "root")
    write_samples(out, stream, title=f"{chosen.stream}  {about}".rstrip(), tasks=chosen.tasks)
    _print(console, str(out))
    return 0


def _figure(chosen: Namespace, console: Console) -> int:
    from clagrange._checks import did_you_mean
    from clagrange.figures import FIGURES, write_figure
    from clagrange.study.problems import SettingsError

    if chosen.number not in FIGURES:
        raise SettingsError(
            f"figure: expected one of {', '.join(FIGURES)}; got {chosen.number!r}"
            f"{did_you_mean(chosen.number, FIGURES)}"
        )
    for path in write_figure(chosen.number, Path(chosen.out)):
        _print(console, str(path))
    return 0


def _verify(chosen: Namespace, console: Console) -> int:
    from clagrange.study.problems import SettingsError
    from clagrange.verify import report, run

    try:
        checks, summary = run(chosen.device, chosen.dtype)
    except (
        ValueError,
        RuntimeError,
        TypeError,
        AssertionError,
    ) as error:  # torch's, for devices it does not have
        raise SettingsError(
            f"verify: cannot compute on {chosen.device!r} in {chosen.dtype!r}: {error}"
        ) from error
    if chosen.json:
        print(json.dumps(summary, indent=1))
    else:
        report(checks, console, seconds=summary["seconds"], where=f"{chosen.device}, {chosen.dtype}")
    return 0 if summary["passed"] else 1


def _describe(name: str, kind: type) -> dict[str, Any]:
    """Name, first line of the documentation, defaults, source and extra of something that a study can name."""
    parameters = inspect.signature(kind).parameters.values()
    entry = {
        "name": name,
        "summary": (inspect.getdoc(kind) or "").partition("\n")[0],
        "parameters": {
            parameter.name: "(required)" if parameter.default is parameter.empty else _written(parameter.default)
            for parameter in parameters
        },
    }
    more = {key: getattr(kind, key, None) for key in ("source", "extra")}
    return {**entry, **{key: value for key, value in more.items() if value is not None}}


def _written(value: Any) -> Any:
    """A default as JSON and a study file can hold it."""
    return ".inf" if value == math.inf else value


def _yaml(value: Any) -> str:
    """A default as a study file has it."""
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))
