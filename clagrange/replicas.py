"""The replica dimension: R independent networks of one structure as one network of stacked tensors.

Where it is present, the replica dimension leads: weights are (R, out, in), inputs (R, batch, ...), outputs
(R, batch, ...). A layer tells from its weight whether it is stacked, so a single network is not a special
case. R stacked networks compute what R separate networks compute.
"""

import copy
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clagrange._checks import Number, per_replica
from clagrange._magnitudes import add_outer_product
from clagrange._modes import under_torch_func

Generators = torch.Generator | Sequence[torch.Generator]
"""One random stream, or one for each replica."""


# ---------------------------------------------------------------------------------------- random streams
def generators_from_seeds(
    seeds: int | Sequence[int], device: torch.device | str = "cpu", *, purpose: str = ""
) -> Generators:
    """One generator for one seed, a list of generators for a sequence of seeds.

    Args:
        seeds: of the streams.
        device: of the generators.
        purpose: what is drawn. Streams of one seed are independent where it differs: what is drawn later with the
            seed of a network must not be what its initial weights are.
    """
    if not isinstance(seeds, int):
        return [generators_from_seeds(int(seed), device, purpose=purpose) for seed in seeds]  # type: ignore[misc]
    if purpose:
        seeds = int.from_bytes(hashlib.sha256(f"{purpose} {seeds}".encode()).digest()[:8]) >> 1
    return torch.Generator(device).manual_seed(seeds)


def generator_of(generators: Generators | None, replica: int) -> torch.Generator | None:
    """The random stream of one replica; the stream itself where there is only one network."""
    if generators is None or isinstance(generators, torch.Generator):
        return generators
    return generators[replica]


def randn_like(tensor: Tensor, generators: Generators | None = None) -> Tensor:
    """Standard normal numbers of the shape of ``tensor``, each replica's from its own random stream.

    Args:
        tensor: shape (...) with one generator (or none: torch's global stream), (R, ...) with R of them.
        generators: the random streams.

    Raises:
        ValueError: if the number of generators is not the leading dimension of ``tensor``.
    """
    if generators is None or isinstance(generators, torch.Generator):
        return torch.randn(tensor.shape, generator=generators, dtype=tensor.dtype, device=tensor.device)
    if tensor.dim() == 0 or len(generators) != tensor.shape[0]:
        raise ValueError(
            f"generators: expected one for each of the replicas of a tensor of shape {tuple(tensor.shape)}, "
            f"got {len(generators)}"
        )
    noise = torch.empty_like(tensor, memory_format=torch.contiguous_format)  # strides decide the order of numbers
    for row, generator in zip(noise, generators, strict=True):
        row.normal_(generator=generator)
    return noise


# --------------------------------------------------------------------------------- functions of a layer
def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b for weights (out, in), or (R, out, in) with inputs (R, ..., in)."""
    if weight.dim() == 2:
        return F.linear(inputs, weight, bias)
    if inputs.dim() < 3:
        raise ValueError(
            f"expected inputs of shape (replicas, batch, features) for a stacked layer with weight "
            f"{tuple(weight.shape)}, got {tuple(inputs.shape)}"
        )
    flat = inputs.flatten(1, -2)
    trains = (
        torch.is_grad_enabled() and weight.requires_grad and not torch.is_autocast_enabled(weight.device.type)
    )
    if trains and not under_torch_func():
        product: Tensor = _StackedProduct.apply(flat, weight, bias)  # type: ignore[no-untyped-call]
    else:
        product = stacked_product(flat, weight, bias)
    return product.view(*inputs.shape[:-1], -1)


def stacked_product(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b for inputs (R, batch, in), weights (R, out, in) and biases (R, out)."""
    return torch.bmm(inputs, weight.mT) if bias is None else torch.baddbmm(bias[:, None], inputs, weight.mT)


_rates_in_backward: dict[Tensor, Number] = {}


