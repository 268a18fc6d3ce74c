"""The Euler-Lagrange optimizer: its rule against an oracle, its curvature, its errors, its posterior."""

import copy
import itertools
import math
import re

import oracles
import pytest
import torch
from cases import R, assert_same_tensors, backward, batch, gaussian_parameters, mlp, normed, train
from torch import nn

import clagrange
from clagrange import gaussianize, replicas
from clagrange.optim import EulerLagrange

SETTINGS = [
    {"discount": discount, "trust_region": trust, "variance_rate": rate, "curvature_decay": decay}
    for discount, trust, rate, decay in itertools.product(
        [math.inf, 5.0, 0.05], [math.inf, 0.1], [None, 0.05], [0.99, 0.5]
    )
]


def describe(settings: dict) -> str:
    return "-".join(f"{value}" for value in settings.values())


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("settings", SETTINGS, ids=describe)
def test_rule_against_the_oracle(settings: dict, foreach: bool) -> None:
    """15 steps of two parameters with batches of different sizes; gradients come from autograd."""
    prior_mean, prior_variance, lr, temperature = "initial", 0.3, 0.05, 2e-3
    net = gaussianize(nn.Linear(4, 3).double(), prior_mean=prior_mean, prior_variance=prior_variance)
    optimizer = EulerLagrange(net, lr=lr, temperature=temperature, foreach=foreach, **settings)
    expected = {
        name: oracles.EulerLagrangeWeights(
            mean.detach().numpy().copy(), mean.detach().numpy().copy(), prior_variance * 2 / 4
        )
        for name, mean, _ in gaussian_parameters(net)
    }
    generator = torch.Generator().manual_seed(0)
    for size in [1, 3, 8] * 5:
        inputs = torch.randn(size, 4, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(inputs), torch.randint(3, (size,), generator=generator)).backward()
        for name, mean in net.named_parameters():
            expected[name].step(mean.grad.numpy(), size, lr=lr, temperature=temperature, **settings)
        optimizer.step()
    for name, mean, precision in gaussian_parameters(net):
        for quantity in ("precision", "curvature"):
            torch.testing.assert_close(
                getattr(precision, quantity),
                torch.from_numpy(getattr(expected[name], quantity)),
                rtol=1e-11,
                atol=0,
            )
        torch.testing.assert_close(mean.detach(), torch.from_numpy(expected[name].mean), rtol=1e-11, atol=1e-12)
        assert not torch.equal(mean, precision.prior_mean)


def test_a_zero_prior_mean_pulls_to_zero() -> None:
    """Without gradient, at infinite discount, the mean decays as e^{−lr} and the variance is the prior's."""
    net = gaussianize(nn.Linear(4, 3, bias=False).double())
    start = net.weight.detach().clone()
    optimizer = EulerLagrange(net, lr=0.1, temperature=1e-3, trust_region=math.inf)
    for _ in range(7):
        optimizer.zero_grad()
        (0.0 * net(torch.ones(2, 4, dtype=torch.float64))).sum().backward()
        optimizer.step()
    torch.testing.assert_close(net.weight.detach(), start * math.exp(-0.7))
    torch.testing.assert_close(net.weight_precision.variance(), torch.full((3, 4), 0.5, dtype=torch.float64))


@pytest.mark.parametrize("settings", SETTINGS, ids=describe)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_multi_tensor_kernels_equal_the_loop(settings: dict, dtype: torch.dtype) -> None:
    nets = [gaussianize(mlp(dtype=dtype), prior_mean="initial") for _ in range(2)]
    for net, foreach in zip(nets, (True, False), strict=True):
        train(net, EulerLagrange(net, lr=0.05, temperature=1e-3, foreach=foreach, **settings), range(10))
    tolerance = 1e-11 if dtype == torch.float64 else 5e-2
    assert_same_tensors(dict(nets[0].state_dict()), dict(nets[1].state_dict()), rtol=tolerance, atol=tolerance)


