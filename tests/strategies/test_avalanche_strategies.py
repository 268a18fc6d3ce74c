"""The strategies: in full runs, resumed, with growing heads, and with bad arguments."""

from pathlib import Path
from typing import Any

import pytest
import torch
from avalanche.core import SupervisedPlugin
from avalanche.logging import InteractiveLogger, TensorboardLogger, TextLogger
from avalanche_runs import continual_backprop, euler_lagrange, evaluator, naive, small_benchmark, small_stream
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import clagrange as cl


@pytest.mark.parametrize("make", [euler_lagrange, continual_backprop])
def test_a_full_run_with_avalanche_s_loggers(
    make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (tmp_path / "log.txt").open("w") as text:
        board = TensorboardLogger(tmp_path / "board")
        net = cl.networks.mlp(64, [32], 10)
        strategy = make(net, evaluator=evaluator(InteractiveLogger(), TextLogger(text), board), train_epochs=4)
        scenario = small_benchmark()
        for experience in scenario.train_stream:
            trained = strategy.train(experience)
            results = strategy.eval(scenario.test_stream)
        board.writer.close()
    assert trained["Top1_Acc_Epoch/train_phase/train_stream/Task000"] > 0.3
    assert results["Top1_Acc_Exp/eval_phase/test_stream/Task000/Exp002"] > 0.4
    net.eval()
    for number in range(3):
        task = small_stream().task(number)
        with torch.no_grad():
            accuracy = float((net(task.inputs).argmax(-1) == task.targets).double().mean())
        key = f"Top1_Acc_Exp/eval_phase/test_stream/Task000/Exp{number:03}"
        assert results[key] == pytest.approx(accuracy)
    assert "100%" in capsys.readouterr().out
    assert "Top1_Acc_Stream/eval_phase/test_stream/Task000" in (tmp_path / "log.txt").read_text()
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    assert len(events.Scalars("Top1_Acc_Stream/eval_phase/test_stream/Task000")) == 3


def test_ten_lines_are_enough(capsys: pytest.CaptureFixture[str]) -> None:
    benchmark = cl.tasks.PermutedDigits(tasks=2, examples=160, batch_size=16).as_benchmark()
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    strategy = cl.strategies.EulerLagrange(model=net, lr=0.02, temperature=1e-3, train_mb_size=16)
    for experience in benchmark.train_stream:
        strategy.train(experience)
        results = strategy.eval(benchmark.test_stream)
    assert results["Top1_Acc_Exp/eval_phase/test_stream/Task000/Exp001"] > 0.2
    assert "End of eval phase" in capsys.readouterr().out


class Weights(SupervisedPlugin):  # type: ignore[misc]
    """Compares the weights around the beginning of each experience."""

    def __init__(self) -> None:
        super().__init__()
        self.changed: list[bool] = []

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        self.last = nn.utils.parameters_to_vector(strategy.model.parameters()).clone()

    def before_training_epoch(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        weights = nn.utils.parameters_to_vector(strategy.model.parameters())
        if hasattr(self, "last"):
            self.changed.append(not torch.equal(weights, self.last))


@pytest.mark.parametrize(
    ("settings", "changes"),
    [
        ({}, True),
        ({"strength": 0.0}, False),
        ({"strength": None}, False),
        ({"strength": None, "widen": 0.5}, False),
    ],
)
def test_injection_changes_the_weights_at_switches_only(settings: dict[str, Any], changes: bool) -> None:
    watch = Weights()
    euler_lagrange(cl.networks.mlp(64, [16], 10), plugins=[watch], **settings).train(
        small_benchmark().train_stream
    )
    assert watch.changed == [changes, changes]


def test_injection_is_the_only_difference_between_steps_of_two_strategies() -> None:
    nets = [cl.networks.mlp(64, [16], 10) for _ in range(2)]
    strategies = [euler_lagrange(nets[0]), euler_lagrange(nets[1], strength=None)]
    scenario = small_benchmark()
    for number, same in ((0, True), (1, False)):
        for strategy in strategies:
            strategy.train(scenario.train_stream[number], shuffle=False)
        assert torch.equal(nets[0][1].weight, nets[1][1].weight) is same


def test_widening_alone_acts_on_the_variance() -> None:
    net = cl.networks.mlp(64, [16], 10)
    strategy = euler_lagrange(net, strength=0.0, widen=1.0)
    scenario = small_benchmark()
    strategy.train(scenario.train_stream[0])
    assert not torch.allclose(net[1].weight_precision.precision, net[1].weight_precision.prior_precision)

    class AtPrior(SupervisedPlugin):  # type: ignore[misc]
        def before_training_epoch(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
            precision = net[1].weight_precision
            torch.testing.assert_close(precision.precision, precision.prior_precision.expand(16, 64))

    strategy.plugins.append(AtPrior())
    strategy.train(scenario.train_stream[1])


class Normalised(nn.Sequential):
    """A network with parameters that are not Gaussian: their averages are the optimizer's state."""

    def __init__(self) -> None:
        mlp = cl.networks.mlp(64, [16], 10)
        super().__init__(mlp[0], mlp[1], nn.LayerNorm(16), mlp[2], mlp[3])


def upgd(net: nn.Module) -> Any:
    return cl.strategies.UPGD(model=net, lr=0.05, noise=0.1, evaluator=evaluator(), train_mb_size=16)


@pytest.mark.parametrize("make", [euler_lagrange, continual_backprop, upgd])
@pytest.mark.parametrize("plugin_first", [True, False])
def test_a_resumed_run_ends_with_the_identical_weights(make: Any, plugin_first: bool, tmp_path: Path) -> None:
    def started() -> Any:
        return make(Normalised(), **({"layers": ["1", "4"]} if make is continual_backprop else {}))

    train = small_benchmark().train_stream
    whole = started()
    for experience in train:
        whole.train(experience, shuffle=False)

    first = started()
    first.train(train[:2], shuffle=False)
    parts = {"model": first.model, "optimizer": first.optimizer, "plugin": first.interventions}
    torch.save({name: part.state_dict() for name, part in parts.items()}, tmp_path / "checkpoint.pt")

    second = started()
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    if plugin_first:
        second.interventions.load_state_dict(checkpoint["plugin"])
    second.model.load_state_dict(checkpoint["model"])
    second.optimizer.load_state_dict(checkpoint["optimizer"])
    second.eval(small_benchmark().test_stream)
    if not plugin_first:
        second.interventions.load_state_dict(checkpoint["plugin"])
    second.train(train[2], shuffle=False)

    for name, value in whole.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], value), name
    assert not torch.equal(first.model[4].weight, whole.model[4].weight)


def test_a_network_that_is_gaussian_already_keeps_its_settings() -> None:
    net = cl.gaussianize(cl.networks.mlp(64, [16], 10), prior_variance=0.125, layers={"3": None})
    euler_lagrange(net, prior_variance=1.0)
    assert float(net[1].weight_precision.prior_precision) == 64 / 2 / 0.125
    assert type(net[3]) is nn.Linear


NAMED: dict[str, dict[str, Any]] = {
    "ContinualBackprop": {"replacement_rate": 0.05, "maturity": 2},
    "L2Init": {"strength": 0.1},
    "ReDo": {"threshold": 0.6, "every": 5},
    "SelfNormalizedResets": {"rejection": 0.1, "longest": 6},
    "ShrinkAndPerturb": {"shrink": 0.5, "noise": 0.1, "every": "switch"},
    "UPGD": {"lr": 0.05, "noise": 0.2, "weight_decay": 0.1},
}


@pytest.mark.parametrize("name", NAMED)
def test_a_named_strategy_is_its_method_and_changes_what_is_learnt(name: str) -> None:
    settings = {**NAMED[name], "seed": 7}
    if name == "L2Init":
        settings.pop("seed")
    frame = {"train_mb_size": 16, "eval_mb_size": 80, "evaluator": evaluator()}

    def sgd(net: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(net.parameters(), lr=0.05)

    def weights(make: Any) -> torch.Tensor:
        net = cl.networks.mlp(64, [32], 10, seed=2)
        strategy = make(net)
        scenario = small_benchmark()
        for experience in scenario.train_stream:
            strategy.train(experience, shuffle=False)
        strategy.eval(scenario.test_stream)
        return nn.utils.parameters_to_vector(net.parameters()).detach()

    if name == "UPGD":
        named = weights(lambda net: cl.strategies.UPGD(model=net, **settings, **frame))
        itself = weights(lambda net: naive(net, optimizer=cl.optim.UPGD(net.parameters(), **settings)))
    else:
        kind = getattr(cl.strategies, name)
        plugin = cl.strategies.InterventionPlugin(getattr(cl.interventions, name)(**settings))
        named = weights(lambda net: kind(model=net, optimizer=sgd(net), **settings, **frame))
        itself = weights(lambda net: naive(net, optimizer=sgd(net), plugins=[plugin]))
    assert torch.equal(named, itself)
    assert not torch.equal(named, weights(naive))


def test_a_setting_that_a_named_strategy_does_not_know_is_named() -> None:
    net = cl.networks.mlp(64, [16], 10)
    optimizer = torch.optim.SGD(net.parameters())
    with pytest.raises(TypeError, match="treshold"):
        cl.strategies.ReDo(model=net, optimizer=optimizer, treshold=0.1)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"optimizer": None}, TypeError, "optimizer: expected none"),
        ({"temperature": -1.0}, ValueError, "temperature: expected a number in"),
        ({"strength": 2.0}, ValueError, "strength: expected a number in"),
        ({"widen": -0.1}, ValueError, "widen: expected a number in"),
        ({"prior_variance": 0.0}, ValueError, "prior_variance: expected a number in"),
        ({"temprature": 1.0}, TypeError, "temprature"),
        ({"layers": {"9": None}}, ValueError, "layers: expected names or patterns"),
    ],
)
def test_bad_arguments_of_euler_lagrange(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        euler_lagrange(cl.networks.mlp(64, [16], 10), **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"replacement_rate": 2.0}, "replacement_rate: expected"),
        ({"utility": "worth"}, "utility: expected one of"),
    ],
)
def test_bad_arguments_of_continual_backprop(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        continual_backprop(cl.networks.mlp(64, [16], 10), **settings)
