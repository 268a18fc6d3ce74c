"""Drift: the end points and rates of the paper's Fig. 3, exactness on a quadratic, weight decay as a limit."""

import math

import pytest
import torch
from cases import assert_same_tensors, mlp, train
from scipy.linalg import solve_continuous_are
from torch import nn

from clagrange.optim import Drift, OptimalMomentum

TINY = 1e-9
"""A discount in place of 0⁺."""


def after(steps: int, start: list[float], optimum: list[float], curvature: float, **settings) -> torch.Tensor:
    """θ after steps on (h/2)‖θ − θ*‖², the curvature known."""
    weight = nn.Parameter(torch.tensor(start, dtype=torch.float64))
    optimizer = Drift([weight], curvature_decay=1.0, **settings)
    optimizer.set_curvature(weight, curvature)
    for _ in range(steps):
        weight.grad = curvature * (weight.detach() - torch.tensor(optimum, dtype=torch.float64))
        optimizer.step()
    return weight.detach()


@pytest.mark.parametrize("kind", ["rotation", "weight_decay"])
def test_end_points_of_figure_3(kind: str) -> None:
    """γ → 0⁺, η = k = 1, H = 4, θ* = (0, −.5), j or q = 10: both end at (0, −.01923)."""
    end = after(60, [1.5, 1.5], [0.0, -0.5], 4.0, lr=1 / TINY, discount=TINY, **{kind: 10.0})
    torch.testing.assert_close(
        end, torch.tensor([0.0, -0.5 * 4 / 104], dtype=torch.float64), rtol=1e-6, atol=1e-8
    )


def test_rates_of_figure_3() -> None:
    """Rotation: rate 2 and 10 radians; decay: √(4 + 100) = 10.198."""
    rest = torch.tensor([0.0, -0.5 * 4 / 104], dtype=torch.float64)
    start = torch.tensor([1.5, 1.5], dtype=torch.float64)
    turned = after(1, [1.5, 1.5], [0.0, -0.5], 4.0, lr=1 / TINY, discount=TINY, rotation=10.0) - rest
    c, s = math.cos(10.0), math.sin(10.0)
    turn = torch.tensor([[c, -s], [s, c]], dtype=torch.float64)
    torch.testing.assert_close(turned, math.exp(-2.0) * turn @ (start - rest), rtol=1e-6, atol=1e-8)
    decayed = after(1, [1.5, 1.5], [0.0, -0.5], 4.0, lr=1 / TINY, discount=TINY, weight_decay=10.0) - rest
    torch.testing.assert_close(decayed, math.exp(-math.sqrt(104.0)) * (start - rest), rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize("discount", [0.05, 1.0, 30.0])
@pytest.mark.parametrize(("decay", "turn"), [(0.3, 0.0), (0.0, -0.7), (0.2, 0.5)])
def test_against_the_riccati_equation(decay: float, turn: float, discount: float) -> None:
    """δ' = (J − ηP)δ with P of the CARE for A = J − γ/2, B = 1, Q = kh: no roots are picked by hand."""
    h, eta = 1.7, 0.8
    J = torch.tensor([[-decay, -turn], [turn, -decay]], dtype=torch.float64)
    identity = torch.eye(2, dtype=torch.float64)
    P = torch.from_numpy(
        solve_continuous_are(
            (J - discount / 2 * identity).numpy(),
            identity.numpy(),
            (eta * h * identity).numpy(),
            identity.numpy(),
        )
    )
    flow = torch.matrix_exp(J - P)
    settings = {"lr": eta / discount, "discount": discount, "weight_decay": decay, "rotation": turn}
    optimum = [0.4, -1.1]
    # with the minimum at 0 the fixed point is 0
    for start in ([1.0, 0.0], [-0.3, 2.0]):
        expected = flow @ torch.tensor(start, dtype=torch.float64)
        torch.testing.assert_close(after(1, start, [0.0, 0.0], h, **settings), expected, rtol=1e-9, atol=1e-12)
    # elsewhere the steps differ by the same flow, and the fixed point is where nothing moves
    a, b = (after(1, start, optimum, h, **settings) for start in ([1.0, 0.5], [0.0, 0.0]))
    torch.testing.assert_close(a - b, flow @ torch.tensor([1.0, 0.5], dtype=torch.float64), rtol=1e-9, atol=1e-12)
    rest = torch.linalg.solve(identity - flow, b)
    c = complex(-decay, turn)
    expected_rest = complex(*optimum) * eta * h / (eta * h + abs(c) ** 2 - discount * c)
    torch.testing.assert_close(
        rest, torch.tensor([expected_rest.real, expected_rest.imag], dtype=torch.float64), rtol=1e-8, atol=1e-10
    )


@pytest.mark.parametrize("lr", [1e-3, 1e-4])
def test_overdamped_it_is_sgd_with_weight_decay(lr: float) -> None:
    nets = [mlp(), mlp()]
    train(nets[0], Drift(nets[0].parameters(), lr=lr, weight_decay=0.1 * lr), range(20))
    train(nets[1], torch.optim.SGD(nets[1].parameters(), lr=lr, weight_decay=0.1), range(20))
    for mine, theirs, start in zip(nets[0].parameters(), nets[1].parameters(), mlp().parameters(), strict=True):
        assert (mine - theirs).abs().max() < 3 * lr * (theirs - start).abs().max()  # an error of the next order


def test_without_drift_it_is_optimal_momentum() -> None:
    nets = [mlp(), mlp()]
    for net, form in zip(nets, (Drift, OptimalMomentum), strict=True):
        train(net, form(net.parameters(), lr=0.1, discount=0.4), range(20))
    assert_same_tensors(dict(nets[0].state_dict()), dict(nets[1].state_dict()), rtol=1e-12, atol=1e-13)


def test_rotation_turns_planes_and_leaves_an_odd_entry() -> None:
    """Without gradients, at γ → ∞: a quarter turn of (0, 1), (2, 3); the fifth only decays."""
    weight = nn.Parameter(torch.tensor([[1.0, 0.0, 2.0, 3.0, 5.0]], dtype=torch.float64))
    optimizer = Drift([weight], lr=0.1, rotation=math.pi / 2, weight_decay=0.2)
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    expected = math.exp(-0.2) * torch.tensor([[0.0, 1.0, -3.0, 2.0, 5.0]], dtype=torch.float64)
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-12, atol=1e-12)


def test_a_tensor_of_rotations_is_each_replicas_own() -> None:
    """Also where one of them is 0: there the curvature is not averaged over planes."""
    start = torch.tensor([[1.0, 2.0, 3.0]] * 2, dtype=torch.float64)
    curvature = torch.tensor([[0.1, 1.0, 10.0]] * 2, dtype=torch.float64)

    def end(start: torch.Tensor, curvature: torch.Tensor, rotation: object) -> torch.Tensor:
        weight = nn.Parameter(start.clone())
        optimizer = Drift([weight], lr=0.5, rotation=rotation, discount=0.7, curvature_decay=1.0)
        optimizer.set_curvature(weight, curvature)
        weight.grad = curvature * start
        optimizer.step()
        return weight.detach()

    stacked = end(start, curvature, torch.tensor([0.0, 0.3], dtype=torch.float64))
    for row, rotation in zip(stacked, (0.0, 0.3), strict=True):
        torch.testing.assert_close(row, end(start[0], curvature[0], rotation), rtol=1e-12, atol=0)
