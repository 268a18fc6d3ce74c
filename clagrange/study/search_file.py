"""Search files: which settings of which methods are tried, read from YAML and checked."""

import contextlib
import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clagrange._checks import did_you_mean
from clagrange.study.methods import METHODS, Method
from clagrange.study.problems import Key, Problems, SettingsError, check_mapping, read_document
from clagrange.study.samplers import (
    SAMPLERS,
    Dimension,
    Grid,
    Halton,
    Optuna,
    Plan,
    Sampler,
    Space,
    shares,
)
from clagrange.study.settings import (
    STREAMS,
    StreamStudy,
    Study,
    check_runs,
    construct,
    read_seeds,
    read_stream,
    stream_methods,
    without_its_package,
    words,
)
from clagrange.study.side_by_side import batches, stacked


@dataclass(frozen=True)
class MethodSearch:
    """A method and the spaces between which its trials are shared out evenly."""

    kind: str
    spaces: tuple[Space, ...]


@dataclass(frozen=True)
class Search:
    """A search file: tuning seeds, numbers of trials, sampler, and for each stream the methods with their ranges.

    ``name`` is the file's; ``study`` says how the winners are compared: its seeds, and the number of tasks of
    each stream.
    """

    name: str
    seeds: tuple[int, ...]
    trials: int
    refinements: int
    sampler: Sampler
    study: dict[str, Any]
    streams: dict[str, StreamStudy]
    methods: dict[str, dict[str, MethodSearch]]

    @property
    def written(self) -> dict[str, Any]:
        """What all methods share, as JSON has it."""
        return {
            "seeds": list(self.seeds),
            "trials": self.trials,
            "refinements": self.refinements,
            "sampler": self.sampler.written,
        }

    def plan(self, method: MethodSearch) -> Plan:
        """The rounds of settings that are tried of a method."""
        return self.sampler.plan(method.spaces, self.trials, self.refinements)


