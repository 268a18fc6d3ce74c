"""Detectors of switches: what they notice, when, and in which replica."""

import copy
import math
import pickle

import pytest
import torch
from cases import R, assert_same_tensors, backward, batch, mlp
from torch import nn

from clagrange import gaussianize, replicas
from clagrange.gaussian import Kronecker, gaussian_blocks
from clagrange.interventions import (
    CUSUM,
    Consolidation,
    ContinualBackprop,
    Detector,
    EnergyJump,
    FullReset,
    Intervention,
    KnownBoundary,
    PageHinkley,
    PredictiveSurprise,
    ShrinkAndPerturb,
    VarianceInjection,
)
from clagrange.interventions.only_replicas import only_replicas
from clagrange.mechanics import InertiaMeter
from clagrange.networks import cross_entropy
from clagrange.networks import mlp as package_mlp
from clagrange.optim import EulerLagrange


class Noting(Intervention):
    """Remembers at which steps it would act."""

    def __init__(self, detector: Detector | None = None) -> None:
        super().__init__(detector=detector)
        self.steps, self.noticed = 0, []

    def on_step(self, network, optimizer) -> None:
        self.steps += 1

    def on_switch(self, network, optimizer) -> None:
        self.noticed.append(self.steps)


def fed(detector: Detector, losses: list[float]) -> list[int]:
    """The steps after which a detector of the loss alarms."""
    net = nn.Linear(2, 1)
    optimizer, method = torch.optim.SGD(net.parameters(), lr=0.0), Noting(detector)
    method.on_start(net, optimizer)
    for loss in losses:
        method.loss_known(net, torch.tensor(loss))
        method.gradient_known(net, optimizer)
        method.step_taken(net, optimizer)
    return method.noticed


def by_hand(losses: list[float], threshold: float, drift: float, warm_up: int, decay: float, clip: float) -> list:
    """The test of the module, number by number."""
    alarms, seen, total, mean, square = [], 0, 0.0, 0.0, 0.0
    for step, loss in enumerate(losses, 1):
        z = (loss - mean) / max(math.sqrt(square), 1e-12) if seen >= warm_up else 0.0
        total = max(0.0, total + min(z, clip) - drift)
        weight = max(1 / (seen + 1), 1 - decay)
        shift = loss - mean
        mean, square, seen = mean + weight * shift, (1 - weight) * (square + weight * shift**2), seen + 1
        if total > threshold:
            alarms.append(step)
            seen, total, mean, square = 0, 0.0, 0.0, 0.0
    return alarms


