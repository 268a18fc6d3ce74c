"""What is forgotten of earlier classes: naive training, EWC, replay, and the posterior as next prior.

    python benchmarks/forgetting.py [--store benchmarks/forgetting.json] [--sources digits mnist] [--seeds 5]

Ten classes in five tasks of two (`SplitClasses`), through Avalanche: its Naive, EWC and Replay, joint training on
all tasks at once as what could be reached, and Gaussian networks with `clagrange.interventions.Consolidation` at
every switch. In the scenario "class" a network tells all ten classes apart; in the scenario "task" it is told the
task, and outputs of other classes are left out of loss and accuracy, by the same wrapper for all.

Every method has the same network, initial weights, batch size and epochs. Batches come in the same order for all
but replay, which adds a batch of its memory to each of the task, and joint training. Every method has six
settings, tried once with another seed (other order of classes and examples, other initial weights) and judged by
the average accuracy on training images that no task shows; the best is trained with fresh seeds and judged on the
test images. Each Gaussian network is trained again at its best setting without consolidation. The ranges of EWC's
strength and of the weight of consolidation come from wider trials on digits, with the seed of the search and one
more. Where the task is told, Avalanche balances the tasks in batches of joint training, which makes them more.

Digits need no download; MNIST is read from the folder in CLAGRANGE_DATA.
"""

import argparse
import itertools
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Adam

from clagrange.interventions import Consolidation
from clagrange.metrics import backward_transfer, forgetting
from clagrange.metrics.intervals import interval
from clagrange.metrics.matrix_metrics import AccuracyMatrix
from clagrange.networks import mlp
from clagrange.strategies import EulerLagrange, InterventionPlugin
from clagrange.study.files import write_json
from clagrange.study.machine import environment
from clagrange.tasks import SplitClasses, Task
from clagrange.tasks.split_classes import SCENARIOS

from avalanche.models import MultiTaskModule  # isort: skip
from avalanche.training import EWC, JointTraining, Naive, Replay  # isort: skip

SEARCHED = 1000
"""Seed of the searches."""
MEMORY = 100
"""Examples that replay keeps, of all earlier tasks together."""
FIGURES = ("average accuracy", "accuracy after its own training", "forgetting", "backward transfer")
"""The columns of the table."""
Setting = dict[str, Any]


# ------------------------------------------------------------------------------------------ streams and networks
@dataclass(frozen=True)
class Source:
    """A set of images, how much of it a task shows, and the network for it."""

    stream: Setting
    hidden: list[int]


SOURCES = {
    "digits": Source({"examples": 200, "batch_size": 8, "epochs": 5}, [64, 64]),
    "mnist": Source({"examples": 2000, "batch_size": 20, "epochs": 1, "pool": 2}, [100, 100]),
}


def held_out(stream: SplitClasses, number: int, most: int = 200) -> Task:
    """Training images of the classes of a task that the task does not show, at most so many of each class."""
    images, task = stream.images, stream.task(number)
    each = stream.examples // stream.classes_per_task
    rows = torch.cat([images.of_class[label][each : each + most] for label in task.targets.unique()])
    return replace(task, targets=images.targets[rows], rows=rows, test=None)


class Outputs(MultiTaskModule):  # type: ignore[misc]
    """A network of which only the outputs of the classes of an example's task take part."""

    left_out: Tensor

    def __init__(self, network: nn.Module, stream: SplitClasses) -> None:
        super().__init__()
        self.network = network
        left_out = torch.zeros(stream.tasks, stream.classes, dtype=torch.bool)
        for number, task in enumerate(stream):
            if task.classes is not None:
                left_out[number] = True
                left_out[number, task.classes] = False
        self.register_buffer("left_out", left_out)

    def forward(self, inputs: Tensor, tasks: Tensor) -> Tensor:
        """The scores, −∞ for what takes no part."""
        scores: Tensor = self.network(inputs)
        return scores.masked_fill(self.left_out[tasks], -torch.inf)


# --------------------------------------------------------------------------------------------------- the methods
@dataclass(frozen=True)
class Method:
    """A way to learn the tasks.

    Attributes:
        strategy: an Avalanche strategy for a network, from what all have in common and a setting.
        settings: six, to be tried.
        joint: whether it learns all tasks at once.
        ours: whether it consolidates.
    """

    strategy: Callable[[nn.Module, Setting, Setting], Any]
    settings: list[Setting]
    joint: bool = False
    ours: bool = False


