"""The posterior as the next prior: what Gaussian weights have learnt is kept while they learn something else."""

from collections.abc import Sequence

import torch
from torch import nn

from clagrange._checks import Number, check_nonnegative, check_replicas
from clagrange.gaussian.network import gaussian_blocks
from clagrange.replicas import replicas_of


@torch.no_grad()
def consolidate(module: nn.Module, weight: Number = 1.0, *, layers: Sequence[str] | None = None) -> None:
    """Make the posterior of every Gaussian parameter its next prior; in place.

    With the posterior N(μ, S⁻¹), and 1/σ_0² the precision of the prior from before any consolidation, the prior
    becomes N(μ, P⁻¹) with

        P = 1/σ_0² + weight·(S − 1/σ_0²)

    and the belief over the curvature starts again at 0: the data seen so far are in the prior now. What is learnt
    next has to overcome the force T·P(μ − μ_p), so weights that old tasks determine stay and others are free. It
    acts as far as the optimizer's ``prior_pull`` lets it; 1, the default, is Bayes' rule. The final posterior is
    that of all data together where the loss is quadratic and S its curvature; with a Kronecker precision the
    tasks also have to share one factor of it (else see `clagrange.gaussian.factors.merged_product`).

    A precision counts the examples through the temperature: S is that of as many as 1/T. A later change of T
    leaves the prior's precision as it is. To consolidate often within one task counts its examples again, unless
    1/T is the number of examples between two consolidations.

    Afterwards `clagrange.inject_variance` still draws what no task holds from the prior of the beginning, and
    what any task holds stays, by the retained information 1 − (1/σ_0²)/s. Weights that an intervention draws
    anew, as continual backprop does, return to that prior, and what was consolidated about them is gone.

    Args:
        module: a network with Gaussian layers.
        weight: 1 is Bayes' rule. Less forgets, at each consolidation all that was learnt before, so that k tasks
            ago counts weight^k; more counts the data as more than they are; 0 keeps no precision and moves the
            prior's mean only. A number of at least 0, or a tensor of shape (R,).
        layers: names or shell patterns of the layers; default all.

    Raises:
        ValueError: if there is no Gaussian layer (or none that ``layers`` names), or the weight is out of range.

    Source: Ritter, Botev and Barber (2018) for Kronecker factors; Nguyen et al. (2018) for diagonal Gaussians;
    Schwarz et al. (2018) for a weight below 1.

    Example:
        >>> layer = clagrange.gaussianize(nn.Linear(4, 2))
        >>> _ = layer.weight_precision.precision.fill_(10.0)  # what a task has taught
        >>> consolidate(layer)
        >>> bool((layer.weight_precision.prior_mean == layer.weight).all())
        True
        >>> float(layer.weight_precision.prior_precision.mean())
        10.0
    """
    check_nonnegative("weight", weight)
    check_replicas("weight", weight, replicas_of(module))
    with torch.inference_mode(False), torch.no_grad():  # the new prior outlives any inference mode
        for _, block in gaussian_blocks(module, layers):
            block.precision.consolidate(block.joint_mean(), weight)
