"""The networks of publications: shapes, sizes, starts, and stacked forms that equal single ones."""

import pytest
import torch
from cases import R, assert_same_tensors
from torch import nn

from clagrange import gaussianize
from clagrange.interventions import ContinualBackprop
from clagrange.networks import (
    LOSS_GRADIENTS,
    LOSSES,
    NETWORKS,
    build,
    cross_entropy,
    dohare_convnet,
    mlp,
    resnet18,
    squared_error,
    vit,
)
from clagrange.replicas import replicas_of, stack, unstack
from clagrange.wiring import connections

SMALL = {
    "mlp": {"kind": "mlp", "hidden": [6, 5]},
    "dohare_convnet": {"kind": "dohare_convnet", "channels": [3, 4, 5]},
    "resnet18, batch": {"kind": "resnet18", "norm": "batch", "width": 4},
    "resnet18, group": {"kind": "resnet18", "norm": "group", "width": 4},
    "resnet18, layer": {"kind": "resnet18", "norm": "layer", "width": 4},
    "vit": {"kind": "vit", "width": 8, "depth": 2, "heads": 2, "patch": 8},
}
each = pytest.mark.parametrize("settings", SMALL.values(), ids=SMALL)


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def test_all_are_tested() -> None:
    assert {settings["kind"] for settings in SMALL.values()} == set(NETWORKS)


@each
def test_stacked_networks_equal_single_ones(settings: dict) -> None:
    """Outputs and gradients in training, outputs in evaluation."""
    networks = [build(settings, (3, 32, 32), 7, seed=seed).double() for seed in range(R)]
    stacked = stack(networks)
    assert replicas_of(stacked) == R
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(R, 4, 3, 32, 32, generator=generator, dtype=torch.float64)
    targets = torch.randint(7, (R, 4), generator=generator)
    cross_entropy(stacked(inputs), targets).backward()
    for r, network in enumerate(networks):
        cross_entropy(network(inputs[r]), targets[r]).backward()
        for (name, ours), theirs in zip(stacked.named_parameters(), network.parameters(), strict=True):
            torch.testing.assert_close(ours.grad[r], theirs.grad, rtol=1e-9, atol=1e-10, msg=name)
    stacked.eval()
    for r, network in enumerate(networks):
        network.eval()
        torch.testing.assert_close(stacked(inputs)[r], network(inputs[r]), rtol=1e-9, atol=1e-10)
    for single, network in zip(unstack(stacked), networks, strict=True):
        assert_same_tensors(dict(single.state_dict()), dict(network.state_dict()))


@each
def test_a_seed_is_a_start_and_weights_can_be_gaussian(settings: dict) -> None:
    one, again, other = (build(settings, (3, 32, 32), 7, seed=seed) for seed in (1, 1, 2))
    assert_same_tensors(dict(one.state_dict()), dict(again.state_dict()))
    weights = [name for name, weight in one.named_parameters() if weight.dim() > 1]
    assert not any(torch.equal(one.get_parameter(name), other.get_parameter(name)) for name in weights)
    inputs = torch.randn(4, 3, 32, 32)
    before = one.eval()(inputs)
    gaussianize(one)
    torch.testing.assert_close(one(inputs), before, rtol=1e-4, atol=1e-5)


def test_sizes_are_those_of_the_publications() -> None:
    net = dohare_convnet((3, 32, 32), 2)
    linear = [(layer.in_features, layer.out_features) for layer in net if isinstance(layer, nn.Linear)]
    convolutions = [(layer.out_channels, layer.kernel_size) for layer in net if isinstance(layer, nn.Conv2d)]
    assert linear == [(512, 128), (128, 128), (128, 2)]
    assert convolutions == [(32, (5, 5)), (64, (3, 3)), (128, (3, 3))]
    assert sum(isinstance(layer, nn.MaxPool2d) for layer in net) == 3
    assert len(connections(net)) == 5
    ContinualBackprop().on_start(net, torch.optim.SGD(net.parameters(), lr=0.1))
    # torchvision's ResNet-18 has 11,689,512 parameters; here 100 outputs for 1000, and 3×3 for 7×7 at first
    assert parameters(resnet18((3, 32, 32), 100)) == 11_689_512 - 900 * 513 - 64 * 3 * (49 - 9) == 11_220_132
    assert parameters(mlp(784, [2000, 2000, 2000], 10)) == 784 * 2000 + 2 * 2000**2 + 2000 * 10 + 3 * 2000 + 10


