"""Paths of least action that come to rest, as boundary-value problems: the oracle for everything approximate."""

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clagrange._checks import check_positive
from clagrange.dynamics.lagrangian import LearningLagrangian, refuse_forward
from clagrange.dynamics.trajectories import Trajectory, trajectory_of

Array = NDArray[np.float64]


def settling_trajectory(
    lagrangian: LearningLagrangian,
    start: Tensor,
    rest: Tensor,
    *,
    duration: float | None = None,
    points: int = 400,
    tolerance: float = 1e-8,
    velocity: Tensor | None = None,
    continuation: int = 1,
) -> Trajectory:
    """The path of least action over an unbounded horizon that starts here and comes to rest there.

    Solves the Euler-Lagrange equations, derived by automatic differentiation, as a two-point boundary-value
    problem (`scipy.integrate.solve_bvp`, fourth-order collocation). At the far end the path has to lie on the
    stable subspace of the equations linearised at rest, so the cut at ``duration`` costs only what is quadratic
    in the distance left. Forward integration from a velocity is refused: the equations are anti-damped.

    Args:
        lagrangian: twice differentiable by torch.
        start: θ(0), (n,).
        rest: a stationary point of the equations, (n,): without drift one of the potential U = kL − τS.
        duration: where to cut the horizon; default 18 times the slowest decay time at rest.
        points: times of the returned path, dense where the path is fast.
        tolerance: relative residual of the collocation.
        velocity: must stay None.
        continuation: number of stages; from far away, 4 say, the start is moved out step by step.

    Returns:
        A path whose velocities solve the equations; ``action`` is over its times, by the left-point rule.

    Raises:
        ValueError: when a velocity is given; when ``rest`` is not at rest or has no stable manifold of dimension
            n; when the action is infinite (discount 0 with a drift that does not vanish at rest).
        RuntimeError: when the solver fails.

    Example:
        >>> bowl = LearningLagrangian(lambda x: 0.5 * (x * x).sum(), discount=1.0)
        >>> path = settling_trajectory(bowl, torch.tensor([2.0]), torch.tensor([0.0]))
        >>> round(-path.velocities[0].item() / 2, 6)  # decays with λ of Eq. 53
        0.618034
    """
    start, rest = start.double(), rest.double()
    if start.dim() != 1 or start.shape != rest.shape:
        raise ValueError(
            f"start and rest: expected one shape (n,), got {tuple(start.shape)} and {tuple(rest.shape)}"
        )
    if type(continuation) is not int or continuation < 1:
        raise ValueError(f"continuation: expected a whole number of at least 1, got {continuation!r}")
    check_positive("tolerance", tolerance)
    if velocity is not None:
        refuse_forward(lagrangian, start, duration or 1.0)
    if duration is not None:
        check_positive("duration", duration)
    decay, condition = _at_rest(lagrangian, rest)
    rates: Array = np.linalg.eigvals(decay).real.astype(np.float64)
    if duration is None:
        if not rates.min() > 0:
            raise ValueError(
                f"duration: expected a number, as the slowest direction at rest does not decay "
                f"(rate {rates.min():.3g}); give one"
            )
        duration = 18.0 / float(rates.min())
    times, iterations = _grid(rates, duration), 0
    states = _linear_path(decay, ((start - rest) / continuation).numpy(), rest.numpy(), times)
    for stage in range(1, continuation + 1):
        origin = rest + stage / continuation * (start - rest)
        found = _solve(lagrangian, origin, rest, condition, times, states, tolerance)
        times, states, iterations = found.x, found.y, iterations + int(found.niter)
    dense = np.interp(np.linspace(0, len(times) - 1, points), np.arange(len(times)), times)
    values = found.sol(dense)
    half = len(start)
    return trajectory_of(
        lagrangian,
        torch.from_numpy(dense),
        torch.from_numpy(values[:half].T.copy()),
        torch.from_numpy(values[half:].T.copy()),
        iterations,
    )


