"""Delay and false alarms of the switch detectors, on permuted digits whose switches nobody announces.

    python benchmarks/detection.py [--store benchmarks/detection.json] [--tasks 5] [--seeds 5] [--batch 4 16]

Every detector watches the same training, which it does not change. An alarm within a task is late by the steps
since the switch; the first after each switch counts as its detection, every other one, and those within the first
task, as false. Medians and quartiles are over all switches that were noticed before the next; the rate of false
alarms is for 1,000 steps.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from clagrange.interventions import (
    CUSUM,
    Detector,
    EnergyJump,
    Intervention,
    PageHinkley,
    PredictiveSurprise,
)
from clagrange.study.engine import Run
from clagrange.study.files import write_json
from clagrange.study.machine import environment
from clagrange.study.methods import METHODS, Method
from clagrange.tasks import PermutedDigits

DETECTORS: dict[str, type[Detector]] = {
    "cusum": CUSUM,
    "page_hinkley": PageHinkley,
    "predictive_surprise": PredictiveSurprise,
    "energy_jump": EnergyJump,
}
THRESHOLDS = {
    "cusum": (6.0, 8.0, 10.0),
    "page_hinkley": (6.0, 9.0, 12.0),
    "predictive_surprise": (6.0, 8.0, 10.0),
    "energy_jump": (5.0, 8.0, 12.0),
}
METHOD_NAMES = ("euler_lagrange", "euler_lagrange_kronecker")


class Watching(Intervention):
    """Notes the alarms of a detector and does nothing."""

    def __init__(self, detector: Detector) -> None:
        super().__init__(detector=detector)
        self.alarms: list[torch.Tensor] = []

    def step_taken(self, network: nn.Module, optimizer: Optimizer) -> None:
        """Note the replicas with an alarm."""
        assert self.detector is not None
        self.alarms.append(self.detector.on_step(network, optimizer))

    def on_switch(self, network: nn.Module, optimizer: Optimizer) -> None:
        """Nothing: without it a detector would be refused."""


def alarms(method: Method, streams: list[PermutedDigits]) -> dict[tuple[str, float], np.ndarray]:
    """Which steps of which seed had an alarm, (seeds, steps), by detector and threshold."""
    run = Run(method, streams, [64, 64])
    chosen = [(name, threshold) for name in DETECTORS for threshold in THRESHOLDS[name]]
    watchers = [Watching(DETECTORS[name](threshold=threshold)) for name, threshold in chosen]
    run.interventions = list(watchers)
    while run.next_task < run.tasks:
        run.run_task()
    return {key: torch.stack(watcher.alarms, 1).numpy() for key, watcher in zip(chosen, watchers, strict=True)}


def figures(found: np.ndarray, steps: int) -> dict[str, Any]:
    """Delays and false alarms from alarms (seeds, tasks · steps)."""
    by_task = found.reshape(len(found), -1, steps)
    false = int(by_task[:, 0].sum()) + int(np.maximum(by_task[:, 1:].sum(-1) - 1, 0).sum())
    noticed = by_task[:, 1:].any(-1)
    delays = by_task[:, 1:].argmax(-1)[noticed] + 1
    quartiles = np.percentile(delays, [25, 50, 75]).tolist() if delays.size else None
    return {
        "noticed": round(float(noticed.mean()), 4),
        "delay_quartiles": quartiles,
        "false_alarms_per_1000_steps": round(1000.0 * false / found.size, 3),
    }


def main() -> None:
    """Measure and print, and store if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path)
    parser.add_argument("--tasks", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--batch", type=int, nargs="+", default=[4, 16])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for batch in arguments.batch:
        for name in METHOD_NAMES:
            streams = [
                PermutedDigits(tasks=arguments.tasks, batch_size=batch, seed=seed)
                for seed in range(arguments.seeds)
            ]
            for (detector, threshold), found in alarms(METHODS[name](), streams).items():
                row = {"batch": batch, "method": name, "detector": detector, "threshold": threshold}
                rows.append({**row, **figures(found, streams[0].steps)})
                print(rows[-1], flush=True)
    if arguments.store:
        settings = {"tasks": arguments.tasks, "seeds": arguments.seeds, "examples": streams[0].examples}
        write_json(arguments.store, {"environment": environment(), "settings": settings, "rows": rows})


if __name__ == "__main__":
    main()
