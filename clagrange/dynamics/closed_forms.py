"""Closed forms for a quadratic loss at any discount, and the exact rule of discrete time."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from clagrange._checks import check_nonnegative, check_number, check_positive
from clagrange.dynamics.metrics import check_metric
from clagrange.dynamics.rules import Scalar


def decay_rate(curvature: Scalar, discount: Scalar, lr: Scalar = 1.0, loss_weight: Scalar = 1.0) -> Scalar:
    """λ = √(γ²/4 + ηkh) − γ/2 = 2ηkh/(γ + √(γ² + 4ηkh)), elementwise (Eq. 53): exact at any discount ≥ 0.

    Args:
        curvature: h ≥ 0, a number or a tensor.
        discount: γ ≥ 0, finite.
        lr: η.
        loss_weight: k.

    Example:
        >>> [round(decay_rate(1.0, discount), 6) for discount in (0.0, 1.0, 10.0)]
        [1.0, 0.618034, 0.09902]
    """
    stiffness = lr * loss_weight * curvature
    square = discount * discount + 4.0 * stiffness
    if isinstance(square, Tensor):
        roots = discount + square.sqrt()
        return torch.where(roots > 0, 2.0 * stiffness / roots, torch.zeros_like(roots))
    root = discount + math.sqrt(square)
    return 2.0 * stiffness / root if root > 0 else 0.0


def decay_matrix(
    hessian: Tensor,
    *,
    discount: float,
    metric: Tensor | None = None,
    lr: float = 1.0,
    loss_weight: float = 1.0,
) -> Tensor:
    """Λ = (γ²/4 + ηkG⁻¹H)^{1/2} − γ/2, (n, n): the paths of a quadratic loss are e^{−Λt} (Eqs. 6, 82)."""
    return _spectral(
        hessian, metric, lambda h: torch.as_tensor(decay_rate(h, discount, lr, loss_weight)), inverse=False
    )


def optimal_step(
    gradient: Tensor,
    hessian: Tensor,
    *,
    duration: float,
    discount: float,
    metric: Tensor | None = None,
    lr: float = 1.0,
    loss_weight: float = 1.0,
) -> Tensor:
    """Δθ = −[I − e^{−Λ·duration}]H⁻¹g: the optimal step on a local quadratic, exact at any discount (Eqs. 6, 82).

    Its limits: the Newton step −H⁻¹g (duration → ∞), −(ηk/γ)·duration·G⁻¹g (overdamped; also the value along
    directions without curvature when γ > 0), and −√(ηk)·duration·(G#H)⁻¹g (ballistic).

    Args:
        gradient: g, (n,).
        hessian: H, (n, n), or its diagonal (n,); positive semi-definite.
        duration: Δt > 0, infinity for the Newton step.
        discount: γ ≥ 0.
        metric: G, (n, n) or (n,); None is Euclidean.
        lr: η.
        loss_weight: k.

    Raises:
        ValueError: for a singular Hessian when the step is infinite (a Newton step) or the discount is 0; for a
            Hessian with a negative eigenvalue; for a metric that is not positive definite.

    Example:
        >>> g, H = torch.tensor([1.0, 2.0]), torch.diag(torch.tensor([1.0, 4.0]))
        >>> optimal_step(g, H, duration=math.inf, discount=1.0)  # Newton
        tensor([-1.0000, -0.5000])
    """
    check_number("duration", duration, low=0.0, open_low=True)
    check_nonnegative("discount", discount)

    def gain(h: Tensor) -> Tensor:
        scale = float(h.abs().max())
        flat = h <= len(h) * torch.finfo(h.dtype).eps * scale
        if bool(flat.any()) and (math.isinf(duration) or discount == 0):
            reason = (
                "a Newton step −H⁻¹g needs an inverse, and along a direction without curvature the quadratic has "
                "no minimum to step to; give a finite duration"
                if math.isinf(duration)
                else "at discount 0 the step along a direction without curvature grows without bound "
                "(√(ηk/h)·duration as h → 0); give a discount > 0"
            )
            raise ValueError(
                f"hessian: expected a regular one, got smallest eigenvalue {float(h.min()):.3g} against "
                f"{scale:.3g}: {reason}, or add a prior to the Hessian"
            )
        rate = torch.as_tensor(decay_rate(h.clamp(min=0.0), discount, lr, loss_weight))
        safe = torch.where(flat, torch.ones_like(h), h)
        linear = torch.full_like(h, lr * loss_weight * (duration / discount if discount else 0.0))
        return torch.where(flat, linear, -torch.expm1(-rate * duration) / safe)

    return -_spectral(hessian, metric, gain, inverse=True) @ gradient


def geometric_mean(metric: Tensor, hessian: Tensor) -> Tensor:
    """G#H = G^{1/2}(G^{−1/2}HG^{−1/2})^{1/2}G^{1/2}, (n, n): the ballistic step is −√(ηk)Δt(G#H)⁻¹g (Eq. 10).

    Symmetric in its arguments; of diagonal ones √(G_iH_i).
    """
    return _matrix(metric) @ _spectral(hessian, metric, torch.sqrt, inverse=False)


def rotating_path(
    start: Tensor,
    minimum: Tensor,
    times: Tensor,
    *,
    curvature: float,
    rotation: float,
    discount: float,
    lr: float = 1.0,
    loss_weight: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Optimal path in the plane with drift f = q[[0, −1], [1, 0]]θ and H = hI, closed form (Eqs. 115-121).

    θ(t) = θ_∞ + e^{−λt}R(qt)(θ₀ − θ_∞), with θ_∞ = ηkh/[(ηkh + q²)² + γ²q²]·[(ηkh + q²)I + γJ]θ*.

    Args:
        start: θ₀, (2,).
        minimum: θ* of the loss, (2,).
        times: (m,).
        curvature: h > 0.
        rotation: q, radians per unit of time.
        discount: γ > 0; 0 only where the action stays finite.
        lr: η.
        loss_weight: k.

    Returns:
        The path (m, 2) and its end θ_∞ (2,).

    Raises:
        ValueError: when the action is infinite: at discount 0 with a drift that does not vanish at the end.
    """
    check_positive("curvature", curvature)
    check_finite_action(discount, moving=rotation != 0 and bool(minimum.any()))
    stiffness = lr * loss_weight * curvature
    turn = rotation * torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=minimum.dtype)
    whole = stiffness + rotation**2
    end = stiffness / (whole**2 + (discount * rotation) ** 2) * (whole * minimum + discount * turn @ minimum)
    angles = (rotation * times).unsqueeze(1)
    offset = (start - end).expand(len(times), 2)
    turned = offset * angles.cos() + offset.flip(1) * torch.tensor([-1.0, 1.0], dtype=end.dtype) * angles.sin()
    rate = decay_rate(curvature, discount, lr, loss_weight)
    return end + torch.exp(-rate * times).unsqueeze(1) * turned, end


