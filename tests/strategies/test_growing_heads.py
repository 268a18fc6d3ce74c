"""The strategies with networks that Avalanche lets grow."""

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
from avalanche.models import IncrementalClassifier, MultiHeadClassifier, MultiTaskModule
from avalanche_runs import continual_backprop, euler_lagrange
from torch import nn
from torch.utils.data import TensorDataset

from clagrange.gaussian import GaussianLinear
from clagrange.strategies import EulerLagrange
from clagrange.tasks.digits import digits


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
