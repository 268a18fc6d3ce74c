"""How plastic a network still is, read off its hidden features and weights."""

import torch
from torch import Tensor, nn

from clagrange.gaussian import gaussian_layers
from clagrange.replicas import replicas_of


def dead_units(features: Tensor) -> Tensor:
    """Fraction of units that are 0 on every sample: Σ|h| = 0.

    Args:
        features: (samples, units) or (R, samples, units), after the nonlinearity.

    Returns:
        A number in [0, 1], or shape (R,).

    Source: Dohare et al. (2024), who use 2,000 examples of the task before training on it.

    Example:
        >>> float(dead_units(torch.tensor([[1.0, 0.0], [2.0, 0.0]])))
        0.5
    """
    return (features == 0).all(-2).float().mean(-1)


def effective_rank(features: Tensor) -> Tensor:
    """exp(entropy of p) with p_i = s_i / Σs, s the singular values of the feature matrix.

    Args:
        features: (samples, units) or (R, samples, units).

    Returns:
        A number between 1 and min(samples, units) (0 for an all-zero matrix), or shape (R,).

    Source: Roy and Vetterli (2007); used by Dohare et al. (2024).

    Example:
        >>> round(float(effective_rank(torch.eye(4))), 3)
        4.0
    """
    finite = torch.where(features.isfinite(), features, 0.0).float()
    values = torch.linalg.svdvals(finite)
    total = values.sum(-1, keepdim=True)
    share = values / total.clamp(min=torch.finfo(values.dtype).tiny)
    entropy = -torch.special.xlogy(share, share).sum(-1)
    return torch.where(total.squeeze(-1) > 0, entropy.exp(), 0.0)


@torch.no_grad()
def weight_magnitude(network: nn.Module) -> Tensor:
    """Mean |w| over all parameters, in units of the weights: a number, or shape (R,)."""
    stacked = replicas_of(network) is not None
    flat = [p.abs().flatten(1) if stacked else p.abs().flatten() for p in network.parameters()]
    return torch.cat(flat, -1).mean(-1)


@torch.no_grad()
def mean_variance(network: nn.Module) -> Tensor | None:
    """Mean over all Gaussian weights of σ²/σ_p², the variance in units of the prior's; None without any.

    1 means that the loss holds no weight, 0 that it determines every one. A number, or shape (R,).
    """
    stacked = replicas_of(network) is not None
    ratios = []
    for _, layer in gaussian_layers(network):
        for block in layer.blocks():
            ratio = 1.0 - block.precision.retained_information()
            ratios.append(ratio.flatten(1) if stacked else ratio.flatten())
    return torch.cat(ratios, -1).mean(-1) if ratios else None
