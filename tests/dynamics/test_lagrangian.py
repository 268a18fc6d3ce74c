"""Equations by automatic differentiation against the closed expressions of the theory; energy, action."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from clagrange.dynamics import (
    GaussianFisher,
    LearningLagrangian,
    euler_lagrange_residual,
    gaussian_weights,
    minimize_action,
    settling_trajectory,
)

GAMMA, ETA, K, TAU = 0.7, 0.3, 1.7, 0.45
HESSIAN = torch.tensor([[2.0, 0.4, 0.0], [0.4, 1.0, -0.3], [0.0, -0.3, 0.5]], dtype=torch.float64)
CENTRE = torch.tensor([0.2, -1.0, 0.5], dtype=torch.float64)
SETTINGS = {"discount": GAMMA, "lr": ETA, "loss_weight": K}


def quartic(x: Tensor) -> Tensor:
    return 0.5 * (x - CENTRE) @ HESSIAN @ (x - CENTRE) + 0.1 * (x**4).sum()


def slope(x: Tensor) -> Tensor:
    return (x - CENTRE) @ HESSIAN + 0.4 * x**3


def states(size: int = 3, count: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    x, v, a = (torch.randn(count, size, generator=generator, dtype=torch.float64) for _ in range(3))
    return x, v, a


@pytest.mark.parametrize("discount", [0.0, GAMMA])
def test_euclidean_equation(discount: float) -> None:
    """Eqs. 2, 3: θ'' = γθ' + ηk∇L."""
    lagrangian = LearningLagrangian(quartic, **{**SETTINGS, "discount": discount})
    x, v, a = states()
    expected = (a - discount * v) / ETA - K * slope(x)
    torch.testing.assert_close(lagrangian.residual(x, v, a), expected)
    torch.testing.assert_close(lagrangian.acceleration(x, v), discount * v + ETA * K * slope(x))


def test_residual_of_the_discounted_lagrangian_itself() -> None:
    """The method leaves out only the factor e^{−γt}, whatever the time."""
    lagrangian = LearningLagrangian(quartic, **SETTINGS)
    x, v, a = (state[0] for state in states())
    raw = euler_lagrange_residual(lagrangian, x, v, a, time=1.3)
    torch.testing.assert_close(raw, math.exp(-GAMMA * 1.3) * lagrangian.residual(x, v, a))


def test_constant_metric() -> None:
    """Eqs. 8, 9, 91: θ'' − γθ' = ηkG⁻¹∇L."""
    metric = HESSIAN @ HESSIAN + torch.eye(3)
    x, v, _ = states()
    expected = GAMMA * v + ETA * K * torch.linalg.solve(metric, slope(x).mT).mT
    torch.testing.assert_close(
        LearningLagrangian(quartic, metric=metric, **SETTINGS).acceleration(x, v), expected
    )
    diagonal = torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close(
        LearningLagrangian(quartic, metric=diagonal, **SETTINGS).acceleration(x, v),
        GAMMA * v + ETA * K * slope(x) / diagonal,
    )


def curved_metric(x: Tensor) -> Tensor:
    return torch.eye(3, dtype=x.dtype) * (1.0 + x @ x) + 0.3 * torch.outer(x.sin(), x.sin())


def twisted_drift(x: Tensor) -> Tensor:
    return torch.stack([x[1].sin(), x[0] * x[2], -0.5 * x[0] + x[2] ** 2])


def test_state_dependent_metric_and_drift() -> None:
    """Eq. 37: G u' + (θ'·∇G)u − γGu = ½∇(uᵀGu)|_u − JᵀGu + ηk∇L, with derivatives by finite differences."""
    lagrangian = LearningLagrangian(quartic, metric=curved_metric, drift=twisted_drift, **SETTINGS)
    for x, v, a in zip(*states(), strict=True):

        def along(function, x=x):
            steps = 1e-6 * torch.eye(3, dtype=torch.float64)
            return torch.stack([(function(x + step) - function(x - step)) / 2e-6 for step in steps], dim=-1)

        G, dG, J = curved_metric(x), along(curved_metric), along(twisted_drift)
        u = v - twisted_drift(x)
        left = G @ (a - J @ v) + torch.einsum("ijk,k,j->i", dG, v, u) - GAMMA * G @ u
        right = 0.5 * torch.einsum("i,j,ijk->k", u, u, dG) - J.mT @ G @ u + ETA * K * slope(x)
        torch.testing.assert_close(lagrangian.residual(x, v, a), (left - right) / ETA, rtol=1e-7, atol=1e-7)