def _at_rest(lagrangian: LearningLagrangian, rest: Tensor) -> tuple[Array, Array]:
    """The decay matrix M of the stable subspace, θ' = −M(θ − θ*), and rows W that are 0 on that subspace."""
    from scipy.linalg import schur

    size = len(rest)
    still = torch.zeros_like(rest)
    force = lagrangian.acceleration(rest, still)
    slopes = torch.func.jacrev(lagrangian._acceleration, argnums=(0, 1))(rest, still)
    away = torch.linalg.pinv(slopes[0]) @ force
    if not bool(away.abs().max() <= 1e-6 * (1.0 + rest.abs().max())):
        raise ValueError(
            f"rest: expected a stationary point of the Euler-Lagrange equations, got one with θ'' = "
            f"{force.tolist()} at rest; minimise the potential first"
        )
    if lagrangian.discount == 0 and bool((lagrangian._drift(rest).abs() > 1e-12).any()):
        raise ValueError(
            "discount: expected one above 0 with a drift that does not vanish at rest, got 0; staying there "
            "costs the same at every moment, so the action over an unbounded horizon is infinite for every path; "
            "take the limit γ → 0⁺ with a small discount"
        )
    matrix = np.zeros((2 * size, 2 * size))
    matrix[:size, size:] = np.eye(size)
    matrix[size:, :size], matrix[size:, size:] = (slope.detach().numpy() for slope in slopes)
    middle = lagrangian.discount / 2
    _, right, stable = schur(matrix, output="real", sort=lambda re, im=0.0: re < middle)
    _, left, unstable = schur(matrix.T, output="real", sort=lambda re, im=0.0: re > middle)
    if stable != size or unstable != size:
        raise ValueError(
            f"rest: expected a point with {size} decaying directions, got {stable} at discount "
            f"{lagrangian.discount:g}; the loss has a flat or descending direction there, along which no path of "
            f"least action comes to rest"
        )
    decay = -right[size:, :size] @ np.linalg.inv(right[:size, :size])
    return decay, left[:, :size].T


def _grid(rates: Array, duration: float) -> Array:
    """Times dense at the start: the fastest rate is resolved there, the slowest to the end."""
    fastest = max(float(np.abs(rates).max()), 1.0 / duration)
    stretch = max(math.asinh(fastest * duration / 4.0), 1e-3)
    grid: Array = duration * np.sinh(stretch * np.linspace(0.0, 1.0, 200)) / math.sinh(stretch)
    return grid


def _linear_path(decay: Array, offset: Array, rest: Array, times: Array) -> Array:
    from scipy.linalg import expm

    moved = np.stack([expm(-decay * time) @ offset for time in times], axis=1)
    return np.concatenate([rest[:, None] + moved, -decay @ moved])


def _field(lagrangian: LearningLagrangian, states: Array) -> Array:
    size = len(states) // 2
    position = torch.from_numpy(np.ascontiguousarray(states[:size].T))
    velocity = torch.from_numpy(np.ascontiguousarray(states[size:].T))
    try:
        acceleration = lagrangian.acceleration(position, velocity)
    except ValueError as error:
        raise RuntimeError(
            f"settling_trajectory: the solver left the region where the metric is one; use coordinates without a "
            f"border (log_deviation for a Gaussian) or more stages (continuation): {error}"
        ) from error
    return np.concatenate([states[size:], acceleration.detach().numpy().T])


def _solve(
    lagrangian: LearningLagrangian,
    start: Tensor,
    rest: Tensor,
    condition: Array,
    times: Array,
    states: Array,
    tolerance: float,
) -> Any:
    """Scipy's solution from one first guess."""
    from scipy.integrate import solve_bvp

    size = len(start)
    target = np.concatenate([rest.numpy(), np.zeros(size)])

    def ends(first: Array, last: Array) -> Array:
        return np.concatenate([first[:size] - start.numpy(), condition @ (last - target)])

    with np.errstate(over="ignore", invalid="ignore"):
        found = solve_bvp(
            lambda _, states: _field(lagrangian, states), ends, times, states, tol=tolerance, max_nodes=50_000
        )
    if not found.success:
        raise RuntimeError(
            f"settling_trajectory: {found.message} Raise continuation (stages), loosen the tolerance, or check "
            f"that the path does not have to cross a region where the potential is below that at rest"
        )
    return found