def test_the_module_and_its_parameters_are_the_same() -> None:
    nets = [gaussianize(normed()) for _ in range(3)]
    for net, params in zip(nets, (nets[0], nets[1].parameters(), nets[2].named_parameters()), strict=True):
        train(net, EulerLagrange(params, lr=0.05, temperature=1e-3), range(5))
    for net in nets[1:]:
        assert_same_tensors(dict(net.state_dict()), dict(nets[0].state_dict()))


def test_parameters_that_are_not_gaussian_take_adams_step() -> None:
    """Layer norm and embedding, whatever lr and temperature are."""

    def network() -> nn.Sequential:
        torch.manual_seed(1)
        return nn.Sequential(nn.Embedding(7, 5), nn.LayerNorm(5), nn.Linear(5, 3)).double()

    net, reference = gaussianize(network(), layers={nn.Embedding: None}), network()
    optimizer = EulerLagrange(net, lr=0.5, temperature=1e-2, deterministic_lr=0.02)
    adam = torch.optim.Adam([*reference[:2].parameters()], lr=0.02)
    for step in range(8):
        with torch.no_grad():
            reference[2].load_state_dict({"weight": net[2].weight, "bias": net[2].bias})
        tokens = torch.randint(7, (6,), generator=torch.Generator().manual_seed(step))
        for model, chosen in ((net, optimizer), (reference, adam)):
            chosen.zero_grad()
            nn.functional.cross_entropy(model(tokens), tokens % 3).backward()
            chosen.step()
    for name, parameter in reference[:2].named_parameters():
        torch.testing.assert_close(net.get_parameter(name), parameter, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_normalisation_layers_in_half_precision(dtype: torch.dtype) -> None:
    """Adam's averages have float32, also after a checkpoint, so that no small gradient is divided by 0."""
    net = gaussianize(normed(dtype=dtype))
    optimizer = EulerLagrange(net, lr=0.02, temperature=1e-3)
    for step in range(5):
        inputs, targets = batch(step, dtype=dtype)
        optimizer.zero_grad()
        (1e-2 * nn.functional.cross_entropy(net(inputs), targets)).backward()
        optimizer.step()
    checkpoint = copy.deepcopy(optimizer.state_dict())
    again = EulerLagrange(net, lr=0.02, temperature=1e-3)
    again.load_state_dict(checkpoint)
    assert_same_tensors(again.state_dict()["state"], checkpoint["state"])
    state = again.state[net[1].weight]
    assert state["gradient_square"].dtype == torch.float32
    assert (state["gradient_square"] > 0).any()
    train(net, again, range(5, 15))
    assert_same_tensors(optimizer.state_dict()["state"], checkpoint["state"])  # loading shares no memory
    assert all(value.isfinite().all() for value in net.state_dict().values())


def test_maximize_is_minimising_the_negative() -> None:
    nets = [gaussianize(normed()) for _ in range(2)]
    optimizers = [
        EulerLagrange(net, lr=0.02, temperature=1e-3, maximize=m) for net, m in zip(nets, (0, 1), strict=True)
    ]
    for step in range(5):
        inputs, targets = batch(step)
        for sign, net, optimizer in zip((1, -1), nets, optimizers, strict=True):
            optimizer.zero_grad()
            (sign * nn.functional.cross_entropy(net(inputs), targets)).backward()
            optimizer.step()
    assert_same_tensors(dict(nets[1].state_dict()), dict(nets[0].state_dict()))


def test_sum_over_examples_equals_their_mean() -> None:
    nets = [gaussianize(mlp()) for _ in range(2)]
    for reduction, net in zip(("mean", "sum"), nets, strict=True):
        optimizer = EulerLagrange(net, lr=0.05, temperature=1e-3, loss_reduction=reduction)
        for step, size in enumerate([3, 8, 1, 5]):
            inputs, targets = batch(step, size)
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(inputs), targets, reduction=reduction).backward()
            optimizer.step()
    assert_same_tensors(dict(nets[1].state_dict()), dict(nets[0].state_dict()), rtol=1e-11, atol=1e-12)


