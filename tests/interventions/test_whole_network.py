"""The interventions that act on all weights or on the inputs: what each of them exists for."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from cases import assert_same_tensors, backward, batch, convnet, gaussian_parameters, mlp, train
from scipy import stats
from torch import nn

from clagrange import gaussianize, replicas
from clagrange.interventions import (
    Consolidation,
    ContinualBackprop,
    FullReset,
    InputNormalization,
    L2Init,
    RegenerativeL1,
    ShrinkAndPerturb,
    VarianceInjection,
)
from clagrange.networks import initialize
from clagrange.networks import mlp as package_mlp
from clagrange.optim import EulerLagrange
from clagrange.replicas import generators_from_seeds


def sgd(net: nn.Module, lr: float = 0.05) -> torch.optim.SGD:
    return torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)


def values(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


# -------------------------------------------------------------------------------------- shrink and perturb
def test_shrink_and_perturb_has_its_moments() -> None:
    """w' = 0.7·w + 0.2·ε in every parameter."""
    net = nn.Sequential(nn.Linear(100, 60), nn.ReLU(), nn.Linear(60, 10)).double()
    before, method = values(net), ShrinkAndPerturb(shrink=0.3, noise=0.2)
    method.on_start(net, sgd(net))
    method.on_step(net, sgd(net))
    noise = torch.cat([((p - 0.7 * before[n]) / 0.2).detach().flatten() for n, p in net.named_parameters()])
    assert stats.kstest(noise.numpy(), "norm").pvalue > 0.01


def test_perturbation_alone_and_shrinking_alone() -> None:
    net = mlp()
    before = values(net)
    shrink = ShrinkAndPerturb(shrink=0.25, noise=0.0)
    shrink.on_start(net, sgd(net))
    for _ in range(3):
        shrink.on_step(net, sgd(net))
    assert_same_tensors(dict(net.state_dict()), {n: v * 0.75**3 for n, v in before.items()}, rtol=1e-14, atol=0)


@pytest.mark.parametrize("every", ["step", "switch"])
def test_shrink_and_perturb_acts_at_its_moment_only(every: str) -> None:
    net, method = mlp(), ShrinkAndPerturb(shrink=0.5, every=every)
    method.on_start(net, sgd(net))
    before = values(net)
    (method.on_switch if every == "step" else method.on_step)(net, sgd(net))
    assert_same_tensors(dict(net.state_dict()), before)
    (method.on_step if every == "step" else method.on_switch)(net, sgd(net))
    assert net[0].weight.norm() < 0.6 * before["0.weight"].norm()


def test_frozen_parameters_and_gaussian_state_stay() -> None:
    net, method = gaussianize(mlp()), ShrinkAndPerturb(shrink=0.5, noise=0.1)
    net[2].weight.requires_grad_(False)
    before = values(net)
    method.on_start(net, sgd(net))
    method.on_step(net, sgd(net))
    for name, value in net.state_dict().items():
        stays = name == "2.weight" or "_precision" in name
        assert torch.equal(value, before[name]) == stays, name


def test_shrink_and_perturb_toward_fresh_initial_weights_keeps_the_scale_of_each_layer() -> None:
    """With noise = shrink = 1 every third step the network is a fresh one, drawn from the method's stream."""
    net, fresh = package_mlp(20, [50, 30], 4, seed=1), package_mlp(20, [50, 30], 4, seed=1)
    before = values(net)
    method = ShrinkAndPerturb(shrink=1.0, noise=1.0, every=3, perturbation="initial", seed=5)
    method.on_start(net, sgd(net))
    for _ in range(2):
        method.on_step(net, sgd(net))
    assert_same_tensors(dict(net.state_dict()), before)
    method.on_step(net, sgd(net))
    initialize(fresh, generators_from_seeds(5, purpose="ShrinkAndPerturb"))
    assert_same_tensors(dict(net.state_dict()), dict(fresh.state_dict()))


