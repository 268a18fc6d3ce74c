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


def log_variance_step(log_deviation: Tensor, equilibrium: Tensor, fraction: Scalar) -> Tensor:
    """log σ ← log σ* + (1 − r)(log σ − log σ*): exact for the linearised flow, at every discount.

    With r = `relaxation_fraction` and y = log(σ/σ*) the error of one step is of second order in y at every
    discount. `relaxed_precision`, also exact to first order in y, is exact in y at infinite discount.

    Args:
        log_deviation: log σ.
        equilibrium: log σ*, with σ*² = T/(h + δ).
        fraction: r in [0, 1].
    """
    return log_deviation + fraction * (equilibrium - log_deviation)


def log_variance_flow(log_ratio: Tensor, lr: Scalar, discount: Scalar = math.inf) -> Tensor:
    """y' for y = log(σ/σ*) when the mean rests: −λ(c)·y, the stable root λ taken at the rate c(y).

    c(y) = lr·(e^{2y} − 1)/(2y), the overdamped rate with the force at y in place of its linear form. Exact in y
    at infinite discount, y' = −(lr/2)(e^{2y} − 1); at finite discount exact to first order in y, with an error
    of second order, and with the right sign and growth for every y. (No closed form is known in between: the
    exact field solves an Abel equation; at discount 0 it is `zero_discount_flow`.)

    Args:
        log_ratio: y.
        lr: ητ/γ per step.
        discount: γ per step, > 0.

    Returns:
        Change of y per step.
    """
    small = log_ratio.abs() < 1e-30
    safe = torch.where(small, torch.ones_like(log_ratio), log_ratio)
    shape = torch.where(small, torch.ones_like(log_ratio), torch.expm1(2.0 * safe) / (2.0 * safe))
    return -stable_root(lr * shape, discount) * log_ratio


def second_order_manifold(
    offset: Tensor, log_ratio: Tensor, root: Scalar, discount: Scalar = math.inf
) -> tuple[Tensor, Tensor]:
    """x', y' on the stable manifold of the coupled mean and variance, at any discount, to second order.

    With x = (μ − μ*)/σ*, y = log(σ/σ*), the exact equations x'' − (γ + 2y')x' = κe^{2y}x and
    y'' − γy' = −½x'²e^{−2y} + (κ/2)(e^{2y} − 1), κ = ητ, and λ the `stable_root` (λ² + γλ = κ):

        x' = −λx[1 + 2y(2λ + γ)/(3λ + γ)]
        y' = −λy − λ(λ + γ)y²/(3λ + γ) + λ²x²/(2(3λ + γ))

    The last term is the motion term: variance rises because the mean moves. After a pure shift by x₀ standard
    deviations y rises to λx₀²/(8(3λ + γ)) (to this order), and the effect dies as 1/γ² for large γ.

    The error is of third order in (x, y). The field is a series: use it for |x| ≲ 1 and |y| ≲ ½, where x' has
    the right sign (1 + 2y ≥ 0); beyond, clip its arguments.

    Args:
        offset: x.
        log_ratio: y, broadcasts against ``offset``.
        root: λ = stable_root(lr, discount), the rate of both per step.
        discount: γ per step, ≥ 0; with 0 the root is √(ητ).

    Returns:
        x' and y', change per step.

    Example:
        >>> x, y = torch.tensor([2.0]), torch.tensor([0.0])
        >>> second_order_manifold(x, y, root=1.0, discount=0.0)[1]  # x²/6
        tensor([0.6667])
        >>> second_order_manifold(x, y, root=1.0)[1]
        tensor([0.])
    """
    share = root / (3.0 * root + discount)  # from 1/3 at discount 0 down to 0
    velocity = -root * offset * (1.0 + 2.0 * (1.0 - share) * log_ratio)
    growth = -root * log_ratio * (1.0 + (1.0 - 2.0 * share) * log_ratio) + 0.5 * root * share * offset.square()
    return velocity, growth


def ballistic_step(gradient: Tensor, curvature: Tensor, speed: Scalar) -> Tensor:
    """Δθ = −speed·g/√h: the limit of discount 0 and a short step.

    With speed = √(ηk)Δt this is −√(ηk)Δt·H^{−1/2}g; for the mean of a Gaussian weight speed = √(ηkv)Δt. The
    exact step −(1 − e^{−λ})g/h has λ = speed·√h at discount 0, so the error is of first order in λ, and at a
    small discount another of relative size γ/(2λ).

    Args:
        gradient: g.
        curvature: h > 0 (where it is 0 no ballistic step is finite: the loss is linear there).
        speed: √(ηk)·Δt > 0, in units of θ per root of loss.

    Source: Vastola, Gershman, Rajan (2025), Eqs. 7, 32 and 87.
    """
    return -speed * gradient * curvature.rsqrt()


def flat_direction_growth(variance: Tensor, lr: Scalar) -> Tensor:
    """v ← v·e^{lr}: how the variance of a dead weight (h = 0, no prior) grows; exact for every discount γ > 0.

    log v' = ητ/γ solves ℓ'' − γℓ' = −ητ/2 and is its one solution that does not run away. At γ = 0 growth has
    no finite optimum unless there is a prior.

    Args:
        variance: v > 0.
        lr: ητ/γ per step.
    """
    return variance * (torch.exp(lr) if isinstance(lr, Tensor) else math.exp(lr))


def zero_discount_flow(log_ratio: Tensor, speed: Scalar) -> Tensor:
    """y' = −sgn(y)·√(ητ·[½(e^{2y} − 1) − y]) for y = log(σ/σ*): exact at discount 0 while the mean rests.

    It is the first integral E = 0 of y'' = (ητ/2)(e^{2y} − 1): kinetic energy equals potential energy.

    Args:
        log_ratio: y.
        speed: √(ητ) per step, the rate at which y decays near 0.

    Returns:
        Change of y per step.
    """
    series = torch.zeros_like(log_ratio)
    for n in range(14, 1, -1):  # Σ_{n≥2} 2^{n−1} y^{n−2}/n!
        series = series * log_ratio + 2.0 ** (n - 1) / math.factorial(n)
    near = log_ratio.abs() < 0.3  # where the closed form would cancel
    far = torch.where(near, torch.ones_like(log_ratio), log_ratio)
    shape = torch.where(near, series, (0.5 * torch.expm1(2.0 * far) - far) / far.square())
    return -speed * log_ratio * torch.sqrt(shape)
