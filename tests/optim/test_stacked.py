"""StackedSGD and StackedAdam equal torch's optimizers, replica by replica."""

import pytest
import torch
from cases import STACKED_ADAM, STACKED_SGD, OptimizerCase, R, assert_same_tensors, backward, batch, mlp, train
from torch.optim.optimizer import Optimizer

from clagrange import replicas

each = pytest.mark.parametrize("case", [STACKED_SGD, STACKED_ADAM], ids=lambda case: case.name)


def torch_optimizer(case: OptimizerCase, parameters, settings: dict) -> Optimizer:
    assert case.torch_form is not None
    return case.torch_form(parameters, **settings)


@each
def test_single_network_equals_torch(case: OptimizerCase) -> None:
    for settings in [case.settings, *({**case.settings, **options} for options in case.options)]:
        ours, theirs = mlp(), mlp()
        train(ours, case.form(ours.parameters(), **settings), range(60))
        train(theirs, torch_optimizer(case, theirs.parameters(), settings), range(60))
        assert_same_tensors(dict(ours.state_dict()), dict(theirs.state_dict()), rtol=1e-11, atol=1e-11)


@each
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
