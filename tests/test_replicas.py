"""R stacked networks compute, learn and draw what R separate ones do."""

import copy
import itertools

import pytest
import torch
from cases import R, assert_same_tensors, convnet, images, mlp, train
from torch import Tensor, nn

from clagrange import GaussianLinear, gaussianize
from clagrange.networks import cross_entropy, initialize
from clagrange.optim import EulerLagrange
from clagrange.replicas import (
    STACKED_FORMS,
    StackedLinear,
    generator_of,
    generators_from_seeds,
    randn_like,
    replicas_of,
    stack,
    unstack,
)

LAYERS = {
    "linear": (lambda: nn.Linear(5, 4), (6, 5)),
    "linear without bias": (lambda: nn.Linear(5, 4, bias=False), (6, 5)),
    "linear over tokens": (lambda: nn.Linear(5, 4), (6, 3, 5)),
    "convolution": (lambda: nn.Conv2d(2, 4, 3), (6, 2, 7, 7)),
    "stride and padding": (lambda: nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=(1, 2)), (6, 2, 7, 7)),
    "same padding": (lambda: nn.Conv2d(2, 4, 3, padding="same", dilation=2), (6, 2, 7, 7)),
    "valid padding": (lambda: nn.Conv2d(2, 4, 3, padding="valid"), (6, 2, 7, 7)),
    "groups": (lambda: nn.Conv2d(4, 8, 3, groups=2, bias=False), (6, 4, 7, 7)),
    "circular padding": (lambda: nn.Conv2d(2, 4, 3, padding=(1, 2), padding_mode="circular"), (6, 2, 7, 7)),
    "reflect padding": (lambda: nn.Conv2d(2, 4, 3, padding=2, padding_mode="reflect", groups=2), (6, 2, 7, 7)),
    "circular same": (lambda: nn.Conv2d(2, 4, 3, padding="same", padding_mode="circular"), (6, 2, 7, 7)),
    "layer norm": (lambda: nn.LayerNorm(5), (6, 5)),
    "layer norm of images": (lambda: nn.LayerNorm((2, 7, 7)), (6, 2, 7, 7)),
    "layer norm of channels last": (lambda: nn.LayerNorm(7), (6, 2, 7, 7)),
    "layer norm without bias": (lambda: nn.LayerNorm(5, bias=False), (6, 5)),
    "layer norm without parameters": (lambda: nn.LayerNorm(5, elementwise_affine=False), (6, 5)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (6, 4, 7, 7)),
    "group norm of features": (lambda: nn.GroupNorm(2, 4), (6, 4)),
    "group norm without parameters": (lambda: nn.GroupNorm(2, 4, affine=False), (6, 4, 7, 7)),
    "batch norm 1d": (lambda: nn.BatchNorm1d(5), (6, 5)),
    "batch norm 1d of sequences": (lambda: nn.BatchNorm1d(5, momentum=0.3), (6, 5, 3)),
    "batch norm 1d, cumulative": (lambda: nn.BatchNorm1d(5, momentum=None), (6, 5)),
    "batch norm 2d": (lambda: nn.BatchNorm2d(4, eps=1e-2), (6, 4, 7, 7)),
    "batch norm 2d, cumulative": (lambda: nn.BatchNorm2d(4, momentum=None), (6, 4, 7, 7)),
    "batch norm without parameters": (lambda: nn.BatchNorm2d(4, affine=False), (6, 4, 7, 7)),
    "batch norm without statistics": (lambda: nn.BatchNorm1d(5, track_running_stats=False), (6, 5)),
    "flatten": (lambda: nn.Flatten(), (6, 2, 7, 7)),
    "flatten a part": (lambda: nn.Flatten(2), (6, 2, 7, 7)),
    "flatten the end": (lambda: nn.Flatten(-2, -1), (6, 2, 7, 7)),
    "max pool": (lambda: nn.MaxPool2d(3, stride=2, padding=1), (6, 2, 7, 7)),
    "average pool": (lambda: nn.AvgPool2d(2, ceil_mode=True), (6, 2, 7, 7)),
    "adaptive pool": (lambda: nn.AdaptiveAvgPool2d((2, 3)), (6, 2, 7, 7)),
}


def random_layers(make, seed: int = 0) -> list[nn.Module]:
    """R layers with random parameters."""
    generator = torch.Generator().manual_seed(seed)
    layers = [nn.Sequential(make()).double() for _ in range(R)]
    for layer in layers:
        for parameter in layer.parameters():
            parameter.data.normal_(generator=generator)
    return layers


@pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)
def test_stacked_layer_equals_single_ones(make, shape: tuple[int, ...]) -> None:
    """Outputs, gradients of inputs and parameters, and statistics: three batches in training, one after it."""
    layers = random_layers(make)
    stacked = stack(layers)
    generator = torch.Generator().manual_seed(1)
    for training in (True, True, True, False):
        inputs = torch.randn(R, *shape, generator=generator, dtype=torch.float64, requires_grad=True)
        stacked.train(training).zero_grad()
        outputs = stacked(inputs)
        weights = torch.randn(outputs.shape, generator=generator, dtype=torch.float64)
        (outputs * weights).sum().backward()
        for r, layer in enumerate(layers):
            single = inputs[r].detach().requires_grad_()
            layer.train(training).zero_grad()
            output = layer(single)
            torch.testing.assert_close(outputs[r], output, rtol=1e-11, atol=1e-11)
            (output * weights[r]).sum().backward()
            torch.testing.assert_close(inputs.grad[r], single.grad, rtol=1e-10, atol=1e-10)
            for (name, ours), theirs in zip(stacked.named_parameters(), layer.parameters(), strict=True):
                torch.testing.assert_close(ours.grad[r], theirs.grad, rtol=1e-10, atol=1e-10, msg=name)
            for (name, ours), theirs in zip(stacked.named_buffers(), layer.buffers(), strict=True):
                torch.testing.assert_close(ours[r], theirs, rtol=1e-12, atol=1e-12, msg=name)


def test_every_stacked_form_is_tested() -> None:
    assert {type(make()) for make, _ in LAYERS.values()} == set(STACKED_FORMS)


@pytest.mark.parametrize("make", [mlp, convnet])
@pytest.mark.parametrize("gaussian", [False, True])
def test_unstack_is_the_inverse_of_stack(make, gaussian: bool) -> None:
    nets = [gaussianize(make(seed)) if gaussian else make(seed) for seed in range(R)]
    stacked = stack(nets)
    again = unstack(stacked)
    assert [type(layer) for layer in again[0]] == [type(layer) for layer in nets[0]]
    for single, net in zip(again, nets, strict=True):
        assert_same_tensors(dict(single.state_dict()), dict(net.state_dict()))
        assert list(single.state_dict()) == list(net.state_dict())
    with torch.no_grad():  # copies: nothing is shared in either direction
        for parameter in stacked.parameters():
            parameter.zero_()
    assert nets[0][0].weight.any()
    assert again[0][0].weight.any()


def test_stack_of_one() -> None:
    net, (inputs, _) = convnet(), images()
    stacked = stack([net])
    assert replicas_of(stacked) == 1
    torch.testing.assert_close(stacked(inputs.unsqueeze(0))[0], net(inputs))


def test_trained_unstacked_replica_goes_on_alone() -> None:
    nets = unstack(gaussianize(stack([mlp(seed) for seed in range(R)])))
    net = nets[1]
    train(net, EulerLagrange(net, lr=0.05), range(3))
    assert net[0].weight_precision.curvature.any()
    assert not nets[0][0].weight_precision.curvature.any()


def test_stacking_commutes_with_gaussianizing() -> None:
    first = gaussianize(stack([mlp(seed) for seed in range(R)]), prior_mean="initial")
    second = stack([gaussianize(mlp(seed), prior_mean="initial") for seed in range(R)])
    assert [type(layer) for layer in first] == [type(layer) for layer in second]
    assert type(first[0]) is GaussianLinear
    assert_same_tensors(dict(first.state_dict()), dict(second.state_dict()))


def test_replicas_of() -> None:
    assert replicas_of(mlp()) is None
    assert replicas_of(gaussianize(convnet())) is None
    for make in (mlp, convnet):
        assert replicas_of(stack([make(seed) for seed in range(R)])) == R
        assert replicas_of(gaussianize(stack([make(seed) for seed in range(R)]))) == R
    assert replicas_of(nn.Sequential(nn.ReLU())) is None


def test_copies_of_a_stacked_network_stay_stacked() -> None:
    stacked = stack([convnet(seed) for seed in range(R)])
    inputs = torch.stack([images(seed)[0] for seed in range(R)])
    torch.testing.assert_close(copy.deepcopy(stacked)(inputs), stacked(inputs), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("layer", "named"),
    [
        (nn.Dropout(0.5), "Dropout"),
        (nn.Embedding(4, 2), "Embedding"),
        (nn.PReLU(), "PReLU"),
        (nn.Softmax(-1), "Softmax"),
        (nn.Conv1d(2, 2, 3), "Conv1d"),
    ],
)
def test_layers_without_stacked_form_are_refused_by_name(layer: nn.Module, named: str) -> None:
    nets = [nn.Sequential(nn.Linear(4, 4), nn.Sequential(copy.deepcopy(layer))) for _ in range(2)]
    with pytest.raises(ValueError, match=rf"networks: layer '1\.0' of type {named} has no stacked form"):
        stack(nets)


def test_the_network_itself_without_stacked_form_is_refused() -> None:
    with pytest.raises(ValueError, match=r"layer '\(root\)' of type Embedding"):
        stack([nn.Embedding(4, 2)])


