"""Curvature estimators that look at a layer during the backward pass.

All estimate the curvature of the mean loss per example. Most see the rows of a layer: its inputs x of shape
(..., n, P, in) and the gradients d of its outputs, (..., n, P, out): n examples with P positions each (tokens, or
the places of a convolution's kernel; 1 for a plain batch). What arrives as d is the gradient of the mean over n
examples, so that one example's own gradient is n·d. Leading dimensions are independent: replicas, and the groups
of a convolution. Whole numbers x of shape (n, P) stand for one-hot inputs, such as the tokens of an embedding.

Between the backward pass and the step a gradient may be multiplied with a number: its norm is clipped, or it is
unscaled from mixed precision. Every observer finds that number by a projection of both gradients, so that its
estimate is of the gradient that the optimizer sees. Where it was changed otherwise too (clipped value by value,
say) the estimate stays, up to the size: that is followed where it is another by more than a factor of 4.
"""

import functools
import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from clagrange._checks import per_replica
from clagrange.distributed import everywhere, gathered, mean_over_processes, process_count
from clagrange.gaussian.kronecker import Factors, KroneckerPrecision, LowRank
from clagrange.gaussian.precision import DiagonalPrecision, looking_is_free


class Observer(ABC):
    """Adds up what an estimator needs of the parameters of one precision while gradients accumulate.

    Attributes:
        gathers: names of the attributes in which it does; see `clagrange.interventions.hooked.Hooked`.
    """

    gathers: ClassVar[tuple[str, ...]]

    @property
    def wanted(self) -> bool:
        """Whether the rows of the next backward pass are to be added."""
        return True

    @abstractmethod
    def clear(self) -> None:
        """Forget what was seen."""

    @abstractmethod
    def add(self, x: Tensor, d: Tensor) -> None:
        """Add the rows of one backward pass."""

    @abstractmethod
    def curvature(self, gradient: Tensor, examples: int, summed: float | None = None) -> Any:
        """The estimate, averaged over the processes of a group; None if nothing was seen.

        Args:
            gradient: of the mean loss, of the joint mean's shape.
            examples: n of this process.
            summed: for a loss that is a sum over examples, the mean of n over processes; None for a mean.
        """


