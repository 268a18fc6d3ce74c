"""The one-step rules against closed forms, limits, an integrator and the law of their samples."""

import itertools
import math

import numpy as np
import oracles
import pytest
import torch
from scipy import stats
from scipy.integrate import solve_ivp

import clagrange  # noqa: F401 - declares torchvision's operators before anything else
from clagrange.dynamics import (
    mean_displacement,
    ornstein_uhlenbeck,
    relaxation_fraction,
    relaxed_precision,
    stable_root,
)

RATES = [1e-12, 1e-6, 1e-3, 0.1, 1.0, 30.0, 1e6]
DISCOUNTS = [1e-8, 1e-3, 0.2, 1.0, 50.0, 1e4]


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("discount", DISCOUNTS)
def test_stable_root_solves_its_quadratic(rate: float, discount: float) -> None:
    root = stable_root(rate, discount)
    # the form of the oracle cancels digits: its error is an ulp of γ/2
    tolerance = 1e-14 * root + float(np.finfo(np.longdouble).eps) * discount
    assert abs(root - oracles.stable_root(rate, discount)) <= tolerance
    assert root * root + discount * root == pytest.approx(discount * rate, rel=1e-13)
    assert root > 0


def test_stable_root_of_tensors_equals_that_of_numbers() -> None:
    rate = torch.tensor(RATES, dtype=torch.float64).unsqueeze(1)
    discount = torch.tensor([*DISCOUNTS, math.inf], dtype=torch.float64)
    expected = [[stable_root(r, d) for d in discount.tolist()] for r in RATES]
    torch.testing.assert_close(stable_root(rate, discount), torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(
        stable_root(rate, 0.3)[:, 0], torch.tensor([stable_root(r, 0.3) for r in RATES], dtype=torch.float64)
    )


@pytest.mark.parametrize("rate", RATES)
def test_stable_root_is_overdamped_at_infinite_discount(rate: float) -> None:
    assert stable_root(rate, math.inf) == rate
    # λ = rate − rate²/γ + O(γ⁻²): the error halves when the discount doubles
    errors = [rate - stable_root(rate, gamma * max(rate, 1.0)) for gamma in (1e3, 2e3)]
    assert errors[0] > 0
    if rate >= 1.0:
        assert errors[0] / errors[1] == pytest.approx(2.0, rel=2e-3)


@pytest.mark.parametrize("rate", [1e-3, 1.0, 30.0])
def test_stable_root_is_ballistic_at_small_discount(rate: float) -> None:
    # λ = √(γ·rate) − γ/2 + O(γ^{3/2})
    for discount in (1e-6, 1e-8):
        expected = math.sqrt(discount * rate) - discount / 2
        assert stable_root(rate, discount) == pytest.approx(expected, abs=discount**1.5 / math.sqrt(rate))


@pytest.mark.parametrize("discount", [0.2, 1.0, 50.0])
def test_derivative_of_the_root_by_finite_difference(discount: float) -> None:
    rate = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    stable_root(rate, discount).backward()
    numeric = (stable_root(0.7 + 1e-6, discount) - stable_root(0.7 - 1e-6, discount)) / 2e-6
    # implicit: (2λ + γ) dλ = γ d rate
    implicit = discount / (2 * stable_root(0.7, discount) + discount)
    assert float(rate.grad) == pytest.approx(numeric, rel=1e-8)
    assert float(rate.grad) == pytest.approx(implicit, rel=1e-12)


def test_a_path_on_the_stable_root_obeys_the_second_order_equation() -> None:
    """q'' − γq' = κq with κ = γ·rate: e^{−λt} solves it, and so does the integrator started on it."""
    rate, discount = 0.4, 0.7
    root = stable_root(rate, discount)
    path = solve_ivp(
        lambda _, q: [q[1], discount * q[1] + discount * rate * q[0]],
        (0, 3),
        [1.0, -root],
        rtol=1e-12,
        atol=1e-14,
    )
    assert path.y[0, -1] == pytest.approx(math.exp(-3 * root), rel=1e-8)


@pytest.mark.parametrize("discount", [*DISCOUNTS, math.inf])
@pytest.mark.parametrize("lr", [1e-9, 1e-3, 0.5, 10.0])
def test_relaxation_fraction(lr: float, discount: float) -> None:
    fraction = relaxation_fraction(lr, discount)
    root = lr if math.isinf(discount) else stable_root(lr, discount)
    assert fraction == pytest.approx(-np.expm1(-root), rel=1e-14)
    assert 0 < fraction <= 1
    tensor = relaxation_fraction(torch.tensor([lr], dtype=torch.float64), discount)
    torch.testing.assert_close(tensor, torch.tensor([fraction], dtype=torch.float64))


def _relaxed_after(time: float, steps: int, rate: float, start: float) -> float:
    h, delta, temperature = 0.3, 0.02, 0.1
    s = torch.tensor([start], dtype=torch.float64)
    for _ in range(steps):
        s = relaxed_precision(s, torch.tensor([h], dtype=torch.float64), delta, temperature, rate * time / steps)
    return float(s)


def test_relaxed_precision_follows_the_linear_flow() -> None:
    """Euler steps converge to s' = −rate(s − s*) with order one; with fraction 1 − e^{−rate·t} one is exact."""
    rate, start, target = 0.8, 50.0, (0.3 + 0.02) / 0.1
    solution = solve_ivp(lambda _, s: -rate * (s - target), (0, 2), [start], rtol=1e-12, atol=1e-12).y[0, -1]
    errors = [abs(_relaxed_after(2.0, steps, rate, start) - solution) for steps in (64, 128, 256, 512)]
    orders = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert all(abs(order - 1) < 0.03 for order in orders), orders
    exact = relaxed_precision(
        torch.tensor(start), torch.tensor(0.3), 0.02, 0.1, relaxation_fraction(rate * 2.0)
    ).item()
    assert exact == pytest.approx(solution, rel=1e-5)


def test_relaxed_precision_ends_at_its_equilibrium_and_stays() -> None:
    h = torch.tensor([0.0, 1.0, 4.0], dtype=torch.float64)
    target = (h + 0.5) / 0.1
    torch.testing.assert_close(relaxed_precision(torch.ones(3).double(), h, 0.5, 0.1, 1.0), target)
    torch.testing.assert_close(relaxed_precision(target, h, 0.5, 0.1, 0.37), target)


class TestMeanDisplacement:
    """Limits of the step of the mean."""

    gradient = torch.tensor([0.5, -2.0, 0.0], dtype=torch.float64)
    offset = torch.tensor([0.1, 0.0, -3.0], dtype=torch.float64)
    precision = torch.tensor([4.0, 100.0, 25.0], dtype=torch.float64)
    curvature = torch.tensor([0.0, 2.0, 0.3], dtype=torch.float64)

    def step(self, lr: float, **settings: float) -> torch.Tensor:
        return mean_displacement(
            self.gradient, self.offset, self.precision, self.curvature, 0.2, 0.05, lr, **settings
        )

    def test_small_rate_moves_along_the_covariance(self) -> None:
        expected = -1e-9 / self.precision / 0.05 * (self.gradient + 0.2 * self.offset)
        torch.testing.assert_close(self.step(1e-9), expected, rtol=1e-6, atol=0)

    @pytest.mark.parametrize("discount", [0.1, math.inf])
    def test_large_rate_is_a_newton_step(self, discount: float) -> None:
        newton = -(self.gradient + 0.2 * self.offset) / (self.curvature + 0.2)
        torch.testing.assert_close(self.step(1e9, discount=discount), newton)

    def test_ballistic_limit(self) -> None:
        """γ → 0 at fixed γ·lr: the step goes with the root of variance over curvature."""
        discount, eta = 1e-9, 1e-6  # η' = lr·γ/T
        stiffness = self.curvature + 0.2
        expected = -torch.sqrt(eta / self.precision / stiffness) * (self.gradient + 0.2 * self.offset)
        torch.testing.assert_close(
            self.step(eta * 0.05 / discount, discount=discount), expected, rtol=2e-3, atol=0
        )

    def test_trust_region_in_posterior_deviations(self) -> None:
        free, bounded = self.step(1e9), self.step(1e9, trust_region=0.3)
        bound = 0.3 * self.precision.rsqrt()
        assert (free.abs() > bound).any()
        torch.testing.assert_close(bounded, free.sign() * torch.minimum(free.abs(), bound))


class TestOrnsteinUhlenbeck:
    """The sampled step toward the prior."""

    def draw(self, mean: torch.Tensor, retained: float, strength: float, seed: int = 0) -> torch.Tensor:
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return ornstein_uhlenbeck(mean, 0.7, 2.0, torch.full_like(mean, retained), strength, noise)

    @pytest.mark.parametrize(("retained", "strength"), [(0.0, 0.4), (0.6, 1.0), (0.3, 0.5)])
    def test_moments(self, retained: float, strength: float) -> None:
        samples = self.draw(torch.full((40_000,), 5.0, dtype=torch.float64), retained, strength)
        keep = 1 - strength * (1 - retained)
        deviation = 2.0 * math.sqrt(1 - keep**2)
        expected = stats.norm(0.7 + keep * (5.0 - 0.7), deviation)
        assert stats.kstest(samples.numpy(), expected.cdf).pvalue > 0.01
        assert abs(float(samples.mean()) - expected.mean()) < 4 * deviation / math.sqrt(samples.numel())

    def test_prior_is_stationary(self) -> None:
        samples = 0.7 + 2.0 * torch.randn(40_000, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
        for seed in range(5):
            samples = self.draw(samples, 0.2, 0.6, seed)
        assert stats.kstest(samples.numpy(), stats.norm(0.7, 2.0).cdf).pvalue > 0.01

    def test_what_nothing_holds_is_drawn_from_the_prior(self) -> None:
        samples = self.draw(torch.full((40_000,), 1e3, dtype=torch.float64), 0.0, 1.0)
        assert stats.kstest(samples.numpy(), stats.norm(0.7, 2.0).cdf).pvalue > 0.01

    @pytest.mark.parametrize(("retained", "strength"), [(1.0, 1.0), (0.2, 0.0)])
    def test_what_is_determined_or_not_asked_for_stays(self, retained: float, strength: float) -> None:
        mean = torch.tensor([-3.0, 0.0, 8.5], dtype=torch.float64)
        torch.testing.assert_close(self.draw(mean, retained, strength), mean, rtol=0, atol=1e-15)
