"""Closed forms against each other, the Riccati equation, a dynamic programme, and the equations of motion."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from clagrange.dynamics import (
    LearningLagrangian,
    LinearRule,
    decay_matrix,
    decay_rate,
    decaying_path,
    discrete_gain,
    geometric_mean,
    optimal_step,
    rotating_path,
    stable_root,
)

DISCOUNTS = [0.0, 0.3, 5.0]
MINIMUM = torch.tensor([0.4, -0.5, 1.0], dtype=torch.float64)
START = torch.tensor([1.5, 1.0, -2.0], dtype=torch.float64)
TIMES = torch.linspace(0.0, 2.0, 9, dtype=torch.float64)


def positive(seed: int, size: int = 3) -> torch.Tensor:
    factor = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return factor @ factor.mT + 0.1 * torch.eye(size)


H, G = positive(1), positive(2)


def test_decay_rates_of_the_paper() -> None:
    rates = [decay_rate(1.0, discount) for discount in (0.0, 1.0, 10.0)]
    assert rates == pytest.approx([1.0, 0.618034, 0.0990195], abs=5e-7)
    ratios = [decay_rate(4.0, discount) / rate for discount, rate in zip((0.0, 1.0, 10.0), rates, strict=True)]
    assert ratios == pytest.approx([2.0, 2.527, 3.890], abs=5e-4)


@pytest.mark.parametrize("discount", DISCOUNTS)
def test_decay_rate_solves_its_quadratic_and_is_the_stable_root(discount: float) -> None:
    h = torch.tensor([0.0, 1e-9, 0.5, 40.0], dtype=torch.float64)
    rate = decay_rate(h, discount, 0.7, 2.0)
    torch.testing.assert_close(rate**2 + discount * rate, 1.4 * h, rtol=1e-13, atol=0)
    torch.testing.assert_close(
        rate, torch.tensor([decay_rate(x, discount, 0.7, 2.0) for x in h.tolist()]).double()
    )
    if discount:
        torch.testing.assert_close(rate, stable_root(1.4 * h / discount, discount))


@pytest.mark.parametrize("discount", DISCOUNTS)
@pytest.mark.parametrize("metric", [None, G])
def test_decay_matrix_is_that_of_the_riccati_equation(discount: float, metric: torch.Tensor | None) -> None:
    settings = {"discount": discount, "metric": metric, "lr": 0.7, "loss_weight": 2.0}
    decay = decay_matrix(H, **settings)
    torch.testing.assert_close(decay, LinearRule(H, MINIMUM, **settings).decay, rtol=1e-9, atol=1e-9)
    ratio = H if metric is None else torch.linalg.solve(metric, H)
    by_hand = sqrtm(discount**2 / 4 * np.eye(3) + 1.4 * ratio.numpy()) - discount / 2 * np.eye(3)
    np.testing.assert_allclose(decay.numpy(), by_hand, atol=1e-9)


@pytest.mark.parametrize("discount", DISCOUNTS)
@pytest.mark.parametrize("metric", [None, G])
def test_optimal_step_is_on_the_path(discount: float, metric: torch.Tensor | None) -> None:
    """Eqs. 6, 82 with a metric."""
    settings = {"discount": discount, "metric": metric, "lr": 0.7, "loss_weight": 2.0}
    rule = LinearRule(H, MINIMUM, **settings)
    step = optimal_step(H @ (START - MINIMUM), H, duration=0.9, **settings)
    torch.testing.assert_close(
        START + step, rule.path(START, torch.tensor([0.9]).double())[0], rtol=1e-6, atol=1e-6
    )
    newton = optimal_step(H @ (START - MINIMUM), H, duration=math.inf, **settings)
    torch.testing.assert_close(START + newton, MINIMUM)


def test_limits_of_the_optimal_step() -> None:
    """Eq. 10: natural gradient when overdamped, geometric mean when ballistic."""
    g = H @ (START - MINIMUM)
    settings = {"metric": G, "lr": 0.7, "loss_weight": 2.0}
    overdamped = optimal_step(g, H, duration=0.2, discount=1e6, **settings)
    torch.testing.assert_close(overdamped, -1.4 * 0.2 / 1e6 * torch.linalg.solve(G, g), rtol=1e-4, atol=0)
    mean = geometric_mean(G, H)
    torch.testing.assert_close(mean, geometric_mean(H, G))
    torch.testing.assert_close(mean @ torch.linalg.solve(G, mean), H)
    diagonal = geometric_mean(torch.tensor([4.0, 1.0]).double(), torch.tensor([9.0, 2.0]).double())
    torch.testing.assert_close(diagonal, torch.diag(torch.tensor([36.0, 2.0]).double().sqrt()))
    errors = []
    for duration in (4e-3, 2e-3, 1e-3):
        ballistic = -math.sqrt(1.4) * duration * torch.linalg.solve(mean, g)
        step = optimal_step(g, H, duration=duration, discount=0.0, **settings)
        errors.append(float((step - ballistic).norm() / ballistic.norm()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(1.0, abs=0.05)
    assert math.log2(errors[1] / errors[2]) == pytest.approx(1.0, abs=0.05)


def test_direction_without_curvature_takes_a_gradient_step() -> None:
    g, flat = torch.tensor([1.0, 2.0]).double(), torch.tensor([0.0, 3.0]).double()
    step = optimal_step(g, flat, duration=0.5, discount=2.0, lr=0.1, loss_weight=3.0)
    near = optimal_step(g, flat + torch.tensor([1e-9, 0.0]), duration=0.5, discount=2.0, lr=0.1, loss_weight=3.0)
    assert float(step[0]) == pytest.approx(-0.1 * 3.0 * 0.5 / 2.0)
    torch.testing.assert_close(step, near)


@pytest.mark.parametrize("discount", [1e-12, 0.3, 5.0])
def test_rotation_and_weight_decay_against_the_riccati_equation(discount: float) -> None:
    """Eqs. 115-128."""
    start, minimum = START[:2], MINIMUM[:2]
    turn = 3.0 * torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
    rule = LinearRule(2.0 * torch.eye(2), minimum, drift=turn, discount=discount, lr=0.7, loss_weight=2.0)
    path, end = rotating_path(
        start, minimum, TIMES, curvature=2.0, rotation=3.0, discount=discount, lr=0.7, loss_weight=2.0
    )
    torch.testing.assert_close(path, rule.path(start, TIMES), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(end, rule.end, rtol=1e-8, atol=1e-8)

    rule = LinearRule(H, MINIMUM, drift=-1.5 * torch.eye(3), discount=discount, lr=0.7, loss_weight=2.0)
    path, end = decaying_path(
        START, MINIMUM, TIMES, hessian=H, decay=1.5, discount=discount, lr=0.7, loss_weight=2.0
    )
    torch.testing.assert_close(path, rule.path(START, TIMES), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(end, rule.end, rtol=1e-8, atol=1e-8)


def test_riccati_paths_solve_the_equations_of_motion_and_the_hjb_equation() -> None:
    """A general drift and metric: residual zero by automatic differentiation; γV = kL + fᵀ∇V − (η/2)∇VᵀG⁻¹∇V."""
    drift = torch.tensor([[-0.2, 1.0, 0.0], [-0.4, -0.1, 0.3], [0.0, 0.2, -0.5]], dtype=torch.float64)
    settings = {"metric": G, "discount": 0.6, "lr": 0.7, "loss_weight": 2.0}
    rule = LinearRule(H, MINIMUM, drift=drift, **settings)
    lagrangian = LearningLagrangian(
        lambda x: 0.5 * (x - MINIMUM) @ H @ (x - MINIMUM), drift=lambda x: drift @ x, **settings
    )
    x = rule.path(START, TIMES)
    v = rule.velocity(x)
    residual = lagrangian.residual(x, v, -v @ rule.decay.mT)
    torch.testing.assert_close(residual, torch.zeros_like(residual), atol=1e-9, rtol=0)
    torch.testing.assert_close(lagrangian.energy(x, v), -0.6 * rule.cost(x))  # γV = −E
    cost = torch.stack([torch.func.grad(rule.cost)(point) for point in x])
    f = x @ drift.mT
    left = 0.6 * rule.cost(x)
    right = lagrangian.potential(x) + (f * cost).sum(1) - 0.35 * (cost * torch.linalg.solve(G, cost.mT).mT).sum(1)
    torch.testing.assert_close(left, right)


def test_cost_is_the_action_of_the_path() -> None:
    rule = LinearRule(H, MINIMUM, drift=-0.5 * torch.eye(3), discount=0.6)
    lagrangian = LearningLagrangian(
        lambda x: 0.5 * (x - MINIMUM) @ H @ (x - MINIMUM), drift=lambda x: -0.5 * x, discount=0.6
    )
    values = []
    for points in (8001, 16001):
        times = torch.linspace(0.0, 50.0, points, dtype=torch.float64)
        values.append(float(lagrangian.action(rule.path(START, times), times)))
    extrapolated = 2 * values[1] - values[0]
    assert extrapolated == pytest.approx(float(rule.cost(START)), rel=1e-4)
    free = LinearRule(torch.ones(1), torch.zeros(1), discount=0.0, lr=0.5)
    assert float(free.cost(torch.tensor([3.0]))) == pytest.approx(math.sqrt(0.5) * 9 / (2 * 0.5))


@pytest.mark.parametrize("retention", [0.0, 0.4, 0.9, 1.0])
@pytest.mark.parametrize("rate", [1e-8, 0.3, 2.0, 1e6])
def test_discrete_gain_solves_the_dynamic_programme(rate: float, retention: float) -> None:
    """Value iteration of W = min over the next point; independent of any formula for z."""
    value = 0.0  # W(x) = value·x²/(2η), costs (Δ²)/(2η) + (rate/(2η))(next)² + ρ·W(next)
    for _ in range(200_000 if rate < 1e-3 else 2000):
        held = rate + retention * value
        new = held / (1 + held)
        if abs(new - value) < 1e-17:
            break
        value = new
    gain = discrete_gain(rate, retention)
    assert gain == pytest.approx(value, rel=1e-8)
    assert 0 < gain < 1
    tensor = discrete_gain(torch.tensor(rate, dtype=torch.float64), retention)
    assert float(tensor) == pytest.approx(gain, rel=1e-14)


def test_discrete_gain_at_nothing() -> None:
    assert discrete_gain(0.0, 1.0) == 0.0
    assert float(discrete_gain(torch.tensor(0.0), 1.0)) == 0.0
    assert discrete_gain(1e-9, 0.9) == pytest.approx(1e-8, rel=1e-6)  # gradient descent: a/(1 − ρ)
    assert discrete_gain(1e-10, 1.0) == pytest.approx(1e-5, rel=1e-4)  # ballistic: √a


@pytest.mark.parametrize(("discount", "order"), [(0.0, 2.0), (1.0, 1.0), (8.0, 1.0)])
def test_order_of_the_discrete_rule(discount: float, order: float) -> None:
    exact = math.exp(-decay_rate(1.0, discount) * 2.0)
    errors = []
    for steps in (256, 512, 1024, 2048):
        step = 2.0 / steps
        errors.append(abs((1 - discrete_gain(step**2, math.exp(-discount * step))) ** steps - exact))
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.05)


TURN = torch.tensor([[0.0, -1.0], [1.0, 0.0]])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LinearRule(torch.ones(2), torch.ones(2), drift=TURN, discount=0.0), "action.*infinite.*γ → 0⁺"),
        (
            lambda: rotating_path(
                torch.ones(2), torch.ones(2), torch.ones(1), curvature=1.0, rotation=1.0, discount=0.0
            ),
            "action.*infinite",
        ),
        (
            lambda: decaying_path(
                torch.ones(2), torch.ones(2), torch.ones(1), hessian=torch.ones(2), decay=1.0, discount=0.0
            ),
            "action.*infinite",
        ),
        (lambda: LinearRule(torch.tensor([1.0, 0.0]), torch.ones(2), discount=0.0), "no stabilising solution"),
        (
            lambda: LinearRule(torch.ones(2), torch.ones(2), metric=-torch.ones(2), discount=1.0),
            "positive definite",
        ),
        (lambda: LinearRule(torch.ones(2), torch.ones(2), metric=torch.ones(3), discount=1.0), "shape"),
        (
            lambda: optimal_step(torch.ones(2), torch.tensor([1.0, 0.0]), duration=math.inf, discount=1.0),
            "a Newton step −H⁻¹g needs an inverse",
        ),
        (
            lambda: optimal_step(torch.ones(2), torch.tensor([1.0, 0.0]), duration=1.0, discount=0.0),
            "at discount 0 the step along a direction without curvature grows",
        ),
        (
            lambda: optimal_step(torch.ones(2), torch.tensor([1.0, -1.0]), duration=1.0, discount=1.0),
            "concave along a direction is unbounded below",
        ),
        (
            lambda: optimal_step(
                torch.ones(2), torch.ones(2), metric=torch.tensor([1.0, 0.0]), duration=1.0, discount=1.0
            ),
            "positive definite",
        ),
    ],
)
def test_refusals(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_no_discount_with_a_drift_that_ends_at_rest_is_fine() -> None:
    rule = LinearRule(torch.ones(2), torch.zeros(2), drift=TURN, discount=0.0)
    assert torch.equal(rule.end, torch.zeros(2, dtype=torch.float64))


def test_a_flat_direction_stays_where_it_is() -> None:
    rule = LinearRule(torch.tensor([0.0, 1.0]), torch.tensor([5.0, -0.5]), discount=0.5)
    end = rule.path(torch.tensor([3.0, 3.0]), torch.tensor([200.0]))[0]
    torch.testing.assert_close(end, torch.tensor([3.0, -0.5], dtype=torch.float64))


@pytest.mark.parametrize("discount", [0.0, 0.5])
def test_a_flat_direction_stays_without_a_weight_decay(discount: float) -> None:
    """Also where the Hessian is flat to rounding only."""
    start, minimum, times = (
        torch.tensor(values).double() for values in ([3.0, 3.0], [5.0, -0.5], [0.0, 1.0, 80.0])
    )
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64)
    settings = {"decay": 0.0, "discount": discount}
    straight, end = decaying_path(start, minimum, times, hessian=torch.tensor([0.0, 1.0]).double(), **settings)
    torch.testing.assert_close(end, torch.tensor([3.0, -0.5]).double())
    torch.testing.assert_close(straight[:, 0], torch.full((3,), 3.0).double())
    torch.testing.assert_close(straight[:, 1], -0.5 + 3.5 * torch.exp(-decay_rate(1.0, discount) * times))
    hessian = turn @ torch.diag(torch.tensor([0.0, 1.0]).double()) @ turn.mT
    turned, end_turned = decaying_path(turn @ start, turn @ minimum, times, hessian=hessian, **settings)
    torch.testing.assert_close(turned, straight @ turn.mT)
    torch.testing.assert_close(end_turned, turn @ end)
    for curvature, weight in ((0.0, 1.0), (1.0, 0.0)):
        nothing = {"hessian": torch.full((2,), curvature).double(), "loss_weight": weight}
        still, end = decaying_path(start, minimum, times, **nothing, **settings)
        assert torch.equal(still, start.expand(3, 2))
        assert torch.equal(end, start)


@pytest.mark.parametrize("size", [4, 20, 200])
def test_singular_hessians_in_single_precision(size: int) -> None:
    """Their smallest eigenvalues come out a little below 0."""
    for seed in range(20):
        root = torch.randn(size, 2, generator=torch.Generator().manual_seed(seed))
        step = optimal_step(torch.ones(size), root @ root.T, duration=1.0, discount=1.0)
        exact = optimal_step(
            torch.ones(size).double(), root.double() @ root.double().T, duration=1.0, discount=1.0
        )
        torch.testing.assert_close(step.double(), exact, rtol=1e-3, atol=1e-3)
    below = torch.diag(torch.tensor([1.0, 1.0, -1e-4]))
    with pytest.raises(ValueError, match="positive semi-definite"):
        decay_matrix(below, discount=1.0)
