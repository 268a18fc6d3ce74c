"""Two processes change their networks alike: weights, random streams and alarms."""

import datetime
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cases import assert_same_tensors, batch, mlp
from test_two_processes import METHODS as UNIT_METHODS
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from clagrange import gaussianize, interventions
from clagrange.interventions import Intervention
from clagrange.optim import UPGD, EulerLagrange

OFTEN = {"threshold": 0.05, "drift": 0.0, "warm_up": 1, "decay": 0.5}

METHODS: dict[str, Callable[[], Intervention]] = {
    "shrink_and_perturb": lambda: interventions.ShrinkAndPerturb(0.1, 0.1, every=3, perturbation="initial"),
    "l2_init": lambda: interventions.L2Init(0.1, "step"),
    "regenerative_l1": lambda: interventions.RegenerativeL1(0.01),
    "hare_and_tortoise": lambda: interventions.HareAndTortoise(0.9, 4),
    "spectral": lambda: interventions.SpectralRegularization(0.01),
    "normalize_and_project": lambda: interventions.NormalizeAndProject(),
    "soft_reset": lambda: interventions.SoftReset(0.1),
    "input_normalization": interventions.InputNormalization,
    "consolidation": interventions.Consolidation,
    "injection": lambda: interventions.VarianceInjection(0.5, 0.5, over=3, where="low_utility"),
    "cusum": lambda: interventions.FullReset(detector=interventions.CUSUM(**OFTEN)),
    "page_hinkley": lambda: interventions.FullReset(
        detector=interventions.PageHinkley(threshold=0.05, drift=0.0, warm_up=1)
    ),
    "energy": lambda: interventions.VarianceInjection(0.5, detector=interventions.EnergyJump(**OFTEN)),
    "surprise": lambda: interventions.VarianceInjection(
        0.5, detector=interventions.PredictiveSurprise(**OFTEN, samples=2)
    ),
}


def test_every_intervention_is_tried_in_two_processes() -> None:
    public = {
        name for name in interventions.__all__ if issubclass(getattr(interventions, name), Intervention)
    } - {"Intervention"}
    tried = {type(make()).__name__ for make in METHODS.values()} | {name for name, _ in UNIT_METHODS.values()}
    assert public == tried


def run(name: str, rank: int | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train on the whole of each batch (rank None) or on a half."""
    net = gaussianize(mlp(rank or 0))
    model: nn.Module = net if rank is None else DistributedDataParallel(net)
    optimizer: Any
    if name == "upgd":
        optimizer, method = UPGD(net.parameters(), lr=0.1, noise=0.1), Intervention()
    else:
        optimizer, method = EulerLagrange(net, lr=0.02, temperature=1e-3), METHODS[name]()
    method.on_start(net, optimizer)
    part = {None: slice(None), 0: slice(4), 1: slice(4, None)}[rank]
    for step in range(14):
        if step == 6:
            method.switch_announced(net, optimizer)
        inputs, targets = batch(step)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs[part]), targets[part])
        loss.backward()
        method.loss_known(net, loss)
        method.gradient_known(net, optimizer)
        optimizer.step()
        method.step_taken(net, optimizer)
    return dict(net.state_dict()), method.state_dict()


UNEVEN: dict[str, Callable[[], Intervention]] = {
    "input_normalization": interventions.InputNormalization,
    "contribution": lambda: interventions.ContinualBackprop(0.2, maturity=2),
    "redo": lambda: interventions.ReDo(0.9, every=4),
    "redo_gradient": lambda: interventions.ReDo(0.9, every=4, score="gradient"),
    "resets": lambda: interventions.SelfNormalizedResets(0.5, longest=3),
}


def run_uneven(name: str, rank: int | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same, but the second process has no example of the first batch and of the fifth."""
    net = mlp(rank or 0)
    model: nn.Module = net if rank is None else DistributedDataParallel(net)
    optimizer, method = torch.optim.SGD(net.parameters(), lr=0.05), UNEVEN[name]()
    method.on_start(net, optimizer)
    for step in range(8):
        split = 8 if step in (0, 4) else 4
        part = {None: slice(None), 0: slice(split), 1: slice(split, None)}[rank]
        inputs, targets = batch(step)
        optimizer.zero_grad()
        losses = nn.functional.cross_entropy(model(inputs[part]), targets[part], reduction="none")
        (losses.sum() / (8 if rank is None else 4)).backward()
        method.gradient_known(net, optimizer)
        optimizer.step()
        method.step_taken(net, optimizer)
    return dict(net.state_dict()), method.state_dict()


def _process(rank: int, folder: str) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=60),
    )
    torch.set_num_threads(1)
    try:
        made = {name: run(name, rank) for name in [*METHODS, "upgd"]}
        made |= {f"{name}, uneven": run_uneven(name, rank) for name in UNEVEN}
        torch.save(made, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(_process, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", [*METHODS, "upgd"])
def test_two_processes_are_alike_and_equal_one(name: str, results) -> None:
    first, second = (result[name] for result in results)
    assert_same_tensors(first[0], second[0])
    if name == "surprise":  # what a network expects of half a batch is not half of what it expects
        return
    assert_same_tensors(first[0], run(name, None)[0], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", UNEVEN)
def test_where_one_process_has_no_examples(name: str, results) -> None:
    """Inputs and gradients are those of the joint batch; units are not counted in such a step."""
    first, second = (result[f"{name}, uneven"] for result in results)
    assert_same_tensors(first[0], second[0])
    state = first[1]["state"]
    torch.testing.assert_close(state, second[1]["state"], rtol=0, atol=0)
    if name in ("input_normalization", "redo_gradient"):
        alone = run_uneven(name, None)
        assert_same_tensors(first[0], alone[0], rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(state, alone[1]["state"], rtol=1e-8, atol=1e-10)
    else:
        assert all(value.isfinite().all() for value in [*first[0].values(), *state["0"].values()])
    if name == "contribution":
        assert int(state["0"]["age"].max()) <= 6
