"""The boundary-value oracle: section 6's coupled system, the well, linear rules, the limit of large discount."""

import math

import numpy as np
import pytest
import torch

from clagrange.dynamics import (
    LearningLagrangian,
    LinearRule,
    decay_rate,
    gaussian_weights,
    settling_trajectory,
    zero_discount_flow,
)
from clagrange.figures.convergence import distance_errors, mesu_differences, orders
from clagrange.figures.task_switch import exact_path

BVP_VALUES = [(0.0, 1.0, 0.0401), (0.0, 2.0, 0.144), (0.0, 5.0, 0.568), (1.0, 1.0, 0.0266), (10.0, 1.0, 0.00120)]
"""γ, shift, highest log(σ/σ*): known from an independent solution."""


def second_order(discount: float, shift: float) -> float:
    rate = decay_rate(1.0, discount)
    return rate * shift**2 / (8 * (3 * rate + discount))


@pytest.mark.parametrize(("discount", "shift", "peak"), BVP_VALUES)
def test_peaks_of_the_coupled_system(discount: float, shift: float, peak: float) -> None:
    path = exact_path(shift, 0.0, discount)
    digits = 10.0 ** (math.floor(math.log10(peak)) - 2)
    assert float(path.positions[:, 1].max()) == pytest.approx(peak, abs=0.51 * digits)
    lagrangian = gaussian_weights(torch.ones(1), torch.zeros(1), discount=discount)
    energy = lagrangian.energy(path.positions, path.velocities)
    if discount == 0.0:
        assert float((energy - energy[-1]).abs().max()) < 1e-8
        gap = lagrangian.kinetic(path.positions, path.velocities) - lagrangian.potential(path.positions)
        rest = lagrangian.potential(torch.zeros(2, dtype=torch.float64))
        assert float((gap + rest).abs().max()) < 1e-8  # T = U − U_min on the optimum
    else:
        # the law d(T − U)/dt = 2γT, integrated by the trapezoidal rule
        kinetic = lagrangian.kinetic(path.positions, path.velocities)
        gained = torch.cumulative_trapezoid(2 * discount * kinetic, path.times)
        torch.testing.assert_close(energy[1:] - energy[0], gained, rtol=0, atol=2e-3 * float(gained[-1]))


@pytest.mark.parametrize("discount", [0.0, 1.0, 10.0])
def test_peaks_agree_with_the_second_order_formula_to_its_order(discount: float) -> None:
    """The formula goes with x₀², its error with x₀⁴."""
    errors = []
    for shift in (0.25, 0.5, 1.0):
        exact = float(exact_path(shift, 0.0, discount).positions[:, 1].max())
        errors.append(abs(exact - second_order(discount, shift)))
    assert errors[-1] < 0.05 * second_order(discount, 1.0)
    if discount < 10.0:  # where it is not lost in the error of the grid
        assert math.log2(errors[1] / errors[0]) == pytest.approx(4.0, abs=0.35)
        assert math.log2(errors[2] / errors[1]) == pytest.approx(4.0, abs=0.35)


def test_width_alone_without_discount_is_the_closed_flow() -> None:
    for start in (-1.5, 0.8):
        path = exact_path(0.0, start, 0.0)
        expected = zero_discount_flow(path.positions[:, 1], 1.0)
        torch.testing.assert_close(path.velocities[:, 1], expected, rtol=0, atol=1e-8)


def test_well_against_its_first_integral() -> None:
    """Eq. 64: θ' = √(2ηkL) from the worse well over the barrier into the better one."""
    deepest = max(np.roots([4.0, 0.0, -4.0, -0.5]).real)

    def shape(x):
        return (x[..., 0] ** 2 - 1) ** 2 - 0.5 * x[..., 0]

    lowest = float(shape(torch.tensor([deepest])))
    lagrangian = LearningLagrangian(lambda x: shape(x) - lowest, lr=0.8, loss_weight=1.3)
    path = settling_trajectory(lagrangian, torch.tensor([-0.93]), torch.tensor([deepest]), tolerance=1e-9)
    speed = (2 * 0.8 * 1.3 * (shape(path.positions) - lowest)).clamp(min=0).sqrt()
    torch.testing.assert_close(path.velocities[:, 0], speed, rtol=0, atol=1e-7)
    assert float(lagrangian.energy(path.positions, path.velocities).abs().max()) < 1e-8


