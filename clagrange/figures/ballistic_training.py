"""Panels e and f of figure 2: SGD, AdamW and the ballistic rule on MNIST and CIFAR-10, shortened."""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from clagrange.figures.style import BLUE, INK, RED, SAND, letter
from clagrange.optim.ballistic import Ballistic

BATCH, CLIP, SEED = 128, 5.0, 0
COLOURS = {"SGD": SAND, "AdamW": RED, "ballistic": BLUE}

Optimizers = dict[str, Callable[[Iterable[Tensor]], torch.optim.Optimizer]]


@dataclass(frozen=True)
class Protocol:
    """A training run: the published one, cut down to what a CPU does in half a minute.

    Attributes:
        images: how many training images, of the published number.
        epochs: how many passes.
        network: makes the network.
        lrs: learning rate of each rule.
        second_decay: β₂ of the ballistic rule.
        shortened: what differs from the publication.
    """

    images: int
    epochs: int
    network: Callable[[], nn.Module]
    lrs: dict[str, float]
    second_decay: float
    shortened: str


def _perceptron() -> nn.Module:
    layers = [nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10)]
    return nn.Sequential(nn.Flatten(), *layers)


def _convolutional() -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 16), (16, 32)):
        for channels in (inputs, outputs):
            layers += [nn.Conv2d(channels, outputs, 3, padding=1), nn.ReLU()]
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, 10))


PROTOCOLS = {
    "mnist": Protocol(
        12_000,
        4,
        _perceptron,
        {"SGD": 0.1, "AdamW": 1e-3, "ballistic": 5e-4},
        0.999,
        "the first 12,000 of 60,000 training images, 4 of 10 epochs, one seed",
    ),
    "cifar10": Protocol(
        5_000,
        6,
        _convolutional,
        {"SGD": 0.1, "AdamW": 5e-4, "ballistic": 5e-4},
        0.9,
        "5,000 of 50,000 training images, 6 of 25 epochs, one seed, images halved to 16×16 and centred, no crops "
        "or flips, channels 16-16-32-32 and 128 hidden units in place of 64-64-128-128 and 256",
    ),
}


def train_all() -> dict[str, Any]:
    """Training loss and test accuracy after every epoch, for the data sets that are there.

    Looks in the folder named by CLAGRANGE_DATA, else in ``data``. A data set that is not there has an entry
    ``skipped`` that says what to do.
    """
    root = Path(os.environ.get("CLAGRANGE_DATA") or "data")
    results: dict[str, Any] = {}
    for name, load in (("mnist", _mnist), ("cifar10", _cifar10)):
        try:
            data = load(root)
        except FileNotFoundError as error:
            results[name] = {"skipped": str(error)}
        else:
            results[name] = train(PROTOCOLS[name], *data)
    return results


def train(
    protocol: Protocol, images: Tensor, targets: Tensor, test_images: Tensor, test_targets: Tensor
) -> dict[str, Any]:
    """All three rules from the same initial weights on the same batches.

    Args:
        protocol: how.
        images: (N, …) in [0, 1].
        targets: (N,).
        test_images: (M, …).
        test_targets: (M,).
    """
    images, targets = images[: protocol.images], targets[: protocol.images]
    rules: dict[str, Any] = {}
    for rule, lr in protocol.lrs.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            network = protocol.network()
        optimizer = _optimizer(rule, network, lr, protocol.second_decay)
        order = torch.Generator().manual_seed(SEED)
        losses, accuracies = [], []
        for _ in range(protocol.epochs):
            total = 0.0
            for batch in torch.randperm(len(images), generator=order).split(BATCH):
                loss = functional.cross_entropy(network(images[batch]), targets[batch])
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(network.parameters(), CLIP)
                optimizer.step()
                total += float(loss.detach()) * len(batch)
            losses.append(total / len(images))
            with torch.no_grad():
                right = sum(
                    int((network(some).argmax(1) == answer).sum())
                    for some, answer in zip(test_images.split(1000), test_targets.split(1000), strict=True)
                )
            accuracies.append(100.0 * right / len(test_targets))
        rules[rule] = {"lr": lr, "train_loss": losses, "test_accuracy": accuracies}
    return {
        "shortened": protocol.shortened,
        "ballistic": f"s ← β₂s + (1 − β₂)g², p ← p − lr·g/√(s + 1e-8), β₂ = {protocol.second_decay:g}, no bias "
        f"correction",
        "batch": BATCH,
        "gradient_clip": CLIP,
        "images": len(images),
        "epochs": protocol.epochs,
        "rules": rules,
    }


