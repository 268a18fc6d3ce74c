"""Which unit feeds which layer, found by tracing a network or given by hand; the activations between layers."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from clagrange._modes import evaluating
from clagrange.gaussian import GaussianLayer
from clagrange.replicas import POINTWISE, STACKED_FORMS

Layer = nn.Linear | nn.Conv2d

LayerMap = Sequence[str] | Mapping[str, str | Sequence[str]]
"""Names of layers that feed each other in turn; or of each layer those that it feeds."""

_NORMS: tuple[type[nn.Module], ...] = (
    nn.LayerNorm,
    nn.GroupNorm,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.RMSNorm,
)
_POOLS: tuple[type[nn.Module], ...] = (
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.LPPool2d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
    nn.Upsample,
    nn.ZeroPad2d,
)
_PASSING: tuple[type[nn.Module], ...] = (
    *POINTWISE,
    *_POOLS,
    nn.modules.dropout._DropoutNd,
    nn.CELU,
    nn.SELU,
    nn.Mish,
    nn.Hardtanh,
    nn.Hardswish,
    nn.Hardsigmoid,
    nn.LogSigmoid,
    nn.Softsign,
    nn.Tanhshrink,
    nn.Threshold,
    nn.LocalResponseNorm,
)
_KEEPING = (
    nn.Identity,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
    nn.Dropout,
    nn.Dropout2d,
)
_PASSING_FUNCTIONS = frozenset(  # by name, without the underscore of what works in place
    """
    relu relu6 leaky_relu elu selu celu gelu silu mish tanh sigmoid softplus softsign logsigmoid
    hardtanh hardswish hardsigmoid dropout dropout1d dropout2d alpha_dropout feature_alpha_dropout neg
    abs square pow sqrt exp clamp clamp_min clamp_max contiguous clone detach to float double half
    bfloat16 type_as cos sin max_pool2d avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d lp_pool2d
    interpolate boolean_dispatch
    """.split()  # noqa: SIM905
)
_JOINING_FUNCTIONS = frozenset(
    "add sub mul div truediv iadd isub imul itruediv radd rsub rmul rtruediv maximum minimum".split()  # noqa: SIM905
)
_FLATTENING_FUNCTIONS = frozenset({"flatten", "view", "reshape"})
_REDUCING_FUNCTIONS = frozenset({"mean", "sum", "amax"})


@dataclass(frozen=True)
class Connection:
    """Hidden units between layers: rows of the producers' weights, columns of the consumers'.

    A unit usually has one producer and one consumer. Where the outputs of layers are added, as in a residual
    block, unit i of the sum is unit i of all of them; where layers share their inputs, a unit has several
    consumers.

    Attributes:
        name: of the first producer.
        producers: layers whose outputs, added, are the units.
        consumers: layers that take the units as inputs.
        norms: normalisation layers on the way, whose entries belong to the units.
        tiles: how often a consumer has all units one after the other, in the order of the consumers; 1 but for
            units that were concatenated with themselves.
        rectified: whether what a consumer takes is known not to be negative, in the order of the consumers.
    """

    name: str
    producers: tuple[Layer, ...]
    consumers: tuple[Layer, ...]
    norms: tuple[nn.Module, ...] = ()
    tiles: tuple[int, ...] = ()
    rectified: tuple[bool, ...] = ()

    @property
    def producer(self) -> Layer:
        """The first, usually the only one."""
        return self.producers[0]

    @property
    def consumer(self) -> Layer:
        """The first, usually the only one."""
        return self.consumers[0]

    @property
    def stacked(self) -> bool:
        """Whether the layers have a leading replica dimension."""
        return self.producer.weight.dim() == (3 if isinstance(self.producer, nn.Linear) else 5)

    @property
    def units(self) -> int:
        """Number of hidden units (features of a linear producer, channels of a convolution)."""
        return outputs_of(self.producer)

    @property
    def copies(self) -> int:
        """Adjacent columns of the first consumer for each unit: the positions of a flattened channel, else 1."""
        return self._layout(self.consumer)[1]

    def activations(self, inputs: Tensor, consumer: Layer | None = None) -> Tensor:
        """A consumer's inputs as (..., samples, units); positions of a channel or sequence count as samples."""
        consumer = consumer or self.consumer
        tiles, copies = self._layout(consumer)
        if isinstance(consumer, nn.Conv2d):
            inputs = inputs.movedim(-3, -1)
            return self._untiled(inputs, tiles, copies).flatten(-4 - (tiles > 1), -2)
        if tiles == copies == 1:
            return inputs.flatten(int(self.stacked), -2)
        return self._untiled(inputs, tiles, copies).flatten(int(self.stacked), -2)

    def _untiled(self, inputs: Tensor, tiles: int, copies: int) -> Tensor:
        """(..., tiles·units·copies) as (..., tiles·copies, units), without the extra dimension where it is 1."""
        if tiles == copies == 1:
            return inputs
        grouped = inputs.reshape(*inputs.shape[:-1], tiles, self.units, copies)
        if tiles == 1:
            return grouped.squeeze(-3).transpose(-1, -2)
        return grouped.transpose(-1, -2).flatten(-3, -2)

    def incoming(self, values: Tensor, producer: Layer | None = None) -> Tensor:
        """Values per unit, (..., units), shaped to broadcast against a producer's weight."""
        producer = producer or self.producer
        return values.view(*values.shape, *[1] * (1 if isinstance(producer, nn.Linear) else 3))

    def outgoing(self, values: Tensor, consumer: Layer | None = None) -> Tensor:
        """Values per unit, (..., units), shaped to broadcast against a consumer's weight."""
        consumer = consumer or self.consumer
        tiles, copies = self._layout(consumer)
        if copies > 1:
            values = values.repeat_interleave(copies, -1)
        if tiles > 1:
            values = values.repeat(*[1] * (values.dim() - 1), tiles)
        if isinstance(consumer, nn.Linear):
            return values.unsqueeze(-2)
        return values.view(*values.shape[:-1], 1, values.shape[-1], 1, 1)

    def mean_outgoing(self, values: Tensor, consumer: Layer | None = None) -> Tensor:
        """The mean over each unit's outgoing entries of a tensor of the shape of a consumer's weight."""
        consumer = consumer or self.consumer
        means = values.mean(-2) if isinstance(consumer, nn.Linear) else values.mean((-4, -2, -1))
        return self.mean_over_copies(means, consumer)

    def mean_over_copies(self, values: Tensor, consumer: Layer | None = None) -> Tensor:
        """The mean over each unit's columns of values for every column of a consumer, (..., columns)."""
        tiles, copies = self._layout(consumer or self.consumer)
        if copies > 1:
            values = values.reshape(*values.shape[:-1], tiles * self.units, copies).mean(-1)
        if tiles > 1:
            values = values.reshape(*values.shape[:-1], tiles, self.units).mean(-2)
        return values

    def entries(self, values: Tensor, tensor: Tensor) -> Tensor:
        """Values per unit, (..., units), shaped to broadcast against a tensor of one of the norms."""
        own = tensor.dim() - self.stacked
        if own == 1:
            return values.repeat_interleave(tensor.shape[-1] // self.units, -1)
        return values.view(*values.shape, *[1] * (own - 1))

    def _layout(self, consumer: Layer) -> tuple[int, int]:
        """How often a consumer has all units, and how many adjacent columns each time for each of them."""
        tiles = 1
        if self.tiles:
            tiles = next(n for layer, n in zip(self.consumers, self.tiles, strict=True) if layer is consumer)
        return tiles, inputs_of(consumer) // (self.units * tiles)


def outputs_of(layer: Layer) -> int:
    """Features or channels that a layer makes."""
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def inputs_of(layer: Layer) -> int:
    """Features or channels that a layer takes."""
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels


class UntraceableError(ValueError):
    """`torch.fx` cannot follow a network, because its way depends on numbers."""


def connections(
    network: nn.Module, layers: LayerMap | None = None, inputs: Sequence[Any] | None = None
) -> list[Connection]:
    """The hidden units of a network, in the order in which they are computed.

    Found by `torch.fx`: through activations, pooling, dropout, flattening, normalisation layers, residual sums
    and branches. Units that reach the network's output, or to which something is added that no linear or
    convolution layer makes (the inputs themselves, an embedding), cannot start over and are left out.

    Args:
        network: of linear and convolution layers and what stands between them; or any network, when ``layers``
            is given.
        layers: names of the layers in order, each feeding the next; or a mapping from the name of each layer to
            those that it feeds. Normalisation layers between them are then not known, and left as they are.
        inputs: arguments of the network. Where `torch.fx` cannot follow it, its way is watched on these, in
            evaluation mode.

    Raises:
        UntraceableError: if `torch.fx` cannot follow the network and there are no inputs; a ValueError.
        ValueError: where it cannot be told which layer feeds which; the message names the place and the remedy.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2))
        >>> [(link.name, link.units, link.copies, len(link.norms)) for link in connections(net)]
        [('0', 8, 4, 1)]
    """
    if layers is not None:
        found = list(_by_hand(network, layers))
    else:
        try:
            wiring = _traced(network)
        except UntraceableError:
            if inputs is None:
                raise
            wiring = _watched(network, inputs)
        found = wiring.connections()
    if not found:
        raise ValueError(
            "network: expected at least two linear or convolution layers, one feeding the other through units "
            "that nothing else makes or sees"
        )
    _check_own_weights(network, found)
    return found


def _check_own_weights(network: nn.Module, found: list[Connection]) -> None:
    """Raise where a fresh start of a unit would be lost, its weight computed anew from other parameters."""
    concerned = {layer for link in found for layer in (*link.producers, *link.consumers)}
    for name, layer in network.named_modules():
        if layer in concerned and "weight" not in layer._parameters:
            raise ValueError(
                f"network: the weight of {name!r} is computed from other parameters, which a fresh start of "
                f"units cannot set; remove that first, for instance by "
                f"torch.nn.utils.parametrize.remove_parametrizations"
            )


def output_layers(network: nn.Module) -> list[tuple[str, Layer]]:
    """Names and modules of the layers that make the network's outputs.

    Raises:
        ValueError: if the network cannot be traced.

    Example:
        >>> output_layers(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
        [('2', Linear(in_features=4, out_features=2, bias=True))]
    """
    return _traced(network).heads()


# ------------------------------------------------------------------------------------------------- by hand
def named_layers(network: nn.Module, names: Sequence[str]) -> list[Layer]:
    """Linear and convolution layers by name.

    Raises:
        ValueError: if one is not known.
    """
    known = {name: module for name, module in network.named_modules() if isinstance(module, Layer)}
    for name in names:
        if name not in known:
            raise ValueError(
                f"layers: expected names of linear or convolution layers "
                f"({', '.join(sorted(known))}); got {name!r}"
            )
    return [known[name] for name in names]


def _by_hand(network: nn.Module, layers: LayerMap) -> Iterator[Connection]:
    if isinstance(layers, Mapping):
        pairs = [(name, [fed] if isinstance(fed, str) else list(fed)) for name, fed in layers.items()]
    else:
        named_layers(network, layers)
        pairs = [(name, [following]) for name, following in itertools.pairwise(layers)]
    for name, fed in pairs:
        producer, *consumers = named_layers(network, [name, *fed])
        for consumer_name, consumer in zip(fed, consumers, strict=True):
            _check_fits(name, producer, consumer_name, consumer)
        yield Connection(name, (producer,), tuple(consumers))


def _check_fits(name: str, producer: Layer, consumer_name: str, consumer: Layer, tiles: int = 1) -> None:
    units, width = outputs_of(producer) * tiles, inputs_of(consumer)
    if width % units or (isinstance(consumer, nn.Conv2d) and width != units):
        raise ValueError(
            f"layers: {name!r} has {units} units, but {consumer_name!r} takes {width} inputs; "
            f"give the names of layers that feed each other"
        )
    if isinstance(consumer, nn.Conv2d) and consumer.groups > 1:
        raise ValueError(f"layers: {consumer_name!r} is a grouped convolution, which is not supported")


# ------------------------------------------------------------------------------------------------- tracing
@dataclass
class _Units:
    """Units of one index: what makes, normalises and reads them."""

    producers: list[tuple[str, Layer]] = field(default_factory=list)
    readers: "list[tuple[str, Layer, _Signal]]" = field(default_factory=list)
    norms: list[nn.Module] = field(default_factory=list)
    leads_to: list[tuple[str, "_Units"]] = field(default_factory=list)  # by operations that mix the units
    foreign: bool = False  # something else than layers makes them
    seen: bool = False  # they are among the outputs
    reads: bool = False  # a module with parameters of its own, of unknown kind, made these of others
    merged: "_Units | None" = None


@dataclass(frozen=True)
class _Signal:
    """A tensor whose columns are units.

    Attributes:
        units: the units.
        channels: whether they are the channels of images, not the last dimension.
        flat: whether positions of channels were made columns.
        tiles: how often all units stand one after the other.
        rectified: whether no number is negative.
    """

    units: _Units
    channels: bool = False
    flat: bool = False
    tiles: int = 1
    rectified: bool = False


_KNOWN: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.Conv2d,
    nn.Flatten,
    GaussianLayer,
    *_NORMS,
    *_PASSING,
    *STACKED_FORMS,
)


