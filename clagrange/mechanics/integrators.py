"""Symplectic, damped and Langevin integrators of M θ'' = −∇L − βM θ' + noise: the reference for training runs.

A step is a pure function of position θ, velocity v and a function that gives ∇L. Tensors have any shape; further
dimensions are independent particles. A mass is one number or a tensor that broadcasts against the position.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from clagrange._checks import check_nonnegative, check_number, check_positive
from clagrange.mechanics.energy import Mass

Gradient = Callable[[Tensor], Tensor]
Step = Callable[[Tensor, Tensor, Gradient, float], tuple[Tensor, Tensor]]
"""(position, velocity, gradient, step) → (position, velocity)."""

_OUTER = 1.0 / (2.0 - 2.0 ** (1.0 / 3.0))
FOREST_RUTH = (_OUTER, 1.0 - 2.0 * _OUTER, _OUTER)
"""Lengths of the three Verlet steps of a fourth-order step, as fractions of it."""


def velocity_verlet(
    position: Tensor, velocity: Tensor, gradient: Gradient, step: float, *, mass: Mass = 1.0
) -> tuple[Tensor, Tensor]:
    """One step of velocity Verlet: half a kick, a drift, half a kick. Symplectic, of second order.

    Args:
        position: θ.
        velocity: v.
        gradient: gives ∇L(θ).
        step: h.
        mass: m.

    Example:
        >>> x, v = velocity_verlet(torch.tensor([1.0]), torch.tensor([0.0]), lambda x: x, 0.1)
        >>> x, v
        (tensor([0.9950]), tensor([-0.0997]))
    """
    velocity = velocity - 0.5 * step * gradient(position) / mass
    position = position + step * velocity
    return position, velocity - 0.5 * step * gradient(position) / mass


def forest_ruth(
    position: Tensor, velocity: Tensor, gradient: Gradient, step: float, *, mass: Mass = 1.0
) -> tuple[Tensor, Tensor]:
    """One step of fourth order: Verlet over 1.3512, −1.7024 and 1.3512 of it. Symplectic.

    Source: Forest and Ruth (1990), Yoshida (1990).

    Example:
        >>> x, v = forest_ruth(torch.tensor([1.0]), torch.tensor([0.0]), lambda x: x, 0.1)
        >>> round(float(x - math.cos(0.1)), 6)
        0.0
    """
    for fraction in FOREST_RUTH:
        position, velocity = velocity_verlet(position, velocity, gradient, fraction * step, mass=mass)
    return position, velocity


def damped_verlet(
    position: Tensor,
    velocity: Tensor,
    gradient: Gradient,
    step: float,
    *,
    damping: float,
    mass: Mass = 1.0,
) -> tuple[Tensor, Tensor]:
    """One step with friction: e^{−βh/2} on the velocity, a Verlet step, e^{−βh/2} again. Of second order.

    Args:
        position: θ.
        velocity: v.
        gradient: gives ∇L(θ).
        step: h.
        damping: β.
        mass: m.

    Example:
        >>> x, v = damped_verlet(torch.zeros(1), torch.ones(1), torch.zeros_like, 1.0, damping=math.log(4.0))
        >>> x, v
        (tensor([0.5000]), tensor([0.2500]))
    """
    decay = math.exp(-0.5 * damping * step)
    position, velocity = velocity_verlet(position, decay * velocity, gradient, step, mass=mass)
    return position, decay * velocity


def langevin(
    position: Tensor,
    velocity: Tensor,
    gradient: Gradient,
    step: float,
    *,
    damping: float,
    noise: float,
    generator: torch.Generator,
    mass: Mass = 1.0,
) -> tuple[Tensor, Tensor]:
    """One step of M dv = −(∇L + βMv)dt + √M ς dW: kick, drift, exact friction and noise, drift, kick (BAOAB).

    The stationary temperature is ς²/(2β); on a quadratic loss positions have their exact stationary variance at
    every step size, velocities up to the square of it.

    Args:
        position: θ.
        velocity: v.
        gradient: gives ∇L(θ).
        step: h.
        damping: β > 0.
        noise: ς.
        generator: the random stream, on the device of the position.
        mass: m.

    Source: Leimkuhler and Matthews (2013).

    Example:
        >>> stream = torch.Generator().manual_seed(0)
        >>> x, v = langevin(torch.zeros(2), torch.zeros(2), lambda x: x, 0.1, damping=0.5, noise=0.0,
        ...                 generator=stream)
        >>> x
        tensor([0., 0.])
    """
    velocity = velocity - 0.5 * step * gradient(position) / mass
    position = position + 0.5 * step * velocity
    decay = math.exp(-damping * step)
    spread = noise * math.sqrt(-math.expm1(-2.0 * damping * step) / (2.0 * damping))
    normal = torch.randn(velocity.shape, generator=generator, dtype=velocity.dtype, device=velocity.device)
    scale = mass.rsqrt() if isinstance(mass, Tensor) else mass**-0.5
    velocity = decay * velocity + spread * scale * normal
    position = position + 0.5 * step * velocity
    return position, velocity - 0.5 * step * gradient(position) / mass


@dataclass(frozen=True)
class Trajectory:
    """Positions and velocities at the times 0, h, 2h, …

    Attributes:
        times: (steps + 1,).
        positions: (steps + 1, ...).
        velocities: (steps + 1, ...).
    """

    times: Tensor
    positions: Tensor
    velocities: Tensor

    def energy(self, potential: Callable[[Tensor], Tensor], mass: Mass = 1.0) -> Tensor:
        """½Σm v² + L at every time, the sum over the last dimension.

        Args:
            potential: gives L of positions (..., n), of shape (...).
            mass: m.
        """
        return self.kinetic(mass) + potential(self.positions)

    def kinetic(self, mass: Mass = 1.0) -> Tensor:
        """½Σm v² at every time, the sum over the last dimension."""
        return 0.5 * (mass * self.velocities.square()).sum(-1)


def integrate(
    step_function: Step, position: Tensor, velocity: Tensor, gradient: Gradient, *, step: float, steps: int
) -> Trajectory:
    """Repeat a step.

    Args:
        step_function: `velocity_verlet`, `forest_ruth`, or another with its options filled in by
            `functools.partial`.
        position: θ at time 0.
        velocity: v at time 0.
        gradient: gives ∇L(θ).
        step: h > 0.
        steps: how many, at least 1.

    Raises:
        ValueError: if ``step`` or ``steps`` is out of its range.

    Example:
        >>> run = integrate(velocity_verlet, torch.ones(1), torch.zeros(1), lambda x: x, step=0.01, steps=100)
        >>> round(float(run.positions[-1]), 4)
        0.5403
    """
    check_positive("step", step)
    check_number("steps", steps, low=1)
    positions, velocities = [position], [velocity]
    for _ in range(steps):
        position, velocity = step_function(position, velocity, gradient, step)
        positions.append(position)
        velocities.append(velocity)
    times = step * torch.arange(steps + 1, dtype=position.dtype, device=position.device)
    return Trajectory(times, torch.stack(positions), torch.stack(velocities))


def damped(damping: float, mass: Mass = 1.0) -> Step:
    """`damped_verlet` with its friction filled in, ready for `integrate`.

    Raises:
        ValueError: if ``damping`` is negative.

    Example:
        >>> run = integrate(damped(0.5), torch.ones(1), torch.zeros(1), lambda x: x, step=0.1, steps=10)
        >>> run.positions.shape
        torch.Size([11, 1])
    """
    check_nonnegative("damping", damping)
    return partial(damped_verlet, damping=damping, mass=mass)
