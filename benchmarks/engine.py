"""Speed of the study engine beside training one network after the other, and beside published code.

    python benchmarks/engine.py [--store benchmarks/engine.json] [--published FOLDER]

Everything runs in two processes of one thread, as the runner uses two cores, and takes turns; figures are
model-steps per second of both together, medians over the turns, and ratios are medians of those of each turn.
Both processes of a pair train the same thing at the same time, so that they share the memory's bandwidth.

The first part trains 784-100-100-10 networks at batch 16, by R replicas of the engine and by plain torch: one
`torch.nn.Sequential` in each process, its optimizer's own loops and its fused kernel, of which the faster counts.
"torch" does what the engine does: it shuffles, takes each batch from the data, and adds up accuracies and losses;
"bare torch" trains on batches that lie ready, and keeps nothing. Two processes of one thread are best for torch
as well: a step is too small to be shared by threads.

The second part compares with the code of Dohare et al. (2024), if its folder (the one that holds ``lop``, from
https://github.com/shibhansh/loss-of-plasticity) is given: backprop and continual backprop on three hidden layers
at batch 1, as its experiment on permuted MNIST trains them, whatever it logs left out. Each of its learners has a
process and a thread of its own.

The floor of a step is what has to go through memory: forward and backward pass read the weights once each, the
first layer's but for the backward pass, and the step reads and writes them, which SGD at width 2000 and batch 1
does for 16 steps at once. Continual backprop looks at all weights after each step: those of its networks of width
2000 go from the backward pass to these sums in one loop, and are read and written once on the way; smaller ones
are read once more each, those out of a layer and those into it. That many bytes over the bandwidth at which both
processes read and write numbers in place. Networks that fit into a cache can be faster than that.

What a task costs from the first to the thousandth is measured by benchmarks/memory.py.
"""

import argparse
import functools
import importlib
import itertools
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clagrange._magnitudes import PART
from clagrange.networks import mlp
from clagrange.optim.perceptron_sgd import KEPT, WIDE
from clagrange.study.engine import Run
from clagrange.study.executors import one_thread
from clagrange.study.files import write_json
from clagrange.study.machine import environment
from clagrange.study.methods import METHODS, Method
from clagrange.tasks import Task, TaskStream

PROCESSES = 2
SECONDS = 0.3
"""How long an action goes on in its turn, at least."""
TURNS = 11
EXAMPLES = 2_048
"""Random examples to train on: speed does not depend on what they show."""
NUMBERS = 16 << 20
"""Numbers that are read and written to measure the bandwidth, more than caches hold."""
BATCH = 16
HIDDEN = [100, 100]
REPLICAS = (5, 8, 10, 20, 40)
GROUPS = {100: (4, 16, 48), 2000: (1, 4, 16)}
"""For each width of the published networks, the numbers of replicas of which the best counts."""
CONTINUAL = {"replacement_rate": 1e-4, "maturity": 100, "utility": "adaptable_contribution"}
"""Settings of continual backprop in the published experiment; its learning rate is 0.003."""

Action = Callable[[], float]
"""Does some work, and says how much: model-steps, or bytes."""


class Noise(TaskStream):
    """The same random examples in every task."""

    input_shape = (784,)
    classes = 10

    def __init__(self, steps: int, batch_size: int, seed: int) -> None:
        super().__init__(1_000, steps * batch_size, batch_size, 1, seed)

    def task(self, number: int) -> Task:
        """The first of the examples."""
        inputs, targets = noise()
        return Task(inputs[: self.examples], targets[: self.examples])


