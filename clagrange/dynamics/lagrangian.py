"""The learning Lagrangian: kinetic term under a metric, drift, potential, discount; its equations and energy."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import grad, jacrev, vmap

from clagrange._checks import check_nonnegative, check_positive
from clagrange.dynamics.metrics import GaussianFisher, check_metric

Function = Callable[[Tensor], Tensor]


def euler_lagrange_residual(
    lagrangian: Callable[[Tensor, Tensor, Tensor], Tensor],
    position: Tensor,
    velocity: Tensor,
    acceleration: Tensor,
    time: float | Tensor = 0.0,
) -> Tensor:
    """d/dt ∂𝓛/∂θ' − ∂𝓛/∂θ of any Lagrangian 𝓛(θ, θ', t), by automatic differentiation.

    Args:
        lagrangian: a torch function of θ (n,), θ' (n,) and t () that returns a number.
        position: θ, (n,).
        velocity: θ', (n,).
        acceleration: θ'', (n,).
        time: t.

    Returns:
        (n,), zero along a stationary path.

    Example:
        >>> oscillator = lambda x, v, t: 0.5 * (v * v).sum() - 0.5 * (x * x).sum()
        >>> euler_lagrange_residual(oscillator, torch.ones(1), torch.zeros(1), -torch.ones(1))
        tensor([0.])
    """
    moment = torch.as_tensor(time, dtype=position.dtype)

    # d/dt ∂𝓛/∂θ' = ∂/∂w [∂𝓛/∂θ·θ' + ∂𝓛/∂w·θ'' + ∂𝓛/∂t] at w = θ', with θ' and θ'' held
    def rate_along(w: Tensor) -> Tensor:
        by_x, by_w, by_t = grad(lagrangian, argnums=(0, 1, 2))(position, w, moment)
        along: Tensor = by_x @ velocity + by_w @ acceleration + by_t
        return along

    rate: Tensor = grad(rate_along)(velocity)
    force: Tensor = grad(lambda x: lagrangian(x, velocity, moment))(position)
    return rate - force


class LearningLagrangian:
    """𝓛 = e^{−γt}{ (1/2η)[θ' − f(θ)]ᵀG(θ)[θ' − f(θ)] + kL(θ) − τS(θ) }: what learning costs.

    A learning rule is a path of least action ∫𝓛dt over an unbounded horizon. The equations of such paths (Eq. 37)
    are G u' + (θ'·∇G)u − γGu = ½∇(uᵀGu) − JᵀGu + η∇U with u = θ' − f, J = ∂f/∂θ, U = kL − τS. Their friction has
    the anti-damped sign, so they are never integrated forward: `minimize_action` and `settling_trajectory` solve
    them between two ends.

    Positions and velocities are one point, (n,), or many, (…, n); functions get one point at a time (they are
    called under `torch.func.vmap`).

    Args:
        loss: L(θ), a torch function of (n,) that returns a number.
        metric: G: None (Euclidean), a constant tensor (n,) for a diagonal or (n, n), a `GaussianFisher`, or any
            torch function of θ that returns one of these shapes.
        drift: f(θ), a torch function of (n,) that returns (n,); None is no drift.
        discount: γ ≥ 0, per unit of time.
        lr: η > 0.
        loss_weight: k ≥ 0, per unit of time.
        entropy_weight: τ ≥ 0.
        entropy: S(θ); by default that of the Gaussian when the metric is a `GaussianFisher`.

    Raises:
        ValueError: for a metric that is not positive definite, or an entropic term without an entropy.

    Example:
        >>> well = LearningLagrangian(lambda x: 0.5 * (x * x).sum(), discount=0.5)
        >>> x = torch.tensor([2.0], dtype=torch.float64)
        >>> well.acceleration(x, torch.zeros_like(x))  # θ'' = γθ' + ηkθ
        tensor([2.], dtype=torch.float64)

    Source: Vastola, Gershman, Rajan (2025), Eqs. 1-3, 8-11, 35-37, 88-101, 143-147.
    """

    def __init__(
        self,
        loss: Function,
        *,
        metric: Tensor | Function | None = None,
        drift: Function | None = None,
        discount: float = 0.0,
        lr: float = 1.0,
        loss_weight: float = 1.0,
        entropy_weight: float = 0.0,
        entropy: Function | None = None,
    ) -> None:
        check_nonnegative("discount", discount)
        check_positive("lr", lr)
        check_nonnegative("loss_weight", loss_weight)
        check_nonnegative("entropy_weight", entropy_weight)
        if entropy is None and isinstance(metric, GaussianFisher):
            entropy = metric.entropy
        if entropy_weight and entropy is None:
            raise ValueError(
                f"entropy: expected a function S(θ) for entropy_weight={entropy_weight:g}, got None; give "
                f"one, or a GaussianFisher as metric, whose entropy is known"
            )
        if isinstance(metric, Tensor):
            check_metric(metric)
        self.loss = loss
        self.metric = metric
        self.drift = drift
        self.discount = float(discount)
        self.lr = float(lr)
        self.loss_weight = float(loss_weight)
        self.entropy_weight = float(entropy_weight)
        self.entropy = entropy

    # one point

    def _metric(self, position: Tensor) -> Tensor:
        """G as a matrix."""
        if self.metric is None:
            return torch.eye(len(position), dtype=position.dtype)
        found = self.metric if isinstance(self.metric, Tensor) else self.metric(position)
        found = found.to(position.dtype)
        return torch.diag(found) if found.dim() == 1 else found

    def _drift(self, position: Tensor) -> Tensor:
        return torch.zeros_like(position) if self.drift is None else self.drift(position)

    def _potential(self, position: Tensor) -> Tensor:
        value = self.loss_weight * self.loss(position)
        if self.entropy is not None and self.entropy_weight:
            value = value - self.entropy_weight * self.entropy(position)
        return value

    def _kinetic(self, position: Tensor, velocity: Tensor) -> Tensor:
        relative = velocity - self._drift(position)
        return 0.5 / self.lr * relative @ self._metric(position) @ relative

    def _undiscounted(self, position: Tensor, velocity: Tensor) -> Tensor:
        return self._kinetic(position, velocity) + self._potential(position)

    def __call__(self, position: Tensor, velocity: Tensor, time: float | Tensor = 0.0) -> Tensor:
        """𝓛 of one point, discount included: a Lagrangian for `euler_lagrange_residual`."""
        factor = torch.exp(-self.discount * torch.as_tensor(time, dtype=position.dtype))
        return factor * self._undiscounted(position, velocity)

    def _residual(self, position: Tensor, velocity: Tensor, acceleration: Tensor) -> Tensor:
        return euler_lagrange_residual(self, position, velocity, acceleration)

    def _acceleration(self, position: Tensor, velocity: Tensor) -> Tensor:
        force = self._residual(position, velocity, torch.zeros_like(position))
        solved: Tensor = torch.linalg.solve(self._metric(position), -self.lr * force)
        return solved

    def _energy(self, position: Tensor, velocity: Tensor) -> Tensor:
        momentum = grad(lambda v: self._undiscounted(position, v))(velocity)
        value: Tensor = velocity @ momentum - self._undiscounted(position, velocity)
        return value

    def _energy_rate(self, position: Tensor, velocity: Tensor) -> Tensor:
        momentum: Tensor = grad(lambda v: self._undiscounted(position, v))(velocity)
        return self.discount * velocity @ momentum

    def _overdamped(self, position: Tensor) -> Tensor:
        force = grad(self._potential)(position)
        solved: Tensor = torch.linalg.solve(self._metric(position), force)
        return self._drift(position) - self.lr / self.discount * solved

    # many points

    def _many(self, function: Callable[..., Tensor], *arguments: Tensor) -> Tensor:
        shape = arguments[0].shape
        for argument in arguments[1:]:
            if argument.shape != shape:
                raise ValueError(
                    f"position and velocity: expected tensors of one shape, got {tuple(shape)} and "
                    f"{tuple(argument.shape)}"
                )
        flat = [argument.reshape(-1, shape[-1]) for argument in arguments]
        self.check_metric_at(flat[0])
        result: Tensor = vmap(function)(*flat)
        return result.reshape(shape[:-1] + result.shape[1:])

    def check_metric_at(self, positions: Tensor) -> None:
        """Raise ValueError unless the metric is positive definite at every one of the points (m, n)."""
        if callable(self.metric):
            check_metric(vmap(self._metric)(positions.detach()))
        elif isinstance(self.metric, Tensor) and len(self.metric) != positions.shape[-1]:
            raise ValueError(
                f"metric: expected one for {positions.shape[-1]} parameters, got shape {tuple(self.metric.shape)}"
            )

    def kinetic(self, position: Tensor, velocity: Tensor) -> Tensor:
        """T = (1/2η)(θ' − f)ᵀG(θ' − f), (…,), without the discount."""
        return self._many(self._kinetic, position, velocity)

    def potential(self, position: Tensor) -> Tensor:
        """U = kL − τS, (…,), without the discount."""
        return self._many(self._potential, position)

    def residual(self, position: Tensor, velocity: Tensor, acceleration: Tensor) -> Tensor:
        """e^{γt}(d/dt ∂𝓛/∂θ' − ∂𝓛/∂θ), (…, n), by automatic differentiation: zero along a stationary path.

        With G = I and f = 0 it is (θ'' − γθ')/η − k∇L. The factor makes it independent of time.
        """
        return self._many(self._residual, position, velocity, acceleration)

    def acceleration(self, position: Tensor, velocity: Tensor) -> Tensor:
        """θ'' of the Euler-Lagrange equations, (…, n). Not to be integrated forward: see `refuse_forward`."""
        return self._many(self._acceleration, position, velocity)

    def energy(self, position: Tensor, velocity: Tensor) -> Tensor:
        """E = θ'·∂𝓛/∂θ' − 𝓛 without the discount, (…,): T − U when there is no drift.

        It obeys dE/dt = `energy_rate` along every stationary path, so it is conserved at discount 0; along a path
        of least action that comes to rest it is −U at the end, and at any discount γV = −E with V the cost to go.
        """
        return self._many(self._energy, position, velocity)

    def energy_rate(self, position: Tensor, velocity: Tensor) -> Tensor:
        """dE/dt = γθ'·∂𝓛/∂θ' (undiscounted momentum), (…,): 2γT when there is no drift."""
        return self._many(self._energy_rate, position, velocity)

    def overdamped_velocity(self, position: Tensor) -> Tensor:
        """θ' = f − (η/γ)G⁻¹∇U, (…, n): the rule of least action to leading order in 1/γ.

        Raises:
            ValueError: at discount 0, where there is no overdamped limit.
        """
        check_positive("discount", self.discount, hint="the overdamped velocity goes with 1/discount")
        return self._many(self._overdamped, position)

    def action(self, path: Tensor, times: Tensor) -> Tensor:
        """∫𝓛dt along a path by the left-point rule: Σ 𝓛(θ_i, (θ_{i+1} − θ_i)/Δt_i, t_i)·Δt_i.

        Its error is of first order in the step. Differentiable with respect to ``path``.

        Args:
            path: θ_i, (m, n) with m ≥ 2.
            times: t_i, (m,), increasing and finite.

        Raises:
            ValueError: for shapes or times that do not fit, or a metric that is not positive definite on the way.
        """
        check_path(path, times)
        steps = times.diff()
        velocities = path.diff(dim=0) / steps.unsqueeze(1)
        self.check_metric_at(path[:-1])
        return (vmap(self)(path[:-1], velocities, times[:-1]) * steps).sum()


def check_path(path: Tensor, times: Tensor) -> None:
    """Raise ValueError unless the path is (m, n) with m ≥ 2 increasing, finite times."""
    if path.dim() != 2 or times.dim() != 1 or len(path) != len(times) or len(path) < 2:
        raise ValueError(
            f"path and times: expected shapes (m, n) and (m,) with m >= 2, got {tuple(path.shape)} and "
            f"{tuple(times.shape)}"
        )
    if not bool(torch.isfinite(times).all()) or bool((times.diff() <= 0).any()):
        raise ValueError(
            "times: expected finite, increasing times, got others; an action over an unbounded horizon is given "
            "by the closed forms (LinearRule.cost) instead"
        )


def refuse_forward(lagrangian: LearningLagrangian, position: Tensor, duration: float) -> None:
    """Raise the reason why Euler-Lagrange equations are not integrated from a position and a velocity.

    Raises:
        ValueError: always; it says by which factor an error would grow.
    """
    stiffness = torch.linalg.solve(lagrangian._metric(position), jacrev(grad(lagrangian._potential))(position))
    curvature = float(torch.linalg.eigvals(stiffness).real.max())
    gamma = lagrangian.discount
    growing = gamma / 2 + math.sqrt(max(gamma**2 / 4 + lagrangian.lr * curvature, 0.0))
    raise ValueError(
        f"velocity: expected None, got one; Euler-Lagrange equations of learning are anti-damped "
        f"(θ'' = +γθ' + ηk∇L), and any error in the velocity, rounding included, grows as e^(r₊t) with "
        f"r₊ = γ/2 + √(γ²/4 + ηkh) = {growing:.3g} here, by 10^{growing * duration / math.log(10):.0f} over "
        f"{duration:.3g} units of time. Only the stable manifold is a learning rule: give the point where the "
        f"path comes to rest (settling_trajectory) or its end (minimize_action), and the velocity follows"
    )
