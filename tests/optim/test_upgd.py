"""UPGD: the published update on a fixed example, and what it exists for."""

import math

import pytest
import torch
from cases import mlp, train

from clagrange import replicas
from clagrange.interventions.base import forget_entries
from clagrange.optim import UPGD
from clagrange.replicas import generators_from_seeds

WEIGHTS = [[0.5, -1.0, 2.0], [1.5, 0.25, -0.75]]
GRADIENTS = [[[0.2, 0.4, -0.1], [-0.3, 0.0, 0.6]], [[-0.5, 0.1, 0.3], [0.2, -0.2, 0.1]]]


def published(scope: str, protecting: bool, noises: list) -> list[list[float]]:
    """Two steps of Algorithm 1, number by number."""
    lr, sigma, beta, decay = 0.1, 0.05, 0.9, 0.01
    w = [row[:] for row in WEIGHTS]
    u = [[0.0] * 3 for _ in range(2)]
    for step, (g, noise) in enumerate(zip(GRADIENTS, noises, strict=True), 1):
        u = [[beta * u[i][j] + (1 - beta) * -g[i][j] * w[i][j] for j in range(3)] for i in range(2)]
        hat = [[u[i][j] / (1 - beta**step) for j in range(3)] for i in range(2)]
        for i in range(2):
            scale = max(max(row) for row in hat) if scope == "global" else math.hypot(*hat[i])
            for j in range(3):
                change = 1 - 1 / (1 + math.exp(-hat[i][j] / scale))
                noisy = (g[i][j] + sigma * noise[i][j]) * change
                step_ij = noisy if protecting else g[i][j] + sigma * noise[i][j] * change
                w[i][j] = (1 - lr * decay) * w[i][j] - lr * step_ij
    return w


@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize("protecting", [True, False])
def test_published_update_by_hand(scope: str, protecting: bool) -> None:
    generator = generators_from_seeds(3, purpose="UPGD")
    noises = [torch.randn(2, 3, generator=generator, dtype=torch.float64).tolist() for _ in range(2)]
    weight = torch.nn.Parameter(torch.tensor(WEIGHTS, dtype=torch.float64))
    optimizer = UPGD(
        [weight], lr=0.1, noise=0.05, decay=0.9, weight_decay=0.01, scope=scope, protecting=protecting, seed=3
    )
    for gradient in GRADIENTS:
        weight.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
    expected = torch.tensor(published(scope, protecting, noises), dtype=torch.float64)
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-9, atol=1e-12)


def test_the_largest_utility_of_all_parameters_is_the_scale() -> None:
    weights = [torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64)) for _ in range(2)]
    optimizer = UPGD(weights, lr=1.0, noise=0.0)
    weights[0].grad, weights[1].grad = (torch.tensor([g], dtype=torch.float64) for g in (-1.0, -4.0))
    optimizer.step()
    expected = [1 + g * (1 - 1 / (1 + math.exp(-g / 4))) for g in (1.0, 4.0)]
    assert [float(weight.detach()) for weight in weights] == pytest.approx(expected, rel=1e-12)


def test_useful_weights_move_less_and_useless_ones_are_perturbed() -> None:
    """Two weights of one size and gradient, one of which the loss would miss."""
    weight = torch.nn.Parameter(torch.ones(2000, dtype=torch.float64))
    optimizer = UPGD([weight], lr=0.1, noise=1.0, decay=0.0)
    weight.grad = torch.cat([torch.full((1000,), -1.0), torch.full((1000,), 1.0)]).double()
    optimizer.step()
    moved = weight.detach() - 1.0
    assert float(moved[:1000].std()) == pytest.approx(0.1 * (1 - 1 / (1 + math.exp(-1))), rel=0.1)
    assert float(moved[1000:].std()) == pytest.approx(0.1 * (1 - 1 / (1 + math.exp(1))), rel=0.1)


def test_each_unit_of_a_stacked_convolution_has_its_own_scale() -> None:
    """Local scales are those of every replica alone, whatever the number of dimensions."""
    shapes = ((4, 2, 3, 3), (4,), (3, 4))
    generator = torch.Generator().manual_seed(0)
    for shape in shapes:
        start, gradient = torch.randn(2, 2, *shape, generator=generator, dtype=torch.float64)
        stacked = torch.nn.Parameter(start.clone())
        stacked.grad = gradient
        UPGD([stacked], scope="local", seed=[1, 2], decay=0.5).step()
        for replica, seed in enumerate((1, 2)):
            single = torch.nn.Parameter(start[replica].clone())
            single.grad = gradient[replica]
            UPGD([single], scope="local", seed=seed, decay=0.5).step()
            torch.testing.assert_close(stacked[replica], single, rtol=1e-12, atol=0)


def test_one_seed_for_a_stack_counts_up() -> None:
    results = []
    for seed in (4, [4, 5]):
        weight = torch.nn.Parameter(torch.ones(2, 3))
        weight.grad = torch.ones(2, 3)
        UPGD([weight], seed=seed, stacked=True, noise=1.0).step()
        results.append(weight.detach())
    assert torch.equal(*results)
    assert not torch.equal(results[0][0], results[0][1])


def test_the_utility_of_forgotten_entries_starts_over() -> None:
    net = mlp()
    optimizer = UPGD(net.parameters(), decay=0.9)
    train(net, optimizer, range(3))
    mask = torch.zeros(6, 5, dtype=torch.bool)
    mask[2] = True
    before = optimizer.state[net[0].weight]["utility"].clone()
    forget_entries(optimizer, net[0].weight, mask)
    utility = optimizer.state[net[0].weight]["utility"]
    assert not utility[mask].any()
    assert torch.equal(utility[~mask], before[~mask])


def test_a_stack_without_gradients_stays() -> None:
    net = replicas.stack([mlp(0), mlp(1)])
    UPGD(net.parameters(), seed=[0, 1]).step()
    torch.testing.assert_close(net[0].weight[1], mlp(1)[0].weight)
