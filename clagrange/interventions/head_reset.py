"""A head that starts from 0 with every task."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.optim import Optimizer

from clagrange.interventions.base import Intervention, forget_all, trainable
from clagrange.interventions.detection import Detector
from clagrange.wiring import named_layers, output_layers


class HeadReset(Intervention):
    """Set weights and biases of the output layers to 0 at every switch, and forget the optimizer's state of them.

    What is done with any method where every task has classes of its own; the predictions of a new task start at
    no preference. A Gaussian precision returns to its prior. Frozen parameters stay.

    Args:
        layers: names of the output layers; default: found by tracing.
        detector: of switches; None goes by the announcement.

    Source: Dohare, Hernandez-Garcia, Lan, Rahman, Mahmood, Sutton, "Loss of plasticity in deep continual
    learning", Nature 632 (2024), Continual ImageNet.
    """

    def __init__(self, layers: Sequence[str] | None = None, detector: Detector | None = None) -> None:
        super().__init__(detector=detector)
        self.layers = layers

    @torch.no_grad()
    def on_switch(self, network: nn.Module, optimizer: Optimizer) -> None:
        """Start the head from 0."""
        for layer in heads(network, self.layers):
            for _, parameter in trainable(layer):
                parameter.zero_()
                forget_all(optimizer, parameter)


def heads(network: nn.Module, layers: Sequence[str] | None) -> list[nn.Module]:
    """The layers of these names, or those that make the network's outputs."""
    if layers is not None:
        return list(named_layers(network, layers))
    return [layer for _, layer in output_layers(network)]
