"""gaussianize and collapse: in place, layer by layer, back and forth, and what they refuse."""

import pytest
import torch
from cases import assert_same_tensors, batch, convnet, gaussian_parameters, images, mlp
from torch import nn

from clagrange import GaussianConv2d, GaussianLinear, collapse, gaussianize, replicas, variances
from clagrange.gaussian import gaussian_layers, owner_of


def test_in_place_keeps_objects_hooks_references_and_outputs() -> None:
    net = convnet()
    calls = []
    handle = net[0].register_forward_hook(lambda *_: calls.append(1))
    reference, layers, parameters = net[5], list(net), dict(net.named_parameters())
    inputs, _ = images()
    before = net(inputs)
    result = gaussianize(net)

    assert result is net
    assert all(new is old for new, old in zip(net, layers, strict=True))
    assert type(reference) is GaussianLinear
    assert [type(layer) for _, layer in gaussian_layers(net)] == [GaussianConv2d] * 2 + [GaussianLinear] * 2
    assert list(dict(net.named_parameters())) == list(parameters)
    assert all(value is parameters[name] for name, value in net.named_parameters())
    torch.testing.assert_close(net(inputs), before, rtol=0, atol=0)
    assert len(calls) == 2
    handle.remove()


def test_every_mean_starts_at_its_prior() -> None:
    net = gaussianize(convnet(), prior_variance=0.5)
    fan_ins = {"0": 2 * 9, "2": 4 * 9, "5": 12, "7": 5}
    for name, variance in variances(net).items():
        torch.testing.assert_close(variance, torch.full_like(variance, 0.5 * 2 / fan_ins[name.split(".")[0]]))
    for _, mean, precision in gaussian_parameters(net):
        assert not precision.prior_mean.any()
        assert not precision.curvature.any()
        assert precision.precision.shape == mean.shape


def test_prior_mean_at_the_initial_weights() -> None:
    net = gaussianize(mlp(), prior_mean="initial")
    weights = {name: mean.detach().clone() for name, mean, _ in gaussian_parameters(net)}
    with torch.no_grad():
        net[0].weight.add_(1.0)
    for name, _, precision in gaussian_parameters(net):
        torch.testing.assert_close(precision.prior_mean, weights[name], rtol=0, atol=0)


def test_copy_leaves_the_original_alone() -> None:
    net = mlp()
    copied = gaussianize(net, copied=True)
    assert [type(layer) for layer in net if isinstance(layer, nn.Linear)] == [nn.Linear] * 3
    assert "0.weight_precision.precision" in copied.state_dict()
    assert "0.weight_precision.precision" not in net.state_dict()
    assert owner_of(net[0].weight) is None
    assert owner_of(copied[0].weight) == (copied[0], "weight")
    with torch.no_grad():
        copied[0].weight.zero_()
    assert net[0].weight.any()


def test_settings_by_layer_later_patterns_win_and_none_stays_deterministic() -> None:
    net = gaussianize(
        convnet(),
        layers={
            "*": {"prior_variance": 0.1},
            "[57]": {"prior_mean": "initial"},
            "7": {"prior_variance": 3.0},
            "0": None,
        },
    )
    assert type(net[0]) is nn.Conv2d
    found = {name: float(v.flatten()[0]) for name, v in variances(net).items() if "weight" in name}
    expected = {"2.weight": 0.1 * 2 / 36, "5.weight": 0.1 * 2 / 12, "7.weight": 3.0 * 2 / 5}
    assert found == pytest.approx(expected)
    torch.testing.assert_close(net[7].weight_precision.prior_mean, net[7].weight.detach())
    assert not net[2].weight_precision.prior_mean.any()


def test_a_pattern_after_none_makes_the_layer_gaussian_again() -> None:
    net = gaussianize(mlp(), layers={"*": None, "4": {}})
    assert [name for name, _ in gaussian_layers(net)] == ["4"]


def test_calling_it_again_changes_nothing() -> None:
    net = gaussianize(mlp(), prior_variance=0.3)
    with torch.no_grad():
        net[0].weight_precision.precision.mul_(7)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    gaussianize(net, prior_variance=1.0)
    assert_same_tensors(dict(net.state_dict()), before)


def test_calling_it_again_adds_new_layers() -> None:
    net = gaussianize(mlp())
    net.append(nn.Linear(3, 2).double())
    gaussianize(net)
    assert type(net[5]) is GaussianLinear
    assert owner_of(net[5].bias) == (net[5], "bias")