def test_drift_equation() -> None:
    """Eqs. 96-101: θ'' = [γ + J − Jᵀ]θ' + ηk∇L + Jᵀf − γf, and its linear form."""
    x, v, _ = states()
    J = torch.tensor([[0.1, -2.0, 0.3], [1.0, -0.4, 0.0], [0.2, 0.5, 0.6]], dtype=torch.float64)
    lagrangian = LearningLagrangian(quartic, drift=lambda theta: J @ theta, **SETTINGS)
    skew = GAMMA * torch.eye(3, dtype=torch.float64) + J - J.mT
    expected = v @ skew.mT + ETA * K * slope(x) + x @ (J.mT @ J - GAMMA * J).mT
    torch.testing.assert_close(lagrangian.acceleration(x, v), expected)


@pytest.mark.parametrize("coordinates", ["variance", "deviation", "log_deviation"])
def test_gaussian_weights(coordinates: str) -> None:
    """Eqs. 15, 16, 147 in each of the three coordinates, for a correlated Hessian."""
    n = 3
    lagrangian = gaussian_weights(HESSIAN, CENTRE, entropy_weight=TAU, coordinates=coordinates, **SETTINGS)
    m, dm, _ = states(n)
    w, dw, _ = states(n + 1)
    w, dw = 0.4 + w[:, :n].abs(), dw[:, :n]
    acceleration = lagrangian.acceleration(torch.cat([m, w], 1), torch.cat([dm, dw], 1))
    g, h = (m - CENTRE) @ HESSIAN, HESSIAN.diagonal()
    if coordinates == "variance":
        v, growth = w, dw / w
        second = GAMMA * dw + ETA * w * (K * h * w - TAU) + dw**2 / w - dm**2
    elif coordinates == "deviation":
        v, growth = w**2, 2 * dw / w
        second = GAMMA * dw + dw**2 / w - dm**2 / (2 * w) + ETA * K * w**2 / 2 * (h * w) - ETA * TAU * w / 2
    else:
        v, growth = (2 * w).exp(), 2 * dw
        second = GAMMA * dw - 0.5 * dm**2 / v + ETA * K * h / 2 * v - ETA * TAU / 2
    mean = (GAMMA + growth) * dm + ETA * K * v * g
    torch.testing.assert_close(acceleration, torch.cat([mean, second], 1))


def test_prior_shifts_curvature_and_minimum() -> None:
    """everything holds with H → H + τ/(kσ_p²)."""
    prior, centre = 2.5, torch.zeros(1, dtype=torch.float64)
    h = torch.tensor([0.8], dtype=torch.float64)
    anchored = gaussian_weights(h, centre, entropy_weight=TAU, prior_variance=prior, **SETTINGS)
    stiff = gaussian_weights(h + TAU / (K * prior), centre, entropy_weight=TAU, **SETTINGS)
    x, v, _ = states(2)
    torch.testing.assert_close(anchored.acceleration(x, v), stiff.acceleration(x, v))


def test_without_a_loss_the_prior_alone_acts() -> None:
    """U = τ·KL(q‖prior): its gradient is τ(μ − μ_p)/σ_p² and, by ℓ = ½log v, τ(v/σ_p² − 1)."""
    settings = {"entropy_weight": TAU, "prior_variance": 2.5, "prior_mean": 0.3, "discount": GAMMA}
    prior = gaussian_weights(HESSIAN, CENTRE, loss_weight=0.0, **settings)
    x = torch.tensor([0.4, -0.1, 0.2, 0.1, -0.3, 0.5], dtype=torch.float64)
    slope = torch.func.grad(prior.potential)(x)
    expected = torch.cat([(x[:3] - 0.3) / 2.5, (2.0 * x[3:]).exp() / 2.5 - 1.0])
    torch.testing.assert_close(slope, TAU * expected)


