"""StackedSGD, StackedAdam and StackedMuon equal torch's optimizers, replica by replica."""

import copy

import pytest
import torch
from cases import (
    STACKED_ADAM,
    STACKED_MUON,
    STACKED_SGD,
    OptimizerCase,
    R,
    assert_same_tensors,
    backward,
    batch,
    mlp,
    train,
)
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from clagrange import replicas
from clagrange.optim import StackedSGD
from clagrange.optim.stacked import orthogonal, rates_of_plain_sgd

each = pytest.mark.parametrize("case", [STACKED_SGD, STACKED_ADAM, STACKED_MUON], ids=lambda case: case.name)


@pytest.fixture
def unrounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's Muon iterates in bfloat16; without that rounding it is to be matched to the last digits."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)


def torch_optimizer(case: OptimizerCase, parameters, settings: dict) -> Optimizer:
    if case is STACKED_MUON and not hasattr(torch.optim, "Muon"):
        pytest.skip("this version of torch has no Muon")
    assert case.torch_form is not None
    return case.torch_form(parameters, **settings)


@each
@pytest.mark.usefixtures("unrounded")
def test_single_network_equals_torch(case: OptimizerCase) -> None:
    for settings in [case.settings, *({**case.settings, **options} for options in case.options)]:
        ours, theirs = mlp(), mlp()
        train(ours, case.form(ours.parameters(), **settings), range(60))
        train(theirs, torch_optimizer(case, theirs.parameters(), settings), range(60))
        assert_same_tensors(dict(ours.state_dict()), dict(theirs.state_dict()), rtol=1e-11, atol=1e-11)


@each
@pytest.mark.usefixtures("unrounded")
def test_tensors_of_settings_equal_torch_for_each_replica(case: OptimizerCase) -> None:
    nets = [mlp(seed) for seed in range(R)]
    stacked = replicas.stack(nets)
    optimizer = case.form(stacked.parameters(), **case.stacked_settings)
    for step in range(60):
        batches = [batch(100 * r + step) for r in range(R)]
        backward(stacked, optimizer, *(torch.stack(part) for part in zip(*batches, strict=True)))
        optimizer.step()
    for r, (net, single) in enumerate(zip(nets, replicas.unstack(stacked), strict=True)):
        settings = {
            name: tuple(float(beta[r]) for beta in value) if isinstance(value, tuple) else float(value[r])
            for name, value in case.stacked_settings.items()
        }
        reference = torch_optimizer(case, net.parameters(), settings)
        train(net, reference, range(100 * r, 100 * r + 60))
        assert_same_tensors(dict(single.state_dict()), dict(net.state_dict()), rtol=1e-11, atol=1e-11)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this version of torch has no Muon")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_muon_equals_torch_to_the_rounding_of_bfloat16(dtype: torch.dtype) -> None:
    """5 % of one step: five iterations with rounding errors of 0.4 % leave 1 to 2 % in the mean."""
    generator = torch.Generator().manual_seed(1)
    for shape in ((6, 4), (4, 6), (64, 20)):
        gradient = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        weights = [torch.nn.Parameter(torch.ones(shape, dtype=dtype)) for _ in range(2)]
        for weight, form in zip(weights, (STACKED_MUON.form, torch.optim.Muon), strict=True):
            weight.grad = gradient.clone()
            form([weight], lr=0.1, weight_decay=0.0).step()
        ours, theirs = (weight.detach() - 1.0 for weight in weights)
        assert float((ours - theirs).norm() / theirs.norm()) < 0.05


