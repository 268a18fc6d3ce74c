"""Sums of magnitudes of large matrices, without fresh memory, and along with the step that changes them."""

import functools
import threading
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from clagrange._compilation import compiling, give_up, may_compile

_SMALL = 1 << 18
"""Numbers up to which all are summed at once."""
_CACHED = 1 << 20
"""Numbers whose magnitudes stay in the cache until they are summed."""
LARGE = 1_500_000
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


class _RowSums(NamedTuple):
    """Σ|w| over the columns of a weight as it was after so many changes."""

    sums: Tensor
    version: int


_followed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # weights, to their `_RowSums` or None


def follow_row_sums(weight: Tensor) -> None:
    """Say that the sums over the rows of a weight will be asked for after each step.

    `add_outer_product` then makes them while it has the numbers at hand, which saves a large weight a pass.
    """
    _followed.setdefault(weight, None)


def add_outer_product(weight: Tensor, column: Tensor, row: Tensor) -> None:
    """W ← W + c·r in place, for W (R, out, in), c (R, out, 1) and r (R, 1, in).

    Example:
        >>> weight = torch.zeros(1, 2, 2)
        >>> add_outer_product(weight, torch.tensor([[[1.0], [2.0]]]), torch.tensor([[[1.0, 3.0]]]))
        >>> weight
        tensor([[[1., 3.],
                 [2., 6.]]])
    """
    if weight in _followed and weight.device.type == "cpu" and _is_large(weight) and may_compile():
        try:
            sums = _compiled(_moved_row_sums)(weight.data, column.data, row.data)
        except Exception as error:  # torch.compile raises many kinds; it compiles before it changes anything
            give_up(error, "steps are not compiled, and sums of magnitudes take their own pass", stacklevel=2)
        else:
            torch.autograd.graph.increment_version((weight,))
            _followed[weight] = _RowSums(sums, weight._version)
            return
    weight.addcmul_(column, row)


def sums_of_magnitudes(values: Tensor, dim: int) -> Tensor:
    """Σ|v| over dimension -1 or -2 of (..., rows, columns).

    On a CPU no magnitudes are written to main memory: sums of large matrices are one compiled loop, those of
    others, and of all where torch.compile does not work, are made of as many rows at a time as fit the cache.

    Example:
        >>> sums_of_magnitudes(torch.tensor([[1.0, -2.0], [-3.0, 4.0]]), -2)
        tensor([4., 6.])
    """
    known: _RowSums | None = _followed.get(values) if dim == -1 else None
    if known is not None and known.version == values._version:
        return known.sums
    values = values.detach()
    if values.device.type != "cpu" or values.numel() <= _SMALL:
        return values.abs().sum(dim)
    rows, columns = values.shape[-2:]
    if _is_large(values) and may_compile():
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


def _is_large(values: Tensor) -> bool:
    return values.shape[-2:].numel() >= LARGE


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
    parts = _compiled(_block_sums)(values[..., :whole, :].unflatten(-2, (-1, _BLOCK)))
    sums = (parts.new_ones(1, parts.shape[-2]) @ parts).squeeze(-2)  # faster than a sum over what is not last
    return sums + values[..., whole:, :].abs().sum(-2)


def _row_sums(values: Tensor) -> Tensor:
    return values.abs().sum(-1)


def _moved_row_sums(weight: Tensor, column: Tensor, row: Tensor) -> Tensor:
    moved = weight + column * row
    weight.copy_(moved)
    return moved.abs().sum(-1)


def _block_sums(blocks: Tensor) -> Tensor:
    """(..., blocks, rows of a block, columns) to (..., blocks, columns)."""
    return blocks.abs().sum(-2)


@functools.cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return compiling(function)
