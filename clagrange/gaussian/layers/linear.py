"""The linear layer with Gaussian weights."""

import math

from torch import Tensor, nn

from clagrange.gaussian.layers.base import GaussianLayer
from clagrange.replicas import linear


class GaussianLinear(GaussianLayer, nn.Linear):
    """A linear layer with Gaussian weights: y = x Wᵀ + b at the mean.

    Args:
        in_features: inputs of each unit.
        out_features: number of units.
        bias: whether there is one; it is Gaussian too.
        precision: structure of the precision, "diagonal" or "kronecker", or one with settings such as
            `Kronecker`.
        prior_mean: "zero" or "initial".
        prior_variance: in units of the initialisation variance 2 / in_features.
        device: of all tensors.
        dtype: of the means.

    Shapes: inputs (..., in), outputs (..., out); stacked: inputs (R, ..., in), weight (R, out, in).

    Example:
        >>> layer = GaussianLinear(8, 4, prior_variance=0.5)
        >>> float(layer.weight_precision.variance().mean())
        0.125
    """

    stackable = True

    @property
    def stacked(self) -> bool:
        """Whether the weight is (R, out, in)."""
        return self.weight.dim() == 3

    def forward(self, inputs: Tensor) -> Tensor:
        """Apply the layer at its mean, or in training at what is drawn (`set_sampling`)."""
        output = self.transform(linear, inputs)
        leading = inputs.shape[int(self.stacked) : -1]
        self.watch(output, inputs, leading[0] if leading else 1, math.prod(leading))
        return output

    def initial_variance(self, name: str) -> float:
        """2 / in_features."""
        return 2.0 / self.in_features

    def rows(self, name: str, inputs: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and output gradients as they are, all dimensions between the batch and the last as positions."""
        first = int(self.stacked)
        x, d = (
            tensor.reshape(*tensor.shape[:first], *(tensor.shape[first:-1] or (1,))[:1], -1, tensor.shape[-1])
            for tensor in (inputs, gradient)
        )
        return x, d