def with_adam(strategy: Callable[..., Any], **fixed: Any) -> Callable[[nn.Module, Setting, Setting], Any]:
    """One of Avalanche's strategies with Adam; a setting has its ``lr`` and what else the strategy takes."""

    def make(network: nn.Module, common: Setting, setting: Setting) -> Any:
        further = {name: value for name, value in setting.items() if name != "lr"}
        optimizer = Adam(network.parameters(), lr=setting["lr"])
        return strategy(
            model=network, optimizer=optimizer, criterion=nn.CrossEntropyLoss(), **common, **fixed, **further
        )

    return make


def gaussian(precision: str, **fixed: Any) -> Callable[[nn.Module, Setting, Setting], Any]:
    """Euler-Lagrange without injection, consolidated with the ``weight`` of a setting; None for not at all."""

    def make(network: nn.Module, common: Setting, setting: Setting) -> Any:
        settings = {**fixed, **setting}
        weight = settings.pop("weight")
        plugins = [] if weight is None else [InterventionPlugin(Consolidation(weight))]
        return EulerLagrange(
            model=network, precision=precision, strength=0.0, plugins=plugins, **common, **settings
        )

    return make


def grid(**numbers: list[float]) -> list[Setting]:
    """Every combination."""
    return [dict(zip(numbers, row, strict=True)) for row in itertools.product(*numbers.values())]


RATES = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2]
METHODS = {
    "naive": Method(with_adam(Naive), grid(lr=RATES)),
    "EWC": Method(with_adam(EWC), grid(lr=[3e-4, 1e-3, 3e-3], ewc_lambda=[1e4, 1e5])),
    "replay": Method(with_adam(Replay, mem_size=MEMORY), grid(lr=RATES)),
    "Euler-Lagrange, diagonal": Method(
        gaussian("diagonal", temperature=1e-5), grid(lr=[3e-3, 1e-2], weight=[1.0, 3.0, 10.0]), ours=True
    ),
    "Euler-Lagrange, Kronecker": Method(
        gaussian("kronecker", temperature=1e-3), grid(lr=[3e-3, 1e-2], weight=[1.0, 10.0, 100.0]), ours=True
    ),
    "joint": Method(with_adam(JointTraining), grid(lr=RATES), joint=True),
}


# --------------------------------------------------------------------------------------------------- the figures
def learn(
    method: Method, setting: Setting, stream: SplitClasses, hidden: list[int], judged: list[Task]
) -> Tensor:
    """The accuracy on every task after every task, (tasks, tasks); (1, tasks) where all are learnt at once."""
    network = mlp(math.prod(stream.input_shape), hidden, stream.classes, seed=stream.seed)
    model = Outputs(network, stream)
    common = {"train_mb_size": stream.batch_size, "train_epochs": stream.epochs, "evaluator": None}
    strategy = method.strategy(model, common, setting)
    matrix = AccuracyMatrix(tasks=stream.tasks)
    experiences = stream.as_benchmark().train_stream
    for number, experience in enumerate([experiences] if method.joint else experiences):
        torch.manual_seed(stream.seed * stream.tasks + number)  # the order of the batches
        strategy.train(experience)
        model.eval()
        for on, task in enumerate(judged):
            told = torch.full_like(task.targets, on if stream.multi_head else 0)
            with torch.no_grad():
                matrix.update(number, on, model(task.inputs, told), task.targets)
    return matrix.compute()[: 1 if method.joint else None]


def search(method: Method, source: str, scenario: str) -> list[dict[str, Any]]:
    """Every setting with the seed of the search, and its average accuracy on images that no task shows."""
    stream = SplitClasses(source, scenario=scenario, seed=SEARCHED, **SOURCES[source].stream)
    judged = [held_out(stream, number) for number in range(stream.tasks)]
    trials = []
    for setting in method.settings:
        matrix = learn(method, setting, stream, SOURCES[source].hidden, judged)
        trials.append({"setting": setting, "average accuracy": float(matrix[-1].mean())})
        print(f"    {setting}  {trials[-1]['average accuracy']:.3f}", flush=True)
    return trials


