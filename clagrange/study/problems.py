"""YAML files that know on which line each setting stands, and everything that is wrong with one."""

import contextlib
import importlib.resources
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from clagrange._checks import did_you_mean, one_line

Key = tuple[str, ...]
"""Where a setting is: the keys from the top of the file to it."""


class SettingsError(ValueError):
    """A study file, an override or an output folder that cannot be used; a line for each problem.

    Args:
        message: what was expected, what came, and the remedy.
        key: of the setting in its file; then the message begins with it.
    """

    def __init__(self, message: str, key: Key | None = None) -> None:
        super().__init__(message if not key else f"{'.'.join(key)}: {message}")
        self.key = key


class Document:
    """A parsed YAML file, its overrides applied.

    Aliases are copied, so that an override of one place leaves the others alone.

    Attributes:
        tree: mappings, lists and values.
        name: the file as messages name it.

    Example:
        >>> document = Document("seeds: 2\\nstreams: {}", "study.yaml")
        >>> document.override(["seeds=3"])
        >>> document.tree["seeds"], document.place(("seeds",)), document.place(("streams",))
        (3, "override 'seeds=3'", 'study.yaml:2')
    """

    def __init__(self, text: str, name: str) -> None:
        self.name = name
        self.tree, lines = _parsed(text, name)
        self._places = {key: f"{name}:{line}" for key, line in lines.items()}
        self.tree = _filled(self.tree)

    def place(self, key: Key) -> str:
        """The file and line, or the override, that a setting or the nearest one around it is from."""
        while key not in self._places and key:
            key = key[:-1]
        return self._places.get(key, self.name)

    def override(self, overrides: Sequence[str]) -> None:
        """Set the values that ``key=value`` strings name by the end of their path.

        Raises:
            SettingsError: if the file has no such path, or the value is not YAML.
        """
        for item in overrides:
            name, equals, text = item.partition("=")
            if not equals or not name:
                raise SettingsError(f"override {item!r}: expected key=value, as in tasks=10 or sgd.lr=0.1")
            *parents, last = name.split(".")
            nodes = list(_mappings(self.tree, ()))
            chosen = [
                (key, node)
                for key, node in nodes
                if (not parents or key[-len(parents) :] == tuple(parents)) and (last in node or parents)
            ]
            if not chosen:
                known = sorted({str(entry) for _, node in nodes for entry in node})
                raise SettingsError(
                    f"override {item!r}: expected the end of a setting's path in {self.name}, got {name!r}"
                    f"{did_you_mean(last, known) or did_you_mean(parents[0] if parents else last, known)}"
                )
            for key, node in chosen:
                node[last] = _filled(_parsed(text, f"override {item!r}")[0])
                within = (*key, last)
                self._places = {k: v for k, v in self._places.items() if k[: len(within)] != within}
                self._places[within] = f"override {item!r}"


