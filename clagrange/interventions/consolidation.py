"""Consolidation of what a task has taught, at its end."""

from collections.abc import Sequence

from torch import nn
from torch.optim import Optimizer

from clagrange._checks import Number, check_count, check_nonnegative
from clagrange.gaussian import consolidate, gaussian_blocks
from clagrange.interventions.base import Intervention
from clagrange.interventions.detection import Detector


class Consolidation(Intervention):
    """Make the posterior of Gaussian weights the prior of what comes next, at every switch or every few steps.

    What protects old tasks; see `clagrange.consolidate` for the formula. In a list it stands before a
    `VarianceInjection`, which then draws afresh what no task holds.

    Args:
        weight: of what was learnt; 1 is Bayes' rule, less forgets old tasks by and by.
        every: steps from one consolidation to the next, for streams whose switches nobody announces; then the
            temperature is to be 1/(examples in so many steps). None: at every switch.
        layers: names or shell patterns of the layers; default all.
        detector: of switches; None goes by the announcement.

    Raises:
        TypeError: if ``weight`` is no number, or ``every`` no whole number.
        ValueError: if one is out of range; at a consolidation if no layer is Gaussian.
    """

    def __init__(
        self,
        weight: Number = 1.0,
        every: int | None = None,
        layers: Sequence[str] | None = None,
        detector: Detector | None = None,
    ) -> None:
        super().__init__(detector=detector)
        check_nonnegative("weight", weight)
        if every is not None:
            check_count("every", every)
            self.state["steps"] = 0
        self.weight = weight
        self.every = every
        self.layers = layers

    @property
    def acts_at_switches(self) -> bool:
        """Unless it goes by the steps."""
        return self.every is None

    def on_start(self, network: nn.Module, optimizer: Optimizer) -> None:
        """Look for the layers."""
        super().on_start(network, optimizer)
        next(gaussian_blocks(network, self.layers))

    def on_step(self, network: nn.Module, optimizer: Optimizer) -> None:
        """Consolidate if enough steps were taken."""
        if self.every is None:
            return
        self.state["steps"] += 1
        if self.state["steps"] % self.every == 0:
            consolidate(network, self.weight, layers=self.layers)

    def on_switch(self, network: nn.Module, optimizer: Optimizer) -> None:
        """Consolidate what the last task has taught."""
        if self.every is None:
            consolidate(network, self.weight, layers=self.layers)
