"""The ballistic rule: the published form, Eq. 32, and its limits."""

import math

import pytest
import torch
from cases import assert_same_tensors, mlp, train
from torch import nn

from clagrange.dynamics import Belief
from clagrange.optim import Ballistic, OptimalMomentum


def test_published_form_line_by_line() -> None:
    """s ← β₂s + (1 − β₂)g²; p ← p − lr·g/√(s + 1e-8): no bias correction, first step lr/√(1 − β₂)."""
    weight = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    optimizer = Ballistic([weight], lr=5e-4, curvature_decay=0.999, bias_correction=False)
    p, s = weight.detach().clone(), torch.zeros(2, dtype=torch.float64)
    for step in range(10):
        weight.grad = torch.tensor([3.0, -0.5 * step - 1.0], dtype=torch.float64)
        s = 0.999 * s + 0.001 * weight.grad**2
        p = p - 5e-4 * weight.grad / torch.sqrt(s + 1e-8)
        optimizer.step()
        torch.testing.assert_close(weight.detach(), p, rtol=1e-13, atol=0)
        if step == 0:
            moved = torch.tensor([1.0, -2.0], dtype=torch.float64) - weight.detach()
            expected = torch.tensor([1.0, -1.0], dtype=torch.float64) * 5e-4 / math.sqrt(1e-3)
            torch.testing.assert_close(moved, expected, rtol=1e-4, atol=0)


def test_published_form_is_rmsprop_but_for_the_place_of_epsilon() -> None:
    nets = [mlp(), mlp()]
    train(nets[0], Ballistic(nets[0].parameters(), 1e-3, 0.9, eps=0.0, bias_correction=False), range(20))
    train(nets[1], torch.optim.RMSprop(nets[1].parameters(), lr=1e-3, alpha=0.9, eps=1e-300), range(20))
    assert_same_tensors(dict(nets[0].state_dict()), dict(nets[1].state_dict()), rtol=1e-10, atol=1e-12)


def test_large_epsilon_is_sgd() -> None:
    nets = [mlp(), mlp()]
    train(nets[0], Ballistic(nets[0].parameters(), lr=0.1 * 1e6, eps=1e12), range(20))
    train(nets[1], torch.optim.SGD(nets[1].parameters(), lr=0.1), range(20))
    assert_same_tensors(dict(nets[0].state_dict()), dict(nets[1].state_dict()), rtol=1e-8, atol=1e-8)


def test_without_memory_it_is_sign_descent() -> None:
    weight = nn.Parameter(torch.tensor([5.0, -5.0, 5.0]))
    optimizer = Ballistic([weight], lr=0.1, curvature_decay=0.0, eps=0.0)
    weight.grad = torch.tensor([1e-3, -7.0, 0.0])
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.tensor([4.9, -4.9, 5.0]))


def test_is_the_limit_of_optimal_momentum_at_small_discount_and_short_horizon() -> None:
    """Eq. 32 with a known Hessian: −√(ηk)Δt·H^{−1/2}g; the error falls with the horizon, order 1."""
    curvature = torch.tensor([0.04, 1.0, 25.0], dtype=torch.float64)
    errors = []
    for horizon in (1e-2, 5e-3):
        weights = [nn.Parameter(torch.tensor([3.0, -1.0, 0.5], dtype=torch.float64)) for _ in range(2)]
        ballistic = Ballistic([weights[0]], lr=horizon, curvature_decay=1.0, eps=0.0)
        momentum = OptimalMomentum([weights[1]], lr=1e12, discount=1e-12, horizon=horizon, curvature_decay=1.0)
        for weight, optimizer in zip(weights, (ballistic, momentum), strict=True):
            optimizer.set_curvature(weight, curvature)
            weight.grad = curvature * weight.detach()
        start = weights[0].detach().clone()
        for optimizer in (ballistic, momentum):
            optimizer.step()
        steps = [weight.detach() - start for weight in weights]
        torch.testing.assert_close(steps[0], -horizon * curvature.sqrt() * start)
        errors.append((steps[1] / steps[0] - 1).abs())
    assert (errors[0] < 0.5 * 1e-2 * curvature.sqrt() * 1.01).all()
    torch.testing.assert_close(
        errors[0] / errors[1], torch.full((3,), 2.0, dtype=torch.float64), rtol=0.05, atol=0
    )


def test_a_belief_is_taken_at_discount_zero() -> None:
    """a = 0: β = e^{−s/r}, the Kalman filter's."""
    nets = [mlp(), mlp()]
    for net, belief in zip(nets, (Belief(0.0, 0.05, 0.5), math.exp(-0.1)), strict=True):
        train(net, Ballistic(net.parameters(), 1e-2, belief), range(10))
    assert_same_tensors(dict(nets[0].state_dict()), dict(nets[1].state_dict()), rtol=1e-11, atol=1e-12)


def test_curvature_that_is_held_has_to_be_set_and_sensible() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = Ballistic([weight], curvature_decay=1.0)
    weight.grad = torch.ones(2)
    with pytest.raises(RuntimeError, match=r"curvature_decay: at 1 the curvature is held.*call set_curvature"):
        optimizer.step()
    with pytest.raises(
        ValueError, match=r"curvature: .*got -1 to 1; .*no minimum and no bounded path is optimal"
    ):
        optimizer.set_curvature(weight, torch.tensor([-1.0, 1.0]))
    optimizer.set_curvature(weight, 4.0)
    again = Ballistic([weight], curvature_decay=1.0)
    again.load_state_dict(optimizer.state_dict())
    again.step()
    torch.testing.assert_close(weight.detach(), torch.full((2,), 1.0 - 1e-3 / 2))
