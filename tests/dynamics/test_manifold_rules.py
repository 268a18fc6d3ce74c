"""One-step rules around the stable manifold: what is exact, and the measured order of what is not."""

import itertools
import math

import pytest
import torch

from clagrange.dynamics import (
    LinearRule,
    ballistic_step,
    decay_rate,
    flat_direction_growth,
    gaussian_weights,
    log_variance_flow,
    log_variance_step,
    mean_displacement,
    optimal_step,
    relaxation_fraction,
    relaxed_precision,
    second_order_manifold,
    settling_trajectory,
    stable_root,
    zero_discount_flow,
)

DISCOUNTS = [0.0, 1.0, 10.0]
KAPPA = 1.0
"""ητ; the learning rate per unit of time is κ/γ."""


def number(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def exact_velocity(x: float, y: float, discount: float) -> torch.Tensor:
    """x', y' at the start of the exact path, from the boundary-value problem in x = μ/σ*, y = log(σ/σ*)."""
    lagrangian = gaussian_weights(torch.ones(1), torch.zeros(1), discount=discount)
    start = torch.tensor([x, y], dtype=torch.float64)
    return settling_trajectory(lagrangian, start, torch.zeros(2), tolerance=1e-10).velocities[0]


def measured_order(errors: list[float]) -> list[float]:
    return [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]


@pytest.mark.parametrize("discount", DISCOUNTS)
def test_second_order_manifold_errs_in_the_third_order(discount: float) -> None:
    rate = decay_rate(KAPPA, discount)
    errors = []
    for size in (0.4, 0.2, 0.1):
        found = torch.stack(second_order_manifold(number(size), number(0.5 * size), rate, discount))
        errors.append(float((found - exact_velocity(size, 0.5 * size, discount)).norm()))
    assert all(order == pytest.approx(3.0, abs=0.3) for order in measured_order(errors)), errors


@pytest.mark.parametrize("rate", [0.3, 2.0])
def test_second_order_manifold_at_infinite_discount(rate: float) -> None:
    """To second order of the overdamped flow x' = −λe^{2y}x, y' = −(λ/2)(e^{2y} − 1); no motion term."""
    x, y = torch.tensor([0.7, -0.2]).double(), torch.tensor([0.01, -0.01]).double()
    dx, dy = second_order_manifold(x, y, rate)
    torch.testing.assert_close(dx, -rate * x * torch.exp(2 * y), rtol=0, atol=2e-4 * rate)
    torch.testing.assert_close(dy, -rate / 2 * torch.expm1(2 * y), rtol=0, atol=2e-6 * rate)


def test_motion_term() -> None:
    """At y = 0 only the motion term is left; it dies as 1/γ²."""
    for discount in (0.0, 0.5, 3.0):
        rate = decay_rate(KAPPA, discount)
        _, growth = second_order_manifold(number(1.3), number(0.0), rate, discount)
        assert float(growth) == pytest.approx(rate**2 * 1.3**2 / (2 * (3 * rate + discount)), rel=1e-12)
    terms = [
        float(second_order_manifold(number(1.0), number(0.0), decay_rate(KAPPA, g), g)[1]) * g for g in (1e3, 2e3)
    ]
    assert terms[0] / terms[1] == pytest.approx(4.0, rel=1e-4)  # of y' over λ ~ 1/γ: 1/γ²


@pytest.mark.parametrize("discount", [0.5, 5.0])
def test_order_of_log_variance_step_and_relaxed_precision_in_the_distance(discount: float) -> None:
    """Both are exact to first order in y: errors of one step fall as y²."""
    step, target = 0.7, number(-0.4)
    lr, per_step = KAPPA * step / discount, discount * step
    fraction = relaxation_fraction(lr, per_step)
    lagrangian = gaussian_weights(torch.ones(1), torch.zeros(1), discount=discount)
    errors: dict[str, list[float]] = {"log": [], "precision": []}
    for y in (0.2, 0.1, 0.05):
        # the exact y after one step: the time that an exact path needs from y, on a dense grid
        path = settling_trajectory(
            lagrangian, torch.tensor([0.0, y]), torch.zeros(2), tolerance=1e-10, points=4000
        )
        after = int(torch.searchsorted(path.times, step))
        part = (step - path.times[after - 1]) / (path.times[after] - path.times[after - 1])
        exact = torch.lerp(path.positions[after - 1, 1], path.positions[after, 1], part)
        errors["log"].append(float((log_variance_step(target + y, target, fraction) - target - exact).abs()))
        curvature = torch.exp(-2 * target)
        precision = relaxed_precision(curvature * math.exp(-2 * y), curvature, 0.0, 1.0, fraction)
        errors["precision"].append(float((-0.5 * precision.log() - target - exact).abs()))
    for name, found in errors.items():
        assert all(order == pytest.approx(2.0, abs=0.25) for order in measured_order(found)), (name, found)


def test_log_variance_step_is_exact_for_the_linearised_flow() -> None:
    """Kinetic metric 2, potential curvature 2τ in log σ: its decay is λ_τ, so steps compose."""
    rate = float(LinearRule(torch.tensor([2.0]), torch.zeros(1), metric=torch.tensor([2.0]), discount=0.8).decay)
    fraction = relaxation_fraction(0.3 / 0.8, 0.3 * 0.3 * 0.8 / 0.3)
    assert fraction == pytest.approx(1 - math.exp(-stable_root(0.3 / 0.8, 0.24)), rel=1e-12)
    one = relaxation_fraction(KAPPA * 0.5 / 0.8, 0.8 * 0.5)
    assert one == pytest.approx(1 - math.exp(-rate * 0.5), rel=1e-12)
    half = relaxation_fraction(KAPPA * 0.25 / 0.8, 0.8 * 0.25)
    start, end = number(1.7), number(-0.3)
    twice = log_variance_step(log_variance_step(start, end, half), end, half)
    torch.testing.assert_close(twice, log_variance_step(start, end, one), rtol=1e-12, atol=0)


@pytest.mark.parametrize("discount", [0.5, 5.0])
def test_order_of_log_variance_flow(discount: float) -> None:
    errors = []
    for y in (0.1, 0.05, 0.025):
        flow = log_variance_flow(number(y), KAPPA / discount, discount)
        errors.append(abs(float(flow) - float(exact_velocity(0.0, y, discount)[1])))
    assert all(order == pytest.approx(2.0, abs=0.2) for order in measured_order(errors)), errors


def test_log_variance_flow_at_infinite_discount_and_at_zero() -> None:
    y = torch.tensor([-3.0, -1e-40, 0.0, 1e-12, 2.0], dtype=torch.float64)
    torch.testing.assert_close(log_variance_flow(y, 0.3), -0.15 * torch.expm1(2 * y))
    assert float(log_variance_flow(number(0.0), 0.3, 2.0)) == 0.0


def test_zero_discount_flow_in_single_precision_and_near_zero() -> None:
    y = torch.tensor([-4.0, -0.31, -0.29, -1e-3, -1e-9, 0.0, 1e-9, 0.29, 0.31, 3.0], dtype=torch.float64)
    flow = zero_discount_flow(y, 0.6)
    energy = flow**2 - 0.36 * (0.5 * torch.expm1(2 * y) - y)  # the first integral
    assert float(energy.abs().max()) < 1e-12 * float((flow**2).max())
    assert bool((flow * y <= 0).all())
    torch.testing.assert_close(flow[4:7], -0.6 * y[4:7], rtol=1e-8, atol=0)
    torch.testing.assert_close(zero_discount_flow(y.float(), 0.6), flow.float(), rtol=2e-5, atol=0)


def test_flat_direction_growth_solves_the_equations() -> None:
    """No curvature, no prior: ℓ' = ητ/(2γ), and the rule is that flow over any step."""
    discount, tau = 0.7, 0.4
    lagrangian = gaussian_weights(torch.zeros(1), torch.zeros(1), discount=discount, entropy_weight=tau)
    growth = tau / (2 * discount)
    state, velocity = torch.tensor([[0.3, -1.0], [0.0, growth]], dtype=torch.float64)
    assert float(lagrangian.residual(state, velocity, torch.zeros(2).double()).abs().max()) < 1e-14
    variance = torch.tensor([0.2], dtype=torch.float64)
    torch.testing.assert_close(
        flat_direction_growth(variance, 3.0 * tau / discount), variance * math.exp(2 * growth * 3.0)
    )
    tensor = flat_direction_growth(variance, number(0.5))
    torch.testing.assert_close(tensor, flat_direction_growth(variance, 0.5))


def test_ballistic_step_is_the_limit_of_the_exact_one_with_order_one() -> None:
    g, h = torch.tensor([1.0, -3.0]).double(), torch.tensor([0.5, 4.0]).double()
    errors = []
    for duration in (4e-3, 2e-3, 1e-3):
        exact = optimal_step(g, h, duration=duration, discount=0.0, lr=0.6)
        rule = ballistic_step(g, h, math.sqrt(0.6) * duration)
        errors.append(float(((rule - exact) / exact).abs().max()))
    assert all(order == pytest.approx(1.0, abs=0.02) for order in measured_order(errors))
    # of the mean of a Gaussian weight: speed √(ηkv)Δt, the limit of mean_displacement at discount 0
    precision, eta = torch.tensor([10.0, 2.0]).double(), 1e-8
    rule = ballistic_step(g, h, torch.sqrt(eta / precision))
    limit = mean_displacement(g, torch.zeros(2).double(), precision, h, 0.0, 0.1, eta * 0.1 / 1e-12, 1e-12)
    torch.testing.assert_close(rule, limit, rtol=2e-4, atol=0)


@pytest.mark.parametrize("discount", [0.1, 2.0])
def test_mean_displacement_is_exact_while_the_variance_rests(discount: float) -> None:
    """Any step length: the path of a quadratic under the constant metric 1/v."""
    variance, h, temperature, step = 0.3, 1.4, 0.2, 0.9
    rule = LinearRule(
        torch.tensor([h]), torch.zeros(1), metric=torch.tensor([1 / variance]), discount=discount, lr=0.8
    )
    start = torch.tensor([1.5], dtype=torch.float64)
    expected = rule.path(start, torch.tensor([step]))[0] - start
    lr = 0.8 * temperature * step / discount  # (η/γ)τΔt with k = 1
    moved = mean_displacement(
        h * start, start, number(1 / variance), number(h), 0.0, temperature, lr, discount * step
    )
    torch.testing.assert_close(moved, expected, rtol=1e-6, atol=0)
