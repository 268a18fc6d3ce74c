"""What a run of one method on one stream gave, and its Parquet form."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clagrange.metrics.registry import METRICS as QUANTITIES
from clagrange.study.files import FileProblem, replacing

STREAMED = ("online_accuracy", "loss", "calibration_error", "brier_score", "sample_plasticity")
REQUIRED = ("online_accuracy", "loss")
"""What results of every version have."""
BEFORE_A_TASK = (
    "dead_units",
    "dormant_units",
    "rarely_active_units",
    "effective_rank",
    "approximate_rank",
    "stable_rank",
    "textbook_stable_rank",
    "gradient_norm",
)
AFTER_A_TASK = (
    "task_accuracy",
    "weight_magnitude",
    "weight_norm",
    "distance_from_initialization",
    "mean_variance",
    "determined_parameters",
    "sharpness",
)
BY_LAYER = "variance_by_layer"
"""Measured after every task too, under the name and "/LAYER" for each layer."""
_WHEN = {
    "sample_plasticity": "where the study asks for it",
    **dict.fromkeys(BEFORE_A_TASK, "on 256 examples of the task before training on it"),
    **dict.fromkeys(AFTER_A_TASK, "after the task"),
}
METRICS = {
    name: ", ".join(part for part in (QUANTITIES[name].summary, _WHEN.get(name)) if part)
    for name in (*STREAMED, *BEFORE_A_TASK, *AFTER_A_TASK)
}
"""What is measured in every task, for every seed, under the names of `clagrange.metrics.METRICS`.