class FactorObserver(Observer):
    """Kronecker factors: G = n Σ d dᵀ over examples and positions, A the mean over both of x xᵀ.

    They are exact for one example's gradient d xᵀ; over examples their product stands for the mean of d dᵀ ⊗ x xᵀ
    (K-FAC), and over positions these are taken to be independent (KFC). With the data's labels this is the
    empirical Fisher matrix; with labels drawn from the network's own prediction, the Fisher matrix.

    Args:
        precision: whose factors these are; it says when they are wanted, and which are diagonal.
        bias: whether a 1 is appended to the inputs.

    Source: Martens and Grosse (2015); for convolutions Grosse and Martens (2016).
    """

    gathers = ("_count", "_rows", "_sums", "_probe", "_keeping")

    def __init__(self, precision: KroneckerPrecision, bias: bool) -> None:
        self.precision = precision
        self.bias = bias
        self._keeping = True
        self.clear()

    @property
    def wanted(self) -> bool:
        """As often as the precision observes; always where the rows of a batch are few enough to be kept.

        Of several processes some might keep rows and some not, so that none does in between.
        """
        return self.precision.observes or (self._keeping and process_count() == 1)

    def clear(self) -> None:
        """Forget what was seen."""
        self._count = 0
        self._rows: tuple[Tensor, Tensor] | None = None  # x and d of all rows, while they are few
        self._sums: tuple[Tensor, Tensor] | None = None  # else their products
        self._probe: Tensor | None = None  # the gradient that they make, times a fixed vector

    def add(self, x: Tensor, d: Tensor) -> None:
        """Add rows of x, (..., n, P, in) or indices (..., n, P), and of d."""
        d = _floats(d).flatten(-3, -2)
        one_hot = not x.is_floating_point()
        if one_hot:
            x = x.flatten()
            projected = _signs(self.precision.inputs).to(d.dtype)[x].unsqueeze(-1)
        else:
            x = _floats(x).flatten(-3, -2)
            if self.bias:
                x = torch.cat([x, x.new_ones(*x.shape[:-1], 1)], -1)
            projected = projection(x, self.bias)
        probe = d.mT @ projected
        self._probe = probe if self._probe is None else self._probe + probe
        self._count += d.shape[-2]
        self._keeping = not one_hot and self._sums is None and self.precision.keeps(self._count)
        if self._keeping:
            if self._rows is not None:
                x, d = (torch.cat(parts, -2) for parts in zip(self._rows, (x, d), strict=True))
            self._rows = x, d
            return
        self._sum_rows()
        self._add_products(x, d)

    def _sum_rows(self) -> None:
        if self._rows is not None:
            self._add_products(*self._rows)
            self._rows = None

    def _add_products(self, x: Tensor, d: Tensor) -> None:
        if not self.precision.observes:
            return
        diagonal_outputs, diagonal_inputs = self.precision.diagonal_sides
        outputs = _squares(d, diagonal_outputs)
        if x.is_floating_point():
            inputs = _squares(x, diagonal_inputs)
        else:
            inputs = torch.bincount(x, minlength=self.precision.inputs.shape[-1]).to(d.dtype)
        if self._sums is not None:
            outputs, inputs = self._sums[0] + outputs, self._sums[1] + inputs
        self._sums = (outputs, inputs)

    def curvature(self, gradient: Tensor, examples: int, summed: float | None = None) -> Factors | LowRank | None:
        """The factors, or the rows that they are made of; of a multiplied gradient, G by that number squared.

        Rows say that they are the gradient too where that is certain.
        """
        if self._probe is None:
            return None
        if not everywhere(self._rows is not None, gradient.device):
            self._sum_rows()
            if self._sums is None:
                return None
        n, unit = _units(examples, summed)
        positions, processes = self._count / examples, process_count()
        projected = projection(gradient, self.bias)
        stacked = self.precision.stacked
        scale, error = proportion(projected, mean_over_processes(self._probe) * unit, stacked)
        if self._rows is not None:
            certain = float(error.max()) <= torch.finfo(gradient.dtype).eps ** 0.625
            x, d = self._rows
            d = d * per_replica(scale * (unit * (n / processes) ** 0.5), d)
            x, d = gathered(x / (n * positions * processes) ** 0.5, d)
            return LowRank(x, d, share=positions**0.5 if certain else None)
        assert self._sums is not None
        outputs, inputs = (
            mean_over_processes(part * weight)
            for part, weight in zip(self._sums, (n * unit**2, 1.0 / (n * positions)), strict=True)
        )
        return Factors(outputs * per_replica(scale.square(), outputs), inputs, processes * self._count)


class PerExampleObserver(Observer):
    """The mean over examples of the squares of their own gradients, n Σ (Σ_positions d x)².

    It is exact, except in a layer that is used several times in a pass (a recurrent cell): there the squares of
    each use are added, without the products between them.

    With labels drawn from the network's own prediction its expectation is the diagonal of the Fisher matrix, for
    a log-likelihood that of the Gauss-Newton matrix too; with the data's labels it is that of the empirical
    Fisher matrix. With one position it costs another product like that of the weight's gradient, (d²)ᵀ(x²); with
    more (a convolution) the same product example by example, and n squares of every weight.

    Args:
        precision: of the parameter that is observed.
    """

    gathers = ("_squares", "_probe")

    def __init__(self, precision: DiagonalPrecision) -> None:
        self.precision = precision
        self.clear()

    def clear(self) -> None:
        """Forget what was seen."""
        self._squares: Tensor | None = None
        self._probe: Tensor | None = None

    def add(self, x: Tensor, d: Tensor) -> None:
        """Add Σ (Σ_positions d x)²."""
        d = _floats(d)
        if x.is_floating_point():
            x = _floats(x)
            squares = _squares_by_example(x, d)
            x, d = x.flatten(-3, -2), d.flatten(-3, -2)
            probe = d.mT @ projection(x)
        else:
            squares = _squares_by_token(x, d, self.precision.precision.shape[0])
            probe = d.new_zeros(len(squares), 1).index_add_(0, x.flatten(), projection(d).flatten(0, 1))
        self._squares = squares if self._squares is None else self._squares + squares
        self._probe = probe if self._probe is None else self._probe + probe

    def curvature(self, gradient: Tensor, examples: int, summed: float | None = None) -> Tensor | None:
        """The mean of squares; of a multiplied gradient, by that number squared."""
        if self._squares is None or self._probe is None:
            return None
        n, unit = _units(examples, summed)
        squares, probe = (
            mean_over_processes(tensor) for tensor in (self._squares * (n * unit**2), self._probe * unit)
        )
        projected = projection(gradient.reshape(squares.shape))
        scale, _ = proportion(projected, probe, self.precision.stacked)
        return (squares * per_replica(scale.square(), squares)).reshape(gradient.shape)


