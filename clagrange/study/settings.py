"""Study files: what to run, read from YAML, overridden, checked, and written out again in full."""

import contextlib
import copy
import dataclasses
import inspect
import math
import re
from argparse import ArgumentError
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

from jsonargparse import ArgumentParser
from torch import Tensor, nn

from clagrange import tasks
from clagrange._checks import did_you_mean, one_line
from clagrange.networks import LOSSES, build
from clagrange.study.engine import Run
from clagrange.study.groups import Groups, start
from clagrange.study.methods import METHODS, Method, snake_case
from clagrange.study.problems import Key, Problems, SettingsError, check_mapping, read_document
from clagrange.tasks import Preset, TaskStream

T = TypeVar("T")

STREAMS: dict[str, type[TaskStream]] = {
    snake_case(name): getattr(tasks, name)
    for name in tasks.__all__
    if name not in ("Preset", "Task", "TaskStream")
}
"""The streams that a study file can name."""

TRIED_EXAMPLES = 4
"""Examples of the first batch on which networks and methods are tried before anything runs."""

TRIED_WEIGHTS = 1 << 20
"""Weights of a network up to which methods are tried with a step, which can take seconds for larger ones."""

SCHEDULES = ("sharpness_every", "sample_plasticity_every")
"""Numbers of tasks from one expensive measurement to the next."""


@dataclass(frozen=True)
class StreamStudy:
    """One stream of a study: how to make it, the settings of the network, and the methods by name."""

    name: str
    kind: str
    settings: dict[str, Any]
    network: dict[str, Any]
    methods: dict[str, Method]
    sharpness_every: int | None = None
    sample_plasticity_every: int | None = None
    threshold: float | None = None

    @property
    def written(self) -> dict[str, Any]:
        """Stream and network as a study file has them; of an MLP the widths of the hidden layers."""
        mlp = {"kind", "hidden"} == set(self.network) and self.network["kind"] == "mlp"
        network = {"hidden": self.network["hidden"]} if mlp else {"network": self.network}
        asked = {name: getattr(self, name) for name in (*SCHEDULES, "threshold")}
        measures = {name: value for name, value in asked.items() if value is not None}
        return {"stream": {"kind": self.kind, **self.settings}, **network, **measures}

    def stream(self, seed: int) -> TaskStream:
        """The stream of one seed."""
        return STREAMS[self.kind](**self.settings, seed=seed)


@dataclass(frozen=True)
class Study:
    """Seeds and streams with their methods.

    Attributes:
        seeds: the same for every method: data order, initial weights and random streams follow from them.
        streams: by name, in order.
        device: kind of device to train on, "cpu" or "cuda"; no part of a study file.
    """

    seeds: tuple[int, ...]
    streams: dict[str, StreamStudy]
    device: str = "cpu"

    def runs(self) -> list[tuple[str, str]]:
        """Stream and method of every run, in order."""
        return [(stream.name, method) for stream in self.streams.values() for method in stream.methods]

    def start(self, stream: str, method: str) -> Run | Groups:
        """A run before its first task."""
        study = self.streams[stream]
        return start(
            study.methods[method],
            [study.stream(seed) for seed in self.seeds],
            study.network,
            **{name: getattr(study, name) for name in SCHEDULES},
            device=self.device,
        )

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
    """Read a study file, apply overrides, and check every setting, package and data file before anything runs.

    Args:
        source: a path, or the name of a study that comes with the package, such as "demo".
        overrides: ``key=value``; a key is the end of a path in the file, as in ``tasks=10``,
            ``sgd.lr=0.1`` or ``permuted_digits.methods.sgd.lr=0.1``, and sets all places whose path ends so.
        methods: names of the methods to keep; default all.
        streams: names of the streams to keep; default all.
        left_out: leave out methods that ``methods`` does not name and whose package is not installed, and tell
            this function why; default: they are an error.

    Raises:
        SettingsError: with a line for each problem, which names file and line (or the override), the setting,
            what was expected, and what came.
    """
    document = read_document(source)
    document.override(overrides)
    problems = Problems(document)
    tree = document.tree
    known = {"seeds", "streams"}
    with problems.caught():
        problems.check_keys((), tree, known, required=known)
        seeds: tuple[int, ...] = (0,)
        if "seeds" in tree:
            with problems.caught():
                seeds = read_seeds(tree["seeds"], ("seeds",))
        if "streams" in tree:
            check_mapping(("streams",), tree["streams"])
    if not isinstance(tree, dict) or not isinstance(tree.get("streams"), dict):
        problems.raise_any()
    named = words(problems, ("streams",), tree["streams"])
    chosen = _chosen("streams", streams, named)
    every_method = [label for name in named for label in stream_methods(tree["streams"][name])]
    kept = _chosen("methods", methods, list(dict.fromkeys(every_method)))
    found = {}
    for name in chosen:
        stream_study = read_stream(
            problems, name, tree["streams"][name], kept, left_out if methods is None else None
        )
        if stream_study is not None and stream_study.methods:
            found[name] = stream_study
    study = Study(seeds, found)
    check_runs(problems, study, tree["streams"])
    problems.raise_any()
    if not found:
        raise SettingsError(f"methods: expected one of those of {', '.join(chosen)}, got {', '.join(kept)}")
    return study