def test_muon_tells_biases_of_a_stacked_network_from_matrices() -> None:
    """A stacked bias has two dimensions; the numbers, or the user, say that the first is that of replicas."""
    for settings in ({"lr": torch.tensor([0.1, 0.1])}, {"lr": 0.1, "stacked": True}):
        weight, bias = torch.nn.Parameter(torch.ones(2, 4, 3)), torch.nn.Parameter(torch.ones(2, 4))
        weight.grad, bias.grad = torch.randn(2, 4, 3), torch.randn(2, 4)
        optimizer = STACKED_MUON.form([weight, bias], **settings)
        optimizer.step()
        assert set(optimizer.state[weight]) == {"momentum_buffer"}
        assert set(optimizer.state[bias]) == {"step", "gradient_mean", "gradient_square"}


def test_orthogonal_brings_singular_values_near_one_and_keeps_the_directions() -> None:
    left, _ = torch.linalg.qr(torch.randn(5, 7, 4, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(5, 4, 4, dtype=torch.float64))
    values = torch.logspace(0, 2, 4, dtype=torch.float64)
    result = left.mT @ orthogonal((left * values) @ right.mT) @ right
    diagonal = result.diagonal(dim1=-2, dim2=-1)
    assert bool(((diagonal > 0.65) & (diagonal < 1.25)).all())
    torch.testing.assert_close(result, torch.diag_embed(diagonal), rtol=0, atol=1e-12)
    assert torch.equal(orthogonal(torch.zeros(2, 3)), torch.zeros(2, 3))


@each
def test_checkpoint_of_stacked_settings_continues_identically(case: OptimizerCase, tmp_path) -> None:
    def steps(net: torch.nn.Module, optimizer: Optimizer, numbers: range) -> None:
        for step in numbers:
            inputs, targets = batch(step)
            backward(net, optimizer, inputs.expand(R, -1, -1), targets.expand(R, -1))
            optimizer.step()

    net = replicas.stack([mlp(seed) for seed in range(R)])
    optimizer = case.form(net.parameters(), **case.stacked_settings)
    steps(net, optimizer, range(4))
    torch.save((net.state_dict(), optimizer.state_dict()), tmp_path / "checkpoint")
    steps(net, optimizer, range(4, 8))
    weights, state = torch.load(tmp_path / "checkpoint", weights_only=True)
    resumed = replicas.stack([mlp() for _ in range(R)])
    resumed.load_state_dict(weights)
    other = case.form(resumed.parameters())
    other.load_state_dict(state)
    steps(resumed, other, range(4, 8))
    assert_same_tensors(dict(resumed.state_dict()), dict(net.state_dict()))


def test_momentum_of_zero_in_a_tensor_is_plain_sgd() -> None:
    weight = torch.nn.Parameter(torch.ones(2, 1))
    optimizer = STACKED_SGD.form([weight], lr=1.0, momentum=torch.tensor([0.0, 0.5]))
    for _ in range(2):
        weight.grad = torch.ones(2, 1)
        optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.tensor([[-1.0], [-1.5]]))


def test_hyper_parameters_of_a_float32_network_keep_their_digits() -> None:
    """A (R,) tensor of float64 in a float32 network gives the step that the plain number gives."""
    weight, single = (torch.nn.Parameter(torch.ones(shape)) for shape in ((2, 3), (3,)))
    rates = torch.tensor([0.1, 0.3], dtype=torch.float64)
    weight.grad, single.grad = torch.full((2, 3), 0.7), torch.full((3,), 0.7)
    STACKED_SGD.form([weight], lr=rates).step()
    STACKED_SGD.form([single], lr=0.3).step()
    torch.testing.assert_close(weight[1], single)


@pytest.mark.parametrize("lr", [0.1, torch.tensor([0.1, 0.3])], ids=["one", "by replica"])
@pytest.mark.parametrize("case", [STACKED_SGD, STACKED_ADAM], ids=lambda case: case.name)
def test_a_backward_pass_through_weights_that_a_step_has_changed_is_refused(case: OptimizerCase, lr) -> None:
    weight = torch.nn.Parameter(torch.ones(2, 3))
    loss = weight.square().sum()
    weight.grad = torch.ones(2, 3)
    case.form([weight], lr=lr).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---------------------------------------------------------------------------------- steps in the backward pass
