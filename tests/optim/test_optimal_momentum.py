"""The finite-horizon step: the paper's rates, exactness on a quadratic, and its limits SGD and Newton."""

import math

import pytest
import torch
from cases import assert_same_tensors, mlp, train
from torch import nn

from clagrange.optim import OptimalMomentum


def on_a_parabola(curvature: torch.Tensor, start: torch.Tensor, steps: int = 1, **settings) -> torch.Tensor:
    """θ after steps on ½Σhθ², the curvature known."""
    weight = nn.Parameter(start.clone())
    optimizer = OptimalMomentum([weight], curvature_decay=1.0, **settings)
    optimizer.set_curvature(weight, curvature)
    for _ in range(steps):
        weight.grad = curvature * weight.detach()
        optimizer.step()
    return weight.detach()


@pytest.mark.parametrize(("discount", "rate"), [(1e-12, 1.0), (1.0, 0.618034), (10.0, 0.0990195)])
def test_rates_of_the_papers_figure(discount: float, rate: float) -> None:
    """η = k = h = 1: λ = 1, .618034, .0990195 at γ = 0, 1, 10; lr = ηk/γ."""
    one = torch.ones(1, dtype=torch.float64)
    end = on_a_parabola(one, one, lr=1 / discount, discount=discount)
    assert -math.log(end.item()) == pytest.approx(rate, abs=5e-7)


def test_steps_of_any_length_follow_the_same_path() -> None:
    """On a quadratic e^{−λt} is the whole path: 6 steps of 1/2 are one of 3."""
    curvature = torch.tensor([0.0, 0.1, 1.0, 30.0], dtype=torch.float64)
    start = torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=torch.float64)
    for discount in (0.3, 5.0, math.inf):
        once = on_a_parabola(curvature, start, 1, lr=0.2, discount=discount, horizon=3.0)
        often = on_a_parabola(curvature, start, 6, lr=0.2, discount=discount, horizon=0.5)
        torch.testing.assert_close(once, often, rtol=1e-12, atol=1e-15)


def test_against_the_matrix_form() -> None:
    """−[I − e^{−ΛΔt}]H⁻¹g with Λ = (γ²/4 + ηkH)^{1/2} − γ/2."""
    curvature = torch.tensor([0.1, 1.0, 30.0], dtype=torch.float64)
    start = torch.tensor([-2.0, 3.0, 0.5], dtype=torch.float64)
    lr, discount, horizon = 0.7, 0.4, 1.5
    H, identity = torch.diag(curvature), torch.eye(3, dtype=torch.float64)
    root = torch.diag((discount**2 / 4 + lr * discount * curvature).sqrt()) - discount / 2 * identity
    step = (identity - torch.matrix_exp(-root * horizon)) @ torch.linalg.inv(H) @ (H @ start)
    torch.testing.assert_close(
        on_a_parabola(curvature, start, lr=lr, discount=discount, horizon=horizon), start - step
    )


def test_overdamped_and_small_it_is_sgd() -> None:
    nets = [mlp(), mlp()]
    train(nets[0], OptimalMomentum(nets[0].parameters(), lr=1e-3, horizon=2.0), range(20))
    train(nets[1], torch.optim.SGD(nets[1].parameters(), lr=2e-3), range(20))
    assert_same_tensors(dict(nets[0].state_dict()), dict(nets[1].state_dict()), rtol=2e-3, atol=2e-6)


def test_a_direction_without_curvature_takes_a_gradient_step() -> None:
    weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = OptimalMomentum([weight], lr=0.1, discount=0.5, horizon=3.0, curvature_decay=1.0)
    optimizer.set_curvature(weight, 0.0)
    weight.grad = torch.ones(1, dtype=torch.float64)
    optimizer.step()
    assert weight.item() == pytest.approx(-0.3, rel=1e-12)


@pytest.mark.parametrize("discount", [0.1, 10.0, math.inf])
def test_an_infinite_horizon_is_newtons_method(discount: float) -> None:
    curvature = torch.tensor([0.1, 1.0, 30.0], dtype=torch.float64)
    end = on_a_parabola(
        curvature, torch.ones(3, dtype=torch.float64), lr=0.1, discount=discount, horizon=math.inf
    )
    torch.testing.assert_close(end, torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-15)
    stacked = on_a_parabola(
        torch.ones(2, 3, dtype=torch.float64),
        torch.ones(2, 3, dtype=torch.float64),
        lr=0.1,
        horizon=torch.tensor([math.inf, 1.0]),
    )
    torch.testing.assert_close(stacked[:, 0], torch.tensor([0.0, math.exp(-0.1)], dtype=torch.float64))


def test_newton_on_a_singular_hessian_is_refused_with_the_reason() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = OptimalMomentum([weight], horizon=math.inf, curvature_decay=1.0)
    optimizer.set_curvature(weight, torch.tensor([1.0, 0.0]))
    weight.grad = torch.tensor([1.0, 0.0])
    optimizer.step()  # nothing is asked of the flat direction
    torch.testing.assert_close(weight.detach(), torch.tensor([0.0, 1.0]))
    weight.grad = torch.tensor([1.0, 1.0])
    with pytest.raises(ValueError, match=r"Hessian is singular, got inf; .*the loss is linear in that direction"):
        optimizer.step()
