"""The two strategies: in full runs, resumed, with growing heads, and with bad arguments."""

from pathlib import Path
from typing import Any

import pytest
import torch
from avalanche.benchmarks import (
    CLScenario,
    class_incremental_benchmark,
    task_incremental_benchmark,
    with_classes_timeline,
)
from avalanche.benchmarks.utils import DataAttribute
from avalanche.benchmarks.utils.classification_dataset import ClassificationDataset
from avalanche.core import SupervisedPlugin
from avalanche.logging import InteractiveLogger, TensorboardLogger, TextLogger
from avalanche.models import IncrementalClassifier, MultiHeadClassifier, MultiTaskModule
from avalanche_runs import evaluator, small_benchmark, small_stream
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import TensorDataset

import clagrange as cl
from clagrange.gaussian import GaussianLinear
from clagrange.strategies import ContinualBackprop, EulerLagrange
from clagrange.tasks.digits import digits

RATES = {"lr": 0.02, "temperature": 2e-3, "train_mb_size": 16, "eval_mb_size": 80, "eval_every": -1}


def euler_lagrange(net: nn.Module, **settings: Any) -> EulerLagrange:
    return EulerLagrange(model=net, **{**RATES, "evaluator": evaluator(), **settings})


def continual_backprop(net: nn.Module, **settings: Any) -> ContinualBackprop:
    settings = {
        "optimizer": torch.optim.Adam(net.parameters(), lr=2e-3),
        "replacement_rate": 0.02,
        "maturity": 3,
        "train_mb_size": 16,
        "eval_mb_size": 80,
        "evaluator": evaluator(),
        **settings,
    }
    return ContinualBackprop(model=net, **settings)


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


@pytest.mark.parametrize("make", [euler_lagrange, continual_backprop])
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


class Growing(nn.Module):
    """A network whose head gains a unit for every new class."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 16), nn.ReLU())
        self.head = IncrementalClassifier(16, initial_out_features=2)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(inputs))


def digit_pairs() -> CLScenario:
    """Digits 0 and 1, then 2 and 3, then 4 and 5."""
    inputs, targets = digits()
    chosen = [index for digit in range(6) for index in (targets == digit).nonzero().flatten()[:32].tolist()]
    labels = DataAttribute(targets[chosen].tolist(), "targets")
    data = ClassificationDataset([TensorDataset(inputs[chosen], targets[chosen])], data_attributes=[labels])
    return class_incremental_benchmark(
        {"train": data, "test": data}, class_order=list(range(6)), num_experiences=3
    )


class Heads(SupervisedPlugin):  # type: ignore[misc]
    """Keeps the head's precision and curvature at the start and at the end of each experience."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.starts: list[dict[str, torch.Tensor]] = []
        self.ends: list[dict[str, torch.Tensor]] = []

    def _state(self, strategy: Any) -> dict[str, torch.Tensor]:
        state = strategy.model.get_submodule(self.name).state_dict()
        return {name: value.clone() for name, value in state.items()}

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        self.starts.append(self._state(strategy))

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        self.ends.append(self._state(strategy))


def check_names(strategy: EulerLagrange) -> None:
    """The optimizer has every parameter of the network, by its name."""
    (group,) = strategy.optimizer.param_groups
    named = dict(strategy.model.named_parameters())
    assert {name: id(entry) for name, entry in zip(group["param_names"], group["params"], strict=True)} == {
        name: id(parameter) for name, parameter in named.items()
    }


