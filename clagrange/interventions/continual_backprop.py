"""Continual backprop: generate and test."""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from clagrange._checks import Number, check_choice, check_fraction, check_number
from clagrange._magnitudes import follow_sums, sums_of_magnitudes
from clagrange.distributed import mean_over_processes, process_count
from clagrange.interventions.unit_reset import JoinedUnitReset, zeros_for
from clagrange.replicas import generator_of
from clagrange.wiring import Connection, Layer, LayerMap

UTILITIES = ("contribution", "zero_contribution", "adaptable_contribution", "weight", "adaptation", "random")

_CENTERED = ("zero_contribution", "adaptable_contribution")
_OF_INCOMING = ("adaptable_contribution", "adaptation")
_OF_OUTGOING = ("contribution", "zero_contribution", "adaptable_contribution", "weight")

_SMALL = 1 << 18
"""Weights up to which a product takes less time than sums by torch."""


class ContinualBackprop(JoinedUnitReset["_Group"]):
    """After each step, replace a small fraction of the mature hidden units that are of least use.

    For every hidden layer with activations h, after each step and for each unit:

        age ← age + 1
        f ← η f + (1 − η) mean h,                         f̂ = f / (1 − η^age)
        u ← η u + (1 − η) utility,                        û = u / (1 − η^age)
        utility = mean|w_out|·mean|h|                     "contribution"
                  mean|w_out|·mean|h − f̂|                 "zero_contribution"
                  mean|w_out|·mean|h − f̂| / mean|w_in|    "adaptable_contribution"
                  mean|w_out|                             "weight"
                  1 / mean|w_in|                          "adaptation"
        û ~ U(0, 1) at each replacement                   "random"

    A counter grows by rate × (units older than ``maturity``); its integer part is taken off, and so many
    mature units, of lowest û, start over: incoming weights ~ U(±gain·√(3/fan_in)), bias 0, outgoing weights 0
    with their mean contribution w_out·f̂ moved into the next bias, entries of normalisation layers on the way as
    new, age, f, u and the optimizer's state of exactly these entries 0 (a Gaussian precision returns to its
    prior). A step counter that an optimizer shares between all entries, as torch's Adam does, stays.

    Where several layers take a unit, means go over all its outgoing weights, and f is kept for each of them;
    where the outputs of several layers are added, a unit is that of all of them (see
    `clagrange.wiring.connections`).

    Args:
        replacement_rate: fraction of the mature units replaced at each step.
        maturity: number of steps for which a new unit is protected.
        utility: which utility.
        decay: η in [0, 1).
        gain: of the initialisation, √2 for ReLU.
        layers: names of the layers in order, each feeding the next, or of each layer those that it feeds;
            default: found by tracing.
        seed: of the random stream.
        as_published: do as the published code does where it differs from the paper: it sets f to 0 before the
            contribution is to be moved, so that none is, and judges all layers before it changes one. For
            comparison with that code only.

    Source: Dohare, Hernandez-Garcia, Lan, Rahman, Mahmood, Sutton, "Loss of plasticity in deep continual
    learning", Nature 632 (2024), Methods.
    """

    def __init__(
        self,
        replacement_rate: Number = 1e-4,
        maturity: int = 100,
        utility: str = "contribution",
        decay: float = 0.99,
        gain: float = math.sqrt(2.0),
        layers: LayerMap | None = None,
        seed: int | Sequence[int] = 0,
        as_published: bool = False,
    ) -> None:
        super().__init__(layers, gain, seed)
        check_fraction("replacement_rate", replacement_rate)
        check_number("maturity", maturity, low=0)
        check_choice("utility", utility, UTILITIES)
        check_number("decay", decay, low=0.0, high=1.0, open_high=True)
        check_choice("as_published", as_published, (True, False))
        self.replacement_rate = replacement_rate
        self.maturity = maturity
        self.utility = utility
        self.decay = decay
        self.as_published = as_published

    def _joined(self, members: list[Connection]) -> "_Group":
        kept = []
        for connection in members:
            zeros = zeros_for(connection)
            f = torch.cat([zeros] * len(connection.consumers), -1)
            kept.append(
                self._bind(
                    connection, age=zeros, mean_activation=f, utility=zeros, due=zeros.new_zeros(zeros.shape[:-1])
                )
            )
        ages, means, utilities = (
            [state[name] for state in kept] for name in ("age", "mean_activation", "utility")
        )
        counts = torch.cat([*ages, *(state["due"].unsqueeze(-1) for state in kept)], -1)
        averages = torch.cat([*means, *utilities], -1)
        age, due = counts.split([counts.shape[-1] - len(members), len(members)], -1)
        mean_activation, utility = averages.split([averages.shape[-1] - age.shape[-1], age.shape[-1]], -1)
        group = _Group(members, age, mean_activation, utility, due, counts, averages)
        for part, state in zip(group.parts, kept, strict=True):
            state |= {name: getattr(part, name) for name in ("age", "mean_activation", "utility")}
            state["due"] = part.due[..., 0]
        self._follow_sums(group)
        return group

    def _follow_sums(self, group: "_Group") -> None:
        if self.utility in _OF_INCOMING:
            for link in group.members:
                for producer in link.producers:
                    follow_sums(producer.weight, -1)
        if self.utility in _OF_OUTGOING:
            for route in group.routes:
                if route.plain:
                    follow_sums(route.consumer.weight, -2)

    @torch.no_grad()
    def on_step(self, network: nn.Module, optimizer: Optimizer) -> None:
        """Update utilities and replace the units that are due."""
        entering = self._entered()
        for group in self._groups:
            if entering.keys() >= group.consumers:
                self._step(group, entering, optimizer)
                continue
            group.quiet = 0
            for part in group.parts:
                if entering.keys() >= part.consumers:
                    self._step(part, entering, optimizer)

    def _step(self, group: "_Group", entering: dict[nn.Module, Tensor], optimizer: Optimizer) -> None:
        if group.quiet and group.planned_for == (id(self.replacement_rate), self.maturity):
            assert group.counts is not None
            group.counts.add_(group.growth)
            self._observe(group, entering)
            group.quiet -= 1
        elif self.utility in _OF_INCOMING and not self.as_published:
            # a replacement changes weights that the next layer takes for its incoming ones
            for part in group.parts:
                part.age.add_(1)
                self._observe(part, entering)
                self._replace_due(part, optimizer)
            self._plan(group)
        else:
            group.age.add_(1)
            self._observe(group, entering)
            self._replace_due(group, optimizer)
            self._plan(group)

    # --------------------------------------------------------------------------------------- utilities
    def _observe(self, group: "_Group", entering: dict[nn.Module, Tensor]) -> None:
        """Mean activations and utilities after one more step; ages are those after it."""
        activations = [route.activations(entering[route.consumer]) for route in group.routes]
        means = group.means(activations)
        together = self.utility == "contribution" and group.now is not None and process_count() == 1
        if not together:
            group.mean_activation.lerp_(mean_over_processes(means), 1.0 - self.decay)
        if self.utility == "random":
            return
        if self.utility in _CENTERED:
            centers = group.split(group.mean_activation / group.per_consumer(self._correction(group)))
            activations = [
                samples.to(center.dtype) - center.unsqueeze(-2)
                for samples, center in zip(activations, centers, strict=True)
            ]
        if self.utility == "adaptation":
            utility = 1.0 / self._incoming(group)
        else:
            utility = group.filled("outgoing", _mean_outgoing, group.routes)
            if self.utility != "weight":
                if self.utility == "contribution" and group.rectified:
                    magnitudes = means
                else:
                    magnitudes = group.filled("magnitudes", _mean_magnitude, activations)
                utility = utility.mul_(mean_over_processes(magnitudes))
            utility = group.over_consumers(utility)
            if self.utility == "adaptable_contribution":
                utility = utility / self._incoming(group)
        if together:
            assert group.averages is not None
            assert group.now is not None
            group.averages.lerp_(group.now, 1.0 - self.decay)
        else:
            group.utility.lerp_(utility, 1.0 - self.decay)

    def _incoming(self, group: "_Group") -> Tensor:
        return torch.cat([_mean_incoming(link).to(group.age.dtype) for link in group.members], -1)

    def _correction(self, group: "_Group") -> Tensor:
        """1 − η^age, layer by layer: the last bit of a power depends on where in its tensor it stands."""
        exponent = math.log(self.decay) if self.decay > 0.0 else -math.inf
        parts = [torch.expm1(ages * exponent).neg_() for ages in group.age.split(group.units, -1)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    # ------------------------------------------------------------------------------------- replacements
    def _replace_due(self, group: "_Group", optimizer: Optimizer) -> None:
        """Count, and replace the mature units of lowest utility that are due."""
        eligible = group.age > self.maturity
        group.due += self._increment(group, eligible)
        number = group.due.floor()
        if not number.any():
            return
        group.due -= number
        for index, part in enumerate(group.parts):
            count = number[..., index]
            if count.any():
                mature = part.age > self.maturity
                ranks = self._ranks(part, mature, count)
                self._replace(part, (ranks < count.unsqueeze(-1)) & mature, optimizer)

    def _increment(self, group: "_Group", eligible: Tensor) -> Tensor:
        counts = torch.stack([chosen.sum(-1) for chosen in eligible.split(group.units, -1)], -1).to(group.due)
        rate = self.replacement_rate
        if isinstance(rate, Tensor) and rate.dim() == 1:
            rate = rate.to(group.due.device).unsqueeze(-1)
        return rate * counts

    def _ranks(self, part: "_Group", mature: Tensor, count: Tensor) -> Tensor:
        """The place of each unit in the order of utilities, with those that are not mature last."""
        if self.utility == "random":
            utility = torch.zeros_like(part.utility)
            rows = utility.view(-1, utility.shape[-1])
            for replica, due in enumerate(count.view(-1)):
                if due > 0:
                    rows[replica].uniform_(generator=generator_of(self.generators, replica))
        else:
            utility = part.utility / self._correction(part)
        return utility.masked_fill(~mature, math.inf).argsort(dim=-1, stable=True).argsort(-1)

    def _plan(self, group: "_Group") -> None:
        """For how many steps nothing can be due: ages grow by 1 each, so that it is known beforehand."""
        if group.counts is None:
            return
        group.planned_for = (id(self.replacement_rate), self.maturity)
        next_age = group.age + 1
        eligible = next_age > self.maturity
        increment = self._increment(group, eligible)
        group.growth = torch.cat([torch.ones_like(group.age), increment], -1)
        until_due = ((1.0 - group.due) / increment).min()  # ∞ where nothing grows
        off = (torch.finfo(group.due.dtype).eps * until_due).clamp(
            max=0.5
        )  # by that share, at most, from rounding
        steps_left = (until_due * (1.0 - off)).ceil() - 1.0
        maturing = torch.where(eligible, math.inf, self.maturity - next_age).min()
        group.quiet = int(torch.minimum(steps_left, maturing).clamp(0, 1e9))

    def _replace(self, part: "_Group", mask: Tensor, optimizer: Optimizer) -> None:
        if not self.as_published:
            self._move_contribution(part, mask)
        self._start_over(part.members[0], mask, optimizer)
        for values in (part.age, part.utility):
            values.masked_fill_(mask, 0.0)
        part.mean_activation.masked_fill_(part.per_consumer(mask), 0.0)

    def _move_contribution(self, part: "_Group", mask: Tensor) -> None:
        """Add what the units gave on average to the biases of the layers that took them."""
        connection = part.members[0]
        correction = part.per_consumer(self._correction(part))
        means = part.split(torch.where(part.per_consumer(mask), part.mean_activation / correction, 0.0))
        replicas = mask.view(-1, connection.units).any(-1).nonzero().flatten().tolist()
        for consumer, lost in zip(connection.consumers, means, strict=True):
            if consumer.bias is None or not (consumer.bias.requires_grad and consumer.weight.requires_grad):
                continue  # a frozen bias takes nothing, and frozen outgoing weights lose nothing
            of_columns, weights, biases = (
                tensor if connection.stacked else tensor.unsqueeze(0)
                for tensor in (
                    connection.outgoing(lost, consumer).flatten(int(connection.stacked)),
                    consumer.weight,
                    consumer.bias,
                )
            )
            for replica in replicas:
                columns = of_columns[replica].nonzero().flatten()
                outgoing = weights[replica][:, columns]
                if outgoing.dim() > 2:
                    outgoing = outgoing.sum((-2, -1))
                biases[replica] += torch.mv(outgoing.to(of_columns.dtype), of_columns[replica, columns])


@dataclass
class _Group:
    """The units of several layers one after the other, so that one operation serves all of them.

    Attributes:
        members: the layers' connections.
        age: (..., units).
        mean_activation: (..., units × consumers), those of a layer's first consumer first.
        utility: (..., units).
        due: (..., layers).
        counts: ``age`` and ``due`` in one; None for one layer of a group.
        averages: ``mean_activation`` and ``utility`` in one; None likewise.
        quiet: number of steps in which nothing is due.
        growth: of ``counts`` in each of these.
        planned_for: the settings under which this holds.
    """

    members: list[Connection]
    age: Tensor
    mean_activation: Tensor
    utility: Tensor
    due: Tensor
    counts: Tensor | None = None
    averages: Tensor | None = None
    quiet: int = 0
    growth: Number = 0.0
    planned_for: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        self.units = [link.units for link in self.members]
        self.routes = [_Route(link, consumer) for link in self.members for consumer in link.consumers]
        self.consumers: set[nn.Module] = {route.consumer for route in self.routes}
        self._widths = [route.link.units for route in self.routes]
        self.rectified = all(link.rectified and all(link.rectified) for link in self.members)
        self._branched = len(self.routes) > len(self.members)
        self._buffers: dict[str, tuple[Tensor, tuple[Tensor, ...]]] = {}
        self.now: Tensor | None = None  # what `averages` average, where a unit has one consumer
        if self.averages is not None and not self._branched:
            self.now = torch.empty_like(self.averages)
            for name, half in zip(("means", "outgoing"), self.now.chunk(2, -1), strict=True):
                self._buffers[name] = half, half.split(self._widths, -1)

    @functools.cached_property
    def parts(self) -> "list[_Group]":
        """The layers one by one; their tensors are parts of these."""
        tensors = (
            self.age.split(self.units, -1),
            self.mean_activation.split([link.units * len(link.consumers) for link in self.members], -1),
            self.utility.split(self.units, -1),
            self.due.split(1, -1),
        )
        return [_Group([link], *parts) for link, *parts in zip(self.members, *tensors, strict=True)]

    def filled(self, name: str, function: Callable[[Any, Tensor], None], arguments: Iterable[Any]) -> Tensor:
        """One number for each unit and consumer: what a function makes of one argument for each consumer."""
        buffer, slices = self._buffer(name)
        for argument, out in zip(arguments, slices, strict=True):
            function(argument, out)
        return buffer

    def means(self, activations: list[Tensor]) -> Tensor:
        """The mean of each unit's activations, for each consumer."""
        if all(samples.shape[-2] == 1 for samples in activations):
            buffer, _ = self._buffer("means")
            torch.cat(activations, -1, out=buffer.unsqueeze(-2))
            return buffer
        return self.filled("means", _mean, activations)

    def _buffer(self, name: str) -> tuple[Tensor, tuple[Tensor, ...]]:
        if name not in self._buffers:
            buffer = torch.empty_like(self.mean_activation)
            self._buffers[name] = buffer, buffer.split(self._widths, -1)
        return self._buffers[name]

    def split(self, values: Tensor) -> tuple[Tensor, ...]:
        """Numbers for each unit and consumer by the consumers."""
        parts: tuple[Tensor, ...] = values.split(self._widths, -1)
        return parts

    def per_consumer(self, values: Tensor) -> Tensor:
        """Numbers for each unit, (..., units), once for each consumer."""
        if not self._branched:
            return values
        rows = zip(self.members, values.split(self.units, -1), strict=True)
        return torch.cat([row for link, row in rows for _ in link.consumers], -1)

    def over_consumers(self, values: Tensor) -> Tensor:
        """Numbers for each unit and consumer averaged over the consumers, by their numbers of weights."""
        if not self._branched:
            return values
        rows = iter(self.split(values))
        means = []
        for link in self.members:
            shares = [consumer.weight.numel() for consumer in link.consumers]
            weighted = [share / sum(shares) * next(rows) for share in shares]
            means.append(torch.stack(weighted).sum(0) if len(weighted) > 1 else weighted[0])
        return torch.cat(means, -1)


class _Route:
    """The way of units to one consumer."""

    def __init__(self, link: Connection, consumer: Layer) -> None:
        self.link = link
        self.consumer = consumer
        # a column of the weight for each unit
        self.plain = isinstance(consumer, nn.Linear) and link.units == consumer.in_features
        self.dimensions = 2 + link.stacked
        self._scratch: tuple[Tensor, Tensor, Tensor] | None = None

    def scratch(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Memory for the magnitudes of a small weight, its transpose, and the share of each row in their mean."""
        if self._scratch is None or self._scratch[0].shape != weight.shape:
            memory = weight.new_empty(weight.shape)
            self._scratch = memory, memory.T, weight.new_full((len(weight),), 1.0 / len(weight))
        return self._scratch

    def activations(self, inputs: Tensor) -> Tensor:
        """The consumer's inputs as (..., samples, units)."""
        if self.plain and inputs.dim() == self.dimensions:
            return inputs
        return self.link.activations(inputs, self.consumer)


def _mean(samples: Tensor, out: Tensor) -> None:
    torch.mean(samples if samples.dtype == out.dtype else samples.to(out.dtype), -2, out=out)


def _mean_magnitude(samples: Tensor, out: Tensor) -> None:
    if samples.shape[-2] == 1 and samples.dtype == out.dtype:
        torch.abs(samples.squeeze(-2), out=out)
    else:
        _mean((samples if samples.dtype == out.dtype else samples.to(out.dtype)).abs(), out)


def _mean_outgoing(route: _Route, out: Tensor) -> None:
    """The mean magnitude of the weights out of each unit."""
    weight = route.consumer.weight
    if not route.plain or weight.dtype != out.dtype:
        out.copy_(route.link.mean_outgoing(weight.abs(), route.consumer))
    elif weight.dim() == 2 and weight.device.type == "cpu" and weight.numel() <= _SMALL:
        magnitudes, columns, shares = route.scratch(weight)
        torch.abs(weight, out=magnitudes)
        torch.mv(columns, shares, out=out)
    else:
        torch.div(sums_of_magnitudes(weight, -2), weight.shape[-2], out=out)


def _mean_incoming(link: Connection) -> Tensor:
    """The mean magnitude of the weights into each unit, not 0."""
    weights = [producer.weight.flatten(1 + link.stacked) for producer in link.producers]
    means = [sums_of_magnitudes(weight, -1) / weight.shape[-1] for weight in weights]
    if len(means) > 1:
        sizes = [weight.shape[-2:].numel() for weight in weights]
        means = [torch.stack([size / sum(sizes) * mean for size, mean in zip(sizes, means, strict=True)]).sum(0)]
    return means[0].clamp(min=torch.finfo(means[0].dtype).tiny)
