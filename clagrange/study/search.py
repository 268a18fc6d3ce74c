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
from clagrange.study.files import replacing
from clagrange.study.methods import METHODS, Method
from clagrange.study.settings import (
    SettingsError,
    StreamStudy,
    check_keys,
    check_mapping,
    construct,
    read_seeds,
    read_stream,
    read_yaml,
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


@dataclass(frozen=True)
class Search:
    """A search file: tuning seeds, number of trials, and for each stream the ranges of each method."""

    seeds: tuple[int, ...]
    trials: int
    streams: dict[str, StreamStudy]
    spaces: dict[str, dict[str, dict[str, Dimension]]]
    fixed: dict[str, dict[str, dict[str, Any]]]
    kinds: dict[str, dict[str, str]]

    def settings(self, stream: str, method: str) -> list[dict[str, Any]]:
        """The settings of every trial, spread over the ranges by a scrambled Halton sequence."""
        space = self.spaces[stream][method]
        points = qmc.Halton(max(len(space), 1), scramble=True, rng=0).random(self.trials)
        return [
            {
                **self.fixed[stream][method],
                **{name: space[name].at(share) for name, share in zip(space, point, strict=False)},
            }
            for point in points
        ]


def load_search(source: str | Path) -> Search:
    """Read a search file.

    A method's entry holds ranges, ``lr: {log: [1e-3, 1e-1]}``, ``{uniform: [0, 1]}`` or
    ``{choice: [sgd, adam]}``, and fixed settings.

    Raises:
        SettingsError: with one line that names the setting, what was expected, and what came.
    """
    tree = read_yaml(source)
    known = {"seeds", "trials", "streams"}
    check_keys("search", tree, known, required=known)
    trials = tree["trials"]
    if type(trials) is not int or trials < 1:
        raise SettingsError(f"trials: expected a whole number of at least 1, got {trials!r}")
    check_mapping("streams", tree["streams"])
    search = Search(read_seeds(tree["seeds"]), trials, {}, {}, {}, {})
    for name, body in tree["streams"].items():
        search.streams[name] = read_stream(name, body, kept=())
        search.spaces[name], search.fixed[name], search.kinds[name] = {}, {}, {}
        for label, entry in body["methods"].items():
            where = f"streams.{name}.methods.{label}"
            values = dict(entry or {})
            kind = values.pop("kind", label)
            ranges = {key: value for key, value in values.items() if isinstance(value, dict)}
            search.kinds[name][label] = kind
            search.spaces[name][label] = {key: _dimension(f"{where}.{key}", v) for key, v in ranges.items()}
            search.fixed[name][label] = {key: v for key, v in values.items() if key not in ranges}
            for settings in search.settings(name, label):
                construct(METHODS, kind, settings, where)
    return search


def _dimension(where: str, value: dict[str, Any]) -> Dimension:
    scales = ("log", "uniform", "choice")
    if len(value) != 1 or next(iter(value)) not in scales:
        raise SettingsError(
            f"{where}: expected one of {', '.join(scales)}, got {', '.join(map(str, value))}"
            f"{did_you_mean(next(iter(value), ''), scales)}"
        )
    scale, values = next(iter(value.items()))
    if not isinstance(values, list) or not values:
        raise SettingsError(f"{where}.{scale}: expected a list, got {values!r}")
    if scale != "choice":
        try:
            values = [float(bound) for bound in values]
        except (TypeError, ValueError):
            values = []
        lowest = 0.0 if scale == "log" else -math.inf
        if len(values) != 2 or not lowest < values[0] < values[1]:
            raise SettingsError(f"{where}.{scale}: expected [low, high] with low < high, got {value[scale]!r}")
    return Dimension(scale, tuple(values))


def run_search(search: Search, target: Path, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Run all trials; the file ``target`` is written after each method, and finished methods are kept.

    Returns:
        {"seeds", "trials", "streams": {name: {"stream", "hidden", "methods": {name: {"best", "trials"}}}}}; each
        trial has its settings and the online accuracy over all tasks, mean over seeds and by seed.

    Raises:
        SettingsError: if ``target`` holds a search with other settings.
    """
    report = _begin(search, target)
    for name, study in search.streams.items():
        streams = [study.stream(seed) for seed in search.seeds]
        methods = report["streams"][name]["methods"]
        for label, kind in search.kinds[name].items():
            settings = search.settings(name, label)
            if label in methods and [trial["settings"] for trial in methods[label]["trials"]] == settings:
                continue
            scores, seconds = _score(kind, settings, streams, study.hidden)
            trials = [
                {"settings": trial, "online_accuracy": sum(score) / len(score), "by_seed": score}
                for trial, score in zip(settings, scores, strict=True)
            ]
            best = max(trials, key=lambda trial: float(str(trial["online_accuracy"])))
            methods[label] = {"kind": kind, "best": best["settings"], "trials": trials, "seconds": seconds}
            with replacing(target) as partial:
                partial.write_text(json.dumps(report, indent=1) + "\n")
            say(f"{name}.{label}: {best['online_accuracy']:.4f} with {best['settings']} ({seconds:.0f} s)")
    return report


def _begin(search: Search, target: Path) -> dict[str, Any]:
    fresh: dict[str, Any] = {
        "seeds": list(search.seeds),
        "trials": search.trials,
        "streams": {
            name: {"stream": {"kind": study.kind, **study.settings}, "hidden": list(study.hidden), "methods": {}}
            for name, study in search.streams.items()
        },
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
            same = same and all(kept[key] == body[key] for key in ("stream", "hidden"))
            body["methods"] = kept["methods"]
    if not same:
        raise SettingsError(f"out: {target} holds a search with other settings; choose another file")
    return fresh


def _score(
    kind: str, settings: list[dict[str, Any]], streams: list[TaskStream], hidden: tuple[int, ...]
) -> tuple[list[list[float]], float]:
    """Online accuracy over all tasks of each trial and seed, and the seconds that it took."""
    scores: list[list[float]] = [[] for _ in settings]
    seconds = 0.0
    for batch in _batches(settings, len(streams)):
        methods = [construct(METHODS, kind, settings[index], "trial") for index in batch]
        run = Run(stacked(methods, len(streams)), streams * len(methods), hidden)
        while run.next_task < run.tasks:
            run.run_task()
        seconds += run.seconds
        accuracy = run.metrics["online_accuracy"].mean(1).reshape(len(methods), len(streams))
        for index, row in zip(batch, accuracy, strict=True):
            scores[index] = [float(value) for value in row]
    return scores, seconds


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


def study_of_winners(report: Mapping[str, Any], seeds: int | list[int], tasks: Mapping[str, int]) -> str:
    """A study file with the best settings of each method, on other seeds.

    Args:
        report: what `run_search` returned.
        seeds: of the study; none may be a tuning seed.
        tasks: number of tasks of each stream in the study; default that of the search.
    """
    tree = {
        "seeds": seeds,
        "streams": {
            name: {
                "stream": {**body["stream"], "tasks": tasks.get(name, body["stream"]["tasks"])},
                "hidden": body["hidden"],
                "methods": {
                    label: entry["best"] if entry["kind"] == label else {"kind": entry["kind"], **entry["best"]}
                    for label, entry in body["methods"].items()
                },
            }
            for name, body in report["streams"].items()
        },
    }
    overlap = set(read_seeds(seeds)) & set(report["seeds"])
    if overlap:
        raise SettingsError(f"seeds: expected others than the tuning seeds, got {sorted(overlap)}")
    return yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, width=110)
