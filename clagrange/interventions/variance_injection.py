"""Variance injection at a task switch."""

from collections.abc import Sequence

from torch import nn
from torch.optim import Optimizer

from clagrange._checks import Number, check_fraction
from clagrange.gaussian import inject_variance
from clagrange.interventions.base import Intervention


class VarianceInjection(Intervention):
    """Make Gaussian weights plastic again at every switch, each as far as the loss has let go of it.

    The principled form of a unit reset; see `clagrange.inject_variance` for the formula.

    Args:
        strength: q in [0, 1] of the sampled Ornstein-Uhlenbeck step toward the prior.
        widen: fraction in [0, 1] by which precisions move to the prior's before the mean is sampled.
        layers: names or shell patterns of the layers; default all.
        seed: of the random stream.
    """

    def __init__(
        self,
        strength: Number = 0.3,
        widen: Number = 0.0,
        layers: Sequence[str] | None = None,
        seed: int | Sequence[int] = 0,
    ) -> None:
        super().__init__(seed)
        check_fraction("strength", strength)
        check_fraction("widen", widen)
        self.strength = strength
        self.widen = widen
        self.layers = layers

    def on_switch(self, network: nn.Module, optimizer: Optimizer) -> None:
        """Inject."""
        inject_variance(network, self.strength, self.widen, self.generators, layers=self.layers)