class Problems:
    """What is wrong with a document: all of it is gathered, then raised at once."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self._lines: dict[str, None] = {}

    def note(self, error: SettingsError) -> None:
        """Keep a problem, with its place in front."""
        where = "" if error.key is None else f"{self.document.place(error.key)}: "
        self._lines[f"{where}{error}"] = None

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        """Keep the problem that ends what is done inside."""
        try:
            yield
        except SettingsError as error:
            self.note(error)

    def check_keys(self, key: Key, value: Any, known: Iterable[str], required: Iterable[str]) -> None:
        """Note each unknown and each missing key.

        Raises:
            SettingsError: unless ``value`` is a mapping with at least one entry.
        """
        check_mapping(key, value)
        known = sorted(known)
        for name in value:
            if name not in known:
                self.note(
                    SettingsError(
                        f"expected {', '.join(known)}; got {name!r}{did_you_mean(name, known)}", (*key, str(name))
                    )
                )
        for name in sorted(set(required) - set(value)):
            got = ", ".join(map(str, value))
            self.note(SettingsError(f"expected a setting {name!r}, got {got}", key))

    def raise_any(self) -> None:
        """Raise all that was gathered, a line for each problem.

        Raises:
            SettingsError: if there is any.
        """
        if self._lines:
            raise SettingsError("\n".join(self._lines))


def check_mapping(key: Key, value: Any) -> None:
    """Raise unless ``value`` is a mapping with at least one entry.

    Raises:
        SettingsError: if not.
    """
    if not isinstance(value, Mapping) or not value:
        raise SettingsError(f"expected a mapping with at least one entry, got {value!r}", key)


def read_document(source: str | Path) -> Document:
    """Parse a YAML file, given by path or by the name of one that comes with the package.

    Raises:
        SettingsError: if it cannot be read, is not YAML, or has a key twice in one place.
    """
    packaged = importlib.resources.files("clagrange.configs")
    names = sorted(entry.name[:-5] for entry in packaged.iterdir() if entry.name.endswith(".yaml"))
    known = str(source) in names
    try:
        text = (packaged / f"{source}.yaml" if known else Path(source)).read_text(encoding="utf-8")
    except OSError as error:
        raise SettingsError(
            f"config: expected a readable file or one of {', '.join(names)}; got {str(source)!r} "
            f"({error.strerror}){did_you_mean(source, names)}"
        ) from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"config: expected text in UTF-8, got {str(source)!r} ({error.reason})") from error
    return Document(text, f"{source}.yaml" if known else str(source))


def _parsed(text: str, name: str) -> tuple[Any, dict[Key, int]]:
    """What `yaml.safe_load` gives, without shared parts, and the line of each key; a key twice is an error."""
    loader = yaml.SafeLoader(text)
    lines: dict[Key, int] = {}
    twice: list[str] = []
    within: list[yaml.Node] = []
    flat: set[int] = set()

    def construct(node: yaml.Node, key: Key) -> Any:
        if any(node is outer for outer in within):
            raise SettingsError(f"{name}:{_line(node)}: expected values, got an alias of what it stands in")
        within.append(node)
        try:
            if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
                return mapping(node, key)
            if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
                return [construct(entry, (*key, str(place))) for place, entry in enumerate(node.value)]
            return loader.construct_object(node, deep=True)
        finally:
            within.pop()

    def mapping(node: yaml.MappingNode, key: Key) -> dict[Any, Any]:
        own: dict[Any, int] = {}
        for entry, _ in [] if id(node) in flat else node.value:
            if entry.tag == "tag:yaml.org,2002:merge":
                continue
            word = loader.construct_object(entry, deep=True)
            if word in own:
                twice.append(
                    f"{name}:{_line(entry)}: {'.'.join((*key, str(word)))}: expected each name once in one "
                    f"place, got it again after line {own[word]}; rename or remove one"
                )
            own.setdefault(word, _line(entry))
        loader.flatten_mapping(node)  # entries of "<<: *alias" now stand before its own
        flat.add(id(node))
        found = {}
        for entry, value in node.value:
            word = loader.construct_object(entry, deep=True)
            lines[*key, str(word)] = _line(entry)
            found[word] = construct(value, (*key, str(word)))
        return found

    try:
        root = loader.get_single_node()
        tree = None if root is None else construct(root, ())
    except (yaml.YAMLError, TypeError) as error:  # TypeError: a key that is a list
        mark = getattr(error, "problem_mark", None)
        where = name if mark is None else f"{name}:{mark.line + 1}"
        said = getattr(error, "problem", None) or one_line(error)
        raise SettingsError(f"{where}: expected YAML, got what is not valid YAML: {said}") from error
    finally:
        loader.dispose()
    if twice:
        raise SettingsError("\n".join(dict.fromkeys(twice)))
    return tree, lines


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _filled(tree: Any) -> Any:
    """The same with {} for a method, or a stream, that has no settings."""
    if not isinstance(tree, dict):
        return tree
    filled = {}
    for key, value in tree.items():
        if key == "methods" and isinstance(value, dict):
            filled[key] = {name: {} if entry is None else entry for name, entry in value.items()}
        else:
            filled[key] = {} if key == "stream" and value is None else _filled(value)
    return filled


def _mappings(tree: Any, key: Key) -> Iterator[tuple[Key, dict[str, Any]]]:
    if isinstance(tree, dict):
        yield key, tree
        for name, value in tree.items():
            yield from _mappings(value, (*key, str(name)))
