"""Which unit feeds which layer: the chain of layers of a network, and the activations between them."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clagrange._modes import evaluating
from clagrange.replicas import POINTWISE

_PASSING = (*POINTWISE, nn.Flatten, nn.Dropout, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)

Layer = nn.Linear | nn.Conv2d


@dataclass(frozen=True)
class Connection:
    """The hidden units between two layers: rows of ``producer.weight``, columns of ``consumer.weight``."""

    name: str
    producer: Layer
    consumer: Layer

    @property
    def stacked(self) -> bool:
        """Whether the layers have a leading replica dimension."""
        return self.producer.weight.dim() == (3 if isinstance(self.producer, nn.Linear) else 5)

    @property
    def units(self) -> int:
        """Number of hidden units (features of a linear producer, channels of a convolution)."""
        producer = self.producer
        return producer.out_features if isinstance(producer, nn.Linear) else producer.out_channels

    @property
    def copies(self) -> int:
        """Columns of a linear consumer for each unit: the positions of a flattened channel, else 1."""
        return self.consumer.in_features // self.units if isinstance(self.consumer, nn.Linear) else 1

    def activations(self, inputs: Tensor) -> Tensor:
        """The consumer's inputs as (..., samples, units); positions of a channel or sequence count as samples."""
        if isinstance(self.consumer, nn.Linear):
            if self.copies == 1:
                return inputs.flatten(int(self.stacked), -2)
            grouped = inputs.reshape(*inputs.shape[:-1], self.units, self.copies)
            return grouped.transpose(-1, -2).flatten(-3, -2)
        return inputs.movedim(-3, -1).flatten(-4, -2)

    def incoming(self, values: Tensor) -> Tensor:
        """Values per unit, (..., units), shaped to broadcast against ``producer.weight``."""
        return values.view(*values.shape, *[1] * (1 if isinstance(self.producer, nn.Linear) else 3))

    def outgoing(self, values: Tensor) -> Tensor:
        """Values per unit, (..., units), shaped to broadcast against ``consumer.weight``."""
        if isinstance(self.consumer, nn.Linear):
            return values.repeat_interleave(self.copies, -1).unsqueeze(-2)
        return values.view(*values.shape[:-1], 1, values.shape[-1], 1, 1)

    def mean_outgoing(self, values: Tensor) -> Tensor:
        """The mean over each unit's outgoing entries of a tensor of the shape of ``consumer.weight``."""
        if isinstance(self.consumer, nn.Linear):
            return values.mean(-2).reshape(*values.shape[:-2], self.units, self.copies).mean(-1)
        return values.mean((-4, -2, -1))


def connections(network: nn.Module, layers: Sequence[str] | None = None) -> list[Connection]:
    """The hidden layers of a feed-forward network, in order.

    Args:
        network: nested `torch.nn.Sequential` of linear, convolution, pointwise, pooling, dropout and flatten
            layers; or any network, when ``layers`` is given.
        layers: names of the layers in order, each feeding the next. Default: read off the sequence.

    Raises:
        ValueError: where the chain cannot be told; the message names the layer and the remedy.
    """
    if layers is None:
        chain = list(_sequence(network, ""))
    else:
        known = {name for name, module in network.named_modules() if isinstance(module, Layer)}
        for name in layers:
            if name not in known:
                raise ValueError(
                    f"layers: expected names of linear or convolution layers "
                    f"({', '.join(sorted(known))}); got {name!r}"
                )
        chain = [(name, network.get_submodule(name)) for name in layers]
    found = []
    for (name, producer), (consumer_name, consumer) in itertools.pairwise(chain):
        assert isinstance(producer, Layer)
        assert isinstance(consumer, Layer)
        connection = Connection(name, producer, consumer)
        width = consumer.in_features if isinstance(consumer, nn.Linear) else consumer.in_channels
        if width % connection.units or (isinstance(consumer, nn.Conv2d) and width != connection.units):
            raise ValueError(
                f"layers: {name!r} has {connection.units} units, but {consumer_name!r} takes {width} inputs; "
                f"give the names of layers that feed each other"
            )
        if isinstance(consumer, nn.Conv2d) and consumer.groups > 1:
            raise ValueError(f"layers: {consumer_name!r} is a grouped convolution, which is not supported")
        found.append(connection)
    if not found:
        raise ValueError("network: expected at least two linear or convolution layers, one feeding the other")
    return found


def _sequence(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """The linear and convolution layers of nested sequences, in order."""
    if isinstance(module, Layer):
        yield prefix, module
    elif isinstance(module, nn.Sequential):
        for name, child in module.named_children():
            yield from _sequence(child, f"{prefix}.{name}" if prefix else name)
    elif not isinstance(module, _PASSING):
        raise ValueError(
            f"network: cannot tell which layer feeds which past {prefix or '(root)'!r} of type "
            f"{type(module).__name__}; give the chain by hand, layers=['fc1', 'fc2', ...]"
        )


@torch.no_grad()
def hidden_features(network: nn.Module, inputs: Tensor, *, stacked: bool = False) -> list[Tensor]:
    """What enters every linear and convolution layer but the first to run, in evaluation mode.

    Returns:
        One tensor for each such layer in order of execution, (samples, features), or (R, samples, features);
        the positions of a convolution count as samples.
    """
    seen: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        entering = args[0]
        if isinstance(module, nn.Conv2d):
            entering = entering.movedim(-3, -1)
        seen.append(entering.flatten(int(stacked), -2))

    handles = [
        module.register_forward_pre_hook(note) for module in network.modules() if isinstance(module, Layer)
    ]
    try:
        with evaluating(network):
            network(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return seen[1:]
