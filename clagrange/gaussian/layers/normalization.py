"""Normalisation layers whose scales and shifts are Gaussian."""

import math
from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from clagrange.gaussian.layers.base import GaussianLayer
from clagrange.gaussian.structures import Diagonal, Structure
from clagrange.replicas import batch_norm, group_norm, layer_norm


class _GaussianNorm(GaussianLayer):
    """What normalisation layers share: y = x̂·w + b, with the scale w and the shift b elementwise.

    Their precision is diagonal, its curvature read off squared gradients, whatever is asked for.
    """

    by_default = False

    @property
    def _event_dims(self) -> int:
        """Dimensions of the parameters of one network."""
        return 1

    @property
    def stacked(self) -> bool:
        """Whether the parameters have a replica dimension."""
        return any(parameter.dim() > self._event_dims for parameter in self.parameters(recurse=False))

    def admitted(self, structure: Structure) -> Structure:
        """A diagonal one."""
        return Diagonal()

    def check_sampling(self, mode: str) -> None:
        """Raise unless the layer can be at this in training."""
        super().check_sampling(mode)
        if mode == "example":
            raise ValueError(
                f"mode: a {type(self).__name__} cannot be drawn for every example, got 'example'; use 'batch', "
                f"or leave it out by layers=..."
            )

    @abstractmethod
    def _normalise(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Normalise with this scale and shift."""

    def initial_variance(self, name: str) -> float:
        """1: there is no fan-in."""
        return 1.0

    def prior_center(self, name: str, mean: Tensor, prior_mean: str) -> tuple[Tensor, str]:
        """Around 1 for a scale where others have a prior around 0."""
        if name == "weight" and prior_mean == "zero":
            return torch.ones_like(mean), "initial"
        return mean, prior_mean

    def rows(self, name: str, inputs: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """None: its squared gradient is enough."""
        raise NotImplementedError


class _GaussianPositionNorm(_GaussianNorm):
    """A normalisation of every position by itself, over its last dimensions."""

    normalized_shape: tuple[int, ...]

    @property
    def _event_dims(self) -> int:
        return len(self.normalized_shape)

    def forward(self, inputs: Tensor) -> Tensor:
        """Normalise, then scale and shift by the means, or in training by what is drawn (`set_sampling`)."""
        output = self.transform(self._normalise, inputs)
        leading = inputs.shape[int(self.stacked) : inputs.dim() - self._event_dims]
        self.watch(output, inputs, leading[0] if leading else 1, math.prod(leading))
        return output


class _GaussianChannelNorm(_GaussianNorm):
    """A normalisation of channels over their places, and maybe over examples."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Normalise, then scale and shift by the means, or in training by what is drawn (`set_sampling`)."""
        output = self.transform(self._normalise, inputs)
        examples = inputs.shape[int(self.stacked)]
        self.watch(output, inputs, examples, examples)
        return output


class GaussianLayerNorm(_GaussianPositionNorm, nn.LayerNorm):
    """A layer norm with Gaussian scale and shift.

    Takes the arguments of `torch.nn.LayerNorm`, and ``prior_mean`` and ``prior_variance`` as `GaussianLinear`
    does. Its precision is always diagonal. A scale's prior has the mean 1 where others have 0, and as there is no
    fan-in, the unit of ``prior_variance`` is 1: a value like 0.01 keeps scales near 1.

    Shapes: inputs (B, ..., *normalized_shape); stacked: inputs (R, B, ..., *normalized_shape), weight
    (R, *normalized_shape).

    Example:
        >>> layer = GaussianLayerNorm(4, prior_variance=0.01)
        >>> layer.weight_precision.prior_mean, layer.bias_precision.prior_mean
        (tensor([1., 1., 1., 1.]), tensor([0.]))
    """

    stackable = True

    def _normalise(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.stacked:
            return layer_norm(self, inputs, weight, bias)
        return F.layer_norm(inputs, self.normalized_shape, weight, bias, self.eps)


class GaussianRMSNorm(_GaussianPositionNorm, nn.RMSNorm):
    """`torch.nn.RMSNorm` with Gaussian scale, whose prior is that of `GaussianLayerNorm`."""

    pairs = (("weight", None),)

    def _normalise(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.rms_norm(inputs, self.normalized_shape, weight, self.eps)


class GaussianGroupNorm(_GaussianChannelNorm, nn.GroupNorm):
    """`torch.nn.GroupNorm` with Gaussian scale and shift, whose prior is that of `GaussianLayerNorm`."""

    stackable = True

    def _normalise(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.stacked:
            return group_norm(self, inputs, weight, bias)
        return F.group_norm(inputs, self.num_groups, weight, bias, self.eps)


class _GaussianBatchNorm(_GaussianChannelNorm, _BatchNorm):
    def _normalise(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.stacked:
            return batch_norm(self, inputs, weight, bias)
        self._check_input_dim(inputs)  # type: ignore[no-untyped-call]
        return batch_norm(self, inputs.unsqueeze(0), weight, bias).squeeze(0)


class GaussianBatchNorm1d(_GaussianBatchNorm, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` with Gaussian scale and shift, whose prior is that of `GaussianLayerNorm`."""

    stackable = True


class GaussianBatchNorm2d(_GaussianBatchNorm, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` with Gaussian scale and shift, whose prior is that of `GaussianLayerNorm`."""

    stackable = True


class GaussianBatchNorm3d(_GaussianBatchNorm, nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` with Gaussian scale and shift, whose prior is that of `GaussianLayerNorm`."""
