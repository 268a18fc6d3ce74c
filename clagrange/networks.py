"""Networks of the literature, initialised from given random streams."""

import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clagrange._checks import check_choice, check_count, did_you_mean
from clagrange.replicas import Generators, fan_in, generator_of, replicas_of, stack


def mlp(inputs: int, hidden: Sequence[int], outputs: int, *, seed: int = 0) -> nn.Sequential:
    """A multi-layer perceptron with ReLU units, He-uniform weights and zero biases.

    Args:
        inputs: features of an example; images are flattened.
        hidden: width of each hidden layer.
        outputs: width of the last layer.
        seed: of the weights.

    Example:
        >>> mlp(64, [32], 10)(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 10])
    """
    widths = [inputs, *hidden, outputs]
    layers: list[nn.Module] = [nn.Flatten()]
    for index, (width, next_width) in enumerate(itertools.pairwise(widths)):
        layers += [nn.ReLU()] if index else []
        layers.append(nn.Linear(width, next_width))
    network = nn.Sequential(*layers)
    initialize(network, torch.Generator().manual_seed(seed))
    return network


def dohare_convnet(
    input_shape: Sequence[int], outputs: int, *, channels: Sequence[int] = (32, 64, 128), seed: int = 0
) -> nn.Sequential:
    """The convolutional network of Dohare et al. (2024) for ContinualImageNet.

    Convolutions of 5×5, 3×3 and 3×3, each followed by ReLU and a max-pool of 2×2; then linear layers of 128, 128
    and the outputs, with ReLU between them.

    Args:
        input_shape: channels, height and width of an image, at least 32×32 for three convolutions.
        outputs: width of the last layer.
        channels: of the convolutions.
        seed: of the weights.

    Example:
        >>> dohare_convnet((3, 32, 32), 2)(torch.zeros(5, 3, 32, 32)).shape
        torch.Size([5, 2])
    """
    image_channels, height, width = _image_shape(input_shape)
    layers: list[nn.Module] = []
    for index, (entering, leaving) in enumerate(itertools.pairwise([image_channels, *channels])):
        kernel = 5 if index == 0 else 3
        layers += [nn.Conv2d(entering, leaving, kernel), nn.ReLU(), nn.MaxPool2d(2)]
        height, width = (height - kernel + 1) // 2, (width - kernel + 1) // 2
    if min(height, width) < 1:
        raise ValueError(
            f"input_shape: expected images large enough for {len(channels)} convolutions with pooling, such as "
            f"32×32 for three, got {tuple(input_shape)}"
        )
    layers += [nn.Flatten(), nn.Linear(channels[-1] * height * width, 128), nn.ReLU()]
    layers += [nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, outputs)]
    network = nn.Sequential(*layers)
    initialize(network, torch.Generator().manual_seed(seed))
    return network


_NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "group": lambda channels: nn.GroupNorm(math.gcd(32, channels), channels),
    "layer": lambda channels: nn.GroupNorm(1, channels),
}
"""Normalisations of a residual network: "layer" is over channels and places of an image."""


def resnet18(
    input_shape: Sequence[int], outputs: int, *, norm: str = "batch", width: int = 64, seed: int = 0
) -> nn.Sequential:
    """A residual network of 18 layers for images of 32×32: 3×3 at first, no pooling before the blocks.

    Args:
        input_shape: channels, height and width of an image.
        outputs: width of the last layer.
        norm: "batch", "group" (32 groups, where they divide the channels) or "layer" (one group).
        width: channels of the first of the four stages; each further stage has twice as many.
        seed: of the weights.

    Source: He et al. (2016); in this form Dohare et al. (2024).

    Example:
        >>> resnet18((3, 32, 32), 100, norm="group", width=8)(torch.zeros(5, 3, 32, 32)).shape
        torch.Size([5, 100])
    """
    check_choice("norm", norm, _NORMS)
    check_count("width", width)
    image_channels, _, _ = _image_shape(input_shape)
    layers: list[nn.Module] = [_convolution(image_channels, width), _NORMS[norm](width), nn.ReLU()]
    entering = width
    for stage in range(4):
        leaving = width * 2**stage
        layers += [_ResidualBlock(entering, leaving, 1 if stage == 0 else 2, norm)]
        layers += [_ResidualBlock(leaving, leaving, 1, norm)]
        entering = leaving
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(entering, outputs)]
    network = nn.Sequential(*layers)
    initialize(network, torch.Generator().manual_seed(seed))
    return network


