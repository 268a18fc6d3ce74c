"""One-step rules of the Euler-Lagrange flow of a Gaussian weight, elementwise and without state.

Notation, per weight: mean μ, precision s = 1/σ², gradient g and curvature h ≥ 0 of the mean loss per
example, prior N(μ_p, σ_p²), temperature T = τ/k, prior curvature δ = T/σ_p², discount γ per step. The step
size ``lr`` is (η/γ)·τ·Δt: the fraction by which mean and precision would relax in one step at infinite
discount. Every function also takes hyper-parameters that are tensors which broadcast against its arguments.
"""

import math

import torch
from torch import Tensor

Scalar = float | Tensor


def stable_root(rate: Scalar, discount: Scalar = math.inf) -> Scalar:
    """The decaying root λ of λ² + γλ = γ·rate: how fast an optimal path approaches its end.

    λ = √(γ²/4 + γ·rate) − γ/2 = 2·rate / (1 + √(1 + 4·rate/γ)); the second form loses no digits. The limits
    are λ = rate (γ → ∞, the overdamped flow) and λ → √(γ·rate) (γ → 0, ballistic). The other root grows and
    belongs to no learning rule.

    Args:
        rate: the overdamped rate ηkvH/γ · Δt, ≥ 0; a number or a tensor.
        discount: γ · Δt > 0.

    Returns:
        λ · Δt, of the broadcast shape.

    Source: Vastola, Gershman, Rajan (2025), Eqs. 42-53 and 82, with ηk = γ·rate/(vH).
    """
    if not isinstance(discount, Tensor) and math.isinf(discount):
        return rate
    ratio = 4.0 * rate / discount
    root = torch.sqrt(1.0 + ratio) if isinstance(ratio, Tensor) else math.sqrt(1.0 + ratio)
    return 2.0 * rate / (1.0 + root)


def relaxation_fraction(lr: Scalar, discount: Scalar = math.inf) -> Scalar:
    """1 − e^{−λ_τ}: the fraction of the way to equilibrium covered in one step, for mean and variance alike.

    Near equilibrium μ and log σ decay with the same rate λ_τ = √(γ²/4 + ητ) − γ/2, whatever the curvature.
    Here ητ·Δt² = γ·lr.

    Example:
        >>> round(relaxation_fraction(0.1), 4)
        0.0952
    """
    root = stable_root(lr, discount)
    return -torch.expm1(-root) if isinstance(root, Tensor) else -math.expm1(-root)


def relaxed_precision(
    precision: Tensor, curvature: Tensor, prior_curvature: Scalar, temperature: Scalar, fraction: Scalar
) -> Tensor:
    """s ← s + r((h + δ)/T − s): the flow s' = −(η/γ)(τs − kh − kδ), exact at infinite discount.

    At finite discount it is exact to first order around the equilibrium s* = (h + δ)/T.

    Args:
        precision: s, any shape.
        curvature: h, same shape.
        prior_curvature: δ = T/σ_p².
        temperature: T > 0.
        fraction: r in [0, 1].
    """
    return precision + fraction * ((curvature + prior_curvature) / temperature - precision)


def mean_displacement(
    gradient: Tensor,
    offset: Tensor,
    precision: Tensor,
    curvature: Tensor,
    prior_curvature: Scalar,
    temperature: Scalar,
    lr: Scalar,
    discount: Scalar = math.inf,
    trust_region: Scalar = math.inf,
) -> Tensor:
    """Δμ = −(1 − e^{−λ}) (g + δ(μ − μ_p)) / (h + δ), at most ``trust_region`` posterior standard deviations.

    λ is the stable root for the overdamped rate lr·σ²(h + δ)/T, with the variance held fixed over the step.
    For a small rate Δμ ≈ −lr·σ²/T·(g + δ(μ − μ_p)): the mean moves along the covariance. For a large one it
    is a Newton step, so no ``lr`` overshoots the minimum of the local quadratic.

    Args:
        gradient: g, of the mean loss per example.
        offset: μ − μ_p.
        precision: s > 0.
        curvature: h ≥ 0.
        prior_curvature: δ > 0.
        temperature: T > 0.
        lr: step size > 0.
        discount: γ > 0.
        trust_region: bound on |Δμ|·√s.
    """
    stiffness = curvature + prior_curvature
    root = stable_root(lr * stiffness / (temperature * precision), discount)
    assert isinstance(root, Tensor)
    step = torch.expm1(-root) * (gradient + prior_curvature * offset) / stiffness
    if not isinstance(trust_region, Tensor) and math.isinf(trust_region):
        return step
    bound = trust_region * precision.rsqrt()
    return step.clamp(-bound, bound)


def ornstein_uhlenbeck(
    mean: Tensor,
    prior_mean: Scalar,
    prior_deviation: Scalar,
    retained: Tensor,
    strength: Scalar,
    noise: Tensor,
) -> Tensor:
    """μ ← μ_p + a(μ − μ_p) + √(1 − a²)·σ_p·ε with a = 1 − q(1 − i): forget as much as is uncertain.

    A step of the Ornstein-Uhlenbeck process whose stationary law is the prior N(μ_p, σ_p²). A weight that the
    loss determines (i = 1) stays, one that it has let go (i = 0) is drawn afresh when q = 1.

    Args:
        mean: μ.
        prior_mean: μ_p.
        prior_deviation: σ_p.
        retained: i, the retained information in [0, 1].
        strength: q in [0, 1].
        noise: ε, standard normal, of the shape of ``mean``.
    """
    keep = 1.0 - strength * (1.0 - retained)
    return (
        prior_mean
        + keep * (mean - prior_mean)
        + torch.sqrt((1.0 - keep * keep).clamp(min=0.0)) * (prior_deviation * noise)
    )
