"""Soft reset: a drift to the initial weights, as fast as the data ask for."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from clagrange._checks import Number, check_choice, check_nonnegative, check_number, per_replica
from clagrange.interventions.base import Intervention, trainable
from clagrange.replicas import replicas_of

SCOPES = ("layer", "weight")


class SoftReset(Intervention):
    """Weights that drift by γ·w + (1 − γ)·μ₀ before each step, γ learnt on the likelihood of the new batch.

    The weights are believed to follow an Ornstein-Uhlenbeck process, w' ~ N(γw + (1 − γ)μ₀, (1 − γ²)σ₀²). At
    every batch, with g the gradient of its loss at w, γ starts from 1, no change, and takes a gradient step:

        γ ← clip(1 − gamma_lr·g·(w − μ₀), 0, 1)
        w ← γw + (1 − γ)μ₀,   g ← (γ² + (1 − γ²)/s²)·g

    with the inner product over the weights of a layer, or for every weight alone. The larger step where γ < 1
    is the prior's larger variance there; s = σ/σ₀ is how sure the posterior is of a weight, in standard
    deviations of the initial distribution.

    The paper allows several steps for γ on the likelihood averaged over draws of the weights, and takes the
    gradient of the loss at the weights that have drifted, a second pass for every batch. Here one pass serves:
    the likelihood is taken to first order at w, where any number of steps for γ is one and the variance of the
    draws plays no part, and the step is by the gradient before the drift. The paper's further forms, with several
    steps of the weights on each batch (proximal) or with a variance learnt for each weight (Bayesian), are left
    out. With an optimizer that normalises gradients, as Adam does, the factor of g has little effect.

    Args:
        gamma_lr: step size of γ ≥ 0, for the mean loss per example.
        posterior_scale: s in (0, 1].
        scope: "layer", one γ for a layer with its bias, or "weight".
        origin: μ₀: "initial", the weights at the first `on_start`, or "zero".

    Source: Galashov, Titsias, György, Lyle, Pascanu, Teh, Sahani, "Non-stationary learning of neural networks
    with automatic soft parameter reset", NeurIPS 2024.
    """

    def __init__(
        self,
        gamma_lr: Number = 0.1,
        posterior_scale: Number = 0.9,
        scope: str = "layer",
        origin: str = "initial",
    ) -> None:
        super().__init__()
        check_nonnegative("gamma_lr", gamma_lr)
        check_number("posterior_scale", posterior_scale, low=0.0, high=1.0, open_low=True)
        check_choice("scope", scope, SCOPES)
        check_choice("origin", origin, ("initial", "zero"))
        self.gamma_lr = gamma_lr
        self.posterior_scale = posterior_scale
        self.scope = scope
        self.origin = origin
        self.state = {"origin": {}, "gamma": {}}

    @property
    def replays(self) -> bool:
        """It does."""
        return True

    def on_start(self, network: nn.Module, optimizer: Optimizer) -> None:
        """Remember the initial weights, once; parameters that come later join at their first start."""
        super().on_start(network, optimizer)
        for name, parameter in trainable(network) if self.origin == "initial" else ():
            stored = self.state["origin"].get(name)
            if stored is None or stored.shape != parameter.shape:
                self.state["origin"][name] = parameter.detach().clone()
            else:
                self.state["origin"][name] = stored.to(parameter)

    @torch.no_grad()
    def on_gradient(self, network: nn.Module, optimizer: Optimizer) -> None:
        """Learn γ, drift, and scale the gradient; γ of every layer is kept in ``state["gamma"]``."""
        first = int(replicas_of(network) is not None)
        for layer, members in _layers(network):
            distances = [parameter - self.state["origin"].get(name, 0.0) for name, parameter in members]
            slopes = [
                parameter.grad * distance for (_, parameter), distance in zip(members, distances, strict=True)
            ]
            if self.scope == "layer":
                total = torch.stack([slope.flatten(first).sum(-1) for slope in slopes]).sum(0)
                gamma_of_layer = self._learn(layer, total)
            for (name, parameter), distance, slope in zip(members, distances, slopes, strict=True):
                if self.scope == "weight":
                    gamma = self._learn(name, slope)
                else:
                    gamma = gamma_of_layer
                    gamma = gamma.view(-1, *[1] * (parameter.dim() - 1)) if first else gamma
                parameter.sub_((1.0 - gamma) * distance)
                scale = per_replica(self.posterior_scale, parameter)
                assert parameter.grad is not None
                parameter.grad.mul_(gamma**2 + (1.0 - gamma**2) / scale**2)

    def _learn(self, name: str, slope: Tensor) -> Tensor:
        """γ of a layer or a weight, which is kept in the same memory from step to step."""
        gamma = (1.0 - per_replica(self.gamma_lr, slope) * slope).clamp(0.0, 1.0)
        kept: Tensor = self.state["gamma"].get(name, gamma)
        kept = self.state["gamma"][name] = kept.to(gamma) if kept.shape == gamma.shape else gamma
        return kept.copy_(gamma)


def _layers(network: nn.Module) -> Iterator[tuple[str, list[tuple[str, nn.Parameter]]]]:
    """The parameters with gradients of each layer, by the layer's name."""
    layers: dict[str, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in trainable(network):
        if parameter.grad is not None:
            layers.setdefault(name.rpartition(".")[0], []).append((name, parameter))
    yield from layers.items()