def test_shrink_and_perturb_goes_part_of_the_way_to_fresh_weights() -> None:
    net, fresh = package_mlp(20, [50], 4, seed=1), package_mlp(20, [50], 4, seed=2)
    before = values(net)
    method = ShrinkAndPerturb(shrink=0.5, noise=0.25, every="switch", perturbation="initial", seed=5)
    method.on_start(net, sgd(net))
    method.on_switch(net, sgd(net))
    initialize(fresh, generators_from_seeds(5, purpose="ShrinkAndPerturb"))
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value, 0.5 * before[name] + 0.25 * fresh.state_dict()[name])


# ----------------------------------------------------------------------------------------------- L2 init
def test_l2_init_by_hand() -> None:
    """The gradient of a fixed example: g + λ(w − w₀), to 1e-12."""
    layer = nn.Linear(2, 1, bias=False).double()
    layer.weight.data = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    optimizer = sgd(layer)
    for method, expected in (
        (L2Init(0.5), [[0.3 + 0.5 * 1.5, 0.1 + 0.5 * -0.75]]),
        (RegenerativeL1(0.5), [[0.3 + 0.5, 0.1 - 0.5]]),
    ):
        method.on_start(layer, optimizer)
        with torch.no_grad():
            layer.weight.add_(torch.tensor([[1.5, -0.75]]))
        layer.weight.grad = torch.tensor([[0.3, 0.1]], dtype=torch.float64)
        method.on_gradient(layer, optimizer)
        torch.testing.assert_close(layer.weight.grad, torch.tensor(expected, dtype=torch.float64))