def _convolution(entering: int, leaving: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(entering, leaving, 3, stride=stride, padding=1, bias=False)


class _ResidualBlock(nn.Module):
    """Two convolutions with normalisation around a short cut, which is a 1×1 convolution where shapes change."""

    def __init__(self, entering: int, leaving: int, stride: int, norm: str) -> None:
        super().__init__()
        self.convolution1 = _convolution(entering, leaving, stride)
        self.norm1 = _NORMS[norm](leaving)
        self.convolution2 = _convolution(leaving, leaving)
        self.norm2 = _NORMS[norm](leaving)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or entering != leaving:
            shrinking = nn.Conv2d(entering, leaving, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(shrinking, _NORMS[norm](leaving))

    def forward(self, inputs: Tensor) -> Tensor:
        """ReLU of the sum of both ways."""
        hidden = self.relu(self.norm1(self.convolution1(inputs)))
        output: Tensor = self.relu(self.norm2(self.convolution2(hidden)) + self.shortcut(inputs))
        return output


def vit(
    input_shape: Sequence[int],
    outputs: int,
    *,
    patch: int = 4,
    width: int = 128,
    depth: int = 4,
    heads: int = 4,
    seed: int = 0,
) -> nn.Sequential:
    """A small vision transformer: patches with fixed sine-cosine positions, pre-norm blocks, mean over patches.

    Args:
        input_shape: channels, height and width of an image; the sides are multiples of ``patch``.
        outputs: width of the last layer.
        patch: side of a patch in pixels.
        width: features of a patch, a multiple of 4 and of ``heads``.
        depth: number of blocks, each of attention and an MLP of 4·width hidden units.
        heads: of the attention.
        seed: of the weights.

    Source: Dosovitskiy et al. (2021), in the simpler form of Beyer et al. (2022).

    Example:
        >>> vit((3, 32, 32), 10, width=32, depth=2)(torch.zeros(5, 3, 32, 32)).shape
        torch.Size([5, 10])
    """
    for name, value in (("patch", patch), ("width", width), ("depth", depth), ("heads", heads)):
        check_count(name, value)
    channels, *sides = _image_shape(input_shape)
    if any(side % patch for side in sides):
        raise ValueError(f"patch: expected a divisor of the sides {sides[0]} and {sides[1]}, got {patch}")
    if width % 4 or width % heads:
        raise ValueError(f"width: expected a multiple of 4 and of the {heads} heads, got {width}")
    network = nn.Sequential(
        nn.Conv2d(channels, width, patch, stride=patch),
        _Positions(sides[0] // patch, sides[1] // patch, width),
        *(_TransformerBlock(width, heads) for _ in range(depth)),
        nn.LayerNorm(width),
        _MeanOverPatches(),
        nn.Linear(width, outputs),
    )
    initialize(network, torch.Generator().manual_seed(seed))
    return network


# The parts of the transformer count dimensions from the last, so that a replica dimension may lead.
class _Positions(nn.Module):
    """(..., width, rows, columns) as (..., patches, width), with the place of each patch added.

    A quarter of the features each: sin and cos of the row, sin and cos of the column, at wavelengths from 2π to
    2π·10⁴.
    """

    positions: Tensor

    def __init__(self, rows: int, columns: int, width: int) -> None:
        super().__init__()
        frequencies = 1e-4 ** (torch.arange(width // 4) / max(width // 4 - 1, 1))
        row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        angles = [place.flatten()[:, None] * frequencies for place in (row, column)]
        encoded = torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], 1)
        self.register_buffer("positions", encoded[None], persistent=False)
        self.identity = nn.Identity()  # makes it a container, which stacked networks may hold

    def forward(self, inputs: Tensor) -> Tensor:
        """Flatten the places and add their codes."""
        output: Tensor = self.identity(inputs.flatten(-2).mT) + self.positions
        return output


class _TransformerBlock(nn.Module):
    """Self-attention and an MLP, each of normalised inputs and added to them."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.project = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, inputs: Tensor) -> Tensor:
        """Inputs and outputs (..., patches, width)."""
        normed = self.norm1(inputs)
        by_head = [
            layer(normed).unflatten(-1, (self.heads, -1)).transpose(-2, -3)
            for layer in (self.query, self.key, self.value)
        ]
        attended = nn.functional.scaled_dot_product_attention(*by_head).transpose(-2, -3).flatten(-2)
        hidden = inputs + self.project(attended)
        output: Tensor = hidden + self.mlp(self.norm2(hidden))
        return output


class _MeanOverPatches(nn.Module):
    """(..., patches, width) as (..., width)."""

    def __init__(self) -> None:
        super().__init__()
        self.identity = nn.Identity()  # makes it a container, which stacked networks may hold

    def forward(self, inputs: Tensor) -> Tensor:
        """The mean."""
        output: Tensor = self.identity(inputs).mean(-2)
        return output


def _image_shape(input_shape: Sequence[int]) -> tuple[int, int, int]:
    if len(input_shape) != 3:
        raise ValueError(
            f"input_shape: expected (channels, height, width) of images, got {tuple(input_shape)}; a stream of "
            f"flat examples needs the network 'mlp'"
        )
    channels, height, width = input_shape
    return channels, height, width


def _mlp_for(
    input_shape: Sequence[int], outputs: int, *, hidden: Sequence[int] = (64, 64), seed: int = 0
) -> nn.Sequential:
    if not isinstance(hidden, Sequence) or isinstance(hidden, str):
        raise ValueError(f"hidden: expected a list of widths, got {hidden!r}")
    for width in hidden:
        check_count("hidden", width)
    return mlp(math.prod(input_shape), hidden, outputs, seed=seed)


NETWORKS: dict[str, Callable[..., nn.Sequential]] = {
    "mlp": _mlp_for,
    "dohare_convnet": dohare_convnet,
    "resnet18": resnet18,
    "vit": vit,
}
"""The networks that settings can name, each from (input_shape, outputs, seed=, settings)."""


def build(
    settings: Mapping[str, Any], input_shape: Sequence[int], outputs: int, *, seed: int = 0
) -> nn.Sequential:
    """A network from settings, such as a study file or a stream's preset gives them.

    Args:
        settings: the name of the network in `NETWORKS` under "kind", and what else its function takes.
        input_shape: shape of one example.
        outputs: width of the last layer.
        seed: of the weights.

    Raises:
        ValueError: for an unknown network or setting, or examples that the network cannot take.
        TypeError: for a setting of another type.

    Example:
        >>> build({"kind": "mlp", "hidden": [32]}, (1, 8, 8), 10)(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 10])
    """
    chosen = dict(settings)
    kind = chosen.pop("kind", None)
    check_choice("network.kind", kind, NETWORKS)
    known = list(inspect.signature(NETWORKS[kind]).parameters)[2:-1]
    for name in chosen:
        if name not in known:
            raise ValueError(
                f"network: expected settings {', '.join(known)} of {kind}; got {name!r}"
                f"{did_you_mean(name, known)}"
            )
    return NETWORKS[kind](input_shape, outputs, seed=seed, **chosen)


def initialize(network: nn.Module, generators: Generators | None = None, *, frozen: bool = True) -> None:
    """Draw fresh weights in place, each replica's from its own random stream.

    Linear and convolution weights: He-uniform, U(±√(6 / fan_in)), biases 0 (He et al. 2015). Normalisation
    layers: scale 1, shift 0, running statistics as new.

    Args:
        network: of linear, convolution and normalisation layers, single or stacked.
        generators: random streams, one for each replica.
        frozen: whether that goes for frozen parameters too, and for normalisation layers all of whose are.

    Raises:
        ValueError: for a layer with parameters of another kind; it is named.
    """
    for parameter, fresh in fresh_parameters(network, generators):
        if frozen or parameter.requires_grad:
            parameter.data.copy_(fresh)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            trained = [parameter.requires_grad for parameter in module.parameters(recurse=False)]
            if frozen or any(trained) or not trained:
                module.reset_running_stats()


def fresh_parameters(network: nn.Module, generators: Generators | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Every parameter with a draw from the distribution of `initialize`; the network stays as it is.

    Raises:
        ValueError: for a layer with parameters of another kind; it is named.
    """
    replicas = replicas_of(network)
    for name, module in network.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            bound = he_bound(module)
            fresh = torch.empty_like(module.weight.detach(), memory_format=torch.contiguous_format)
            for replica, weight in enumerate([fresh] if replicas is None else fresh):
                weight.uniform_(-bound, bound, generator=generator_of(generators, replica))
            yield module.weight, fresh
            if module.bias is not None:
                yield module.bias, torch.zeros_like(module.bias.detach())
        elif isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)):
            if module.weight is not None:
                yield module.weight, torch.ones_like(module.weight.detach())
            if module.bias is not None:
                yield module.bias, torch.zeros_like(module.bias.detach())
        elif any(True for _ in module.parameters(recurse=False)):
            raise ValueError(
                f"network: layer {name or '(root)'!r} of type {type(module).__name__} cannot be drawn afresh; "
                f"known are linear, convolution and normalisation layers"
            )


