"""Sums of magnitudes of large matrices, without fresh memory."""

import functools
import threading
from collections.abc import Callable

import torch
from torch import Tensor

from clagrange._compilation import compiling, give_up, may_compile

_SMALL = 1 << 18
"""Numbers up to which all are summed at once."""
_CACHED = 1 << 20
"""Numbers whose magnitudes stay in the cache until they are summed."""
_COMPILED_FROM = 1_500_000
"""Numbers of a matrix whose sums are compiled. It takes some seconds, and saves up to half of the time."""
_BLOCK = 8
"""Rows that the compiled function adds up at a time: a row stays in the fastest cache until the next is added."""


class _Kept(threading.local):
    """What a thread keeps from step to step.

    Attributes:
        memory: for magnitudes, by their type.
    """

    def __init__(self) -> None:
        self.memory: dict[torch.dtype, Tensor] = {}


_kept = _Kept()


def sums_of_magnitudes(values: Tensor, dim: int) -> Tensor:
    """Σ|v| over dimension -1 or -2 of (..., rows, columns).

    On a CPU no magnitudes are written to main memory: sums of large matrices are one compiled loop, those of
    others, and of all where torch.compile does not work, are made of as many rows at a time as fit the cache.

    Example:
        >>> sums_of_magnitudes(torch.tensor([[1.0, -2.0], [-3.0, 4.0]]), -2)
        tensor([4., 6.])
    """
    values = values.detach()
    if values.device.type != "cpu" or values.numel() <= _SMALL:
        return values.abs().sum(dim)
    rows, columns = values.shape[-2:]
    if rows * columns >= _COMPILED_FROM and may_compile():
        try:
            return _sums_by_compiler(values, dim)
        except Exception as error:  # torch.compile raises many kinds
            give_up(error, "sums of magnitudes are not compiled, and take up to twice the time", stacklevel=2)
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


def _sums_by_compiler(values: Tensor, dim: int) -> Tensor:
    """The sums of large matrices; rows beyond a multiple of the block are left to torch."""
    if dim == -1:
        return _compiled(_row_sums)(values)
    whole = values.shape[-2] // _BLOCK * _BLOCK
    sums = _compiled(_block_sums)(values[..., :whole, :].unflatten(-2, (-1, _BLOCK))).sum(-2)
    return sums + values[..., whole:, :].abs().sum(-2)


def _row_sums(values: Tensor) -> Tensor:
    return values.abs().sum(-1)


def _block_sums(blocks: Tensor) -> Tensor:
    """(..., blocks, rows of a block, columns) to (..., blocks, columns)."""
    return blocks.abs().sum(-2)


@functools.cache
def _compiled(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return compiling(function)
