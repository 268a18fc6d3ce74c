"""The motion term: its coefficient, order and bounds, the boundary-value solution, an unannounced switch."""

import copy
import math

import numpy as np
import pytest
import torch
from cases import R, assert_same_tensors, backward, batch, gaussian_parameters, mlp, tensor, train
from scipy.integrate import solve_bvp
from torch import nn

from clagrange import gaussianize, replicas
from clagrange.dynamics import (
    mean_displacement,
    relaxation_fraction,
    relaxed_precision,
    second_order_manifold,
    stable_root,
)
from clagrange.optim import EulerLagrange
from clagrange.optim.motion import motion_resistance, widened_precision

ONE, NONE = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)


@pytest.mark.parametrize("discount", [0.01, 1.0, 30.0])
def test_one_step_is_the_motion_term_of_the_second_order_manifold(discount: float) -> None:
    """At y = 0, no prior: Δ log σ = λ²x²/(2(3λ + γ)) for u = −λxσ."""
    lr, x, deviation = 0.3, 0.7, 2.0
    root = stable_root(lr, discount)
    precision = tensor(1 / deviation**2)
    after = widened_precision(precision, NONE, tensor(-root * x * deviation), motion_resistance(lr, discount))
    rise = 0.5 * torch.log(precision / after)
    torch.testing.assert_close(rise, second_order_manifold(tensor(x), tensor(0.0), root, discount)[1])


def test_any_velocity_leaves_the_precision_between_its_prior_and_itself() -> None:
    precision = torch.tensor([1.0, 1.0 + 1e-6, 5.0, 1e9])
    for velocity in (0.0, 1e-8, 0.1, 1e4, -1e9):
        for resistance in (1e-6, 1.0, math.inf):
            after = widened_precision(precision, torch.ones(()), torch.full((4,), velocity), resistance)
            assert (after >= 1.0).all()
            assert (after <= precision * (1 + 1e-6)).all()
            if velocity == 0.0 or math.isinf(resistance):
                torch.testing.assert_close(after, precision, rtol=1e-6, atol=0)


def highest(shift: float, discount: float, duration: float) -> float:
    """max log(σ/σ*) by the discrete rule after a shift; h, T, σ* and ητ are 1, no prior."""
    lr, per_step = duration / discount, discount * duration
    fraction, resistance = relaxation_fraction(lr, per_step), motion_resistance(lr, per_step)
    mean, precision, top = shift * ONE, ONE, 0.0
    for _ in range(math.ceil(4 / (duration * stable_root(1 / discount, discount)))):
        precision = relaxed_precision(precision, ONE, NONE, 1.0, fraction)
        step = mean_displacement(mean, NONE, precision, ONE, NONE, 1.0, lr, per_step)
        mean = mean + step
        precision = widened_precision(precision, NONE, step, resistance)
        top = max(top, -0.5 * math.log(float(precision)))
    return top


@pytest.mark.parametrize(
    ("discount", "shift", "exact", "tolerance"),
    [
        (1e-3, 1.0, 0.0401, 0.03),
        (1e-3, 2.0, 0.144, 0.07),
        (1e-3, 5.0, 0.568, 0.15),
        (1.0, 1.0, 0.0266, 0.03),
        (10.0, 1.0, 0.00120, 0.02),
    ],
)
def test_rise_after_a_shift_against_the_boundary_value_problem(
    discount: float, shift: float, exact: float, tolerance: float
) -> None:
    """Values of the coupled equations (γ = 0 by 1e-3). Extrapolated to step 0 the rule errs by O(shift²)."""
    duration = 0.08 / stable_root(1 / discount, discount)
    rises = [highest(shift, discount, part * duration) for part in (1.0, 0.5, 0.25)]
    assert (rises[0] - rises[1]) / (rises[1] - rises[2]) == pytest.approx(2.0, abs=0.15)  # order 1 in the step
    limit = 2 * rises[2] - rises[1]
    assert limit == pytest.approx(exact, rel=tolerance)
    assert rises[0] == pytest.approx(exact, rel=2 * tolerance + 0.05)


def test_the_boundary_value_problem_itself() -> None:
    """x'' − (γ + 2y')x' = e^{2y}x, y'' − γy' = −½x'²e^{−2y} + ½(e^{2y} − 1): max y = .0266 at γ = 1, x₀ = 1."""
    discount, shift = 1.0, 1.0
    root = stable_root(1.0, discount)
    push = root**2 / (2 * (3 * root + discount))
    times = torch.linspace(0, 20, 200, dtype=torch.float64).numpy()

    def field(_, q):
        x, u, y, w = q
        force = -0.5 * u**2 * np.exp(-2 * y) + 0.5 * np.expm1(2 * y)
        return np.stack([u, (discount + 2 * w) * u + np.exp(2 * y) * x, w, discount * w + force])

    def ends(a, b):
        return [a[0] - shift, a[2], b[1] + root * b[0], b[3] + root * b[2] - push * b[0] ** 2]

    first = math.e ** (-root * times)
    start = [first, -root * first, 0 * first, 0 * first]
    solution = solve_bvp(field, ends, times, start, tol=1e-6)
    assert solution.success
    assert solution.sol(times)[2].max() == pytest.approx(0.0266, abs=1e-4)


# ------------------------------------------------------------------------------------------- the optimizer
SETTINGS = {"lr": 0.05, "temperature": 1e-3, "motion": True}


