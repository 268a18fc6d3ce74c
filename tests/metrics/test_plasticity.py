"""Measures of plasticity against plain computations, replica by replica, and on degenerate inputs."""

import math

import numpy as np
import oracles
import pytest
import torch
from cases import R, convnet, gaussian_parameters, images, mlp
from torch import Tensor, nn

from clagrange import gaussianize, replicas
from clagrange.metrics import dead_units, effective_rank, mean_variance, weight_magnitude
from clagrange.wiring import hidden_features


def features(seed: int, samples: int = 30, units: int = 12, dead: int = 3, rank: int = 5) -> Tensor:
    """ReLU features of low rank, some units of which are dead."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(n, rank, generator=generator, dtype=torch.float64) for n in (samples, units))
    values = (left @ right.T).relu()
    values[:, :dead] = 0.0
    return values


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", [(30, 12), (5, 12), (1, 12), (30, 1)])
def test_against_the_oracles(seed: int, shape: tuple[int, int]) -> None:
    values = features(seed, *shape, dead=min(seed, shape[1] - 1))
    assert float(dead_units(values)) == pytest.approx(oracles.dead_units(values.numpy()))
    assert float(effective_rank(values)) == pytest.approx(oracles.effective_rank(values.numpy()), rel=1e-4)


def test_known_ranks() -> None:
    assert float(effective_rank(torch.eye(7))) == pytest.approx(7)
    assert float(effective_rank(torch.ones(20, 7))) == pytest.approx(1, rel=1e-5)
    assert float(effective_rank(torch.diag(torch.tensor([3.0, 1.0])))) == pytest.approx(4 / 3**0.75)
    assert float(effective_rank(1e-20 * torch.eye(3))) == pytest.approx(3)
    assert float(effective_rank(1e20 * torch.eye(3))) == pytest.approx(3)


def test_known_fractions_of_dead_units() -> None:
    values = torch.tensor([[0.0, 1.0, -1.0, 0.0], [0.0, 0.0, 0.0, 1e-30]])
    assert float(dead_units(values)) == 0.25


def test_nothing_at_all() -> None:
    zeros = torch.zeros(6, 4)
    assert float(effective_rank(zeros)) == 0
    assert float(dead_units(zeros)) == 1
    assert effective_rank(torch.stack([zeros, torch.ones(6, 4)])).tolist() == pytest.approx([0, 1])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_diverged_features_give_numbers(bad: float) -> None:
    values = features(0).float()
    values[2, 7] = bad
    assert effective_rank(values).isfinite()
    assert float(dead_units(values)) == pytest.approx(3 / 12)
    assert effective_rank(torch.full((3, 3), bad)) == 0


def test_stacked_equals_separate() -> None:
    several = [features(seed, dead=seed) for seed in range(R)]
    stacked = torch.stack(several)
    torch.testing.assert_close(dead_units(stacked), torch.stack([dead_units(f) for f in several]))
    torch.testing.assert_close(effective_rank(stacked), torch.stack([effective_rank(f) for f in several]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_other_types(dtype: torch.dtype) -> None:
    values = features(1).to(dtype)
    assert float(effective_rank(values)) == pytest.approx(
        oracles.effective_rank(values.double().numpy()), rel=1e-3
    )
    assert float(dead_units(values)) == pytest.approx(oracles.dead_units(values.double().numpy()))


@pytest.mark.parametrize("make", [mlp, convnet])
def test_weight_magnitude(make) -> None:
    nets = [make(seed) for seed in range(R)]
    expected = [
        np.abs(np.concatenate([p.detach().numpy().ravel() for p in net.parameters()])).mean() for net in nets
    ]
    assert [float(weight_magnitude(net)) for net in nets] == pytest.approx(expected)
    assert weight_magnitude(replicas.stack(nets)).tolist() == pytest.approx(expected)


def test_mean_variance() -> None:
    assert mean_variance(mlp()) is None
    nets = [
        gaussianize(mlp(seed), prior_variance=0.3, layers={"4": {"prior_variance": 7.0}}) for seed in range(R)
    ]
    assert [float(mean_variance(net)) for net in nets] == pytest.approx([1.0] * R)
    expected = []
    for seed, net in enumerate(nets):
        ratios = []
        for _, _, precision in gaussian_parameters(net):
            precision.precision.mul_(1 + 5 * torch.rand_like(precision.precision))
            precision.precision.mul_(seed + 1)
            ratios.append((precision.prior_precision / precision.precision).flatten())
        expected.append(float(torch.cat(ratios).mean()))
    assert [float(mean_variance(net)) for net in nets] == pytest.approx(expected)
    assert mean_variance(replicas.stack(nets)).tolist() == pytest.approx(expected)


def test_hidden_features_are_what_enters_the_later_layers() -> None:
    net, (inputs, _) = convnet(), images()
    net[1].eval()
    modes = [module.training for module in net.modules()]
    seen = hidden_features(net, inputs)
    expected = [
        net[:2](inputs).movedim(1, -1).flatten(0, 2),
        net[:5](inputs),
        net[:7](inputs),
    ]
    assert [values.shape for values in seen] == [(8 * 36, 4), (8, 12), (8, 5)]
    for values, wanted in zip(seen, expected, strict=True):
        torch.testing.assert_close(values, wanted)
    assert [module.training for module in net.modules()] == modes
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_hidden_features_of_a_stack_are_those_of_its_replicas() -> None:
    nets = [convnet(seed) for seed in range(R)]
    inputs = torch.stack([images(seed)[0] for seed in range(R)])
    seen = hidden_features(replicas.stack(nets), inputs, stacked=True)
    for r, net in enumerate(nets):
        for values, single in zip(seen, hidden_features(net, inputs[r]), strict=True):
            torch.testing.assert_close(values[r], single)


def test_hooks_go_when_the_network_fails() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(4, 4))
    with pytest.raises(RuntimeError):
        hidden_features(net, torch.zeros(2, 3))
    assert net.training
    assert not any(module._forward_pre_hooks for module in net.modules())
