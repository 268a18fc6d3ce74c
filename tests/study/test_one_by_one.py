"""Optimizers that take one network each, on stacked ones: torch's own, and SOAP of another package."""

import copy
import io
import pickle

import pytest
import torch
from cases import assert_same_tensors, backward, batch, mlp, skip_without, tensors_of
from torch import nn

from clagrange import replicas
from clagrange.study.methods import METHODS
from clagrange.study.one_by_one import OneByOne

RATES = (0.05, 0.2)
DECAYS = (0.9, 0.99)
second_order = skip_without("second-order")


def pair():
    return replicas.stack([mlp(seed=0), mlp(seed=1)])


def adam(net, **changes):
    numbers = {"lr": torch.tensor(RATES), "betas": (0.8, torch.tensor(DECAYS)), **changes}
    return OneByOne(net.parameters(), torch.optim.Adam, replicas=2, **numbers)


def train_pair(net, optimizer, steps):
    for step in steps:
        data = zip(batch(step), batch(step + 50), strict=True)
        backward(net, optimizer, *(torch.stack(parts) for parts in data))
        optimizer.step()


def alone(replica, steps, optimizer):
    net = mlp(seed=replica)
    optimizer = optimizer(net)
    for step in steps:
        backward(net, optimizer, *batch(step + 50 * replica))
        optimizer.step()
    return net


def test_every_replica_takes_the_steps_of_a_network_alone_with_its_numbers():
    net = pair()
    train_pair(net, adam(net), range(6))
    for r, (lr, decay) in enumerate(zip(RATES, DECAYS, strict=True)):
        one = alone(r, range(6), lambda net: torch.optim.Adam(net.parameters(), lr=lr, betas=(0.8, decay)))  # noqa: B023
        assert_same_tensors(tensors_of(replicas.unstack(net)[r]), tensors_of(one), rtol=1e-6, atol=1e-7)


def loaded(net, optimizer):
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other = pair()
    other_optimizer = adam(other, lr=1.0)
    other.load_state_dict(state["net"])
    other_optimizer.load_state_dict(state["optimizer"])
    return other, other_optimizer


def copied(net, optimizer):
    return copy.deepcopy((net, optimizer))


def pickled(net, optimizer):
    return pickle.loads(pickle.dumps((net, optimizer)))


@pytest.mark.parametrize("kept", [loaded, copied, pickled])
def test_it_goes_on_exactly(kept):
    whole = pair()
    train_pair(whole, adam(whole), range(6))
    net = pair()
    optimizer = adam(net)
    train_pair(net, optimizer, range(3))
    net, optimizer = kept(net, optimizer)
    train_pair(net, optimizer, range(3, 6))
    assert_same_tensors(tensors_of(net), tensors_of(whole))


def test_it_trains_a_network_that_has_moved_in_memory():
    net = pair()
    optimizer = adam(net)
    for parameter in net.parameters():
        parameter.data = parameter.detach().clone()
    whole = pair()
    train_pair(net, optimizer, range(2))
    train_pair(whole, adam(whole), range(2))
    assert_same_tensors(tensors_of(net), tensors_of(whole))


def test_it_heeds_a_changed_learning_rate_and_frozen_parameters():
    net = pair()
    first, *_, last = net.parameters()
    first.requires_grad_(False)
    optimizer = adam(net)
    train_pair(net, optimizer, range(2))
    optimizer.param_groups[0]["lr"] = torch.tensor([0.0, 0.1])
    before = tensors_of(net)
    train_pair(net, optimizer, range(2, 3))
    after = tensors_of(net)
    assert_same_tensors({"0": first}, {"0": next(iter(before.values()))})
    assert all(torch.equal(after[name][0], before[name][0]) for name in before)
    assert not torch.equal(last[1], list(before.values())[-1][1])


@pytest.mark.parametrize(
    ("numbers", "error", "message"),
    [
        ({"lr": torch.ones(3)}, ValueError, "lr: expected .* 2 replicas, got 3"),
        ({"lr": "fast"}, TypeError, "lr: expected a number"),
        ({"betas": (0.9, torch.ones(3))}, ValueError, "betas: expected .* 2 replicas"),
    ],
)
def test_bad_numbers_are_named(numbers, error, message):
    with pytest.raises(error, match=message):
        adam(pair(), **numbers)


# ------------------------------------------------------------------------------------------------- SOAP
def gradients(net, step):
    backward(net, torch.optim.SGD(net.parameters()), *batch(step))
    return [parameter.grad.clone() for parameter in net.parameters()]


@second_order
def test_soap_without_a_turn_is_adam_from_the_second_step_on():
    net = mlp()
    soap = METHODS["soap"](lr=0.01, beta1=0.8, beta2=0.9, weight_decay=0.1, largest=1)
    optimizer = soap.optimizer(net)
    adam = mlp()
    other = torch.optim.AdamW(adam.parameters(), lr=0.01, betas=(0.8, 0.9), weight_decay=0.1, eps=1e-12)
    start = tensors_of(net)
    backward(net, optimizer, *batch(0))
    optimizer.step()
    assert_same_tensors(tensors_of(net), start)
    for step in range(1, 5):
        for model, its in ((net, optimizer), (adam, other)):
            backward(model, its, *batch(step))
            its.step()
    assert_same_tensors(tensors_of(net), tensors_of(adam), rtol=2e-3, atol=1e-4)


@second_order
def test_soap_does_not_see_a_turn_of_the_inputs():
    """Adam's steps depend on the axes in which inputs come; those of SOAP do not."""
    generator = torch.Generator().manual_seed(3)
    turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64, generator=generator))[0]
    inputs, targets = torch.randn(2, 8, 16, 4, dtype=torch.float64, generator=generator)

    def outputs(name, matrix, **settings):
        net = nn.Linear(4, 4, bias=False).double()  # square: no null space with axes of chance
        with torch.no_grad():
            net.weight.copy_(torch.arange(16.0, dtype=torch.float64).reshape(4, 4) / 16 @ matrix)
        optimizer = METHODS[name](lr=0.02, **settings).optimizer(net)
        for x, y in zip(inputs, targets, strict=True):
            optimizer.zero_grad()
            nn.functional.mse_loss(net(x @ matrix), y).backward()
            optimizer.step()
        return net(inputs[0] @ matrix).detach()

    still = torch.eye(4, dtype=torch.float64)
    turned_by = {
        name: float((outputs(name, turn, **settings) - outputs(name, still, **settings)).norm())
        for name, settings in (("soap", {"every": 2}), ("adam", {}))
    }
    assert turned_by["soap"] < 1e-3 * turned_by["adam"]


@second_order
def test_a_replica_that_diverges_does_not_stop_the_others():
    def trained(*, spoilt):
        net = pair()
        optimizer = METHODS["soap"](every=1).optimizer(net)
        train_pair(net, optimizer, range(1))
        if spoilt:
            with torch.no_grad():
                net[0].weight[0] = torch.inf
        train_pair(net, optimizer, range(1, 4))
        return net

    spoilt = trained(spoilt=True)
    assert not spoilt[0].weight[0].isfinite().any()
    first, second = (replicas.unstack(net)[1] for net in (spoilt, trained(spoilt=False)))
    assert_same_tensors(tensors_of(first), tensors_of(second))
