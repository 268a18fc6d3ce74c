"""Averages, norms, singular values and drifts of all weights: what each of these methods exists for."""

import pytest
import torch
from cases import assert_same_tensors, backward, batch, convnet, images, mlp, step_with, train
from torch import nn

from clagrange import replicas
from clagrange.interventions import HareAndTortoise, NormalizeAndProject, SoftReset, SpectralRegularization
from clagrange.networks import CReLU, add_layer_norm, initialize, use_crelu
from clagrange.networks import mlp as package_mlp


def sgd(net: nn.Module, lr: float = 0.05) -> torch.optim.SGD:
    return torch.optim.SGD(net.parameters(), lr=lr)


# ---------------------------------------------------------------------------------------- hare and tortoise
def test_the_tortoise_averages_and_the_hare_falls_back() -> None:
    net, method = mlp(), HareAndTortoise(decay=0.8, every=3)
    optimizer = sgd(net)
    method.on_start(net, optimizer)
    tortoise = net[0].weight.detach().clone()
    for step in range(7):
        backward(net, optimizer, *batch(step))
        optimizer.step()
        hare = net[0].weight.detach().clone()
        tortoise = 0.8 * tortoise + 0.2 * hare
        method.on_step(net, optimizer)
        torch.testing.assert_close(method.tortoise["0.weight"], tortoise)
        torch.testing.assert_close(net[0].weight.detach(), tortoise if step in (2, 5) else hare)


def test_running_statistics_are_averaged_and_fall_back_with_the_weights() -> None:
    net = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3)).double()
    method = HareAndTortoise(decay=0.5, every=2)
    method.on_start(net, sgd(net))
    assert "1.running_var" in method.tortoise
    with torch.no_grad():
        net[1].running_mean.fill_(8.0)
    method.on_step(net, sgd(net))
    assert float(net[1].running_mean[0]) == 8.0
    method.on_step(net, sgd(net))
    torch.testing.assert_close(net[1].running_mean, torch.full((4,), 6.0, dtype=torch.float64))  # 0, 4, 6
    assert int(net[1].num_batches_tracked) == 0


def test_the_tortoise_counts_in_float32_below_half_precision() -> None:
    """In bfloat16 steps of 1e-4 of a weight would be lost."""
    layer = nn.Linear(1, 1).bfloat16()
    method = HareAndTortoise(decay=0.9999, every=10**6)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    method.on_start(layer, sgd(layer))
    with torch.no_grad():
        layer.weight.fill_(2.0)
    for _ in range(1000):
        method.on_step(layer, sgd(layer))
    assert float(method.tortoise["weight"]) == pytest.approx(2.0 - 0.9999**1000, rel=1e-3)


# -------------------------------------------------------------------------------------- spectral regularisation
def normed() -> nn.Module:
    """With scales on both sides of 1 and of 0, and shifts."""
    net = mlp()
    add_layer_norm(net)
    with torch.no_grad():
        for norm in (net[1][0], net[3][0]):
            norm.weight.copy_(torch.linspace(-0.5, 2.0, len(norm.weight)))
            norm.bias.copy_(torch.linspace(-0.2, 0.5, len(norm.bias)))
    return net


@pytest.mark.parametrize("make", [mlp, convnet, normed])
@pytest.mark.parametrize("power", [1.0, 2.0])
def test_the_gradient_is_that_of_the_penalty(make, power: float) -> None:
    """Against autograd through the singular values, the entries of scales and the norms of biases."""
    net, method = make(), SpectralRegularization(0.3, power=power)
    if make is mlp:
        train(net, sgd(net), range(3))
    optimizer = sgd(net)
    method.on_start(net, optimizer)
    for _ in range(300):  # the vectors converge
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        method.on_gradient(net, optimizer)
    explicit = make()
    explicit.load_state_dict(net.state_dict())
    penalty = torch.zeros((), dtype=torch.float64)
    for name, parameter in explicit.named_parameters():
        if name.endswith("weight") and parameter.dim() == 1:
            penalty = penalty + (parameter.abs() ** power - 1.0).square().sum()
        elif name.endswith("weight"):
            sigma = torch.linalg.matrix_norm(parameter.flatten(1), 2)
            penalty = penalty + (sigma**power - 1.0).square()
        else:
            penalty = penalty + (parameter.square().sum() + 1e-300) ** power
    (0.3 * penalty).backward()
    for mine, theirs in zip(net.parameters(), explicit.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-7)