@functools.cache
def noise() -> tuple[Tensor, Tensor]:
    """Examples and labels."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(EXAMPLES, 784, generator=generator), torch.randint(10, (EXAMPLES,), generator=generator)


def by_engine(method: Method, hidden: list[int], batch_size: int, replicas: int, steps: int) -> Action:
    """A task of the engine, its data included."""
    streams = [Noise(steps, batch_size, seed) for seed in range(replicas)]
    run = Run(method, streams, hidden, measured=False)

    def task() -> float:
        run.run_task()
        return replicas * steps

    return task


def by_torch(name: str, fused: bool, bare: bool) -> Action:
    """A pass through the examples, training one network."""
    network = mlp(784, HIDDEN, 10)
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[name]
    optimizer = kind(network.parameters(), lr=1e-3, fused=fused)
    inputs, targets = noise()
    ready = list(zip(inputs.split(BATCH), targets.split(BATCH), strict=True))

    def step(batch: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
        optimizer.zero_grad()
        logits = network(batch)
        loss = nn.functional.cross_entropy(logits, answers)
        loss.backward()
        optimizer.step()
        return logits.detach(), loss.detach()

    def train_bare() -> float:
        for batch, answers in ready:
            step(batch, answers)
        return len(ready)

    def train() -> float:
        right, total = torch.zeros((), dtype=torch.long), torch.zeros(())
        for rows in torch.randperm(EXAMPLES).split(BATCH):
            answers = targets[rows]
            logits, loss = step(inputs[rows], answers)
            right += (logits.argmax(1) == answers).sum()
            total += loss
        return len(ready)

    return train_bare if bare else train


def by_published_code(folder: Path, name: str, width: int, steps: int) -> Action:
    """Steps of a learner as its experiment makes them, batches of one example from ready data."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    network = importlib.import_module("lop.nets.deep_ffnn").DeepFFNN(784, width, 10, num_hidden_layers=3)
    if name == "sgd":
        learner = importlib.import_module("lop.algos.bp").Backprop(network, step_size=0.003, loss="nll")
    else:
        learner = importlib.import_module("lop.algos.cbp").ContinualBackprop(
            network,
            step_size=0.003,
            loss="nll",
            replacement_rate=CONTINUAL["replacement_rate"],
            decay_rate=0.99,
            maturity_threshold=CONTINUAL["maturity"],
            util_type=CONTINUAL["utility"],
            accumulate=True,
        )
    inputs, targets = noise()

    def train() -> float:
        for index in range(steps):
            learner.learn(x=inputs[index : index + 1], target=targets[index : index + 1])
        return steps

    return train


def bandwidth() -> Action:
    """Bytes read and written in place."""
    numbers = torch.ones(NUMBERS)

    def negate() -> float:
        numbers.neg_()
        return 2 * numbers.nbytes

    return negate


def actions(published: Path | None) -> dict[str, Action]:
    """All that is compared."""
    methods = {"sgd": METHODS["sgd"](lr=1e-3), "adam": METHODS["adam"](lr=1e-3)}
    all_of_them: dict[str, Action] = {"bandwidth": bandwidth()}
    for name, method in methods.items():
        for replicas in REPLICAS:
            all_of_them[f"{name}, engine, {replicas} replicas"] = by_engine(method, HIDDEN, BATCH, replicas, 32)
        for form, bare in itertools.product(("loop", "fused"), (False, True)):
            all_of_them[f"{name}, {'bare ' * bare}torch {form}"] = by_torch(name, form == "fused", bare)
    if published is None:
        return all_of_them
    theirs = {
        "sgd": METHODS["sgd"](lr=0.003),
        "continual_backprop": METHODS["continual_backprop"](base="sgd", lr=0.003, **CONTINUAL),
    }
    for width, groups in GROUPS.items():
        steps = 64 if width < 1_000 else 2 * KEPT
        for name, method in theirs.items():
            label = f"{name}, width {width}"
            all_of_them[f"{label}, published"] = by_published_code(published, name, width, steps)
            for replicas in groups:
                all_of_them[f"{label}, engine, {replicas} replicas"] = by_engine(
                    method, [width] * 3, 1, replicas, steps
                )
    return all_of_them