def noisy(level: list[float], seed: int = 0) -> list[float]:
    noise = torch.randn(len(level), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (torch.tensor(level, dtype=torch.float64) + 0.1 * noise).tolist()


JUMPS = noisy([1.0] * 200 + [1.5] * 100 + [1.5] * 100 + [2.5] * 100)


@pytest.mark.parametrize("kind", [CUSUM, PageHinkley])
@pytest.mark.parametrize("threshold", [2.0, 6.0, 15.0])
def test_the_sequential_test_by_hand(kind, threshold: float) -> None:
    expected = by_hand(JUMPS, threshold, 0.4, 20, 0.95 if kind is CUSUM else 1.0, 5.0)
    assert fed(kind(threshold=threshold, drift=0.4, warm_up=20), JUMPS) == expected
    assert expected


@pytest.mark.parametrize("kind", [CUSUM, PageHinkley])
def test_jumps_of_the_loss_are_noticed_at_once_and_nothing_else(kind) -> None:
    """Five standard deviations up at step 200, ten at 400; then down, which is no reason for an alarm."""
    alarms = fed(kind(), [*JUMPS, *noisy([0.5] * 100, seed=1)])
    assert len(alarms) == 2
    assert 200 < alarms[0] <= 206
    assert 400 < alarms[1] <= 406


@pytest.mark.parametrize("kind", [CUSUM, PageHinkley])
def test_false_alarms_are_rare(kind) -> None:
    alarms = [len(fed(kind(), noisy([1.0] * 1000, seed))) for seed in range(5)]
    assert sum(alarms) <= 5  # in 5,000 steps


def test_losses_that_are_not_finite_are_passed_over() -> None:
    losses = list(JUMPS)
    losses[100:103] = [math.nan, math.inf, math.nan]
    clean = [loss for loss in losses if math.isfinite(loss)]
    alarms, expected = fed(CUSUM(), losses), fed(CUSUM(), clean)
    assert alarms == [step + 3 for step in expected]


def test_losses_of_one_step_add_up() -> None:
    net, detector = nn.Linear(2, 1), CUSUM()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    detector.on_start(net, optimizer)
    for part in (0.25, 0.5):
        detector.on_loss(net, torch.tensor(part))
    detector.on_step(net, optimizer)
    assert float(detector.state["mean"]) == 0.75


def test_what_is_announced_is_heard_without_a_detector_or_with_the_known_boundary() -> None:
    net = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    for detector, heard in ((None, True), (KnownBoundary(), True), (CUSUM(), False)):
        method = Noting(detector)
        method.on_start(net, optimizer)
        method.switch_announced(net, optimizer)
        assert method.told_of_switches == bool(method.noticed) == heard


def test_a_detector_where_nothing_is_done_at_a_switch_is_refused() -> None:
    net = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    with pytest.raises(
        ValueError, match=r"detector: expected None for a ShrinkAndPerturb that does nothing at a"
    ):
        ShrinkAndPerturb(detector=CUSUM()).on_start(net, optimizer)
    with pytest.raises(
        TypeError, match=r"detector: expected a clagrange.interventions.Detector or None, got 'cusum'"
    ):
        FullReset(detector="cusum")


def test_what_is_missing_is_named() -> None:
    net = mlp()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    detector = CUSUM()
    detector.on_start(net, optimizer)
    with pytest.raises(ValueError, match=r"loss: expected the loss of this step, got none"):
        detector.on_step(net, optimizer)
    with pytest.raises(ValueError, match=r"loss: expected the mean loss of each of 1 networks, got shape \(2,\)"):
        detector.on_loss(net, torch.ones(2))
    with pytest.raises(ValueError, match=r"call clagrange.gaussianize\(module\) first"):
        PredictiveSurprise().on_start(net, optimizer)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": 0.0}, r"threshold: "),
        ({"drift": -1.0}, r"drift: "),
        ({"warm_up": 0}, r"warm_up: "),
        ({"clip": 0.0}, r"clip: "),
    ],
)
@pytest.mark.parametrize("kind", [CUSUM, PageHinkley, EnergyJump, PredictiveSurprise])
def test_bad_arguments_are_named(kind, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**settings)


# ------------------------------------------------------------------------------------------------- energy
def test_the_energy_jump_is_the_defect_of_the_meter() -> None:
    net = mlp()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.8)
    meter, detector = InertiaMeter(optimizer, law="work"), EnergyJump()
    detector.on_start(net, optimizer)
    for step in range(12):
        loss = backward(net, optimizer, *batch(step % 3))
        meter.observe(loss)
        detector.on_loss(net, loss)
        detector.on_gradient(net, optimizer)
        optimizer.step()
        detector.state["seen"] = detector._signal(net, optimizer)
        detector.state.pop("loss")
        if step:
            assert float(detector.state["seen"]) == pytest.approx(meter.reading.defect, abs=1e-10)


def test_energy_jumps_when_the_loss_becomes_another_and_not_before() -> None:
    """One batch learnt for 60 steps, then another: the defect is that of a smooth loss until then."""
    net = mlp()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    method = Noting(EnergyJump(warm_up=10))
    method.on_start(net, optimizer)
    for step in range(120):
        inputs, targets = batch(0)
        if step >= 60:
            targets = (targets + 1) % 3
        loss = backward(net, optimizer, inputs, targets)
        method.loss_known(net, loss)
        method.gradient_known(net, optimizer)
        optimizer.step()
        method.step_taken(net, optimizer)
    assert method.noticed[0] == 61 or 61 in method.noticed