def test_mean_over_positions_equals_a_flat_batch() -> None:
    """A loss that averages over (3 examples × 4 tokens) is that of 12 examples."""
    nets = [gaussianize(mlp()) for _ in range(2)]
    optimizers = [
        EulerLagrange(net, lr=0.05, temperature=1e-3, loss_reduction=reduction)
        for net, reduction in zip(nets, ("mean", "position_mean"), strict=True)
    ]
    for step in range(4):
        inputs, targets = batch(step, 12)
        for net, optimizer, shape in zip(nets, optimizers, ((12,), (3, 4)), strict=True):
            optimizer.zero_grad()
            outputs = net(inputs.view(*shape, 5))
            nn.functional.cross_entropy(outputs.view(12, 3), targets).backward()
            optimizer.step()
    assert_same_tensors(dict(nets[1].state_dict()), dict(nets[0].state_dict()), rtol=1e-11, atol=1e-12)


def test_curvature_estimate_is_unbiased_at_the_optimum() -> None:
    """n·g² of batches of any size averages to E[r²x²], here E[x²] with unit noise."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([2.0, 1.0, 0.3], dtype=torch.float64)
    for size in (1, 4, 32):
        layer = gaussianize(nn.Linear(3, 2000, bias=False).double())
        with torch.no_grad():
            layer.weight.zero_()
        optimizer = EulerLagrange(layer, lr=1e-9, temperature=1.0, curvature_decay=0.0)
        inputs = scale * torch.randn(size, 3, generator=generator, dtype=torch.float64)
        noise = torch.randn(size, 2000, generator=generator, dtype=torch.float64)
        (0.5 * (layer(inputs) - noise).square().sum(-1).mean()).backward()
        optimizer.step()
        seen, exact = layer.weight_precision.curvature.mean(0), inputs.square().mean(0)
        # given the inputs, n·g² is exact·χ²₁ for each of 2,000 outputs: relative standard error √(2/2000)
        assert ((seen / exact - 1).abs() < 4 * math.sqrt(2 / 2000)).all()


def test_variance_converges_to_the_mean_field_posterior() -> None:
    """y = x·w + unit noise, N = 200 examples: σ² = T/(h + δ) = 1/(Σx² + 1/σ_p²) with T = 1/N.

    64 independent regressions (outputs) share the inputs. Each belief h averages n·g² with decay .99 and the
    precision averages it again with rate .01, over 900 steps: relative standard error per weight below
    √(2 · .005) = 10 %, of the mean over the outputs 1.3 %; the fluctuation of the means adds lr/2 = 0.25 %.
    """
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([2.0, 1.0, 0.1], dtype=torch.float64)
    examples, prior_variance = 200, 0.3  # of the initialisation's 2/3: σ_p² = 0.2
    inputs = scale * torch.randn(examples, 3, generator=generator, dtype=torch.float64)
    layer = gaussianize(
        nn.Linear(3, 64, bias=False).double(), prior_variance=prior_variance, prior_mean="initial"
    )
    optimizer = EulerLagrange(layer, lr=5e-3, temperature=1 / examples, variance_rate=0.01)
    truth = layer.weight.detach().clone()
    average = torch.zeros(64, 3, dtype=torch.float64)
    for step in range(1500):
        chosen = torch.randint(examples, (16,), generator=generator)
        noise = torch.randn(16, 64, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        targets = inputs[chosen] @ truth.T + noise
        (0.5 * (layer(inputs[chosen]) - targets).square().sum(-1).mean()).backward()
        optimizer.step()
        if step >= 600:
            average += layer.weight_precision.precision / 900
    exact = 1 / torch.from_numpy(oracles.mean_field_variance(inputs.numpy(), 1.0, prior_variance * 2 / 3))
    torch.testing.assert_close(average.mean(0), exact, rtol=0.04, atol=0)
    assert exact[0] / exact[2] > 50  # from determined by the data to held by the prior


def test_network_without_gaussian_weights_is_refused_with_the_call() -> None:
    with pytest.raises(
        ValueError, match=r"at least one Gaussian parameter.*call clagrange.gaussianize\(net\) first"
    ):
        EulerLagrange(mlp())
    net = gaussianize(normed())
    with pytest.raises(ValueError, match="Gaussian"):
        EulerLagrange(net[1].parameters())


def test_optimizer_copied_alone_says_so() -> None:
    net = gaussianize(mlp())
    optimizer = EulerLagrange(net)
    alone = copy.deepcopy(optimizer)
    with pytest.raises(RuntimeError, match="copy or unpickle an optimizer together with its network"):
        alone.step()
    backward(net, optimizer, *batch())
    optimizer.step()


def test_gradient_without_examples_is_refused() -> None:
    net = gaussianize(mlp())
    optimizer = EulerLagrange(net)
    net[0].weight.grad = torch.ones_like(net[0].weight)
    with pytest.raises(RuntimeError, match=r"'weight' of a GaussianLinear of shape \(6, 5\) .*saw no example"):
        optimizer.step()
    net[0].examples = 4
    optimizer.step()
    assert net[0].examples == 0


def test_a_second_step_on_the_same_gradients_is_refused() -> None:
    net = gaussianize(mlp())
    optimizer = EulerLagrange(net)
    backward(net, optimizer, *batch())
    optimizer.step()
    with pytest.raises(RuntimeError, match="saw no example since the last step"):
        optimizer.step()


@pytest.mark.parametrize("name", ["lr", "temperature", "discount", "trust_region"])
def test_numbers_for_replicas_need_a_stacked_network(name: str) -> None:
    """Also where R is the width of every layer, so that shapes would broadcast."""
    net = gaussianize(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    with pytest.raises(ValueError, match=rf"{name}: .*replicas"):
        EulerLagrange(net, **{name: torch.tensor([0.1, 0.2, 0.3, 0.4])})
    stacked = gaussianize(replicas.stack([mlp(seed) for seed in range(R)]))
    with pytest.raises(ValueError, match=rf"{name}: .*{R} replicas"):
        EulerLagrange(stacked, **{name: torch.tensor([0.1, 0.2])})


def test_state_lives_in_the_network_and_survives_a_new_optimizer() -> None:
    nets = [gaussianize(mlp()) for _ in range(2)]
    train(nets[0], EulerLagrange(nets[0], lr=0.05, temperature=1e-3), range(8))
    for part in (range(3), range(3, 8)):
        train(nets[1], EulerLagrange(nets[1], lr=0.05, temperature=1e-3), part)
    assert_same_tensors(dict(nets[1].state_dict()), dict(nets[0].state_dict()))


def test_settings_of_an_older_version_get_their_defaults() -> None:
    net = gaussianize(mlp())
    optimizer = EulerLagrange(net, lr=0.05)
    state = optimizer.state_dict()
    del state["param_groups"][0]["discount"], state["param_groups"][0]["loss_reduction"]
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["discount"] == math.inf
    train(net, optimizer, range(2))


def test_repr_names_the_settings() -> None:
    assert re.search(r"temperature: 0\.002", repr(EulerLagrange(gaussianize(mlp()), temperature=0.002)))


def test_injection_and_training_keep_every_weight_finite() -> None:
    """Switches between tasks of contradicting labels, at a rate where steps are as large as the trust region."""
    net = gaussianize(mlp())
    optimizer = EulerLagrange(net, lr=0.5, temperature=1e-3, discount=0.5)
    for task in range(6):
        for step in range(20):
            inputs, targets = batch(step)
            backward(net, optimizer, inputs, (targets + task) % 3)
            optimizer.step()
        clagrange.inject_variance(net, strength=0.5, widen=0.2, generator=torch.Generator().manual_seed(task))
        assert all(value.isfinite().all() for value in net.state_dict().values())
        assert all((precision.precision > 0).all() for _, _, precision in gaussian_parameters(net))
