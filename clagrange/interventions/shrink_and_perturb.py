"""Shrink and perturb."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from clagrange._checks import Number, check_choice, check_fraction, check_nonnegative, per_replica
from clagrange.interventions.base import Intervention, trainable
from clagrange.replicas import randn_like, replicas_of


class ShrinkAndPerturb(Intervention):
    """w ← (1 − shrink)·w + noise·ε with ε standard normal, for every trainable parameter.

    Args:
        shrink: fraction removed each time, in [0, 1].
        noise: standard deviation of the perturbation, in units of the weights.
        every: "step" (Dohare et al. 2024) or "switch" (Ash and Adams 2020).
        seed: of the random stream.
    """

    def __init__(
        self,
        shrink: Number = 1e-4,
        noise: Number = 1e-5,
        every: str = "step",
        seed: int | Sequence[int] = 0,
    ) -> None:
        super().__init__(seed)
        check_fraction("shrink", shrink)
        check_nonnegative("noise", noise)
        check_choice("every", every, ("step", "switch"))
        self.shrink = shrink
        self.noise = noise
        self.every = every

    @property
    def told_of_switches(self) -> bool:
        """Only with ``every="switch"``."""
        return self.every == "switch"

    def on_step(self, network: nn.Module, optimizer: Optimizer) -> None:
        """Shrink and perturb after each step."""
        if self.every == "step":
            self._change(network)

    def on_switch(self, network: nn.Module, optimizer: Optimizer) -> None:
        """Shrink and perturb at a switch."""
        if self.every == "switch":
            self._change(network)

    @torch.no_grad()
    def _change(self, network: nn.Module) -> None:
        parameters = [parameter for _, parameter in trainable(network)]
        stacked = replicas_of(network) is not None
        for parameter, noise in zip(parameters, self._noise(parameters, stacked), strict=True):
            parameter.mul_(1.0 - per_replica(self.shrink, parameter))
            parameter.add_(noise.mul_(per_replica(self.noise, parameter)))

    def _noise(self, parameters: list[nn.Parameter], stacked: bool) -> list[Tensor]:
        # one draw for all parameters: many small draws would take longer than the training step
        first = parameters[0]
        sizes = [parameter[0].numel() if stacked else parameter.numel() for parameter in parameters]
        flat = first.new_empty((first.shape[0], sum(sizes)) if stacked else (sum(sizes),))
        pieces = randn_like(flat, self.generators).split(sizes, -1)
        return [piece.reshape(parameter.shape) for piece, parameter in zip(pieces, parameters, strict=True)]