def load_search(source: str | Path, *, left_out: Callable[[str], None] | None = None) -> Search:
    """Read a search file, and check every setting, range, package and data file before anything runs.

    A method's entry holds ranges, ``lr: {log: [1e-3, 1e-1]}``, ``{uniform: [0, 1]}`` or
    ``{choice: [0.9, 0.99]}``, and fixed settings; or a list of such entries, between which the trials are
    shared out. ``trials`` settings are tried over the ranges, then ``refinements`` (default 0) more around the
    best. ``sampler`` says which: halton (the default), random, grid or optuna; with settings of its own
    ``{kind: random, seed: 1}``, and for short ``{optuna: gp}``; see `clagrange.study.samplers`.

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
    tree, required = document.tree, {"seeds", "trials", "study", "streams"}
    with problems.caught():
        problems.check_keys((), tree, required | {"refinements", "sampler"}, required=required)
    if not isinstance(tree, dict) or not required <= set(tree):
        problems.raise_any()
    tree.setdefault("refinements", 0)
    with problems.caught():
        check_mapping(("streams",), tree["streams"])
        problems.check_keys(("study",), tree["study"], {"seeds", "tasks"}, required={"seeds", "tasks"})
    whole = all(isinstance(tree[name], dict) for name in ("streams", "study"))
    if not whole or not {"seeds", "tasks"} <= set(tree["study"]):
        problems.raise_any()
    named = words(problems, ("streams",), tree["streams"])
    with problems.caught():
        if tree["study"]["tasks"] != {}:
            problems.check_keys(("study", "tasks"), tree["study"]["tasks"], named, required=())
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
    sampler: Sampler | None = None
    with problems.caught():
        sampler = _sampler(tree.get("sampler", "halton"), tree["refinements"])
    streams: dict[str, StreamStudy] = {}
    methods: dict[str, dict[str, MethodSearch]] = {}
    for name in named:
        body = tree["streams"][name]
        study = read_stream(problems, name, body, kept=())
        methods[name] = {}
        for label in stream_methods(body):
            where, entry = ("streams", name, "methods", label), body["methods"][label]
            method = _method_search(problems, where, label, entry, tree["trials"], sampler, left_out)
            if method is not None:
                methods[name][label] = method
        if study is not None:
            streams[name] = study
    _check_tasks(problems, tree["study"]["tasks"], streams)
    for runs in _trial_runs(streams, methods, sampler is not None and sampler.reaches_ends):
        check_runs(problems, Study(seeds or (0,), runs), tree["streams"])
    problems.raise_any()
    if not any(methods.values()):
        raise SettingsError("methods: expected one whose package is installed, got none")
    return Search(
        document.name,
        seeds,
        tree["trials"],
        tree["refinements"],
        Halton() if sampler is None else sampler,
        tree["study"],
        streams,
        methods,
    )


def _sampler(value: Any, refinements: int) -> Sampler:
    """The sampler that a search file names."""
    key = ("sampler",)
    if isinstance(value, dict) and "optuna" in value:
        value = {
            "kind": "optuna",
            "algorithm": value["optuna"],
            **{k: v for k, v in value.items() if k != "optuna"},
        }
    values = dict(value) if isinstance(value, dict) else {"kind": value}
    if "kind" not in values:
        raise SettingsError(f"expected one of {', '.join(SAMPLERS)}, or settings with a kind, got {value!r}", key)
    sampler = construct(SAMPLERS, values.pop("kind"), values, key)
    if isinstance(sampler, Optuna) and refinements:
        raise SettingsError(
            f"expected 0 with Optuna, which looks around what was good by itself, got {refinements}; "
            f"give them to trials",
            ("refinements",),
        )
    return sampler


def _method_search(
    problems: Problems,
    key: Key,
    label: str,
    entry: Any,
    trials: int,
    sampler: Sampler | None,
    left_out: Callable[[str], None] | None = None,
) -> MethodSearch | None:
    """The search of a method; what is wrong with it is noted. None where it is left out."""
    reasons: list[str] = []
    kinds: list[Any] = []
    spaces = []
    alternatives = entry if isinstance(entry, list) else [entry]
    with problems.caught():
        if not alternatives:
            raise SettingsError("expected settings and ranges, or a list of such entries, got []", key)
        if len(alternatives) > trials:
            raise SettingsError(
                f"expected at most {trials} entries, one for each trial, got {len(alternatives)}", key
            )
        for place, alternative in enumerate(alternatives):
            where = (*key, str(place)) if isinstance(entry, list) else key
            if not isinstance(alternative or {}, dict):
                raise SettingsError(f"expected settings and ranges, got {alternative!r}", where)
            values, ranges = dict(alternative or {}), {}
            kind = values.pop("kind", label)
            if kind not in kinds:
                kinds.append(kind)
            for name, value in values.items():
                if isinstance(value, dict):
                    with problems.caught():
                        ranges[name] = _dimension((*where, str(name)), value, sampler)
            fixed = {name: value for name, value in values.items() if not isinstance(value, dict)}
            spaces.append(Space(fixed, ranges))
            with problems.caught(), without_its_package(reasons.append if left_out else None):
                for settings in spaces[-1].examples(ends=sampler is not None and sampler.reaches_ends):
                    construct(METHODS, kind, settings, where)
            with problems.caught():
                _check_space(sampler, spaces[-1], shares(trials, len(alternatives))[place], where)
        if len(kinds) != 1:
            raise SettingsError(
                f"expected alternatives of one kind, got {', '.join(sorted(map(str, kinds)))}", key
            )
    if reasons and left_out is not None:
        left_out(reasons[0])
        return None
    return MethodSearch(next(iter(kinds), label), tuple(spaces))


def _check_space(sampler: Sampler | None, space: Space, trials: int, key: Key) -> None:
    try:
        if sampler is not None:
            sampler.check(space, trials)
    except ValueError as error:
        raise SettingsError(str(error), key) from error


def _dimension(key: Key, value: dict[str, Any], sampler: Sampler | None) -> Dimension:
    scales = ("log", "uniform", "choice")
    named = [name for name in value if name != "points"]
    if len(named) != 1 or named[0] not in scales:
        raise SettingsError(
            f"expected one of {', '.join(scales)}, got {', '.join(map(str, value)) or '{}'}"
            f"{did_you_mean((named or [''])[0], scales)}",
            key,
        )
    (scale,) = named
    values, points = value[scale], value.get("points")
    if "points" in value and not isinstance(sampler, Grid | None):
        raise SettingsError("expected only with sampler: grid", (*key, "points"))
    if points is not None and (type(points) is not int or points < 2 or scale == "choice"):
        expected = "none of a choice, whose values are the points" if scale == "choice" else "at least 2"
        raise SettingsError(f"expected {expected}, got {points!r}", (*key, "points"))
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
    else:
        values = [_number(entry) for entry in values]
    if scale == "choice" and len(set(map(repr, values))) < max(2, len(values)):
        raise SettingsError(
            f"expected at least two values, all different, got {values!r}; a fixed setting has no range",
            (*key, scale),
        )
    return Dimension(scale, tuple(values), points)


def _number(value: Any) -> Any:
    """The number where YAML reads one such as 1e-3, which has no point, as a word."""
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+[eE][+-]?\d+", value):
        return float(value)
    return value


def _check_tasks(problems: Problems, tasks: Any, streams: Mapping[str, StreamStudy]) -> None:
    """Note numbers of tasks that the streams of the winners' study cannot have."""
    for name, number in tasks.items() if isinstance(tasks, dict) else ():
        if name in streams:
            with problems.caught():
                settings = {**streams[name].settings, "tasks": number}
                construct(STREAMS, streams[name].kind, settings, ("study", "tasks", name))


def _trial_runs(
    streams: Mapping[str, StreamStudy], methods: Mapping[str, Mapping[str, MethodSearch]], ends: bool
) -> Iterator[dict[str, StreamStudy]]:
    """The streams with methods that stand for all trials: the examples of every space, side by side."""
    made: dict[tuple[str, str], list[Method]] = {}
    for name in streams:
        for label, method in methods[name].items():
            where, several = ("streams", name, "methods", label), made.setdefault((name, label), [])
            for examples in (space.examples(ends=ends) for space in method.spaces):
                for batch in batches(examples, 1):
                    with contextlib.suppress(SettingsError):  # which is noted
                        tried = [construct(METHODS, method.kind, examples[place], where) for place in batch]
                        several.append(stacked(tried, 1))
    for turn in itertools.zip_longest(*made.values()):
        chosen = {job: method for job, method in zip(made, turn, strict=True) if method is not None}
        yield {
            name: dataclasses.replace(
                stream, methods={label: m for (of, label), m in chosen.items() if of == name}
            )
            for name, stream in streams.items()
        }
