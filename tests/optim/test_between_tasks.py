"""What Avalanche and Lightning do to an optimizer between tasks: training goes on as with a new one."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from avalanche.models.dynamic_optimizers import reset_optimizer, update_optimizer
from cases import (
    FISHER_FACTORS,
    OPTIMIZERS,
    OptimizerCase,
    assert_same_tensors,
    batch,
    tensors_of,
    train,
    variants,
)
from lightning_runs import Classifier, trainer
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from clagrange.gaussian import gaussian_blocks


def variances(case: OptimizerCase, net: nn.Module) -> list[torch.Tensor]:
    """Of the Gaussian parameters of a network, where its optimizer wants such."""
    return [block.precision.variance().clone() for _, block in gaussian_blocks(net)] if case.gaussian else []


def update(optimizer: Optimizer, net: nn.Module) -> None:
    """What a strategy of Avalanche does at the start of its first experience."""
    update_optimizer(optimizer, dict(net.named_parameters()), None, reset_state=True)


def reset(optimizer: Optimizer, net: nn.Module) -> None:
    """What its `FromScratchTrainingPlugin` does before every experience."""
    reset_optimizer.__wrapped__(optimizer, net)  # without the word that it is deprecated


@variants(OPTIMIZERS + FISHER_FACTORS)
def test_an_optimizer_that_avalanche_wiped_goes_on_as_a_new_one(
    case: OptimizerCase, options: dict[str, Any]
) -> None:
    net = case.network()
    optimizer, start = case.make(net, **options), variances(case, net)
    train(net, optimizer, range(3))
    for before, now in zip(start, variances(case, net), strict=True):
        assert not torch.allclose(now, before, rtol=1e-4)
    for step, wipe in ((3, update), (6, reset)):
        trained, other = tensors_of(net), copy.deepcopy(net)
        wipe(optimizer, net)
        assert not optimizer.state
        assert_same_tensors(tensors_of(net), trained)
        train(net, optimizer, range(step, step + 3))
        train(other, case.make(other, **options), range(step, step + 3))
        assert all(value.isfinite().all() for value in tensors_of(net).values())
        assert_same_tensors(dict(net.state_dict()), dict(other.state_dict()))


@pytest.mark.parametrize("case", OPTIMIZERS + FISHER_FACTORS, ids=lambda case: case.name)
@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
def test_a_second_fit_of_lightning_goes_on_with_a_new_optimizer(case: OptimizerCase, tmp_path: Path) -> None:
    made: list[torch.Tensor] = []

    def make(net: nn.Module) -> Optimizer:
        optimizer = case.make(net)
        made[:] = variances(case, net)
        return optimizer

    module, by_hand = Classifier(case.network(), make), case.network()
    for steps in (range(3), range(3, 6)):
        start = variances(case, module.net)
        batches = DataLoader([batch(step) for step in steps], batch_size=None)
        trainer(tmp_path, max_epochs=1).fit(module, batches)
        train(by_hand, case.make(by_hand), steps)
        assert_same_tensors(dict(module.net.state_dict()), dict(by_hand.state_dict()))
        for before, with_optimizer, now in zip(start, made, variances(case, module.net), strict=True):
            assert torch.equal(with_optimizer, before)
            assert not torch.equal(now, before)
