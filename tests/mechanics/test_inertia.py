"""The meter: exact laws, damping, noise, every optimizer, the jump at a switch, books that survive."""

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import OPTIMIZERS, assert_same_tensors, backward, batch, mlp
from torch import Tensor

import clagrange
from clagrange.mechanics import InertiaMeter, adam_metric
from clagrange.mechanics.energy import kinetic_energy, standardized

CURVATURE = torch.tensor([[2.0, 0.5, 0.0], [0.5, 1.0, 0.3], [0.0, 0.3, 3.0]], dtype=torch.float64)
MINIMUM = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64)


def quadratic(theta: Tensor) -> Tensor:
    return 0.5 * (theta - MINIMUM) @ CURVATURE @ (theta - MINIMUM)


def run(
    make: Callable[[list[Tensor]], torch.optim.Optimizer],
    steps: int = 60,
    loss_of: Callable[[Tensor], Tensor] = quadratic,
    between: Callable[[int, torch.optim.Optimizer], None] = lambda step, optimizer: None,
    **settings: Any,
) -> tuple[list[Any], list[Tensor]]:
    """Readings and positions of full-gradient descent."""
    theta = torch.tensor([2.0, 1.0, -1.0], dtype=torch.float64, requires_grad=True)
    optimizer = make([theta])
    meter = InertiaMeter(optimizer, **settings)
    readings, path = [], [theta.detach().clone()]
    for step in range(steps):
        between(step, optimizer)
        optimizer.zero_grad()
        loss = loss_of(theta)
        loss.backward()
        meter.observe(loss)
        optimizer.step()
        readings.append(meter.reading)
        path.append(theta.detach().clone())
    return readings, path


def sgd(**settings: Any) -> Callable[[list[Tensor]], torch.optim.Optimizer]:
    return lambda params: torch.optim.SGD(params, **{"lr": 0.05, **settings})


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 1.0])
def test_the_discrete_law_of_momentum_descent(momentum: float) -> None:
    readings, path = run(sgd(momentum=momentum), steps=200)
    assert readings[0].change is readings[0].defect is None
    for k in range(1, 200):
        new, old = path[k + 1] - path[k], path[k] - path[k - 1]
        energy = float(new @ new) / 0.1 + 0.5 * float((path[k + 1] - MINIMUM) @ CURVATURE @ (path[k] - MINIMUM))
        assert readings[k].energy == pytest.approx(energy, abs=1e-12)
        law = -(1.0 - momentum) / 0.1 * float(old @ (new + old))
        assert readings[k].predicted == pytest.approx(law, abs=1e-12)
        assert abs(readings[k].defect) < 1e-12
    if momentum == 1.0:
        energies = [reading.energy for reading in readings]
        assert max(energies) - min(energies) < 1e-12 * max(energies) * 200
        assert max(abs(reading.change) for reading in readings[1:]) < 1e-12


@pytest.mark.parametrize(("form", "counts"), [(torch.optim.AdamW, False), (torch.optim.Adam, True)])
def test_weight_decay_is_a_potential_where_it_is_part_of_the_gradient(form: Any, counts: bool) -> None:
    readings, path = run(lambda params: form(params, lr=0.05, weight_decay=0.1), steps=3)
    strength = 0.1 if counts else 0.0
    theta, displacement = path[2], path[3] - path[2]
    slope = CURVATURE @ (theta - MINIMUM) + strength * theta
    expected = quadratic(theta) + 0.5 * strength * theta @ theta + 0.5 * slope @ displacement
    assert readings[2].potential == pytest.approx(float(expected), abs=1e-12)
    assert readings[2].loss == pytest.approx(float(quadratic(theta)), abs=1e-12)


def halved(step: int, optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups[0]["lr"] = 0.05 * (0.5 if step > 10 else 1.0) * (step != 20)


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (sgd(momentum=0.9, weight_decay=0.1), {}),
        (sgd(momentum=0.9, dampening=0.3), {}),
        (sgd(momentum=0.9, maximize=True, lr=0.001), {}),
        (sgd(momentum=0.9), {"mass": 3.0, "law": "work"}),
        (sgd(momentum=0.9, nesterov=True), {}),
        (sgd(momentum=0.9, nesterov=True, foreach=True), {}),  # changes the gradients in place
        (lambda params: torch.optim.Adam(params, lr=0.05), {}),
        (lambda params: torch.optim.AdamW(params, lr=0.05), {}),
        (lambda params: torch.optim.RMSprop(params, lr=0.01, momentum=0.5), {"law": "work"}),
        (lambda params: torch.optim.Adagrad(params, lr=0.05), {}),
        (lambda params: torch.optim.Adam(params, lr=0.05, weight_decay=0.1), {}),
    ],
)
def test_no_defect_on_a_quadratic(make: Any, settings: Any) -> None:
    readings, _ = run(make, **settings)
    assert max(abs(reading.defect) for reading in readings[1:]) < 1e-12
    assert max(abs(reading.change) for reading in readings[1:]) > 1e-6