# ----------------------------------------------------------------------------------------------- surprise
def test_a_network_that_is_right_about_itself_is_not_surprised() -> None:
    """Labels drawn from its own predictions: the score has mean 0 and standard deviation 1."""
    generator = torch.Generator().manual_seed(0)
    net = gaussianize(package_mlp(5, [8], 3, seed=1).double())
    for layer in (net[1], net[3]):
        for precision in (layer.weight_precision, layer.bias_precision):
            precision.precision.mul_(1e8)
    optimizer = EulerLagrange(net, lr=1e-9)
    detector = PredictiveSurprise(samples=2)
    detector.on_start(net, optimizer)
    scores = []
    for _ in range(400):
        inputs = torch.randn(16, 5, generator=generator, dtype=torch.float64)
        logits = net(inputs)
        targets = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator).flatten()
        detector.on_loss(net, cross_entropy(logits, targets))
        detector.on_gradient(net, optimizer)
        scores.append(float(detector._signal(net, optimizer)))
        detector.state.pop("loss")
    scores = torch.tensor(scores)
    assert abs(float(scores.mean())) < 0.15
    assert abs(float(scores.std()) - 1.0) < 0.1


def test_wrong_answers_of_which_the_weights_are_sure_surprise_more() -> None:
    """The same logits and loss: with uncertain weights a loss is expected."""
    scores = []
    for known in (1e8, 1.0):
        net = gaussianize(package_mlp(5, [8], 3, seed=1).double(), prior_variance=4.0)
        for layer in (net[1], net[3]):
            for precision in (layer.weight_precision, layer.bias_precision):
                precision.precision.mul_(known)
        optimizer = EulerLagrange(net, lr=1e-9)
        detector = PredictiveSurprise(samples=64)
        detector.on_start(net, optimizer)
        logits = net(3 * batch()[0])
        detector.on_loss(net, cross_entropy(logits, logits.detach().argmin(-1)))
        detector.on_gradient(net, optimizer)
        scores.append(float(detector._signal(net, optimizer)))
    assert scores[0] > 1.5 * scores[1] > 0.0


def test_classes_that_a_network_leaves_out_change_nothing() -> None:
    """Logits of −∞ beside others, as of a head that grows: their 0·log 0 is 0."""

    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = package_mlp(5, [8], 3, seed=1).double()

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return nn.functional.pad(self.net(inputs), (0, 2), value=-torch.inf)

    scores = []
    for make in (Padded, lambda: Padded().net):
        net = gaussianize(make())
        optimizer, detector = EulerLagrange(net, lr=1e-9), PredictiveSurprise()
        detector.on_start(net, optimizer)
        inputs, targets = batch()
        detector.on_loss(net, cross_entropy(net(inputs), targets))
        detector.on_gradient(net, optimizer)
        scores.append(detector._signal(net, optimizer))
    torch.testing.assert_close(*scores)
    assert bool(scores[0].isfinite().all())


# ----------------------------------------------------------------------------------------------- replicas
def test_only_the_replica_in_which_a_switch_is_noticed_is_changed() -> None:
    net = replicas.stack([gaussianize(mlp(seed)) for seed in range(R)])
    optimizer = EulerLagrange(net, lr=0.02, temperature=1e-3)
    method = VarianceInjection(strength=1.0, widen=1.0, detector=CUSUM(threshold=4.0, drift=0.5, warm_up=4))
    method.on_start(net, optimizer)
    streams = [generator.get_state() for generator in method.generators]
    for step in range(10):
        with torch.no_grad():
            before = copy.deepcopy(net.state_dict())
        losses = torch.ones(R) + 0.1 * (-1) ** step
        if step == 8:
            losses[1] += 5.0
        method.loss_known(net, losses)
        method.gradient_known(net, optimizer)
        method.step_taken(net, optimizer)
        after = net.state_dict()
        for r in range(R):
            same = all(torch.equal(after[name][r], before[name][r]) for name in after)
            assert same == ((step, r) != (8, 1))
    for r, (generator, state) in enumerate(zip(method.generators, streams, strict=True)):
        assert torch.equal(generator.get_state(), state) == (r != 1)


