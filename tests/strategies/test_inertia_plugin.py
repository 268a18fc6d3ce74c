"""The Avalanche plugin of the energy: its numbers against a plain loop, what loggers get, resuming."""

import io
from typing import Any

import pytest
import torch
from avalanche.evaluation.metric_results import MetricValue
from avalanche.logging import BaseLogger
from avalanche.training.plugins import EvaluationPlugin
from avalanche_runs import naive, small_benchmark, small_stream

import clagrange as cl
from clagrange.mechanics import InertiaMeter
from clagrange.strategies import InertiaPlugin

STEPS = small_stream().steps


class Notes(BaseLogger):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, dict[int, float]] = {}

    def log_metrics(self, metric_values: list[MetricValue]) -> None:
        for value in metric_values:
            self.values.setdefault(value.name, {})[value.x_plot] = value.value


def watched(every_n_steps: int = 4) -> tuple[Any, InertiaPlugin, Notes]:
    net = cl.networks.mlp(64, [16], 10).double()
    plugin, notes = InertiaPlugin(every_n_steps), Notes()
    strategy = naive(
        net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9),
        plugins=[plugin],
        evaluator=EvaluationPlugin(loggers=[notes]),
    )
    return strategy, plugin, notes


class AsDouble(torch.nn.Module):
    """Lets a network of doubles take the floats of the stream."""

    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.net(inputs.double())


def test_loggers_get_what_a_plain_loop_reads() -> None:
    strategy, plugin, notes = watched()
    strategy.model = AsDouble(strategy.model)
    gathered = InertiaMeter(strategy.optimizer)

    class Plain(cl.strategies.InterventionPlugin):
        def before_update(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
            gathered.observe(float(strategy.loss.detach()))

        def after_update(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
            readings.append(gathered.reading)

    readings: list[Any] = []
    strategy.plugins.insert(0, Plain())
    for experience in small_benchmark(2).train_stream:
        strategy.train(experience)
    steps = 2 * STEPS
    assert plugin.meter.steps == len(readings) == steps
    ends = sorted({*range(4, steps + 1, 4), STEPS, steps})
    assert sorted(notes.values["inertia/energy"]) == ends
    for begin, end in zip([0, *ends], ends, strict=False):
        part = [reading for reading in readings[begin:end] if reading.change is not None]
        assert notes.values["inertia/energy"][end] == pytest.approx(readings[end - 1].energy)
        for name in ("change", "predicted", "damping", "defect"):
            total = sum(getattr(reading, name) for reading in part)
            assert notes.values[f"inertia/{name}"][end] == pytest.approx(total)
    everything = strategy.evaluator.get_all_metrics()
    assert everything["inertia/defect"][0] == ends


def test_the_second_task_is_a_jump_of_the_defect() -> None:
    net = cl.networks.mlp(64, [16], 10)
    plugin = InertiaPlugin(every_n_steps=1)
    notes = Notes()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    strategy = naive(
        net, optimizer=optimizer, plugins=[plugin], evaluator=EvaluationPlugin(loggers=[notes]), train_epochs=12
    )
    torch.manual_seed(0)
    strategy.train(small_benchmark(2).train_stream)
    surprises = notes.values["inertia/surprise"]
    first = 12 * STEPS + 1
    usual = max(abs(value) for step, value in surprises.items() if 20 < step < first)
    assert surprises[first] > 10.0
    assert surprises[first] > 2.0 * usual


def test_training_does_not_notice_it() -> None:
    ends = []
    for plugins in ([], [InertiaPlugin(1)]):
        net = cl.networks.mlp(64, [16], 10)
        strategy = naive(net, optimizer=torch.optim.Adam(net.parameters(), lr=1e-3), plugins=plugins)
        torch.manual_seed(0)
        strategy.train(small_benchmark(2).train_stream)
        ends.append(net.state_dict())
    torch.testing.assert_close(*ends, rtol=0, atol=0)
    plugins[0].detach()
    assert not strategy.optimizer._optimizer_step_post_hooks


def test_a_loaded_run_goes_on() -> None:
    def started() -> tuple[Any, InertiaPlugin]:
        net = cl.networks.mlp(64, [16], 10)
        plugin = InertiaPlugin()
        keeper = cl.strategies.InterventionPlugin()  # keeps Avalanche from emptying the optimizer
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
        return naive(net, optimizer=optimizer, plugins=[keeper, plugin]), plugin

    experiences = list(small_benchmark(2).train_stream)
    torch.manual_seed(0)
    strategy, plugin = started()
    strategy.train(experiences[0])
    file = io.BytesIO()
    torch.save([strategy.model.state_dict(), strategy.optimizer.state_dict(), plugin.state_dict()], file)
    torch.manual_seed(1)
    strategy.train(experiences[1])

    file.seek(0)
    model, optimizer, meter = torch.load(file, weights_only=True)
    again, loaded = started()
    again.model.load_state_dict(model)
    again.optimizer.load_state_dict(optimizer)
    loaded.load_state_dict(meter)
    torch.manual_seed(1)
    again.train(experiences[1])
    assert loaded.meter.steps == 2 * STEPS
    assert loaded.meter.reading == plugin.meter.reading


def test_bad_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="every_n_steps: expected a number in"):
        InertiaPlugin(every_n_steps=0)