@contextmanager
def stepping_in_backward(rates: Mapping[Tensor, Number]) -> Iterator[None]:
    """While it lasts, a backward pass takes the step of plain SGD on some layers and leaves no gradients of them.

    Weight W (R, out, in) and bias b (R, out) of a stacked linear layer, with inputs x (R, batch, in) and the
    gradient G of its outputs, become W − lr·Gᵀx, in one operation, and b − lr·ΣG: what SGD makes of them, to
    rounding. The gradient of the weights is never written or read, which at small batches is most of the memory
    that a training step moves.

    Args:
        rates: the learning rate of each layer's weight, a number or (R,); a layer must be called once.

    Example:
        >>> layer = stack([nn.Linear(3, 2)])
        >>> before = layer.weight.detach().clone()
        >>> with stepping_in_backward({layer.weight: 0.1}):
        ...     layer(torch.ones(1, 1, 3)).sum().backward()
        >>> layer.weight.grad, bool(torch.allclose(before - layer.weight, torch.tensor(0.1)))
        (None, True)
    """
    _rates_in_backward.update(rates)
    try:
        yield
    finally:
        for weight in rates:
            del _rates_in_backward[weight]


class _StackedProduct(torch.autograd.Function):
    """`stacked_product` whose gradient of the weights arrives in their own layout, or not at all.

    torch's own is a transposed matrix, which has to be copied: with 784 inputs half of a training step by SGD.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(inputs, weight, bias)
        return stacked_product(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight, bias = ctx.saved_tensors
        of_inputs, of_weight, of_bias = ctx.needs_input_grad
        if weight in _rates_in_backward:
            return sgd_step(weight, bias, inputs, gradient, _rates_in_backward[weight], of_inputs), None, None
        return (
            torch.bmm(gradient, weight) if of_inputs else None,
            torch.bmm(gradient.mT, inputs) if of_weight else None,
            gradient.sum(1) if of_bias else None,
        )


def sgd_step(
    weight: Tensor, bias: Tensor | None, inputs: Tensor, gradient: Tensor, lr: Number, of_inputs: bool = False
) -> Tensor | None:
    """The step of SGD, in place, from inputs (R, batch, in) and the gradient of the outputs (R, batch, out).

    With one example a product of numbers takes less time than one of matrices.

    Returns:
        the gradient of the inputs (R, batch, in), if it is asked for.
    """
    if isinstance(lr, Tensor):
        moves, alpha = (gradient * per_replica(lr, gradient)).to(gradient.dtype), -1.0
    else:
        moves, alpha = gradient, -lr
    left = gradient if of_inputs else None
    if inputs.shape[1] == 1:
        moves = moves.mul(alpha)
        product = add_outer_product(weight, moves.mT, inputs, left)
        if bias is not None:
            bias.add_(moves.squeeze(1))
        return product
    product = None if left is None else torch.bmm(left, weight)
    weight.baddbmm_(moves.mT, inputs, alpha=alpha)
    if bias is not None:
        bias.add_(moves.sum(1), alpha=alpha)
    return product


def convolution(layer: nn.modules.conv._ConvNd, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A convolution with the settings of ``layer``; of 2 dimensions with a replica dimension a grouped one."""
    if weight.dim() == 2 + len(layer.kernel_size):
        output: Tensor = layer._conv_forward(inputs, weight, bias)
        return output
    if inputs.dim() != 5:
        raise ValueError(
            f"expected inputs of shape (replicas, batch, channels, height, width) for a stacked convolution, "
            f"got {tuple(inputs.shape)}"
        )
    replicas, batch = inputs.shape[:2]
    if layer.padding_mode != "zeros":
        # F.pad with a mode other than zeros wants at most four dimensions
        padded = F.pad(inputs.flatten(0, 1), layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
        inputs = padded.unflatten(0, (replicas, batch))
        padding: str | tuple[int, ...] = (0, 0)
    else:
        padding = layer.padding
    folded = F.conv2d(
        inputs.transpose(0, 1).flatten(1, 2),
        weight.flatten(0, 1),
        None if bias is None else bias.flatten(),
        layer.stride,
        padding,
        layer.dilation,
        replicas * layer.groups,
    )
    return _unfold_replicas(folded, replicas)


def patches(layer: nn.modules.conv._ConvNd, inputs: Tensor) -> Tensor:
    """What the kernel of a convolution sees at each of its places: (B, places, in · kernel size)."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(inputs, layer._reversed_padding_repeated_twice, mode=mode)
    return _windows(padded, layer.kernel_size, layer.dilation, layer.stride).flatten(-1 - len(layer.kernel_size))


def transposed_patches(layer: nn.modules.conv._ConvNd, inputs: Tensor, places: Sequence[int]) -> Tensor:
    """The same for a transposed convolution with outputs of the sizes ``places``.

    It is a convolution by the reversed kernel, in steps of 1, of the inputs with stride − 1 zeros between them.
    """
    assert not isinstance(layer.padding, str)
    steps, dimensions = layer.stride, len(places)
    spread = inputs.new_zeros(
        *inputs.shape[:2], *((size - 1) * step + 1 for size, step in zip(inputs.shape[2:], steps, strict=True))
    )
    spread[tuple(slice(None, None, step) for step in (1, 1, *steps))] = inputs
    margins = [
        (d * (k - 1) - padding, size + padding - width)
        for d, k, padding, size, width in zip(
            layer.dilation, layer.kernel_size, layer.padding, places, spread.shape[2:], strict=True
        )
    ]
    padded = F.pad(spread, [margin for both in reversed(margins) for margin in both])
    windows = _windows(padded, layer.kernel_size, layer.dilation, (1,) * dimensions)
    return windows.flip(tuple(range(-dimensions, 0))).flatten(-1 - dimensions)


def _windows(inputs: Tensor, kernel: Sequence[int], dilation: Sequence[int], stride: Sequence[int]) -> Tensor:
    """The entries under a kernel at each of its places: (B, places, channels, *kernel)."""
    dimensions = len(kernel)
    for axis, (k, d, step) in enumerate(zip(kernel, dilation, stride, strict=True), 2):
        inputs = inputs.unfold(axis, d * (k - 1) + 1, step)[..., ::d]
    return inputs.movedim(1, dimensions + 1).flatten(1, dimensions)


def fan_in(layer: nn.Linear | nn.modules.conv._ConvNd) -> float:
    """Number of inputs of one unit; of a transposed convolution on average over its places."""
    if isinstance(layer, nn.Linear):
        return layer.in_features
    steps = math.prod(layer.stride) if layer.transposed else 1
    return layer.in_channels // layer.groups * math.prod(layer.kernel_size) / steps


def layer_norm(layer: nn.LayerNorm, inputs: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """R layer norms of inputs (R, ...), weight and bias (R, *normalized_shape)."""
    output = F.layer_norm(inputs, layer.normalized_shape, None, None, layer.eps)
    shape = (inputs.shape[0], *[1] * (inputs.dim() - 1 - len(layer.normalized_shape)), *layer.normalized_shape)
    output = output if weight is None else output * weight.view(shape)
    return output if bias is None else output + bias.view(shape)


def group_norm(layer: nn.GroupNorm, inputs: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """R group norms of inputs (R, B, C, ...), weight and bias (R, C); folded into C, each has its groups."""
    folded = inputs.transpose(0, 1).flatten(1, 2)
    weight, bias = (None if p is None else p.flatten() for p in (weight, bias))
    out = F.group_norm(folded, inputs.shape[0] * layer.num_groups, weight, bias, layer.eps)
    return _unfold_replicas(out, inputs.shape[0])


def batch_norm(
    layer: nn.modules.batchnorm._BatchNorm, inputs: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """R batch norms of inputs (R, B, C, ...), weight, bias and statistics (R, C), folded into C."""
    if inputs.dim() < 3:
        raise ValueError(f"expected inputs of shape (replicas, batch, channels, ...), got {inputs.dim()}D")
    momentum = 0.0 if layer.momentum is None else layer.momentum
    if layer.training and layer.track_running_stats:
        assert layer.num_batches_tracked is not None
        layer.num_batches_tracked.add_(1)
        if layer.momentum is None:
            momentum = 1.0 / float(layer.num_batches_tracked.flatten()[0])
    use_batch = layer.training or layer.running_mean is None
    running_mean, running_var, weight, bias = (
        None if t is None else t.flatten() for t in (layer.running_mean, layer.running_var, weight, bias)
    )
    folded = inputs.transpose(0, 1).flatten(1, 2)
    out = F.batch_norm(folded, running_mean, running_var, weight, bias, use_batch, momentum, layer.eps)
    return _unfold_replicas(out, inputs.shape[0])


def _unfold_replicas(folded: Tensor, replicas: int) -> Tensor:
    """(batch, R·channels, ...) as (R, batch, channels, ...)."""
    return folded.reshape(folded.shape[0], replicas, -1, *folded.shape[2:]).transpose(0, 1)


# ------------------------------------------------------------------------------------------ stacked layers
class StackedLinear(nn.Linear):
    """R linear layers: weight (R, out, in), bias (R, out), inputs (R, batch, in)."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Apply each replica's layer to its own inputs."""
        return linear(inputs, self.weight, self.bias)


class StackedConv2d(nn.Conv2d):
    """R convolutions: weight (R, out, in / groups, h, w), bias (R, out), inputs (R, batch, in, H, W)."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Apply each replica's convolution to its own inputs."""
        return convolution(self, inputs, self.weight, self.bias)


class StackedLayerNorm(nn.LayerNorm):
    """R layer norms: weight and bias (R, *normalized_shape)."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Normalise, then apply each replica's scale and shift."""
        return layer_norm(self, inputs, self.weight, self.bias)


class StackedGroupNorm(nn.GroupNorm):
    """R group norms: weight and bias (R, channels)."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Normalise the groups of each replica."""
        return group_norm(self, inputs, self.weight, self.bias)


class _StackedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """R batch norms: weight, bias and running statistics (R, channels)."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Normalise the channels of each replica."""
        return batch_norm(self, inputs, self.weight, self.bias)


class StackedBatchNorm1d(_StackedBatchNorm):
    """R batch norms over (R, batch, channels) or (R, batch, channels, length)."""


class StackedBatchNorm2d(_StackedBatchNorm):
    """R batch norms over (R, batch, channels, height, width)."""


def _over_examples(forward: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    """Run a function that treats dimension 0 as the batch on (R, batch, ...)."""
    outputs = forward(inputs.flatten(0, 1))
    return outputs.reshape(*inputs.shape[:2], *outputs.shape[1:])


class StackedFlatten(nn.Flatten):
    """`nn.Flatten` of every example; the replica dimension stays in front."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Flatten each example."""
        return _over_examples(super().forward, inputs)


class StackedMaxPool2d(nn.MaxPool2d):
    """`nn.MaxPool2d` over (R, batch, channels, height, width)."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Pool each example."""
        return _over_examples(super().forward, inputs)


class StackedAvgPool2d(nn.AvgPool2d):
    """`nn.AvgPool2d` over (R, batch, channels, height, width)."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Pool each example."""
        return _over_examples(super().forward, inputs)


class StackedAdaptiveAvgPool2d(nn.AdaptiveAvgPool2d):
    """`nn.AdaptiveAvgPool2d` over (R, batch, channels, height, width)."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Pool each example."""
        return _over_examples(super().forward, inputs)


STACKED_FORMS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: StackedLinear,
    nn.Conv2d: StackedConv2d,
    nn.LayerNorm: StackedLayerNorm,
    nn.GroupNorm: StackedGroupNorm,
    nn.BatchNorm1d: StackedBatchNorm1d,
    nn.BatchNorm2d: StackedBatchNorm2d,
    nn.Flatten: StackedFlatten,
    nn.MaxPool2d: StackedMaxPool2d,
    nn.AvgPool2d: StackedAvgPool2d,
    nn.AdaptiveAvgPool2d: StackedAdaptiveAvgPool2d,
}
"""The stacked form of each layer that has one; a stacked layer has the attributes of the single one."""

POINTWISE = (
    nn.ReLU,
    nn.LeakyReLU,
    nn.ELU,
    nn.GELU,
    nn.SiLU,
    nn.Tanh,
    nn.Sigmoid,
    nn.Softplus,
    nn.Identity,
)
"""Layers without parameters that act on every number by itself: they need no stacked form."""

_SINGLE_FORMS = {stacked: single for single, stacked in STACKED_FORMS.items()}


def stack(networks: Sequence[nn.Module]) -> nn.Module:
    """Stack R networks of one structure into one whose tensors have a leading replica dimension.

    Inputs and outputs of the result are (R, batch, ...). Gaussian layers keep their precision and prior.
    A container with a ``forward`` of its own must not rely on dimension 0 being the batch.

    Args:
        networks: at least one; they are copied.

    Raises:
        ValueError: if there is none, if structures differ, or if a layer has no stacked form.

    Example:
        >>> nets = [nn.Sequential(nn.Linear(3, 2), nn.ReLU()) for _ in range(4)]
        >>> stack(nets)(torch.zeros(4, 8, 3)).shape
        torch.Size([4, 8, 2])
    """
    if not networks:
        raise ValueError("networks: expected at least one network to stack, got none")
    tensors = [{**dict(net.named_parameters()), **dict(net.named_buffers())} for net in networks]
    structures = [_structure(net) for net in networks]
    for index, structure in enumerate(structures):
        if structure != structures[0]:
            raise ValueError(f"networks: expected one structure, but network {index} differs from network 0")
    stacked = copy.deepcopy(networks[0])
    for name, module in stacked.named_modules():
        if type(module) in STACKED_FORMS:
            module.__class__ = STACKED_FORMS[type(module)]
        elif not _keeps_its_form(module):
            raise ValueError(
                f"networks: layer {name or '(root)'!r} of type {type(module).__name__} has no stacked form; "
                f"run such networks one by one"
            )
    for name, parameter in stacked.named_parameters():
        parameter.data = torch.stack([named[name].detach() for named in tensors])
    for name, buffer in stacked.named_buffers():
        buffer.data = torch.stack([named[name] for named in tensors])
    for name, module in stacked.named_modules():
        for listed in lists_by_replica(module):
            copies = [copy.deepcopy(getattr(net.get_submodule(name), listed)) for net in networks]
            setattr(module, listed, [entry for entries in copies for entry in entries])
    return stacked


def lists_by_replica(module: nn.Module) -> tuple[str, ...]:
    """Names of a module's attributes that are lists with an entry for each replica."""
    names: tuple[str, ...] = getattr(type(module), "replica_lists", ())
    return names


def _structure(network: nn.Module) -> list[object]:
    """What two networks must have in common to be stacked: layers, their settings, shapes of their tensors."""
    layers = [(name, type(module), module.extra_repr()) for name, module in network.named_modules()]
    tensors = [*network.named_parameters(), *network.named_buffers()]
    return [layers, [(name, tensor.shape) for name, tensor in tensors]]


def unstack(network: nn.Module) -> list[nn.Module]:
    """The R single networks of a stacked one, as copies: the inverse of `stack`.

    Raises:
        ValueError: if the network is not stacked.
    """
    replicas = replicas_of(network)
    if replicas is None:
        raise ValueError("network: expected a stacked network, got a single one")
    networks = []
    for replica in range(replicas):
        single = copy.deepcopy(network)
        for module in single.modules():
            module.__class__ = _SINGLE_FORMS.get(type(module), type(module))
        for tensor in (*single.parameters(), *single.buffers()):
            tensor.data = tensor.data[replica].clone()
        for module in single.modules():
            for listed in lists_by_replica(module):
                setattr(module, listed, [getattr(module, listed)[replica]])
        networks.append(single)
    return networks


def replicas_of(network: nn.Module) -> int | None:
    """R for a stacked network, None for a single one."""
    for module in network.modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, (StackedLinear, StackedConv2d)) or (
            isinstance(weight, Tensor)
            and ((isinstance(module, nn.Linear) and weight.dim() == 3) or _is_stacked_convolution(module))
        ):
            assert isinstance(weight, Tensor)
            return weight.shape[0]
    return None


def _is_stacked_convolution(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.weight.dim() == 5


def _keeps_its_form(module: nn.Module) -> bool:
    """Stackable Gaussian layers read the replicas off their weight; pointwise layers and containers have none."""
    if getattr(module, "stackable", False) or isinstance(module, POINTWISE):
        return True
    owns_tensors = any(True for _ in module.parameters(recurse=False))
    return not owns_tensors and (
        any(True for _ in module.children()) or type(module).forward is nn.Module.forward
    )
