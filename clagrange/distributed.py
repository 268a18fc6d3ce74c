"""The little that the package has to know of other processes."""

import torch
import torch.distributed as dist
from torch import Tensor


def process_count() -> int:
    """Number of processes whose gradients are averaged; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def mean_over_processes(tensor: Tensor) -> Tensor:
    """The mean of a statistic over all processes, so that each takes the same decision from it."""
    if process_count() == 1:
        return tensor
    total = tensor.clone()
    dist.all_reduce(total)
    return total / process_count()


def total_over_processes(counts: list[int], device: torch.device) -> list[int]:
    """Numbers of examples, each added over all processes, which may have different ones."""
    if process_count() == 1:
        return counts
    total = torch.tensor(counts, device=device)
    dist.all_reduce(total)
    return total.tolist()


def everywhere(answer: bool, device: torch.device) -> bool:
    """Whether it is true in all processes."""
    if process_count() == 1:
        return answer
    least = torch.tensor(int(answer), device=device)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    return bool(least)


def gathered(*rows: Tensor) -> tuple[Tensor, ...]:
    """The rows (..., n, width) of all processes, one after the other: (..., processes·n, width).

    Tensors that are given together have the same n. Where processes have different ones, rows of zeros fill up.
    """
    if process_count() == 1:
        return rows
    most = torch.tensor(rows[0].shape[-2], device=rows[0].device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    missing = int(most) - rows[0].shape[-2]
    joined = []
    for part in rows:
        own = torch.cat([part, part.new_zeros(*part.shape[:-2], missing, part.shape[-1])], -2)
        parts = [torch.empty_like(own) for _ in range(process_count())]
        dist.all_gather(parts, own)
        joined.append(torch.cat(parts, -2))
    return tuple(joined)
