"""What the tests of the Lightning side share: a small module, a Trainer that writes nothing, a recorder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import clagrange  # before Lightning, so that torchvision's operators are declared
from clagrange.interventions import Intervention
from clagrange.networks import mlp

import lightning.pytorch as pl  # isort: skip

MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


def euler_lagrange(network: nn.Module) -> torch.optim.Optimizer:
    return clagrange.optim.EulerLagrange(network, lr=2e-2, temperature=1e-2)


def momentum(network: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)


def gaussian_mlp() -> nn.Module:
    return clagrange.gaussianize(mlp(64, [12], 10, seed=1).double())


def plain_mlp() -> nn.Module:
    return mlp(64, [12], 10, seed=1).double()


class Classifier(pl.LightningModule):
    """A network, an optimizer, cross-entropy."""

    def __init__(self, network: nn.Module, make_optimizer: MakeOptimizer) -> None:
        super().__init__()
        self.net = network
        self.make_optimizer = make_optimizer

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make_optimizer(self.net)


def trainer(folder: Path, **settings: Any) -> pl.Trainer:
    return pl.Trainer(
        **{
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": folder,
            "max_epochs": 50,  # more than any stream of the tests has
            **settings,
        }
    )


class Recorder(Intervention):
    """Writes down every moment, and what the network weighed."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []
        self.optimizers: list[torch.optim.Optimizer] = []
        self.weights: list[Tensor] = []

    def _note(self, event: str, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.events.append(event)
        self.optimizers.append(optimizer)
        self.weights.append(torch.cat([p.detach().flatten() for p in network.parameters()]))

    def on_start(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        super().on_start(network, optimizer)
        self._note("start", network, optimizer)

    def on_gradient(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        assert all(p.grad is not None for p in network.parameters())
        self._note("gradient", network, optimizer)

    def on_step(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._note("step", network, optimizer)

    def on_switch(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._note("switch", network, optimizer)
