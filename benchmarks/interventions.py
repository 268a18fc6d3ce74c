"""Cost of every intervention: a training step with it beside one of plain SGD.

    python benchmarks/interventions.py [--store benchmarks/interventions.json] [--threads 1]

Networks 784-w-w-w-10 of ReLU units. Medians over repetitions that take turns, of the ratio in each turn; machines
are shared and noisy.
"""

import argparse
import itertools
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from speed import turns
from torch import nn

import clagrange
from clagrange import interventions
from clagrange.interventions import Intervention
from clagrange.networks import add_layer_norm, mlp, use_crelu
from clagrange.study.files import write_json
from clagrange.study.machine import environment

PLAIN = "SGD"

# at the intervals and rates of their papers; those that act at switches alone cost nothing in between
METHODS: dict[str, Callable[[], Intervention]] = {
    **{
        f"ContinualBackprop {utility}": lambda utility=utility: interventions.ContinualBackprop(
            1e-4, maturity=100, utility=utility
        )
        for utility in ("contribution", "zero_contribution", "adaptable_contribution")
    },
    "GradedContinualBackprop": interventions.GradedContinualBackprop,
    "ReDo": interventions.ReDo,
    "ReDo, the batch of the check alone": lambda: interventions.ReDo(window=1),
    "ReDo, gradient": lambda: interventions.ReDo(score="gradient"),
    "SelfNormalizedResets": interventions.SelfNormalizedResets,
    "ShrinkAndPerturb": interventions.ShrinkAndPerturb,
    "L2Init": interventions.L2Init,
    "RegenerativeL1": interventions.RegenerativeL1,
    "HareAndTortoise": interventions.HareAndTortoise,
    "SpectralRegularization": interventions.SpectralRegularization,
    "NormalizeAndProject": interventions.NormalizeAndProject,
    "SoftReset": interventions.SoftReset,
    "InputNormalization": interventions.InputNormalization,
}
UPGD = "UPGD"
NETWORKS: dict[str, Callable[[nn.Module], object]] = {
    "LayerNorm": add_layer_norm,
    "CReLU": lambda network: use_crelu(network, torch.Generator().manual_seed(0)),
}
OTHERS = (UPGD, *NETWORKS)


def trainer(width: int, batch: int, steps: int, name: str) -> Callable[[], None]:
    """So many training steps on the same batch."""
    network = mlp(784, [width] * 3, 10, seed=0)
    if name in NETWORKS:
        NETWORKS[name](network)
    kind: Any = clagrange.optim.UPGD if name == UPGD else torch.optim.SGD
    optimizer = kind(network.parameters(), lr=1e-3)
    method = METHODS[name]() if name in METHODS else None
    if method is not None:
        method.on_start(network, optimizer)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.rand(batch, 784, generator=generator)
    targets = torch.randint(10, (batch,), generator=generator)

    def train() -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(inputs), targets).backward()
            if method is not None:
                method.on_gradient(network, optimizer)
            optimizer.step()
            if method is not None:
                method.on_step(network, optimizer)

    return train


def main() -> None:
    """Measure, print, and store when asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, default=None, help="JSON file for the figures")
    parser.add_argument("--threads", type=int, default=None, help="of torch; default: its own choice")
    parser.add_argument("--repetitions", type=int, default=45)
    parser.add_argument("--only", default="", help="methods whose name contains this")
    chosen = parser.parse_args()
    if chosen.threads is not None:
        torch.set_num_threads(chosen.threads)
    torch.set_flush_denormal(True)
    figures: dict[str, Any] = {
        "environment": environment(),
        "threads": torch.get_num_threads(),
        "step_seconds": {},
        "times_sgd": {},
    }
    for width, batch in itertools.product((100, 2000), (1, 64)):
        steps = math.ceil(2000 / width)
        names = [name for name in (*METHODS, *OTHERS) if chosen.only in name]
        actions = {name: trainer(width, batch, steps, name) for name in (PLAIN, *names)}
        times = turns(actions, chosen.repetitions)
        ratios = {
            name: statistics.median(own / plain for own, plain in zip(of_name, times[PLAIN], strict=True))
            for name, of_name in times.items()
        }
        seconds = {name: statistics.median(of_name) / steps for name, of_name in times.items()}
        print(f"Training step, width {width}, batch {batch}, {figures['threads']} threads")
        for name, value in seconds.items():
            print(f"  {name:45s} {1e6 * value:10.0f} us   {ratios[name]:6.2f} x {PLAIN}")
        figures["step_seconds"][f"width {width}, batch {batch}"] = seconds
        figures["times_sgd"][f"width {width}, batch {batch}"] = ratios
    if chosen.store is not None:
        write_json(chosen.store, figures)


if __name__ == "__main__":
    main()