def test_l1_init_stops_at_the_initial_weights() -> None:
    """Without a loss every weight comes back by lr·strength a step, and stays within one step of it."""
    net, method = mlp(), RegenerativeL1(1.0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    method.on_start(net, optimizer)
    start = values(net)
    with torch.no_grad():
        net[0].weight.add_(1.0)
    for step in range(15):
        optimizer.zero_grad()
        (0 * net(batch()[0])).sum().backward()
        method.on_gradient(net, optimizer)
        optimizer.step()
        distance = (net[0].weight.detach() - start["0.weight"]).abs()
        assert float((distance - max(0.0, 0.9 - 0.1 * step)).abs().max()) < 0.1 + 1e-9


@pytest.mark.parametrize("moment", ["step", "switch"])
def test_l2_init_draws_its_origin_anew(moment: str) -> None:
    net, fresh, method = mlp(), mlp(1), L2Init(1.0, resample=moment, seed=7)
    optimizer = sgd(net)
    method.on_start(net, optimizer)
    generator = generators_from_seeds(7, purpose="L2Init")
    for _ in range(2):
        backward(net, optimizer, *batch())
        gradients = {name: parameter.grad.clone() for name, parameter in net.named_parameters()}
        if moment == "switch":
            method.on_switch(net, optimizer)
        method.on_gradient(net, optimizer)
        initialize(fresh, generator)
        for name, parameter in net.named_parameters():
            origin = fresh.get_parameter(name).detach()
            torch.testing.assert_close(parameter.grad, gradients[name] + parameter.detach() - origin)


def test_l2_init_equals_the_gradient_of_the_penalty() -> None:
    net, explicit = mlp(), mlp()
    start = [parameter.detach().clone() for parameter in explicit.parameters()]
    optimizers = sgd(net), sgd(explicit)
    method = L2Init(0.3)
    method.on_start(net, optimizers[0])
    for step in range(10):
        backward(net, optimizers[0], *batch(step))
        method.on_gradient(net, optimizers[0])
        optimizers[0].step()
        optimizers[1].zero_grad()
        inputs, targets = batch(step)
        penalty = sum((p - s).square().sum() for p, s in zip(explicit.parameters(), start, strict=True))
        (nn.functional.cross_entropy(explicit(inputs), targets) + 0.15 * penalty).backward()
        optimizers[1].step()
    assert_same_tensors(dict(net.state_dict()), dict(explicit.state_dict()), rtol=1e-11, atol=1e-12)


def test_l2_init_pulls_back() -> None:
    """Without a loss the distance to the first weights shrinks by 1 − lr·strength at each step."""
    net = mlp()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    method = L2Init(2.0)
    method.on_start(net, optimizer)
    start = values(net)
    with torch.no_grad():
        net[0].weight.add_(1.0)
    for _ in range(5):
        optimizer.zero_grad()
        (0 * net(batch()[0])).sum().backward()
        method.on_gradient(net, optimizer)
        optimizer.step()
    torch.testing.assert_close(net[0].weight - start["0.weight"], torch.full((6, 5), 0.8**5, dtype=torch.float64))


def test_l2_init_leaves_parameters_without_gradient() -> None:
    net, method = mlp(), L2Init(1.0)
    net[0].weight.requires_grad_(False)
    optimizer = sgd(net)
    method.on_start(net, optimizer)
    backward(net, optimizer, *batch())
    method.on_gradient(net, optimizer)
    assert net[0].weight.grad is None
    assert "0.weight" not in method.state


def test_l2_init_takes_in_a_layer_that_comes_later() -> None:
    net, method = mlp(), L2Init(1.0)
    optimizer = sgd(net)
    method.on_start(net, optimizer)
    train(net, optimizer, range(3))
    first = method.state["0.weight"].clone()
    net[4] = nn.Linear(4, 7).double()
    method.on_start(net, sgd(net))
    torch.testing.assert_close(method.state["0.weight"], first, rtol=0, atol=0)
    torch.testing.assert_close(method.state["4.weight"], net[4].weight.detach(), rtol=0, atol=0)


# -------------------------------------------------------------------------------------------- full reset
@pytest.mark.parametrize("make", [mlp, convnet])
def test_full_reset_is_a_fresh_network(make) -> None:
    net = gaussianize(make(), prior_variance=0.4)
    optimizer, method = EulerLagrange(net, lr=0.02, temperature=1e-3), FullReset(seed=11)
    method.on_start(net, optimizer)
    if make is mlp:
        train(net, optimizer, range(4))
    with torch.no_grad():
        for _, mean, precision in gaussian_parameters(net):
            mean.add_(5.0)
            precision.precision.mul_(3.0)
            precision.curvature.add_(1.0)
    method.on_switch(net, optimizer)
    fresh = make(5)
    initialize(fresh, generators_from_seeds(11, purpose="FullReset"))
    assert_same_tensors(dict(net.state_dict()), dict(gaussianize(fresh, prior_variance=0.4).state_dict()))


def test_full_reset_clears_the_optimizer_and_draws_anew_every_time() -> None:
    net, method = mlp(), FullReset(seed=11)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    method.on_start(net, optimizer)
    seen = []
    for _ in range(2):
        train(net, optimizer, range(3))
        assert optimizer.state
        method.on_switch(net, optimizer)
        assert not optimizer.state
        seen.append(net[0].weight.detach().clone())
    assert not torch.equal(*seen)
    train(net, optimizer, range(3))


def test_full_reset_of_normalisation_layers() -> None:
    net = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    optimizer, method = sgd(net), FullReset()
    method.on_start(net, optimizer)
    train(net, optimizer, range(3))
    method.on_switch(net, optimizer)
    assert not net[1].running_mean.any()
    assert (net[1].running_var == 1).all()
    assert (net[1].weight == 1).all()


def test_full_reset_names_a_layer_that_it_cannot_draw() -> None:
    net, method = nn.Sequential(nn.Embedding(4, 5), nn.Linear(5, 3)), FullReset()
    method.on_start(net, sgd(net))
    with pytest.raises(ValueError, match=r"network: layer '0' of type Embedding cannot be drawn afresh"):
        method.on_switch(net, sgd(net))


def test_he_uniform_initialisation() -> None:
    net = package_mlp(64, [80], 10, seed=3)
    first = net[1].weight.detach().flatten().numpy()
    bound = math.sqrt(6 / 64)
    assert stats.kstest(first, stats.uniform(-bound, 2 * bound).cdf).pvalue > 0.01
    assert not net[1].bias.any()
    assert_same_tensors(dict(package_mlp(64, [80], 10, seed=3).state_dict()), dict(net.state_dict()))
    assert not torch.equal(package_mlp(64, [80], 10, seed=4)[1].weight, net[1].weight)


# -------------------------------------------------------------------------------------- input normalisation
def test_input_normalization_equals_the_statistics_of_all_data_so_far() -> None:
    net, method = nn.Sequential(nn.Identity(), nn.Linear(5, 2)).double(), InputNormalization(eps=1e-3)
    entering = []
    net[0].register_forward_pre_hook(lambda _, args: entering.append(args[0].numpy()))
    method.on_start(net, sgd(net))
    everything = np.empty((0, 5))
    for step, size in enumerate([3, 8, 1, 5]):
        inputs = 3 * batch(step, size)[0] + 100 * step + torch.arange(5)
        net(inputs)
        everything = np.concatenate([everything, inputs.numpy()])
        expected = (inputs.numpy() - everything.mean(0)) / np.sqrt(everything.var(0) + 1e-3)
        np.testing.assert_allclose(entering[-1], expected, rtol=1e-9, atol=1e-9)
    assert method.state["count"] == 17


def test_evaluation_uses_the_statistics_and_leaves_them() -> None:
    net, method = nn.Sequential(nn.Identity(), nn.Linear(5, 2)).double(), InputNormalization()
    entering = []
    net[0].register_forward_pre_hook(lambda _, args: entering.append(args[0]))
    method.on_start(net, sgd(net))
    other = batch(9)[0]
    net.eval()
    net(other)
    assert torch.equal(entering[-1], other)  # nothing seen yet: unchanged
    net.train()
    net(batch(0)[0])
    state = {name: torch.as_tensor(value).clone() for name, value in method.state.items()}
    net.eval()
    net(other)
    expected = (other - state["mean"]) / (state["variance"] + 1e-4).sqrt()
    torch.testing.assert_close(entering[-1], expected)
    assert_same_tensors({n: torch.as_tensor(v) for n, v in method.state.items()}, state)


def test_training_goes_on_from_an_older_state_after_an_evaluation() -> None:
    """Whose count is a plain number, and which inference mode must not make its own."""
    net, method, whole = nn.Linear(5, 2).double(), InputNormalization(), InputNormalization()
    for each in (method, whole):
        each.on_start(net, sgd(net))
        net(batch(0)[0])
        each.detach()
    method.state["count"] = int(method.state["count"])
    method.on_start(net, sgd(net))
    with torch.inference_mode():
        net.eval()(batch(9)[0].bfloat16().double())
    net.train()(batch(1)[0])
    method.detach()
    whole.on_start(net, sgd(net))
    net(batch(1)[0])
    assert_same_tensors(method.state, whole.state)


def test_images_are_normalised_pixel_by_pixel() -> None:
    net, method = convnet(), InputNormalization()
    entering = []
    net[0].register_forward_pre_hook(lambda _, args: entering.append(args[0]))
    method.on_start(net, sgd(net))
    inputs = torch.randn(16, 2, 6, 6, dtype=torch.float64) * 5 + 2
    net(inputs)
    torch.testing.assert_close(
        entering[-1], (inputs - inputs.mean(0)) / (inputs.var(0, correction=0) + 1e-4).sqrt()
    )


def test_each_replica_has_its_own_statistics() -> None:
    net, method = replicas.stack([mlp(seed) for seed in range(2)]), InputNormalization()
    method.on_start(net, sgd(net))
    inputs = torch.stack([batch(0)[0], 10 * batch(1)[0] + 3])
    net(inputs)
    torch.testing.assert_close(method.state["mean"], inputs.mean(1))
    torch.testing.assert_close(method.state["variance"], inputs.var(1, correction=0))


# -------------------------------------------------------------------------------------- variance injection
def test_variance_injection_at_a_switch_only_and_in_its_layers() -> None:
    net = gaussianize(mlp())
    optimizer, method = sgd(net), VarianceInjection(strength=1.0, widen=0.5, layers=["4"], seed=2)
    method.on_start(net, optimizer)
    net[4].weight_precision.precision.mul_(8.0)
    before = values(net)
    method.on_gradient(net, optimizer)
    method.on_step(net, optimizer)
    assert_same_tensors(dict(net.state_dict()), before)
    method.on_switch(net, optimizer)
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"4.weight", "4.bias", "4.weight_precision.precision"}