def check_runs(problems: Problems, study: Study, written: Mapping[str, Any]) -> None:
    """Note what is wrong with the runs of a study: their settings together, and the names of their files.

    Each network, and each method that trains it, is tried on a few examples.

    Args:
        problems: of the file that the study is from.
        study: numbers of a method may be tensors, one for each replica.
        written: the streams as the file has them.
    """
    for name, body in study.streams.items():
        if not body.methods:
            continue
        stream, network = body.stream(study.seeds[0]), None
        with problems.caught():
            network = _network(body, stream, written[name])
        if network is None:
            continue
        trains = False
        with problems.caught():
            _try_network(network, body, stream, written[name])
            trains = True
        for method in body.methods:
            with problems.caught():
                _try_method(body, method, stream, start=trains)
    _check_file_names(problems, study)


def _network(body: StreamStudy, stream: TaskStream, written: Mapping[str, Any]) -> nn.Module:
    """The network of a stream; what is wrong with its settings is raised."""
    try:
        return build(body.network, stream.input_shape, stream.classes)
    except (TypeError, ValueError, OSError, ImportError) as error:
        name, _, said = str(error).partition(": ")
        unknown = re.search(r"got '(\w+)'", said) if name == "network" else None
        word = name.removeprefix("network.") if unknown is None else unknown[1]
        where = _network_key(body, written)
        if word not in body.network:
            raise SettingsError(str(error), where) from error
        raise SettingsError(said, (*where, word) if where[-1] == "network" else where) from error


def _network_key(body: StreamStudy, written: Mapping[str, Any]) -> Key:
    """Where a study file says what the network is; a stream has one of its own."""
    return ("streams", body.name, next((name for name in ("network", "hidden") if name in written), "stream"))


def _try_network(network: nn.Module, body: StreamStudy, stream: TaskStream, written: Mapping[str, Any]) -> None:
    """Make some of the first batch of a stream, and give it to the network."""
    try:
        inputs, targets = stream.task(0).batch(_shortened(stream).order(0, 0)[0], 0)
    except Exception as error:
        such_as = ", such as augment" if body.settings.get("augment") else ""
        raise SettingsError(
            f"expected a stream whose batches can be made; the first failed with: {one_line(error)}; "
            f"change the settings of the stream{such_as}",
            ("streams", body.name, "stream"),
        ) from error
    try:
        targets = targets.float() if targets.is_floating_point() else targets
        LOSSES[stream.loss](network(inputs.float()), targets)  # in training, where a batch can be too small
    except Exception as error:
        raise SettingsError(
            f"expected a network that can be trained on inputs of shape {tuple(stream.input_shape)} in batches "
            f"of {stream.batch_size}; the first failed with: {one_line(error)}; "
            "change the network or the batches",
            _network_key(body, written),
        ) from error


