"""Thresholds with intervals, Fermat's time, control: costates, backpropagation, Bellman."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clagrange.mechanics.control import bellman_quadratic, costates
from clagrange.mechanics.least_time import (
    fermat_time,
    learning_speed,
    samples_to_threshold,
    seconds_to_threshold,
)
from clagrange.mechanics.planning import planned_samples


def test_samples_to_threshold_with_an_interval_over_seeds() -> None:
    generator = np.random.default_rng(0)
    samples = np.arange(10, 2001)
    noise = generator.uniform(0.5, 1.5, size=(200, 1))
    errors = noise + 10 * noise / samples  # ε = σ²(1 + p/n), p = 10
    found = samples_to_threshold(errors, samples, threshold=1.6)
    exact = np.ceil(10 * noise[:, 0] / (1.6 - noise[:, 0]) - 1e-9)
    assert found.per_seed == tuple(np.maximum(exact, 10.0))
    assert found.reached == 1.0
    assert found.interval.mean == pytest.approx(np.mean(found.per_seed))
    spread = np.std(found.per_seed) / np.sqrt(200)
    assert found.interval.mean - found.interval.low == pytest.approx(1.96 * spread, rel=0.15)
    assert found.interval.high - found.interval.mean == pytest.approx(1.96 * spread, rel=0.15)
    narrow = samples_to_threshold(errors, samples, threshold=1.6, confidence=0.5)
    assert found.interval.low < narrow.interval.low < narrow.interval.high < found.interval.high


def test_a_seed_that_never_gets_there_leaves_no_mean() -> None:
    found = seconds_to_threshold([[3.0, 1.0], [3.0, 2.0]], [[0.5, 1.0], [0.25, 0.75]], threshold=1.5)
    assert found.per_seed == (1.0, float("inf"))
    assert found.reached == 0.5
    assert found.interval.mean is None
    other = seconds_to_threshold([[3.0, 1.0], [1.5, 2.0]], [[0.5, 1.0], [0.25, 0.75]], threshold=1.5)
    assert other.per_seed == (1.0, 0.25)  # the first crossing counts


def test_fermat_time_of_the_planned_learner_is_its_closed_form() -> None:
    """r = (ε − σ²)²/(pσ²) gives T(δ) = pσ²/(δ − σ²) − pσ²/(ε₀ − σ²)."""
    samples = np.arange(10, 501)
    speed = learning_speed(1.0 + 10.0 / samples, samples)
    middle = 0.5 * (speed.levels[1:] + speed.levels[:-1])
    assert speed.rate(middle) == pytest.approx((middle - 1.0) ** 2 / 10.0, rel=0.01)
    for threshold in (1.5, 1.2, 1.03):
        time = fermat_time(speed, threshold)
        assert time == pytest.approx(planned_samples(threshold, 10) - 10.0, rel=1e-3)
    assert fermat_time(speed, 2.5) == 0.0
    assert fermat_time(speed, 1.01) == float("inf")


def test_fermat_takes_the_fastest_at_every_level() -> None:
    """Two decays of different speed: the least time is below both, and is the integral over the envelope."""
    times = np.linspace(0.0, 20.0, 4001)
    early, late = learning_speed(1.0 / (1.0 + times) ** 2, times), learning_speed(np.exp(-0.5 * times), times)
    threshold = 0.01
    alone = [fermat_time(curve, threshold) for curve in (early, late)]
    assert alone[0] == pytest.approx(9.0, rel=1e-3)
    assert alone[1] == pytest.approx(2.0 * np.log(100.0), rel=1e-3)
    together = fermat_time([early, late], threshold)
    levels = np.linspace(threshold, 1.0, 400_001)
    integrand = 1.0 / np.maximum(2.0 * levels**1.5, 0.5 * levels)
    integral = 0.5 * float((integrand[1:] + integrand[:-1]).sum()) * (levels[1] - levels[0])
    assert together == pytest.approx(integral, rel=1e-3)
    assert together < min(alone) - 1.0


def test_a_noisy_curve_has_the_time_of_its_first_crossing() -> None:
    generator = np.random.default_rng(1)
    at = np.cumsum(generator.uniform(0.5, 1.5, 400))
    errors = np.exp(-at / 100.0) + 0.05 * generator.normal(size=400)
    speed = learning_speed(errors, at)
    for threshold in (0.8, 0.5, 0.2):
        first = np.flatnonzero(errors <= threshold)[0]
        time = fermat_time(speed, threshold)
        crossing = samples_to_threshold(errors, at, threshold).per_seed[0] - at[0]
        assert time <= crossing == at[first] - at[0]
        records = np.flatnonzero(errors == np.minimum.accumulate(errors))
        assert time >= at[records[records < first][-1]] - at[0]


def mlp_as_control() -> tuple[list[nn.Linear], Tensor, Tensor]:
    torch.manual_seed(0)
    layers = [nn.Linear(5, 7).double(), nn.Linear(7, 6).double(), nn.Linear(6, 3).double()]
    return layers, torch.randn(4, 5, dtype=torch.float64), torch.tensor([0, 2, 1, 1])


def test_costates_are_backpropagation() -> None:
    """With r = 0 and h = −loss, −λ and −∂H/∂a are what autograd gives for the hidden states and weights."""
    layers, inputs, targets = mlp_as_control()
    last = len(layers) - 1

    def layer(index: int):
        def forward(state: Tensor, weight: Tensor) -> Tensor:
            out = state @ weight.T
            return out if index == last else torch.tanh(out)

        return forward

    weights = [module.weight for module in layers]
    dynamics = [layer(index) for index in range(3)]
    found = costates(inputs, weights, dynamics, lambda s: -F.cross_entropy(s, targets))

    states = [inputs.clone().requires_grad_(True)]
    for forward, weight in zip(dynamics, weights, strict=True):
        states.append(forward(states[-1], weight))
    loss = F.cross_entropy(states[-1], targets)
    expected = torch.autograd.grad(loss, [*states, *weights])
    for got, want in zip([*found.costates, *found.action_gradients], expected, strict=True):
        torch.testing.assert_close(-got, want, rtol=0, atol=1e-15)
    assert found.reward == pytest.approx(-loss.item(), abs=1e-15)


def problem() -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    size = {"dtype": torch.float64}
    transition = torch.eye(3, **size) + 0.3 * torch.randn(3, 3, **size)
    control = torch.randn(3, 2, **size)
    root = torch.randn(3, 3, **size)
    return transition, control, root @ root.T, 0.5 * torch.eye(2, **size), 2.0 * torch.eye(3, **size)


def test_costates_are_the_gradient_of_bellman_s_value() -> None:
    transition, control, state_cost, action_cost, terminal_cost = problem()
    steps = 5
    solved = bellman_quadratic(*problem(), steps=steps)

    def dynamics(s: Tensor, a: Tensor) -> Tensor:
        return transition @ s + control @ a

    def running(s: Tensor, a: Tensor) -> Tensor:
        return -0.5 * (s @ state_cost @ s + a @ action_cost @ a)

    # Bellman's equation itself: at any state, the best action attains V, and others get less
    for step in range(steps):
        state = torch.randn(3, dtype=torch.float64)
        best = solved.action(step, state)
        value = solved.value(step, state)
        attained = running(state, best) + solved.value(step + 1, dynamics(state, best))
        assert float(attained) == pytest.approx(float(value), abs=1e-12)
        for _ in range(20):
            other = best + 0.3 * torch.randn(2, dtype=torch.float64)
            assert running(state, other) + solved.value(step + 1, dynamics(state, other)) < value

    # along the best path: λ = ∇V, no action can gain, and J = V_0
    start = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    state, actions = start, []
    for step in range(steps):
        actions.append(solved.action(step, state))
        state = dynamics(state, actions[-1])
    found = costates(start, actions, dynamics, lambda s: -0.5 * s @ terminal_cost @ s, running)
    for step, (state, costate) in enumerate(zip(found.states, found.costates, strict=True)):
        torch.testing.assert_close(costate, -solved.values[step] @ state, rtol=1e-11, atol=1e-11)
    for gain in found.action_gradients:
        torch.testing.assert_close(gain, torch.zeros_like(gain), rtol=0, atol=1e-11)
    assert found.reward == pytest.approx(float(solved.value(0, start)), rel=1e-12)

    # off it the costates still are the gradient of J
    crooked = [action + 0.1 for action in actions]
    off = costates(start, crooked, dynamics, lambda s: -0.5 * s @ terminal_cost @ s, running)
    leaf = start.clone().requires_grad_(True)
    state, total = leaf, torch.zeros((), dtype=torch.float64)
    for action in crooked:
        total = total + running(state, action)
        state = dynamics(state, action)
    (total - 0.5 * state @ terminal_cost @ state).backward()
    torch.testing.assert_close(off.costates[0], leaf.grad, rtol=1e-12, atol=1e-12)
    assert off.reward < found.reward
    assert max(float(gain.abs().max()) for gain in off.action_gradients) > 0.1


def test_bellman_on_a_grid_agrees_for_a_problem_without_closed_form() -> None:
    """s' = s + a·cos s, tabulated dynamic programming on a fine grid against costates of the best actions."""

    def dynamics(s: Tensor, a: Tensor) -> Tensor:
        return s + a * torch.cos(s)

    def running(s: Tensor, a: Tensor) -> Tensor:
        return -0.5 * (0.2 * s.square() + a.square()).sum()

    def terminal(s: Tensor) -> Tensor:
        return -((s - 1.0) ** 2).sum()

    grid = np.linspace(-2.0, 2.0, 2001)
    actions = np.linspace(-1.5, 1.5, 1201)
    value = -((grid - 1.0) ** 2)
    for _ in range(3):
        after = grid[:, None] + actions * np.cos(grid)[:, None]
        total = -0.5 * (0.2 * grid[:, None] ** 2 + actions**2) + np.interp(after, grid, value)
        value = total.max(1)

    start = torch.tensor([-0.5], dtype=torch.float64)
    chosen = [torch.zeros(1, dtype=torch.float64) for _ in range(3)]
    for _ in range(400):  # ascend H
        found = costates(start, chosen, dynamics, terminal, running)
        chosen = [action + 0.2 * gain for action, gain in zip(chosen, found.action_gradients, strict=True)]
    found = costates(start, chosen, dynamics, terminal, running)
    assert found.reward == pytest.approx(float(np.interp(-0.5, grid, value)), abs=1e-4)
    slope = (np.interp(-0.45, grid, value) - np.interp(-0.55, grid, value)) / 0.1
    assert float(found.costates[0]) == pytest.approx(float(slope), abs=5e-3)


def test_bad_curves() -> None:
    with pytest.raises(
        ValueError, match=r"samples: expected shape \(points,\), .* or that of the curve \(1, 2\), got \(3,"
    ):
        samples_to_threshold([1.0, 2.0], [1, 2, 3], 0.5)
    with pytest.raises(ValueError, match="seconds: expected ascending numbers"):
        seconds_to_threshold([1.0, 2.0], [2.0, 1.0], 0.5)
    with pytest.raises(ValueError, match="errors: expected numbers, got NaN"):
        samples_to_threshold([1.0, float("nan")], [1, 2], 0.5)
    with pytest.raises(ValueError, match="errors: expected a curve that falls"):
        learning_speed([1.0, 2.0], [1, 2])
    with pytest.raises(ValueError, match="at: expected strictly ascending"):
        learning_speed([2.0, 1.0], [1, 1])
    with pytest.raises(ValueError, match="dynamics: expected one for each of 1 actions, got 2"):
        costates(torch.ones(1), [torch.ones(1)], [torch.add, torch.add], torch.sum)