class _Tracer(fx.Tracer):
    """Follows a network down to the layers that are known, and remembers where it is."""

    def __init__(self) -> None:
        super().__init__()
        self.place = ""

    def is_leaf_module(self, module: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(module, _KNOWN) or super().is_leaf_module(module, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        before, self.place = self.place, self.path_of_module(m)
        result = super().call_module(m, forward, args, kwargs)
        self.place = before
        return result


def _traced(network: nn.Module) -> "_Wiring":
    tracer = _Tracer()
    wrapped = network
    if isinstance(network, (Layer, GaussianLayer)):  # fx looks into its root
        wrapped = nn.Sequential(network)
    try:
        graph = tracer.trace(wrapped)
    except Exception as error:  # whatever the network's own code raises when it gets no numbers
        place = tracer.place
        kind = type(wrapped.get_submodule(place)).__name__
        raise UntraceableError(
            f"network: cannot tell which layer feeds which in {place or '(root)'!r} of type {kind}, which "
            f"torch.fx does not trace ({error}); {_REMEDY}"
        ) from error
    wiring = _Wiring(wrapped)
    wiring.follow(graph)
    return wiring


class _Watcher(TorchFunctionMode):
    """Follows the tensors of a run through the modules that are known and through the functions between them."""

    def __init__(self, wiring: "_Wiring") -> None:
        super().__init__()
        self.wiring = wiring
        self.depth = 0  # of known modules
        self.signals: dict[int, tuple[Tensor, _Signal]] = {}  # a tensor that is kept keeps its number

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self.depth == 0:
            name = str(getattr(func, "__name__", "")).strip("_")
            call = SimpleNamespace(name=name, args=args, kwargs=kwargs)
            inputs = [signal for signal in self.of((args, kwargs)) if signal is not None]
            if inputs and any(True for _ in _tensors(result)):
                self.tag(result, self.wiring.function(name, call, inputs))
        return result

    def of(self, values: Any) -> list[_Signal | None]:
        """The signals of the tensors among some values."""
        entries = (self.signals.get(id(tensor)) for tensor in _tensors(values))
        return [None if entry is None else entry[1] for entry in entries]

    def tag(self, values: Any, signal: _Signal | None) -> None:
        """Note what the tensors among some values are."""
        for tensor in _tensors(values):
            if signal is not None:
                self.signals[id(tensor)] = (tensor, signal)

    def enter(self, module: nn.Module, args: Any) -> None:
        """Before a known module."""
        self.depth += 1

    def leave(self, name: str, args: Any, result: Any) -> None:
        """After a known module."""
        self.depth -= 1
        if self.depth == 0:
            self.tag(result, self.wiring.module(name, self.of(args)))


def _watched(network: nn.Module, inputs: Sequence[Any]) -> "_Wiring":
    wiring = _Wiring(network)
    watcher = _Watcher(wiring)
    tracer = _Tracer()
    handles = []
    for name, module in network.named_modules():
        if tracer.is_leaf_module(module, name):
            handles.append(module.register_forward_pre_hook(watcher.enter))
            handles.append(
                module.register_forward_hook(lambda _, args, result, name=name: watcher.leave(name, args, result))
            )
    try:
        with torch.no_grad(), evaluating(network), watcher:
            for tensor in _tensors(inputs):
                watcher.tag(tensor, wiring.foreign())
            wiring.output(watcher.of(network(*inputs)))
    finally:
        for handle in handles:
            handle.remove()
    return wiring


def _tensors(values: Any) -> Iterator[Tensor]:
    """The tensors among nested values."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, Mapping):
        yield from _tensors(list(values.values()))
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _tensors(value)


_REMEDY = "give the chain by hand, layers=['fc1', 'fc2', ...], or layers={'fc1': ['fc2', 'fc3'], ...}"


class _Wiring:
    """What a traced graph says about units."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.modules = dict(network.named_modules())
        self.all: list[_Units] = []
        self.used: dict[nn.Module, None] = {}  # in the order of execution

    def follow(self, graph: fx.Graph) -> None:
        """Go through the graph in the order of execution."""
        signals: dict[fx.Node, _Signal | None] = {}
        for node in graph.nodes:
            entering = [signals[argument] for argument in node.all_input_nodes]
            if node.op == "placeholder":
                signals[node] = self.foreign()
            elif node.op == "get_attr":
                signals[node] = None
            elif node.op == "output":
                self.output(entering)
            elif node.op == "call_module":
                signals[node] = self.module(str(node.target), entering)
            else:
                name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
                signals[node] = self.function(str(name), node, [s for s in entering if s is not None])

    def connections(self) -> list[Connection]:
        """The units that are made by layers, read by layers, and neither made nor seen by anything else."""
        found = []
        for units in self._joint():
            if not units.producers or units.foreign or units.seen:
                continue
            mixed = [name for name, result in units.leads_to if _is_read(result)]
            if mixed:
                raise ValueError(
                    f"network: cannot tell which layer feeds which past {mixed[0]}, which takes the units of "
                    f"{units.producers[0][0]!r}; {_REMEDY}"
                )
            if _goes_out(units) or not units.readers:
                continue
            name, producer = units.producers[0]
            for reader, layer, signal in units.readers:
                _check_fits(name, producer, reader, layer, signal.tiles)
            for norm in units.norms:
                self._check_norm(norm, name, producer)
            found.append(
                Connection(
                    name,
                    tuple(layer for _, layer in units.producers),
                    tuple(layer for _, layer, _ in units.readers),
                    tuple(units.norms),
                    tuple(signal.tiles for *_, signal in units.readers),
                    tuple(signal.rectified for *_, signal in units.readers),
                )
            )
        return found

    def heads(self) -> list[tuple[str, Layer]]:
        """The layers whose units reach the output."""
        return [pair for units in self._joint() if _goes_out(units) for pair in units.producers]

    def _joint(self) -> list[_Units]:
        """The units that are not merged into others, and the producers of each, in the order of execution."""
        position = {module: number for number, module in enumerate(self.used)}
        joint = [units for units in self.all if units.merged is None]
        for units in joint:
            units.producers.sort(key=lambda pair: position[pair[1]])
            units.readers.sort(key=lambda reader: position[reader[1]])
        return sorted(joint, key=lambda units: position[units.producers[0][1]] if units.producers else -1)

    def _check_norm(self, norm: nn.Module, name: str, producer: Layer) -> None:
        units = outputs_of(producer)
        replicated = producer.weight.dim() in (3, 5)
        for tensor in (*norm.parameters(recurse=False), *norm.buffers(recurse=False)):
            shape = tensor.shape[int(replicated) :]
            if shape and shape[0] != units and (len(shape) > 1 or shape[0] % units):
                place = next(place for place, module in self.modules.items() if module is norm)
                raise ValueError(
                    f"network: cannot tell which of the {tuple(shape)} entries of {place!r} belong to the "
                    f"{units} units of {name!r}; {_REMEDY}"
                )

    def foreign(self) -> _Signal:
        """A tensor that no layer of the network makes."""
        return _Signal(self._new(foreign=True))

    def output(self, signals: list[_Signal | None]) -> None:
        """What goes out."""
        for signal in signals:
            if signal is not None:
                _root(signal.units).seen = True

    def module(self, name: str, entering: list[_Signal | None]) -> _Signal | None:
        """What a known module makes of its inputs."""
        module = self.modules[name]
        described = f"{name!r} of type {type(module).__name__}"
        inputs = [signal for signal in entering if signal is not None]
        if isinstance(module, Layer) and len(inputs) == 1:
            if module in self.used:
                raise ValueError(f"network: layer {name!r} is used more than once; {_REMEDY}")
            self.used[module] = None
            self._read(name, module, inputs[0])
            made = self._new()
            made.producers.append((name, module))
            return _Signal(made, channels=isinstance(module, nn.Conv2d))
        if len(inputs) == 1:
            if isinstance(module, _NORMS):
                if inputs[0].tiles > 1:
                    return self._mix(described, inputs, reads=True)
                _root(inputs[0].units).norms.append(module)
                return replace(inputs[0], rectified=False)
            if isinstance(module, _PASSING):
                kept = inputs[0].rectified and isinstance(module, _KEEPING)
                return replace(inputs[0], rectified=kept or isinstance(module, (nn.ReLU, nn.ReLU6)))
            if isinstance(module, nn.Flatten):
                whole = module.start_dim == 1 and module.end_dim == -1
                return self._flattened(inputs[0], whole) or self._mix(described, inputs)
        return self._mix(described, inputs, reads=any(True for _ in module.parameters()))

    def function(self, name: str, node: Any, inputs: list[_Signal]) -> _Signal | None:
        """What a function makes of signals, None for numbers; ``node`` has all its arguments."""
        if not inputs or name in ("size", "dim", "numel") or (name == "getattr" and node.args[1] != "T"):
            return None  # numbers
        name = name.removesuffix("_") if name.endswith("_") and not name.startswith("_") else name
        first = inputs[0]
        described = f"{name!r} ({node.name})"
        if name in _PASSING_FUNCTIONS and len(inputs) == 1:
            return replace(first, rectified=name in ("relu", "relu6"))
        if name in _JOINING_FUNCTIONS:
            return self._joined(inputs) or self._mix(described, inputs)
        if name in _FLATTENING_FUNCTIONS:
            sizes = node.args[1:]
            whole = sizes == (1,) if name == "flatten" else len(sizes) == 2 or _is_pair(sizes)
            return self._flattened(first, whole) or self._mix(described, inputs)
        if name in _REDUCING_FUNCTIONS and first.channels and not first.flat:
            dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
            if isinstance(dims, (tuple, list)) and {int(d) % 4 for d in dims if isinstance(d, int)} == {2, 3}:
                keep = bool(node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False))
                return replace(first, channels=keep, rectified=False)
        if name in ("cat", "concat", "concatenate"):
            dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis", 0))
            return self._tiled(node, inputs, dim) or self._mix(described, inputs)
        return self._mix(described, inputs)

    def _read(self, name: str, layer: Layer, signal: _Signal) -> None:
        units = _root(signal.units)
        units.readers.append((name, layer, signal))
        if (
            units.producers
            and not signal.flat
            and inputs_of(layer) != signal.tiles * outputs_of(units.producers[0][1])
        ):
            self._mix(f"the inputs of {name!r}, which have another length,", [signal], reads=True)

    def _flattened(self, signal: _Signal, whole: bool) -> _Signal | None:
        if not whole or (signal.channels and signal.tiles > 1):
            return None
        return replace(signal, channels=False, flat=signal.channels or signal.flat)

    def _joined(self, inputs: list[_Signal]) -> _Signal | None:
        """A sum: units of the same number are one."""
        first = inputs[0]
        for other in inputs[1:]:
            if (other.channels, other.flat, other.tiles) != (first.channels, first.flat, first.tiles):
                foreign = _root(other.units).foreign or _root(first.units).foreign
                if not foreign:
                    return None
            _merge(_root(first.units), _root(other.units))
        return replace(first, rectified=False)

    def _tiled(self, node: Any, inputs: list[_Signal], dim: object) -> _Signal | None:
        """Units concatenated with themselves, as a concatenated ReLU does."""
        first = inputs[0]
        parts = node.args[0]
        plain = not first.flat and all(
            _root(signal.units) is _root(first.units) and signal.tiles == 1 and signal.channels == first.channels
            for signal in inputs
        )
        if (
            not plain
            or not isinstance(parts, (tuple, list))
            or dim not in ((1, -3) if first.channels else (1, -1))
        ):
            return None
        return replace(first, tiles=len(parts), rectified=False)

    def _mix(self, name: str, inputs: list[_Signal], *, reads: bool = False) -> _Signal:
        """An operation that is not known: its units are of its own making."""
        made = self._new(foreign=True)
        made.reads = reads
        for signal in inputs:
            _root(signal.units).leads_to.append((name, made))
        return _Signal(made)

    def _new(self, *, foreign: bool = False) -> _Units:
        units = _Units(foreign=foreign)
        self.all.append(units)
        return units


def _root(units: _Units) -> _Units:
    while units.merged is not None:
        units = units.merged
    return units


def _merge(first: _Units, other: _Units) -> None:
    if first is other:
        return
    first.producers += other.producers
    first.readers += other.readers
    first.norms += other.norms
    first.leads_to += other.leads_to
    first.foreign |= other.foreign
    first.seen |= other.seen
    first.reads |= other.reads
    other.merged = first


def _is_read(units: _Units) -> bool:
    """Whether a layer reads what was made of units by operations that are not known."""
    root = _root(units)
    return root.reads or bool(root.readers) or any(_is_read(result) for _, result in root.leads_to)


def _goes_out(units: _Units) -> bool:
    """Whether units reach the output, as they are or changed by operations that are not known."""
    return units.seen or any(_goes_out(_root(result)) for _, result in units.leads_to)


def _is_pair(sizes: Sequence[Any]) -> bool:
    return len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) and len(sizes[0]) == 2


# ---------------------------------------------------------------------------------------------- activations
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
