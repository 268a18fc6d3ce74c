"""Last layers that are drawn afresh from time to time."""

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.optim import Optimizer

from clagrange._checks import check_choice, check_count, check_number
from clagrange.interventions.base import Intervention, forget_all, trainable
from clagrange.interventions.detection import Detector
from clagrange.interventions.head_reset import heads
from clagrange.interventions.unit_reset import draw
from clagrange.replicas import generator_of, replicas_of


class LastLayerReset(Intervention):
    """Draw the last layers afresh, at every switch or every few steps.

    Weights ~ U(±gain·√(3/fan_in)), biases 0, a Gaussian precision at its prior. Unlike `HeadReset`, which starts
    from 0, fresh weights send gradients into the layers below from the first step on. Frozen parameters stay.

    Args:
        every: steps from one reset to the next, for streams whose switches nobody announces. None: at every
            switch.
        forget: whether the optimizer's state of the weights becomes 0 too.
        layers: names of the layers; default: those that make the outputs, found by tracing.
        gain: of the initialisation, √2 as `clagrange.networks.initialize` has it for every layer.
        seed: of the random stream.
        detector: of switches; None goes by the announcement.

    Source: Nikishin, Schwarzer, D'Oro, Bacon, Courville, "The primacy bias in deep reinforcement learning", ICML
    2022; Zhou, Vani, Larochelle, Courville, "Fortuitous forgetting in connectionist networks", ICLR 2022.
    """

    def __init__(
        self,
        every: int | None = None,
        forget: bool = True,
        layers: Sequence[str] | None = None,
        gain: float = math.sqrt(2.0),
        seed: int | Sequence[int] = 0,
        detector: Detector | None = None,
    ) -> None:
        super().__init__(seed, detector)
        if every is not None:
            check_count("every", every)
            self.state["steps"] = 0
        check_choice("forget", forget, (True, False))
        check_number("gain", gain, low=0.0)
        self.every = every
        self.forget = forget
        self.layers = layers
        self.gain = gain

    @property
    def acts_at_switches(self) -> bool:
        """Unless it goes by the steps."""
        return self.every is None

    def on_step(self, network: nn.Module, optimizer: Optimizer) -> None:
        """Reset if enough steps were taken."""
        if self.every is None:
            return
        self.state["steps"] += 1
        if self.state["steps"] % self.every == 0:
            self._reset(network, optimizer)

    def on_switch(self, network: nn.Module, optimizer: Optimizer) -> None:
        """Reset."""
        if self.every is None:
            self._reset(network, optimizer)

    @torch.no_grad()
    def _reset(self, network: nn.Module, optimizer: Optimizer) -> None:
        stacked = replicas_of(network) is not None
        for layer in heads(network, self.layers):
            assert isinstance(layer, (nn.Linear, nn.Conv2d))
            if layer.weight.requires_grad:
                for replica, weight in enumerate(layer.weight if stacked else [layer.weight]):
                    draw(weight, layer, self.gain, generator_of(self.generators, replica))
            if layer.bias is not None and layer.bias.requires_grad:
                layer.bias.zero_()
            for _, parameter in trainable(layer):
                forget_all(optimizer, parameter, state=self.forget)
