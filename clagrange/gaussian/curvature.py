"""Curvature estimators that look at the inputs and output gradients of a layer during the backward pass.

All estimate the curvature of the mean loss per example. A layer hands over, for every backward pass, its inputs
x of shape (..., n, P, in) and the gradients d of its outputs, (..., n, P, out): n examples with P positions each
(tokens, or the places of a convolution's kernel; 1 for a plain batch). What arrives as d is the gradient of the
mean over n examples, so that one example's own gradient is n·d. Leading dimensions are independent: replicas,
and the groups of a convolution.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from clagrange.distributed import mean_over_processes
from clagrange.gaussian.kronecker import KroneckerPrecision, LowRank


class Observer(ABC):
    """Adds up what an estimator needs of one pair of weight and bias while gradients accumulate."""

    @property
    def wanted(self) -> bool:
        """Whether the next backward pass is to be observed."""
        return True

    @abstractmethod
    def clear(self) -> None:
        """Forget what was seen."""

    @abstractmethod
    def add(self, x: Tensor, d: Tensor) -> None:
        """Add the inputs and output gradients of one backward pass."""

    @abstractmethod
    def curvature(self, gradient: Tensor, examples: int, unit: float = 1.0) -> Any:
        """The estimate, averaged over the processes of a group; None if nothing was seen.

        Args:
            gradient: of the mean loss, (..., out, in) with the bias as last column.
            examples: n of this process.
            unit: what the gradients of the outputs are to be multiplied with to be those of the mean loss.
        """


class FactorObserver(Observer):
    """Kronecker factors: G = n Σ d dᵀ over examples and positions, A the mean over both of x xᵀ.

    They are exact for one example's gradient d xᵀ; over examples their product stands for the mean of d dᵀ ⊗ x xᵀ
    (K-FAC), and over positions these are taken to be independent (KFC). The factors are also exact where d is that
    of labels drawn from the network's own prediction; with the data's labels this is the empirical Fisher matrix.

    Args:
        precision: whose factors these are; it says when they are wanted, and which are diagonal.
        bias: whether a 1 is appended to the inputs.

    Source: Martens and Grosse (2015); for convolutions Grosse and Martens (2016).
    """

    def __init__(self, precision: KroneckerPrecision, bias: bool) -> None:
        self.precision = precision
        self.bias = bias
        self._worth_keeping = True
        self.clear()

    @property
    def wanted(self) -> bool:
        """As often as the precision observes; always where a batch is small enough for a step of low rank."""
        return self.precision.observes or self._worth_keeping

    def clear(self) -> None:
        """Forget what was seen."""
        self._sums: tuple[Tensor, Tensor] | None = None
        self._probe: Tensor | None = None
        self._rows = 0
        self._pass: LowRank | None = None  # the only backward pass since

    def add(self, x: Tensor, d: Tensor) -> None:
        """Add Σ d dᵀ and Σ x xᵀ."""
        x, d = (_floats(tensor).flatten(-3, -2) for tensor in (x, d))
        if self.bias:
            x = torch.cat([x, x.new_ones(*x.shape[:-1], 1)], -1)
        probe = d.mT @ (x @ _signs(x)).unsqueeze(-1)
        rows = LowRank(x, d)
        self._worth_keeping = self.precision.prefers(rows)
        self._pass = rows if self._rows == 0 and self._worth_keeping else None
        self._probe = probe if self._probe is None else self._probe + probe
        self._rows += x.shape[-2]
        if not self.precision.observes:
            return
        sums = tuple(
            tensor.square().sum(-2) if diagonal else tensor.mT @ tensor
            for tensor, diagonal in zip((d, x), self.precision.diagonal_sides, strict=True)
        )
        if self._sums is not None:
            sums = tuple(old + new for old, new in zip(self._sums, sums, strict=True))
        self._sums = (sums[0], sums[1])

    def curvature(self, gradient: Tensor, examples: int, unit: float = 1.0) -> tuple[Tensor, Tensor] | None:
        """(G, A).

        Where the gradient is what was seen times a number, as after clipping its norm or unscaling it from mixed
        precision, that number squared scales G: the estimate is of the gradient that the optimizer sees.
        """
        if self._sums is None or self._probe is None:
            return None
        outputs, inputs, probe = (
            mean_over_processes(tensor)
            for tensor in (self._sums[0] * (examples * unit**2), self._sums[1] / self._rows, self._probe * unit)
        )
        scale, _ = _proportion(gradient, probe)
        return outputs * scale.square().view(*scale.shape, *[1] * (outputs.dim() - scale.dim())), inputs

    def low_rank(self, gradient: Tensor) -> LowRank | None:
        """The gradient as dᵀx, if it is that of the one backward pass up to a number, and the pass was kept."""
        if self._pass is None or self._probe is None:
            return None
        scale, error = _proportion(gradient, self._probe)
        if float(error.max()) > torch.finfo(gradient.dtype).eps ** 0.625:
            return None
        x, d = self._pass
        return LowRank(x, d * scale[..., None, None])


def _floats(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _signs(rows: Tensor) -> Tensor:
    """A fixed vector of ±1 in no order, of the last dimension's size."""
    index = torch.arange(rows.shape[-1], device=rows.device, dtype=torch.float64)
    return (torch.sin(index * index * 12.9898 + 1.0) > 0).to(rows.dtype) * 2.0 - 1.0


def _proportion(gradient: Tensor, probe: Tensor) -> tuple[Tensor, Tensor]:
    """c where a gradient, multiplied with `_signs`, is c·``probe`` to a tenth, 1 elsewhere; and the relative error.

    For each leading block.
    """
    changed, seen = (gradient @ _signs(gradient)), probe.squeeze(-1)
    power = seen.square().sum(-1)
    c = torch.where(power > 0, (changed * seen).sum(-1) / power, torch.ones_like(power))
    size = changed.square().sum(-1).clamp(min=torch.finfo(power.dtype).tiny)
    error = ((changed - c.unsqueeze(-1) * seen).square().sum(-1) / size).sqrt()
    return torch.where(error <= 0.1, c, torch.ones_like(c)), error
