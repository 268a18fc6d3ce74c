"""Convolutions with Gaussian weights."""

from typing import Any

from torch import Tensor, nn

from clagrange._checks import Number
from clagrange.gaussian.layers.base import GaussianLayer
from clagrange.gaussian.structures import Structure
from clagrange.replicas import conv2d, fan_in, patches


class GaussianConv2d(GaussianLayer, nn.Conv2d):
    """A convolution with Gaussian weights.

    Takes the arguments of `torch.nn.Conv2d`, and ``precision``, ``prior_mean`` and ``prior_variance`` (in units
    of 2 / (in_channels / groups · kernel height · kernel width)) as `GaussianLinear` does.

    Shapes: inputs (B, C, H, W); stacked: inputs (R, B, C, H, W), weight (R, out, in / groups, h, w).

    Example:
        >>> GaussianConv2d(3, 8, 5, padding=2)(torch.zeros(1, 3, 6, 6)).shape
        torch.Size([1, 8, 6, 6])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        *args: Any,
        precision: str | Structure = "diagonal",
        prior_mean: str = "zero",
        prior_variance: Number = 1.0,
        **settings: Any,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, *args, **settings)
        self.become_gaussian(precision, prior_mean, prior_variance)

    @property
    def stacked(self) -> bool:
        """Whether the weight is (R, out, in / groups, h, w)."""
        return self.weight.dim() == 5

    def forward(self, inputs: Tensor) -> Tensor:
        """Apply the convolution at its mean."""
        output = conv2d(self, inputs, self.weight, self.bias)
        batched = inputs.dim() == self.weight.dim()
        examples = inputs.shape[int(self.stacked)] if batched else 1
        self.watch(output, inputs, examples, examples)
        return output

    def initial_variance(self, name: str) -> float:
        """2 / (in_channels / groups · kernel height · kernel width)."""
        return 2.0 / fan_in(self)

    def as_matrix(self, name: str, tensor: Tensor) -> Tensor:
        """(groups, out / groups, in / groups · h · w), without the first dimension where there is one group."""
        matrix = super().as_matrix(name, tensor)
        return matrix if self.groups == 1 else matrix.unflatten(-2, (self.groups, -1))

    def rows(self, weight: str, inputs: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Patches of the inputs (im2col), one for each position of the kernel, and the gradients there."""
        first = int(self.stacked)
        if inputs.dim() == self.weight.dim() - 1:  # a single image
            inputs, gradient = inputs.unsqueeze(first), gradient.unsqueeze(first)
        leading = inputs.shape[: first + 1]
        x = patches(self, inputs.flatten(0, first)).unflatten(0, leading)
        d = gradient.flatten(-2).mT
        if self.groups > 1:
            x, d = (tensor.unflatten(-1, (self.groups, -1)).movedim(-2, first) for tensor in (x, d))
        return x, d