class CReLU(nn.Module):
    """Concatenated ReLU: ReLU(x) beside ReLU(−x), twice as many features; one of a pair is always alive.

    Args:
        channels: whether features are channels of an image, (..., C, H, W), rather than the last dimension.

    Source: Shang et al. (2016); against loss of plasticity Abbas et al. (2023).

    Example:
        >>> CReLU()(torch.tensor([1.0, -2.0]))
        tensor([1., 0., 0., 2.])
    """

    stackable = True

    def __init__(self, channels: bool = False) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, inputs: Tensor) -> Tensor:
        """Both halves."""
        return torch.cat([inputs.relu(), (-inputs).relu()], -3 if self.channels else -1)

    def extra_repr(self) -> str:
        """Its setting."""
        return f"channels={self.channels}"


@torch.no_grad()
def use_crelu(network: nn.Module, generators: Generators | None = None) -> None:
    """Put a `CReLU` for every ReLU of a sequential network, in place, and draw the weights afresh.

    The layer after a ReLU takes twice as many inputs. Every layer keeps its number of units and its name.

    Args:
        network: nested `torch.nn.Sequential`, single or stacked; fresh, as all weights are drawn anew.
        generators: random streams for `initialize`.

    Raises:
        ValueError: if a layer with parameters that is neither linear nor a convolution follows a ReLU.

    Example:
        >>> network = mlp(4, [3], 2)
        >>> use_crelu(network)
        >>> network[3].in_features
        6
    """
    doubled, producer = False, None
    for parent, name, layer in _places(network):
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            if doubled:
                _double_inputs(layer)
            doubled, producer = False, layer
        elif isinstance(layer, nn.ReLU) and producer is not None:
            parent.add_module(name, CReLU(channels=isinstance(producer, nn.Conv2d)))
            doubled = True
        elif doubled and any(True for _ in layer.parameters()):
            raise ValueError(
                f"network: expected a linear or convolution layer after a ReLU, got a {type(layer).__name__}, "
                f"whose inputs cannot be doubled; put it before the ReLU"
            )
    initialize(network, generators)


