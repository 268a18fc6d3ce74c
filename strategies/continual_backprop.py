"""Continual backprop as an Avalanche strategy."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from avalanche.training.plugins.evaluation import default_evaluator
from avalanche.training.templates import SupervisedTemplate
from torch import nn
from torch.optim import Optimizer

from clagrange import interventions
from clagrange.strategies.plugin import InterventionPlugin


class ContinualBackprop(SupervisedTemplate):  # type: ignore[misc]
    """Train with any optimizer, and after each step replace the hidden units that are of least use.

    Avalanche's ``Naive`` with `clagrange.interventions.ContinualBackprop` (Dohare et al. 2024), which states the
    algorithm. It is not told of switches.

    Args:
        model: the network; see ``layers`` for one that is not sequential.
        optimizer: any torch optimizer of its parameters.
        replacement_rate: fraction of the mature units replaced at each step.
        maturity: number of steps for which a new unit is protected.
        utility: "contribution", "zero_contribution" or "adaptable_contribution".
        decay: η in [0, 1).
        gain: of the initialisation, √2 for ReLU.
        layers: names of the layers in order, each feeding the next; default: read off a sequential network.
        seed: of the random stream.
        criterion: loss function; default: cross-entropy.
        train_mb_size: examples of a training batch.
        train_epochs: passes over each experience.
        eval_mb_size: examples of an evaluation batch; None for ``train_mb_size``.
        device: where the network goes.
        plugins: further Avalanche plugins; they act before the replacement.
        evaluator: Avalanche's ``EvaluationPlugin``, a function that makes one, or None for no logging.
        eval_every: how often ``train`` evaluates: -1 never, 0 after each experience, n > 0 every n epochs too.
        base_kwargs: further arguments of Avalanche's ``SupervisedTemplate``.

    Raises:
        ValueError: for a number out of range; at the first ``train``, if the chain of layers cannot be told.

    Example:
        >>> net = clagrange.networks.mlp(64, [64], 10)
        >>> strategy = ContinualBackprop(model=net, optimizer=torch.optim.SGD(net.parameters(), lr=0.01))
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        optimizer: Optimizer,
        replacement_rate: float = 1e-4,
        maturity: int = 100,
        utility: str = "contribution",
        decay: float = 0.99,
        gain: float = math.sqrt(2.0),
        layers: Sequence[str] | None = None,
        seed: int = 0,
        criterion: Callable[..., torch.Tensor] | None = None,
        train_mb_size: int = 1,
        train_epochs: int = 1,
        eval_mb_size: int | None = None,
        device: str | torch.device = "cpu",
        plugins: Sequence[Any] | None = None,
        evaluator: Any = default_evaluator,
        eval_every: int = -1,
        **base_kwargs: Any,
    ) -> None:
        self.interventions = InterventionPlugin(
            interventions.ContinualBackprop(replacement_rate, maturity, utility, decay, gain, layers, seed)
        )
        super().__init__(
            model=model,
            optimizer=optimizer,
            criterion=nn.CrossEntropyLoss() if criterion is None else criterion,
            train_mb_size=train_mb_size,
            train_epochs=train_epochs,
            eval_mb_size=eval_mb_size,
            device=device,
            plugins=[*(plugins or []), self.interventions],
            evaluator=evaluator,
            eval_every=eval_every,
            **base_kwargs,
        )
