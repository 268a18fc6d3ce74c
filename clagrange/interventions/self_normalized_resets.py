"""Self-normalised resets: units that are silent for longer than they ever used to be."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from clagrange._checks import Number, check_count, check_fraction, per_replica
from clagrange.distributed import mean_over_processes
from clagrange.interventions.unit_reset import JoinedUnitReset, zeros_for
from clagrange.wiring import Connection, LayerMap

_Joined = tuple[list[Connection], dict[str, Tensor]]
"""Layers of one kind, and the tensors that they share."""


class SelfNormalizedResets(JoinedUnitReset[_Joined]):
    """Let a unit start over when the time since it last fired is beyond what its own past makes likely.

    A unit fires in a step if its output is above 0 for an example of the batch. With the lengths A of its past
    gaps from one firing to the next, and a the steps since it last fired, it starts over when

        P(A > a) ≤ η,  P the share among its past gaps,

    once it has a past of 1/η gaps, and in any case after ``longest`` silent steps. The gap that a fresh start
    ends joins the past. A fresh start is incoming weights ~ U(±gain·√(3/fan_in)), bias 0, outgoing weights 0,
    entries of normalisation layers as new, optimizer state 0 and a Gaussian precision at its prior.

    Args:
        rejection: η, the share of its gaps at which a unit that is alive may be taken for a dead one.
        longest: steps of silence after which every unit starts over; as many numbers are kept for each unit.
        layers: names of the layers in order, each feeding the next, or of each layer those that it feeds;
            default: found by tracing.
        gain: of the initialisation, √2 for ReLU.
        seed: of the random stream.

    Source: Farias and Jozefiak, "Self-normalized resets for plasticity in continual learning", ICLR 2025. The
    published code goes by the same share of gaps but keeps a threshold for each unit, which it makes anew between
    tasks; here the past is asked at every step.
    """

    def __init__(
        self,
        rejection: Number = 0.01,
        longest: int = 1000,
        layers: LayerMap | None = None,
        gain: float = math.sqrt(2.0),
        seed: int | Sequence[int] = 0,
    ) -> None:
        super().__init__(layers, gain, seed)
        check_fraction("rejection", rejection)
        check_count("longest", longest)
        self.rejection = rejection
        self.longest = longest

    def _joined(self, members: list[Connection]) -> _Joined:
        kept = []
        for connection in members:
            zeros = zeros_for(connection)
            kept.append(
                self._bind(
                    connection,
                    silent=zeros.long(),  # steps since it last fired
                    gaps=zeros.new_zeros(*zeros.shape, self.longest),  # how many lasted 1, 2, ... steps
                    total=zeros,
                    longer=zeros,  # how many past gaps were longer than the present silence
                )
            )
        units = [connection.units for connection in members]
        joined = {}
        for name, dim in (("silent", -1), ("gaps", -2), ("total", -1), ("longer", -1)):
            joined[name] = torch.cat([state[name] for state in kept], dim)
            for state, part in zip(kept, joined[name].split(units, dim), strict=True):
                state[name] = part
        return members, joined

    @torch.no_grad()
    def on_step(self, network: nn.Module, optimizer: Optimizer) -> None:
        """Count, and let the units start over that are silent for too long."""
        active = {connection.name: entering for connection, entering in self._active()}
        masks: dict[str, Tensor] = {}
        for members, joined in self._groups:
            present = [connection for connection in members if connection.name in active]
            whole = len(present) == len(members)
            for counted in [present] if whole else [[connection] for connection in present]:
                resets = self._count(joined if whole else self.state[counted[0].name], counted, active)
                if resets.any():  # the only word from the device
                    parts = resets.split([connection.units for connection in counted], -1)
                    masks |= {link.name: part for link, part in zip(counted, parts, strict=True)}
        for connection in self._connections:
            if connection.name in masks and masks[connection.name].any():
                self._start_over(connection, masks[connection.name], optimizer)

    def _count(
        self, state: dict[str, Tensor], counted: list[Connection], active: dict[str, list[Tensor]]
    ) -> Tensor:
        """Take up one more step; the units that are to start over."""
        fired = torch.cat([_fires(connection, active[connection.name]) for connection in counted], -1)
        fired = mean_over_processes(fired.float()) > 0
        silent, gaps, total, longer = (state[name] for name in ("silent", "gaps", "total", "longer"))
        silent += 1
        place = (silent - 1).unsqueeze(-1)
        longer -= gaps.gather(-1, place).squeeze(-1)
        allowed = per_replica(self.rejection, total) * total
        resets = ~fired & (((longer <= allowed) & (allowed >= 1.0)) | (silent >= self.longest))
        over = fired | resets
        ends = over.to(gaps.dtype)
        gaps.scatter_add_(-1, place, ends.unsqueeze(-1))
        total += ends
        silent.masked_fill_(over, 0)
        longer.copy_(torch.where(over, total, longer))
        return resets


def _fires(connection: Connection, entering: list[Tensor]) -> Tensor:
    """Which units were above 0 for an example of this process."""
    fires = [
        (connection.activations(inputs, consumer) > 0).any(-2)
        for consumer, inputs in zip(connection.consumers, entering, strict=True)
    ]
    return torch.stack(fires).any(0) if len(fires) > 1 else fires[0]