def test_what_the_loss_holds_survives_the_switch() -> None:
    """A weight of 4 inputs of which the data determine two: those stay, the others are drawn afresh."""
    layer = gaussianize(nn.Linear(4, 500, bias=False).double(), prior_mean="initial")
    optimizer = EulerLagrange(layer, lr=0.05, temperature=1e-5, variance_rate=0.2)
    method = VarianceInjection(strength=1.0, seed=1)
    method.on_start(layer, optimizer)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        inputs = torch.randn(8, 4, generator=generator, dtype=torch.float64)
        inputs[:, 2:] = 0.0
        optimizer.zero_grad()
        noise = torch.randn(8, 500, generator=generator, dtype=torch.float64)
        (layer(inputs) - noise).square().sum(-1).mean().backward()
        optimizer.step()
    before = layer.weight.detach().clone()
    method.on_switch(layer, optimizer)
    moved = (layer.weight.detach() - before).square().mean(0).sqrt()
    deviation = math.sqrt(2 / 4)
    assert (moved[:2] < 0.02 * deviation).all()
    fresh = (layer.weight.detach() - layer.weight_precision.prior_mean)[:, 2:]
    assert stats.kstest(fresh.flatten().numpy(), stats.norm(0, deviation).cdf).pvalue > 0.01


