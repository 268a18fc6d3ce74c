"""How the discrete rules converge to exact paths: errors, orders, and the limit of infinite discount."""

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from clagrange.dynamics import (
    LearningLagrangian,
    decay_rate,
    discrete_gain,
    gaussian_weights,
    mean_displacement,
    relaxation_fraction,
    relaxed_precision,
    settling_trajectory,
)
from clagrange.optim.motion import motion_resistance, widened_precision

STEPS = (16, 32, 64, 128, 256)


def follow_rule(
    offset: float,
    precision: float,
    *,
    curvature: float,
    prior_precision: float,
    temperature: float,
    speed_squared: float,
    discount: float,
    step: float,
    steps: int,
    motion: bool,
) -> Tensor:
    """What the optimizer does with one weight whose curvature is known: μ − μ*, v at times 0, step, …

    Args:
        offset: μ − μ* at the start; the prior's mean is at the minimum.
        precision: s at the start.
        curvature: h.
        prior_precision: 1/σ_p².
        temperature: T.
        speed_squared: ητ per unit of time squared; the learning rate is ητ·step/γ.
        discount: γ per unit of time; infinite for the overdamped flow, where ητ/γ is ``speed_squared``.
        step: time of one step.
        steps: how many.
        motion: whether the motion term is on, with the velocity of the step itself.

    Returns:
        (steps + 1, 2).
    """
    overdamped = math.isinf(discount)
    lr = speed_squared * step if overdamped else speed_squared * step / discount
    per_step = math.inf if overdamped else discount * step
    fraction = relaxation_fraction(lr, per_step)
    x, s, h, weak = (
        torch.tensor(value, dtype=torch.float64) for value in (offset, precision, curvature, prior_precision)
    )
    delta = temperature * prior_precision
    rows = [torch.stack([x, 1.0 / s])]
    for _ in range(steps):
        s = relaxed_precision(s, h, delta, temperature, fraction)
        moved = mean_displacement(h * x, x, s, h, delta, temperature, lr, per_step)
        x = x + moved
        if motion:
            s = widened_precision(s, weak, moved, motion_resistance(lr, per_step))
        rows.append(torch.stack([x, 1.0 / s]))
    return torch.stack(rows)


def orders(errors: list[float]) -> list[float]:
    """log₂ of the ratios of errors at halved steps."""
    return [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]


def discrete_time_errors(discount: float, duration: float = 2.0) -> list[float]:
    """|z^{T/Δt} − e^{−λT}| of the exact discrete-time rule, h = η = k = 1, for `STEPS` steps."""
    exact = math.exp(-float(decay_rate(1.0, discount)) * duration)
    errors = []
    for steps in STEPS:
        step = duration / steps
        gain = float(discrete_gain(step * step, math.exp(-discount * step)))
        errors.append(abs((1.0 - gain) ** steps - exact))
    return errors


def overdamped_errors(duration: float = 2.0) -> list[float]:
    """The optimizer's rule at infinite discount against the exact flow (Eq. 148), from (3σ*, s = 4s*).

    The larger of the errors in (μ − μ*)/σ* and v/v*, for `STEPS` steps. Precisions relax exactly; means see the
    variance at the end of each step.
    """
    start = 4.0
    grown = math.exp(duration)
    ends = [3.0 * start / (grown + start - 1.0), 1.0 / (1.0 + (start - 1.0) / grown)]
    exact = torch.tensor(ends, dtype=torch.float64)
    errors = []
    for steps in STEPS:
        path = follow_rule(
            3.0,
            start,
            curvature=1.0,
            prior_precision=0.0,
            temperature=1.0,
            speed_squared=1.0,
            discount=math.inf,
            step=duration / steps,
            steps=steps,
            motion=False,
        )
        errors.append(float((path[-1] - exact).abs().max()))
    return errors