def draw(panel: Any, name: str, data: str, result: dict[str, Any]) -> None:
    """Training loss of the three rules, with their last test accuracy; or why there is none."""
    title = {"mnist": "MNIST", "cifar10": "CIFAR-10"}[data]
    if "skipped" in result:
        letter(panel, name, title)
        panel.text(0.5, 0.5, "no data\n(set CLAGRANGE_DATA)", transform=panel.transAxes, ha="center", color=INK)
        panel.set(xticks=[], yticks=[])
        return
    letter(panel, name, f"{title}, shortened: {result['images']:,} images")
    epochs = np.arange(1, result["epochs"] + 1)
    for rule, found in result["rules"].items():
        label = f"{rule}: {found['test_accuracy'][-1]:.1f} % test"
        panel.plot(epochs, found["train_loss"], "o-", color=COLOURS[rule], markersize=4, label=label)
    panel.legend()
    panel.set(xlabel="epoch", ylabel="training loss", xticks=epochs)


def _optimizer(rule: str, network: nn.Module, lr: float, second_decay: float) -> torch.optim.Optimizer:
    if rule == "SGD":
        return torch.optim.SGD(network.parameters(), lr=lr)
    if rule == "AdamW":
        return torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=0.0)
    return Ballistic(network.parameters(), lr=lr, curvature_decay=second_decay, eps=1e-8, bias_correction=False)


def _mnist(root: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from torchvision.datasets import MNIST

    try:
        train, test = (MNIST(str(root), train=part) for part in (True, False))
    except RuntimeError as error:
        raise FileNotFoundError(
            f"MNIST's files are not in {Path(root, 'MNIST', 'raw')}; set CLAGRANGE_DATA to the folder that holds "
            f"MNIST/raw"
        ) from error
    return train.data.float() / 255.0, train.targets, test.data.float() / 255.0, test.targets


def _cifar10(root: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From ``cifar10_10k.npz`` (x_train, y_train, x_test, y_test; (N, 3, 32, 32)), else torchvision's files."""
    archive = root / "cifar10_10k.npz"
    if archive.is_file():
        with np.load(archive) as stored:
            arrays = [torch.from_numpy(stored[key]) for key in ("x_train", "y_train", "x_test", "y_test")]
    else:
        from torchvision.datasets import CIFAR10

        try:
            parts = [CIFAR10(str(root), train=part) for part in (True, False)]
        except RuntimeError as error:
            raise FileNotFoundError(
                f"CIFAR-10's files are not in {root / 'cifar-10-batches-py'}; set CLAGRANGE_DATA to the folder "
                f"that holds cifar-10-batches-py"
            ) from error
        arrays = []
        for part in parts:
            arrays += [torch.from_numpy(part.data).permute(0, 3, 1, 2), torch.tensor(part.targets)]
    images, targets, test_images, test_targets = arrays
    return _halved(images), targets.long(), _halved(test_images), test_targets.long()


def _halved(images: Tensor) -> Tensor:
    """Bytes (N, 3, 32, 32) to numbers (N, 3, 16, 16) around 0."""
    return torch.cat([functional.avg_pool2d(some / 127.5 - 1.0, 2) for some in images.split(1000)])