def test_largest_singular_values_go_to_one() -> None:
    net, method = mlp(), SpectralRegularization(1.0)
    optimizer = sgd(net, lr=0.02)
    method.on_start(net, optimizer)
    with torch.no_grad():
        net[0].weight.mul_(2.0)
        net[2].weight.mul_(0.2)
    small = torch.linalg.svdvals(net[2].weight.detach())[1:]
    for _ in range(600):
        optimizer.zero_grad()
        (0 * net(batch()[0])).sum().backward()
        method.on_gradient(net, optimizer)
        optimizer.step()
    for layer in (net[0], net[2], net[4]):
        assert float(torch.linalg.matrix_norm(layer.weight.detach(), 2)) == pytest.approx(1.0, abs=0.02)
    # nothing pulls at the others
    torch.testing.assert_close(torch.linalg.svdvals(net[2].weight.detach())[1:], small, rtol=0.02, atol=0)
    assert float(net[0].bias.detach().norm()) < 0.2


# ---------------------------------------------------------------------------------- normalize and project
def test_norms_of_weights_stay() -> None:
    net, method = package_mlp(5, [6, 4], 3).double(), NormalizeAndProject()
    add_layer_norm(net)
    optimizer = sgd(net, lr=0.5)
    method.on_start(net, optimizer)
    *layers, head = [module for module in net.modules() if isinstance(module, nn.Linear)]
    norm = next(module for module in net.modules() if isinstance(module, nn.LayerNorm))
    before = [layer.weight.detach().norm() for layer in layers]
    head_before = float(head.weight.detach().norm())
    for step in range(20):
        step_with(net, optimizer, method, *batch(step))
    for layer, first in zip(layers, before, strict=True):
        torch.testing.assert_close(layer.weight.detach().norm(), first)
    assert abs(float(head.weight.detach().norm()) / head_before - 1) > 0.02  # what it makes is not normalised
    assert float(norm.weight.square().sum().detach() + norm.bias.square().sum().detach()) == pytest.approx(6.0)
    assert float(norm.bias.detach().norm()) > 0.01
    free = package_mlp(5, [6, 4], 3).double()
    add_layer_norm(free)
    train(free, sgd(free, lr=0.5), range(20))
    assert float(free[1].weight.detach().norm()) > 1.02 * float(before[0])


def test_layers_to_project_may_be_named() -> None:
    net, method = mlp(), NormalizeAndProject(layers=["4"])
    optimizer = sgd(net)
    method.on_start(net, optimizer)
    with torch.no_grad():
        for layer in (net[0], net[4]):
            layer.weight.mul_(3.0)
    norms = [layer.weight.detach().norm() for layer in (net[0], net[4])]
    method.on_step(net, optimizer)
    torch.testing.assert_close(net[0].weight.detach().norm(), norms[0])
    torch.testing.assert_close(net[4].weight.detach().norm(), norms[1] / 3)


def test_projection_after_so_many_steps_changes_no_direction() -> None:
    net, method = mlp(), NormalizeAndProject(every=2)
    optimizer = sgd(net)
    method.on_start(net, optimizer)
    norm = net[0].weight.detach().norm()
    with torch.no_grad():
        net[0].weight.add_(1.0)
    direction = nn.functional.normalize(net[0].weight.detach().flatten(), dim=0)
    method.on_step(net, optimizer)
    assert net[0].weight.detach().norm() > 1.1 * norm
    method.on_step(net, optimizer)
    torch.testing.assert_close(net[0].weight.detach().flatten(), norm * direction)


# ---------------------------------------------------------------------------------------------- soft reset
@pytest.mark.parametrize("scope", ["layer", "weight"])
def test_soft_reset_by_hand(scope: str) -> None:
    """One step on a fixed example, number by number."""
    layer = nn.Linear(2, 1, bias=False).double()
    layer.weight.data = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    optimizer, method = sgd(layer), SoftReset(gamma_lr=0.4, posterior_scale=0.5, scope=scope)
    method.on_start(layer, optimizer)
    with torch.no_grad():
        layer.weight.add_(torch.tensor([[0.5, 1.0]]))
    gradient = [0.3, -0.1]
    layer.weight.grad = torch.tensor([gradient], dtype=torch.float64)
    method.on_gradient(layer, optimizer)
    slopes = [0.3 * 0.5, -0.1 * 1.0]
    total = [sum(slopes)] * 2 if scope == "layer" else slopes
    gammas = [min(1.0, 1.0 - 0.4 * slope) for slope in total]
    expected = [g * w + (1 - g) * o for g, w, o in zip(gammas, (1.5, -1.0), (1.0, -2.0), strict=True)]
    scaled = [(g**2 + (1 - g**2) / 0.25) * d for g, d in zip(gammas, gradient, strict=True)]
    torch.testing.assert_close(layer.weight.detach(), torch.tensor([expected], dtype=torch.float64))
    torch.testing.assert_close(layer.weight.grad, torch.tensor([scaled], dtype=torch.float64))


