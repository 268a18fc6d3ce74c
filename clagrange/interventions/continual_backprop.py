"""Continual backprop: generate and test."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from clagrange._checks import Number, check_choice, check_fraction, check_number
from clagrange.distributed import mean_over_processes
from clagrange.interventions.base import Intervention, forget_entries
from clagrange.networks import he_bound
from clagrange.replicas import generator_of
from clagrange.wiring import Connection, connections

UTILITIES = ("contribution", "zero_contribution", "adaptable_contribution")


class ContinualBackprop(Intervention):
    """After each step, replace a small fraction of the mature hidden units that are of least use.

    For every hidden layer with activations h, after each step and for each unit:

        age ← age + 1
        f ← η f + (1 − η) mean h,                         f̂ = f / (1 − η^age)
        u ← η u + (1 − η) utility,                        û = u / (1 − η^age)
        utility = mean|w_out|·mean|h|                     "contribution"
                  mean|w_out|·mean|h − f̂|                 "zero_contribution"
                  mean|w_out|·mean|h − f̂| / mean|w_in|    "adaptable_contribution"

    A counter grows by rate × (units older than ``maturity``); its integer part is taken off, and so many
    mature units, of lowest û, start over: incoming weights ~ U(±gain·√(3/fan_in)), bias 0, outgoing weights 0
    with their mean contribution w_out·f̂ moved into the next bias, age, f, u and the optimizer's state of
    exactly these entries 0 (a Gaussian precision returns to its prior). A step counter that an optimizer
    shares between all entries, as torch's Adam does, stays.

    Args:
        replacement_rate: fraction of the mature units replaced at each step.
        maturity: number of steps for which a new unit is protected.
        utility: which utility.
        decay: η in [0, 1).
        gain: of the initialisation, √2 for ReLU.
        layers: names of the layers in order, each feeding the next; default: read off a sequential network.
        seed: of the random stream.

    Source: Dohare, Hernandez-Garcia, Lan, Rahman, Mahmood, Sutton, "Loss of plasticity in deep continual
    learning", Nature 632 (2024), Methods. Where the published code differs (no transfer of the mean
    contribution, for one), this follows the paper.
    """

    def __init__(
        self,
        replacement_rate: Number = 1e-4,
        maturity: int = 100,
        utility: str = "contribution",
        decay: float = 0.99,
        gain: float = math.sqrt(2.0),
        layers: Sequence[str] | None = None,
        seed: int | Sequence[int] = 0,
    ) -> None:
        super().__init__(seed)
        check_fraction("replacement_rate", replacement_rate)
        check_number("maturity", maturity, low=0)
        check_choice("utility", utility, UTILITIES)
        check_number("decay", decay, low=0.0, high=1.0, open_high=True)
        check_number("gain", gain, low=0.0)
        self.replacement_rate = replacement_rate
        self.maturity = maturity
        self.utility = utility
        self.decay = decay
        self.gain = gain
        self.layers = layers
        self._connections: list[Connection] = []
        self._entering: dict[nn.Module, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_connections": [], "_entering": {}}

    def on_start(self, network: nn.Module, optimizer: Optimizer) -> None:
        """Find the hidden units and watch their activations."""
        super().on_start(network, optimizer)
        self._connections = connections(network, self.layers)
        for connection in self._connections:
            self._handles.append(connection.consumer.register_forward_pre_hook(self._watch))
            weight = connection.producer.weight
            shape = (weight.shape[0], connection.units) if connection.stacked else (connection.units,)
            # half precision could not count beyond 256
            like = weight.new_zeros(shape, dtype=torch.promote_types(weight.dtype, torch.float32))
            unit_state = self.state.setdefault(
                connection.name,
                {
                    "age": like.clone(),
                    "mean_activation": like.clone(),
                    "utility": like.clone(),
                    "due": like.new_zeros(shape[:-1]),
                },
            )
            self.state[connection.name] = {name: value.to(like) for name, value in unit_state.items()}

    def _watch(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if module.training and torch.is_grad_enabled():
            self._entering[module] = args[0].detach()

    @torch.no_grad()
    def on_step(self, network: nn.Module, optimizer: Optimizer) -> None:
        """Update utilities and replace the units that are due."""
        for connection in self._connections:
            entering = self._entering.pop(connection.consumer, None)
            if entering is None:
                continue
            state = self.state[connection.name]
            utility = self._update(connection, state, connection.activations(entering))
            eligible = state["age"] > self.maturity
            state["due"] += self.replacement_rate * eligible.sum(-1).to(state["due"])
            count = state["due"].floor()
            if count.any():
                state["due"] -= count
                ranks = utility.masked_fill(~eligible, math.inf).argsort(dim=-1, stable=True).argsort(-1)
                self._replace(connection, state, (ranks < count.unsqueeze(-1)) & eligible, optimizer)

    def _update(self, connection: Connection, state: dict[str, Tensor], activations: Tensor) -> Tensor:
        state["age"] += 1
        correction = 1.0 - self.decay ** state["age"]
        mean = state["mean_activation"]
        activations = activations.to(mean.dtype)
        mean.lerp_(mean_over_processes(activations.mean(-2)), 1.0 - self.decay)
        if self.utility != "contribution":
            activations = activations - (mean / correction).unsqueeze(-2)
        magnitude = mean_over_processes(activations.abs().mean(-2))
        utility = magnitude * connection.mean_outgoing(connection.consumer.weight.abs())
        if self.utility == "adaptable_contribution":
            incoming = connection.producer.weight.abs().flatten(2 if connection.stacked else 1).mean(-1)
            utility = utility / incoming.clamp(min=torch.finfo(incoming.dtype).tiny)
        state["utility"].lerp_(utility, 1.0 - self.decay)
        return state["utility"] / correction

    def _replace(
        self, connection: Connection, state: dict[str, Tensor], mask: Tensor, optimizer: Optimizer
    ) -> None:
        producer, consumer = connection.producer, connection.consumer
        self._move_contribution(connection, state, mask)
        consumer.weight.masked_fill_(connection.outgoing(mask), 0.0)
        forget_entries(optimizer, consumer.weight, connection.outgoing(mask))
        bound = he_bound(producer, self.gain)
        weights = producer.weight if connection.stacked else producer.weight.unsqueeze(0)
        for replica, chosen in enumerate(mask.view(-1, connection.units)):
            if chosen.any():
                fresh = weights.new_empty((int(chosen.sum()), *weights.shape[2:]))
                fresh.uniform_(-bound, bound, generator=generator_of(self.generators, replica))
                weights[replica, chosen] = fresh
        forget_entries(optimizer, producer.weight, connection.incoming(mask))
        if producer.bias is not None:
            producer.bias.masked_fill_(mask, 0.0)
            forget_entries(optimizer, producer.bias, mask)
        for name in ("age", "mean_activation", "utility"):
            state[name].masked_fill_(mask, 0.0)

    def _move_contribution(self, connection: Connection, state: dict[str, Tensor], mask: Tensor) -> None:
        consumer = connection.consumer
        if consumer.bias is None:
            return
        correction = 1.0 - self.decay ** state["age"]
        lost = torch.where(mask, state["mean_activation"] / correction, 0.0)
        product = consumer.weight * connection.outgoing(lost)
        dims = -1 if isinstance(consumer, nn.Linear) else (-3, -2, -1)
        consumer.bias.add_(product.sum(dims))