@pytest.mark.parametrize("prior_mean", ["zero", "initial"])
def test_a_growing_head_stays_gaussian_and_keeps_its_precision(prior_mean: str) -> None:
    heads = Heads("head.classifier")
    strategy = euler_lagrange(
        Growing(),
        plugins=[heads],
        strength=None,
        prior_mean=prior_mean,
        prior_variance=0.5,
        layers={"head*": {"prior_variance": 0.25}},
        train_epochs=4,
    )
    scenario = digit_pairs()
    for number, experience in enumerate(scenario.train_stream):
        strategy.train(experience)
        results = strategy.eval(scenario.test_stream[: number + 1])
        assert results[f"Top1_Acc_Exp/eval_phase/test_stream/Exp{number:03}"] > 0.9
        if number == 0:  # evaluation on classes to come makes the head grow too
            strategy.eval(scenario.test_stream[:2])
    head = strategy.model.head.classifier
    assert isinstance(head, GaussianLinear)
    assert head.out_features == 6
    for start, end in zip(heads.starts[1:], heads.ends[:-1], strict=True):
        old = len(end["weight"])
        assert len(start["weight"]) == old + 2
        for mean in ("weight", "bias"):
            prior = start[f"{mean}_precision.prior_precision"]
            assert torch.equal(start[mean][:old], end[mean])
            assert torch.equal(prior, torch.full_like(prior, 16 / 2 / 0.25))
            for name, fresh in (("precision", prior), ("curvature", torch.zeros(()))):
                now, before = start[f"{mean}_precision.{name}"], end[f"{mean}_precision.{name}"]
                assert torch.equal(now[:old], before)
                assert torch.equal(now[old:], fresh.expand_as(now[old:]))
            prior_mean_now, before = start[f"{mean}_precision.prior_mean"], end[f"{mean}_precision.prior_mean"]
            if prior_mean == "initial":
                assert torch.equal(prior_mean_now[:old], before)
                assert torch.equal(prior_mean_now[old:], start[mean][old:])
            else:
                assert not prior_mean_now.any()
        assert not torch.equal(start["weight_precision.precision"][:old], end["weight_precision.prior_precision"])
    check_names(strategy)


def test_the_grown_head_is_trained() -> None:
    heads = Heads("head.classifier")
    strategy = euler_lagrange(Growing(), plugins=[heads], strength=None)
    strategy.train(digit_pairs().train_stream)
    for start, end in zip(heads.starts, heads.ends, strict=True):
        assert not torch.equal(start["weight"][-1], end["weight"][-1])
        assert not torch.equal(start["weight_precision.precision"][-1], end["weight_precision.precision"][-1])


def test_a_deterministic_head_stays_deterministic_when_it_grows() -> None:
    strategy = euler_lagrange(Growing(), layers={"head*": None})
    strategy.train(digit_pairs().train_stream)
    assert type(strategy.model.head.classifier) is nn.Linear
    assert strategy.model.head.classifier.out_features == 6
    assert isinstance(strategy.model.body[0], GaussianLinear)


def test_continual_backprop_follows_a_growing_head() -> None:
    strategy = continual_backprop(Growing(), layers=["body.0", "head.classifier"], train_epochs=4)
    scenario = digit_pairs()
    for number, experience in enumerate(scenario.train_stream):
        strategy.train(experience)
        strategy.eval(scenario.test_stream[: number + 1])
    ages = strategy.interventions.interventions[0].state["body.0"]["age"]
    steps = 3 * 4 * 4
    assert ages.max() <= steps
    assert (ages < steps).sum() >= 8  # a fiftieth of 16 units at each of the mature steps
    head = strategy.model.head.classifier
    assert head.out_features == 6
    young = ages < 2
    assert not young.any() or head.weight[:, young].abs().max() < 0.1


class ManyHeads(MultiTaskModule):  # type: ignore[misc]
    """A network with a head for each task and one deterministic layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
        self.head = MultiHeadClassifier(16, masking=False)

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(inputs), labels)


def test_new_heads_become_gaussian() -> None:
    strategy = euler_lagrange(ManyHeads(), layers={"body.2": None}, prior_variance=0.5)
    scenario = with_classes_timeline(task_incremental_benchmark(digit_pairs()))
    strategy.train(scenario.train_stream)
    heads = [module.classifier for module in strategy.model.head.classifiers.values()]
    assert [type(head) for head in heads] == [GaussianLinear] * 3
    assert type(strategy.model.body[2]) is nn.Linear
    prior = heads[2].weight_precision.prior_precision
    assert torch.equal(prior, torch.full_like(prior, 16 / 2 / 0.5))
    assert not torch.allclose(heads[2].weight_precision.precision, prior)
    check_names(strategy)


def test_a_network_that_is_gaussian_already_keeps_its_settings() -> None:
    net = cl.gaussianize(cl.networks.mlp(64, [16], 10), prior_variance=0.125, layers={"3": None})
    euler_lagrange(net, prior_variance=1.0)
    assert float(net[1].weight_precision.prior_precision) == 64 / 2 / 0.125
    assert type(net[3]) is nn.Linear


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
