"""Metrics of the kinetic term: the Fisher metric of a Gaussian, and the check that a metric is one."""

import torch
from torch import Tensor

from clagrange._checks import check_choice

COORDINATES = ("variance", "deviation", "log_deviation")


class GaussianFisher:
    """The Fisher metric of n independent Gaussians at θ = (means, widths), 2n numbers; diagonal.

    The Kullback-Leibler divergence of a step dθ is ½dθᵀG dθ, in either direction. With the mean first and the
    width w second, per Gaussian:

        w = v (variance):          dμ²/v + dv²/(2v²)
        w = σ (deviation):         dμ²/σ² + 2dσ²/σ²
        w = ℓ = log σ:             dμ²e^{−2ℓ} + 2dℓ²

    Args:
        coordinates: "variance" (the paper's), "deviation" or "log_deviation" (the one to compute with: every
            real number is a width).

    Example:
        >>> GaussianFisher("variance")(torch.tensor([0.3, 0.5]))
        tensor([2., 2.])
    """

    def __init__(self, coordinates: str = "variance") -> None:
        check_choice("coordinates", coordinates, COORDINATES)
        self.coordinates = coordinates

    def split(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Means and variances, each (…, n), of positions (…, 2n)."""
        mean, width = position.chunk(2, dim=-1)
        if self.coordinates == "variance":
            return mean, width
        return mean, width.square() if self.coordinates == "deviation" else torch.exp(2.0 * width)

    def join(self, mean: Tensor, variance: Tensor) -> Tensor:
        """The positions (…, 2n) of means and variances (…, n)."""
        if self.coordinates == "deviation":
            return torch.cat([mean, variance.sqrt()], dim=-1)
        return torch.cat([mean, variance if self.coordinates == "variance" else 0.5 * variance.log()], dim=-1)

    def __call__(self, position: Tensor) -> Tensor:
        """The diagonal of G, (2n,)."""
        _, variance = self.split(position)
        if self.coordinates == "variance":
            return torch.cat([1.0 / variance, 0.5 / variance.square()], dim=-1)
        second = 2.0 / variance if self.coordinates == "deviation" else torch.full_like(variance, 2.0)
        return torch.cat([1.0 / variance, second], dim=-1)

    def entropy(self, position: Tensor) -> Tensor:
        """Σ ½log v, the entropy up to a constant (Eq. 143)."""
        _, width = position.chunk(2, dim=-1)
        if self.coordinates == "log_deviation":
            return width.sum(-1)
        return (width.log() * (0.5 if self.coordinates == "variance" else 1.0)).sum(-1)


def check_metric(metric: Tensor) -> None:
    """Raise ValueError unless ``metric``, (n,) diagonal or (…, n, n), is symmetric and positive definite."""
    if metric.dim() == 0 or (metric.dim() > 1 and metric.shape[-1] != metric.shape[-2]):
        raise ValueError(f"metric: expected shape (n,) or (n, n), got {tuple(metric.shape)}")
    if metric.dim() == 1:
        smallest = float(metric.min())
    else:
        if not torch.allclose(metric, metric.mT, rtol=1e-6, atol=1e-12):
            raise ValueError("metric: expected a symmetric matrix, got one that is not; take its symmetric part")
        smallest = float(torch.linalg.eigvalsh(metric).min()) if bool(metric.isfinite().all()) else float("nan")
    if not smallest > 0:
        raise ValueError(
            f"metric: expected a positive definite one, got smallest eigenvalue {smallest:.3g}; where the metric "
            f"is not positive definite some motion costs nothing or less, and the action has no minimum"
        )