def test_soft_reset_acts_where_the_distance_from_the_start_costs_likelihood() -> None:
    """Moving away from the first weights by descent keeps γ = 1; weights put where they hurt come back."""
    net, method = mlp(), SoftReset(gamma_lr=1.0)
    optimizer = sgd(net)
    method.on_start(net, optimizer)
    start = net[4].weight.detach().clone()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        net[4].weight.add_(3.0 * torch.randn(3, 4, generator=generator, dtype=torch.float64))
    far = float((net[4].weight.detach() - start).norm())
    seen = set()
    for step in range(30):
        backward(net, optimizer, *batch(step % 3))
        slope = float((net[4].weight.grad * (net[4].weight.detach() - start)).sum()) + float(
            (net[4].bias.grad * net[4].bias.detach()).sum()
        )
        method.on_gradient(net, optimizer)
        gamma = float(method.state["gamma"]["4"])
        assert (gamma == 1.0) == (slope <= 0.0)
        seen.add(gamma == 1.0)
        optimizer.step()
    assert False in seen
    assert float((net[4].weight.detach() - start).norm()) < 0.7 * far


# ------------------------------------------------------------------------------------------- architectures
def test_crelu_and_its_dead_units() -> None:
    net = package_mlp(5, [6, 4], 3, seed=2)
    first = net[1].weight.detach().clone()
    use_crelu(net, torch.Generator().manual_seed(2))
    assert [type(module) for module in net] == [nn.Flatten, nn.Linear, CReLU, nn.Linear, CReLU, nn.Linear]
    assert [net[3].weight.shape, net[5].weight.shape] == [(4, 12), (3, 8)]
    torch.testing.assert_close(net[1].weight.detach(), first, rtol=0, atol=0)
    with torch.no_grad():
        net[1].bias.fill_(-100.0)  # all ReLU units would be dead
    net(batch()[0].float()).sum().backward()
    assert bool(net[1].weight.grad.any())


def test_crelu_of_a_convolution_doubles_its_channels() -> None:
    net = convnet()
    use_crelu(net, torch.Generator().manual_seed(0))
    assert net[2].weight.shape[1] == 8
    assert net[5].in_features == 24
    assert net(images()[0]).shape == (8, 3)


@pytest.mark.parametrize("change", [lambda net: use_crelu(net, torch.Generator().manual_seed(3)), add_layer_norm])
@pytest.mark.parametrize(("make", "data"), [(mlp, batch), (convnet, images)])
def test_changed_networks_stack(change, make, data) -> None:
    singles = [make(seed) for seed in range(2)]
    for net in singles:
        change(net)
    stacked = replicas.stack(singles)
    inputs = torch.stack([data(seed)[0] for seed in range(2)])
    for output, net, own in zip(stacked(inputs), singles, inputs, strict=True):
        torch.testing.assert_close(output, net(own))


def test_changes_of_a_stacked_network_are_those_of_its_replicas() -> None:
    for change in ("crelu", "norm"):
        stacked = replicas.stack([mlp(seed) for seed in range(2)])
        singles = [mlp(seed) for seed in range(2)]
        if change == "crelu":
            use_crelu(stacked, replicas.generators_from_seeds([5, 6]))
            for net, seed in zip(singles, (5, 6), strict=True):
                use_crelu(net, torch.Generator().manual_seed(seed))
        else:
            add_layer_norm(stacked)
            for net in singles:
                add_layer_norm(net)
        for mine, single in zip(replicas.unstack(stacked), singles, strict=True):
            assert_same_tensors(dict(mine.state_dict()), dict(single.state_dict()))


def test_layer_norm_comes_before_the_activation_and_starts_over() -> None:
    net = mlp()
    add_layer_norm(net)
    inputs = batch()[0]
    before = net[0](inputs)
    torch.testing.assert_close(net[1](before), nn.functional.layer_norm(before, (6,)).relu())
    with torch.no_grad():
        net[1][0].weight.fill_(3.0)
    initialize(net, torch.Generator().manual_seed(0))
    assert bool((net[1][0].weight == 1.0).all())


def test_what_cannot_be_changed_is_named() -> None:
    with pytest.raises(ValueError, match=r"network: expected a torch.nn.Sequential, got Linear"):
        add_layer_norm(nn.Linear(2, 2))
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.LayerNorm(3), nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"after a ReLU, got a LayerNorm"):
        use_crelu(net)
