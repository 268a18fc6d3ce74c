"""What the regularisers toward the initial weights share: the weights that they pull to."""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from clagrange._checks import Number, check_choice, check_nonnegative, per_replica
from clagrange.interventions.base import Intervention, trainable
from clagrange.interventions.detection import Detector
from clagrange.networks import fresh_parameters

RESAMPLE = ("never", "step", "switch")


class Regenerative(Intervention):
    """A pull of every trainable parameter to w₀, added to its gradient before the optimizer sees it.

    w₀ are the weights at the first `on_start`, or draws from their distribution that are made anew.

    Args:
        strength: λ ≥ 0, for the mean loss per example.
        resample: "never" keeps w₀; "step" and "switch" draw it anew, as `clagrange.networks.initialize` does.
        seed: of the random stream.
        detector: of switches; None goes by the announcement.
    """

    def __init__(
        self,
        strength: Number,
        resample: str = "never",
        seed: int | Sequence[int] = 0,
        detector: Detector | None = None,
    ) -> None:
        super().__init__(seed, detector)
        check_nonnegative("strength", strength)
        check_choice("resample", resample, RESAMPLE)
        self.strength = strength
        self.resample = resample

    @property
    def acts_at_switches(self) -> bool:
        """Only with ``resample="switch"``."""
        return self.resample == "switch"

    @property
    def replays(self) -> bool:
        """Unless w₀ is drawn at every step."""
        return self.resample != "step" and self.detector is None

    @abstractmethod
    def _pull(self, distance: Tensor) -> Tensor:
        """The gradient of the penalty for λ = 1."""

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
        if self.resample == "step":
            self._draw(network)
        for name, parameter in trainable(network):
            if parameter.grad is not None:
                pull = per_replica(self.strength, parameter) * self._pull(parameter - self.state[name])
                parameter.grad.add_(pull)

    def on_switch(self, network: nn.Module, optimizer: Optimizer) -> None:
        """Draw the weights to pull to anew, where that is asked for."""
        if self.resample == "switch":
            self._draw(network)

    def _draw(self, network: nn.Module) -> None:
        fresh = dict(fresh_parameters(network, self.generators))
        for name, parameter in trainable(network):
            self.state[name] = fresh[parameter]