def test_fisher_metric_is_the_curvature_of_the_divergence() -> None:
    metric = GaussianFisher("variance")
    normal = torch.distributions.Normal

    def divergence(q: Tensor, p: Tensor) -> Tensor:
        return torch.distributions.kl_divergence(normal(q[0], q[1].sqrt()), normal(p[0], p[1].sqrt()))

    at = torch.tensor([0.3, 0.7], dtype=torch.float64)
    expected = torch.diag(metric(at))
    torch.testing.assert_close(torch.autograd.functional.hessian(lambda q: divergence(q, at), at), expected)
    torch.testing.assert_close(torch.autograd.functional.hessian(lambda p: divergence(at, p), at), expected)
    for coordinates in ("deviation", "log_deviation"):
        other = GaussianFisher(coordinates)
        place = other.join(*metric.split(at))
        torch.testing.assert_close(metric.join(*other.split(place)), at)
        slopes = torch.autograd.functional.jacobian(lambda p, o=other: metric.join(*o.split(p)), place)
        torch.testing.assert_close(torch.diag(other(place)), slopes.mT @ expected @ slopes)
        torch.testing.assert_close(other.entropy(place), metric.entropy(at))


@pytest.mark.parametrize("drift", [None, twisted_drift])
def test_energy_law(drift: object) -> None:
    """dE/dt = γθ'·∂𝓛/∂θ' along the equations; without drift E = T − U and the rate is 2γT."""
    lagrangian = LearningLagrangian(quartic, metric=curved_metric, drift=drift, **SETTINGS)
    x, v, _ = states()
    a = lagrangian.acceleration(x, v)
    step = 1e-6
    ahead = lagrangian.energy(x + step * v + step**2 / 2 * a, v + step * a)
    behind = lagrangian.energy(x - step * v + step**2 / 2 * a, v - step * a)
    torch.testing.assert_close((ahead - behind) / (2 * step), lagrangian.energy_rate(x, v), rtol=1e-6, atol=1e-6)
    if drift is None:
        torch.testing.assert_close(lagrangian.energy(x, v), lagrangian.kinetic(x, v) - lagrangian.potential(x))
        torch.testing.assert_close(lagrangian.energy_rate(x, v), 2 * GAMMA * lagrangian.kinetic(x, v))