def measure(method: Method, setting: Setting, source: str, scenario: str, seeds: int) -> dict[str, Any]:
    """Accuracy on test images with fresh seeds: of each seed, and the matrix of their means."""
    matrices = []
    for seed in range(seeds):
        stream = SplitClasses(source, scenario=scenario, seed=seed, **SOURCES[source].stream)
        judged = [task.test for task in stream if task.test is not None]
        matrices.append(learn(method, setting, stream, SOURCES[source].hidden, judged))
    matrix = torch.stack(matrices)
    figures = {"average accuracy": matrix[:, -1].mean(-1).tolist()}
    if not method.joint:
        figures["accuracy after its own training"] = matrix.diagonal(dim1=1, dim2=2).mean(-1).tolist()
        figures["forgetting"] = forgetting(matrix).tolist()
        figures["backward transfer"] = backward_transfer(matrix).tolist()
    return {**figures, "accuracy matrix, mean over seeds": matrix.mean(0).tolist()}


def differences(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Average accuracy of consolidated networks minus that of every other method, paired by seed."""
    accuracies = {name: figures["average accuracy"] for name, figures in results.items()}
    found: dict[str, dict[str, Any]] = {}
    for ours in (name for name in results if name in METHODS and METHODS[name].ours):
        for other in (name for name in results if name != ours):
            pairs = zip(accuracies[ours], accuracies[other], strict=True)
            found.setdefault(ours, {})[other] = interval([a - b for a, b in pairs]).as_dict()
    return found


def spread(values: dict[str, float | None]) -> str:
    """Mean and 95 % bootstrap interval over seeds, in percent."""
    mean, low, high = (None if value is None else 100.0 * value for value in values.values())
    if mean is None or low is None or high is None:
        return "-" if mean is None else f"{mean:.1f}"
    return f"{mean:.1f} [{low:.1f}, {high:.1f}]"


def table(results: dict[str, dict[str, Any]]) -> None:
    """Print a row for each method, the most accurate first, and what separates ours from the others."""
    print(f"\n{'percent':38s}" + "".join(f"{heading:>32s}" for heading in FIGURES))
    order = sorted(results, key=lambda name: -float(np.mean(results[name]["average accuracy"])))
    for name in order:
        shown = (results[name].get(figure) for figure in FIGURES)
        cells = ("-" if values is None else spread(interval(values).as_dict()) for values in shown)
        print(f"{name:38s}" + "".join(f"{cell:>32s}" for cell in cells))
    for ours, others in differences(results).items():
        print(f"average accuracy of {ours} minus that of")
        for other in others:
            print(f"    {other:34s}{spread(others[other]):>32s}")


def compare(source: str, scenario: str, names: list[str], seeds: int) -> dict[str, Any]:
    """Search, measure and print, for one stream."""
    found: dict[str, Any] = {"searches": {}, "settings": {}, "results": {}, "processor_seconds": {}}
    print(f"\n{source}, scenario {scenario}: average accuracy on images that no task shows")
    for name in names:
        method, started = METHODS[name], time.process_time()
        print(f"  {name}", flush=True)
        trials = search(method, source, scenario)
        best = max(trials, key=lambda trial: float(trial["average accuracy"]))["setting"]
        found["searches"][name], found["settings"][name] = trials, best
        found["results"][name] = measure(method, best, source, scenario, seeds)
        if method.ours:
            alone = {**best, "weight": None}
            found["results"][f"{name}, not consolidated"] = measure(method, alone, source, scenario, seeds)
        found["processor_seconds"][name] = time.process_time() - started
        print(f"    best {best}; {found['processor_seconds'][name]:.0f} s of processor time in all", flush=True)
    table(found["results"])
    return {**found, "average accuracy of ours minus others": differences(found["results"])}


def main() -> None:
    """Measure, print, and store when asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, default=None, help="JSON file for the figures")
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=list(SOURCES))
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=5)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    figures: dict[str, Any] = {"environment": environment(), "seeds": chosen.seeds, "replay_memory": MEMORY}
    for source in chosen.sources:
        figures[source] = asdict(SOURCES[source])
        for scenario in chosen.scenarios:
            figures[source][scenario] = compare(source, scenario, chosen.methods, chosen.seeds)
    if chosen.store is not None:
        write_json(chosen.store, figures)


if __name__ == "__main__":
    main()
