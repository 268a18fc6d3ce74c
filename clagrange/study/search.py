"""Random search over the settings of methods: trials and seeds are the replicas of batched runs."""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from scipy.stats import qmc

from clagrange._checks import did_you_mean
from clagrange.study.engine import Run
from clagrange.study.files import require_writable, write_json
from clagrange.study.methods import METHODS, Method
from clagrange.study.problems import Key, Problems, SettingsError, check_mapping, read_document
from clagrange.study.settings import (
    StreamStudy,
    construct,
    read_seeds,
    read_stream,
    stream_methods,
    without_its_package,
)
from clagrange.tasks import TaskStream

MOST_REPLICAS = 48


@dataclass(frozen=True)
class Dimension:
    """A setting's range: "log" and "uniform" intervals, or a "choice" of values."""

    scale: str
    values: tuple[Any, ...]

    def at(self, share: float) -> Any:
        """The value at a share in [0, 1) of the range; numbers with three digits."""
        if self.scale == "choice":
            return self.values[int(share * len(self.values))]
        low, high = self.values
        value = low * (high / low) ** share if self.scale == "log" else low + share * (high - low)
        return float(f"{value:.3g}")

    def around(self, value: Any) -> "Dimension":
        """The part of the range, a quarter as wide, around a value; a choice keeps the value alone."""
        if self.scale == "choice":
            return Dimension("choice", (value,))
        low, high = self.values
        if self.scale == "log":
            width = (high / low) ** 0.125
            return Dimension("log", (max(low, value / width), min(high, value * width)))
        width = (high - low) / 8.0
        return Dimension("uniform", (max(low, value - width), min(high, value + width)))


@dataclass(frozen=True)
class Space:
    """Settings to try: some fixed, some with a range."""

    fixed: dict[str, Any]
    ranges: dict[str, Dimension]

    def points(self, count: int, seed: int) -> list[dict[str, Any]]:
        """Settings spread over the ranges by a scrambled Halton sequence."""
        shares = qmc.Halton(max(len(self.ranges), 1), scramble=True, rng=seed).random(count)
        names = list(self.ranges)
        return [
            {**self.fixed, **{name: self.ranges[name].at(at) for name, at in zip(names, share, strict=False)}}
            for share in shares
        ]

    def around(self, settings: Mapping[str, Any]) -> "Space":
        """A smaller space around settings of this one."""
        return Space(self.fixed, {name: ranges.around(settings[name]) for name, ranges in self.ranges.items()})


@dataclass(frozen=True)
class MethodSearch:
    """A method and the spaces between which its trials are shared out evenly."""

    kind: str
    spaces: tuple[Space, ...]

    def first_round(self, trials: int) -> list[tuple[Space, dict[str, Any]]]:
        """The settings of the first round, each with its space."""
        count = len(self.spaces)
        return [
            (space, settings)
            for index, space in enumerate(self.spaces)
            for settings in space.points(len(range(index, trials, count)), seed=index)
        ]


@dataclass(frozen=True)
class Search:
    """A search file: tuning seeds, numbers of trials, and for each stream the methods with their ranges.

    ``study`` says how the winners are compared: its seeds, and the number of tasks of each stream.
    """

    seeds: tuple[int, ...]
    trials: int
    refinements: int
    study: dict[str, Any]
    streams: dict[str, StreamStudy]
    methods: dict[str, dict[str, MethodSearch]]


def load_search(source: str | Path, *, left_out: Callable[[str], None] | None = None) -> Search:
    """Read a search file.

    A method's entry holds ranges, ``lr: {log: [1e-3, 1e-1]}``, ``{uniform: [0, 1]}`` or
    ``{choice: [0.9, 0.99]}``, and fixed settings; or a list of such entries, between which the trials are
    shared out. ``trials`` settings are spread over the ranges, then ``refinements`` more around the best.

    Args:
        source: a path, or the name of a search that comes with the package.
        left_out: leave out methods whose package is not installed, and tell this function why; default: they
            are an error.

    Raises:
        SettingsError: with a line for each problem, which names file and line, the setting, what was expected,
            and what came.
    """
    document = read_document(source)
    problems = Problems(document)
    tree, known = document.tree, {"seeds", "trials", "refinements", "study", "streams"}
    with problems.caught():
        problems.check_keys((), tree, known, required=known)
    problems.raise_any()
    with problems.caught():
        check_mapping(("streams",), tree["streams"])
        problems.check_keys(("study",), tree["study"], {"seeds", "tasks"}, required={"seeds", "tasks"})
    problems.raise_any()
    with problems.caught():
        if tree["study"]["tasks"] != {}:
            problems.check_keys(("study", "tasks"), tree["study"]["tasks"], set(tree["streams"]), required=())
    seeds: tuple[int, ...] = ()
    with problems.caught():
        seeds = read_seeds(tree["seeds"], ("seeds",))
        overlap = set(seeds) & set(read_seeds(tree["study"]["seeds"], ("study", "seeds")))
        if overlap:
            raise SettingsError(
                f"expected others than the tuning seeds, got {sorted(overlap)}", ("study", "seeds")
            )
    for name, least in (("trials", 1), ("refinements", 0)):
        if type(tree[name]) is not int or tree[name] < least:
            message = f"expected a whole number of at least {least}, got {tree[name]!r}"
            problems.note(SettingsError(message, (name,)))
            tree[name] = least
    streams: dict[str, StreamStudy] = {}
    methods: dict[str, dict[str, MethodSearch]] = {}
    for name, body in tree["streams"].items():
        study = read_stream(problems, name, body, kept=())
        methods[name] = {}
        for label, entry in body["methods"].items() if stream_methods(body) else ():
            where = ("streams", name, "methods", label)
            method = _method_search(problems, where, label, entry, tree["trials"], left_out)
            if method is not None:
                methods[name][label] = method
        if study is not None:
            streams[name] = study
    problems.raise_any()
    return Search(seeds, tree["trials"], tree["refinements"], tree["study"], streams, methods)