@pytest.mark.parametrize("norm", ["batch", "group", "layer"])
def test_norms_of_a_residual_network(norm: str) -> None:
    layers = [m for m in resnet18((1, 16, 16), 3, norm=norm, width=32).modules() if not list(m.children())]
    norms = [layer for layer in layers if isinstance(layer, nn.BatchNorm2d | nn.GroupNorm)]
    assert len(norms) == 20  # 1 at first, 16 in the blocks, 3 in short cuts
    groups = {getattr(layer, "num_groups", None) for layer in norms}
    assert groups == {"batch": {None}, "group": {32}, "layer": {1}}[norm]


def test_positions_of_patches_matter() -> None:
    net = vit((1, 8, 8), 3, patch=4, width=8, depth=1, heads=2).double()
    image = torch.rand(1, 1, 8, 8, dtype=torch.float64)
    swapped = torch.cat([image[..., 4:], image[..., :4]], -1)
    assert not torch.allclose(net(image), net(swapped), atol=1e-6)
    with torch.no_grad():
        net[1].positions.zero_()
    torch.testing.assert_close(net(image), net(swapped))


@pytest.mark.parametrize(
    ("settings", "shape", "message"),
    [
        (
            {"kind": "resnet"},
            (3, 32, 32),
            r"network.kind: .*; got 'resnet'; did you mean 'resnet18'",
        ),
        ({}, (3, 32, 32), r"network.kind: expected one of .*; got None"),
        (
            {"kind": "mlp", "hiden": [3]},
            (5,),
            r"settings hidden of mlp; got 'hiden'; did you mean 'hidden'",
        ),
        ({"kind": "resnet18"}, (784,), r"expected \(channels, height, width\) of images, got \(784,\)"),
        ({"kind": "resnet18", "norm": "bach"}, (3, 32, 32), "norm: .*did you mean 'batch'"),
        ({"kind": "dohare_convnet"}, (3, 16, 16), "images large enough for 3 convolutions"),
        ({"kind": "vit", "patch": 5}, (3, 32, 32), "patch: expected a divisor of the sides 32 and 32, got 5"),
        ({"kind": "vit", "width": 10}, (3, 32, 32), "width: expected a multiple of 4 and of the 4 heads, got 10"),
        ({"kind": "mlp", "hidden": [0]}, (5,), "hidden: expected a whole number of at least 1, got 0"),
    ],
)
def test_bad_settings_are_named(settings: dict, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(settings, shape, 4)


def test_squared_error_is_that_of_torch_for_each_replica() -> None:
    outputs, targets = torch.randn(R, 5, 1, dtype=torch.float64), torch.randn(R, 5, dtype=torch.float64)
    expected = torch.stack([nn.functional.mse_loss(o[:, 0], t) for o, t in zip(outputs, targets, strict=True)])
    torch.testing.assert_close(squared_error(outputs, targets), expected.sum())
    torch.testing.assert_close(squared_error(outputs, targets, reduction="none").mean(1), expected)
    torch.testing.assert_close(squared_error(outputs[0], targets[0]), expected[0])


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_of_losses_are_those_of_autograd(name: str) -> None:
    numbers = name == "mse"
    outputs = torch.randn(R, 5, 1 if numbers else 4, dtype=torch.float64)
    targets = torch.randn(R, 5, dtype=torch.float64) if numbers else torch.randint(3, (R, 5))
    if not numbers:
        outputs[..., 3] = -torch.inf  # takes no part
    outputs.requires_grad_()
    expected = LOSSES[name](outputs, targets, reduction="none")
    expected.backward(torch.ones_like(expected))
    losses, gradient = LOSS_GRADIENTS[name](outputs, targets)
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradient, outputs.grad, rtol=1e-12, atol=1e-14)
    assert not losses.requires_grad
    assert not gradient.requires_grad
