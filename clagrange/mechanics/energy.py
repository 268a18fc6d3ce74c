"""Energy of a training run and the laws by which it should change: pure functions.

Momentum descent θ_{k+1} = θ_k + m(θ_k − θ_{k−1}) − ε M⁻¹∇L is the motion M θ'' = −βM θ' − ∇L seen at the times
t = k√ε, with friction β = (1 − m)/√ε. Its energy is kinetic, ½θ'ᵀMθ', plus potential, L.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from clagrange._checks import check_fraction, check_nonnegative, check_number, check_positive

Mass = float | Tensor
"""One number, or a tensor that broadcasts against what it weighs."""

Metric = Callable[[Tensor, Tensor], Tensor]
"""(parameter, vector of its shape) → metric times vector."""


def dot(a: Tensor, b: Tensor, mass: Mass = 1.0) -> Tensor:
    """Σ m·a·b, added up in float64 where the device has it.

    Example:
        >>> dot(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]), 2.0)
        tensor(22., dtype=torch.float64)
    """
    dtype = torch.float32 if a.device.type == "mps" else torch.float64
    return (mass * (a.detach() * b.detach())).sum(dtype=dtype)


def kinetic_energy(displacements: Tensor | Iterable[Tensor], step_size: float, mass: Mass = 1.0) -> float:
    """K = Σ m·(θ_{k+1} − θ_k)²/(2ε): ½‖velocity‖² when one step takes the time √ε.

    Args:
        displacements: θ_{k+1} − θ_k, of one parameter or of several.
        step_size: ε > 0.
        mass: m.

    Raises:
        ValueError: if ``step_size`` is not positive.

    Example:
        >>> kinetic_energy(torch.tensor([0.5, 1.0]), 0.125)
        5.0
    """
    check_positive("step_size", step_size)
    parts = [displacements] if isinstance(displacements, Tensor) else displacements
    return sum(float(dot(part, part, mass)) for part in parts) / (2.0 * step_size)


def midstep_potential(loss: float, work: float) -> float:
    """U = L(θ_k) + ½∇L(θ_k)·(θ_{k+1} − θ_k): the potential that belongs to the velocity of step k.

    For a quadratic loss it is ½(θ_{k+1} − θ*)ᵀH(θ_k − θ*) + L(θ*), the form in which the discrete law is exact;
    for any smooth loss it is L in the middle of the step, up to the square of the step.

    Args:
        loss: L(θ_k).
        work: ∇L(θ_k)·(θ_{k+1} − θ_k).

    Example:
        >>> midstep_potential(2.0, -0.5)
        1.75
    """
    return loss + 0.5 * work


def momentum_change(
    kinetic_before: float,
    squared_before: float,
    overlap: float,
    step_size: float,
    momentum: float,
    step_size_before: float | None = None,
) -> float:
    """I_k − I_{k−1} of momentum descent on a quadratic loss, exact in discrete time.

    I_k = ‖Δ_k‖²/(2ε) + U_k with Δ_k = θ_{k+1} − θ_k and U of `midstep_potential`. For a constant ε

        I_k − I_{k−1} = −(1 − m)/(2ε) · Δ_{k−1}·(Δ_k + Δ_{k−1}):

    friction, and nothing when m = 1. When ε changes between the steps, and the velocity that is kept is
    Δ_{k−1}/ε_{k−1} (as in `torch.optim.SGD`), the law reads
    −Δ_{k−1}·Δ_k/(2ε_k) + m(Δ_{k−1}·Δ_k + ‖Δ_{k−1}‖²)/(2ε_{k−1}) − K_{k−1}, which is what is computed.

    Args:
        kinetic_before: K_{k−1}.
        squared_before: ‖Δ_{k−1}‖², in the metric.
        overlap: Δ_{k−1}·Δ_k, in the metric.
        step_size: ε_k ≥ 0.
        momentum: m.
        step_size_before: ε_{k−1}; default ε_k.

    Example:
        >>> momentum_change(0.5, 0.5, 0.5, 0.5, momentum=1.0)
        0.0
        >>> momentum_change(0.5, 0.5, 0.5, 0.5, momentum=0.5)
        -0.5
    """
    before = step_size if step_size_before is None else step_size_before
    kept = momentum * (overlap + squared_before) / (2.0 * before) if before else 0.0
    turned = overlap / (2.0 * step_size) if step_size else 0.0
    return kept - turned - kinetic_before


def work_change(kinetic_before: float, kinetic: float, work: float, work_before: float) -> float:
    """I_k − I_{k−1} on a quadratic loss, whatever the optimizer: K_k − K_{k−1} + ½g_k·(Δ_k + Δ_{k−1}).

    The difference to the actual change is L_k − L_{k−1} − ½(g_k + g_{k−1})·Δ_{k−1}: the part of the change of the
    loss that the gradients on both sides do not explain. It is of third order in the step for a smooth loss,
    free of the choice of mass, and jumps when the data change.

    Args:
        kinetic_before: K_{k−1}.
        kinetic: K_k.
        work: g_k·Δ_k.
        work_before: g_k·Δ_{k−1}, the present gradient along the step before.

    Example:
        >>> work_change(1.0, 1.5, -0.6, -0.4)
        0.0
    """
    return kinetic - kinetic_before + 0.5 * (work + work_before)


def damping_change(kinetic: float, momentum: float) -> float:
    """−2βK dt = −2(1 − m)K: what friction takes in one step of the continuous motion.

    Example:
        >>> damping_change(2.0, momentum=0.75)
        -1.0
    """
    return -2.0 * (1.0 - momentum) * kinetic


def noise_change(variance: float, step_size: float) -> float:
    """½tr(ΣΣᵀ)dt = ½ε tr C: what gradient noise of covariance C adds in one step on average.

    Noise ξ_k in the gradient moves the velocity by −√ε ξ_k in the time √ε, so ΣΣᵀ = √ε·C.

    Args:
        variance: tr C, or tr(M⁻¹C) with a mass.
        step_size: ε.

    Example:
        >>> noise_change(4.0, 0.5)
        1.0
    """
    return 0.5 * step_size * variance


def damped_energy(energy: float, damping: float, time: float) -> float:
    """C₀·e^{−βt}: the energy of an underdamped quadratic mode after a time t, averaged over a period.

    Example:
        >>> damped_energy(8.0, 0.0, 3.0)
        8.0
    """
    check_nonnegative("damping", damping)
    return energy * math.exp(-damping * time)


def langevin_energy(dimensions: int, damping: float, noise: float) -> float:
    """E[K + L] = dς²/(2β): stationary mean energy of dv = −(∇L + βv)dt + ς dW on a quadratic loss.

    Half of it is kinetic, E‖v‖²/2 = dς²/(4β), for any loss; it is the equipartition at the temperature ς²/(2β).

    Args:
        dimensions: d.
        damping: β > 0.
        noise: ς ≥ 0.

    Raises:
        ValueError: if a number is out of its range.

    Example:
        >>> round(langevin_energy(2, damping=0.5, noise=0.3), 6)
        0.18
    """
    check_number("dimensions", dimensions, low=1)
    check_positive("damping", damping)
    check_nonnegative("noise", noise)
    return dimensions * noise**2 / (2.0 * damping)


def standardized(
    value: float, mean: float, variance: float, count: int, *, decay: float = 0.98, clip: float = 5.0
) -> tuple[float, float, float]:
    """How many running standard deviations ``value`` lies off the running mean, and mean and variance after it.

    Both are exponential averages, plain ones for the first 1/(1 − decay) values. The value that enters them is
    at most ``clip`` deviations off, so that one jump does not blind the statistic to the next.

    Args:
        value: the new number.
        mean: running mean of the numbers before.
        variance: their running variance.
        count: how many there were.
        decay: weight of the past, in [0, 1].
        clip: in standard deviations; not applied to the first ten numbers.

    Returns:
        (score, mean, variance); the score is 0 as long as there is no variance.

    Example:
        >>> score, mean, variance = standardized(5.0, 1.0, 4.0, 100)
        >>> score
        2.0
    """
    check_fraction("decay", decay)
    off = value - mean
    deviation = math.sqrt(variance)
    score = off / deviation if count > 1 and deviation > 0.0 else 0.0
    if count >= 10 and deviation > 0.0:
        off = max(-clip * deviation, min(clip * deviation, off))
    weight = max(1.0 - decay, 1.0 / (count + 1))
    return score, mean + weight * off, (1.0 - weight) * (variance + weight * off * off)
