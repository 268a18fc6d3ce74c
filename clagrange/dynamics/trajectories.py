"""Paths of least action between two points, by direct minimisation of the discretised action."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clagrange._checks import check_positive
from clagrange.dynamics.lagrangian import LearningLagrangian, check_path


@dataclass(frozen=True)
class Trajectory:
    """A path of least action.

    Attributes:
        times: (m,).
        positions: (m, n).
        velocities: (m, n); of a minimised path the forward differences, the last one repeated.
        action: ∫𝓛dt over these times by the left-point rule.
        iterations: how many the solver took.
    """

    times: Tensor
    positions: Tensor
    velocities: Tensor
    action: float
    iterations: int


def minimize_action(
    lagrangian: LearningLagrangian,
    start: Tensor,
    end: Tensor,
    *,
    duration: float,
    points: int = 50,
    initial: Tensor | None = None,
    tolerance: float = 1e-6,
    max_iterations: int = 10_000,
    callback: Callable[[Tensor], None] | None = None,
) -> Trajectory:
    """The path of least discretised action between two fixed ends: L-BFGS on all points between.

    It finds a local minimum, the one below the initial path. The action follows the left-point rule with forward
    differences, so the path differs from the continuous one by the first order of the step.

    Args:
        lagrangian: what to minimise.
        start: θ(0), (n,).
        end: θ(duration), (n,).
        duration: T > 0.
        points: m ≥ 3 equally spaced times, the ends included.
        initial: a path (m, n) to start from, whose ends are ignored; default the straight line.
        tolerance: of the result: largest component of the gradient of the action, per unit of time. Rounding
            sets a floor of some 1e-7 of the forces.
        max_iterations: of L-BFGS.
        callback: gets the path (m, n) after every iteration.

    Raises:
        ValueError: for arguments that do not fit.
        RuntimeError: when the minimiser ends above the tolerance.

    Example:
        >>> free = LearningLagrangian(lambda x: 0.0 * x.sum())
        >>> path = minimize_action(free, torch.zeros(1), torch.ones(1), duration=2.0, points=5)
        >>> round(path.action, 6)  # ½·(1/2)²·2
        0.25
    """
    from scipy.optimize import minimize

    check_positive("duration", duration)
    check_positive("tolerance", tolerance)
    if points < 3:
        raise ValueError(f"points: expected at least 3 (two ends and one between), got {points}")
    start, end = start.double(), end.double()
    if start.dim() != 1 or start.shape != end.shape:
        raise ValueError(
            f"start and end: expected one shape (n,), got {tuple(start.shape)} and {tuple(end.shape)}"
        )
    times = torch.linspace(0.0, duration, points, dtype=torch.float64)
    if initial is None:
        fraction = (times / duration).unsqueeze(1)
        initial = start + fraction * (end - start)
    elif initial.shape != (points, len(start)):
        raise ValueError(f"initial: expected shape {(points, len(start))}, got {tuple(initial.shape)}")
    shape, step = (points - 2, len(start)), duration / (points - 1)

    def joined(inner: Tensor) -> Tensor:
        return torch.cat([start.unsqueeze(0), inner, end.unsqueeze(0)])

    def objective(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        inner = torch.from_numpy(flat).reshape(shape).clone().requires_grad_()
        action = lagrangian.action(joined(inner), times)
        (gradient,) = torch.autograd.grad(action, inner)
        return float(action.detach()), gradient.reshape(-1).numpy()

    flat, iterations, largest = initial[1:-1].double().reshape(-1).numpy(), 0, math.inf
    while True:
        found = minimize(
            objective,
            flat,
            jac=True,
            method="L-BFGS-B",
            callback=None if callback is None else lambda x: callback(joined(torch.tensor(x).reshape(shape))),
            options={
                "maxiter": max_iterations - iterations,
                "maxfun": 4 * max_iterations,
                "maxcor": 30,
                "gtol": 0.1 * tolerance * step,
                "ftol": 0.0,
            },
        )
        iterations += int(found.nit)
        # where rounding stops the line search, the gradient itself says whether this is a minimum; if not, a
        # new start without the memory of old steps often goes on
        before, largest = largest, float(np.abs(objective(found.x)[1]).max()) / step
        if largest <= tolerance or iterations >= max_iterations or not largest < 0.9 * before:
            break
        flat = found.x
    if not largest <= tolerance:
        raise RuntimeError(
            f"minimize_action: the gradient of the action is still {largest:.3g} per unit of time after "
            f"{iterations} iterations (tolerance {tolerance:.3g}): {found.message}; raise max_iterations, start "
            f"from a nearer initial path, or check that the potential is bounded below"
        )
    positions = joined(torch.from_numpy(found.x).reshape(shape))
    return trajectory_of(lagrangian, times, positions, None, iterations)


def trajectory_of(
    lagrangian: LearningLagrangian, times: Tensor, positions: Tensor, velocities: Tensor | None, iterations: int
) -> Trajectory:
    """A `Trajectory` with its action; velocities None are taken by forward differences."""
    check_path(positions, times)
    if velocities is None:
        forward = positions.diff(dim=0) / times.diff().unsqueeze(1)
        velocities = torch.cat([forward, forward[-1:]])
    with torch.no_grad():
        action = float(lagrangian.action(positions, times))
    return Trajectory(times, positions, velocities, action, iterations)
