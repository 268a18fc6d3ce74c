"""Beliefs against the minimum of their action, the Kalman filter, running averages, and drifting data."""

import itertools
import math

import numpy as np
import pytest
import torch
from cases import tensor
from scipy.linalg import solve_continuous_are

import clagrange  # noqa: F401 - declares torchvision's operators before anything else
from clagrange.dynamics import Belief, observe_gaussian, observe_moments, updated_belief
from clagrange.dynamics.beliefs import as_belief, as_numbers, averaging_weights

DECAYS = [0.0, 0.02, 0.5]
SIGNALS = [1e-4, 0.1, 3.0]
DISCOUNTS = [0.0, 1e-3, 0.3, 20.0]


@pytest.mark.parametrize("discount", DISCOUNTS)
@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize("decay", DECAYS)
def test_rate_solves_its_quadratic(decay: float, signal: float, discount: float) -> None:
    """λ² + γλ = κ² = a(a + γ) + s²/r²."""
    belief = Belief(decay, 2.0 * math.sqrt(signal), 2.0)
    rate = belief.rate(discount)
    square = decay * (decay + discount) + signal
    assert rate * (rate + discount) == pytest.approx(square, rel=1e-12)
    assert belief.gain(discount) == pytest.approx(signal / square, rel=1e-12)
    assert rate > decay
    if discount > 0:
        stacked = Belief(tensor(decay), tensor(signal).sqrt(), 1.0)
        torch.testing.assert_close(stacked.rate(tensor(discount)), tensor(rate))


def test_without_discount_the_rate_is_that_of_the_kalman_bucy_filter() -> None:
    """Filter of x' = −ax + sξ seen with noise r: dx̂ = −ax̂ + K(y − x̂), K = P/r² of the Riccati equation."""
    a, s, r = 0.3, 0.7, 1.9
    P = solve_continuous_are([[-a]], [[1.0]], [[s * s]], [[r * r]])[0, 0]
    assert Belief(a, s, r).rate(0.0) == pytest.approx(a + P / r**2, rel=1e-12)


@pytest.mark.parametrize("decay", [0.0, 0.2])
def test_an_impatient_agent_learns_less(decay: float) -> None:
    """λ → a + (a² + s²/r²)/γ: at an infinite discount only its own decay is left."""
    belief = Belief(decay, 0.5, 1.0)
    rates = [belief.rate(discount) for discount in (0.0, 0.1, 1.0, 10.0, 1e3, math.inf)]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == decay
    assert (belief.rate(1e6) - decay) * 1e6 == pytest.approx(0.25, rel=1e-3)


def best_path(start: float, seen: float, a: float, signal: float, discount: float, duration: float, dt: float):
    """Minimum of Σ e^{−γt}[(y − m)²·signal/2 + (m' + am)²/2]dt over m(t₁), m(t₂), …: a least-squares problem."""
    steps = round(duration / dt)
    weights = np.exp(-0.5 * discount * dt * (np.arange(steps) + 0.5)) * math.sqrt(dt)
    move, look, right = np.zeros((steps, steps + 1)), np.zeros((steps, steps + 1)), np.zeros(2 * steps)
    for i, weight in enumerate(weights):  # midpoints
        move[i, i], move[i, i + 1] = weight * (a / 2 - 1 / dt), weight * (a / 2 + 1 / dt)
        look[i, i] = look[i, i + 1] = weight * math.sqrt(signal) / 2
        right[steps + i] = weight * math.sqrt(signal) * seen
    matrix = np.concatenate([move, look])
    path = np.linalg.lstsq(matrix[:, 1:], right - matrix[:, 0] * start, rcond=None)[0]
    return np.concatenate([[start], path])


@pytest.mark.parametrize(("a", "signal", "discount"), [(0.0, 1.0, 0.5), (0.4, 0.7, 1.0), (0.2, 2.0, 0.0)])
def test_update_is_the_path_of_least_action(a: float, signal: float, discount: float) -> None:
    """At t = 1 on a long horizon with a constant observation; the discretised action errs with order 2."""
    start, seen = 2.0, -1.0
    exact = updated_belief(
        torch.tensor(start, dtype=torch.float64), torch.tensor(seen, dtype=torch.float64), a, signal, discount
    ).item()
    errors = [
        best_path(start, seen, a, signal, discount, 16.0, dt)[round(1 / dt)] - exact for dt in (0.2, 0.1, 0.05)
    ]
    assert abs(errors[-1]) < 1e-3
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(2.0, abs=0.1)


@pytest.mark.parametrize("discount", [0.0, 0.3, 5.0])
@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_a_belief_can_be_asked_for_by_its_beta(decay: float, discount: float) -> None:
    belief = Belief.averaging(0.9, discount, decay=decay)
    beta, gain = averaging_weights(belief, discount)
    assert beta == pytest.approx(0.9, rel=1e-12)
    assert (gain == 1.0) if decay == 0 else (0 < gain < 1)
    assert averaging_weights(as_numbers(belief), discount) == (beta, gain)


