"""A search over the settings of methods: trials and seeds are the replicas of batched runs."""

import functools
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from clagrange._checks import one_line
from clagrange.study.files import only_writer, require_writable, write_json
from clagrange.study.groups import start
from clagrange.study.methods import METHODS
from clagrange.study.problems import SettingsError
from clagrange.study.samplers import Halton, Plan
from clagrange.study.search_file import MethodSearch, Search
from clagrange.study.settings import StreamStudy, construct
from clagrange.study.side_by_side import batches, stacked
from clagrange.study.store import Origin, checksum, code_version
from clagrange.tasks import TaskStream

Trial = dict[str, Any]
"""The settings of a trial and, once it has run, its online accuracy (or loss), as the file has them."""


class MethodsFailed(RuntimeError):  # noqa: N818 - says what happened
    """Some methods of a search failed; the others have their trials.

    Attributes:
        reasons: by stream and method.
        report: of the methods that did not fail, as `run_search` returns it.
    """

    def __init__(self, reasons: Mapping[str, str], report: dict[str, Any]) -> None:
        said = "\n".join(f"{job} failed: {reason}" for job, reason in reasons.items())
        super().__init__(f"{said}\nthe other methods have their trials; run it again to try these anew")
        self.reasons = reasons
        self.report = report


def run_search(
    search: Search, target: Path, say: Callable[[str], None] = print, device: str = "cpu"
) -> dict[str, Any]:
    """Run all trials; the file ``target`` is written after each batch, and what it holds is not run again.

    Args:
        search: the search.
        target: a JSON file.
        say: is told of each method that is done.
        device: to train on, "cpu" or "cuda".

    Finished methods of another version of clagrange are kept, with a warning; an unfinished one begins anew,
    since its trials should not come from two programs.

    Returns:
        What the file holds in the end: {"seeds", "trials", "refinements", "sampler", "streams": {name: {"stream",
        "hidden" (or "network"), "methods": {name: {"kind", "best", "seconds", "spread", "trials", "origin"}}}}};
        each trial has its settings and the online accuracy (the loss, where targets are numbers) over all tasks,
        mean over seeds and by seed. The first ``spread`` trials are spread over the ranges. ``origin`` is what
        the numbers follow from: settings, data (checksum) and version.

    Raises:
        SettingsError: if ``target`` holds a search with other settings.
        FileProblem: if it cannot be written, or another process is writing it.
        MethodsFailed: if trials of a method failed; the other methods were tried all the same.
    """
    require_writable(target.parent)
    with only_writer(target):
        return _run_search(search, target, say, device)


def _run_search(search: Search, target: Path, say: Callable[[str], None], device: str) -> dict[str, Any]:
    report, under_way = _begin(search, target)
    kept: dict[str, list[str]] = {}
    failed: dict[str, str] = {}
    for name, study in search.streams.items():
        streams = [study.stream(seed) for seed in search.seeds]
        methods = report["streams"][name]["methods"]
        data = checksum(streams[0])
        for label, method in search.methods[name].items():
            origin = _origin(search, study, method, data, device)
            if label in methods:
                reason = _difference(search, method, origin, methods[label])
                if reason is None:
                    version = methods[label].get("origin", {}).get("version", "a version that kept no record")
                    if version != origin.version:
                        kept.setdefault(version, []).append(f"{name}.{label}")
                    continue
                say(f"{name}.{label} runs again: {reason}")
            entry: dict[str, Any] = {"kind": method.kind, "best": None, "seconds": 0.0, "spread": 0, "trials": []}
            if under_way.get("method") == [name, label]:
                if under_way["origin"] == origin.written:
                    entry = under_way["entry"]
                else:
                    say(f"{name}.{label} begins anew: its first trials are of other settings, data or version")
            begun = {"method": [name, label], "origin": origin.written, "entry": entry}
            keep = functools.partial(write_json, target, {**report, "under_way": begun})
            run = functools.partial(_run, method.kind, streams=streams, network=study.network, device=device)
            try:
                _try(entry, search.plan(method), len(streams), run, keep)
            except OSError:  # of the file
                raise
            except Exception as error:
                failed[f"{name}.{label}"] = one_line(f"{type(error).__name__}: {error}")
                methods.pop(label, None)  # of other settings
                say(f"{name}.{label} failed")
                continue
            best = max(entry["trials"], key=_goodness)
            methods[label] = {**entry, "best": best["settings"], "origin": origin.written}
            write_json(target, report)
            unused = search.trials + search.refinements - len(entry["trials"])
            note = f", {unused} trials unused: its grid has no more" if unused else ""
            say(f"{name}.{label}: {_score(best):.4f} with {best['settings']} ({entry['seconds']:.0f} s{note})")
    for version, labels in kept.items():
        some = ", ".join(labels[:3]) + (f" and {len(labels) - 3} more" if len(labels) > 3 else "")
        say(f"warning: trials of {version} are kept ({some}), this is {code_version()}")
    if failed:
        raise MethodsFailed(failed, report)
    return report


def _origin(search: Search, study: StreamStudy, method: MethodSearch, data: str, device: str) -> Origin:
    """What the trials of a method follow from."""
    settings: dict[str, Any] = {
        **search.written,
        **_stream_part(study.written),
        "method": {"kind": method.kind, "spaces": [space.written for space in method.spaces]},
    }
    if device != "cpu":
        settings["device"] = device
    version = ", ".join(filter(None, (code_version(), search.sampler.version)))
    return Origin(json.loads(json.dumps(settings)), data, version)