def _try_method(body: StreamStudy, method: str, stream: TaskStream, *, start: bool) -> None:
    """Make the optimizer and the interventions of a run; start them, and make a step where that is quick."""
    key = ("streams", body.name, "methods", method)
    made = body.methods[method]
    numbers = [value for value in vars(made).values() if isinstance(value, Tensor)]
    replicas = max((len(values) for values in numbers), default=1)
    try:
        run = Run(made, [_shortened(stream)] * replicas, body.network, measured=False)
    except (TypeError, ValueError, OSError, ImportError) as error:
        name, _, said = str(error).partition(": ")
        if name in parameters(type(made)):
            raise SettingsError(said, (*key, name)) from error
        raise SettingsError(str(error), key) from error
    if not start:
        return
    try:
        if sum(weights.numel() for weights in run.network.parameters()) <= TRIED_WEIGHTS * replicas:
            run.run_task()
        else:
            for intervention in run.interventions:
                intervention.on_start(run.network, run.optimizer)
    except Exception as error:
        raise SettingsError(
            f"expected a method that can train this network; a first step failed with: {one_line(error)}; "
            f"leave the method out, or change the network",
            key,
        ) from error


def _shortened(stream: TaskStream) -> TaskStream:
    """The stream with a few examples of the first batch of each task."""
    size = min(stream.batch_size, TRIED_EXAMPLES)
    short = copy.copy(stream)
    vars(short).update(
        batch_size=size,
        epochs=1,
        order=lambda number, epoch: stream.order(number, epoch)[:1, :size],
        steps_of=lambda number: 1,
    )
    return short


def _check_file_names(problems: Problems, study: Study) -> None:
    """Names become file names, STREAM.METHOD."""
    files: dict[str, tuple[str, str]] = {}
    for stream, method in study.runs():
        for key in (("streams", stream), ("streams", stream, "methods", method)):
            if not re.fullmatch(r"[\w+-][\w.+-]*", key[-1]):
                problems.note(
                    SettingsError(
                        f"expected a name of letters, digits, '_', '-', '+' and '.', got {key[-1]!r}", key
                    )
                )
        other = files.setdefault(f"{stream}.{method}".casefold(), (stream, method))
        if other != (stream, method):
            problems.note(
                SettingsError(
                    f"expected names whose files differ, got {stream}.{method} beside {'.'.join(other)}; "
                    f"rename one",
                    ("streams", stream, "methods", method),
                )
            )


def read_yaml(source: str | Path) -> Any:
    """The settings of a YAML file, given by path or by the name of one that comes with the package."""
    return read_document(source).tree


