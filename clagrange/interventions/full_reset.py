"""A fresh network for every task."""

import torch
from torch import nn
from torch.optim import Optimizer

from clagrange.gaussian import gaussian_layers
from clagrange.interventions.base import Intervention
from clagrange.networks import initialize


class FullReset(Intervention):
    """Draw all weights afresh at every switch and clear the optimizer: what a network without a past reaches.

    Weights are drawn by `clagrange.networks.initialize`, Gaussian precisions return to their prior; a
    prior around the initial weights moves to the fresh ones. Frozen parameters stay.

    Args:
        seed: of the random stream.
        detector: of switches; None goes by the announcement.
    """

    @torch.no_grad()
    def on_switch(self, network: nn.Module, optimizer: Optimizer) -> None:
        """Start over."""
        initialize(network, self.generators, frozen=False)
        for _, layer in gaussian_layers(network):
            for block in layer.blocks():
                if any(mean.requires_grad for mean in block.means):
                    block.precision.start_over(block.joint_mean())
        optimizer.state.clear()
