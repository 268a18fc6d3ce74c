"""A belief in place of the curvature's decay: its numbers, replicas, files, checkpoints."""

import io
import math

import jsonargparse
import pytest
import torch
from cases import R, assert_same_tensors, backward, batch, mlp, tensor, train

from clagrange import gaussianize, replicas
from clagrange.dynamics import Belief
from clagrange.optim import EulerLagrange

SETTINGS = {"lr": 0.05, "temperature": 1e-3, "discount": 0.5}


@pytest.mark.parametrize("foreach", [True, False])
def test_a_belief_without_decay_is_the_running_average(foreach: bool) -> None:
    nets = [gaussianize(mlp()) for _ in range(2)]
    for net, belief in zip(nets, (0.9, Belief.averaging(0.9, 0.5)), strict=True):
        train(net, EulerLagrange(net, curvature_decay=belief, foreach=foreach, **SETTINGS), range(10))
    assert_same_tensors(dict(nets[0].state_dict()), dict(nets[1].state_dict()), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("foreach", [True, False])
def test_a_belief_sees_the_curvature_through_its_gain(foreach: bool) -> None:
    """h ← βh + (1 − β)·(s²/r²)/κ²·n g² with β = e^{−λ_κ}."""
    a, s, r, discount = 0.1, 0.6, 2.0, 0.5
    square = a * (a + discount) + (s / r) ** 2
    beta = math.exp(-(math.sqrt(discount**2 / 4 + square) - discount / 2))
    gain = (s / r) ** 2 / square
    net = gaussianize(mlp())
    optimizer = EulerLagrange(net, curvature_decay=Belief(a, s, r), foreach=foreach, **SETTINGS)
    expected = torch.zeros(6, 5, dtype=torch.float64)
    for step in range(5):
        backward(net, optimizer, *batch(step))
        expected = beta * expected + (1 - beta) * gain * 8 * net[0].weight.grad.square()
        optimizer.step()
    torch.testing.assert_close(net[0].weight_precision.curvature, expected, rtol=1e-11, atol=0)


def test_replicas_may_hold_different_beliefs() -> None:
    decays, noises, discounts = [0.0, 0.05, 0.2], [0.2, 0.1, 0.5], [0.5, 2.0, 10.0]
    nets = [mlp(seed) for seed in range(R)]
    stacked = gaussianize(replicas.stack(nets))
    for net in nets:
        gaussianize(net)
    belief = Belief(tensor(*decays), tensor(*noises), 1.0)
    optimizer = EulerLagrange(stacked, 0.05, 1e-3, discount=tensor(*discounts), curvature_decay=belief)
    singles = [
        EulerLagrange(net, 0.05, 1e-3, discount=discount, curvature_decay=Belief(a, s, 1.0))
        for net, a, s, discount in zip(nets, decays, noises, discounts, strict=True)
    ]
    for step in range(10):
        batches = [batch(100 * r + step) for r in range(R)]
        backward(stacked, optimizer, *(torch.stack(part) for part in zip(*batches, strict=True)))
        optimizer.step()
        for net, single, (inputs, targets) in zip(nets, singles, batches, strict=True):
            backward(net, single, inputs, targets)
            single.step()
    for net, single in zip(nets, replicas.unstack(stacked), strict=True):
        assert_same_tensors(dict(single.state_dict()), dict(net.state_dict()), rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match=r"decay: .*one for each of 3 replicas, got 2 numbers"):
        EulerLagrange(stacked, discount=1.0, curvature_decay=Belief(torch.zeros(2), 1.0, 1.0))


def test_checkpoint_holds_numbers_only() -> None:
    net = gaussianize(mlp())
    optimizer = EulerLagrange(net, curvature_decay=Belief(0.1, 0.2, 0.3), **SETTINGS)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = EulerLagrange(net)
    other.load_state_dict(torch.load(file, weights_only=True))
    expected = {"decay": 0.1, "process_noise": 0.2, "observation_noise": 0.3}
    assert other.param_groups[0]["curvature_decay"] == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.9", 0.9),
        ("{decay: 0.1, process_noise: 0.2, observation_noise: 0.3}", Belief(0.1, 0.2, 0.3)),
    ],
)
def test_a_file_can_say_a_number_or_a_belief(text: str, expected: object) -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(EulerLagrange, "optimizer", skip={"params"}, instantiate=False)
    file = parser.parse_string(f"optimizer:\n  discount: 0.5\n  curvature_decay: {text}\n")
    settings = parser.instantiate(file).optimizer
    assert settings.curvature_decay == expected
    train(net := gaussianize(mlp()), EulerLagrange(net, **settings.as_dict()), range(2))
