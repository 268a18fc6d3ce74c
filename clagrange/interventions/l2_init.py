"""L2 regularisation toward the initial weights."""

import torch
from torch import nn
from torch.optim import Optimizer

from clagrange._checks import Number, check_nonnegative, per_replica
from clagrange.interventions.base import Intervention, trainable


class L2Init(Intervention):
    """Add strength/2·‖w − w₀‖² to the loss, w₀ the weights at the first `on_start`.

    The gradient of each parameter grows by strength·(w − w₀), before the optimizer sees it (Kumar, Marklund,
    Van Roy 2023).

    Args:
        strength: λ ≥ 0, for the mean loss per example.
    """

    def __init__(self, strength: Number = 1e-3) -> None:
        super().__init__()
        check_nonnegative("strength", strength)
        self.strength = strength

    def on_start(self, network: nn.Module, optimizer: Optimizer) -> None:
        """Remember the initial weights, once; parameters that come later join at their first start."""
        super().on_start(network, optimizer)
        for name, parameter in trainable(network):
            stored = self.state.get(name)
            if stored is None or stored.shape != parameter.shape:
                self.state[name] = parameter.detach().clone()
            else:
                self.state[name] = stored.to(parameter)

    @torch.no_grad()
    def on_gradient(self, network: nn.Module, optimizer: Optimizer) -> None:
        """Add the gradient of the regulariser."""
        for name, parameter in trainable(network):
            if parameter.grad is not None:
                pull = per_replica(self.strength, parameter) * (parameter - self.state[name])
                parameter.grad.add_(pull)