def test_different_structures_and_none_at_all_are_refused() -> None:
    with pytest.raises(
        ValueError, match="networks: expected one structure, but network 2 differs from network 0"
    ):
        stack([nn.Linear(4, 2), nn.Linear(4, 2), nn.Linear(4, 3)])
    with pytest.raises(ValueError, match="network 1 differs"):
        stack([nn.Linear(4, 2), nn.Linear(4, 2, bias=False)])
    with pytest.raises(ValueError, match="network 1 differs"):
        stack([mlp(), gaussianize(mlp())])
    with pytest.raises(ValueError, match="expected at least one network"):
        stack([])
    with pytest.raises(ValueError, match="network: expected a stacked network, got a single one"):
        unstack(mlp())


@pytest.mark.parametrize(
    "layers", [(nn.ReLU(), nn.Tanh()), (nn.LeakyReLU(0.1), nn.LeakyReLU(0.2)), (nn.AvgPool2d(2), nn.AvgPool2d(3))]
)
def test_networks_that_differ_only_in_a_layer_without_parameters_are_refused(layers) -> None:
    with pytest.raises(ValueError, match="network 1 differs"):
        stack([nn.Sequential(nn.Linear(4, 4), layer) for layer in layers])


def test_inputs_without_replicas_are_refused() -> None:
    with pytest.raises(ValueError, match=r"inputs of shape \(replicas, batch, features\)"):
        stack([mlp(seed) for seed in range(R)])(torch.zeros(8, 5, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"inputs of shape \(replicas, batch, channels, height, width\)"):
        stack([convnet(seed) for seed in range(R)])(images()[0])
    with pytest.raises(ValueError, match=r"inputs of shape \(replicas, batch, channels, ...\)"):
        stack([nn.BatchNorm1d(5) for _ in range(R)])(torch.zeros(8, 5))


# ---------------------------------------------------------------------------------------- random streams
@pytest.mark.parametrize("shape", [(3,), (4, 5), (20, 30), (2, 3, 4, 5)])
def test_every_replica_draws_from_its_own_stream(shape: tuple[int, ...]) -> None:
    seeds = [5, 0, 7]
    stacked = randn_like(torch.zeros(R, *shape), generators_from_seeds(seeds))
    for r, seed in enumerate(seeds):
        single = randn_like(torch.zeros(shape), generators_from_seeds(seed))
        torch.testing.assert_close(stacked[r], single, rtol=0, atol=0)
    for first, second in itertools.combinations(stacked, 2):
        assert not torch.equal(first, second)


def test_streams_go_on_and_the_global_one_is_the_default() -> None:
    stream = generators_from_seeds(1)
    assert not torch.equal(randn_like(torch.zeros(4), stream), randn_like(torch.zeros(4), stream))
    torch.manual_seed(3)
    expected = torch.randn(4)
    torch.manual_seed(3)
    assert torch.equal(randn_like(torch.zeros(4)), expected)
    assert randn_like(torch.zeros(4, dtype=torch.float64)).dtype == torch.float64


def test_generator_of() -> None:
    streams = generators_from_seeds([1, 2])
    assert generator_of(streams, 1) is streams[1]
    assert generator_of(streams[0], 1) is streams[0]
    assert generator_of(None, 1) is None


@pytest.mark.parametrize("shape", [(2, 3), ()])
def test_wrong_number_of_streams_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"generators: expected one for each of the replicas"):
        randn_like(torch.zeros(shape), generators_from_seeds([1, 2, 3]))


@pytest.mark.parametrize("make", [mlp, convnet])
def test_initialisation_of_a_stack_equals_single_ones(make) -> None:
    stacked = stack([make(9) for _ in range(R)])
    initialize(stacked, generators_from_seeds(range(R)))
    for seed, single in enumerate(unstack(stacked)):
        net = make(7)
        initialize(net, torch.Generator().manual_seed(seed))
        assert_same_tensors(dict(single.state_dict()), dict(net.state_dict()))


def test_loss_leaves_each_replica_the_gradient_that_it_has_alone() -> None:
    nets = [mlp(seed) for seed in range(R)]
    stacked = stack(nets)
    inputs: Tensor = torch.randn(R, 8, 5, dtype=torch.float64)
    targets = torch.randint(3, (R, 8))
    cross_entropy(stacked(inputs), targets).backward()
    for r, net in enumerate(nets):
        nn.functional.cross_entropy(net(inputs[r]), targets[r]).backward()
        for ours, theirs in zip(stacked.parameters(), net.parameters(), strict=True):
            torch.testing.assert_close(ours.grad[r], theirs.grad)


def test_a_stacked_layer_is_the_single_type_too() -> None:
    assert isinstance(stack([nn.Linear(3, 2)]), StackedLinear)
    norms = (nn.BatchNorm1d, nn.BatchNorm2d)
    assert all(issubclass(stacked, single) for single, stacked in STACKED_FORMS.items() if single not in norms)
