"""Predictions over draws of the weights, and the draws."""

import math

import pytest
import torch
from cases import R, assert_same_tensors, batch, gaussian_parameters, mlp
from torch import nn

from clagrange import GaussianLinear, gaussianize, predict, replicas, variances
from clagrange.gaussian import sample_parameters


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def uneven(layer: GaussianLinear, seed: int = 0) -> GaussianLinear:
    """Give every weight a variance of its own."""
    for precision in (layer.weight_precision, layer.bias_precision):
        precision.precision.mul_(0.5 + torch.rand(precision.precision.shape, generator=stream(seed)))
    return layer


def test_linear_layer_against_the_closed_form() -> None:
    """Mean Wx + b, variance Σ x²σ² + σ_b², both within four standard errors of the Monte Carlo estimate."""
    layer = uneven(GaussianLinear(5, 3, dtype=torch.float64))
    inputs, _ = batch(size=4)
    samples = 4000
    mean, variance = predict(layer, inputs, samples, generator=stream())
    exact = inputs**2 @ variances(layer)["weight"].T + variances(layer)["bias"]
    assert ((mean - layer(inputs)).abs() < 4 * (exact / samples).sqrt()).all()
    assert ((variance - exact).abs() < 4 * exact * math.sqrt(2 / samples)).all()


def test_equals_the_plain_mean_and_variance_of_the_draws() -> None:
    net, (inputs, _) = gaussianize(mlp()), batch()
    mean, variance = predict(net, inputs, samples=5, transform=nn.Softmax(-1), generator=stream())
    draws, generator = [], stream()
    for _ in range(5):
        weights = sample_parameters(net, generator)
        draws.append(torch.func.functional_call(net, weights, (inputs,)).softmax(-1))
    torch.testing.assert_close(mean, torch.stack(draws).mean(0))
    torch.testing.assert_close(variance, torch.stack(draws).var(0))
    torch.testing.assert_close(mean.sum(-1), torch.ones(8, dtype=torch.float64))


def test_reproducible_by_the_generator_and_by_the_global_stream() -> None:
    net, (inputs, _) = gaussianize(mlp()), batch()
    first, again, other = (predict(net, inputs, 3, generator=stream(seed))[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.manual_seed(5)
    unseeded = predict(net, inputs, 3)[0]
    torch.manual_seed(5)
    assert torch.equal(predict(net, inputs, 3)[0], unseeded)


def test_leaves_the_network_as_it_is() -> None:
    net = gaussianize(
        nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)).double()
    )
    net[1].eval()
    modes = [module.training for module in net.modules()]
    before = {name: value.clone() for name, value in net.state_dict().items()}
    mean, _ = predict(net, batch()[0], 4)
    assert [module.training for module in net.modules()] == modes
    assert_same_tensors(dict(net.state_dict()), before)
    assert not mean.requires_grad
    assert all(layer.examples == 0 for layer in (net[0], net[3]))


def test_runs_in_evaluation_mode() -> None:
    net = gaussianize(nn.Sequential(nn.Linear(5, 64), nn.Dropout(0.9))).double()
    for _, _, precision in gaussian_parameters(net):
        precision.precision.fill_(1e30)
    inputs, _ = batch()
    mean, variance = predict(net, inputs, 2)
    torch.testing.assert_close(mean, net[0](inputs))
    assert (variance < 1e-20).all()


def test_restores_the_modes_when_the_network_fails() -> None:
    net = gaussianize(mlp())
    net[1].eval()
    with pytest.raises(RuntimeError):
        predict(net, torch.zeros(2, 99))
    assert net.training
    assert not net[1].training
    assert net[0].training


def test_stacked_equals_separate() -> None:
    nets = [gaussianize(mlp(seed)) for seed in range(R)]
    inputs = torch.stack([batch(seed)[0] for seed in range(R)])
    mean, variance = predict(replicas.stack(nets), inputs, 3, generator=[stream(seed) for seed in range(R)])
    for r, net in enumerate(nets):
        single = predict(net, inputs[r], 3, generator=stream(r))
        torch.testing.assert_close((mean[r], variance[r]), single)


def test_a_wrong_number_of_streams_is_refused() -> None:
    net = replicas.stack([gaussianize(mlp(seed)) for seed in range(R)])
    with pytest.raises(ValueError, match=r"generators: expected one for each of the replicas .* got 2"):
        predict(net, torch.zeros(R, 2, 5), 2, generator=[stream(), stream()])


@pytest.mark.parametrize("samples", [1, 0, -3, 2.5, True, "many"])
def test_a_bad_number_of_samples_is_refused(samples: object) -> None:
    with pytest.raises(ValueError, match=r"samples: expected a whole number of at least 2, got"):
        predict(gaussianize(mlp()), batch()[0], samples)


def test_deterministic_network_is_refused() -> None:
    with pytest.raises(ValueError, match=r"call clagrange.gaussianize\(module\) first"):
        predict(mlp(), batch()[0])


def test_draws_of_a_whole_network_have_the_right_moments() -> None:
    net, generator, samples = gaussianize(mlp(), prior_variance=0.3), stream(), 2000
    draws = [sample_parameters(net, generator) for _ in range(samples)]
    for name, mean, precision in gaussian_parameters(net):
        values = torch.stack([draw[name] for draw in draws])
        variance = precision.variance()
        # the largest of n standard normal deviations stays below 5 for the few hundred entries here
        assert ((values.mean(0) - mean).abs() < 5 * (variance / samples).sqrt()).all()
        assert ((values.var(0) - variance).abs() < 5 * variance * math.sqrt(2 / samples)).all()
