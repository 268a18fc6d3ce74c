"""The learning Lagrangian of Gaussian weights on a quadratic loss: section 6 of the theory as one function."""

import math

import torch
from torch import Tensor

from clagrange._checks import check_positive
from clagrange.dynamics.lagrangian import LearningLagrangian
from clagrange.dynamics.metrics import GaussianFisher


def gaussian_weights(
    hessian: Tensor,
    minimum: Tensor,
    *,
    discount: float,
    lr: float = 1.0,
    loss_weight: float = 1.0,
    entropy_weight: float = 1.0,
    prior_variance: float = math.inf,
    prior_mean: float = 0.0,
    coordinates: str = "log_deviation",
) -> LearningLagrangian:
    """𝓛 = e^{−γt}{ (1/2η)Σ[μ'²/v + v'²/(2v²)] + k⟨L⟩ + τ·KL(q‖prior) } with ⟨L⟩ of a quadratic (Eqs. 143-147).

    ⟨L⟩ = ½(μ − μ*)ᵀH(μ − μ*) + ½ΣH_ii v_i. Without a prior the last term is the bare −(τ/2)Σ log v. Its
    Euler-Lagrange equations, without a prior and in (μ, v), are

        μ'' − (γ + v'/v)μ' = ηkv H(μ − μ*)
        v'' − γv' = ηv(kH_ii v − τ) + v'²/v − μ'²

    and a pure shift of the minimum makes v rise through −μ'². At infinite discount they are the updates of MESU
    with N = k/τ. At rest v = τ/(kH_ii + τ/σ_p²).

    Args:
        hessian: H, (n, n), or its diagonal (n,).
        minimum: μ*, (n,).
        discount: γ ≥ 0.
        lr: η.
        loss_weight: k ≥ 0; at 0 the prior alone acts.
        entropy_weight: τ > 0.
        prior_variance: σ_p²; infinity for none.
        prior_mean: μ_p.
        coordinates: of the widths, as for `GaussianFisher`; positions are (μ_1, …, μ_n, w_1, …, w_n).

    Raises:
        ValueError: for shapes that do not fit, or numbers out of range.

    Example:
        >>> one = gaussian_weights(torch.ones(1), torch.zeros(1), discount=0.0)
        >>> moving, width = torch.tensor([0.0, 0.0]), torch.tensor([1.0, 0.0])
        >>> one.acceleration(moving, width)  # at rest but for μ' = 1: ℓ'' = −½μ'²
        tensor([ 0.0000, -0.5000])
    """
    check_positive("entropy_weight", entropy_weight)
    metric = GaussianFisher(coordinates)
    matrix = torch.diag(hessian) if hessian.dim() == 1 else hessian
    if minimum.dim() != 1 or matrix.shape != (len(minimum), len(minimum)):
        raise ValueError(
            f"hessian and minimum: expected shapes (n, n) or (n,), and (n,), got {tuple(hessian.shape)} and "
            f"{tuple(minimum.shape)}"
        )

    def expected_loss(position: Tensor) -> Tensor:
        mean, variance = metric.split(position)
        offset = mean - minimum.to(position.dtype)
        curved = matrix.to(position.dtype)
        value: Tensor = 0.5 * (offset @ curved @ offset + curved.diagonal() @ variance)
        return value

    def against_the_prior(position: Tensor) -> Tensor:  # −KL(q‖prior), up to a constant
        mean, variance = metric.split(position)
        anchored = (variance + (mean - prior_mean).square()).sum() / prior_variance
        return metric.entropy(position) - 0.5 * anchored

    return LearningLagrangian(
        expected_loss,
        metric=metric,
        discount=discount,
        lr=lr,
        loss_weight=loss_weight,
        entropy_weight=entropy_weight,
        entropy=None if math.isinf(prior_variance) else against_the_prior,
    )