"task_accuracy" is on 1,000 of a task's test examples at most, of those it was trained on where it has no others;
"sharpness" and "sample_plasticity" are measured in the tasks for which the study asks, see
`clagrange.study.engine.Run`.
"""


def logged(name: str) -> str:
    """Where a metric of `clagrange.metrics.METRICS` is logged.

    Example:
        >>> logged("forgetting")
        'study: summary.json, over seeds'
    """
    if QUANTITIES[name].kind == "tasks":
        return "study: summary.json, over seeds"
    when = {**dict.fromkeys(STREAMED, "over the task"), BY_LAYER: "after the task", **_WHEN}[name]
    return f"study: results of each task ({when}); PlasticityMonitor, PlasticityMetrics"


@dataclass(frozen=True)
class MethodResult:
    """Results of one method on one stream.

    Attributes:
        stream: name of the stream in the study.
        method: name of the method in the study.
        told_of_switches: whether the method uses the announcement of task switches.
        seeds: one for each replica.
        metrics: for each name in `METRICS`, and each "variance_by_layer/LAYER" of Gaussian weights, an array
            (seeds, tasks); NaN where a method has no such number.
        diverged: for each seed whether the loss was ever not finite.
        steps: optimizer steps of one network over all tasks.
        seconds: wall time of the training steps of all seeds together, measurements and files apart.
        matrix: on streams of some tasks with test examples, (seeds, 1 + tasks, tasks): the accuracy on the test
            examples of every task, before any training and after each task; else None.
        samples: number of examples up to the end of each task, (tasks,).
        elapsed: ``seconds`` up to the end of each task, (tasks,). Both are None in results of older versions.
        origin: settings, data and version that the numbers follow from (`clagrange.study.store.Origin`); None of
            results that were stored without it.
    """

    stream: str
    method: str
    told_of_switches: bool
    seeds: tuple[int, ...]
    metrics: dict[str, np.ndarray]
    diverged: tuple[bool, ...]
    steps: int
    seconds: float
    matrix: np.ndarray | None = None
    samples: np.ndarray | None = None
    elapsed: np.ndarray | None = None
    origin: dict[str, Any] | None = None

    @property
    def measure(self) -> str:
        """What the method is judged by: the online accuracy, or the loss where targets are numbers."""
        return "loss" if np.isnan(self.metrics["online_accuracy"]).all() else "online_accuracy"

    @property
    def tasks(self) -> int:
        """Number of tasks."""
        return int(self.metrics["online_accuracy"].shape[1])

    def write(self, path: Path) -> None:
        """Write one row for each seed and task; what belongs to the whole run goes into the schema's metadata."""
        seeds, tasks = self.metrics["online_accuracy"].shape
        columns: dict[str, object] = {
            "stream": [self.stream] * (seeds * tasks),
            "method": [self.method] * (seeds * tasks),
            "seed": np.repeat(np.asarray(self.seeds, dtype=np.int64), tasks),
            "task": np.tile(np.arange(tasks), seeds),
            **{name: values.reshape(-1) for name, values in self.metrics.items()},
        }
        if self.matrix is not None:
            columns["untrained_accuracy"] = self.matrix[:, 0].reshape(-1)
            columns["test_accuracies"] = list(self.matrix[:, 1:].reshape(seeds * tasks, tasks))
        about = {
            "stream": self.stream,
            "method": self.method,
            "told_of_switches": self.told_of_switches,
            "seeds": list(self.seeds),
            "diverged": list(self.diverged),
            "steps": self.steps,
            "seconds": self.seconds,
            **{
                name: values.tolist()
                for name, values in (("samples", self.samples), ("elapsed", self.elapsed))
                if values is not None
            },
            "origin": self.origin,
        }
        table = pa.table(columns)
        about["checksum"] = _checksum(table, about)
        table = table.replace_schema_metadata({"clagrange": json.dumps(about)})
        with replacing(path) as partial:
            pq.write_table(table, partial, write_page_checksum=True)

    @classmethod
    def read(cls, path: Path) -> "MethodResult":
        """Read what `write` wrote.

        Raises:
            FileProblem: if the file is damaged or was not written by clagrange.
        """
        try:
            table = pq.read_table(path, page_checksum_verification=True)
            about = json.loads(table.schema.metadata[b"clagrange"])
            if about.pop("checksum", None) not in (None, _checksum(table, about)):  # older files have none
                raise ValueError("the checksum is another")
            seeds = len(about["seeds"])
            tasks = len(table) // seeds
            by_layer = [name for name in table.column_names if name.startswith(f"{BY_LAYER}/")]
            metrics = {
                name: table[name].to_numpy().reshape(seeds, tasks)
                if name in (*REQUIRED, *table.column_names)
                else np.full((seeds, tasks), np.nan)  # measured by later versions only
                for name in (*METRICS, *by_layer)
            }
            matrix = None
            if "test_accuracies" in table.column_names:
                untrained = table["untrained_accuracy"].to_numpy().reshape(seeds, 1, tasks)
                trained = np.array(table["test_accuracies"].to_pylist()).reshape(seeds, tasks, tasks)
                matrix = np.concatenate([untrained, trained], 1)
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
            raise FileProblem(
                f"{path}: expected per-task results written by clagrange, got a damaged or foreign file; "
                f"remove it and run again with --resume"
            ) from error
        return cls(
            stream=about["stream"],
            method=about["method"],
            told_of_switches=about["told_of_switches"],
            seeds=tuple(about["seeds"]),
            metrics=metrics,
            diverged=tuple(about["diverged"]),
            steps=about["steps"],
            seconds=about["seconds"],
            matrix=matrix,
            samples=np.array(about["samples"]) if "samples" in about else None,
            elapsed=np.array(about["elapsed"]) if "elapsed" in about else None,
            origin=about.get("origin"),
        )


def _checksum(table: pa.Table, about: dict[str, Any]) -> str:
    """Of all that a file says; Parquet's own checksums leave out names, metadata and the heads of pages."""
    digest = hashlib.sha256(json.dumps(about).encode())
    for name in table.column_names:
        digest.update(name.encode() + np.array(table[name].to_pylist()).tobytes())
    return digest.hexdigest()
