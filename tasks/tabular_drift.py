"""A table whose rows are in the order of time: prices, demand, sensors."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from clagrange._checks import check_choice, did_you_mean, one_line
from clagrange.tasks.base import Preset, Task, TaskStream, data_folder
from clagrange.tasks.sources import check_sum_beside

if TYPE_CHECKING:
    import pyarrow as pa

KINDS = ("classes", "number")


class TabularDrift(TaskStream):
    """Task n is the n-th stretch of the rows of a table, in their order; nobody knows when the world changes.

    Nothing looks ahead: numeric columns get the mean and the deviation of the first task (missing values count as
    the mean), categorical ones an input for each category of the first task and one for all others, missing ones
    included. A numeric target gets the mean and deviation of the first task too. Batches are in the order of
    time, and there are no test rows: what comes next is the test.

    Args:
        file: a CSV or Parquet table with a line of column names; in ``root`` unless the path is absolute. If
            ``FILE.sha256`` lies beside it, the file is checked against it.
        target: the column to predict.
        numeric: numeric columns; default: all others of numbers, if ``categorical`` is not given either.
        categorical: columns of categories; default: all others of words and truth values, likewise.
        target_kind: "classes" or "number"; default: "number" for floating-point columns.
        tasks: number of tasks; default: as many as the table has.
        examples: rows of each task.
        batch_size: rows of a batch.
        epochs: passes over each task.
        root: folder of the data; default: the environment variable CLAGRANGE_DATA, else ``data``.
        seed: has no part in the stream, whose order is that of time; initial weights follow from it.

    Raises:
        FileNotFoundError: when the file is missing; says where it was looked for.
        ValueError: for a damaged file, and columns that are not there or not of that kind.

    Example:
        >>> rows = [f"{2 * n},{'weekend' if n % 7 > 4 else 'day'},{n % 3 == 0}" for n in range(60)]
        >>> _ = Path("demand.csv").write_text("\\n".join(["load,kind,high", *rows]))
        >>> stream = TabularDrift(str(Path("demand.csv").resolve()), "high", examples=20, batch_size=5)
        >>> stream.tasks, stream.columns, stream.class_names
        (3, ('load', 'kind=day', 'kind=weekend', 'kind=other'), ('false', 'true'))
    """

    PRESETS = {
        "electricity": Preset(
            source="Harries (1999), prices of New South Wales every half hour for 2.5 years, a task a week",
            stream={"file": "electricity.csv", "target": "class", "target_kind": "classes", "examples": 336},
            network={"kind": "mlp", "hidden": [64, 64]},
            optimizer={"kind": "adam", "lr": 0.001},
        ),
        "flights": Preset(
            source="flights from New York in 2013, more than 15 minutes late or not, a task a week; "
            "benchmarks/flights.py makes the table",
            stream={
                "file": "flights.parquet",
                "target": "late",
                "numeric": ["hour", "minute", "distance"],
                "categorical": ["weekday", "carrier", "origin", "dest"],
                "examples": 6_304,
                "batch_size": 16,
            },
            network={"kind": "mlp", "hidden": [64, 64]},
            optimizer={"kind": "adam", "lr": 0.001},
        ),
    }

    hidden_switches = True
    equally_hard = False

    def __init__(
        self,
        file: str,
        target: str,
        numeric: list[str] | None = None,
        categorical: list[str] | None = None,
        target_kind: str | None = None,
        tasks: int | None = None,
        examples: int = 336,
        batch_size: int = 8,
        epochs: int = 1,
        root: str | None = None,
        seed: int = 0,
    ) -> None:
        if target_kind is not None:
            check_choice("target_kind", target_kind, KINDS)
        super().__init__(1 if tasks is None else tasks, examples, batch_size, epochs, seed)
        self.file = file
        self.target = target
        self.numeric = numeric
        self.categorical = categorical
        self.target_kind = target_kind
        self.root = root
        table = self._table()
        available = len(table.targets) // examples
        if tasks is None:
            self.tasks = tasks = max(available, 1)
        if tasks > available:
            raise ValueError(
                f"tasks: expected at most {available} tasks of {examples} of the {len(table.targets)} rows of "
                f"{file}, got {tasks}"
            )
        self.columns = table.columns
        self.input_shape = (len(table.columns),)
        self.class_names = table.labels
        self.classes = 1 if table.labels is None else len(table.labels)
        self.loss = "mse" if table.labels is None else "cross_entropy"

    def task(self, number: int) -> Task:
        """The rows of one task."""
        self._check(number)
        table = self._table()
        rows = torch.arange(number * self.examples, (number + 1) * self.examples)
        return Task(table.inputs, table.targets[rows], rows=rows)

    def order(self, number: int, epoch: int) -> Tensor:
        """The rows of a task in the order of time, the same in every epoch: indices (steps, batch_size)."""
        self._check(number)
        return self._batches(torch.arange(self.examples))

    def _table(self) -> "_Table":
        chosen = (None if columns is None else tuple(columns) for columns in (self.numeric, self.categorical))
        return _read(data_folder(self.root) / self.file, self.target, *chosen, self.target_kind, self.examples)


class _Table:
    """The rows of a table as inputs (rows, columns) and targets (rows,), and what they mean."""

    def __init__(self, inputs: Tensor, targets: Tensor, columns: list[str], labels: list[str] | None) -> None:
        self.inputs = inputs
        self.targets = targets
        self.columns = tuple(columns)
        self.labels = None if labels is None else tuple(labels)


@functools.cache
def _read(
    path: Path,
    target: str,
    numeric: tuple[str, ...] | None,
    categorical: tuple[str, ...] | None,
    kind: str | None,
    known: int,
) -> _Table:
    """The table, encoded by what its first ``known`` rows show."""
    import pyarrow as pa

    table = _load(path)
    for name, named in (("target", (target,)), ("numeric", numeric or ()), ("categorical", categorical or ())):
        for column in named:
            if column not in table.column_names:
                raise ValueError(
                    f"{name}: expected columns of {path} ({', '.join(table.column_names)}); got {column!r}"
                    f"{did_you_mean(column, table.column_names)}"
                )
            if name != "target" and column == target:
                raise ValueError(f"{name}: expected other columns than the target {target!r}")
    if numeric is None and categorical is None:
        others = [column for column in table.column_names if column != target]
        numeric = tuple(column for column in others if _is_number(table[column].type))
        categorical = tuple(column for column in others if column not in numeric)
        for column in categorical:
            if not _is_category(table[column].type):
                raise ValueError(
                    f"categorical: column {column!r} of {path} is of {table[column].type}, neither numbers nor "
                    f"words; name the columns to use in numeric= and categorical="
                )
    parts: list[np.ndarray] = []
    columns: list[str] = []
    for column in numeric or ():
        if not _is_number(table[column].type):
            raise ValueError(f"numeric: expected numbers in {column!r} of {path}, got {table[column].type}")
        parts.append(_standardized(_numbers(table[column]), known)[:, None])
        columns.append(column)
    for column in categorical or ():
        words = _words(table[column])
        categories = sorted({word for word in words[:known] if word is not None})
        parts.append(_one_hot(words, categories))
        columns += [f"{column}={category}" for category in (*categories, "other")]
    if not parts:
        raise ValueError(
            f"numeric: expected at least one column beside the target {target!r} in {path}, got none"
        )
    inputs = torch.from_numpy(np.concatenate(parts, 1)).float()
    if table[target].null_count:
        raise ValueError(f"target: {target!r} of {path} lacks {table[target].null_count} values")
    if kind == "number" or (kind is None and pa.types.is_floating(table[target].type)):
        values = _standardized(_numbers(table[target]), known)
        return _Table(inputs, torch.from_numpy(values).float(), columns, None)
    words = _words(table[target])
    labels = sorted(set(words), key=lambda word: (len(word), word) if word.isdigit() else (0, word))
    numbers = {label: number for number, label in enumerate(labels)}
    return _Table(inputs, torch.tensor([numbers[word] for word in words]), columns, labels)


def _load(path: Path) -> "pa.Table":
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    if not path.is_file():
        raise FileNotFoundError(
            f"file: expected a CSV or Parquet table, found none at {path.resolve()}; give its path, or its "
            f"folder as root= or in the environment variable CLAGRANGE_DATA"
        )
    check_sum_beside(path)
    try:
        if path.suffix.lower() in (".parquet", ".pq"):
            return pyarrow.parquet.read_table(path, page_checksum_verification=True)
        return pyarrow.csv.read_csv(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"file: {path} is truncated, altered or no table ({one_line(error)})") from error


def _is_number(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))


def _is_category(kind: Any) -> bool:
    import pyarrow as pa

    words = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_dictionary(kind)
    return bool(words or pa.types.is_boolean(kind))


def _numbers(column: Any) -> np.ndarray:
    """A column as float64, NaN where a value is missing."""
    return np.array([np.nan if value is None else float(value) for value in column.to_pylist()])


def _words(column: Any) -> list[Any]:
    """A column as words, None where a value is missing."""
    return [
        None if value is None else str(value).lower() if isinstance(value, bool) else str(value)
        for value in column.to_pylist()
    ]


def _standardized(values: np.ndarray, known: int) -> np.ndarray:
    """(x − mean) / deviation with those of the first values; 0 where a value is missing or none was known."""
    first = values[:known][np.isfinite(values[:known])]
    mean, deviation = (first.mean(), first.std()) if len(first) else (0.0, 1.0)
    scaled = (values - mean) / (deviation if deviation > 0 else 1.0)
    return np.where(np.isfinite(scaled), scaled, 0.0)


def _one_hot(words: Sequence[str | None], categories: Sequence[str]) -> np.ndarray:
    """One column for each category and one for all else."""
    places: dict[str | None, int] = {category: place for place, category in enumerate(categories)}
    return np.eye(len(categories) + 1)[[places.get(word, len(categories)) for word in words]]
