"""Two processes under DistributedDataParallel equal one process with the joint batch."""

import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cases import FISHER_FACTORS, OPTIMIZERS, OptimizerCase, assert_same_tensors, batch, mlp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from clagrange import gaussianize
from clagrange.distributed import mean_over_processes, process_count
from clagrange.gaussian import Kronecker
from clagrange.interventions import ContinualBackprop
from clagrange.optim import EulerLagrange

STRUCTURES = {
    "diagonal": "diagonal",
    "kronecker": Kronecker(refresh_every=5),
    "exact": Kronecker(damping="exact", refresh_every=1),
}
CASES = [(structure, reduction) for structure in STRUCTURES for reduction in ("mean", "sum")]
FACTORS = {
    f"{case.name}{number}": (case, options)
    for case in FISHER_FACTORS
    for number, options in enumerate([{}, *case.options])
}
STEPS = 12


def run(structure: str, reduction: str, rank: int | None, first: int = 4) -> dict[str, Any]:
    """Train on the whole of each batch (rank None), on its first examples (rank 0) or on the others.

    Units are replaced where the parts are equal: else their utilities are means of means.
    """
    net = gaussianize(
        mlp(rank or 0), STRUCTURES[structure]
    )  # processes start apart: DistributedDataParallel takes rank 0's weights
    model: nn.Module = net if rank is None else DistributedDataParallel(net)
    optimizer = EulerLagrange(net, lr=0.05, temperature=1e-3, trust_region=0.3, loss_reduction=reduction)
    method = ContinualBackprop(replacement_rate=0.2 * (first == 4), maturity=3)
    method.on_start(net, optimizer)
    part = {None: slice(None), 0: slice(first), 1: slice(first, None)}[rank]
    for step in range(STEPS):
        inputs, targets = batch(step, size=8)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs[part]), targets[part], reduction=reduction).backward()
        optimizer.step()
        method.on_step(net, optimizer)
    return net.state_dict()


def optimizer_state(
    case: OptimizerCase, options: dict[str, Any], rank: int | None, first: int = 3
) -> dict[str, Any]:
    """What an optimizer makes of weights and of its own state; drawn weights differ between processes."""
    net = case.network(rank or 0)
    optimizer = case.make(net, **options)
    model: nn.Module = net if rank is None else DistributedDataParallel(net)
    part = {None: slice(None), 0: slice(first), 1: slice(first, None)}[rank]
    for step in range(6):
        inputs, targets = batch(step, size=8)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs[part]), targets[part]).backward()
        optimizer.step()
    weights = {
        name: value for name, value in net.state_dict().items() if not name.endswith("sampler._extra_state")
    }
    return {"weights": weights, "state": optimizer.state_dict()["state"]}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(minutes=2),
    )
    try:
        mean = mean_over_processes(torch.tensor([float(rank)]))
        results = {"-".join(case): run(*case, rank) for case in CASES}
        results |= {f"uneven-{'-'.join(case)}": run(*case, rank, first=3) for case in CASES}
        results |= {case.name: optimizer_state(case, {}, rank) for case in OPTIMIZERS}
        for name, (case, options) in FACTORS.items():
            results[name] = optimizer_state(case, options, rank, first=4)
            results[f"uneven-{name}"] = optimizer_state(case, options, rank)
        torch.save({"count": process_count(), "half": mean, **results}, Path(folder, str(rank)))
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_the_joint_batch(tmp_path: Path) -> None:
    """For mean and sum losses, with continual backprop replacing the same units in both processes.

    Every optimizer, with drawn weights too, takes the same steps in both; those that see Kronecker factors take
    the steps of the joint batch where the parts are equal.

    Eigenvectors, which "exact" keeps, are compared by what is made of them: their signs are free.
    """
    mp.spawn(worker, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / str(rank), weights_only=True) for rank in range(2))
    assert first["count"] == second["count"] == 2
    assert first["half"] == second["half"] == 0.5
    for case in CASES:
        name, joint = "-".join(case), run(*case, None)
        assert_equal_to_joint(first[name], second[name], joint, case[0])
        assert (joint["2.weight"] == 0).any()  # a unit was replaced at the end
        # of unequal parts, the mean of means is not the mean, but the sum of sums is the sum
        uneven = first[f"uneven-{name}"]
        joint = run(*case, None, first=3) if case[1] == "sum" else uneven
        assert_equal_to_joint(uneven, second[f"uneven-{name}"], joint, case[0])
    for optimizer in OPTIMIZERS:
        assert_same_tensors(second[optimizer.name], first[optimizer.name])
    for name, (optimizer, options) in FACTORS.items():
        assert_same_tensors(second[name], first[name])
        assert_same_tensors(second[f"uneven-{name}"], first[f"uneven-{name}"])
        assert_same_tensors(first[name], optimizer_state(optimizer, options, None), rtol=1e-8, atol=1e-9)


def assert_equal_to_joint(first: Any, second: Any, joint: dict[str, Any], structure: str) -> None:
    assert_same_tensors(second, first)
    assert set(first) == set(joint)
    for name, value in joint.items():
        if structure != "exact" or not name.endswith("_solver"):
            assert_same_tensors(first[name], value, rtol=1e-9, atol=1e-9)


def test_one_process_is_its_own_mean() -> None:
    value = torch.ones(2)
    assert process_count() == 1
    assert mean_over_processes(value) is value
