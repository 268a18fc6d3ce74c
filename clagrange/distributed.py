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


def gathered(rows: Tensor) -> Tensor:
    """The rows (..., n, width) of all processes, one after the other: (..., processes·n, width)."""
    if process_count() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(process_count())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts, -2)
