"""Convolutions with Gaussian weights."""

from abc import abstractmethod
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from clagrange.gaussian.layers.base import GaussianLayer
from clagrange.replicas import convolution, fan_in, patches, transposed_patches


class _GaussianConvolution(GaussianLayer, _ConvNd):
    """What convolutions of all kinds share: a unit is a channel, its inputs are those under the kernel."""

    @property
    def stacked(self) -> bool:
        """Whether the weight has a replica dimension."""
        return self.weight.dim() > 2 + len(self.kernel_size)

    def initial_variance(self, name: str) -> float:
        """2 / fan_in, with fan_in = in_channels / groups · kernel size, over the stride's if transposed."""
        return 2.0 / fan_in(self)

    def as_matrix(self, name: str, tensor: Tensor) -> Tensor:
        """(groups, out / groups, in / groups · kernel size), without the first where there is one group."""
        matrix = super().as_matrix(name, tensor)
        return matrix if self.groups == 1 else matrix.unflatten(-2, (self.groups, -1))

    def rows(self, name: str, inputs: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Patches of the inputs (im2col), one for each place of the kernel, and the gradients there."""
        first, dimensions = int(self.stacked), len(self.kernel_size)
        if inputs.dim() == first + 1 + dimensions:  # without a batch
            inputs, gradient = inputs.unsqueeze(first), gradient.unsqueeze(first)
        leading = inputs.shape[: first + 1]
        x, d = self._rows(name, inputs.flatten(0, first), gradient.flatten(0, first))
        x, d = x.unflatten(0, leading), d.unflatten(0, leading)
        if self.groups > 1:
            x, d = (tensor.unflatten(-1, (self.groups, -1)).movedim(-2, first) for tensor in (x, d))
        return x, d

    @abstractmethod
    def _rows(self, name: str, inputs: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """`rows` of a batch, with all groups in one."""

    def _watch(self, output: Tensor, inputs: Tensor) -> Tensor:
        batched = inputs.dim() - self.stacked == 2 + len(self.kernel_size)
        examples = inputs.shape[int(self.stacked)] if batched else 1
        self.watch(output, inputs, examples, examples)
        return output


class _GaussianDirectConvolution(_GaussianConvolution):
    def forward(self, inputs: Tensor) -> Tensor:
        """Apply the convolution at its mean, or in training at what is drawn (`set_sampling`)."""
        return self._watch(self.transform(partial(convolution, self), inputs), inputs)

    def _rows(self, name: str, inputs: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return patches(self, inputs), gradient.flatten(2).mT


class _GaussianTransposedConvolution(_GaussianConvolution, _ConvTransposeNd):
    """Their weights are (in, out / groups, *kernel)."""

    def forward(self, inputs: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Apply the convolution at its mean, or in training at what is drawn (`set_sampling`)."""
        dimensions = len(self.kernel_size)
        function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dimensions - 1]
        assert not isinstance(self.padding, str)
        padding = self.padding
        output_padding = self._output_padding(
            inputs,
            output_size,
            list(self.stride),
            list(padding),
            list(self.kernel_size),
            dimensions,
            list(self.dilation),
        )
        output = self.transform(
            lambda inputs, weight, bias: function(
                inputs, weight, bias, self.stride, padding, output_padding, self.groups, self.dilation
            ),
            inputs,
        )
        return self._watch(output, inputs)

    def as_matrix(self, name: str, tensor: Tensor) -> Tensor:
        """(groups, out / groups, in / groups · kernel size), without the first where there is one group."""
        if tensor.dim() > 1:
            tensor = tensor.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)
        return super().as_matrix(name, tensor)

    def from_matrix(self, name: str, matrix: Tensor) -> Tensor:
        """The inverse of `as_matrix`."""
        shape = self.get_parameter(name).shape
        if len(shape) == 1:
            return matrix.reshape(shape)
        return matrix.reshape(self.groups, shape[1], -1, *shape[2:]).transpose(1, 2).flatten(0, 1)

    def _rows(self, name: str, inputs: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        if self.structure.joint or name == "bias":
            return transposed_patches(self, inputs, gradient.shape[2:]), gradient.flatten(2).mT
        # in the weight's own order, (in, out · kernel size), inputs and outputs change places
        return patches(self, self._reached(inputs, gradient)), inputs.flatten(2).mT

    def _reached(self, inputs: Tensor, gradient: Tensor) -> Tensor:
        """The gradient without what output padding has added."""
        assert not isinstance(self.padding, str)
        sizes = (
            (size - 1) * step - 2 * padding + d * (k - 1) + 1
            for size, step, padding, d, k in zip(
                inputs.shape[2:], self.stride, self.padding, self.dilation, self.kernel_size, strict=True
            )
        )
        return gradient[(slice(None), slice(None), *map(slice, sizes))]


class GaussianConv1d(_GaussianDirectConvolution, nn.Conv1d):
    """A convolution along one dimension with Gaussian weights.

    Takes the arguments of `torch.nn.Conv1d`, and ``precision``, ``prior_mean`` and ``prior_variance`` as
    `GaussianConv2d` does.

    Example:
        >>> GaussianConv1d(3, 8, 5, padding=2)(torch.zeros(1, 3, 6)).shape
        torch.Size([1, 8, 6])
    """


class GaussianConv2d(_GaussianDirectConvolution, nn.Conv2d):
    """A convolution with Gaussian weights.

    Takes the arguments of `torch.nn.Conv2d`, and ``precision``, ``prior_mean`` and ``prior_variance`` (in units
    of 2 / (in_channels / groups · kernel height · kernel width)) as `GaussianLinear` does.

    Shapes: inputs (B, C, H, W); stacked: inputs (R, B, C, H, W), weight (R, out, in / groups, h, w).

    Example:
        >>> GaussianConv2d(3, 8, 5, padding=2)(torch.zeros(1, 3, 6, 6)).shape
        torch.Size([1, 8, 6, 6])
    """

    stackable = True


class GaussianConv3d(_GaussianDirectConvolution, nn.Conv3d):
    """A convolution along three dimensions with Gaussian weights.

    Takes the arguments of `torch.nn.Conv3d`, and ``precision``, ``prior_mean`` and ``prior_variance`` as
    `GaussianConv2d` does.

    Example:
        >>> GaussianConv3d(3, 8, 3, padding=1)(torch.zeros(1, 3, 4, 4, 4)).shape
        torch.Size([1, 8, 4, 4, 4])
    """


class GaussianConvTranspose1d(_GaussianTransposedConvolution, nn.ConvTranspose1d):
    """A transposed convolution along one dimension with Gaussian weights.

    Takes the arguments of `torch.nn.ConvTranspose1d`, and ``precision``, ``prior_mean`` and ``prior_variance`` as
    `GaussianConvTranspose2d` does.

    Example:
        >>> GaussianConvTranspose1d(3, 8, 2, stride=2)(torch.zeros(1, 3, 6)).shape
        torch.Size([1, 8, 12])
    """


class GaussianConvTranspose2d(_GaussianTransposedConvolution, nn.ConvTranspose2d):
    """A transposed convolution with Gaussian weights.

    Takes the arguments of `torch.nn.ConvTranspose2d`, and ``precision``, ``prior_mean`` and ``prior_variance``
    as `GaussianLinear` does. An output sees in_channels / groups · kernel size / stride size inputs on average;
    ``prior_variance`` is in units of 2 over this number.

    Shapes: inputs (B, C, H, W), weight (in, out / groups, h, w).

    Example:
        >>> GaussianConvTranspose2d(3, 8, 2, stride=2)(torch.zeros(1, 3, 6, 6)).shape
        torch.Size([1, 8, 12, 12])
    """


class GaussianConvTranspose3d(_GaussianTransposedConvolution, nn.ConvTranspose3d):
    """A transposed convolution along three dimensions with Gaussian weights.

    Takes the arguments of `torch.nn.ConvTranspose3d`, and ``precision``, ``prior_mean`` and ``prior_variance`` as
    `GaussianConvTranspose2d` does.

    Example:
        >>> GaussianConvTranspose3d(3, 8, 2, stride=2)(torch.zeros(1, 3, 2, 2, 2)).shape
        torch.Size([1, 8, 4, 4, 4])
    """
