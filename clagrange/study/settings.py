"""Study files: what to run, read from YAML, overridden, checked, and written out again in full."""

import contextlib
import dataclasses
import hashlib
import importlib.resources
import json
import math
from argparse import ArgumentError
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentParser

import clagrange
from clagrange import tasks
from clagrange._checks import did_you_mean
from clagrange.study.engine import Run
from clagrange.study.methods import METHODS, Method, snake_case
from clagrange.tasks import Preset, TaskStream

T = TypeVar("T")

STREAMS: dict[str, type[TaskStream]] = {
    snake_case(name): getattr(tasks, name)
    for name in tasks.__all__
    if name not in ("Preset", "Task", "TaskStream")
}
"""The streams that a study file can name."""


class SettingsError(ValueError):
    """A study file, an override or an output folder that cannot be used; the message is one line."""


@dataclass(frozen=True)
class StreamStudy:
    """One stream of a study: how to make it, the settings of the network, and the methods by name."""

    name: str
    kind: str
    settings: dict[str, Any]
    network: dict[str, Any]
    methods: dict[str, Method]
    sharpness_every: int | None = None

    @property
    def written(self) -> dict[str, Any]:
        """Stream and network as a study file has them; of an MLP the widths of the hidden layers."""
        mlp = {"kind", "hidden"} == set(self.network) and self.network["kind"] == "mlp"
        network = {"hidden": self.network["hidden"]} if mlp else {"network": self.network}
        sharpness = {} if self.sharpness_every is None else {"sharpness_every": self.sharpness_every}
        return {"stream": {"kind": self.kind, **self.settings}, **network, **sharpness}

    def stream(self, seed: int) -> TaskStream:
        """The stream of one seed."""
        return STREAMS[self.kind](**self.settings, seed=seed)


