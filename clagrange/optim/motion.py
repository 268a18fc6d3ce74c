"""The motion term: variance that rises because the mean moves.

The variance equation of Gaussian weights (Eq. 16) has a force −μ'²: where the mean moves, the optimal variance
rises. Its discrete rule here is bounded for every velocity and cannot leave the range between a weight's present
precision and its prior's. What it is worth was measured by ``benchmarks/motion.py`` (figures in
``benchmarks/motion.json``):

* It follows the exact solution. After a shift of the minimum by x₀ posterior standard deviations the
  boundary-value problem gives max log σ/σ* = .040, .144, .568 at discount 0 (in units of √(ητ)) for x₀ = 1, 2, 5,
  and .0266 and .0012 at 1 and 10 for x₀ = 1; the rule gives .041, .153, .671, .0273 and .0012 in steps of 1/40 of
  the decay time (the second-order formula: .042, .167, 1.04, .0271, .0012). Its error is of first order in the
  step, and of relative order x₀² in the limit. Without the term the variance does not move at all.
* The effect dies as 1/discount², so it needs a small discount: γ of .1 per step and below at usual rates.
* The velocity is an average over the curvature's memory, not the last step. A minibatch step is mostly noise, and
  its square acts as a force even at rest: with the last step in its place accuracy fell by 1.6, 5.2 and 5.0
  points at γ = 1, .1, .01 (a pilot of 40 tasks and 4 seeds, not stored).
* On permuted digits with switches that nobody announces (24 tasks, 8 seeds) it changes little at the temperature
  that was tuned without it (6e-6: .001, .004, .004 at γ = 1, .1, .01, intervals within −.002 and .009; with a
  faster relaxation of the precision −.004, .006, .006; injection at announced switches: +.04). At a ten times
  lower temperature, where variances are small, it gains .010, .009, .040, but a higher temperature gains
  more (.64, .68 with the term, .80 at 6e-6). Nine comparisons, without a correction for their number.
* It does not by itself make variance rise at such a switch. There the gradients are large, n·g² takes them for
  curvature, and the variance falls (log variance by .34 within 200 steps at the low temperature); the term takes
  off three tenths of that fall. It does rise where the curvature estimate stays steady across the switch, as in
  noisy regression (``tests/optim/test_motion.py``).

Its cost is one more tensor per weight and seven more passes over memory: 1.2 to 1.7 times the step without it, by
the machine's load.
"""

import torch
from torch import Tensor

from clagrange.dynamics.rules import Scalar, stable_root


def motion_resistance(lr: Scalar, discount: Scalar) -> Scalar:
    """γ + 3λ per step, with λ = stable_root(lr, γ): what the squared velocity is divided by.

    A mean that approaches its end at the rate λ has a squared velocity that decays as e^{−2λt}; the bounded
    solution of ℓ'' − γℓ' − κℓ = −½μ'²/σ² answers it with ℓ' = ½(μ'/σ)²/(γ + λ + 2λ).
    """
    return discount + 3.0 * stable_root(lr, discount)


def widened_precision(precision: Tensor, prior_precision: Tensor, velocity: Tensor, resistance: Scalar) -> Tensor:
    """s ← s_p + (s − s_p)·exp(−u²s/(γ + 3λ)): the force −μ'² of Eq. 16, for one step, with u = μ' per step.

    For s ≫ s_p it is log σ ← log σ + ½u²/σ²/(γ + 3λ), the motion term λ²x²/(2(3λ + γ)) of the second-order
    stable manifold (`clagrange.dynamics.second_order_manifold`) with u = −λxσ. It is bounded for every velocity:
    a precision at or above its prior's stays there, so the variance never leaves what relaxation alone could
    reach. (Without the bound a weight that only the prior holds would run away: it moves, widens, and so moves
    faster. The exact solution exceeds the prior's variance for a moment; this rule does not.)

    Args:
        precision: s, any shape.
        prior_precision: s_p ≤ s, broadcasts.
        velocity: u, in units of the weight per step, same shape as s.
        resistance: γ + 3λ > 0, a number or a tensor that broadcasts; infinite for no effect.

    Returns:
        The new precision, between s_p and s.

    Source: Vastola, Gershman, Rajan (2025), Eq. 16; the coefficient is derived here.

    Example:
        >>> s = widened_precision(torch.tensor(4.0), torch.tensor(1.0), torch.tensor(0.5), resistance=1.0)
        >>> round(float(s), 4)  # 1 + 3/e
        2.1036
    """
    exponent = velocity.square() * precision / resistance
    # in this order rounding cannot lead below the prior
    return prior_precision + (precision - prior_precision) * torch.exp(-exponent)


def foreach_widen(
    precisions: list[Tensor],
    prior_precisions: list[Tensor],
    velocities: list[Tensor],
    steps: tuple[Tensor, ...],
    decay: float,
    resistance: float,
) -> None:
    """Average u ← decay·u + (1 − decay)·Δμ, then `widened_precision`, in place, by multi-tensor kernels."""
    torch._foreach_mul_(velocities, decay)
    torch._foreach_add_(velocities, steps, alpha=1.0 - decay)
    exponents = torch._foreach_mul(velocities, velocities)
    torch._foreach_mul_(exponents, precisions)
    torch._foreach_mul_(exponents, -1.0 / resistance)
    torch._foreach_exp_(exponents)
    torch._foreach_sub_(precisions, prior_precisions)
    torch._foreach_mul_(precisions, exponents)
    torch._foreach_add_(precisions, prior_precisions)