def decaying_path(
    start: Tensor,
    minimum: Tensor,
    times: Tensor,
    *,
    hessian: Tensor,
    decay: float,
    discount: float,
    lr: float = 1.0,
    loss_weight: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Optimal path under weight decay, f = −jθ: θ(t) = (I − e^{−Λt})Bθ* + e^{−Λt}θ₀, closed form (Eqs. 122-128).

    Per eigenvector of H: λ = √(γ²/4 + ηkh + j(j + γ)) − γ/2 and B = ηkh/(ηkh + j(j + γ)). Without a decay (j = 0)
    nothing moves along directions in which kH is flat: there the path and its end are at θ₀.

    Args:
        start: θ₀, (n,).
        minimum: θ* of the loss, (n,).
        times: (m,).
        hessian: H, (n, n) or its diagonal (n,).
        decay: j ≥ 0.
        discount: γ > 0; 0 only where the action stays finite.
        lr: η.
        loss_weight: k.

    Returns:
        The path (m, n) and its end Bθ* (n,).

    Raises:
        ValueError: when the action is infinite: at discount 0 with a drift that does not vanish at the end.
    """
    check_nonnegative("decay", decay)
    check_finite_action(discount, moving=decay != 0 and bool(minimum.any()))
    values, vectors = torch.linalg.eigh(_matrix(hessian))
    pull, stiffness = decay * (decay + discount), lr * loss_weight * values
    flat = (stiffness.abs() <= _rounding(stiffness)) & (pull == 0)
    whole = torch.where(flat, torch.zeros_like(values), stiffness + pull)
    rate = torch.as_tensor(decay_rate(whole, discount))
    share = stiffness / torch.where(flat, torch.ones_like(whole), whole)
    end = vectors @ torch.where(flat, vectors.mT @ start, share * (vectors.mT @ minimum))
    decayed = torch.exp(-times.unsqueeze(1) * rate) * (vectors.mT @ (start - end))
    return end + decayed @ vectors.mT, end


def discrete_gain(rate: Scalar, retention: Scalar) -> Scalar:
    """1 − z: the exact optimal step Δθ = −(1 − z)H⁻¹g in discrete time, elementwise (theory: A.3).

    It minimises Σ_t ρ^t[(θ_{t+1} − θ_t)²/(2η) + (kh/2)(θ_{t+1} − θ*)²], a = ηkh:
    z = [1 + ρ + a − √((1 + ρ + a)² − 4ρ)]/(2ρ), in a form that loses no digits. In [0, 1) for every a ≥ 0, so
    no learning rate is too large. ρ → 0: a/(1 + a), the proximal step; ρ = 1: ≈ √a, ballistic; a ≪ (1 − ρ)²:
    a/(1 − ρ), gradient descent.

    With η → ηΔt, k → kΔt and ρ = e^{−γΔt} it tends to 1 − e^{−λΔt}: after a fixed time the error is of order Δt,
    of order Δt² at ρ = 1.

    Args:
        rate: a = ηkh ≥ 0.
        retention: ρ in [0, 1], what a cost one step later counts for.

    Example:
        >>> discrete_gain(1.0, 0.0), round(discrete_gain(1.0, 1.0), 6)
        (0.5, 0.618034)
    """
    inside = (1.0 - retention) * (1.0 - retention) + rate * (2.0 * (1.0 + retention) + rate)
    root = inside.sqrt() if isinstance(inside, Tensor) else math.sqrt(inside)
    apart = root + 1.0 - retention
    if isinstance(apart, Tensor):
        apart = torch.where(apart > 0, apart, torch.ones_like(apart))
    elif apart == 0.0:
        return 0.0
    return (rate + rate * (2.0 * (1.0 + retention) + rate) / apart) / (1.0 + retention + rate + root)


def check_finite_action(discount: float, *, moving: bool) -> None:
    """Raise ValueError at discount 0 when the path ends where staying costs something at every moment."""
    check_nonnegative("discount", discount)
    if discount == 0 and moving:
        raise ValueError(
            "discount: expected one above 0 with this drift, got 0; the drift does not vanish where the path "
            "ends, so resting there costs the same at every moment, and without a discount the action over an "
            "unbounded horizon is infinite for every path; take the limit γ → 0⁺ with one such as 1e-12"
        )


def _matrix(entries: Tensor) -> Tensor:
    return torch.diag(entries) if entries.dim() == 1 else entries


def _rounding(eigenvalues: Tensor) -> float:
    """n·eps·max|h|: about how far computed eigenvalues (n,) may be from the true ones."""
    largest = float(eigenvalues.abs().max())
    return len(eigenvalues) * torch.finfo(eigenvalues.dtype).eps * largest


def _spectral(
    hessian: Tensor, metric: Tensor | None, function: Callable[[Tensor], Tensor], *, inverse: bool
) -> Tensor:
    """f(G⁻¹H), or f(G⁻¹H)G⁻¹ when ``inverse``: G^{−1/2} f(G^{−1/2}HG^{−1/2}) G^{±1/2}, from eigenvectors."""
    matrix = _matrix(hessian)
    if metric is None:
        half = back = torch.eye(len(matrix), dtype=matrix.dtype)
    else:
        check_metric(metric)
        scales, axes = torch.linalg.eigh(_matrix(metric))
        half, back = (axes * scales**power @ axes.mT for power in (-0.5, 0.5))
    values, vectors = torch.linalg.eigh(half @ matrix @ half)
    if bool(values.min() < -max(1e-9 * float(values.abs().max()), 4.0 * _rounding(values))):
        raise ValueError(
            f"hessian: expected a positive semi-definite one, got smallest eigenvalue {float(values.min()):.3g}; "
            f"a loss that is concave along a direction is unbounded below there, and so is the action"
        )
    result: Tensor = half @ (vectors * function(values.clamp(min=0.0)) @ vectors.mT) @ (half if inverse else back)
    return result
