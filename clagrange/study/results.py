"""What a run of one method on one stream gave, and its Parquet form."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clagrange.study.files import FileProblem, replacing

METRICS = {
    "online_accuracy": "accuracy on each batch before the update, mean over the task",
    "loss": "cross-entropy on each batch before the update, mean over the task",
    "dead_units": "fraction of hidden units that are 0 on 256 examples of the task before training on it",
    "effective_rank": "effective rank of the last hidden layer's features on the same examples",
    "weight_magnitude": "mean |w| after the task",
    "mean_variance": "mean variance of the Gaussian weights after the task, in units of the prior's",
}
"""What is measured in every task, for every seed."""


@dataclass(frozen=True)
class MethodResult:
    """Results of one method on one stream.

    Attributes:
        stream: name of the stream in the study.
        method: name of the method in the study.
        told_of_switches: whether the method uses the announcement of task switches.
        seeds: one for each replica.
        metrics: for each name in `METRICS` an array (seeds, tasks); NaN where a method has no such number.
        diverged: for each seed whether the loss was ever not finite.
        steps: optimizer steps of one network over all tasks.
        seconds: wall time of the training steps of all seeds together, measurements and files apart.
    """

    stream: str
    method: str
    told_of_switches: bool
    seeds: tuple[int, ...]
    metrics: dict[str, np.ndarray]
    diverged: tuple[bool, ...]
    steps: int
    seconds: float

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
        about = {
            "stream": self.stream,
            "method": self.method,
            "told_of_switches": self.told_of_switches,
            "seeds": list(self.seeds),
            "diverged": list(self.diverged),
            "steps": self.steps,
            "seconds": self.seconds,
        }
        table = pa.table(columns).replace_schema_metadata({"clagrange": json.dumps(about)})
        with replacing(path) as partial:
            pq.write_table(table, partial)

    @classmethod
    def read(cls, path: Path) -> "MethodResult":
        """Read what `write` wrote.

        Raises:
            FileProblem: if the file is damaged or was not written by clagrange.
        """
        try:
            table = pq.read_table(path)
            about = json.loads(table.schema.metadata[b"clagrange"])
            seeds = len(about["seeds"])
            metrics = {name: table[name].to_numpy().reshape(seeds, -1) for name in METRICS}
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
        )
