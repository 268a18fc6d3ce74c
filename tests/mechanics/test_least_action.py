"""Least-action backpropagation: exact after 2L steps and not before, and a network trains with it."""

import copy
import math
import pickle

import pytest
import torch
from cases import batch, convnet, images, mlp
from torch import Tensor, nn

import clagrange
from clagrange.mechanics import (
    LeastAction,
    Phase,
    least_action,
    least_action_gradients,
    relaxation_errors,
    steps_to_rest,
)

CASES = {"mlp": (mlp, batch, 3), "conv": (convnet, images, 4)}
"""Network, its batches, its depth L."""


def tanh_net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(5, 6),
        nn.Tanh(),
        nn.Sequential(nn.Linear(6, 6), nn.Softplus(), nn.Sequential(nn.Linear(6, 6), nn.Sigmoid())),
        nn.Linear(6, 4),
        nn.GELU(),
        nn.Linear(4, 3),
    ).double()


def cost_of(targets: Tensor):
    return lambda output: nn.functional.cross_entropy(output, targets)


def autograd(net: nn.Module, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    names = [name for name, p in net.named_parameters() if p.requires_grad]
    loss = cost_of(targets)(net(inputs))
    return dict(zip(names, torch.autograd.grad(loss, [net.get_parameter(n) for n in names]), strict=True))


def relative_error(found: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    assert found.keys() == truth.keys()
    difference = math.sqrt(sum(float((found[name] - truth[name]).square().sum()) for name in truth))
    return difference / math.sqrt(sum(float(g.square().sum()) for g in truth.values()))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("beta", [1e-3, 1.0, 10.0])
def test_gradients_are_exact_after_2L_steps_and_not_before(case: str, beta: float) -> None:
    make, data, depth = CASES[case]
    net, (inputs, targets) = make(), data()
    truth = autograd(net, inputs, targets)
    assert LeastAction(net).depth == depth
    cost, exact = least_action_gradients(net, inputs, cost_of(targets), beta=beta)
    assert relative_error(exact, truth) < 1e-12
    torch.testing.assert_close(cost, cost_of(targets)(net(inputs)).detach(), rtol=0, atol=0)
    for steps in range(1, 2 * depth):
        _, early = least_action_gradients(net, inputs, cost_of(targets), beta=beta, steps=steps)
        assert relative_error(early, truth) > 1e-3, steps
    _, later = least_action_gradients(net, inputs, cost_of(targets), beta=beta, steps=2 * depth + 3)
    assert relative_error(later, truth) < 1e-12


@pytest.mark.parametrize("case", CASES)
def test_any_start_is_forgotten(case: str) -> None:
    make, data, _ = CASES[case]
    net, (inputs, targets) = make(), data()
    relaxed = LeastAction(net)
    zero = relaxed.start(inputs)
    wild = Phase(*(tuple(10 * torch.randn_like(x) for x in part) for part in (zero.states, zero.tensions)))
    _, found = least_action_gradients(net, inputs, cost_of(targets), start=wild)
    assert relative_error(found, autograd(net, inputs, targets)) < 1e-12


def test_error_travels_forward_in_the_states_then_backward_in_the_tensions() -> None:
    net, (inputs, targets) = tanh_net(), batch()
    errors = relaxation_errors(net, inputs, cost_of(targets))
    depth = 5
    assert errors.gradient.shape == (2 * depth + 1,)
    assert errors.states.shape == errors.tensions.shape == (2 * depth + 1, depth)
    for step in range(2 * depth + 1):
        for layer in range(1, depth + 1):
            assert (errors.states[step, layer - 1] < 1e-13) == (step >= layer)
            assert (errors.tensions[step, layer - 1] < 1e-12) == (step >= 2 * depth + 1 - layer)
        assert (errors.gradient[step] < 1e-12) == (step == 2 * depth)
    assert errors.gradient[0] == 1.0


def test_continuous_flow_reaches_the_same_rest() -> None:
    net, (inputs, targets) = mlp(), batch()
    truth = autograd(net, inputs, targets)
    _, found = least_action_gradients(net, inputs, cost_of(targets), step_size=0.1, time=60.0)
    assert relative_error(found, truth) < 1e-13
    _, default = least_action_gradients(net, inputs, cost_of(targets), step_size=0.1)
    assert relative_error(default, truth) < 1e-12
    errors = relaxation_errors(net, inputs, cost_of(targets), step_size=0.1, time=20.0).gradient
    assert 1e-9 < errors[-1] < 1e-3
    # finer steps follow the same flow: at time 3 the difference shrinks with the step, to first order
    at_three = [
        least_action_gradients(net, inputs, cost_of(targets), step_size=h, time=3.0)[1]["4.weight"]
        for h in (0.1, 0.05, 0.025)
    ]
    ratio = (at_three[0] - at_three[1]).norm() / (at_three[1] - at_three[2]).norm()
    assert 1.7 < ratio < 2.3


def test_steps_to_rest_is_the_binomial_tail() -> None:
    assert [steps_to_rest(depth) for depth in (1, 4)] == [2, 8]
    for depth, size, tolerance in [(1, 0.5, 1e-6), (3, 0.1, 1e-16), (8, 0.3, 1e-7)]:
        steps = steps_to_rest(depth, size, tolerance)

        def tail(n: int, depth: int = depth, size: float = size) -> float:
            return sum(math.comb(n, k) * size**k * (1 - size) ** (n - k) for k in range(2 * depth))

        assert tail(steps) < tolerance <= tail(steps - 1)


@pytest.mark.parametrize("case", CASES)
def test_a_network_trains_to_the_weights_of_autograd(case: str) -> None:
    make, data, _ = CASES[case]
    nets = [make(), make()]
    optimizers = [torch.optim.AdamW(net.parameters(), lr=1e-2) for net in nets]
    for step in range(60):
        inputs, targets = data(step)
        for net, optimizer in zip(nets, optimizers, strict=True):
            optimizer.zero_grad()
            if net is nets[0]:
                cost_of(targets)(net(inputs)).backward()
            else:
                with least_action(net, beta=0.5):
                    loss = cost_of(targets)(net(inputs))
                    loss.backward()
            optimizer.step()
    moved = make()
    for old, ours, theirs in zip(moved.parameters(), nets[1].parameters(), nets[0].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
        assert (ours - old).abs().max() > 0.01


def test_the_block_changes_the_backward_pass_only_while_it_lasts() -> None:
    net, (inputs, targets) = mlp(), batch()
    before = net(inputs)
    with least_action(net, steps=1) as relaxed:
        assert torch.equal(net(inputs), before)
        cost_of(targets)(net(inputs)).backward()
        assert relaxed.depth == 3
    assert net[0].weight.grad.abs().max() == 0.0  # one step: tension has reached the last layer only
    assert net[4].bias.grad.abs().max() > 0.0
    assert "forward" not in vars(net)
    with pytest.raises(RuntimeError, match="stop"), least_action(net):
        raise RuntimeError("stop")
    assert "forward" not in vars(net)
    with least_action(net):
        net(inputs)
        with least_action(net, steps=1):
            cost_of(targets)(net(inputs)).backward()
        assert "forward" in vars(net)
    assert "forward" not in vars(net)


def test_gradients_accumulate_and_reach_the_inputs_and_what_lies_around_the_network() -> None:
    net, (inputs, targets) = mlp(), batch()
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    results = []
    for mode in (False, True):
        net.zero_grad()
        x = inputs.clone().requires_grad_()
        scale.grad = None
        for _ in range(2):
            if mode:
                with least_action(net):
                    loss = cost_of(targets)(scale * net(scale * x))
                    loss.backward()
            else:
                cost_of(targets)(scale * net(scale * x)).backward()
        results.append([x.grad, scale.grad, *(p.grad.clone() for p in net.parameters())])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_module_form_frozen_and_shared_weights_and_copies() -> None:
    net, (inputs, targets) = tanh_net(), batch()
    net[1].weight.requires_grad_(False)
    net[3][2][0].weight = net[3][0].weight
    truth = autograd(net, inputs, targets)
    relaxed = LeastAction(net)
    for module in (relaxed, copy.deepcopy(relaxed), pickle.loads(pickle.dumps(relaxed))):
        cost_of(targets)(module(inputs)).backward()
        found = {n: p.grad for n, p in module.network.named_parameters() if p.grad is not None}
        assert relative_error(found, truth) < 1e-12


def test_a_layer_that_appears_twice_gets_both_gradients() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(5, 5)
    net, inputs = nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(5, 3)).double(), batch()[0]
    assert LeastAction(net).depth == 3
    targets = batch()[1]
    _, found = least_action_gradients(net, inputs, cost_of(targets))
    assert relative_error(found, autograd(net, inputs, targets)) < 1e-12


def test_hooks_see_the_forward_pass_and_nothing_of_the_relaxation() -> None:
    net, (inputs, targets) = mlp(), batch()
    seen = []
    net[1].register_forward_hook(lambda module, args, output: seen.append(output))
    with least_action(net):
        cost_of(targets)(net(inputs)).backward()
    assert len(seen) == 1


def test_energy_is_stationary_at_rest() -> None:
    net, (inputs, targets) = mlp(), batch()
    cost = cost_of(targets)
    relaxed = LeastAction(net, beta=2.0)
    *_, rest = relaxed.relax(inputs, lambda x: torch.func.grad(cost)(x))
    variables = [x.clone().requires_grad_() for x in (*rest.states, *rest.tensions)]
    phase = Phase(tuple(variables[:3]), tuple(variables[3:]))
    slopes = torch.autograd.grad(relaxed.energy(phase, inputs, cost(phase.states[-1])), variables)
    assert max(float(slope.abs().max()) for slope in slopes) < 1e-14


def test_single_precision_and_inplace_nonlinearities() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6), nn.ReLU(inplace=True), nn.Linear(6, 3))
    inputs, targets = batch(dtype=torch.float32)
    _, found = least_action_gradients(net, inputs, cost_of(targets))
    assert relative_error(found, autograd(net, inputs, targets)) < 1e-6


