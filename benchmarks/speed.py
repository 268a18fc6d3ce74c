"""Speed of the Euler-Lagrange step and of training beside AdamW's, and of replicas beside single networks.

    python benchmarks/speed.py [--store benchmarks/speed.json]

Ratios within one run, medians over repetitions that take turns; machines are shared and noisy.
"""

import argparse
import functools
import importlib.util
import itertools
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import clagrange
from clagrange.gaussian import Diagonal, Kronecker
from clagrange.networks import mlp
from clagrange.optim import EulerLagrange
from clagrange.study.engine import Run
from clagrange.study.files import write_json
from clagrange.study.machine import environment
from clagrange.study.methods import METHODS
from clagrange.tasks import PermutedDigits


def medians(actions: dict[str, Callable[[], Any]], repetitions: int) -> dict[str, float]:
    """Median seconds of each action."""
    return {name: statistics.median(times) for name, times in turns(actions, repetitions).items()}


def turns(actions: dict[str, Callable[[], Any]], repetitions: int) -> dict[str, list[float]]:
    """Seconds of each action in each of so many turns; they take turns so that a slow moment hits all."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for repetition in range(repetitions + 1):
        for name, action in actions.items():
            started = time.perf_counter()
            action()
            if repetition:  # the first one warms up
                seconds[name].append(time.perf_counter() - started)
    return seconds


def network_with_gradients(width: int) -> nn.Sequential:
    """Two layers with 2·width·(width + 1) weights, and gradients that stay the same."""
    network = nn.Sequential(nn.Linear(width, width), nn.Linear(width, width))
    for parameter in network.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    return network


def euler_lagrange_steps(width: int) -> dict[str, Callable[[], Any]]:
    """The step of diagonal precisions: without and with a bound of 1σ, at infinite and finite discount."""
    network = clagrange.gaussianize(network_with_gradients(width))
    layers = [layer for _, layer in clagrange.gaussian.gaussian_layers(network)]

    def step(optimizer: EulerLagrange) -> None:
        for layer in layers:
            layer.examples = 64
        optimizer.step()

    steps: dict[str, Callable[[], Any]] = {}
    for form in ("plain", "foreach", "compiled"):
        fast: dict[str, Any] = {"foreach": form != "plain", "compiled": form == "compiled"}
        for discount, trust_region in itertools.product((math.inf, 1.0), repeat=2):
            optimizer = EulerLagrange(
                network,
                lr=1e-6,
                temperature=1e-5,
                variance_rate=1e-2,
                discount=discount,
                trust_region=trust_region,
                **fast,
            )
            name = f"Euler-Lagrange {form}, discount {discount:g}{', trust region' * (trust_region < math.inf)}"
            steps[name] = functools.partial(step, optimizer)
    return steps


def optimizer_steps(width: int, repetitions: int) -> dict[str, float]:
    """Seconds of one step of every optimizer on as many weights, and of what bounds it from below.

    A step reads gradient, mean, precision and curvature (with Adam: its two moments) and writes the last three,
    seven numbers a weight. The floor is the time to read and write as many bytes in place.
    """
    steps: dict[str, Callable[[], Any]] = {}
    for form in ("loop", "foreach", "fused"):
        weights = network_with_gradients(width).parameters()
        fused = True if form == "fused" else None
        steps[f"AdamW {form}"] = torch.optim.AdamW(weights, foreach=form == "foreach", fused=fused).step
    if importlib.util.find_spec("ivon") is None:
        print("IVON is left out: it needs the package ivon-opt (GPL-3.0), which is not installed")
    else:
        optimizer = importlib.import_module("ivon").IVON(
            network_with_gradients(width).parameters(), lr=1e-6, ess=1e5
        )

        def ivon_step() -> None:
            with optimizer.sampled_params(train=True):
                pass  # forward and backward pass
            optimizer.step()

        steps["IVON, with its draw of the weights"] = ivon_step
    steps.update(euler_lagrange_steps(width))

    numbers = torch.ones(7 * width * (width + 1))  # half of them read, half written
    steps["floor"] = numbers.neg_
    return medians(steps, repetitions)


STEPS = 20
"""Training steps that are timed together: a Kronecker precision is inverted once in as many."""


def training_steps(repetitions: int) -> dict[str, float]:
    """Seconds of one training step of a 784-1024-1024-10 network at batch 64.

    The floor is the forward and backward pass alone.
    """
    inputs, targets = torch.rand(64, 784), torch.randint(10, (64,))

    def trainer(network: nn.Module, optimizer: Any = None) -> Callable[[], None]:
        def steps() -> None:
            for _ in range(STEPS):
                network.zero_grad()
                torch.nn.functional.cross_entropy(network(inputs), targets).backward()
                if optimizer is not None:
                    optimizer.step()

        return steps

    def network() -> nn.Module:
        return mlp(784, [1024, 1024], 10, seed=0)

    def gaussian(precision: Any, **settings: Any) -> Callable[[], None]:
        net = clagrange.gaussianize(network(), precision=precision)
        return trainer(net, EulerLagrange(net, temperature=1e-4, trust_region=0.1, **settings))

    nets = [network() for _ in range(3)]
    actions = {
        "AdamW": trainer(nets[0], torch.optim.AdamW(nets[0].parameters())),
        "AdamW fused": trainer(nets[1], torch.optim.AdamW(nets[1].parameters(), fused=True)),
        "Euler-Lagrange diagonal": gaussian("diagonal", lr=1e-4, variance_rate=1e-2),
        "Euler-Lagrange diagonal, weights drawn for every batch": gaussian(
            Diagonal(sampling="batch"), lr=1e-4, variance_rate=1e-2
        ),
        "Euler-Lagrange Kronecker": gaussian("kronecker", lr=6e-3, variance_rate=1e-2),
        "Euler-Lagrange Kronecker, observed at every step": gaussian(
            Kronecker(observe_every=1), lr=6e-3, variance_rate=1e-2
        ),
        "floor": trainer(nets[2]),
    }
    return {name: seconds / STEPS for name, seconds in medians(actions, repetitions).items()}


def replica_rates(tasks: int) -> dict[str, float]:
    """Model-steps per second of the engine, one network and five."""
    rates = {}
    for method in ("sgd", "adam", "continual_backprop", "euler_lagrange"):
        for replicas in (1, 5):
            streams = [PermutedDigits(tasks=tasks, seed=seed) for seed in range(replicas)]
            run = Run(METHODS[method](), streams, [64, 64])
            rate = []
            for _ in range(tasks):
                before = run.seconds
                run.run_task()
                rate.append(replicas * streams[0].steps / (run.seconds - before))
            rates[f"{method}, {replicas} replica{'s' * (replicas > 1)}"] = statistics.median(rate)
    return rates


def prediction(repetitions: int) -> dict[str, float]:
    """Seconds of a forward pass and of `predict` with 32 samples on a 784-256-256-10 network."""
    network = clagrange.gaussianize(mlp(784, [256, 256], 10))
    inputs: Tensor = torch.zeros(64, 784)
    return medians(
        {
            "forward": lambda: network(inputs),
            "predict, 32 samples": lambda: clagrange.predict(network, inputs, samples=32),
        },
        repetitions,
    )


def show(seconds: dict[str, float], references: list[str]) -> None:
    """Print milliseconds, and ratios to some of them."""
    for name, value in seconds.items():
        ratios = "".join(f"   {value / seconds[other]:6.2f} x {other}" for other in references)
        print(f"  {name:55s} {1e3 * value:8.1f} ms{ratios}")


def main() -> None:
    """Measure, print, and store when asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, default=None, help="JSON file for the figures")
    parser.add_argument("--width", type=int, default=2236, help="of the two layers; default 10 million weights")
    parser.add_argument("--repetitions", type=int, default=15)
    chosen = parser.parse_args()
    figures: dict[str, Any] = {"environment": environment()}

    steps = optimizer_steps(chosen.width, chosen.repetitions)
    print(
        f"Optimizer step, {2 * chosen.width * (chosen.width + 1):,} parameters, {torch.get_num_threads()} threads"
    )
    show(steps, ["AdamW fused", "floor"])
    print("  numbers kept beside a weight and its gradient: AdamW 2, Euler-Lagrange 2, IVON 2")
    figures["optimizer_step_seconds"] = steps

    steps = training_steps(chosen.repetitions)
    print("Training step of a 784-1024-1024-10 network at batch 64; the floor is forward and backward pass alone")
    show(steps, ["AdamW", "AdamW fused", "floor"])
    figures["training_step_seconds"] = steps

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    rates = replica_rates(tasks=3)
    print("Training of 64-64-64-10 networks at batch 4, one thread")
    for name, rate in rates.items():
        alone = rates[name.split(",")[0] + ", 1 replica"]
        print(f"  {name:42s} {rate:8.0f} model-steps/s   {rate / alone:6.2f} x one network")
    figures["model_steps_per_second"] = rates

    seconds = prediction(chosen.repetitions)
    ratio = seconds["predict, 32 samples"] / seconds["forward"]
    print(f"Prediction: 32 samples take {ratio:.0f} x a forward pass")
    figures["prediction_seconds"] = seconds
    if chosen.store is not None:
        write_json(chosen.store, figures)


if __name__ == "__main__":
    main()