def test_quadratic_with_metric_and_drift_is_the_linear_rule() -> None:
    H = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    J = torch.tensor([[-0.3, -1.0], [1.0, -0.3]], dtype=torch.float64)
    G = torch.tensor([[1.0, 0.2], [0.2, 0.5]], dtype=torch.float64)
    minimum, start = torch.tensor([1.0, -1.0]).double(), torch.tensor([2.0, 2.0]).double()
    rule = LinearRule(H, minimum, metric=G, drift=J, discount=0.4)
    lagrangian = LearningLagrangian(
        lambda x: 0.5 * (x - minimum) @ H @ (x - minimum), metric=G, drift=lambda x: J @ x, discount=0.4
    )
    path = settling_trajectory(lagrangian, start, rule.end)
    torch.testing.assert_close(path.positions, rule.path(start, path.times), rtol=0, atol=1e-6)
    torch.testing.assert_close(path.velocities, rule.velocity(path.positions), rtol=0, atol=1e-6)


@pytest.mark.parametrize("coordinates", ["variance", "deviation"])
def test_the_path_does_not_depend_on_the_coordinates(coordinates: str) -> None:
    settings = {"discount": 0.5, "entropy_weight": 0.6, "lr": 0.9}
    hessian, centre = torch.tensor([0.7]).double(), torch.zeros(1).double()
    logs = gaussian_weights(hessian, centre, **settings)
    other = gaussian_weights(hessian, centre, coordinates=coordinates, **settings)
    rest = torch.tensor([0.0, 0.6 / 0.7]).double()
    mean, variance = torch.tensor([0.8]).double(), torch.tensor([0.5]).double()
    ends = [
        (lagrangian.metric.join(mean, variance), lagrangian.metric.join(*rest.chunk(2)))
        for lagrangian in (logs, other)
    ]
    first, second = (
        settling_trajectory(lagrangian, *pair, duration=20.0)
        for lagrangian, pair in zip((logs, other), ends, strict=True)
    )
    for column in range(2):
        pair = [
            np.interp(
                np.linspace(0.5, 10, 9),
                path.times.numpy(),
                torch.cat(lagrangian.metric.split(path.positions), 1)[:, column].numpy(),
            )
            for lagrangian, path in ((logs, first), (other, second))
        ]
        np.testing.assert_allclose(*pair, atol=2e-3)


def test_infinite_discount_is_mesu() -> None:
    found = mesu_differences()
    assert found["overdamped_field"] < 1e-12
    assert found["exact_extrapolated"] < 1e-6
    near, far = found["exact_at_discounts"].values()
    assert near / far == pytest.approx(2.0, abs=0.01)


@pytest.mark.parametrize("discount", [0.5, 3.0])
def test_the_optimizer_s_rule_errs_in_the_second_order_at_finite_discount(discount: float) -> None:
    errors = distance_errors(discount)
    assert all(order == pytest.approx(2.0, abs=0.25) for order in orders(errors)), errors


BOWL = LearningLagrangian(lambda x: 0.5 * (x * x).sum())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: settling_trajectory(BOWL, torch.ones(1), torch.ones(2)), "one shape"),
        (lambda: settling_trajectory(BOWL, torch.ones(1), torch.ones(1)), "rest: expected a stationary point"),
        (
            lambda: settling_trajectory(
                LearningLagrangian(lambda x: -0.5 * (x * x).sum()), torch.ones(1), torch.zeros(1)
            ),
            "flat or descending",
        ),
        (
            lambda: settling_trajectory(
                LearningLagrangian(lambda x: 0.0 * x.sum(), discount=1.0), torch.ones(1), torch.zeros(1)
            ),
            "duration: expected a number",
        ),
        (
            lambda: settling_trajectory(
                LearningLagrangian(lambda x: 0.5 * (x * x).sum(), drift=lambda x: 1.0 - x),
                torch.ones(1),
                torch.tensor([0.5]),
            ),
            "action over an unbounded horizon is infinite",
        ),
    ],
)
def test_refusals(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
