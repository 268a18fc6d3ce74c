"""Are the probabilities of Gaussian weights to be trusted? MNIST, beside AdamW, MC-dropout and IVON.

    python benchmarks/calibration.py [--store benchmarks/calibration.json] [--training 2000 10000] [--seeds 5]

Every method has the same network (784-100-100-10, ReLU), images, batches and number of steps, and a learning
rate that falls along a cosine. Each has six settings, which are tried once; the one with the lowest negative
log-likelihood on the validation images, in the best of its ways to predict, is trained with fresh seeds. On the
test images: accuracy, negative log-likelihood, calibration error and Brier score. On images turned by 45 degrees
and images with noise: the likelihood. And how well the entropy of the prediction, or its epistemic part (the
mutual information), tells these and images of something else from the test images: area under the ROC curve.

MNIST and, if there, CIFAR-10 images as "something else" (``cifar10_10k.npz`` with ``x_train``) are read from the
folder in CLAGRANGE_DATA. IVON needs the package ivon-opt and is left out without it.
"""

import argparse
import contextlib
import importlib.util
import itertools
import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

import clagrange
from clagrange.gaussian import Prediction
from clagrange.metrics import brier_score, expected_calibration_error, negative_log_likelihood
from clagrange.metrics.intervals import interval
from clagrange.networks import cross_entropy, mlp
from clagrange.optim import EulerLagrange
from clagrange.study.files import write_json
from clagrange.study.machine import environment

VALIDATION, SHIFTED = 5_000, 2_000
BATCH, SAMPLES = 64, 32
HIDDEN = [100, 100]
Setting = dict[str, Any]
Predict = Callable[[Tensor], Prediction]
Train = Callable[["Setting", "Images", int, int], dict[str, Predict]]


# ---------------------------------------------------------------------------------------------------- the images
@dataclass(frozen=True)
class Images:
    """Inputs (N, 784) in [0, 1] and digits."""

    inputs: Tensor
    targets: Tensor

    def part(self, rows: slice) -> "Images":
        """Some of them."""
        return Images(self.inputs[rows], self.targets[rows])


def mnist(root: str) -> tuple[Images, Images, Images]:
    """MNIST's 60,000 images for training without the last 5,000, these for validation, its test images."""
    from torchvision.datasets import MNIST

    try:
        known, test = (
            Images(data.data.flatten(1).float() / 255.0, data.targets.long())
            for data in (MNIST(root, train=True), MNIST(root, train=False))
        )
    except RuntimeError as error:
        raise SystemExit(
            f"MNIST's files are not in {Path(root, 'MNIST', 'raw').resolve()}; set CLAGRANGE_DATA to the folder "
            f"that holds MNIST/raw"
        ) from error
    return known.part(slice(-VALIDATION)), known.part(slice(-VALIDATION, None)), test


