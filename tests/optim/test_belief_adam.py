"""Beliefs that do not decay make Adam; the others are what clagrange.dynamics says."""

import math

import pytest
import torch
from cases import R, assert_same_tensors, batch, mlp, tensor, train
from torch import nn

from clagrange import replicas
from clagrange.dynamics import Belief, observe_gaussian, observe_moments
from clagrange.networks import cross_entropy
from clagrange.optim import BeliefAdam


@pytest.mark.parametrize("as_beliefs", [False, True])
def test_beliefs_without_decay_are_adam(as_beliefs: bool) -> None:
    nets = [mlp(), mlp()]
    betas = (0.8, 0.99)
    beliefs = [Belief.averaging(beta, 3.0) if as_beliefs else beta for beta in betas]
    train(nets[0], BeliefAdam(nets[0].parameters(), 0.01, *beliefs, discount=3.0), range(30))
    train(nets[1], torch.optim.Adam(nets[1].parameters(), lr=0.01, betas=betas), range(30))
    assert_same_tensors(dict(nets[0].state_dict()), dict(nets[1].state_dict()), rtol=1e-10, atol=1e-11)


def test_without_memory_and_with_large_epsilon_it_is_sgd() -> None:
    nets = [mlp(), mlp()]
    optimizer = BeliefAdam(nets[0].parameters(), lr=0.1 * 1e9, gradient_belief=0.0, eps=1e9)
    train(nets[0], optimizer, range(20))
    train(nets[1], torch.optim.SGD(nets[1].parameters(), lr=0.1), range(20))
    assert_same_tensors(dict(nets[0].state_dict()), dict(nets[1].state_dict()), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("observation", ["moments", "gaussian"])
def test_beliefs_follow_the_theory(observation: str) -> None:
    """θ ← θ − lr·m/(√v + ε), with m and v from the pure functions."""
    beliefs = Belief(0.02, 0.3, 1.0), Belief(0.05, 0.2, 0.7)
    weight = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = BeliefAdam(
        [weight], 0.1, *beliefs, discount=0.5, observation=observation, eps=1e-3, bias_correction=False
    )
    observe = observe_moments if observation == "moments" else observe_gaussian
    theta = m = v = torch.zeros(4, dtype=torch.float64)
    for _ in range(10):
        weight.grad = torch.randn(4, dtype=torch.float64)
        m, v = observe(m, v, weight.grad, beliefs, 0.5)
        theta = theta - 0.1 * m / (v.sqrt() + 1e-3)
        optimizer.step()
    torch.testing.assert_close(weight.detach(), theta, rtol=1e-12, atol=1e-13)


def test_gaussian_observation_moves_slower_where_gradients_are_noisy() -> None:
    """Gradients 1 ± noise: the speed is lr·m/σ, inversely proportional to the noise."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.tensor([0.5, 5.0], dtype=torch.float64).repeat(200)
    weight = nn.Parameter(torch.zeros(400, dtype=torch.float64))
    slow = Belief(0.0, 0.05, 1.0)
    optimizer = BeliefAdam([weight], 0.01, slow, Belief(0.0, 0.01, 1.0), discount=0.0, observation="gaussian")
    for _ in range(600):
        weight.grad = 1.0 + noise * torch.randn(400, generator=generator, dtype=torch.float64)
        before = weight.detach().clone()
        optimizer.step()
    speed = (before - weight.detach()).view(200, 2).median(0).values
    assert 4 < speed[0] / speed[1] < 16


@pytest.mark.parametrize("observation", ["moments", "gaussian"])
def test_replicas_may_hold_different_beliefs(observation: str) -> None:
    decays, noises = [0.0, 0.02, 0.1], [0.1, 0.2, 0.3]
    nets = [mlp(seed) for seed in range(R)]
    stacked = replicas.stack(nets)
    beliefs = [Belief(tensor(*decays), tensor(*noises), 1.0)] * 2
    optimizer = BeliefAdam(stacked.parameters(), 0.01, *beliefs, observation=observation, eps=1e-3)
    singles = [
        BeliefAdam(net.parameters(), 0.01, *[Belief(a, s, 1.0)] * 2, observation=observation, eps=1e-3)
        for net, a, s in zip(nets, decays, noises, strict=True)
    ]
    for step in range(10):
        inputs, targets = batch(step)
        for net, chosen, arguments in (
            (stacked, optimizer, (inputs.expand(R, -1, -1), targets.expand(R, -1))),
            *((net, single, (inputs, targets)) for net, single in zip(nets, singles, strict=True)),
        ):
            chosen.zero_grad()
            cross_entropy(net(arguments[0]), arguments[1]).backward()
            chosen.step()
    for net, single in zip(nets, replicas.unstack(stacked), strict=True):
        assert_same_tensors(dict(single.state_dict()), dict(net.state_dict()), rtol=1e-9, atol=1e-10)


def test_first_step_without_bias_correction() -> None:
    """lr·(1 − β₁)/√(1 − β₂), as Eq. 14 alone has it."""
    weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = BeliefAdam([weight], 0.1, eps=0.0, bias_correction=False)
    weight.grad = torch.full((1,), 7.0, dtype=torch.float64)
    optimizer.step()
    assert weight.item() == pytest.approx(-0.1 * 0.1 / math.sqrt(1e-3), rel=1e-10)