def _method_search(
    problems: Problems,
    key: Key,
    label: str,
    entry: Any,
    trials: int,
    left_out: Callable[[str], None] | None = None,
) -> MethodSearch | None:
    """The search of a method; what is wrong with it is noted. None where it is left out."""
    reasons: list[str] = []
    kinds, spaces = set(), []
    alternatives = entry if isinstance(entry, list) else [entry]
    with problems.caught():
        if not alternatives:
            raise SettingsError("expected settings and ranges, or a list of such entries, got []", key)
        for place, alternative in enumerate(alternatives):
            where = (*key, str(place)) if isinstance(entry, list) else key
            if not isinstance(alternative or {}, dict):
                raise SettingsError(f"expected settings and ranges, got {alternative!r}", where)
            values, ranges = dict(alternative or {}), {}
            kind = values.pop("kind", label)
            kinds.add(kind)
            for name, value in values.items():
                if isinstance(value, dict):
                    with problems.caught():
                        ranges[name] = _dimension((*where, str(name)), value)
            fixed = {name: value for name, value in values.items() if not isinstance(value, dict)}
            spaces.append(Space(fixed, ranges))
            with problems.caught(), without_its_package(reasons.append if left_out else None):
                for settings in spaces[-1].points(trials, seed=place):
                    construct(METHODS, kind, settings, where)
        if len(kinds) != 1:
            raise SettingsError(
                f"expected alternatives of one kind, got {', '.join(sorted(map(str, kinds)))}", key
            )
    if reasons and left_out is not None:
        left_out(reasons[0])
        return None
    return MethodSearch(next(iter(kinds), label), tuple(spaces))


def _dimension(key: Key, value: dict[str, Any]) -> Dimension:
    scales = ("log", "uniform", "choice")
    if len(value) != 1 or next(iter(value)) not in scales:
        raise SettingsError(
            f"expected one of {', '.join(scales)}, got {', '.join(map(str, value)) or '{}'}"
            f"{did_you_mean(next(iter(value), ''), scales)}",
            key,
        )
    scale, values = next(iter(value.items()))
    if not isinstance(values, list) or not values:
        raise SettingsError(f"expected a list with at least one entry, got {values!r}", (*key, scale))
    if scale != "choice":
        try:
            values = [float(bound) for bound in values]
        except (TypeError, ValueError):
            values = []
        lowest = 0.0 if scale == "log" else -math.inf
        if len(values) != 2 or not lowest < values[0] < values[1] < math.inf:
            above = "0 < low < high" if scale == "log" else "low < high"
            raise SettingsError(f"expected [low, high] with {above}, got {value[scale]!r}", (*key, scale))
    return Dimension(scale, tuple(values))


