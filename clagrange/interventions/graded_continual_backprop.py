"""Graded continual backprop: every unit starts over a little, the more the less it is of use."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from clagrange._checks import Number, check_count, check_fraction, check_nonnegative, check_number, per_replica
from clagrange.interventions.unit_reset import UnitReset, draw, incoming_gradient, rows, zeros_for
from clagrange.replicas import generator_of
from clagrange.wiring import Connection, LayerMap


class GradedContinualBackprop(UnitReset):
    """Every so many steps, move the weights of each hidden unit a part α of the way to fresh ones.

    With E|g| of a unit the mean |∂L/∂w_in| over its incoming weights, at each step

        u ← decay·u + (1 − decay)·E|g| / (mean of E|g| over the layer),    u = 1 at first,

    and at every ``every``-th

        α = rate·min(exp(−steepness·(u − threshold)), 1)
        w_in ← (1 − α)·w_in + α·fresh,  fresh ~ U(±gain·√(3/fan_in))
        w_out ← (1 − α)·w_out,  u ← 1.

    Biases and normalisation layers stay, as do the optimizer's state and a Gaussian precision, since nothing
    starts over as a whole.

    Args:
        rate: ρ in [0, 1], the largest part.
        every: steps from one move to the next.
        steepness: κ ≥ 0, of the fall of α with u.
        threshold: τ, the u up to which a unit moves by the whole ρ; 1 is the mean of the layer.
        decay: of the average in u, in [0, 1).
        layers: names of the layers in order, each feeding the next, or of each layer those that it feeds;
            default: found by tracing.
        gain: of the initialisation, √2 for ReLU.
        seed: of the random stream.

    Source: McCutcheon, Chatzaroulas, Fallah, "Learning continually at peak performance with continuous continual
    backpropagation" (CCBP), https://openreview.net/forum?id=UJqXhFFzKu, in the form and with the numbers of a
    code in JAX that appears to be the authors'. The package ccbp-pytorch has α = ρ·sigmoid(−κ(u − 1)) instead,
    moves biases and the optimizer's state alike, and keeps u.
    """

    watches = False

    def __init__(
        self,
        rate: Number = 0.012,
        every: int = 1000,
        steepness: float = 16.0,
        threshold: float = 0.95,
        decay: float = 0.99,
        layers: LayerMap | None = None,
        gain: float = math.sqrt(2.0),
        seed: int | Sequence[int] = 0,
    ) -> None:
        super().__init__(layers, gain, seed)
        check_fraction("rate", rate)
        check_count("every", every)
        check_nonnegative("steepness", steepness)
        check_number("threshold", threshold)
        check_number("decay", decay, low=0.0, high=1.0, open_high=True)
        self.rate = rate
        self.every = every
        self.steepness = steepness
        self.threshold = threshold
        self.decay = decay
        self.state["steps"] = 0

    @property
    def replays(self) -> bool:
        """It does."""
        return True

    def _prepare(self) -> None:
        for connection in self._connections:
            self._bind(connection, utility=torch.ones_like(zeros_for(connection)))

    @torch.no_grad()
    def on_gradient(self, network: nn.Module, optimizer: Optimizer) -> None:
        """Average the utilities."""
        for connection in self._connections if not self._saw_nothing(network) else ():
            gradient = incoming_gradient(connection)
            if gradient is not None:
                mean = gradient.mean(-1, keepdim=True).clamp(min=torch.finfo(gradient.dtype).tiny)
                self.state[connection.name]["utility"].lerp_(gradient / mean, 1.0 - self.decay)

    @torch.no_grad()
    def on_step(self, network: nn.Module, optimizer: Optimizer) -> None:
        """Move the units if it is time."""
        self.state["steps"] += 1
        if self.state["steps"] % self.every == 0:
            moved_in: set[Tensor] = set()
            moved_out: set[Tensor] = set()
            for connection in self._connections:
                utility = self.state[connection.name]["utility"]
                share = torch.exp(-self.steepness * (utility - self.threshold)).clamp(max=1.0)
                part = (per_replica(self.rate, utility) * share).to(utility.dtype)
                self._move(connection, part, moved_in, moved_out)
                utility.fill_(1.0)

    def _move(self, connection: Connection, part: Tensor, moved_in: set[Tensor], moved_out: set[Tensor]) -> None:
        """Move the weights of units, those that layers share with the first units that have them."""
        everywhere = torch.ones_like(part, dtype=torch.bool)
        for consumer in connection.consumers:
            if not _first(consumer.weight, moved_out):
                continue
            consumer.weight.mul_(1.0 - connection.outgoing(part, consumer).to(consumer.weight.dtype))
        for producer in connection.producers:
            weight = producer.weight
            if not _first(weight, moved_in):
                continue
            fresh = torch.empty_like(weight)
            for replica, _, weights in rows(connection, producer, everywhere):
                drawn = draw(
                    torch.empty_like(weights), producer, self.gain, generator_of(self.generators, replica)
                )
                (fresh[replica] if connection.stacked else fresh).copy_(drawn)
            weight.lerp_(fresh, connection.incoming(part, producer).to(weight.dtype))


def _first(weight: Tensor, moved: set[Tensor]) -> bool:
    """Whether a weight is trained and has not been moved yet; it now counts as moved."""
    first = weight.requires_grad and weight not in moved
    moved.add(weight)
    return first