def test_action_is_the_left_point_rule_and_converges_with_order_one() -> None:
    lagrangian = LearningLagrangian(lambda x: 0.5 * (x * x).sum(), discount=GAMMA)
    times = torch.tensor([0.0, 0.1, 0.4], dtype=torch.float64)
    path = torch.tensor([[1.0], [0.7], [0.6]], dtype=torch.float64)
    by_hand = (0.5 * 9.0 + 0.5) * 0.1 + math.exp(-GAMMA * 0.1) * (0.5 * (0.1 / 0.3) ** 2 + 0.5 * 0.49) * 0.3
    assert float(lagrangian.action(path, times)) == pytest.approx(by_hand, rel=1e-12)
    errors = []
    root = math.sqrt(GAMMA**2 / 4 + 1) - GAMMA / 2
    for points in (201, 401, 801, 1601):
        times = torch.linspace(0, 40.0, points, dtype=torch.float64)
        action = lagrangian.action(torch.exp(-root * times).unsqueeze(1), times)
        errors.append(abs(float(action) - root / 2))  # the cost to go λ(θ₀ − θ*)²/(2η)
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    assert orders[-1] == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: LearningLagrangian(quartic, metric=torch.tensor([1.0, -1.0, 2.0])),
            "positive definite.*no minimum",
        ),
        (lambda: LearningLagrangian(quartic, metric=torch.tensor([[1.0, 2.0], [2.0, 1.0]])), "eigenvalue -1"),
        (lambda: LearningLagrangian(quartic, metric=torch.tensor([[1.0, 2.0], [0.0, 1.0]])), "symmetric"),
        (lambda: LearningLagrangian(quartic, entropy_weight=1.0), "entropy: expected a function"),
        (lambda: LearningLagrangian(quartic, discount=-1.0), "discount: expected"),
        (lambda: gaussian_weights(torch.ones(2), torch.ones(1), discount=1.0), "hessian and minimum"),
        (lambda: GaussianFisher("sigma"), "coordinates: expected one of"),
        (
            lambda: LearningLagrangian(quartic, metric=lambda x: x).kinetic(-torch.ones(3), torch.ones(3)),
            "positive definite",
        ),
        (
            lambda: LearningLagrangian(quartic, metric=torch.ones(2)).kinetic(torch.ones(3), torch.ones(3)),
            "metric: expected one for 3 parameters",
        ),
        (lambda: LearningLagrangian(quartic).kinetic(torch.ones(3), torch.ones(2)), "one shape"),
        (lambda: LearningLagrangian(quartic).action(torch.ones(2, 3), torch.tensor([0.0, math.inf])), "finite"),
        (lambda: LearningLagrangian(quartic).action(torch.ones(2, 3), torch.ones(3)), "path and times"),
        (lambda: LearningLagrangian(quartic).overdamped_velocity(torch.ones(3)), "1/discount"),
    ],
)
def test_refusals(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


class TestMinimizeAction:
    """Direct minimisation of the discretised action."""

    def test_quadratic_between_two_ends(self) -> None:
        """Against the exact minimiser of the discrete sum, a linear system."""
        lagrangian = LearningLagrangian(lambda x: 0.5 * (x * x).sum(), discount=GAMMA)
        ends = torch.tensor([[1.0, -2.0], [0.5, 0.0]], dtype=torch.float64)
        found = minimize_action(lagrangian, *ends, duration=3.0, points=31, tolerance=1e-6)
        step, rho = 0.1, math.exp(-GAMMA * 0.1)
        matrix, right = np.zeros((29, 29)), np.zeros((29, 2))
        for i in range(29):
            # (θ_i − θ_{i−1})/ρ − (θ_{i+1} − θ_i) + Δt²θ_i = 0
            matrix[i, i] = 1 / rho + 1 + step**2
            if i:
                matrix[i, i - 1] = -1 / rho
            else:
                right[i] += ends[0].numpy() / rho
            if i < 28:
                matrix[i, i + 1] = -1
            else:
                right[i] += ends[1].numpy()
        np.testing.assert_allclose(found.positions[1:-1].numpy(), np.linalg.solve(matrix, right), atol=1e-5)
        assert found.action == pytest.approx(float(lagrangian.action(found.positions, found.times)), rel=1e-12)

    def test_bad_input_and_failure(self) -> None:
        lagrangian = LearningLagrangian(lambda x: 0.5 * (x * x).sum())
        with pytest.raises(ValueError, match="points: expected at least 3"):
            minimize_action(lagrangian, torch.ones(1), torch.ones(1), duration=1.0, points=2)
        with pytest.raises(ValueError, match="one shape"):
            minimize_action(lagrangian, torch.ones(1), torch.ones(2), duration=1.0)
        with pytest.raises(ValueError, match="initial: expected shape"):
            minimize_action(lagrangian, torch.ones(1), torch.ones(1), duration=1.0, initial=torch.ones(3, 1))
        with pytest.raises(RuntimeError, match="gradient of the action is still"):
            minimize_action(lagrangian, torch.ones(1), 3 * torch.ones(1), duration=9.0, max_iterations=1)


def test_forward_integration_is_refused_with_the_reason() -> None:
    lagrangian = LearningLagrangian(lambda x: 0.5 * (x * x).sum(), discount=1.0)
    with pytest.raises(ValueError, match=r"anti-damped.*= 1\.62 here, by 10\^35 over 50"):
        settling_trajectory(lagrangian, torch.ones(1), torch.zeros(1), velocity=-torch.ones(1), duration=50.0)
