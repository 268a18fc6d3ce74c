"""Sums of magnitudes of large matrices, without fresh memory."""

import threading

import torch
from torch import Tensor

_SMALL = 1 << 18
"""Numbers up to which all are summed at once."""
_CACHED = 1 << 20
"""Numbers whose magnitudes stay in the cache until they are summed."""


class _Kept(threading.local):
    """What a thread keeps from step to step.

    Attributes:
        memory: for magnitudes, by their type.
    """

    def __init__(self) -> None:
        self.memory: dict[torch.dtype, Tensor] = {}


_kept = _Kept()


def sums_of_magnitudes(values: Tensor, dim: int) -> Tensor:
    """Σ|v| over dimension -1 or -2 of (..., rows, columns), on a CPU as many rows at a time as fit the cache.

    Example:
        >>> sums_of_magnitudes(torch.tensor([[1.0, -2.0], [-3.0, 4.0]]), -2)
        tensor([4., 6.])
    """
    values = values.detach()
    if values.device.type != "cpu" or values.numel() <= _SMALL:
        return values.abs().sum(dim)
    rows, columns = values.shape[-2:]
    stack = values.reshape(-1, rows, columns)
    parts = 1 if dim == -1 else max(2, torch.get_num_threads())  # each thread sums the rows that it has just made
    sums = values.new_zeros(len(stack), parts, rows if dim == -1 else columns)
    together = max(1, _CACHED // (rows * columns))
    height = min(rows, max(1, _CACHED // columns // parts) * parts)
    for matrices, totals in zip(stack.split(together), sums.split(together), strict=True):
        for start in range(0, rows, height):
            piece = _magnitudes(matrices[:, start : start + height])
            if dim == -1:
                totals[:, 0, start : start + height] = piece.sum(-1)
            elif piece.shape[1] % parts:
                totals[:, 0] += piece.sum(1)
            else:
                totals += piece.unflatten(1, (parts, -1)).sum(2)
    return sums.sum(1).view(*values.shape[:-2], -1)


def _magnitudes(values: Tensor) -> Tensor:
    """|v| of numbers, in memory that the next call writes to: fresh memory takes longer than sums."""
    kept = _kept.memory.get(values.dtype)
    if kept is None or kept.numel() < values.numel():
        kept = _kept.memory[values.dtype] = values.new_empty(max(values.numel(), _SMALL))
    return torch.abs(values, out=kept[: values.numel()].view(values.shape))