def _double_inputs(layer: nn.Linear | nn.Conv2d) -> None:
    dim = -1 if isinstance(layer, nn.Linear) else -3
    layer.weight = nn.Parameter(torch.cat([layer.weight, layer.weight], dim))
    if isinstance(layer, nn.Linear):
        layer.in_features *= 2
    else:
        layer.in_channels *= 2


def add_layer_norm(network: nn.Module) -> None:
    """Normalise before every ReLU of a sequential network, in place.

    Each ReLU becomes a sequence of a norm and itself, so that all layers keep their names: a layer norm over the
    units of a linear layer, a group norm with one group over the channels and positions of a convolution.

    Args:
        network: nested `torch.nn.Sequential`, single or stacked, without Gaussian layers.

    Example:
        >>> network = mlp(4, [3], 2)
        >>> add_layer_norm(network)
        >>> [type(layer).__name__ for layer in network[2]]
        ['LayerNorm', 'ReLU']
    """
    replicas, producer = replicas_of(network), None
    for parent, name, layer in _places(network):
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            producer = layer
        elif isinstance(layer, nn.ReLU) and producer is not None:
            norm: nn.Module
            if isinstance(producer, nn.Linear):
                norm = nn.LayerNorm(producer.out_features)
            else:
                norm = nn.GroupNorm(1, producer.out_channels)
            if replicas is not None:
                norm = stack([norm] * replicas)
            norm.to(producer.weight.device, producer.weight.dtype)
            parent.add_module(name, nn.Sequential(norm, layer))


