"""Variance injection at a task switch."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from clagrange._checks import Number, check_count
from clagrange.dynamics.beliefs import averaging_weights
from clagrange.gaussian import GaussianBlock, gaussian_blocks, inject_variance
from clagrange.gaussian.precision import check_injection
from clagrange.interventions.base import Intervention
from clagrange.interventions.detection import Detector
from clagrange.interventions.only_replicas import only_replicas
from clagrange.optim.euler_lagrange_step import variance_fraction
from clagrange.replicas import replicas_of


class VarianceInjection(Intervention):
    """Make Gaussian weights plastic again at every switch, each as far as the loss has let go of it.

    The principled form of a unit reset; see `clagrange.inject_variance` for the formulas. Variance rises by
    ``widen``, the fraction of the way to the prior, by ``multiply``, a factor, or to what the new task asks for
    with ``equilibrium``; the mean is drawn by ``strength`` and ``draw``; ``where`` chooses a part of the weights.

    With ``over`` = n it is done in n parts, after each of the next n steps: strength q as 1 − (1 − q)^{1/n},
    widening likewise, and the n-th root of the factor, which together come to the whole where the loss does
    nothing meanwhile.

    With ``equilibrium`` = n the mean is drawn by what the last task has left, then the curvature is forgotten and
    the precision returns to the prior's. After n steps of `clagrange.optim.EulerLagrange` the curvature that was
    seen in them is taken for that of the new task, and the precision set to its equilibrium.

    Args:
        strength: q in [0, 1] of the sampled Ornstein-Uhlenbeck step toward the prior, or of the draw.
        widen: fraction in [0, 1] by which precisions move to the prior's before the mean is sampled.
        layers: names or shell patterns of the layers; default all.
        seed: of the random stream.
        multiply: factor ≥ 1 of the variance, which goes no further than to the prior's.
        draw: "prior", the Ornstein-Uhlenbeck step toward it, or "posterior", a draw from the widened posterior.
        where: "everywhere", "low_curvature" or "low_utility" (of units).
        share: of the weights (axes of a matrix Gaussian) or units, with ``where``.
        over: steps over which the injection is spread.
        equilibrium: steps after which precisions are set to the equilibrium of the new curvature; 0: not.
        detector: of switches; None goes by the announcement.

    Raises:
        TypeError: if a setting is of the wrong kind.
        ValueError: if a number is out of range, an option unknown, or ``over`` and ``equilibrium`` are combined;
            at a switch if no layer is Gaussian.
    """

    def __init__(
        self,
        strength: Number = 0.3,
        widen: Number = 0.0,
        layers: Sequence[str] | None = None,
        seed: int | Sequence[int] = 0,
        *,
        multiply: Number = 1.0,
        draw: str = "prior",
        where: str = "everywhere",
        share: Number = 0.5,
        over: int = 1,
        equilibrium: int = 0,
        detector: Detector | None = None,
    ) -> None:
        super().__init__(seed, detector)
        check_injection(strength, widen, multiply, draw, where, share)
        check_count("over", over)
        if equilibrium != 0:
            check_count("equilibrium", equilibrium)
            if over != 1:
                raise ValueError(
                    f"over: expected 1 with equilibrium, which forgets the curvature at once; got {over}"
                )
        self.strength = strength
        self.widen = widen
        self.layers = layers
        self.multiply = multiply
        self.draw = draw
        self.where = where
        self.share = share
        self.over = over
        self.equilibrium = equilibrium

    def on_start(self, network: nn.Module, optimizer: Optimizer) -> None:
        """Look for the layers, and begin to count the steps after a switch."""
        super().on_start(network, optimizer)
        next(gaussian_blocks(network, self.layers))
        if self._acts_at_steps:  # shape (R,), or one number
            left = self.state.get("left", torch.zeros((replicas_of(network) or 1,), dtype=torch.long))
            self.state["left"] = left.cpu()

    def on_switch(self, network: nn.Module, optimizer: Optimizer) -> None:
        """Inject, or begin to."""
        if self._acts_at_steps:
            self.state["left"] = torch.full_like(self.state["left"], self.equilibrium or self.over)
        if self.over == 1:
            self._inject(network, self.strength, self.widen, self.multiply)
        if self.equilibrium:
            with torch.no_grad():
                for _, block in gaussian_blocks(network, self.layers):
                    block.precision.forget_curvature()

    def on_step(self, network: nn.Module, optimizer: Optimizer) -> None:
        """Go on with what a switch has begun."""
        left = self.state.get("left")
        if left is None or not bool(left.any()):
            return
        acting = left > 0 if self.over > 1 else left == 1
        self.state["left"] = (left - 1).clamp(min=0)
        if bool(acting.any()):
            with only_replicas(acting, network, optimizer, self):
                if self.over > 1:
                    root = 1.0 / self.over
                    strength, widen = (1.0 - (1.0 - value) ** root for value in (self.strength, self.widen))
                    self._inject(network, strength, widen, self.multiply**root)
                else:
                    self._set_to_equilibrium(network, optimizer)

    @property
    def _acts_at_steps(self) -> bool:
        """Where an injection is spread over steps, or followed by what is done some steps later."""
        return self.over > 1 or self.equilibrium > 0

    def _inject(self, network: nn.Module, strength: Number, widen: Number, multiply: Number) -> None:
        inject_variance(
            network,
            strength,
            widen,
            self.generators,
            layers=self.layers,
            multiply=multiply,
            draw=self.draw,
            where=self.where,
            share=self.share,
        )

    @torch.no_grad()
    def _set_to_equilibrium(self, network: nn.Module, optimizer: Optimizer) -> None:
        for _, block in gaussian_blocks(network, self.layers):
            group = _group_of(block, optimizer)
            if group is None:  # frozen
                continue
            keep, _ = averaging_weights(group["curvature_decay"], group["discount"])
            believed = 1.0 - keep**self.equilibrium
            relaxed = 1.0 - (1.0 - variance_fraction(group)) ** self.equilibrium
            block.precision.set_to_equilibrium(group["temperature"], believed, relaxed)


def _group_of(block: GaussianBlock, optimizer: Optimizer) -> dict[str, Any] | None:
    """The settings with which a block is trained."""
    for group in optimizer.param_groups:
        if any(mean is parameter for mean in block.means for parameter in group["params"]):
            if "temperature" not in group:
                raise ValueError(
                    f"equilibrium: expected clagrange.optim.EulerLagrange, whose temperature says what the "
                    f"equilibrium is, got {type(optimizer).__name__}; leave equilibrium=0"
                )
            return group
    return None