def test_no_gradient_and_no_graph_when_none_is_wanted() -> None:
    net = mlp()
    with least_action(net), torch.no_grad():
        assert not net(batch()[0]).requires_grad


def test_a_loss_from_outside_the_block_is_pointed_out() -> None:
    net, (inputs, targets) = mlp(), batch()
    loss = cost_of(targets)(net(inputs))
    with (
        pytest.warns(UserWarning, match="no forward pass inside the block.*compute the loss inside"),
        least_action(net),
    ):
        loss.backward()


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), "layer '1' of type BatchNorm1d has no place"),
        (nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Dropout())), r"layer '0\.1' of type Dropout"),
        (nn.Sequential(nn.Linear(2, 2), nn.Softmax(-1)), "type Softmax .*expected Linear, Conv2d, ReLU"),
        (nn.MultiheadAttention(2, 1), r"layer '\(root\)' of type MultiheadAttention"),
        (clagrange.gaussianize(nn.Sequential(nn.Linear(2, 2))), "GaussianLinear.*clagrange.collapse first"),
        (nn.Sequential(nn.Tanh()), "at least one Linear or Conv2d layer, got none"),
        (nn.Sequential(nn.ReLU(inplace=True), nn.Linear(2, 2)), "layer '0' would overwrite the inputs"),
    ],
)
def test_other_networks_are_refused_with_the_layer_s_name(net: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LeastAction(net)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 0.0}, "beta: expected"),
        ({"step_size": 1.5}, r"step_size: expected a number in \(0, 1\], got 1.5"),
        ({"step_size": 0.0}, "step_size: expected"),
        ({"steps": 0}, "steps: expected a whole number of at least 1, got 0"),
        ({"steps": 2.0}, "steps: expected a whole number"),
        ({"time": -1.0}, "time: expected"),
        ({"steps": 3, "time": 3.0}, "time: expected None beside steps"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LeastAction(nn.Linear(2, 2), **settings)