@pytest.mark.parametrize(
    ("structure", "size"),
    [
        ("diagonal", 8),
        (Kronecker(refresh_every=1, observe_every=1), 8),
        (Kronecker(), 4),
        (Kronecker(), 8),
        (Kronecker(), 64),
        (Kronecker(damping="exact", observe_every=3), 64),
    ],
)
def test_replicas_may_be_changed_at_different_times(structure: str | Kronecker, size: int) -> None:
    """Each is as it would be alone, whatever is done to the other."""
    wider = VarianceInjection(0.0, widen=0.3)
    deeds = {
        3: (wider, 1),
        5: (Consolidation(), 0),
        11: (Consolidation(), 1),
        13: (FullReset(seed=3), 0),
        18: (wider, 0),
    }

    def train(net, optimizer, replica: int | None) -> None:
        for step in range(24):
            batches = [batch(50 * r + step, size) for r in range(2)]
            data = (
                [torch.stack(part) for part in zip(*batches, strict=True)]
                if replica is None
                else batches[replica]
            )
            backward(net, optimizer, *data)
            optimizer.step()
            if step in deeds:
                method, who = deeds[step]
                method = copy.deepcopy(method)
                method.on_start(net, optimizer)
                if replica is None:
                    with only_replicas(torch.arange(2) == who, net, optimizer, method):
                        method.on_switch(net, optimizer)
                elif replica == who:
                    method.on_switch(net, optimizer)

    stacked = replicas.stack([gaussianize(mlp(seed), structure) for seed in range(2)])
    train(stacked, EulerLagrange(stacked, lr=0.02, temperature=1e-2), None)
    for r, mine in enumerate(replicas.unstack(stacked)):
        net = gaussianize(mlp(r), structure)
        train(net, EulerLagrange(net, lr=0.02, temperature=1e-2), r)
        inputs = batch(99)[0]
        torch.testing.assert_close(mine(inputs), net(inputs), rtol=1e-8, atol=1e-10)
        for (_, one), (_, other) in zip(gaussian_blocks(mine), gaussian_blocks(net), strict=True):
            variance = other.precision.variance()
            torch.testing.assert_close(one.precision.variance(), variance, rtol=1e-8, atol=1e-12)
            prior = other.precision.prior_mean.expand_as(variance)
            torch.testing.assert_close(one.precision.prior_mean.expand_as(variance), prior, rtol=1e-8, atol=1e-10)


# --------------------------------------------------------------------------------------------------- state
@pytest.mark.parametrize("kind", [CUSUM, PageHinkley, EnergyJump, PredictiveSurprise])
def test_state_survives(kind) -> None:
    def run(net, optimizer, method, steps) -> None:
        for step in steps:
            loss = backward(net, optimizer, *batch(step))
            method.loss_known(net, loss)
            method.gradient_known(net, optimizer)
            optimizer.step()
            method.step_taken(net, optimizer)

    net = gaussianize(mlp())
    optimizer = EulerLagrange(net, lr=0.02, temperature=1e-3)
    method = FullReset(seed=2, detector=kind(threshold=1.0, drift=0.0, warm_up=3))
    method.on_start(net, optimizer)
    run(net, optimizer, method, range(9))
    copied, other = copy.deepcopy(net), pickle.loads(pickle.dumps(method))
    other_optimizer = EulerLagrange(copied, lr=0.02, temperature=1e-3)
    other_optimizer.load_state_dict(optimizer.state_dict())
    copied._forward_hooks.clear()
    other.on_start(copied, other_optimizer)
    for one in ((net, optimizer, method), (copied, other_optimizer, other)):
        run(*one, range(9, 25))
    assert_same_tensors(dict(copied.state_dict()), dict(net.state_dict()))
    assert_same_tensors(other.state_dict(), method.state_dict())
    method.detach()
    assert not net._forward_hooks
    assert not ContinualBackprop().acts_at_switches