def read_seeds(value: Any, key: Key) -> tuple[int, ...]:
    """Seeds as a list of whole numbers, or as their number: n stands for 0 to n − 1."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return tuple(range(value))
    whole = isinstance(value, list) and all(type(seed) is int and seed >= 0 for seed in value)
    if whole and value and len(set(value)) == len(value):
        return tuple(value)
    raise SettingsError(f"expected a number of at least 1 or a list of different seeds, got {value!r}", key)


def _chosen(what: str, wanted: Sequence[str] | None, known: list[str]) -> list[str]:
    if wanted is None:
        return known
    for name in wanted:
        if name not in known:
            raise SettingsError(
                f"{what}: expected some of {', '.join(known)}; got {name!r}{did_you_mean(name, known)}"
            )
    return [name for name in known if name in wanted]


def words(problems: Problems, key: Key, mapping: Mapping[Any, Any]) -> list[str]:
    """The names in a mapping; those that YAML reads as numbers, or as true and false, are noted."""
    for name in mapping:
        if not isinstance(name, str):
            message = f"expected a word as a name, got {name!r}, as YAML reads it; put the name in quotes"
            problems.note(SettingsError(message, (*key, str(name))))
    return [name for name in mapping if isinstance(name, str)]


def stream_methods(body: Any) -> list[str]:
    """The method names in the part of a study file that describes a stream."""
    methods = body.get("methods") if isinstance(body, dict) else None
    return [name for name in methods if isinstance(name, str)] if isinstance(methods, dict) else []


def read_stream(
    problems: Problems,
    name: str,
    body: Any,
    kept: Sequence[str],
    left_out: Callable[[str], None] | None = None,
) -> StreamStudy | None:
    """One stream of a study file.

    Where it cannot be used, the problems are noted, and its methods come with another stream, to be tried all the
    same; None where there is nothing to try.
    """
    key = ("streams", name)
    with problems.caught():
        known = {"stream", "hidden", "network", *SCHEDULES, "threshold", "methods"}
        problems.check_keys(key, body, known, required={"methods"})
    if not isinstance(body, dict) or not body:
        return None
    schedules = {schedule: body.get(schedule) for schedule in SCHEDULES}
    for schedule, every in schedules.items():
        if every is not None and (type(every) is not int or every < 1):
            message = f"expected a number of tasks of at least 1, or null, got {every!r}"
            problems.note(SettingsError(message, (*key, schedule)))
    threshold = body.get("threshold")
    if threshold is not None and (type(threshold) not in (int, float) or not math.isfinite(threshold)):
        expected = "an online accuracy such as 0.8 (a loss where targets are numbers), or null"
        problems.note(SettingsError(f"expected {expected}, got {threshold!r}", (*key, "threshold")))
    methods = _read_methods(problems, key, body, kept, left_out)
    network = _read_network(problems, body, key)
    with problems.caught():
        kind, resolved, of_preset = _read_task_stream(name, body, key)
        return StreamStudy(
            name, kind, resolved, dict(network or of_preset), methods, **schedules, threshold=threshold
        )
    small = {"tasks": 1, "examples": 4, "batch_size": 4}
    return StreamStudy(name, "permuted_digits", small, {"kind": "mlp", "hidden": [4]}, methods)


def _read_methods(
    problems: Problems,
    key: Key,
    body: Mapping[str, Any],
    kept: Sequence[str],
    left_out: Callable[[str], None] | None,
) -> dict[str, Method]:
    """The methods of a stream that can be used."""
    methods: dict[str, Method] = {}
    with problems.caught():
        if "methods" in body:
            check_mapping((*key, "methods"), body["methods"])
            words(problems, (*key, "methods"), body["methods"])
    for label in stream_methods(body):
        if label not in kept:
            continue
        where, entry = (*key, "methods", label), body["methods"][label]
        with problems.caught(), without_its_package(left_out):
            if not isinstance(entry, dict):
                raise SettingsError(f"expected settings, got {entry!r}", where)
            values = dict(entry)
            methods[label] = construct(METHODS, values.pop("kind", label), values, where)
    return methods


def _read_network(problems: Problems, body: Mapping[str, Any], key: Key) -> Mapping[str, Any] | None:
    """The settings of the network, where the file has some that can be used."""
    if "hidden" in body and "network" in body:
        problems.note(SettingsError("expected hidden or network, got both; hidden is short for an MLP", key))
    if "hidden" in body:
        hidden = body["hidden"]
        if isinstance(hidden, list) and all(type(width) is int and width >= 1 for width in hidden):
            return {"kind": "mlp", "hidden": hidden}
        message = f"expected a list of widths of at least 1, got {hidden!r}"
        problems.note(SettingsError(message, (*key, "hidden")))
    if "network" in body:
        with problems.caught():
            check_mapping((*key, "network"), body["network"])
            return dict(body["network"])
    return None


def _read_task_stream(
    name: str, body: Mapping[str, Any], key: Key
) -> tuple[str, dict[str, Any], Mapping[str, Any]]:
    """Kind and settings of the stream in full, and the network of its preset, or the usual one."""
    where = (*key, "stream")
    if not isinstance(body.get("stream", {}), dict):
        raise SettingsError(f"expected settings, got {body['stream']!r}", where)
    settings = dict(body.get("stream", {}))
    kind = settings.pop("kind", name)
    if "seed" in settings:
        raise SettingsError("expected no seed; the study's seeds are used", (*where, "seed"))
    network: Mapping[str, Any] = {"kind": "mlp", "hidden": [64, 64]}
    if "preset" in settings:
        preset = preset_of(kind, settings.pop("preset"), where)
        settings, network = {**preset.stream, **settings}, preset.network
    stream = construct(STREAMS, kind, settings, where)
    resolved = {name: getattr(stream, name) for name in parameters(STREAMS[kind]) if name != "seed"}
    return kind, resolved, network


@contextlib.contextmanager
def without_its_package(left_out: Callable[[str], None] | None) -> Iterator[None]:
    """Tell ``left_out``, where there is one, of a method whose package is not installed, and go on."""
    try:
        yield
    except SettingsError as error:
        if left_out is None or not isinstance(error.__cause__, ModuleNotFoundError):
            raise
        left_out(str(error))


def preset_of(kind: Any, name: Any, key: Key) -> Preset:
    """A preset of a registered stream."""
    _check_kind(STREAMS, kind, key)
    presets = STREAMS[kind].PRESETS
    if not isinstance(name, str) or name not in presets:
        raise SettingsError(
            f"expected one of {', '.join(presets)} of {kind}; got {name!r}{did_you_mean(name, presets)}",
            (*key, "preset"),
        )
    return presets[name]


def parameters(kind: type) -> list[str]:
    """Names of a constructor's arguments."""
    parser = ArgumentParser(exit_on_error=False)
    return [name.removeprefix("it.") for name in parser.add_class_arguments(kind, "it")]


