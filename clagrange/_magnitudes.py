"""Sums of magnitudes of large matrices, without fresh memory, and along with the step that changes them."""

import contextlib
import functools
import threading
from collections.abc import Callable, Container, Iterator

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from clagrange._compilation import compiling, give_up, may_compile

_SMALL = 1 << 18
"""Numbers up to which all are summed at once."""
_LARGE = 1_500_000
"""Numbers of a matrix whose sums and steps are compiled, which takes some seconds and saves a tenth to a half."""
PART = 1 << 17
"""Numbers that are worked on at a time, for each thread: with their magnitudes they fit a core's own cache."""
_BLOCK = 16
"""Rows that compiled functions work on at a time: what they add up stays in the fastest cache meanwhile."""


class _Kept(threading.local):
    """What a thread keeps from step to step.

    Attributes:
        memory: for magnitudes, by their type.
    """

    def __init__(self) -> None:
        self.memory: dict[torch.dtype, Tensor] = {}


_kept = _Kept()


class _Followed:
    """Sums of the magnitudes of a weight that are asked for after each step.

    Attributes:
        dims: the dimensions over which they are asked for.
        sums: by dimension, as they were after so many changes of the weight.
        version: the number of changes.
    """

    def __init__(self) -> None:
        self.dims: set[int] = set()
        self.sums: dict[int, Tensor] = {}
        self.version = -1

    def known(self, weight: Tensor) -> dict[int, Tensor]:
        """The sums, none where the weight was changed since they were made."""
        return self.sums if self.version == weight._version else {}

    def keep(self, weight: Tensor, sums: dict[int, Tensor]) -> None:
        self.sums, self.version = sums, weight._version


_followed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # weights, to their `_Followed`


def follow_sums(weight: Tensor, dim: int) -> None:
    """Say that the sums of magnitudes over a dimension of a weight will be asked for after each step.

    `add_outer_product` then makes them while it has the numbers at hand, which saves a large weight a pass.
    """
    _followed.setdefault(weight, _Followed()).dims.add(dim)


def add_outer_product(weight: Tensor, column: Tensor, row: Tensor, left: Tensor | None = None) -> Tensor | None:
    """W ← W + c·r in place.

    Large weights that `follow_sums` knows go through memory once: as many rows at a time as fit the cache, or in
    one compiled loop.

    Args:
        weight: W (R, out, in).
        column: c (R, out, 1).
        row: r (R, 1, in).
        left: l (R, 1, out), where l·W is wanted.

    Returns:
        l·W (R, 1, in) with W as it was before, if l is given.

    Example:
        >>> weight = torch.zeros(1, 2, 2)
        >>> add_outer_product(weight, torch.tensor([[[1.0], [2.0]]]), torch.tensor([[[1.0, 3.0]]]))
        >>> weight
        tensor([[[1., 3.],
                 [2., 6.]]])
    """
    followed: _Followed | None = _followed.get(weight)
    if followed is None or not _in_parts(weight):
        product = None if left is None else torch.bmm(left, weight)
        weight.addcmul_(column, row)
        return product
    made = None
    if _in_one_loop(weight) and may_compile():
        try:
            made = _add_by_compiler(weight, column, row, left)
        except Exception as error:  # torch.compile raises many kinds
            give_up(error, "steps of large weights are not compiled, and take a tenth more time", stacklevel=2)
    product, over_rows, over_columns = made or _add_in_parts(weight, followed.dims, column, row, left)
    torch.autograd.graph.increment_version((weight,))
    sums = {-2: over_rows.squeeze(1), -1: over_columns}
    followed.keep(weight, {dim: sums[dim] for dim in followed.dims})
    return None if left is None else product


def _in_parts(weight: Tensor) -> bool:
    """Whether that saves time, and sums of parts may be added up in the weight's own type."""
    return (
        weight.device.type == "cpu"
        and weight[0].numel() > PART
        and weight.dtype in (torch.float32, torch.float64)
    )