def test_an_injection_over_several_steps_comes_to_the_whole() -> None:
    """Without a loss: parts of 1 − (1 − q)^{1/n} shrink the mean as one of q, and draw as much variance."""
    nets = [gaussianize(nn.Linear(200, 300, bias=False).double()) for _ in range(2)]
    for net, over in zip(nets, (1, 4), strict=True):
        with torch.no_grad():
            net.weight.fill_(2.0)
        optimizer, method = sgd(net), VarianceInjection(strength=0.6, over=over)
        method.on_start(net, optimizer)
        method.on_step(net, optimizer)
        assert bool((net.weight == 2.0).all())
        method.on_switch(net, optimizer)
        assert bool((net.weight == 2.0).all()) == (over > 1)
        for _ in range(6):  # two more than it takes
            method.on_step(net, optimizer)
    for net in nets:
        law = stats.norm(0.4 * 2.0, math.sqrt((1 - 0.4**2) * 2 / 200))
        assert stats.kstest(net.weight.detach().flatten().numpy(), law.cdf).pvalue > 0.01


@pytest.mark.parametrize("kind", ["diagonal", "kronecker"])
def test_precisions_go_to_the_equilibrium_of_the_new_curvature(kind: str) -> None:
    """Inputs that the new task does not use were held before, and are free four steps after the switch."""
    net = gaussianize(nn.Linear(4, 50, bias=False).double(), precision=kind)
    optimizer = EulerLagrange(net, lr=0.01, temperature=1e-3, curvature_decay=0.9, variance_rate=0.05)
    method = VarianceInjection(strength=0.0, equilibrium=4)
    method.on_start(net, optimizer)
    generator = torch.Generator().manual_seed(0)

    def step(used: slice) -> None:
        inputs = torch.zeros(8, 4, dtype=torch.float64)
        inputs[:, used] = torch.randn(8, 2, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        noise = torch.randn(8, 50, generator=generator, dtype=torch.float64)
        (net(inputs) - noise).square().sum(-1).mean().backward()
        optimizer.step()
        method.on_step(net, optimizer)

    for _ in range(80):
        step(slice(0, 2))
    precision = net.weight_precision
    held = precision.retained_information().mean(0)
    assert (held[:2] > 0.9).all()
    assert (held[2:] < 1e-6).all()
    method.on_switch(net, optimizer)
    for _ in range(4):
        step(slice(2, 4))
    held = precision.retained_information().mean(0)
    assert (held[:2] < 1e-6).all()
    if kind == "kronecker":  # four batches of 8 hold 32 of the 50 directions of the outputs
        assert (held[2:] > 0.6).all()
        assert ((precision.inputs.diagonal()[2:] > 0.4) & (precision.inputs.diagonal()[2:] < 2.0)).all()
    else:
        assert (held[2:] > 0.9).all()
        torch.testing.assert_close(precision.precision, precision.curvature / 1e-3 + precision.prior_precision)
        curvature = precision.curvature.mean(0)[2:]
        assert ((curvature > 2.5) & (curvature < 8.0)).all(), curvature  # 4 for noise of variance 1


def test_equilibrium_needs_a_temperature() -> None:
    net = gaussianize(mlp())
    optimizer, method = sgd(net), VarianceInjection(equilibrium=1)
    method.on_start(net, optimizer)
    method.on_switch(net, optimizer)
    with pytest.raises(ValueError, match=r"equilibrium: expected clagrange.optim.EulerLagrange"):
        method.on_step(net, optimizer)


@pytest.mark.parametrize("method", [VarianceInjection(), Consolidation()])
def test_what_needs_gaussian_weights_says_so_at_the_start(method) -> None:
    with pytest.raises(ValueError, match=r"call clagrange.gaussianize\(module\) first"):
        method.on_start(mlp(), sgd(mlp()))


def test_full_reset_moves_a_prior_around_the_initial_weights():
    net = gaussianize(package_mlp(4, [3], 2), prior_mean="initial")
    optimizer = EulerLagrange(net)
    reset = FullReset(seed=3)
    reset.on_start(net, optimizer)
    before = net[1].weight_precision.prior_mean.clone()
    reset.on_switch(net, optimizer)
    assert not torch.equal(net[1].weight_precision.prior_mean, before)
    torch.testing.assert_close(net[1].weight_precision.prior_mean, net[1].weight.detach())
    zero = gaussianize(package_mlp(4, [3], 2))
    reset.on_switch(zero, EulerLagrange(zero))
    assert not zero[1].weight_precision.prior_mean.any()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
@pytest.mark.parametrize(
    "make", [InputNormalization, lambda: ContinualBackprop(replacement_rate=0.5, maturity=0)]
)
def test_a_network_with_live_hooks_copies_and_its_copy_leaves_the_original_alone(make, copied):
    net = package_mlp(4, [3], 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    intervention = make()
    intervention.on_start(net, optimizer)
    inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    net(inputs)
    twin = copied(net)
    torch.testing.assert_close(twin.eval()(inputs), net.eval()(inputs), rtol=0, atol=0)
    state = copy.deepcopy(intervention.state)
    twin.train()(inputs + 5.0)
    assert str(intervention.state) == str(state)


def test_full_reset_moves_the_prior_of_a_parameter_with_one_entry() -> None:
    net = gaussianize(package_mlp(4, [3], 1), prior_mean="initial")
    optimizer = EulerLagrange(net)
    reset = FullReset(seed=3)
    reset.on_start(net, optimizer)
    with torch.no_grad():
        net[3].bias += 1.0
    reset.on_switch(net, optimizer)
    for _, mean, precision in gaussian_parameters(net):
        torch.testing.assert_close(precision.prior_mean, mean.detach())