@dataclass(frozen=True)
class Study:
    """Seeds and streams with their methods.

    Attributes:
        seeds: the same for every method: data order, initial weights and random streams follow from them.
        streams: by name, in order.
    """

    seeds: tuple[int, ...]
    streams: dict[str, StreamStudy]

    def runs(self) -> list[tuple[str, str]]:
        """Stream and method of every run, in order."""
        return [(stream.name, method) for stream in self.streams.values() for method in stream.methods]

    def start(self, stream: str, method: str) -> Run:
        """A run before its first task."""
        study = self.streams[stream]
        streams = [study.stream(seed) for seed in self.seeds]
        return Run(study.methods[method], streams, study.network, sharpness_every=study.sharpness_every)

    def resolved(self) -> dict[str, Any]:
        """Everything in full, defaults included, in the form of a study file."""
        return {
            "seeds": list(self.seeds),
            "streams": {
                name: {
                    **study.written,
                    "methods": {
                        label: {"kind": kind_of(method), **dataclasses.asdict(method)}
                        for label, method in study.methods.items()
                    },
                }
                for name, study in self.streams.items()
            },
        }

    def key(self, stream: str, method: str) -> str:
        """A hash of all that determines the numbers of one run."""
        resolved = self.resolved()
        chosen = resolved["streams"][stream]
        network = chosen["hidden"] if "hidden" in chosen else chosen["network"]
        parts = [clagrange.__version__, resolved["seeds"], chosen["stream"], network]
        if "sharpness_every" in chosen:
            parts.append(chosen["sharpness_every"])
        text = json.dumps([*parts, chosen["methods"][method]], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def kind_of(method: Method) -> str:
    """The name by which a study file calls a method."""
    return snake_case(type(method).__name__)


def load_study(
    source: str | Path,
    overrides: Sequence[str] = (),
    *,
    methods: Sequence[str] | None = None,
    streams: Sequence[str] | None = None,
    left_out: Callable[[str], None] | None = None,
) -> Study:
    """Read a study file, apply overrides, and check every setting.

    Args:
        source: a path, or the name of a study that comes with the package, such as "demo".
        overrides: ``key=value``; a key is the end of a path in the file, as in ``tasks=10``,
            ``sgd.lr=0.1`` or ``permuted_digits.methods.sgd.lr=0.1``, and sets all places whose path ends so.
        methods: names of the methods to keep; default all.
        streams: names of the streams to keep; default all.
        left_out: leave out methods that ``methods`` does not name and whose package is not installed, and tell
            this function why; default: they are an error.

    Raises:
        SettingsError: with one line that names the setting, what was expected, and what came.
    """
    tree = override(read_yaml(source), overrides)
    known = {"seeds", "streams"}
    check_keys("study", tree, known, required=known)
    seeds = read_seeds(tree["seeds"])
    check_mapping("streams", tree["streams"])
    chosen = _chosen("streams", streams, list(tree["streams"]))
    every_method = [label for body in tree["streams"].values() for label in stream_methods(body)]
    kept = _chosen("methods", methods, list(dict.fromkeys(every_method)))
    found = {}
    for name in chosen:
        stream_study = read_stream(name, tree["streams"][name], kept, left_out if methods is None else None)
        if stream_study.methods:
            found[name] = stream_study
    if not found:
        raise SettingsError(f"methods: expected one of those of {', '.join(chosen)}, got {', '.join(kept)}")
    study = Study(seeds, found)
    for stream, method in study.runs():
        _try(study, stream, method)
    return study


def _try(study: Study, stream: str, method: str) -> None:
    """Make the network, optimizer and interventions of a run, so that bad numbers show before anything runs."""
    body = study.streams[stream]
    try:
        Run(body.methods[method], [body.stream(study.seeds[0])], body.network, measured=False)
    except (TypeError, ValueError, OSError) as error:
        raise SettingsError(f"{stream}.{method}: {error}") from error


def read_yaml(source: str | Path) -> Any:
    """Parse a YAML file, given by path or by the name of one that comes with the package."""
    path = Path(source)
    packaged = importlib.resources.files("clagrange.configs")
    names = sorted(entry.name[:-5] for entry in packaged.iterdir() if entry.name.endswith(".yaml"))
    try:
        text = packaged.joinpath(f"{source}.yaml").read_text() if str(source) in names else path.read_text()
    except OSError as error:
        raise SettingsError(
            f"config: expected a readable file or one of {', '.join(names)}; got {str(source)!r} "
            f"({error.strerror}){did_you_mean(source, names)}"
        ) from error
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SettingsError(f"config: {source} is not valid YAML: {' '.join(str(error).split())}") from error


def override(tree: Any, overrides: Sequence[str]) -> Any:
    """Set the values that ``key=value`` strings name by the end of their path; empty entries count as {}."""
    tree = _filled(tree)
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise SettingsError(f"overrides: expected key=value, got {item!r}")
        *parents, last = key.split(".")
        places = [
            node
            for path, node in _mappings(tree, ())
            if (not parents or path[-len(parents) :] == tuple(parents)) and (last in node or parents)
        ]
        if not places:
            keys = sorted({name for _, node in _mappings(tree, ()) for name in node})
            raise SettingsError(
                f"overrides: expected the end of a setting's path in the study, got {key!r}"
                f"{did_you_mean(last, keys) or did_you_mean(key.split('.')[0], keys)}"
            )
        for node in places:
            node[last] = yaml.safe_load(text)
    return tree


def _filled(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {
            key: {name: {} if entry is None else entry for name, entry in value.items()}
            if key == "methods" and isinstance(value, dict)
            else {}
            if key == "stream" and value is None
            else _filled(value)
            for key, value in tree.items()
        }
    return tree


def _mappings(tree: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    if isinstance(tree, dict):
        yield path, tree
        for key, value in tree.items():
            yield from _mappings(value, (*path, key))


def check_mapping(where: str, value: Any) -> None:
    """Raise unless ``value`` is a non-empty mapping."""
    if not isinstance(value, Mapping) or not value:
        raise SettingsError(f"{where}: expected a mapping with at least one entry, got {value!r}")


def check_keys(where: str, value: Any, known: set[str], required: set[str]) -> None:
    """Raise unless ``value`` is a mapping with the required keys and no unknown one."""
    check_mapping(where, value)
    for key in value:
        if key not in known:
            raise SettingsError(
                f"{where}: expected {', '.join(sorted(known))}; got {key!r}{did_you_mean(key, known)}"
            )
    for key in sorted(required - set(value)):
        raise SettingsError(f"{where}: expected a setting {key!r}, got {', '.join(map(str, value))}")


def read_seeds(value: Any) -> tuple[int, ...]:
    """Seeds as a list of whole numbers, or as their number: n stands for 0 to n − 1."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return tuple(range(value))
    whole = isinstance(value, list) and all(type(seed) is int and seed >= 0 for seed in value)
    if whole and value and len(set(value)) == len(value):
        return tuple(value)
    raise SettingsError(f"seeds: expected a number of at least 1 or a list of different seeds, got {value!r}")


def _chosen(what: str, wanted: Sequence[str] | None, known: list[str]) -> list[str]:
    if wanted is None:
        return known
    for name in wanted:
        if name not in known:
            raise SettingsError(
                f"{what}: expected some of {', '.join(known)}; got {name!r}{did_you_mean(name, known)}"
            )
    return [name for name in known if name in wanted]


def stream_methods(body: Any) -> list[str]:
    """The method names in the part of a study file that describes a stream."""
    return list(body["methods"]) if isinstance(body, dict) and isinstance(body.get("methods"), dict) else []


def read_stream(
    name: str, body: Any, kept: Sequence[str], left_out: Callable[[str], None] | None = None
) -> StreamStudy:
    """One stream of a study file."""
    where = f"streams.{name}"
    check_keys(where, body, {"stream", "hidden", "network", "sharpness_every", "methods"}, {"methods"})
    sharpness_every = body.get("sharpness_every")
    if sharpness_every is not None and (type(sharpness_every) is not int or sharpness_every < 1):
        raise SettingsError(
            f"{where}.sharpness_every: expected a number of tasks of at least 1, or null, got {sharpness_every!r}"
        )
    settings = dict(body.get("stream") or {})
    kind = settings.pop("kind", name)
    if "seed" in settings:
        raise SettingsError(f"{where}.stream: expected no seed; the study's seeds are used")
    network: Mapping[str, Any] = {"kind": "mlp", "hidden": [64, 64]}
    if "preset" in settings:
        preset = preset_of(kind, settings.pop("preset"), f"{where}.stream")
        settings, network = {**preset.stream, **settings}, preset.network
    if "hidden" in body:
        hidden = body["hidden"]
        if not isinstance(hidden, list) or not all(type(width) is int and width >= 1 for width in hidden):
            raise SettingsError(f"{where}.hidden: expected a list of widths of at least 1, got {hidden!r}")
        network = {"kind": "mlp", "hidden": hidden}
    if "network" in body:
        if "hidden" in body:
            raise SettingsError(f"{where}: expected hidden or network, got both; hidden is short for an MLP")
        check_mapping(f"{where}.network", body["network"])
        network = body["network"]
    stream = construct(STREAMS, kind, settings, f"{where}.stream")
    resolved = {key: getattr(stream, key) for key in parameters(STREAMS[kind]) if key != "seed"}
    check_mapping(f"{where}.methods", body["methods"])
    methods: dict[str, Method] = {}
    for label in stream_methods(body):
        if label not in kept:
            continue
        if not isinstance(body["methods"][label], dict):
            raise SettingsError(f"{where}.methods.{label}: expected settings, got {body['methods'][label]!r}")
        values = dict(body["methods"][label])
        with without_its_package(left_out):
            methods[label] = construct(METHODS, values.pop("kind", label), values, f"{where}.methods.{label}")
    return StreamStudy(name, kind, resolved, dict(network), methods, sharpness_every)


@contextlib.contextmanager
def without_its_package(left_out: Callable[[str], None] | None) -> Iterator[None]:
    """Tell ``left_out``, where there is one, of a method whose package is not installed, and go on."""
    try:
        yield
    except SettingsError as error:
        if left_out is None or not isinstance(error.__cause__, ModuleNotFoundError):
            raise
        left_out(str(error))


def preset_of(kind: Any, name: Any, where: str) -> Preset:
    """A preset of a registered stream."""
    _check_kind(STREAMS, kind, where)
    presets = STREAMS[kind].PRESETS
    if name not in presets:
        raise SettingsError(
            f"{where}.preset: expected one of {', '.join(presets)} of {kind}; got {name!r}"
            f"{did_you_mean(name, presets)}"
        )
    return presets[name]


def parameters(kind: type) -> list[str]:
    """Names of a constructor's arguments."""
    parser = ArgumentParser(exit_on_error=False)
    return [name.removeprefix("it.") for name in parser.add_class_arguments(kind, "it")]


def _check_kind(registry: Mapping[str, Any], kind: Any, where: str) -> None:
    if kind not in registry:
        raise SettingsError(
            f"{where}: expected one of {', '.join(registry)}; got {kind!r}{did_you_mean(kind, registry)}"
        )


def construct(registry: Mapping[str, type[T]], kind: Any, values: Mapping[str, Any], where: str) -> T:
    """Make an object of a registered class from settings checked against its constructor's signature."""
    _check_kind(registry, kind, where)
    parser = ArgumentParser(exit_on_error=False)
    known = [name.removeprefix("it.") for name in parser.add_class_arguments(registry[kind], "it")]
    for key in values:
        if key not in known:
            raise SettingsError(
                f"{where}: expected settings {', '.join(known)}; got {key!r}{did_you_mean(key, known)}"
            )
    try:
        made: T = parser.instantiate(parser.parse_object({"it": dict(values)})).it
    except ArgumentError as error:
        message = " ".join(str(error).replace("it.", "").split())
        raise SettingsError(f"{where}: {message}") from error
    except (TypeError, ValueError, OSError, ImportError) as error:
        raise SettingsError(f"{where}: {error}") from error
    for key in values:
        value = getattr(made, key, None)
        if isinstance(value, float) and math.isnan(value):
            raise SettingsError(f"{where}.{key}: expected a number, got nan")
    return made