@pytest.mark.parametrize("examples", [1, 5])
@pytest.mark.parametrize("lr", [0.1, torch.tensor([0.1, 0.0, 0.4][:R])], ids=["a number", "one for each replica"])
def test_a_step_in_the_backward_pass_is_that_of_sgd(examples: int, lr: float | Tensor) -> None:
    def network() -> nn.Module:
        layers = [nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3, bias=False)) for _ in range(R)]
        return replicas.stack(layers).double()

    torch.manual_seed(0)
    ours = network()
    theirs = copy.deepcopy(ours)
    optimizers = [StackedSGD(net.parameters(), lr=lr) for net in (ours, theirs)]
    rates = rates_of_plain_sgd(ours, optimizers[0])
    assert set(rates) == {ours[0].weight, ours[2].weight}
    for _ in range(3):
        inputs = torch.randn(R, examples, 4, dtype=torch.float64)
        with replicas.stepping_in_backward(rates):
            ours(inputs).square().sum().backward()
        theirs(inputs).square().sum().backward()
        assert all(parameter.grad is None for parameter in ours.parameters())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert_same_tensors(dict(ours.named_parameters()), dict(theirs.named_parameters()), rtol=1e-12, atol=1e-14)


def test_half_precision_steps_in_the_backward_pass() -> None:
    layer = replicas.stack([nn.Linear(4, 3) for _ in range(2)]).bfloat16()
    before = layer.weight.detach().clone()
    with replicas.stepping_in_backward({layer.weight: torch.tensor([0.0, 0.5])}):
        layer(torch.ones(2, 1, 4, dtype=torch.bfloat16)).sum().backward()
    assert torch.equal(layer.weight[0], before[0])
    torch.testing.assert_close(layer.weight[1], before[1] - 0.5)


def test_after_the_block_gradients_arrive_as_ever() -> None:
    layer = replicas.stack([nn.Linear(4, 3)])
    with pytest.raises(KeyboardInterrupt), replicas.stepping_in_backward({layer.weight: 0.1}):
        raise KeyboardInterrupt
    before = layer.weight.detach().clone()
    layer(torch.ones(1, 2, 4)).sum().backward()
    assert torch.equal(layer.weight, before)
    assert layer.weight.grad is not None
    assert layer.bias.grad is not None


def test_a_layer_that_is_called_twice_is_refused() -> None:
    """The second of its backward passes would meet weights that the first has changed."""
    layer = replicas.stack([nn.Linear(3, 3)])
    with replicas.stepping_in_backward({layer.weight: 0.1}), pytest.raises(RuntimeError, match="inplace"):
        layer(layer(torch.ones(1, 2, 3))).sum().backward()


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
        lambda parameters: torch.optim.SGD(parameters, lr=0.1, weight_decay=0.1),
        lambda parameters: torch.optim.SGD(parameters, lr=0.1, maximize=True),
        lambda parameters: StackedSGD(parameters, lr=0.1, momentum=torch.tensor([0.0, 0.9])),
        lambda parameters: torch.optim.Adam(parameters, lr=0.1),
    ],
    ids=["momentum", "decay", "maximize", "momentum of replicas", "Adam"],
)
def test_only_plain_sgd_steps_in_the_backward_pass(optimizer) -> None:
    network = replicas.stack([nn.Linear(3, 2) for _ in range(2)])
    assert rates_of_plain_sgd(network, optimizer(network.parameters())) == {}


def test_frozen_and_other_parameters_wait_for_the_optimizer() -> None:
    network = replicas.stack([nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 3), nn.Linear(3, 2))])
    network[0].bias.requires_grad_(False)
    groups = [{"params": [network[2].weight]}, {"params": [network[2].bias, *network[3].parameters()], "lr": 0.2}]
    assert rates_of_plain_sgd(network, torch.optim.SGD(groups, lr=0.1)) == {network[3].weight: 0.2}