def test_stacked_network_with_a_prior_variance_for_each_replica() -> None:
    scales = torch.tensor([0.1, 1.0, 4.0])
    net = gaussianize(replicas.stack([mlp(seed) for seed in range(3)]), prior_variance=scales)
    for name, variance in variances(net).items():
        for replica, scale in enumerate(scales.tolist()):
            single = gaussianize(mlp(), prior_variance=scale)
            torch.testing.assert_close(variance[replica], variances(single)[name], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "diagonl"}, r"precision: expected one of .*diagonal.* did you mean 'diagonal'\?"),
        ({"prior_mean": "inital"}, r"prior_mean: expected one of zero, initial; .* did you mean 'initial'\?"),
        ({"prior_variance": -1.0}, r"prior_variance: expected a number in \(0, inf\), got -1"),
        ({"prior_variance": 0.0}, r"prior_variance: "),
        ({"layers": {"fc.haed": {}}}, r"layers: .*fc\.haed.*did you mean 'fc\.head'\?"),
        (
            {"layers": {"fc.*": {"prior_varience": 1.0}}},
            r"layers\['fc\.\*'\]: .* did you mean 'prior_variance'\?",
        ),
        ({"layers": {"fc.head": {"prior_variance": -2.0}}}, r"prior_variance: .*got -2"),
    ],
)
def test_bad_settings_are_refused_and_change_nothing(settings: dict, message: str) -> None:
    net = nn.ModuleDict({"fc": nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Linear(4, 2)})})
    with pytest.raises(ValueError, match=message):
        gaussianize(net, **settings)
    assert {type(module) for module in net["fc"].values()} == {nn.Linear}


@pytest.mark.parametrize("prior_variance", [torch.tensor([0.1, 0.2]), torch.tensor([0.1, 0.2, 0.3, 0.4])])
def test_a_prior_variance_for_each_replica_needs_a_stacked_network(prior_variance: torch.Tensor) -> None:
    """Also where its length happens to be that of the layer."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"replicas"):
        gaussianize(net, prior_variance=prior_variance)
    assert {type(layer) for layer in net} == {nn.Linear}


def test_network_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"module: expected a network with torch.nn.Linear .* got Sequential"):
        gaussianize(nn.Sequential(nn.ReLU(), nn.LayerNorm(3)))


def test_shared_weight_is_refused_with_the_remedy() -> None:
    def tied() -> nn.Sequential:
        net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False))
        net[2].weight = net[0].weight
        return net

    net = tied()
    with pytest.raises(ValueError, match=r"layers '0' and '2' share a weight.*layers=\{'2': None\}"):
        gaussianize(net)
    assert type(net[0]) is nn.Linear
    gaussianize(net, layers={"2": None})
    assert type(net[2]) is nn.Linear
    with pytest.raises(ValueError, match=r"a Gaussian layer' and '2' share a weight"):
        gaussianize(net)


def test_a_layer_used_twice_is_one_layer() -> None:
    layer = nn.Linear(4, 4)
    net = gaussianize(nn.Sequential(layer, nn.ReLU(), layer))
    assert [name for name, _ in gaussian_layers(net)] == ["0"]


def test_collapse_is_the_inverse() -> None:
    net = convnet()
    keys, types = list(net.state_dict()), [type(layer) for layer in net]
    inputs, _ = images()
    expected = net(inputs)
    parameters = list(net.parameters())
    result = collapse(gaussianize(net))
    assert result is net
    assert list(net.state_dict()) == keys
    assert [type(layer) for layer in net] == types
    assert all(new is old for new, old in zip(net.parameters(), parameters, strict=True))
    assert all(owner_of(parameter) is None for parameter in parameters)
    assert [vars(layer).keys() for layer in net] == [vars(layer).keys() for layer in convnet()]
    torch.testing.assert_close(net(inputs), expected, rtol=0, atol=0)


def test_collapse_of_a_stacked_network() -> None:
    net = replicas.stack([mlp(seed) for seed in range(3)])
    types = [type(layer) for layer in net]
    inputs = torch.stack([batch(seed)[0] for seed in range(3)])
    expected = net(inputs)
    collapse(gaussianize(net))
    assert [type(layer) for layer in net] == types
    torch.testing.assert_close(net(inputs), expected, rtol=0, atol=0)


def test_layers_made_directly_equal_gaussianized_ones() -> None:
    torch.manual_seed(3)
    linear = GaussianLinear(4, 3, prior_variance=0.2, dtype=torch.float64)
    convolution = GaussianConv2d(2, 4, 3, stride=2, groups=2, bias=False, prior_mean="initial")
    torch.manual_seed(3)
    plain = nn.Sequential(nn.Linear(4, 3, dtype=torch.float64))
    other = nn.Conv2d(2, 4, 3, stride=2, groups=2, bias=False)
    gaussianize(plain, prior_variance=0.2)
    gaussianize(other, prior_mean="initial")
    assert_same_tensors(dict(linear.state_dict()), dict(plain[0].state_dict()))
    assert_same_tensors(dict(convolution.state_dict()), dict(other.state_dict()))
    assert float(convolution.weight_precision.variance().mean()) == pytest.approx(2 / (1 * 9))


def test_parameters_of_no_gaussian_network_are_asked_for() -> None:
    with pytest.raises(ValueError, match=r"call clagrange.gaussianize\(module\) first"):
        variances(mlp())
