"""What methods that let hidden units start over share: finding them, watching them, and the fresh start."""

import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from clagrange._checks import check_number
from clagrange._magnitudes import columns_becoming_0, sums_of_magnitudes
from clagrange.distributed import process_count, total_over_processes
from clagrange.interventions.base import Intervention, fill_entries, forget_entries
from clagrange.networks import he_bound
from clagrange.replicas import generator_of
from clagrange.wiring import Connection, Layer, LayerMap, UntraceableError, connections

G = TypeVar("G")


class UnitReset(Intervention):
    """An intervention on the hidden units of a network.

    Attributes:
        watches: whether it needs to know what the units do in training.

    Args:
        layers: names of layers, as `clagrange.wiring.connections` takes them; default: found by tracing.
        gain: of the initialisation, √2 for ReLU.
        seed: of the random stream.
    """

    gathers = ("_entering",)
    watches = True

    def __init__(
        self, layers: LayerMap | None = None, gain: float = math.sqrt(2.0), seed: int | Sequence[int] = 0
    ) -> None:
        super().__init__(seed)
        check_number("gain", gain, low=0.0)
        self.layers = layers
        self.gain = gain
        self._connections: list[Connection] = []
        self._entering: dict[nn.Module, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_connections": [], "_entering": {}}

    def on_start(self, network: nn.Module, optimizer: Optimizer) -> None:
        """Find the hidden units and watch their activations."""
        super().on_start(network, optimizer)
        self._entering, self._connections = {}, []
        if not self.watches:
            self._handles.append(network.register_forward_pre_hook(self._look))
        try:
            self._wire(connections(network, self.layers))
        except UntraceableError:
            self._handles.append(network.register_forward_pre_hook(self._wire_late))

    def _wire_late(self, network: nn.Module, args: tuple[Any, ...]) -> None:
        """Watch which way the first training batch takes, where `torch.fx` cannot tell."""
        if network.training and torch.is_grad_enabled() and not self._connections:
            self._wire(connections(network, inputs=args))

    def _wire(self, found: list[Connection]) -> None:
        self._connections = found
        self._prepare()
        if self.watches:
            for connection in self._connections:
                for consumer in connection.consumers:
                    self._handles.append(consumer.register_forward_pre_hook(self._watch))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        super().load_state_dict(state)
        if self._connections:
            self._prepare()

    @abstractmethod
    def _prepare(self) -> None:
        """Make or take up the state of the units, which are now known."""

    def _watch(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        # a batch without examples is none
        if module.training and torch.is_grad_enabled() and args[0].numel():
            self._entering[module] = args[0]  # not detached, which costs time: only looked at without gradients

    def _look(self, network: nn.Module, args: tuple[Any, ...]) -> None:
        """Keep what entered a network whose gradients are watched, the layers of which need not be called."""
        if not (network.training and torch.is_grad_enabled() and args and isinstance(args[0], Tensor)):
            return
        if args[0].numel() or network not in self._entering:
            self._entering[network] = args[0]

    def _saw_nothing(self, network: nn.Module) -> bool:
        """Whether the gradients are 0 because there were no examples; in several processes others had some."""
        entered = self._entering.pop(network, None)
        return process_count() == 1 and entered is not None and not entered.numel()

    def _entered(self) -> dict[nn.Module, Tensor]:
        """What entered the consumers in the training step, once; of those that all processes have called."""
        entering, self._entering = self._entering, {}
        if process_count() > 1 and self._connections:
            consumers = list(dict.fromkeys(taker for link in self._connections for taker in link.consumers))
            called = [int(consumer in entering) for consumer in consumers]
            totals = total_over_processes(called, self._connections[0].producer.weight.device)
            everywhere = zip(consumers, totals, strict=True)
            entering = {taker: entering[taker] for taker, total in everywhere if total == process_count()}
        return entering

    def _active(self) -> list[tuple[Connection, list[Tensor]]]:
        """The connections that took part in the training step, with what entered each consumer; once."""
        entering = self._entered()
        return [
            (connection, [entering[consumer] for consumer in connection.consumers])
            for connection in self._connections
            if all(consumer in entering for consumer in connection.consumers)
        ]

    def _bind(self, connection: Connection, **blank: Tensor) -> dict[str, Tensor]:
        """The state of a connection, on its device; ``blank`` where there is none of that shape."""
        kept = self.state.setdefault(connection.name, {})
        for name, value in blank.items():
            fits = name in kept and kept[name].shape == value.shape
            kept[name] = kept[name].to(value) if fits else value.clone()
        return kept  # type: ignore[no-any-return]

    def _start_over(self, connection: Connection, mask: Tensor, optimizer: Optimizer) -> None:
        """A fresh start of units: see `start_over`."""
        start_over(connection, mask, optimizer, self.generators, self.gain)


class JoinedUnitReset(UnitReset, Generic[G]):
    """A `UnitReset` in which layers of one kind share tensors, of which the state of each is a part."""

    def __init__(
        self, layers: LayerMap | None = None, gain: float = math.sqrt(2.0), seed: int | Sequence[int] = 0
    ) -> None:
        super().__init__(layers, gain, seed)
        self._groups: list[G] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_groups": []}

    def _prepare(self) -> None:
        self._groups = [self._joined(members) for members in of_one_kind(self._connections)]

    @abstractmethod
    def _joined(self, members: list[Connection]) -> G:
        """What layers of one kind share; the state of each becomes a part of it."""


def zeros_for(connection: Connection) -> Tensor:
    """A 0 for each unit, (units,) or (R, units), in float32 at least: half precision counts to 256 only."""
    weight = connection.producer.weight
    shape = (weight.shape[0], connection.units) if connection.stacked else (connection.units,)
    return weight.new_zeros(shape, dtype=torch.promote_types(weight.dtype, torch.float32)).detach()


def of_one_kind(found: Iterable[Connection]) -> list[list[Connection]]:
    """The connections in groups whose units can share tensors: of one type, device and number of replicas."""
    kinds: dict[Any, list[Connection]] = {}
    for connection in found:
        zeros = zeros_for(connection)
        kinds.setdefault((zeros.dtype, zeros.device, zeros.shape[:-1]), []).append(connection)
    return list(kinds.values())


@torch.no_grad()
def start_over(connection: Connection, mask: Tensor, optimizer: Optimizer, generators: Any, gain: float) -> None:
    """Let hidden units start over.

    Outgoing weights 0, incoming weights ~ U(±gain·√(3/fan_in)), biases 0, entries of normalisation layers as new;
    optimizer state and Gaussian precisions of exactly these entries are forgotten. Frozen parameters stay, and
    running statistics behind frozen incoming weights.

    Args:
        connection: of the units.
        mask: (units,) or (R, units), true where a unit starts over.
        optimizer: the network's.
        generators: random streams, one for each replica.
        gain: of the initialisation.
    """
    for consumer in connection.consumers:
        if consumer.weight.requires_grad:
            outgoing = connection.outgoing(mask, consumer)
            with columns_becoming_0(consumer.weight, outgoing):
                fill_entries(consumer.weight, outgoing, 0.0)
            forget_entries(optimizer, consumer.weight, outgoing)
    for producer in connection.producers:
        if producer.weight.requires_grad:
            for replica, chosen, weights in rows(connection, producer, mask):
                fresh = weights.new_empty((int(chosen.sum()), *weights.shape[1:]))
                weights[chosen] = draw(fresh, producer, gain, generator_of(generators, replica))
            forget_entries(optimizer, producer.weight, connection.incoming(mask, producer))
        if producer.bias is not None and producer.bias.requires_grad:
            producer.bias.masked_fill_(mask, 0.0)
            forget_entries(optimizer, producer.bias, mask)
    redrawn = any(producer.weight.requires_grad for producer in connection.producers)
    for norm in connection.norms:
        for name, tensor in (*norm.named_parameters(recurse=False), *norm.named_buffers(recurse=False)):
            changes = tensor.requires_grad if isinstance(tensor, nn.Parameter) else redrawn
            if changes and tensor.dim() > int(connection.stacked):  # not the number of batches
                entries = connection.entries(mask, tensor)
                tensor.masked_fill_(entries, 1.0 if name in ("weight", "running_var") else 0.0)
                if isinstance(tensor, nn.Parameter):
                    forget_entries(optimizer, tensor, entries)


def rows(connection: Connection, producer: Layer, mask: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Replicas with chosen units: number, which units, and the weights of the replica's layer."""
    weights = producer.weight if connection.stacked else producer.weight.unsqueeze(0)
    for replica, chosen in enumerate(mask.view(-1, connection.units)):
        if chosen.any():
            yield replica, chosen, weights[replica]


def draw(tensor: Tensor, layer: Layer, gain: float, generator: torch.Generator | None) -> Tensor:
    """Fresh incoming weights ~ U(±gain·√(3/fan_in)) of a layer, in place."""
    bound = he_bound(layer, gain)
    return tensor.uniform_(-bound, bound, generator=generator)


def incoming_gradient(connection: Connection) -> Tensor | None:
    """The mean |∂L/∂w_in| over the incoming weights of each unit, None where there are no gradients."""
    gradients = [producer.weight.grad for producer in connection.producers]
    present = [gradient.flatten(1 + connection.stacked) for gradient in gradients if gradient is not None]
    if not present:
        return None
    dtype = torch.promote_types(present[0].dtype, torch.float32)
    total = torch.stack([sums_of_magnitudes(gradient, -1).to(dtype) for gradient in present]).sum(0)
    return total / sum(gradient.shape[-1] for gradient in present)
