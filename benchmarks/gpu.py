"""Speed on a GPU: the study engine beside single networks, the Euler-Lagrange step and training beside AdamW's.

    python benchmarks/gpu.py [--store benchmarks/gpu.json] [--device cuda]

Ratios within one run, medians over turns; the device is waited for before each reading of the clock. A network
"alone" is trained by plain torch, each kernel launched by itself. "Captured" steps of the engine are replayed
from a CUDA graph, which each task of 100 steps captures anew. Memory allows as many steps as their weights can go
through it, at the rate at which numbers are read and written in place, see benchmarks/engine.py.
``--device cpu --small`` tries the script where there is no GPU, and nothing is captured.
"""

import argparse
import functools
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from engine import CONTINUAL, Noise, floor, noise
from speed import network_with_gradients, turns
from torch import nn

import clagrange
from clagrange.networks import build, mlp
from clagrange.optim import EulerLagrange
from clagrange.study import engine
from clagrange.study.files import write_json
from clagrange.study.machine import environment
from clagrange.study.methods import METHODS

STEPS = 100
"""Training steps of a task, or of one turn."""
TURNS = 7

Action = Callable[[], Any]


def seconds(actions: dict[str, Action], device: torch.device) -> dict[str, float]:
    """Median seconds of actions on a device."""

    def waiting(action: Action) -> None:
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    timed = turns({name: functools.partial(waiting, action) for name, action in actions.items()}, TURNS)
    return {name: statistics.median(each) for name, each in timed.items()}


def run_of(name: str, hidden: list[int], batch: int, replicas: int, device: torch.device, graphs: bool) -> Action:
    """A task of the engine; all replicas see the same examples, and start from the same weights."""
    settings = dict(CONTINUAL, base="sgd") if name == "continual_backprop" else {}
    streams = [Noise(STEPS, batch, 0)] * replicas
    found, engine.graphs_of = engine.graphs_of, engine.graphs_of if graphs else lambda device: None
    try:
        run = engine.Run(METHODS[name](**settings), streams, hidden, measured=False, device=device)
    finally:
        engine.graphs_of = found
    return run.run_task


def alone(name: str, hidden: list[int], batch: int, device: torch.device) -> Action:
    """As many steps of one network by plain torch."""
    network = mlp(784, hidden, 10).to(device)
    kinds: dict[str, Any] = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
    optimizer = kinds[name](network.parameters(), lr=1e-3, fused=True)
    inputs, targets = (each.to(device) for each in noise())

    def train() -> None:
        for step in range(STEPS):
            place = step * batch % (len(targets) - batch)
            optimizer.zero_grad()
            logits = network(inputs[place : place + batch])
            nn.functional.cross_entropy(logits, targets[place : place + batch]).backward()
            optimizer.step()

    return train


def engine_rates(device: torch.device, small: bool) -> dict[str, Any]:
    """Model-steps per second, their ratios to one network alone, and at width 2000 the share of the floor."""
    numbers = torch.ones((1 << 20) if small else (1 << 28), device=device)
    bandwidth = 2 * numbers.nbytes / seconds({"neg": numbers.neg_}, device)["neg"]
    rates: dict[str, float] = {}
    figures: dict[str, Any] = {"bandwidth": bandwidth, "per_second": rates, "ratios": {}, "share_of_floor": {}}
    print(f"memory: {bandwidth / 1e9:.0f} GB/s")
    narrow, wide = ((1, 4), (1, 2)) if small else ((1, 10, 100, 1000), (1, 4, 16, 64))
    methods = ("sgd", "adam", "continual_backprop", "euler_lagrange", "euler_lagrange_kronecker")
    for width, groups in ((100, narrow), (200 if small else 2000, wide)):
        for batch in (1, 16) if width == 100 else (1,):
            for name in methods:
                for replicas in groups:
                    forms = {
                        form: run_of(name, [width] * 3, batch, replicas, device, form == "captured")
                        for form in ("captured", "launched")
                    }
                    if replicas == 1 and name in ("sgd", "adam"):
                        forms = {"alone, by torch": alone(name, [width] * 3, batch, device), **forms}
                    for form, time in seconds(forms, device).items():
                        label = f"{name}, width {width}, batch {batch}, {replicas} replicas, {form}"
                        rate = rates[label] = replicas * STEPS / time
                        single = rates[f"sgd, width {width}, batch {batch}, 1 replicas, alone, by torch"]
                        figures["ratios"][label] = rate / single
                        line = f"{label:75s} {rate:12.0f} model-steps/s {rate / single:8.2f} x SGD alone"
                        if width > 100 and name in ("sgd", "continual_backprop"):
                            allowed = floor(name, width, bandwidth, cached=device.type == "cpu")
                            figures["share_of_floor"][label] = rate / allowed
                            line += f" {100 * rate / allowed:5.1f} % of what memory allows"
                        print(line, flush=True)
    return figures