def distance_errors(discount: float, sizes: tuple[float, ...] = (0.4, 0.2, 0.1)) -> list[float]:
    """The optimizer's rule with a short step at finite discount, against exact paths from (x, y) = size·(1, ½).

    The error of (x, y) after one decay time. At finite discount the rule does not tend to the exact path as the
    step shrinks: it is exact to first order in the distance from equilibrium, so this falls as size².
    """
    one = torch.ones(1, dtype=torch.float64)
    lagrangian = gaussian_weights(one, torch.zeros(1), discount=discount)
    rate, steps = float(decay_rate(1.0, discount)), 1000
    errors = []
    for size in sizes:
        start = torch.tensor([size, 0.5 * size], dtype=torch.float64)
        path = settling_trajectory(lagrangian, start, torch.zeros(2), points=4000)
        after = int(torch.searchsorted(path.times, 1.0 / rate))
        part = (1.0 / rate - path.times[after - 1]) / (path.times[after] - path.times[after - 1])
        exact = torch.lerp(path.positions[after - 1], path.positions[after], part)
        end = follow_rule(
            size,
            math.exp(-size),
            curvature=1.0,
            prior_precision=0.0,
            temperature=1.0,
            speed_squared=1.0,
            discount=discount,
            step=1.0 / rate / steps,
            steps=steps,
            motion=True,
        )[-1]
        errors.append(float((torch.stack([end[0], 0.5 * end[1].log()]) - exact).norm()))
    return errors


def mesu_velocity(
    mean: Tensor,
    deviation: Tensor,
    *,
    curvature: float,
    examples: float,
    prior_mean: float,
    prior_variance: float,
) -> tuple[Tensor, Tensor]:
    """Δμ and Δσ of MESU for the cost C = ½h(μ² + σ²): the published update, N = ``examples``.

    Source: Bonnet et al. (2025), arXiv 2504.13569.
    """
    mean_step = -deviation.square() * (curvature * mean + (mean - prior_mean) / (examples * prior_variance))
    width_step = -0.5 * deviation.square() * curvature * deviation + deviation * (
        prior_variance - deviation.square()
    ) / (2.0 * examples * prior_variance)
    return mean_step, width_step


def mesu_differences(discount: float = 2000.0) -> dict[str, Any]:
    """How far the vector field at γ → ∞ is from MESU's (ηk/γ = 1, N = k/τ), relative to its largest value.

    Compared are the overdamped field on a grid, and the initial velocity of exact paths (boundary-value problems)
    at two discounts and extrapolated from these to 1/γ = 0; their difference falls as 1/γ.
    """
    settings: dict[str, Any] = {"entropy_weight": 0.25, "prior_variance": 2.0, "prior_mean": 0.3}
    curvature, weight, prior_variance, prior_mean = 0.8, *settings.values()

    def lagrangian(gamma: float) -> LearningLagrangian:
        hessian = torch.tensor([curvature], dtype=torch.float64)
        minimum = torch.zeros_like(hessian)
        return gaussian_weights(hessian, minimum, discount=gamma, lr=gamma, coordinates="deviation", **settings)

    def published(positions: Tensor) -> Tensor:
        steps = mesu_velocity(
            positions[:, 0],
            positions[:, 1],
            curvature=curvature,
            examples=1.0 / weight,
            prior_mean=prior_mean,
            prior_variance=prior_variance,
        )
        return torch.stack(steps, dim=1)

    mean, deviation = (torch.linspace(*ends, 21, dtype=torch.float64) for ends in ((-2.0, 2.0), (0.1, 2.0)))
    points = torch.cartesian_prod(mean, deviation)
    field = published(points)
    overdamped = (lagrangian(discount).overdamped_velocity(points) - field).abs().max() / field.abs().max()

    stiffness = curvature + weight / prior_variance
    centre = weight * prior_mean / prior_variance / stiffness
    rest = torch.tensor([centre, math.sqrt(weight / stiffness)], dtype=torch.float64)
    start = rest + torch.tensor([1.0, 0.4])
    near, far = (
        settling_trajectory(lagrangian(gamma), start, rest, tolerance=1e-9).velocities[0]
        for gamma in (discount, 2.0 * discount)
    )
    target = published(start.unsqueeze(0))[0]
    exact = [float((velocity - target).norm() / target.norm()) for velocity in (near, far, 2.0 * far - near)]
    return {
        "examples": 1.0 / weight,
        "overdamped_field": float(overdamped),
        "exact_at_discounts": {f"{discount:g}": exact[0], f"{2.0 * discount:g}": exact[1]},
        "exact_extrapolated": exact[2],
    }