def _in_one_loop(weight: Tensor) -> bool:
    """Whether to compile saves time, and is possible."""
    return weight[0].numel() >= _LARGE and weight.shape[1] >= _BLOCK and weight.is_contiguous()


def _add_in_parts(
    weight: Tensor, dims: Container[int], column: Tensor, row: Tensor, left: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """A part of the rows at a time: l·W before the step, and the sums over rows and over columns after it."""
    replicas, rows, columns = weight.shape
    height = max(1, PART * torch.get_num_threads() // columns)
    memory, ones = _memory(weight, height * columns).view(height, columns), weight.new_ones(1, height)
    product, over_rows = weight.new_zeros(2, replicas, 1, columns)
    over_columns = weight.new_empty(replicas, rows)
    # all is split beforehand: to index takes as long as to multiply
    whole = (rows - 1) // height  # parts before the last
    rest = rows - whole * height
    spaces, units = [memory] * whole + [memory[:rest]], [ones] * whole + [ones[:, :rest]]
    for replica, matrix in enumerate(weight.data):
        factor, products, of_columns = row[replica], product[replica], over_rows[replica]
        moves, of_rows = column[replica].split(height), over_columns[replica].split(height)
        lefts = [None] * len(spaces) if left is None else left[replica].split(height, -1)
        of_parts = zip(matrix.split(height), moves, lefts, spaces, of_rows, units, strict=True)
        for part, move, of_outputs, space, sums_of_rows, unit in of_parts:
            if of_outputs is not None:
                products.addmm_(of_outputs, part)
            part.addmm_(move, factor)
            torch.abs(part, out=space)
            if -1 in dims:
                torch.sum(space, -1, out=sums_of_rows)
            if -2 in dims:
                of_columns.addmm_(unit, space)
    return product, over_rows, over_columns


def _add_by_compiler(
    weight: Tensor, column: Tensor, row: Tensor, left: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The same in one compiled loop; rows beyond a multiple of the block are left to torch."""
    replicas, rows, columns = weight.shape
    height = rows // _BLOCK
    whole = height * _BLOCK
    lefts = torch.zeros_like(column) if left is None else left.mT
    of_blocks = _memory(weight, 2 * height * columns).view(2, height, columns)
    sums, over_columns = weight.new_empty(2, replicas, 1, columns), weight.new_empty(replicas, rows)
    for replica, matrix in enumerate(weight.data):
        move, factor, of_outputs, of_rows = column[replica], row[replica], lefts[replica], over_columns[replica]
        blocks = (tensor[:whole].unflatten(0, (height, _BLOCK)) for tensor in (move, of_outputs, of_rows))
        # through numpy, since the compiler copies what shares memory with what it changes
        by_place = [torch.from_numpy(matrix.numpy()[place:whole:_BLOCK]) for place in range(_BLOCK)]
        _compiled(_add_outer_product)(by_place, factor, *blocks, *of_blocks)
        rest = matrix[whole:]
        torch.sum(of_blocks, 1, out=sums[:, replica, 0])
        sums[0, replica].addmm_(of_outputs[whole:].mT, rest)
        magnitudes = rest.addmm_(move[whole:], factor).abs()
        sums[1, replica] += magnitudes.sum(0)
        of_rows[whole:] = magnitudes.sum(-1)
    product, over_rows = sums
    return product, over_rows, over_columns


def _add_outer_product(
    by_place: list[Tensor],
    row: Tensor,
    columns: Tensor,
    lefts: Tensor,
    over_columns: Tensor,
    products: Tensor,
    over_rows: Tensor,
) -> None:
    """The step of all blocks of rows, and what it sums up of each block. As one loop it goes through memory once.

    Args:
        by_place: of every block the first row, of every block the second, and so on, each (blocks, in).
        row: (1, in).
        columns: (blocks, rows, 1).
        lefts: (blocks, rows, 1).
        over_columns: (blocks, rows), sums of magnitudes to be written.
        products: (blocks, in), l·W of the rows of each block to be written.
        over_rows: (blocks, in), sums of magnitudes to be written.
    """
    terms, magnitudes = [], []
    for place, rows in enumerate(by_place):
        terms.append(lefts[:, place] * rows)
        rows.addcmul_(columns[:, place], row)
        magnitudes.append(rows.abs())
    products.copy_(functools.reduce(torch.add, terms))
    over_rows.copy_(functools.reduce(torch.add, magnitudes))
    over_columns.copy_(torch.stack([each.sum(-1) for each in magnitudes], -1))


@contextlib.contextmanager
def columns_becoming_0(weight: Tensor, mask: Tensor) -> Iterator[None]:
    """Keep what is known of the sums of a weight (R, out, in) while columns of it are set to 0.

    Args:
        weight: that `follow_sums` knows, or any other, for which nothing is done.
        mask: (R, 1, in), true for these columns.
    """
    followed: _Followed | None = _followed.get(weight)
    sums = dict(followed.known(weight)) if followed is not None else {}
    if sums:
        replicas, _, columns = mask.nonzero(as_tuple=True)
        if -1 in sums:
            lost = weight.detach()[replicas, :, columns].abs()
            sums[-1] = sums[-1].index_put((replicas,), -lost, accumulate=True)
        if -2 in sums:
            sums[-2] = sums[-2].masked_fill(mask.squeeze(1), 0.0)
    yield
    if followed is not None and sums:
        followed.keep(weight, sums)


def sums_of_magnitudes(values: Tensor, dim: int) -> Tensor:
    """Σ|v| over dimension -1 or -2 of (..., rows, columns).

    What `add_outer_product` has summed is not summed again. On a CPU no magnitudes are written to main memory:
    sums of large matrices are one compiled loop, those of others, and of all where torch.compile does not work,
    are made of as many rows at a time as fit the cache.

    Example:
        >>> sums_of_magnitudes(torch.tensor([[1.0, -2.0], [-3.0, 4.0]]), -2)
        tensor([4., 6.])
    """
    followed: _Followed | None = _followed.get(values)
    if followed is not None and dim in (known := followed.known(values)):
        return known[dim]
    values = values.detach()
    if values.device.type != "cpu" or values.numel() <= _SMALL:
        return values.abs().sum(dim)
    rows, columns = values.shape[-2:]
    if rows * columns >= _LARGE and may_compile():
        try:
            return _sums_by_compiler(values, dim)
        except Exception as error:  # torch.compile raises many kinds
            give_up(error, "sums of magnitudes are not compiled, and take up to twice the time", stacklevel=2)
    stack = values.reshape(-1, rows, columns)
    parts = 1 if dim == -1 else max(2, torch.get_num_threads())  # each thread sums the rows that it has just made
    sums = values.new_zeros(len(stack), parts, rows if dim == -1 else columns)
    cached = PART * torch.get_num_threads()
    together = max(1, cached // (rows * columns))
    height = min(rows, max(1, cached // columns // parts) * parts)
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
    """|v| of numbers, in memory that the next call writes to."""
    return torch.abs(values, out=_memory(values, values.numel()).view(values.shape))


def _memory(like: Tensor, numbers: int) -> Tensor:
    """Memory for so many numbers, the same each time: fresh memory takes longer than sums."""
    kept = _kept.memory.get(like.dtype)
    if kept is None or kept.numel() < numbers:
        kept = _kept.memory[like.dtype] = like.new_empty(max(numbers, _SMALL))
    return kept[:numbers]


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


def _block_sums(blocks: Tensor) -> Tensor:
    """(..., blocks, rows of a block, columns) to (..., blocks, columns)."""
    return blocks.abs().sum(-2)


@functools.cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return compiling(function)