class VarianceObserver(Observer):
    """The gradient of the variance itself: H = 2 ∂⟨L⟩/∂σ² over the draws of the weights.

    Where one draw w = μ + σε serves a batch this is g ε/σ with the gradient g at w; under local
    reparametrisation, Σ d ε x²/√(x²σ²) with the noise ε of each output. Its expectation is the diagonal of the
    Hessian averaged over the weights' distribution, whatever the loss, without a Gauss-Newton approximation (of
    outputs that are drawn position by position, without what connects the positions). So it can be negative, also
    because it is noisy: the standard deviation of one draw is about that of g, over σ. A belief averages it, and
    is not let below 0 (`DiagonalPrecision.observe`).

    It sees draws, not rows: `follow` hands out the mean and the variance from which they are made.

    Args:
        precision: of the parameter that is observed.

    Source: Price (1958) and Opper and Archambeau (2009) for the identity; Khan et al. (2018) for its use here.
    """

    gathers = ("_curvature", "_probe")

    def __init__(self, precision: DiagonalPrecision) -> None:
        self.precision = precision
        self.clear()

    @property
    def wanted(self) -> bool:
        """No rows."""
        return False

    def clear(self) -> None:
        """Forget what was seen."""
        self._curvature: Tensor | None = None
        self._probe: Tensor | None = None

    def add(self, x: Tensor, d: Tensor) -> None:
        """Rows say nothing here."""

    def follow(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """The same mean and variance; the gradients that reach what is returned are added up."""
        variance = variance.detach().requires_grad_()
        variance.register_hook(self._add_curvature)
        if mean.requires_grad:
            mean = mean.view_as(mean)
            mean.register_hook(self._add_probe)
        return mean, variance

    def _add_curvature(self, gradient: Tensor) -> None:
        self._curvature = 2.0 * gradient if self._curvature is None else self._curvature + 2.0 * gradient

    def _add_probe(self, gradient: Tensor) -> None:
        probe = self._project(gradient)
        self._probe = probe if self._probe is None else self._probe + probe

    def _project(self, gradient: Tensor) -> Tensor:
        first = 1 + self.precision.stacked
        matrix = _floats(gradient.unsqueeze(-1) if gradient.dim() == first else gradient.flatten(first))
        return projection(matrix)

    def curvature(self, gradient: Tensor, examples: int, summed: float | None = None) -> Tensor | None:
        """The estimate; of a multiplied gradient, by the same number. None without a draw, as in evaluation."""
        if self._curvature is None or self._probe is None:
            return None
        _, unit = _units(examples, summed)
        curvature, probe = (
            mean_over_processes(tensor) for tensor in (self._curvature * unit, self._probe * unit)
        )
        scale, _ = proportion(self._project(gradient), probe, self.precision.stacked)
        return curvature * per_replica(scale, curvature)


_BUDGET = 2**22
"""Numbers that may be held at once for the gradients of single examples."""


def _squares(rows: Tensor, diagonal: bool) -> Tensor:
    """Σ r rᵀ over rows, or its diagonal."""
    return rows.square().sum(-2) if diagonal else rows.mT @ rows


def _squares_by_example(x: Tensor, d: Tensor) -> Tensor:
    """Σ over examples of the squares of dᵀx: (..., out, in) from (..., n, P, in) and (..., n, P, out)."""
    if x.shape[-2] == 1:
        return d.squeeze(-2).square().mT @ x.squeeze(-2).square()
    size = x.shape[:-3].numel() * x.shape[-1] * d.shape[-1]
    total = x.new_zeros(*x.shape[:-3], d.shape[-1], x.shape[-1])
    for part_x, part_d in zip(*(tensor.split(max(1, _BUDGET // size), -3) for tensor in (x, d)), strict=True):
        total += (part_d.mT @ part_x).square().sum(-3)
    return total


def _squares_by_token(tokens: Tensor, d: Tensor, vocabulary: int) -> Tensor:
    """The same for one-hot inputs, as an embedding has it: (vocabulary, out) from (n, P) and (n, P, out)."""
    examples = torch.arange(len(tokens), device=tokens.device).unsqueeze(-1)
    pairs, where = torch.unique(examples * vocabulary + tokens, return_inverse=True)
    sums = d.new_zeros(len(pairs), d.shape[-1]).index_add_(0, where.flatten(), d.flatten(0, 1))
    return d.new_zeros(vocabulary, d.shape[-1]).index_add_(0, pairs % vocabulary, sums.square())


def _floats(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def projection(rows: Tensor, bias: bool = False) -> Tensor:
    """Rows (..., in) times a fixed vector of ±1 in no order, (..., 1).

    With a bias, (..., 2): their last entry stands for itself, as one of both parts may be frozen.
    """
    if not bias:
        return (rows @ _signs(rows)).unsqueeze(-1)
    rows, last = rows[..., :-1], rows[..., -1]
    return torch.stack([rows @ _signs(rows), last], -1)


def _signs(rows: Tensor) -> Tensor:
    return _fixed_signs(rows.shape[-1], rows.dtype, rows.device)


@functools.lru_cache(maxsize=256)
def _fixed_signs(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    index = torch.arange(size, device=device, dtype=torch.float64)
    return (torch.sin(index * index * 12.9898 + 1.0) > 0).to(dtype) * 2.0 - 1.0


def _units(examples: int, summed: float | None) -> tuple[float, float]:
    """n, and what the gradients of the outputs are to be multiplied with to be those of the mean loss."""
    return (examples, 1.0) if summed is None else (summed, 1.0 / summed)


def proportion(changed: Tensor, seen: Tensor, stacked: bool) -> tuple[Tensor, Tensor]:
    """c where a gradient is c times what was seen, to a tenth; and the relative error.

    Where the error is larger the gradient was replaced, or clipped value by value, perhaps after it was unscaled:
    there c is the median ratio of both sizes if that is far from 1, so that no scale of the loss is left, else 1.
    Entries that are 0 say nothing (a frozen part), unless all are.

    Args:
        changed: projections of the gradient by `projection`, (R, ...) if stacked.
        seen: the same of what the observer saw.
        stacked: whether each replica has a number of its own, (R,), or all is one block, ().
    """
    changed, seen = changed.flatten(int(stacked)), seen.flatten(int(stacked))
    c, error = _fit(changed, seen)
    multiplied = error <= 0.1
    if looking_is_free(changed) and bool(multiplied.all()):
        return c, error
    known = torch.where(changed == 0, 0.0, seen)
    c_known, error_known = _fit(changed, known)
    ratio = (changed / known).abs()
    ratio = torch.where(ratio.isfinite() & (ratio > 0), ratio, math.nan).nanmedian(-1).values
    ratio = torch.where((ratio < 0.25) | (ratio > 4.0), ratio, 1.0)
    return torch.where(multiplied, c, torch.where(error_known <= 0.1, c_known, ratio)), error


def _fit(changed: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """The c for which changed is nearest to c·seen, 1 where seen is 0; and the error relative to changed."""
    power = torch.linalg.vecdot(seen, seen)
    c = torch.where(power > 0, torch.linalg.vecdot(changed, seen) / power, 1.0)
    size = torch.linalg.vector_norm(changed, dim=-1).clamp(min=torch.finfo(c.dtype).tiny)
    return c, torch.linalg.vector_norm(changed - c.unsqueeze(-1) * seen, dim=-1) / size