def _check_kind(registry: Mapping[str, Any], kind: Any, key: Key) -> None:
    if not isinstance(kind, str) or kind not in registry:
        raise SettingsError(
            f"expected one of {', '.join(registry)}; got {kind!r}{did_you_mean(kind, registry)}", (*key, "kind")
        )


_WORDS = {float: "a number", int: "a whole number", str: "a word", bool: "true or false"}
"""How messages call the types of settings."""


def construct(registry: Mapping[str, type[T]], kind: Any, values: Mapping[str, Any], key: Key) -> T:
    """Make an object of a registered class from settings checked against its constructor's signature.

    Raises:
        SettingsError: of the first setting that is unknown, missing, of another type or out of range.
    """
    _check_kind(registry, kind, key)
    parser = ArgumentParser(exit_on_error=False)
    known = [name.removeprefix("it.") for name in parser.add_class_arguments(registry[kind], "it")]
    signature = inspect.signature(registry[kind]).parameters
    for name in values:
        if name not in known:
            message = f"expected settings {', '.join(known)}; got {name!r}{did_you_mean(name, known)}"
            raise SettingsError(message, (*key, str(name)))
    for name, parameter in signature.items():
        if name in known and parameter.default is parameter.empty and name not in values:
            raise SettingsError(f"expected a setting {name!r} of {kind}, got {', '.join(values) or 'none'}", key)
        wanted = parameter.annotation
        may_be_null = wanted is Any or type(None) in get_args(wanted)
        if values.get(name, parameter) is None and not may_be_null:
            remedy = "" if parameter.default is parameter.empty else f"; leave {name} out for its default"
            raise SettingsError(f"expected {_WORDS.get(wanted, 'a value')}, got null{remedy}", (*key, name))
    try:
        made: T = parser.instantiate(parser.parse_object({"it": dict(values)})).it
    except ArgumentError as error:
        named = re.search(r'"it\.(\w+)', str(error))
        if named is None or named[1] not in values or named[1] not in signature:
            raise SettingsError(one_line(str(error).replace("it.", "")), key) from error
        wanted = signature[named[1]].annotation
        expected = _WORDS.get(wanted) or getattr(wanted, "__name__", None) or str(wanted)
        message = f"expected {expected}, got {values[named[1]]!r}"
        raise SettingsError(message, (*key, named[1])) from error
    except (TypeError, ValueError, OSError, ImportError) as error:
        name, _, said = str(error).partition(": ")
        if name in known:
            raise SettingsError(said, (*key, name)) from error
        raise SettingsError(str(error), key) from error
    for name in values:
        value = getattr(made, name, None)
        if isinstance(value, float) and math.isnan(value):
            raise SettingsError("expected a number, got nan", (*key, name))
    return made
