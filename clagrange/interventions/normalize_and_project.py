"""Normalize and project: weights that keep their initial norm."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from clagrange._checks import check_count
from clagrange.interventions.base import Intervention
from clagrange.replicas import replicas_of
from clagrange.wiring import named_layers, output_layers

_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._BatchNorm)


class NormalizeAndProject(Intervention):
    """Set the weights of hidden linear and convolution layers back to their first norm: w ← w·‖w₀‖/‖w‖.

    The half of the method that projects; the other half normalises before every nonlinearity, see
    `clagrange.networks.add_layer_norm`. There the outputs no longer depend on the norm of a weight, but its
    effective learning rate does, and falls as the norm grows. The layers that make the network's outputs have no
    normalisation after them and stay free. Scale and shift of a normalisation layer are projected as one vector
    (what follows is homogeneous, as ReLU is); biases of other layers, which normalisation makes needless, stay
    free. A weight that is 0 has no direction and stays 0. The optimizer's state stays.

    Args:
        every: steps from one projection to the next.
        layers: names of the layers to project beside the normalisations; default: all but those that make the
            outputs, found by tracing.

    Raises:
        ValueError: at the start, if there are no layers of these names, or the network cannot be traced.

    Source: Lyle, Zheng, Khetarpal, Martens, van Hasselt, Pascanu, Dabney, "Normalization and effective learning
    rates in reinforcement learning", NeurIPS 2024.
    """

    def __init__(self, every: int = 1, layers: Sequence[str] | None = None) -> None:
        super().__init__()
        check_count("every", every)
        self.every = every
        self.layers = layers
        self.state = {"steps": 0, "norms": {}}
        self._projected: list[tuple[str, list[Tensor]]] = []
        self._stacked = False

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_projected": []}

    def on_start(self, network: nn.Module, optimizer: Optimizer) -> None:
        """Remember the norms, once; layers that come later join at their first start."""
        super().on_start(network, optimizer)
        self._stacked = replicas_of(network) is not None
        if self.layers is None:
            outputs = {layer for _, layer in output_layers(network)}
            hidden = {module for module in network.modules() if isinstance(module, _LAYERS)} - outputs
        else:
            hidden = set(named_layers(network, self.layers))
        self._projected = []
        for name, module in network.named_modules():
            parameters = [module.weight] if module in hidden else []
            if isinstance(module, _NORMS):
                parameters = list(module.parameters(recurse=False))
            if parameters and all(parameter.requires_grad for parameter in parameters):
                self._projected.append((name, parameters))
                norm = self._norm(parameters)
                stored = self.state["norms"].get(name)
                self.state["norms"][name] = norm if stored is None else stored.to(norm)

    @torch.no_grad()
    def on_step(self, network: nn.Module, optimizer: Optimizer) -> None:
        """Project."""
        self.state["steps"] += 1
        if self.state["steps"] % self.every:
            return
        for name, parameters in self._projected:
            norm = self._norm(parameters)
            factor = torch.where(norm > 0, self.state["norms"][name] / norm, 1.0)
            for parameter in parameters:
                shaped = factor.view(-1, *[1] * (parameter.dim() - 1)) if factor.dim() else factor
                parameter.mul_(shaped.to(parameter.dtype))

    def _norm(self, parameters: list[Tensor]) -> Tensor:
        """The joint norm of parameters, a number or (R,)."""
        squares = [
            p.detach()
            .to(torch.promote_types(p.dtype, torch.float32))
            .square()
            .flatten(int(self._stacked))
            .sum(-1)
            for p in parameters
        ]
        return torch.stack(squares).sum(0).sqrt()
