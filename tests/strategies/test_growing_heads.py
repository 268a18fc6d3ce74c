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

import clagrange
from clagrange import gaussianize, variances
from clagrange.gaussian import GaussianLinear, Kronecker, KroneckerPrecision
from clagrange.strategies import EulerLagrange
from clagrange.strategies.heads import layers_of, make_new_layers_gaussian
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
        return {name: value.clone() for name, value in state.items() if isinstance(value, torch.Tensor)}

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


def test_a_growing_head_with_a_kronecker_precision_keeps_the_rows_of_its_units() -> None:
    heads = Heads("head.classifier")
    strategy = euler_lagrange(Growing(), plugins=[heads], strength=None, precision="kronecker", temperature=1e-2)
    strategy.train(digit_pairs().train_stream)
    for start, end in zip(heads.starts[1:], heads.ends[:-1], strict=True):
        old = len(end["weight"])
        now, before = (state["weight_precision.outputs"] for state in (start, end))
        assert before.any()
        assert torch.equal(now[:old, :old], before)
        assert not now[old:].any()
        assert not now[:, old:].any()
        assert torch.equal(start["weight_precision.inputs"], end["weight_precision.inputs"])
    final = strategy.model.head.classifier
    assert isinstance(final.weight_precision, KroneckerPrecision)
    assert final.weight_precision.outputs.diagonal().all()
    check_names(strategy)


class Headed(nn.Module):
    """A Gaussian network some steps away from its prior, whose head can be replaced."""

    def __init__(self, precision: Any, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(5, 4), nn.Linear(4, 3)
        gaussianize(self, precision, **settings)
        self.train_a_little()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(inputs).relu())

    def train_a_little(self) -> None:
        optimizer = clagrange.optim.EulerLagrange(self, lr=0.05, temperature=1e-2)
        for _ in range(5):
            optimizer.zero_grad()
            self(torch.randn(8, 5)).sin().sum(1).mean().backward()
            optimizer.step()

    def grow(self, units: int, **settings: Any) -> GaussianLinear:
        """Put a larger head, with the same first units, in the place of the head; return the old one."""
        before, old = layers_of(self), self.head
        self.head = nn.Linear(4, units)
        with torch.no_grad():
            for new, known in ((self.head.weight, old.weight), (self.head.bias, old.bias)):
                new[: len(known)] = known
        asked = {"precision": "diagonal", "prior_mean": "zero", "prior_variance": 1.0, "layers": None}
        make_new_layers_gaussian(self, before, {**asked, **settings})
        return old


@pytest.mark.parametrize("consolidated", [False, True])
@pytest.mark.parametrize("prior_mean", ["zero", "initial"])
@pytest.mark.parametrize("precision", ["diagonal", "kronecker", Kronecker("exact"), Kronecker(widest=2)])
@pytest.mark.filterwarnings("ignore:layer .* so that only the diagonal:UserWarning")
def test_what_a_grown_layer_takes_over(precision: Any, prior_mean: str, consolidated: bool) -> None:
    net = Headed(precision, prior_mean=prior_mean, prior_variance=0.5)
    if consolidated:
        clagrange.consolidate(net)
        net.train_a_little()
    old = net.grow(5)
    (block, *_), (known, *_) = net.head.blocks(), old.blocks()
    assert block.precision.consolidated == consolidated
    torch.testing.assert_close(variances(net.head)["weight"][:3], variances(old)["weight"])
    torch.testing.assert_close(variances(net.head)["weight"][3:], torch.full((2, 4), 0.5 * 2 / 4))
    gap = block.joint_mean() - block.precision.prior_mean
    known_gap = known.joint_mean() - known.precision.prior_mean
    torch.testing.assert_close(gap[:3], known_gap)
    assert gap[3:].any() == (prior_mean == "zero")  # a prior around the start has the new units' there
    net.train_a_little()
    assert all(value.isfinite().all() for value in variances(net).values())


def test_a_factor_that_grows_wider_than_the_widest_keeps_its_diagonal() -> None:
    net = Headed(Kronecker(widest=6))
    with pytest.warns(UserWarning, match="its weight has 7 outputs"):
        old = net.grow(7)
    assert torch.equal(net.head.weight_precision.outputs[:3], old.weight_precision.outputs.diagonal())
    net.train_a_little()


def test_a_grown_layer_goes_on_with_its_draws() -> None:
    net = Headed("diagonal")
    clagrange.gaussian.set_sampling(net, "batch", torch.Generator().manual_seed(0))
    sampler = net.head.sampler
    net.grow(5)
    assert net.head.sampler is sampler
    net.train_a_little()


def test_a_layer_that_was_made_deterministic_is_kept_so_by_later_entries_too() -> None:
    net = Headed("diagonal", layers={"head": None})
    net.extra = nn.Linear(2, 2)
    before = layers_of(net)
    del before["extra"]
    settings = {"precision": "diagonal", "prior_mean": "zero", "prior_variance": 1.0}
    make_new_layers_gaussian(net, before, {**settings, "layers": {"head": None, nn.Linear: {}}})
    assert type(net.head) is nn.Linear
    assert isinstance(net.extra, GaussianLinear)


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