def test_beliefs_that_do_not_decay_are_running_averages() -> None:
    """Moments: m and v are Adam's averages."""
    beliefs = Belief.averaging(0.9, 2.0), Belief.averaging(0.999, 2.0)
    m = v = expected_m = expected_v = torch.zeros(5, dtype=torch.float64)
    for _ in range(20):
        g = torch.randn(5, dtype=torch.float64)
        m, v = observe_moments(m, v, g, beliefs, 2.0)
        expected_m, expected_v = 0.9 * expected_m + 0.1 * g, 0.999 * expected_v + 0.001 * g * g
    torch.testing.assert_close(m, expected_m)
    torch.testing.assert_close(v, expected_v)


def test_sources_of_the_gaussian_observation() -> None:
    """Per unit of s², the force on each belief is the gradient of −log N(g | m, v) (Eqs. 138-140)."""
    g = torch.tensor(1.3, dtype=torch.float64)
    m = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    v = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    (0.5 * (g - m).square() / v + 0.5 * v.log()).backward()
    s, time, discount = 1e-3, 1.0, 50.0  # slow and overdamped: one step is −(s²/γ)·source
    beliefs = Belief(0.0, s, 1.0), Belief(0.0, s, 1.0)
    new_m, new_v = observe_gaussian(m.detach(), v.detach(), g, beliefs, discount)
    assert (new_m - m).item() * discount / (s * s * time) == pytest.approx(-m.grad.item(), rel=1e-4)
    assert (new_v - v).item() * discount / (s * s * time) == pytest.approx(-v.grad.item(), rel=1e-4)


def test_gaussian_observation_finds_mean_and_variance() -> None:
    """2,000 independent streams of N(2, 9): the averages of m and v over streams are close to both."""
    generator = torch.Generator().manual_seed(0)
    beliefs = Belief(0.0, 0.1, 1.0), Belief(0.0, 0.3, 1.0)
    m = v = torch.zeros(2000, dtype=torch.float64)
    for step in range(400):
        g = 2.0 + 3.0 * torch.randn(2000, generator=generator, dtype=torch.float64)
        m, v = observe_gaussian(m, v, g, beliefs, 0.0)
        if step == 0:
            torch.testing.assert_close(m, g)  # nothing known: the first observation is taken as it is
        assert (v >= 0).all()
    assert m.mean().item() == pytest.approx(2.0, abs=0.1)
    # the smaller v, the faster it learns: v lags in large deviations, which biases it down by some percent
    assert v.mean().item() == pytest.approx(9.0, rel=0.1)


def test_the_theorys_rate_tracks_a_drifting_quantity_best() -> None:
    """Brownian x with s = .1 seen with r = 1, no discount: a third or three times the rate loses."""
    generator = torch.Generator().manual_seed(0)
    belief = Belief(0.0, 0.1, 1.0)
    rates = [belief.rate(0.0) * factor for factor in (1 / 3, 1.0, 3.0)]
    x, tracks, errors = torch.zeros(500), [torch.zeros(500)] * 3, [0.0] * 3
    for step in range(600):
        x = x + 0.1 * torch.randn(500, generator=generator)
        seen = x + torch.randn(500, generator=generator)
        tracks = [
            track + (1 - math.exp(-rate)) * (seen - track) for track, rate in zip(tracks, rates, strict=True)
        ]
        if step >= 100:
            errors = [
                error + float((track - x).square().mean()) for error, track in zip(errors, tracks, strict=True)
            ]
    assert errors[1] < 0.8 * errors[0]
    assert errors[1] < 0.8 * errors[2]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Belief(-0.1, 1.0, 1.0), ValueError, r"decay: expected a number in \[0, inf\), got -0.1"),
        (lambda: Belief(0.1, 0.0, 1.0), ValueError, r"process_noise: "),
        (lambda: Belief(0.1, 1.0, math.inf), ValueError, r"observation_noise: .*got inf"),
        (lambda: Belief("fast", 1.0, 1.0), TypeError, r"decay: expected a number"),
        (lambda: Belief.averaging(1.0, 1.0), ValueError, r"beta: "),
        (lambda: Belief.averaging(0.9, math.inf), ValueError, r"discount: "),
        (lambda: Belief.averaging(0.9, 1.0, decay=0.2), ValueError, r"decay: .*cannot forget more slowly"),
        (
            lambda: as_belief("x", {"decay": 1.0, "noise": 2.0}),
            ValueError,
            r"x: expected the numbers decay, process",
        ),
        (lambda: as_belief("x", 1.0), ValueError, r"x: expected a number in \[0, 1\), got 1"),
        (lambda: as_belief("x", "slow"), TypeError, r"x: expected a number"),
    ],
)
def test_bad_numbers_are_named(make, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