def _stream_part(body: Mapping[str, Any]) -> dict[str, Any]:
    """What trials follow from of the part of a file that describes a stream."""
    return {key: body[key] for key in ("stream", "hidden", "network") if key in body}


def _difference(search: Search, method: MethodSearch, origin: Origin, entry: Mapping[str, Any]) -> str | None:
    """Why the stored trials of a method are not those of the search; None where they are."""
    if "origin" in entry:
        return origin.difference(Origin(**entry["origin"]))
    first = json.loads(json.dumps(next(search.plan(method))))  # stored before origins were recorded
    same = len(entry["trials"]) == search.trials + search.refinements
    same = same and [trial["settings"] for trial in entry["trials"]][: len(first)] == first
    return None if same else "its trials are of other ranges"


def _begin(search: Search, target: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The report with what the file holds of it, and the method that is under way there."""
    fresh: dict[str, Any] = {
        **search.written,
        "streams": {name: {**study.written, "methods": {}} for name, study in search.streams.items()},
    }
    if not target.exists():
        return fresh, {}
    try:
        stored: dict[str, Any] = {"sampler": Halton().written, **json.loads(target.read_text(encoding="utf-8"))}
        others = [key for key in search.written if stored[key] != fresh[key]]
        for name, body in stored["streams"].items():
            here = fresh["streams"].get(name, {})
            if _stream_part(body) != _stream_part(here):
                others.append(name)
            here["methods"] = body["methods"]
        under_way: dict[str, Any] = stored.get("under_way", {})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SettingsError(f"out: expected a search that can be gone on with, got {target} ({error})") from error
    if others:
        raise SettingsError(
            f"out: {target} holds a search with other settings ({', '.join(others)}); choose another file"
        )
    return fresh, under_way


def _try(
    entry: dict[str, Any],
    plan: Plan,
    seeds: int,
    run: Callable[[list[Trial]], float],
    keep: Callable[[], None],
) -> None:
    """Run the rounds of a plan, but for the batches whose trials the entry already has; keep every batch."""
    stored: list[Trial] = entry["trials"]
    done: list[Trial] = []
    settings = next(plan)
    entry["spread"] = len(settings)
    while True:
        trials: list[Trial] = [{"settings": values} for values in settings]
        before, stored = stored[: len(trials)], stored[len(trials) :]
        if [trial["settings"] for trial in before] == json.loads(json.dumps(settings)):
            trials = before
        else:
            stored = []
        entry["trials"] = done = [*done, *trials]
        for batch in batches(settings, seeds):
            if not all("by_seed" in trials[index] for index in batch):
                entry["seconds"] += run([trials[index] for index in batch])
                keep()
        try:
            settings = plan.send([_goodness(trial) for trial in trials])
        except StopIteration:
            return


def _run(
    kind: str, trials: list[Trial], streams: list[TaskStream], network: Mapping[str, Any], device: str
) -> float:
    """Run trials at once, those of large networks in groups; note the online accuracy of each over all tasks.

    Returns:
        The seconds that it took.
    """
    methods = [construct(METHODS, kind, trial["settings"], ("trial",)) for trial in trials]
    run = start(stacked(methods, len(streams)), streams * len(methods), network, measured=False, device=device)
    while run.next_task < run.tasks:
        run.run_task()
    judged = "loss" if streams[0].loss == "mse" else "online_accuracy"
    for trial, row in zip(trials, run.metrics[judged].mean(1).reshape(len(methods), -1), strict=True):
        trial[judged] = float(row.mean())
        trial["by_seed"] = [float(value) for value in row]
    return run.seconds


def _score(trial: Trial) -> float:
    """Online accuracy, or loss."""
    value = trial["online_accuracy"] if "online_accuracy" in trial else trial["loss"]
    return math.nan if value is None else float(value)


def _goodness(trial: Trial) -> float:
    """The online accuracy, or minus the loss; −∞ of a trial that diverged."""
    score = _score(trial) if "online_accuracy" in trial else -_score(trial)
    return score if math.isfinite(score) else -math.inf


def study_of_winners(search: Search, report: Mapping[str, Any]) -> str:
    """A study file with the best settings of each method that `run_search` found, and what they are from."""
    streams, origins = {}, {}
    for name, body in report["streams"].items():
        if not body["methods"]:
            continue
        tasks = search.study["tasks"].get(name, body["stream"]["tasks"])
        methods = {
            label: entry["best"] if entry["kind"] == label else {"kind": entry["kind"], **entry["best"]}
            for label, entry in body["methods"].items()
        }
        streams[name] = {**body, "stream": {**body["stream"], "tasks": tasks}, "methods": methods}
        recorded = [entry["origin"] for entry in body["methods"].values() if "origin" in entry]
        origins[name] = sorted({f"data {origin['data']}, {origin['version']}" for origin in recorded})
    counts = [len(entry["trials"]) for body in report["streams"].values() for entry in body["methods"].values()]
    fewest = f"{min(counts)} to " if min(counts) < max(counts) else ""
    sampler = ", ".join(
        f"{name} {value}" if name != "kind" else value for name, value in report["sampler"].items()
    )
    lines = [
        f"The winners of {search.name}: of each method the best of {fewest}{max(counts)} trials",
        f"(sampler: {sampler}) on the tuning seeds {', '.join(map(str, search.seeds))}; those below are others.",
        *(f"{name}: {origin}" for name, several in origins.items() for origin in several),
    ]
    tree = {"seeds": search.study["seeds"], "streams": streams}
    text = yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, width=110)
    return "".join(f"# {line}\n" for line in lines) + text
