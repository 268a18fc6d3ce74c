"""Memory and time over a long stream: a thousand tasks of permuted digits, one network and twenty as replicas.

    python benchmarks/memory.py [--store benchmarks/memory.json] [--tasks 1000] [--replicas 1 20]

Each number of replicas runs in a process of its own, by the study runner's engine, with everything measured that
a study measures. Resident memory is what the system says of the whole process, torch included. Milliseconds are
the processor's for a task, training and measuring, mean over the tasks since the row before: moments apart, on a
machine that others use too. So what tasks after the thousandth cost beside those after the tenth is measured
in turns, by that run and a second one; the median of the ratios counts. A task of a stream depends on its number
alone: the time to make the last one is that of the first.
"""

import argparse
import gc
import multiprocessing
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from speed import medians, turns

from clagrange.study.engine import Run
from clagrange.study.files import write_json
from clagrange.study.machine import environment
from clagrange.study.methods import METHODS
from clagrange.tasks import PermutedDigits

NOTED = (1, 10, 100, 500, 1_000)
"""Tasks after which memory is read."""
EARLY = 10
"""Tasks behind a run whose next ones are compared with those that follow the last task."""
TURNS = 200
STREAM = {"examples": 64, "batch_size": 8}
METHOD = "continual_backprop"
HIDDEN = [64, 64]


def resident() -> float:
    """Resident memory of this process in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmRSS:"))) / 1024


def measure(tasks: int, replicas: int) -> dict[str, Any]:
    """Memory and processor seconds per task at the noted tasks; the cost of late tasks beside early ones."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)

    def fresh() -> Run:
        streams = [PermutedDigits(tasks=tasks + TURNS + 1, seed=seed, **STREAM) for seed in range(replicas)]
        return Run(METHODS[METHOD](), streams, HIDDEN)

    run = fresh()
    rows: list[dict[str, float]] = []
    started, before = time.process_time(), 0
    while run.next_task < tasks:
        run.run_task()
        done = run.next_task
        if done in NOTED or done == tasks:
            seconds = (time.process_time() - started) / (done - before)
            gc.collect()
            rows.append({"task": done, "resident_mib": resident(), "processor_seconds_per_task": seconds})
            started, before = time.process_time(), done
    early = fresh()
    for _ in range(EARLY):
        early.run_task()
    seconds_of = turns({"late": run.run_task, "early": early.run_task}, TURNS)
    ratios = [late / early for late, early in zip(*seconds_of.values(), strict=True)]
    return {"rows": rows, "late_over_early": statistics.median(ratios)}


def reaching(tasks: int) -> dict[str, float]:
    """Seconds to make the first and the last task, and the order of its batches, in a stream that made none."""

    def reach(number: int) -> Any:
        return lambda: (lambda stream: (stream.task(number).inputs, stream.order(number, 0)))(
            PermutedDigits(tasks=tasks, **STREAM)
        )

    return medians({"first": reach(0), "last": reach(tasks - 1)}, 50)


def main() -> None:
    """Measure, print, and store when asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, default=None, help="JSON file for the figures")
    parser.add_argument("--tasks", type=int, default=1_000)
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 20])
    chosen = parser.parse_args()
    figures: dict[str, Any] = {
        "environment": environment(),
        "stream": {"kind": "permuted_digits", "tasks": chosen.tasks, **STREAM},
        "hidden": HIDDEN,
        "method": METHOD,
        "replicas": {},
    }
    for replicas in chosen.replicas:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            measured = pool.apply(measure, (chosen.tasks, replicas))
        figures["replicas"][str(replicas)] = measured
        for row in measured["rows"]:
            print(
                f"{replicas:3d} replicas, task {row['task']:5.0f}: {row['resident_mib']:7.1f} MiB, "
                f"{1e3 * row['processor_seconds_per_task']:6.1f} ms per task",
                flush=True,
            )
        print(
            f"{replicas:3d} replicas, after task {chosen.tasks}: a task costs {measured['late_over_early']:.3f} "
            f"times one after task {EARLY}"
        )
    figures["seconds_to_reach"] = reaching(chosen.tasks)
    for which, seconds in figures["seconds_to_reach"].items():
        print(f"{which} task reached in {1e3 * seconds:.2f} ms")
    if chosen.store is not None:
        write_json(chosen.store, figures)


if __name__ == "__main__":
    main()