def test_the_law_holds_through_a_schedule_and_a_pause() -> None:
    readings, _ = run(sgd(momentum=0.9), between=halved)
    defects = [abs(reading.defect) for reading in readings[1:]]
    assert max(defects[:19]) < 1e-12
    assert readings[20].kinetic == 0.0
    assert max(defects[21:]) < 1e-12  # after one step the velocity is known again
    assert defects[20] > 1e-6


def test_preconditioned_descent_in_its_metric() -> None:
    """θ ← θ − ε M⁻¹g as SGD with one learning rate for each group: the mass is what the groups divide by."""
    theta = [torch.tensor([value], dtype=torch.float64, requires_grad=True) for value in (2.0, 1.0, -1.0)]
    rates = (0.05, 0.02, 0.1)
    optimizer = torch.optim.SGD(
        [{"params": [part], "lr": lr} for part, lr in zip(theta, rates, strict=True)], lr=1.0, momentum=0.8
    )
    common = torch.tensor([value.item() for value in theta], dtype=torch.float64, requires_grad=True)
    mass = 0.05 / torch.tensor(rates, dtype=torch.float64)

    class Preconditioned(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            common.grad /= mass
            super().step()
            common.grad *= mass

    single = Preconditioned([common], lr=0.05, momentum=0.8)
    grouped = InertiaMeter(optimizer)
    weighed = InertiaMeter(single, mass={common: mass})
    metric = InertiaMeter(single, mass=lambda parameter, vector: mass * vector, law="momentum")
    for _ in range(40):
        for params, made, meters in ((theta, optimizer, [grouped]), ([common], single, [weighed, metric])):
            made.zero_grad()
            loss = quadratic(torch.cat(params))
            loss.backward()
            for meter in meters:
                meter.observe(loss)
            made.step()
        for meter in (weighed, metric):
            for name, value in grouped.reading.as_dict().items():
                if name != "surprise":
                    assert meter.reading.as_dict()[name] == pytest.approx(value, abs=1e-12)
    assert abs(grouped.reading.defect) < 1e-12


def test_adam_is_momentum_descent_in_its_own_metric() -> None:
    """With β₂ near 1 the metric hardly moves; then the momentum law holds, and without the metric it does not."""
    ratios = []
    for metric in (True, False):
        theta = torch.tensor([2.0, 1.0, -1.0], dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([theta], lr=1e-3, betas=(0.9, 0.99999))
        meter = InertiaMeter(optimizer, mass=adam_metric(optimizer) if metric else 1.0, law="momentum")
        found = []
        for _ in range(300):
            optimizer.zero_grad()
            loss = quadratic(theta)
            loss.backward()
            meter.observe(loss)
            optimizer.step()
            found.append(meter.reading)
        tail = found[200:]
        ratios.append(sum(abs(r.defect) for r in tail) / sum(abs(r.change) for r in tail))
    assert ratios[0] < 0.05
    assert ratios[1] > 0.5


def test_damping_of_the_continuous_motion() -> None:
    """For small steps the discrete law is −2βK dt, and the work defect of a loss that is not quadratic fades."""

    def quartic(theta: Tensor) -> Tensor:
        return quadratic(theta) + 0.1 * theta.pow(4).sum()

    sizes = []
    for lr in (1e-3, 1e-3 / 4):
        momentum = 1.0 - math.sqrt(lr)  # β = 1
        readings, _ = run(sgd(lr=lr, momentum=momentum), steps=round(4.0 / math.sqrt(lr)), loss_of=quartic)
        change = sum(reading.change for reading in readings[1:])
        damped = sum(reading.damping for reading in readings[1:])
        assert change < -1.0
        sizes.append((abs(change - damped), sum(abs(reading.defect) for reading in readings[1:])))
    assert sizes[0][0] < 0.05
    assert sizes[1][0] < 0.6 * sizes[0][0]
    assert sizes[1][1] < 0.3 * sizes[0][1]


def test_gradient_noise_is_predicted_on_average() -> None:
    """Heavy ball with noisy gradients: the energy gains ½ε tr C a step and settles where friction takes it."""
    particles, lr, momentum, deviation = 3000, 1e-3, 0.98, 0.5
    stream = torch.Generator().manual_seed(3)
    theta = torch.zeros(particles, 3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([theta], lr=lr, momentum=momentum)
    trace = 3 * particles * deviation**2
    meters = [InertiaMeter(optimizer, noise=noise) for noise in (False, trace, True)]
    changes, defects, noises = [], [[], [], []], []
    for step in range(400):
        optimizer.zero_grad()
        loss = 0.5 * (theta * (theta @ CURVATURE)).sum()
        loss.backward()
        theta.grad += deviation * torch.randn(theta.shape, generator=stream, dtype=theta.dtype)
        for meter in meters:
            meter.observe(loss)
        optimizer.step()
        if step:
            for kept, meter in zip(defects, meters, strict=True):
                kept.append(meter.reading.defect)
            changes.append(meters[0].reading.change)
            noises.append(meters[2].reading.noise)
    gain = 0.5 * lr * trace
    assert meters[1].reading.noise == pytest.approx(gain)
    assert noises[-1] == pytest.approx(gain, rel=0.02)
    mean = [sum(kept) / len(kept) for kept in defects]
    error = torch.tensor(defects[0]).std().item() / math.sqrt(len(changes))
    assert abs(mean[0] - gain) < 3.0 * error
    assert abs(mean[0]) > 10.0 * error
    assert abs(mean[1]) < 3.0 * error
    assert abs(mean[2]) < 3.0 * error + 0.02 * gain


@pytest.mark.parametrize("case", OPTIMIZERS, ids=lambda case: case.name)
def test_any_optimizer_trains_on_unchanged(case: Any) -> None:
    ends = []
    for watched in (False, True):
        net = case.network()
        optimizer = case.make(net)
        meter = InertiaMeter(optimizer) if watched else None
        torch.manual_seed(0)
        for step in range(6):
            loss = backward(net, optimizer, *batch(step))
            if meter is not None:
                meter.observe(loss)
            optimizer.step()
        ends.append(net.state_dict())
    assert meter is not None
    assert meter.reading is not None
    assert all(math.isfinite(value) for value in meter.reading.as_dict().values())
    assert meter.reading.kinetic > 0.0
    assert_same_tensors(*ends)


@pytest.mark.parametrize("law", ["momentum", "work"])
def test_a_switch_of_the_data_is_a_jump_of_the_defect(law: str) -> None:
    net = mlp()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    meter = InertiaMeter(optimizer, law=law, noise=True)
    surprises = []
    for step in range(400):
        inputs, _ = batch(step, 64)
        targets = (inputs[:, :3] if step < 250 else -inputs[:, :3]).argmax(1)
        loss = backward(net, optimizer, inputs, targets)
        meter.observe(loss)
        optimizer.step()
        surprises.append(meter.reading.surprise or 0.0)
    usual = max(abs(score) for score in surprises[100:250])
    assert surprises[250] > 2.0 * usual
    assert surprises[250] > 8.0


def test_a_closure_gives_the_loss() -> None:
    readings = []
    for style in ("observe", "positional", "keyword"):
        theta = torch.tensor([2.0, 1.0, -1.0], dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.SGD([theta], lr=0.05, momentum=0.9)
        meter = InertiaMeter(optimizer)

        def closure(theta: Tensor = theta, optimizer: torch.optim.Optimizer = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = quadratic(theta)
            loss.backward()
            return loss

        for _ in range(5):
            if style == "observe":
                loss = closure()
                meter.observe(0.25 * loss)
                meter.observe(0.75 * loss)  # parts add up
                optimizer.step()
            elif style == "positional":
                optimizer.step(closure)
            else:
                optimizer.step(closure=closure)
        readings.append(meter.reading)
    assert readings[0] == readings[1] == readings[2]


def test_state_survives() -> None:
    """A run that is stopped, saved, loaded and gone on with reads what an unbroken one reads."""

    def train(net: Any, optimizer: Any, meter: InertiaMeter, steps: range) -> list[Any]:
        readings = []
        for step in steps:
            meter.observe(backward(net, optimizer, *batch(step)))
            optimizer.step()
            readings.append(meter.reading)
        return readings

    def fresh() -> tuple[Any, Any]:
        net = mlp()
        return net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)

    net, optimizer = fresh()
    meter = InertiaMeter(optimizer, noise=True)
    expected = train(net, optimizer, meter, range(12))

    net, optimizer = fresh()
    meter = InertiaMeter(optimizer, noise=True)
    train(net, optimizer, meter, range(5))
    file = io.BytesIO()
    torch.save([net.state_dict(), optimizer.state_dict(), meter.state_dict()], file)
    copied = copy.deepcopy(meter)
    for other in (InertiaMeter(noise=True), copied):
        file.seek(0)
        states = torch.load(file, weights_only=True)
        net, optimizer = fresh()
        net.load_state_dict(states[0])
        optimizer.load_state_dict(states[1])
        if other is not copied:
            other.load_state_dict(states[2])
        other.attach(optimizer)
        assert train(net, optimizer, other, range(5, 12)) == expected[5:]
    assert other.collect()["change"] == pytest.approx(sum(reading.change for reading in expected[1:]))
    assert "change" not in other.collect()


def test_a_new_optimizer_and_a_grown_head_begin_a_new_run() -> None:
    net = mlp()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    meter = InertiaMeter(optimizer)
    for step in range(3):
        meter.observe(backward(net, optimizer, *batch(step)))
        optimizer.step()
    optimizer.add_param_group({"params": [torch.ones(2, requires_grad=True)]})
    meter.observe(backward(net, optimizer, *batch(3)))
    optimizer.step()
    assert meter.reading.change is None
    meter.observe(backward(net, optimizer, *batch(4)))
    optimizer.step()
    assert meter.reading.change is not None
    other = torch.optim.SGD(net.parameters(), lr=0.1)
    meter.attach(other)
    optimizer.step()  # no longer followed
    meter.observe(backward(net, other, *batch(5)))
    other.step()
    assert meter.reading.change is None
    assert meter.steps == 6
    meter.detach()
    other.step()
    assert meter.steps == 6


def test_kinetic_energy_of_several_parameters() -> None:
    parts = [torch.tensor([0.3]), torch.tensor([[0.4]])]
    assert kinetic_energy(parts, 0.5, mass=2.0) == pytest.approx(0.5)


def test_the_score_follows_mean_and_variance() -> None:
    values = torch.randn(500, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2.0 + 5.0
    mean = variance = 0.0
    for count, value in enumerate(values.tolist()):
        _, mean, variance = standardized(value, mean, variance, count, decay=1.0, clip=math.inf)
    assert mean == pytest.approx(float(values.mean()))
    assert variance == pytest.approx(float(values.var(correction=0)))
    score, after, _ = standardized(mean + 1000.0, mean, variance, 500, decay=0.98)
    assert score == pytest.approx(1000.0 / math.sqrt(variance))
    assert after == pytest.approx(mean + 0.02 * 5.0 * math.sqrt(variance))  # clipped


def test_replicas_are_one_system_and_their_settings_must_agree() -> None:
    """R stacked networks read the sum of R meters; different learning rates are refused with the reason."""
    nets = [mlp(seed) for seed in (1, 2)]
    readings = []
    for net in nets:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        meter = InertiaMeter(optimizer)
        for step in range(4):
            meter.observe(backward(net, optimizer, *batch(step)))
            optimizer.step()
        readings.append(meter.reading)
    stacked = clagrange.replicas.stack([mlp(seed) for seed in (1, 2)])
    optimizer = clagrange.optim.StackedSGD(stacked.parameters(), lr=0.1, momentum=0.9)
    meter = InertiaMeter(optimizer)
    for step in range(4):
        inputs, targets = batch(step)
        both = inputs.expand(2, *inputs.shape), targets.expand(2, *targets.shape)
        meter.observe(backward(stacked, optimizer, *both))
        optimizer.step()
    for name in ("kinetic", "potential", "energy", "change", "predicted", "damping", "defect"):
        total = sum(getattr(reading, name) for reading in readings)
        assert getattr(meter.reading, name) == pytest.approx(total, abs=1e-12)

    optimizer = clagrange.optim.StackedSGD(stacked.parameters(), lr=torch.tensor([0.1, 0.2]))
    meter = InertiaMeter(optimizer)
    meter.observe(backward(stacked, optimizer, *both))
    with pytest.raises(ValueError, match=r"lr: expected one number for a parameter group, got shape \(2,\)"):
        optimizer.step()


def test_bad_arguments() -> None:
    theta = torch.ones(2, requires_grad=True)
    optimizer = torch.optim.SGD([theta], lr=0.1)
    with pytest.raises(
        ValueError, match="law: expected one of auto, momentum, work; got 'momentun'; did you mean"
    ):
        InertiaMeter(law="momentun")
    with pytest.raises(ValueError, match="mass: expected a number in"):
        InertiaMeter(mass=-1.0)
    with pytest.raises(ValueError, match="noise: expected False or the number"):
        InertiaMeter(mass=lambda parameter, vector: vector, noise=True)
    with pytest.raises(ValueError, match="optimizer: expected one of Adam's kind"):
        adam_metric(optimizer)
    InertiaMeter(optimizer)
    theta.grad = torch.ones(2)
    with pytest.raises(ValueError, match=r"loss: expected the loss of this step, got none; call meter.observe"):
        optimizer.step()