def shifted(test: Images, root: str) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Inputs that the networks were not trained for, with the digits where they show any."""
    from torchvision.transforms.functional import InterpolationMode, resize, rgb_to_grayscale, rotate

    generator = torch.Generator().manual_seed(0)
    some = test.part(slice(SHIFTED))
    images = some.inputs.view(-1, 1, 28, 28)
    noise = 0.5 * torch.randn(some.inputs.shape, generator=generator)
    found: dict[str, tuple[Tensor, Tensor | None]] = {
        "turned 45°": (rotate(images, 45.0, InterpolationMode.BILINEAR).flatten(1), some.targets),
        "noisy": ((some.inputs + noise).clamp(0.0, 1.0), some.targets),
        "only noise": (torch.rand(some.inputs.shape, generator=generator), None),
    }
    file = Path(root, "cifar10_10k.npz")
    if file.exists():
        with np.load(file) as archive:
            pictures = torch.from_numpy(archive["x_train"][:SHIFTED]).float() / 255.0
        found["CIFAR-10"] = resize(rgb_to_grayscale(pictures), [28, 28]).flatten(1), None
    return found


@dataclass(frozen=True)
class Data:
    """What is trained and measured with; ``others`` are inputs, and the digits where they show any, by name."""

    training: Images
    validation: Images
    test: Images
    others: dict[str, tuple[Tensor, Tensor | None]]


# --------------------------------------------------------------------------------------------------- the methods
@dataclass(frozen=True)
class Method:
    """A way to train a network, and its ways to predict.

    Attributes:
        train: of a setting, images, steps and a seed; gives the ways to predict by name.
        settings: six, to be tried.
        ours: whether it is of this package.
    """

    train: Train
    settings: list[Setting]
    ours: bool = False


def fit(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Images,
    steps: int,
    seed: int,
    drawn: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> None:
    """Train; gradients are taken inside ``drawn()``."""
    generator = torch.Generator().manual_seed(seed)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = torch.empty(0, dtype=torch.long)
    network.train()
    for _ in range(steps):
        if len(order) < BATCH:
            order = torch.randperm(len(images.inputs), generator=generator)
        rows, order = order[:BATCH], order[BATCH:]
        with drawn():
            optimizer.zero_grad()
            cross_entropy(network(images.inputs[rows]), images.targets[rows]).backward()
        optimizer.step()
        schedule.step()
    network.eval()


@torch.no_grad()
def averaged(draw: Callable[[], Tensor], count: int = SAMPLES) -> Prediction:
    """The prediction by draws of the logits; a single one has no epistemic part."""
    draws = torch.stack([draw() for _ in range(count)]).softmax(-1)
    mean = draws.mean(0)
    entropy = torch.special.entr(mean).sum(-1)
    information = entropy - torch.special.entr(draws).sum(-1).mean(0)
    return Prediction(
        mean,
        draws.var(0, correction=0),
        (draws * (1 - draws)).mean(0),
        entropy,
        information if count > 1 else None,
    )


def at_the_mean(network: nn.Module) -> Predict:
    """Softmax of the network as it is."""
    return lambda inputs: averaged(lambda: network(inputs), 1)


def train_adamw(setting: Setting, images: Images, steps: int, seed: int) -> dict[str, Predict]:
    """AdamW, after every hidden layer dropout where the setting has it."""
    setting = dict(setting)
    rate = setting.pop("dropout", 0.0)
    layers = mlp(784, HIDDEN, 10, seed=seed)
    network = nn.Sequential(
        *(
            part
            for layer in layers
            for part in ([layer, nn.Dropout(rate)] if isinstance(layer, nn.ReLU) else [layer])
        )
    )
    torch.manual_seed(seed)
    fit(network, torch.optim.AdamW(network.parameters(), **setting), images, steps, seed)

    def sampled(inputs: Tensor) -> Prediction:
        network.train()
        prediction = averaged(lambda: network(inputs))
        network.eval()
        return prediction

    return {"mean": at_the_mean(network), **({"sampled": sampled} if rate else {})}


def train_ivon(setting: Setting, images: Images, steps: int, seed: int) -> dict[str, Predict]:
    """IVON by its package, at the effective sample size of the training images."""
    import ivon  # type: ignore[import-untyped]

    network = mlp(784, HIDDEN, 10, seed=seed)
    torch.manual_seed(seed)
    optimizer = ivon.IVON(network.parameters(), ess=len(images.inputs), **setting)
    fit(network, optimizer, images, steps, seed, lambda: optimizer.sampled_params(train=True))

    def sampled(inputs: Tensor) -> Prediction:
        def draw() -> Tensor:
            with optimizer.sampled_params():
                output: Tensor = network(inputs)
            return output

        return averaged(draw)

    return {"mean": at_the_mean(network), "sampled": sampled}


def train_gaussian(precision: str, prior_variance: float, fixed: Setting) -> Train:
    """Euler-Lagrange with one structure of the precision."""

    def train(setting: Setting, images: Images, steps: int, seed: int) -> dict[str, Predict]:
        network = clagrange.gaussianize(mlp(784, HIDDEN, 10, seed=seed), precision, prior_variance=prior_variance)
        fit(network, EulerLagrange(network, **fixed, **setting), images, steps, seed)
        generator = torch.Generator().manual_seed(seed)
        kind: Setting = {"likelihood": "classification"}
        return {
            "mean": at_the_mean(network),
            "sampled": lambda inputs: clagrange.predict(network, inputs, SAMPLES, generator=generator, **kind),
            "linearized": lambda inputs: clagrange.predict(network, inputs, method="linearized", **kind),
        }

    return train


def grid(**numbers: list[float]) -> list[Setting]:
    """Every combination."""
    return [dict(zip(numbers, row, strict=True)) for row in itertools.product(*numbers.values())]


METHODS = {
    "AdamW": Method(train_adamw, grid(lr=[3e-3, 1e-2], weight_decay=[0.1, 0.3, 1.0])),
    "MC-dropout": Method(train_adamw, grid(lr=[1e-2], weight_decay=[0.1, 0.3, 1.0], dropout=[0.1, 0.3])),
    "IVON": Method(train_ivon, grid(lr=[0.1, 0.3, 1.0], hess_init=[0.1, 0.5], weight_decay=[1e-4])),
    "Euler-Lagrange, diagonal": Method(
        train_gaussian("diagonal", 0.3, {"variance_rate": 0.02, "trust_region": 0.25}),
        grid(lr=[6e-3, 1.4e-2], temperature=[5e-7, 1e-6, 2e-6]),
        ours=True,
    ),
    "Euler-Lagrange, Kronecker": Method(
        train_gaussian("kronecker", 0.3, {"variance_rate": 0.01, "trust_region": 0.4}),
        grid(lr=[5e-3, 1.2e-2], temperature=[2e-7, 4e-7, 1e-6]),
        ours=True,
    ),
}


# --------------------------------------------------------------------------------------------------- the figures
def scores(prediction: Prediction, targets: Tensor) -> dict[str, float]:
    """Accuracy, likelihood, calibration error and Brier score; what diverged is infinitely bad."""
    mean = prediction.mean
    if not bool(mean.isfinite().all()):
        return {"accuracy": 0.0, "nll": math.inf, "ece": 1.0, "brier": 2.0}
    return {
        "accuracy": float((mean.argmax(-1) == targets).float().mean()),
        "nll": float(negative_log_likelihood(mean, targets)),
        "ece": float(expected_calibration_error(mean, targets)),
        "brier": float(brier_score(mean, targets)),
    }


def search(method: Method, data: Data, steps: int) -> list[dict[str, Any]]:
    """Every setting once, with its likelihood on the validation images in each way to predict."""
    trials = []
    for setting in method.settings:
        predictors = method.train(setting, data.training, steps, 0)
        nll = {
            name: scores(predict(data.validation.inputs), data.validation.targets)["nll"]
            for name, predict in predictors.items()
        }
        trials.append({"setting": setting, "nll": nll})
        print(f"    {setting}  " + "  ".join(f"{name} {value:.4f}" for name, value in nll.items()), flush=True)
    return trials


def measure(predict: Predict, data: Data) -> dict[str, float]:
    """All figures of one network and one way to predict."""
    prediction = predict(data.test.inputs)
    figures = scores(prediction, data.test.targets)
    known = {"entropy": prediction.entropy, "information": prediction.mutual_information}
    for name, (inputs, targets) in data.others.items():
        other = predict(inputs)
        if targets is not None:
            figures[f"nll, {name}"] = scores(other, targets)["nll"]
        for kind, unknown in (("entropy", other.entropy), ("information", other.mutual_information)):
            inside = known[kind]
            if inside is not None and unknown is not None:
                labels = np.repeat([0, 1], [SHIFTED, len(unknown)])
                figures[f"auroc by {kind}, {name}"] = float(
                    roc_auc_score(labels, torch.cat([inside[:SHIFTED], unknown]).numpy())
                )
    return figures


def run(
    method: Method, setting: Setting, steps: int, seeds: int, data: Data
) -> dict[str, list[dict[str, float]]]:
    """Figures by way to predict and seed; the seeds are not that of the search."""
    found: dict[str, list[dict[str, float]]] = {}
    for seed in range(1, seeds + 1):
        for name, predict in method.train(setting, data.training, steps, seed).items():
            found.setdefault(name, []).append(measure(predict, data))
    return found


def spread(values: list[float], digits: int) -> str:
    """Mean and 95 % bootstrap interval over seeds."""
    found = interval(values)
    if found.mean is None or found.low is None or found.high is None:
        return "-" if found.mean is None else f"{found.mean:.{digits}f}"
    return f"{found.mean:.{digits}f} [{found.low:.{digits}f}, {found.high:.{digits}f}]"


def table(title: str, rows: dict[str, list[dict[str, float]]], columns: dict[str, str], digits: int) -> None:
    """Print a row for each way to predict that has such figures; ``columns`` are names of figures by heading."""
    print(f"\n{title:40s}" + "".join(f"{heading:>26s}" for heading in columns))
    for name, figures in rows.items():
        if all(figure in figures[0] for figure in columns.values()):
            cells = (spread([row[figure] for row in figures], digits) for figure in columns.values())
            print(f"{name:40s}" + "".join(f"{cell:>26s}" for cell in cells))


def tables(results: dict[str, dict[str, list[dict[str, float]]]], images: Iterable[str]) -> None:
    """Print all figures."""
    rows = {f"{method}, {way}": figures for method, ways in results.items() for way, figures in ways.items()}
    table("test images", rows, {name: name for name in ("accuracy", "nll", "ece", "brier")}, 4)
    table("nll on", rows, {name: f"nll, {name}" for name in ("turned 45°", "noisy")}, 3)
    for kind in ("entropy", "information"):
        table(f"area by {kind}", rows, {name: f"auroc by {kind}, {name}" for name in images}, 3)


def against_the_best(results: dict[str, dict[str, list[dict[str, float]]]]) -> dict[str, Any]:
    """Likelihood of each of our ways to predict minus the best other one's, seed by seed, with its interval."""
    mean = {
        (method, way): float(np.mean([row["nll"] for row in rows]))
        for method, ways in results.items()
        for way, rows in ways.items()
    }
    best = min((key for key in mean if not METHODS[key[0]].ours), key=mean.__getitem__)
    print(f"\nnll minus that of {', '.join(best)}, the best other")
    differences = {}
    for method, way in mean:
        if METHODS[method].ours:
            pairs = zip(results[method][way], results[best[0]][best[1]], strict=True)
            difference = [ours["nll"] - theirs["nll"] for ours, theirs in pairs]
            differences[f"{method}, {way}"] = interval(difference).as_dict()
            print(f"{method + ', ' + way:40s}{spread(difference, 4):>26s}")
    return {"best": ", ".join(best), "differences": differences}