def run_search(search: Search, target: Path, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Run all trials; the file ``target`` is written after each method, and finished methods are kept.

    Returns:
        {"seeds", "trials", "refinements", "streams": {name: {"stream", "hidden" (or "network"), "methods": {name:
        {"kind", "best", "seconds", "trials"}}}}}; each trial has its settings and the online accuracy (the
        loss, where targets are numbers) over all tasks, mean over seeds and by seed.

    Raises:
        SettingsError: if ``target`` holds a search with other settings.
    """
    require_writable(target.parent)
    report = _begin(search, target)
    for name, study in search.streams.items():
        streams = [study.stream(seed) for seed in search.seeds]
        methods = report["streams"][name]["methods"]
        for label, method in search.methods[name].items():
            first = method.first_round(search.trials)
            planned = [settings for _, settings in first]
            if label in methods and [t["settings"] for t in methods[label]["trials"]][: search.trials] == planned:
                continue
            trials, seconds = _try(method.kind, planned, streams, study.network)
            if search.refinements:
                winner = _best(trials)
                space = first[trials.index(winner)][0].around(winner["settings"])
                closer = space.points(search.refinements, seed=len(method.spaces))
                more, longer = _try(method.kind, closer, streams, study.network)
                trials, seconds = trials + more, seconds + longer
            best = _best(trials)
            methods[label] = {"kind": method.kind, "best": best["settings"], "seconds": seconds, "trials": trials}
            write_json(target, report)
            score = best.get("online_accuracy", best.get("loss"))
            say(f"{name}.{label}: {score:.4f} with {best['settings']} ({seconds:.0f} s)")
    return report


def _best(trials: list[dict[str, Any]]) -> dict[str, Any]:
    """The trial of the highest accuracy, or of the lowest loss; a diverged one is the last choice."""

    def merit(trial: dict[str, Any]) -> float:
        value = trial["online_accuracy"] if "online_accuracy" in trial else -trial["loss"]
        return -math.inf if value is None or math.isnan(value) else float(value)

    return max(trials, key=merit)


def _begin(search: Search, target: Path) -> dict[str, Any]:
    fresh: dict[str, Any] = {
        "seeds": list(search.seeds),
        "trials": search.trials,
        "refinements": search.refinements,
        "streams": {name: {**study.written, "methods": {}} for name, study in search.streams.items()},
    }
    if not target.exists():
        return fresh
    try:
        stored: dict[str, Any] = json.loads(target.read_text())
    except (OSError, ValueError) as error:
        raise SettingsError(f"out: expected a search that can be gone on with, got {target} ({error})") from error
    same = {key: fresh[key] for key in ("seeds", "trials")} == {
        key: stored.get(key) for key in ("seeds", "trials")
    }
    for name, body in fresh["streams"].items():
        kept = stored.get("streams", {}).get(name)
        if kept is not None:
            same = same and all(kept.get(key) == body.get(key) for key in ("stream", "hidden", "network"))
            body["methods"] = kept["methods"]
    if not same:
        raise SettingsError(f"out: {target} holds a search with other settings; choose another file")
    return fresh


def _try(
    kind: str, settings: list[dict[str, Any]], streams: list[TaskStream], network: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], float]:
    """The trials with their online accuracy over all tasks, and the seconds that they took."""
    trials: list[dict[str, Any]] = [{"settings": values} for values in settings]
    seconds = 0.0
    for batch in _batches(settings, len(streams)):
        methods = [construct(METHODS, kind, settings[index], ("trial",)) for index in batch]
        run = Run(stacked(methods, len(streams)), streams * len(methods), network, measured=False)
        while run.next_task < run.tasks:
            run.run_task()
        seconds += run.seconds
        judged = "loss" if streams[0].loss == "mse" else "online_accuracy"
        for index, row in zip(batch, run.metrics[judged].mean(1).reshape(len(methods), -1), strict=True):
            trials[index][judged] = float(row.mean())
            trials[index]["by_seed"] = [float(value) for value in row]
    return trials, seconds


def _batches(settings: list[dict[str, Any]], seeds: int) -> list[list[int]]:
    """Trials that can share a batched run: their words and whole numbers agree, and they are not too many."""
    groups: dict[str, list[int]] = {}
    for index, trial in enumerate(settings):
        words = {key: value for key, value in trial.items() if not isinstance(value, float)}
        groups.setdefault(json.dumps(words, sort_keys=True), []).append(index)
    most = max(1, MOST_REPLICAS // seeds)
    return [group[start : start + most] for group in groups.values() for start in range(0, len(group), most)]


def stacked(methods: list[Method], repeats: int) -> Method:
    """One method whose numbers are tensors: the settings of all, each repeated for every seed.

    Example:
        >>> stacked([METHODS["sgd"](lr=0.5), METHODS["sgd"](lr=0.25)], 2).lr
        tensor([0.5000, 0.5000, 0.2500, 0.2500], dtype=torch.float64)
    """
    changes = {}
    for field in dataclasses.fields(methods[0]):
        values = [getattr(method, field.name) for method in methods]
        if any(value != values[0] for value in values):
            changes[field.name] = torch.tensor(values, dtype=torch.float64).repeat_interleave(repeats)
    return dataclasses.replace(methods[0], **changes)


def study_of_winners(search: Search, report: Mapping[str, Any]) -> str:
    """A study file with the best settings of each method that `run_search` found."""
    streams = {}
    for name, body in report["streams"].items():
        tasks = search.study["tasks"].get(name, body["stream"]["tasks"])
        methods = {
            label: entry["best"] if entry["kind"] == label else {"kind": entry["kind"], **entry["best"]}
            for label, entry in body["methods"].items()
        }
        streams[name] = {**body, "stream": {**body["stream"], "tasks": tasks}, "methods": methods}
    tree = {"seeds": search.study["seeds"], "streams": streams}
    return yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, width=110)