def _places(network: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """Every layer of nested sequences in order, with its parent and its name there."""
    if not isinstance(network, nn.Sequential):
        raise ValueError(
            f"network: expected a torch.nn.Sequential, got {type(network).__name__}; what follows what cannot be "
            f"told, change it by hand"
        )
    places: list[tuple[nn.Module, str, nn.Module]] = []
    for name, child in network.named_children():
        places += _places(child) if isinstance(child, nn.Sequential) else [(network, name, child)]
    return places


def he_bound(layer: nn.Linear | nn.Conv2d, gain: float = math.sqrt(2.0)) -> float:
    """The bound b of the uniform initialisation U(±b): gain·√(3 / fan_in)."""
    return gain * math.sqrt(3.0 / fan_in(layer))


def cross_entropy(logits: Tensor, targets: Tensor, *, reduction: str = "mean") -> Tensor:
    """Cross-entropy of single or stacked networks.

    "mean" averages over the examples and, for logits (R, B, C), sums the replicas' means, which leaves each
    replica's gradient what it is alone. "none" gives the loss of every example.

    Args:
        logits: (B, C) or (R, B, C).
        targets: (B,) or (R, B), class numbers.
        reduction: "mean" or "none".

    Example:
        >>> cross_entropy(torch.zeros(5, 4, 10), torch.zeros(5, 4, dtype=torch.long))
        tensor(11.5129)
    """
    check_choice("reduction", reduction, ("mean", "none"))
    losses = nn.functional.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none").view(
        targets.shape
    )
    return losses if reduction == "none" else losses.mean(-1).sum()


def squared_error(outputs: Tensor, targets: Tensor, *, reduction: str = "mean") -> Tensor:
    """(output − target)² of single or stacked networks with one output; reductions as in `cross_entropy`.

    Args:
        outputs: (B, 1) or (R, B, 1).
        targets: (B,) or (R, B).
        reduction: "mean" or "none".

    Example:
        >>> squared_error(torch.zeros(4, 1), torch.full((4,), 3.0))
        tensor(9.)
    """
    check_choice("reduction", reduction, ("mean", "none"))
    losses = (outputs.squeeze(-1) - targets).square()
    return losses if reduction == "none" else losses.mean(-1).sum()


LOSSES = {"cross_entropy": cross_entropy, "mse": squared_error}
"""The losses that a stream can name."""


@torch.no_grad()
def cross_entropy_gradient(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The cross entropy of every example and its gradient to the logits, softmax − one-hot, without a graph.

    Args:
        logits: (..., C); −∞ leaves a class out.
        targets: (...), class numbers.

    Returns:
        Losses (...) and gradients (..., C).

    Example:
        >>> cross_entropy_gradient(torch.zeros(1, 2), torch.tensor([1]))
        (tensor([0.6931]), tensor([[ 0.5000, -0.5000]]))
    """
    scores = logits.log_softmax(-1)
    places = targets.unsqueeze(-1)
    losses = scores.gather(-1, places).squeeze(-1).neg_()
    return losses, scores.exp_().scatter_(-1, places, -1.0, reduce="add")


@torch.no_grad()
def squared_error_gradient(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The squared error of every example and its gradient to the outputs, 2·(output − target), without a graph.

    Args:
        outputs: (..., 1).
        targets: (...).

    Returns:
        Losses (...) and gradients (..., 1).

    Example:
        >>> squared_error_gradient(torch.zeros(1, 1), torch.tensor([3.0]))
        (tensor([9.]), tensor([[-6.]]))
    """
    errors = outputs.squeeze(-1) - targets
    return errors.square(), 2.0 * errors.unsqueeze(-1)


LOSS_GRADIENTS = {"cross_entropy": cross_entropy_gradient, "mse": squared_error_gradient}
"""Of the losses that a stream can name, by example."""
