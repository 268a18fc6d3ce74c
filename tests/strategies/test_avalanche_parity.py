"""Through Avalanche the weights become what a plain loop makes of them."""

import copy
from collections.abc import Callable

import pytest
import torch
from avalanche_runs import evaluator, naive
from parity import DoubleDigits, plain_loop
from torch import nn
from torch.optim import Optimizer

import clagrange as cl
from clagrange.interventions import ContinualBackprop, InputNormalization, Intervention, ShrinkAndPerturb
from clagrange.interventions import VarianceInjection as Injection
from clagrange.strategies import InterventionPlugin

TASKS = 2
STREAM = DoubleDigits(tasks=TASKS, examples=200, batch_size=8, seed=5)  # 2 × 25 steps


def network(gaussian: bool) -> nn.Module:
    net = cl.networks.mlp(64, [24], 10, seed=2).double()
    return cl.gaussianize(net) if gaussian else net


def euler_lagrange(net: nn.Module) -> Optimizer:
    return cl.optim.EulerLagrange(net, lr=0.02, temperature=2e-3)


def sgd(net: nn.Module) -> Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)


def adam(net: nn.Module) -> Optimizer:
    return torch.optim.Adam(net.parameters(), lr=1e-3)


def backprop() -> list[Intervention]:
    return [ContinualBackprop(replacement_rate=0.02, maturity=3, seed=7)]


CASES: dict[str, tuple[Callable[[nn.Module], Optimizer], bool, Callable[[], list[Intervention]]]] = {
    "Euler-Lagrange with injection": (euler_lagrange, True, lambda: [Injection(strength=0.5, widen=0.2, seed=7)]),
    "SGD with continual backprop": (sgd, False, backprop),
    "Adam with continual backprop": (adam, False, backprop),
    "Euler-Lagrange with continual backprop": (euler_lagrange, True, backprop),
    "SGD with two interventions": (
        sgd,
        False,
        lambda: [InputNormalization(), ShrinkAndPerturb(shrink=1e-3, noise=1e-3, seed=7)],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_avalanche_equals_the_plain_loop(case: str) -> None:
    make_optimizer, gaussian, make_interventions = CASES[case]
    plain, through = network(gaussian), network(gaussian)
    interventions = make_interventions()
    plain_loop(plain, make_optimizer(plain), interventions, STREAM, TASKS)

    strategy = naive(
        through,
        optimizer=make_optimizer(through),
        plugins=[InterventionPlugin(*make_interventions())],
        train_mb_size=STREAM.batch_size,
        eval_every=1,  # evaluation in between changes nothing
    )
    scenario = STREAM.as_benchmark()
    for experience in scenario.train_stream:
        strategy.train(experience, eval_streams=[scenario.test_stream], shuffle=False)

    assert STREAM.steps * TASKS == 50
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(through.state_dict()[name], value, rtol=1e-8, atol=0.0, msg=name)

    # the comparison would notice an intervention that did nothing
    without = network(gaussian)
    plain_loop(without, make_optimizer(without), [], STREAM, TASKS)
    assert not torch.allclose(
        nn.utils.parameters_to_vector(without.parameters()), nn.utils.parameters_to_vector(plain.parameters())
    )


def test_the_strategies_equal_the_plain_loop() -> None:
    plain = network(gaussian=False)
    by_strategy = copy.deepcopy(plain)
    cl.gaussianize(plain, prior_variance=0.5)
    plain_loop(plain, euler_lagrange(plain), [Injection(strength=0.4, widen=0.1, seed=3)], STREAM, TASKS)
    cl.strategies.EulerLagrange(
        model=by_strategy,
        lr=0.02,
        temperature=2e-3,
        prior_variance=0.5,
        strength=0.4,
        widen=0.1,
        seed=3,
        train_mb_size=STREAM.batch_size,
        evaluator=evaluator(),
    ).train(STREAM.as_benchmark().train_stream, shuffle=False)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(by_strategy.state_dict()[name], value, rtol=1e-8, atol=0.0, msg=name)

    plain, by_strategy = network(gaussian=False), network(gaussian=False)
    plain_loop(plain, sgd(plain), backprop(), STREAM, TASKS)
    cl.strategies.ContinualBackprop(
        model=by_strategy,
        optimizer=sgd(by_strategy),
        replacement_rate=0.02,
        maturity=3,
        seed=7,
        train_mb_size=STREAM.batch_size,
        evaluator=evaluator(),
    ).train(STREAM.as_benchmark().train_stream, shuffle=False)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(by_strategy.state_dict()[name], value, rtol=1e-8, atol=0.0, msg=name)