def compare(names: list[str], steps: int, seeds: int, data: Data) -> dict[str, Any]:
    """Search, measure and print, for one set of training images."""
    found: dict[str, Any] = {"searches": {}, "settings": {}, "results": {}, "processor_seconds": {}}
    for name in names:
        if name == "IVON" and importlib.util.find_spec("ivon") is None:
            found["skipped"] = {name: "the package ivon-opt is not installed"}
            print("IVON: skipped, the package ivon-opt is not installed; pip install ivon-opt")
            continue
        print(f"{name}: nll on validation images", flush=True)
        method, started = METHODS[name], time.process_time()
        trials = search(method, data, steps)
        best = min(trials, key=lambda trial: min(trial["nll"].values()))["setting"]
        found["searches"][name], found["settings"][name] = trials, best
        found["results"][name] = run(method, best, steps, seeds, data)
        found["processor_seconds"][name] = time.process_time() - started
        print(f"    best {best}; {found['processor_seconds'][name]:.0f} s of processor time in all", flush=True)
    results = found["results"]
    tables(results, data.others)
    if {METHODS[name].ours for name in results} == {True, False}:
        found["nll_minus_best_other"] = against_the_best(results)
    return found


def main() -> None:
    """Measure, print, and store when asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, default=None, help="JSON file for the figures")
    parser.add_argument("--training", type=int, nargs="+", default=[2000], help="numbers of training images")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    root = os.environ.get("CLAGRANGE_DATA", "data")
    training, validation, test = mnist(root)
    others = shifted(test, root)
    figures: dict[str, Any] = {"environment": environment(), "seeds": chosen.seeds, "steps": chosen.steps}
    for count in chosen.training:
        print(f"\n{count:,} training images, {chosen.steps:,} steps")
        data = Data(training.part(slice(count)), validation, test, others)
        figures[f"{count} training images"] = compare(chosen.methods, chosen.steps, chosen.seeds, data)
    if chosen.store is not None:
        write_json(chosen.store, figures)


if __name__ == "__main__":
    main()