@pytest.mark.parametrize("discount", [1e-3, 0.5, 20.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_multi_tensor_kernels_equal_the_loop(discount: float, dtype: torch.dtype) -> None:
    nets = [gaussianize(mlp(dtype=dtype), prior_mean="initial") for _ in range(2)]
    for net, foreach in zip(nets, (True, False), strict=True):
        train(net, EulerLagrange(net, discount=discount, foreach=foreach, **SETTINGS), range(10))
    tolerance = 1e-11 if dtype == torch.float64 else 5e-2
    assert_same_tensors(dict(nets[0].state_dict()), dict(nets[1].state_dict()), rtol=tolerance, atol=tolerance)


def test_replicas_with_discounts_of_their_own_equal_separate_runs() -> None:
    """An infinite discount in a tensor is the rule without motion."""
    discounts = [0.05, 2.0, math.inf]
    nets = [mlp(seed) for seed in range(R)]
    stacked = gaussianize(replicas.stack(nets))
    optimizer = EulerLagrange(stacked, discount=tensor(*discounts), **SETTINGS)
    singles = []
    for net, discount in zip(nets, discounts, strict=True):
        gaussianize(net)
        motion = {**SETTINGS, "motion": not math.isinf(discount)}
        singles.append(EulerLagrange(net, discount=discount, **motion))
    for step in range(20):
        batches = [batch(100 * r + step) for r in range(R)]
        backward(stacked, optimizer, *(torch.stack(part) for part in zip(*batches, strict=True)))
        optimizer.step()
        for net, single, (inputs, targets) in zip(nets, singles, batches, strict=True):
            backward(net, single, inputs, targets)
            single.step()
    for net, single in zip(nets, replicas.unstack(stacked), strict=True):
        assert_same_tensors(dict(single.state_dict()), dict(net.state_dict()), rtol=1e-10, atol=1e-10)


def test_without_motion_there_is_no_velocity_and_nothing_changes() -> None:
    nets = [gaussianize(mlp()) for _ in range(2)]
    plain = EulerLagrange(nets[0], lr=0.05, temperature=1e-3, discount=1e6)
    moving = EulerLagrange(nets[1], discount=1e6, **SETTINGS)
    train(nets[0], plain, range(5))
    train(nets[1], moving, range(5))
    assert plain.state_dict()["state"] == {}
    assert set(moving.state[nets[1][0].weight]) == {"velocity"}
    assert_same_tensors(dict(nets[0].state_dict()), dict(nets[1].state_dict()), rtol=1e-5, atol=1e-5)


def test_motion_can_be_turned_on_for_an_older_checkpoint() -> None:
    net = gaussianize(mlp())
    optimizer = EulerLagrange(net, discount=1.0, **SETTINGS)
    state = optimizer.state_dict()
    del state["param_groups"][0]["motion"]
    optimizer.load_state_dict(copy.deepcopy(state))
    assert optimizer.param_groups[0]["motion"] is True
    train(net, optimizer, range(2))


@pytest.mark.parametrize("motion", [False, True])
def test_variance_at_a_switch_that_nobody_announces(motion: bool) -> None:
    """Regression whose coefficients jump by 20 posterior deviations; the curvature, known from n·g², is steady.

    Gradients of examples carry noise 1, so that their squares are dominated by it before and after the switch.
    With the motion term the variance rises at the switch and returns; without, it only falls, since the larger
    residuals look like curvature.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    layer = gaussianize(nn.Linear(4, 200, bias=False).double(), prior_variance=2.0)
    truth = 0.3 * draw(200, 4)
    optimizer = EulerLagrange(layer, lr=0.02, temperature=1e-4, discount=0.005, motion=motion, trust_region=1.0)
    history = []
    for step in range(1700):
        if step == 1000:
            truth = truth + 0.2
        inputs = draw(8, 4)
        optimizer.zero_grad()
        targets = inputs @ truth.T + draw(8, 200)
        (0.5 * (layer(inputs) - targets).square().sum(-1).mean()).backward()
        optimizer.step()
        history.append(layer.weight_precision.variance().log().mean().item())
    before = sum(history[900:1000]) / 100
    rise = max(history[1000:1200]) - before
    assert (rise > 0.5) if motion else (rise < 0.1)
    assert sum(history[1600:]) / 100 == pytest.approx(before, abs=0.15)


def test_motion_keeps_every_weight_finite_and_inside_its_prior() -> None:
    """Contradicting labels, steps as large as the trust region, a discount at which the force is strongest."""
    net = gaussianize(mlp())
    optimizer = EulerLagrange(net, lr=0.5, temperature=1e-4, discount=1e-3, motion=True)
    for task in range(6):
        for step in range(20):
            inputs, targets = batch(step)
            backward(net, optimizer, inputs, (targets + task) % 3)
            optimizer.step()
        assert all(value.isfinite().all() for value in net.state_dict().values())
        for _, _, precision in gaussian_parameters(net):
            assert (precision.precision >= precision.prior_precision).all()


def test_motion_refuses_a_precision_it_does_not_know() -> None:
    net = gaussianize(nn.Linear(3, 2), precision="kronecker")
    optimizer = EulerLagrange(net, discount=1.0, motion=True)
    net(torch.ones(4, 3)).sum().backward()
    with pytest.raises(TypeError, match=r"motion: expected diagonal precisions, got a KroneckerPrecision"):
        optimizer.step()
