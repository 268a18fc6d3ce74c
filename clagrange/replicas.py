"""The replica dimension: R independent networks of one structure as one network of stacked tensors.

Where it is present, the replica dimension leads: weights are (R, out, in), inputs (R, batch, ...), outputs
(R, batch, ...). A layer tells from its weight whether it is stacked, so a single network is not a special
case. R stacked networks compute what R separate networks compute.
"""

import copy
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Generators = torch.Generator | Sequence[torch.Generator]
"""One random stream, or one for each replica."""


# ---------------------------------------------------------------------------------------- random streams
def generators_from_seeds(seeds: int | Sequence[int], device: torch.device | str = "cpu") -> Generators:
    """One generator for one seed, a list of generators for a sequence of seeds."""
    if isinstance(seeds, int):
        return torch.Generator(device).manual_seed(seeds)
    return [torch.Generator(device).manual_seed(int(seed)) for seed in seeds]


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
    noise = torch.empty_like(tensor)
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
    product = torch.bmm(flat, weight.mT) if bias is None else torch.baddbmm(bias[:, None], flat, weight.mT)
    return product.view(*inputs.shape[:-1], -1)


def conv2d(layer: nn.Conv2d, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A convolution with the settings of ``layer``; with a leading replica dimension a grouped one."""
    if weight.dim() == 4:
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


def patches(layer: nn.Conv2d, inputs: Tensor) -> Tensor:
    """What the kernel of a convolution sees at each of its places: (B, places, in · height · width)."""
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        inputs = F.pad(inputs, layer._reversed_padding_repeated_twice, mode=mode)
        padding: tuple[int, ...] = (0, 0)
    else:
        padding = layer.padding
    columns: Tensor = F.unfold(inputs, layer.kernel_size, layer.dilation, padding, layer.stride)
    return columns.mT


def fan_in(layer: nn.Linear | nn.Conv2d) -> int:
    """Number of inputs of one unit."""
    if isinstance(layer, nn.Linear):
        return layer.in_features
    return layer.in_channels // layer.groups * math.prod(layer.kernel_size)


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
        return conv2d(self, inputs, self.weight, self.bias)


class StackedLayerNorm(nn.LayerNorm):
    """R layer norms: weight and bias (R, *normalized_shape)."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Normalise, then apply each replica's scale and shift."""
        normalised = F.layer_norm(inputs, self.normalized_shape, None, None, self.eps)
        if not self.elementwise_affine:
            return normalised
        between = [1] * (inputs.dim() - 1 - len(self.normalized_shape))
        shape = (inputs.shape[0], *between, *self.normalized_shape)
        normalised = normalised * self.weight.view(shape)
        return normalised if self.bias is None else normalised + self.bias.view(shape)


class StackedGroupNorm(nn.GroupNorm):
    """R group norms: weight and bias (R, channels)."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Fold the replicas into the channels, so that each keeps its groups."""
        weight, bias = (None if p is None else p.flatten() for p in (self.weight, self.bias))
        folded = inputs.transpose(0, 1).flatten(1, 2)
        out = F.group_norm(folded, inputs.shape[0] * self.num_groups, weight, bias, self.eps)
        return _unfold_replicas(out, inputs.shape[0])


class _StackedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """R batch norms: weight, bias and running statistics (R, channels)."""

    def _check_input_dim(self, inputs: Tensor) -> None:
        if inputs.dim() < 3:
            raise ValueError(f"expected inputs of shape (replicas, batch, channels, ...), got {inputs.dim()}D")

    def forward(self, inputs: Tensor) -> Tensor:
        """Fold the replicas into the channels, so that each keeps its statistics."""
        self._check_input_dim(inputs)
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked.flatten()[0])
        use_batch = self.training or self.running_mean is None
        running_mean, running_var, weight, bias = (
            None if t is None else t.flatten()
            for t in (self.running_mean, self.running_var, self.weight, self.bias)
        )
        folded = inputs.transpose(0, 1).flatten(1, 2)
        out = F.batch_norm(folded, running_mean, running_var, weight, bias, use_batch, momentum, self.eps)
        return _unfold_replicas(out, inputs.shape[0])


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
    return stacked


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
    """Gaussian layers read the replicas off their weight; pointwise layers and containers have none."""
    if isinstance(module, (nn.Linear, nn.Conv2d, *POINTWISE)):
        return True
    owns_tensors = any(True for _ in module.parameters(recurse=False))
    return not owns_tensors and (
        any(True for _ in module.children()) or type(module).forward is nn.Module.forward
    )