def work(wire: Connection, published: Path | None) -> None:
    """Do what the parent names, for a turn, and answer how much was done in a second."""
    with one_thread():
        known = actions(published)
        wire.send(list(known))
        while name := wire.recv():
            started, done = time.perf_counter(), 0.0
            while (seconds := time.perf_counter() - started) < SECONDS:
                done += known[name]()
            wire.send(done / seconds)


def measure(published: Path | None) -> dict[str, list[float]]:
    """How much all processes did in a second, for each action and turn."""
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(PROCESSES)]
    workers = [context.Process(target=work, args=(theirs, published), daemon=True) for _, theirs in pipes]
    for worker in workers:
        worker.start()
    wires = [ours for ours, _ in pipes]
    names, *_ = [wire.recv() for wire in wires]
    rates: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(TURNS + 1):
        for name in names:
            for wire in wires:
                wire.send(name)
            rate = sum(wire.recv() for wire in wires)
            if turn:  # the first one warms up
                rates[name].append(rate)
    for wire, worker in zip(wires, workers, strict=True):
        wire.send("")
        worker.join()
    return rates


def compare(rates: dict[str, list[float]], label: str, rivals: str) -> dict[str, Any]:
    """The best number of replicas beside the best of the rivals, which begin with ``rivals``."""

    def best(prefix: str) -> str:
        return max(
            (name for name in rates if name.startswith(prefix)), key=lambda name: statistics.median(rates[name])
        )

    ours, theirs = best(f"{label}, engine"), best(f"{label}, {rivals}")
    ratio = statistics.median(a / b for a, b in zip(rates[ours], rates[theirs], strict=True))
    return {"engine": ours, "rival": theirs, "ratio": ratio}


def floor(name: str, width: int, rate: float, *, cached: bool = True) -> float:
    """Model-steps per second at batch 1 that a bandwidth allows, of three hidden layers of a width.

    ``cached`` says that large weights wait for steps and go through sums in parts, as on a CPU.
    """
    numbers = 0.0
    matrices = [784 * width, width**2, width**2, 10 * width]
    for layer, size in enumerate(matrices):
        first, last = layer == 0, layer == len(matrices) - 1
        if name == "sgd":
            passes = 1 + (not first) + (2 / KEPT if cached and size >= WIDE else 2)
        elif cached and size > PART:
            passes = 1 + 2  # all but the forward pass is done at once
        else:
            passes = 1 + (not first) + 2 + (not last) + (not first)  # incoming and outgoing ones are looked at
        numbers += passes * size
    return rate / (4 * numbers)


def main() -> None:
    """Measure, print, and store when asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, default=None, help="JSON file for the figures")
    parser.add_argument("--published", type=Path, default=None, help="folder that holds the published code, lop/")
    chosen = parser.parse_args()
    rates = measure(chosen.published)
    figures: dict[str, Any] = {
        "environment": environment(),
        "per_second": {name: statistics.median(each) for name, each in rates.items()},
    }
    for name, rate in figures["per_second"].items():
        print(
            f"{name:50s} "
            + (f"{rate / 1e9:10.1f} GB/s" if name == "bandwidth" else f"{rate:10.0f} model-steps/s")
        )
    comparisons = {
        f"{name}, {rivals}": compare(rates, name, rivals)
        for name, rivals in itertools.product(("sgd", "adam"), ("torch", "bare torch"))
    }
    if chosen.published is not None:
        for width in GROUPS:
            for name in ("sgd", "continual_backprop"):
                label = f"{name}, width {width}"
                comparisons[label] = compare(rates, label, "published")
                comparisons[label]["floor_per_second"] = floor(name, width, figures["per_second"]["bandwidth"])
    for label, comparison in comparisons.items():
        allowed = (
            f"; memory allows {comparison['floor_per_second']:.0f}" if "floor_per_second" in comparison else ""
        )
        print(f"{label}: {comparison['ratio']:.2f} x ({comparison['engine']} / {comparison['rival']}){allowed}")
    figures["comparisons"] = comparisons
    if chosen.store is not None:
        write_json(chosen.store, figures)


if __name__ == "__main__":
    main()
