"""Shrink and perturb."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from clagrange._checks import Number, check_choice, check_count, check_fraction, check_nonnegative, per_replica
from clagrange.interventions.base import Intervention, trainable
from clagrange.interventions.detection import Detector
from clagrange.networks import fresh_parameters
from clagrange.replicas import randn_like, replicas_of


class ShrinkAndPerturb(Intervention):
    """w ← (1 − shrink)·w + noise·ε for every trainable parameter.

    Published in three forms:

    * at a switch, with fresh initial weights for ε: ``every="switch", perturbation="initial"`` (Ash and Adams
      2020; their text says normal noise, which is ``perturbation="normal"``),
    * after every step, with ε standard normal: the default (Dohare et al. 2024),
    * every few thousand steps, part of the way to fresh initial weights: ``every=n, perturbation="initial"``
      and noise = shrink (D'Oro et al. 2023; Schwarzer et al. 2023, there shrink = .5 in the convolutions).

    Initial weights are those of `clagrange.networks.initialize`: of each layer by its own scale, and 0 for
    biases. The optimizer's state stays, as does a Gaussian weight's precision.

    Args:
        shrink: fraction removed each time, in [0, 1].
        noise: factor of ε: in units of the weights if it is normal, of the initial weights otherwise.
        every: "step", "switch", or a number of steps.
        perturbation: what ε is, "normal" or "initial".
        seed: of the random stream.
        detector: of switches; None goes by the announcement.

    Source: Ash and Adams, "On warm-starting neural network training", NeurIPS 2020; Dohare et al., Nature 632
    (2024); D'Oro et al., "Sample-efficient reinforcement learning by breaking the replay ratio barrier", ICLR
    2023; Schwarzer et al., "Bigger, better, faster", ICML 2023.
    """

    def __init__(
        self,
        shrink: Number = 1e-4,
        noise: Number = 1e-5,
        every: str | int = "step",
        seed: int | Sequence[int] = 0,
        perturbation: str = "normal",
        detector: Detector | None = None,
    ) -> None:
        super().__init__(seed, detector)
        check_fraction("shrink", shrink)
        check_nonnegative("noise", noise)
        if isinstance(every, str):
            check_choice("every", every, ("step", "switch"))
        else:
            check_count("every", every)
            self.state["steps"] = 0
        check_choice("perturbation", perturbation, ("normal", "initial"))
        self.shrink = shrink
        self.noise = noise
        self.every = every
        self.perturbation = perturbation

    @property
    def acts_at_switches(self) -> bool:
        """Only with ``every="switch"``."""
        return self.every == "switch"

    def on_step(self, network: nn.Module, optimizer: Optimizer) -> None:
        """Shrink and perturb after each step, or after so many."""
        if self.every == "switch":
            return
        if self.every != "step":
            self.state["steps"] += 1
            if self.state["steps"] % self.every:
                return
        self._change(network)

    def on_switch(self, network: nn.Module, optimizer: Optimizer) -> None:
        """Shrink and perturb at a switch."""
        if self.every == "switch":
            self._change(network)

    @torch.no_grad()
    def _change(self, network: nn.Module) -> None:
        draws = self._normal(network) if self.perturbation == "normal" else self._initial(network)
        for parameter, noise in draws:
            parameter.mul_(1.0 - per_replica(self.shrink, parameter))
            parameter.add_(noise.mul_(per_replica(self.noise, parameter)))

    def _initial(self, network: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        draws = dict(fresh_parameters(network, self.generators))  # what layers share once
        return ((parameter, fresh) for parameter, fresh in draws.items() if parameter.requires_grad)

    def _normal(self, network: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        # one draw for all parameters: many small draws would take longer than the training step
        parameters = [parameter for _, parameter in trainable(network)]
        stacked = replicas_of(network) is not None
        first = parameters[0]
        sizes = [parameter[0].numel() if stacked else parameter.numel() for parameter in parameters]
        flat = first.new_empty((first.shape[0], sum(sizes)) if stacked else (sum(sizes),))
        pieces = randn_like(flat, self.generators).split(sizes, -1)
        for piece, parameter in zip(pieces, parameters, strict=True):
            yield parameter, piece.reshape(parameter.shape)