def optimizer_steps(device: torch.device, small: bool) -> dict[str, float]:
    """Seconds of one step on 10 million weights."""
    width = 64 if small else 2236
    actions: dict[str, Action] = {}
    for form in ("foreach", "fused"):
        weights = network_with_gradients(width).to(device).parameters()
        actions[f"AdamW {form}"] = torch.optim.AdamW(weights, **{form: True}).step
    for form in ("foreach", "compiled"):
        for discount in (math.inf, 1.0):
            network = clagrange.gaussianize(network_with_gradients(width)).to(device)
            layers = [layer for _, layer in clagrange.gaussian.gaussian_layers(network)]
            chosen: dict[str, Any] = {"foreach": form == "foreach", "compiled": form == "compiled"}
            optimizer = EulerLagrange(network, lr=1e-6, discount=discount, variance_rate=1e-2, **chosen)

            def step(layers: Any = layers, optimizer: EulerLagrange = optimizer) -> None:
                for layer in layers:
                    layer.examples = 64
                optimizer.step()

            actions[f"Euler-Lagrange {form}, discount {discount:g}"] = step
    found = seconds(actions, device)
    for name, time in found.items():
        print(f"{name:45s} {1e6 * time:10.0f} us {time / found['AdamW fused']:6.2f} x AdamW fused")
    return found


def residual_network(device: torch.device, small: bool) -> dict[str, float]:
    """Seconds of a training step of a ResNet-18 on images of 32 x 32 at batch 128."""
    batch, width = (4, 4) if small else (128, 64)
    inputs = torch.rand(batch, 3, 32, 32, device=device)
    targets = torch.randint(10, (batch,), device=device)

    def trainer(precision: str | None) -> Action:
        network = build({"kind": "resnet18", "norm": "batch", "width": width}, (3, 32, 32), 10, seed=0)
        if precision is not None:
            network = clagrange.gaussianize(network, precision)
        network.to(device)
        optimizer: Any = (
            torch.optim.AdamW(network.parameters(), fused=True)
            if precision is None
            else EulerLagrange(network, lr=6e-3, temperature=1e-4, trust_region=0.1, variance_rate=1e-2)
        )

        def train() -> None:
            for _ in range(2 if small else 20):
                optimizer.zero_grad()
                nn.functional.cross_entropy(network(inputs), targets).backward()
                optimizer.step()

        return train

    kinds = {"AdamW fused": None, "Euler-Lagrange diagonal": "diagonal", "Euler-Lagrange Kronecker": "kronecker"}
    found = seconds({name: trainer(precision) for name, precision in kinds.items()}, device)
    for name, time in found.items():
        print(f"ResNet-18, {name:34s} {1e3 * time:10.1f} ms {time / found['AdamW fused']:6.2f} x AdamW fused")
    return found


def main() -> None:
    """Measure, print, and store when asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="small networks, to try the script")
    parser.add_argument("--store", type=Path, default=None, help="JSON file for the figures")
    chosen = parser.parse_args()
    device = torch.device(chosen.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device: expected a device of this machine, got cuda where torch finds no GPU")
    figures: dict[str, Any] = {"environment": environment(device)}
    parts = {
        "engine": engine_rates,
        "training_step_seconds": residual_network,
        "optimizer_step_seconds": optimizer_steps,
    }
    for name, part in parts.items():
        figures[name] = part(device, chosen.small)
        if chosen.store is not None:  # what is there already, should a later part fail
            write_json(chosen.store, figures)


if __name__ == "__main__":
    main()
