"""The matrix-Gaussian precision: a Kronecker product of two factors, with a prior."""

import copy
import math
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clagrange._checks import Number, check_choice, check_count, check_fraction, per_replica
from clagrange.dynamics import relaxation_fraction
from clagrange.gaussian.factors import (
    Eigen,
    damped_inverse,
    eigen,
    follow,
    left_product,
    merged_product,
    right_product,
)
from clagrange.gaussian.precision import Precision, Product, looking_is_free

_EXAMPLES = 16
"""Examples of a batch for which the factors are observed once, by default."""
_SMALL = 256
"""Width up to which a factor is inverted at every step where batches have no fewer rows."""
_REFRESH = {"factored": 20, "exact": 10}
"""Default age at which the inverse of a factor is made anew."""
_ROWS = {"outputs": "d", "inputs": "x"}
"""Where `LowRank` has the rows of a factor."""
_FADED = 0.5
"""Share of its damping with which, by default, an inverse is still used."""
_COUNTERS = ("interval", "since_observation", "due", "current", "age", "damped", "merges")


class LowRank(NamedTuple):
    """What was seen of the factors, as the rows of a small batch: Ĝ = dᵀd and Â = xᵀx.

    Attributes:
        x: (..., N, in).
        d: (..., N, out).
        examples: of the batch, over all processes, by which the default interval of observations goes.
        share: the number with which the gradient of the step is share·dᵀx; None where that is not known.
    """

    x: Tensor
    d: Tensor
    examples: int = 1
    share: float | None = None


class Factors(NamedTuple):
    """What was seen of the factors.

    Attributes:
        outputs: Ĝ, or its diagonal.
        inputs: Â, or its diagonal.
        rows: the number of rows of which they are sums.
        examples: of the batch, over all processes, by which the default interval of observations goes.
    """

    outputs: Tensor
    inputs: Tensor
    rows: int
    examples: int = 1


class KroneckerPrecision(Precision):
    """The precision S = (G ⊗ A + δ·I)/T of a matrix of weights, with the prior N(μ_p, σ_p²), δ = T/σ_p².

    The mean is W of shape (out, in), with the bias as its last column where there is one; vec runs over its rows.
    A is the mean of x xᵀ over the inputs x (a 1 appended for the bias), G the mean over examples of d dᵀ for the
    gradients d of one example's loss with respect to the outputs. Their product stands for the curvature of the
    mean loss per example (K-FAC's approximation of the Fisher matrix).

    The axes are the eigenvectors of both factors, A = U diag(a) Uᵀ, G = V diag(b) Vᵀ: along axis (i, j) the
    precision is (b_i a_j + δ)/T. Variances, samples, entropy, divergence and injection are exact there. Factors
    are averages of squares, and the prior adds δ > 0, so that the precision cannot lose positive-definiteness.

    Each factor relaxes by itself, F ← F + r(F̂ − F). That is the usual approximation of the flow of S, which would
    relax the product: after a change of both factors it runs ahead of or behind the exact one by
    r(1 − r)(Ĝ − G) ⊗ (Â − A) in a step. There is no belief beside the factors.

    The mean moves by −φ(G ⊗ A + δ)⁻¹ g, φ = `relaxation_fraction`(lr, discount): S is always at the equilibrium
    of its curvature, so that all directions share one stable root. With ``damping="factored"`` the inverse is
    (G + √δ/π)⁻¹ ⊗ (A + π√δ)⁻¹, π² = (tr A/in)/(tr G/out) (Martens and Grosse 2015), which adds cross terms,
    needs no eigenvectors, and has been the more robust; with "exact" it is taken along the axes.

    Once consolidated, the prior is a product too: its precision is P = G_p ⊗ A_p + 1/σ_p², kept in units of
    precision so that it stays what it is when T changes. The posterior (G ⊗ A)/T + P is no single product;
    wherever this class says G and A, the `merged_product` of both stands for it, which is exact right after
    consolidation, and later as long as A or G is as it was but for a factor. The pull toward the prior,
    P(μ − μ_p), and the divergence from it are those of the exact P.

    Args:
        mean: shape (..., out, in); leading dimensions are independent blocks (groups of a convolution).
        prior_mean: "zero", or "initial" for the present value of ``mean``.
        prior_variance: σ_p², in squared units of the weight; a number or a tensor of shape (R,).
        stacked: whether the first dimension of ``mean`` is that of replicas.
        damping: "factored" or "exact".
        observe_every: steps from one observation of the factors to the next; None for one step for
            every 16 examples of the last batch, at most 20 or ``refresh_every``: 1 up to a batch of 31, 4 at 64.
        refresh_every: steps from one inversion of the factors to the next. In between the inverses follow the
            rows of small batches (on a CPU, with factored damping, before any consolidation), while the damping
            fades like what was seen before, by 1 − r with every step. None for 20 observations where the
            inverses follow them, or until half of the damping has faded; else for 20 steps, and 10 with "exact"
            damping: eigenvectors do not follow, and a trust region above .2 has diverged from axes ten steps old.
        diagonal_inputs: keep only the diagonal of A: exact where inputs are one-hot, and what is left where a
            layer is too wide for a full factor.
        diagonal_outputs: keep only the diagonal of G.

    Attributes:
        inputs: A, (..., in, in), or (..., in) if diagonal; starts at 0.
        outputs: G, (..., out, out), or (..., out) if diagonal; starts at 0.
        temperature: T of the last step; 1 before it.
        prior_inputs: A_p once consolidated, of the shape of A; None before.
        prior_outputs: G_p once consolidated, of the shape of G; None before.

    Source: the Gaussian flow is that of Vastola, Gershman, Rajan (2025), section 6, for a full precision; the
    factors are those of Martens and Grosse (2015).

    Example:
        >>> precision = KroneckerPrecision(torch.zeros(4, 9), prior_variance=0.5)
        >>> precision.variance().shape, float(precision.variance().mean())
        (torch.Size([4, 9]), 0.5)
    """

    inputs: Tensor
    outputs: Tensor
    temperature: Tensor
    prior_inputs: Tensor | None
    prior_outputs: Tensor | None
    replica_lists = tuple(f"_{name}" for name in _COUNTERS)
    host_state = replica_lists
    input_solver: Tensor
    output_solver: Tensor
    input_damping: Tensor
    output_damping: Tensor
    solver_spectrum: Tensor

    def __init__(
        self,
        mean: Tensor,
        *,
        prior_mean: str = "zero",
        prior_variance: Number = 1.0,
        stacked: bool = False,
        damping: str = "factored",
        observe_every: int | None = None,
        refresh_every: int | None = None,
        diagonal_inputs: bool = False,
        diagonal_outputs: bool = False,
    ) -> None:
        super().__init__(mean, prior_mean, prior_variance, stacked)
        check_choice("damping", damping, ("factored", "exact"))
        if observe_every is not None:
            check_count("observe_every", observe_every)
        if refresh_every is not None:
            check_count("refresh_every", refresh_every)
        self.damping = damping
        self.observe_every = observe_every
        self.refresh_every = refresh_every
        *leading, rows, columns = mean.shape
        dtype, device = self.prior_precision.dtype, mean.device
        for side, size, diagonal in (("inputs", columns, diagonal_inputs), ("outputs", rows, diagonal_outputs)):
            shape = (*leading, size) if diagonal else (*leading, size, size)
            self.register_buffer(side, torch.zeros(shape, dtype=dtype, device=device))
            self.register_buffer(f"prior_{side}", None)
            self.register_buffer(f"{side[:-1]}_solver", torch.zeros(shape, dtype=dtype, device=device))
            self.register_buffer(f"{side[:-1]}_damping", torch.ones((*leading, 1, 1), dtype=dtype, device=device))
        self.register_buffer("temperature", torch.ones_like(self.prior_precision))
        if damping == "exact":
            self.register_buffer("solver_spectrum", torch.ones(mean.shape, dtype=dtype, device=device))
        self._seen: Factors | LowRank | None = None
        self._rows: LowRank | None = None  # of the last step
        self._followed: dict[str, Tensor] = {}  # the inverses applied to these, where they followed them
        replicas = len(mean) if stacked else 1  # each goes by itself, as it would alone
        self._interval = [1] * replicas  # the first step is observed
        self._since_observation = [0] * replicas
        self._due = [True] * replicas  # whatever the interval
        self._current = [False] * replicas  # whether the inverses followed the last observation
        self._age = [0] * replicas  # of the inverses, in steps
        self._damped = [1.0] * replicas  # what has not faded of their damping
        self._merges = [False] * replicas  # whether the prior is consolidated
        self._axes: tuple[Any, Eigen, Eigen] | None = None

    # ------------------------------------------------------------------------------------------- learning
    @property
    def observes(self) -> bool:
        """Whether the factors of the next step are wanted."""
        return any(self._observed_after())

    def _observed_after(self) -> list[int]:
        """After how many steps the factors are observed in the next one, 0 where they are not."""
        states = zip(self._since_observation, self._interval, strict=True)
        return [steps + 1 if steps + 1 >= interval else 0 for steps, interval in states]

    @property
    def replay_key(self) -> Hashable:
        """After how many steps the factors are observed, 0 where they are not.

        None in steps that invert them, where replicas differ, and on a CPU, where steps look at numbers.
        """
        if looking_is_free(self.inputs) or any(self._refreshes()):
            return None
        steps = set(self._observed_after())
        return steps.pop() if len(steps) == 1 else None

    def step_replayed(self) -> None:
        """Count on, as `relax` and `step` do elsewhere than on a CPU; factors that replays change tell nobody."""
        self._axes = None
        self._count(self._observed_after())
        self._age = [age + 1 for age in self._age]

    def observe(self, curvature: Factors | LowRank | None, decay: Number = 0.0) -> None:
        """Note the factors of a batch, or its rows, for `relax` and `displacement`.

        ``decay`` has no part in it: there is no belief beside the factors.
        """
        self._seen = curvature

    def relax(self, temperature: Number, fraction: Number) -> None:
        """A ← A + r(Â − A) and G ← G + r(Ĝ − G), for every step since the last observation at once.

        An observation that is not finite changes neither factor (in that replica).
        """
        self._note_temperature(temperature)
        seen, observed = self._seen, self._observed_after()
        self._seen = None
        self._rows = seen if isinstance(seen, LowRank) else None
        self._followed = {}
        if seen is None or not any(observed):
            self._count([0] * len(observed))
            return
        self._count(observed)
        longest = self.refresh_every or _REFRESH[self.damping]
        interval = self.observe_every or min(max(1, seen.examples // _EXAMPLES), longest)
        self._interval = [interval if now else own for now, own in zip(observed, self._interval, strict=True)]
        steps: Number = observed[0]
        if len(set(observed)) > 1:
            device = fraction.device if isinstance(fraction, Tensor) else self.inputs.device
            steps = torch.tensor(observed, dtype=self.inputs.dtype, device=device)
        share = 1.0 - (1.0 - fraction) ** steps
        shown = seen
        seen, share = self._usable(seen, share)
        if not isinstance(share, Tensor) and share == 0.0:
            return
        due = all(self._refreshes())
        following = [side for side in ("outputs", "inputs") if self._can_follow(side, seen)]
        able = [now > 0 and not merges for now, merges in zip(observed, self._merges, strict=True)]
        states = zip(observed, able, self._current, strict=True)
        self._current = [len(following) == 2 and can if now else was for now, can, was in states]
        for side in ("outputs", "inputs"):
            factor = getattr(self, side)
            if isinstance(seen, LowRank):
                self._add_rows(factor, getattr(seen, _ROWS[side]), per_replica(share, factor))
            else:
                weight = per_replica(share, factor)
                weight = weight.to(factor) if isinstance(weight, Tensor) else weight
                factor.lerp_(getattr(seen, side).to(factor.dtype), weight)
            if side in following and any(able) and not due:
                self._follow(side, seen, share, able)
        if seen is not shown:
            self._followed = {}  # a step by what is not finite is not to look finite

    def _count(self, observed: list[int]) -> None:
        """Count a step in which the factors of some replicas were observed."""
        states = zip(observed, self._since_observation, strict=True)
        self._since_observation = [0 if now else steps + 1 for now, steps in states]

    def _note_temperature(self, temperature: Number) -> None:
        value = per_replica(temperature, self.temperature)
        if isinstance(value, Tensor):
            self.temperature.copy_(value)
        else:
            self.temperature.fill_(value)

    def _usable(self, seen: Factors | LowRank, share: Number) -> tuple[Factors | LowRank, Number]:
        """What was seen and its share, both 0 where a factor of it is not finite.

        Factors are sums of squares: where one is not finite, neither is its diagonal.
        """
        first = int(self.stacked)
        if isinstance(seen, LowRank):
            diagonals = [rows.square().sum(-2) for rows in (seen.d, seen.x)]
        else:
            diagonals = [
                factor if alone else factor.diagonal(dim1=-2, dim2=-1)
                for factor, alone in zip((seen.outputs, seen.inputs), self.diagonal_sides, strict=True)
            ]
        usable = torch.stack([diagonal.flatten(first).isfinite().all(-1) for diagonal in diagonals]).all(0)
        if looking_is_free(self.inputs):
            if bool(usable.all()):
                return seen, share
            if not bool(usable.any()):
                return seen, 0.0

        def emptied(part: Tensor) -> Tensor:
            return torch.where(usable.view(*usable.shape, *[1] * (part.dim() - usable.dim())), part, 0.0)

        share = usable.to(self.inputs.dtype) * (share.to(self.inputs) if isinstance(share, Tensor) else share)
        if isinstance(seen, LowRank):
            return seen._replace(d=emptied(seen.d), x=emptied(seen.x)), share
        return seen._replace(outputs=emptied(seen.outputs), inputs=emptied(seen.inputs)), share

    def _add_rows(self, factor: Tensor, rows: Tensor, share: Number) -> None:
        """factor ← factor + share·(rowsᵀrows − factor)."""
        if factor.dim() < self.prior_precision.dim():
            factor.lerp_(rows.square().sum(-2).to(factor.dtype), torch.as_tensor(share, dtype=factor.dtype))
            return
        if isinstance(share, Tensor):
            factor.mul_(1.0 - share)
            rows, kept, added = rows * share.sqrt(), 1.0, 1.0
        else:
            kept, added = 1.0 - share, share
        flat, many = (tensor.view(-1, *tensor.shape[-2:]) for tensor in (factor, rows.contiguous()))
        torch.baddbmm(flat, many.mT, many, beta=kept, alpha=added, out=flat)

    def _can_follow(self, side: str, seen: Factors | LowRank) -> bool:
        """Whether the inverse of a factor is kept current, which must cost no more than to observe the factor.

        By the rows of a small batch; of a small factor by inversion. Otherwise, and on a GPU, where looking
        whether that is safe would be to wait, inverses stay as they are until the refresh.
        """
        here = looking_is_free(self.inputs) and self.damping == "factored"
        return here and (isinstance(seen, LowRank) or self._is_small(side, seen))

    def _is_small(self, side: str, seen: Factors | LowRank) -> bool:
        """Whether a factor is as quickly inverted as observed."""
        count = seen.x.shape[-2] if isinstance(seen, LowRank) else seen.rows
        return self._diagonal(side) or getattr(self, side).shape[-1] <= min(count, _SMALL)

    def _follow(self, side: str, seen: Factors | LowRank, share: Number, replicas: list[bool]) -> None:
        """Bring the inverse of a factor up to date in some replicas."""
        factor, name = getattr(self, side), side[:-1]
        solver, damping = getattr(self, f"{name}_solver"), getattr(self, f"{name}_damping")
        if self._is_small(side, seen):
            here = _places(replicas)
            solver[here] = damped_inverse(factor[here], damping[here], self._diagonal(side))
            return
        assert isinstance(seen, LowRank)
        if any(self._merges):
            share = share * torch.tensor(replicas, dtype=factor.dtype, device=factor.device)
        self._followed[side] = follow(solver, getattr(seen, _ROWS[side]), per_replica(share, factor))
        if len(self._followed) == 1:  # once for both sides
            lost = share.tolist() if isinstance(share, Tensor) and share.dim() else [float(share)] * len(replicas)
            self._damped = [left * (1.0 - part) for left, part in zip(self._damped, lost, strict=True)]

    def _refreshes(self) -> list[bool]:
        """Whether the factors are inverted in the next step, in each replica."""
        fixed = self.refresh_every
        every, faded = (_REFRESH[self.damping], _FADED) if fixed is None else (fixed, 0.0)
        longest = [
            every * interval if current and fixed is None else every
            for current, interval in zip(self._current, self._interval, strict=True)
        ]
        states = zip(self._due, self._age, longest, self._damped, strict=True)
        return [due or age + 1 >= most or left < faded for due, age, most, left in states]

    @property
    def needs_mean(self) -> bool:
        """With factored damping only in a step that inverts the factors, when the prior pulls."""
        return self.damping == "exact" or any(self._refreshes())

    def step(
        self,
        mean: Tensor,
        gradient: Tensor,
        *,
        lr: Number,
        temperature: Number,
        discount: Number = math.inf,
        trust_region: Number = math.inf,
        prior_pull: Number = 1.0,
    ) -> Tensor | Product:
        """−φ(G ⊗ A + δ)⁻¹(g + TP(μ − μ_p)), at most ``trust_region`` posterior standard deviations.

        The length of the step is √(Δᵀ S Δ / D) over the D weights: the root mean square of the step along the
        axes, each in units of its own standard deviation; D/2 times its square is the KL divergence between the
        posteriors before and after the step. With "factored" damping it is measured by the inverse in use, which
        makes it an upper bound. A longer step is scaled down as a whole. The prior's pull is part of an "exact"
        step; with "factored" damping it is outside of the bound and acts when the factors are inverted, for all
        steps in between.

        At first nothing holds a weight but the prior, and steps are long: leave the bound finite.

        Where the rows of a small batch make the step it is a `Product`.
        """
        refreshed, needs_mean = self._refreshes(), self.needs_mean
        ages = [age + 1 for age in self._age]
        self._age = [0 if fresh else age for age, fresh in zip(ages, refreshed, strict=True)]
        if any(refreshed):
            self._refresh(temperature, refreshed)
        fraction = per_replica(relaxation_fraction(lr, discount), gradient)
        temperature, bound, prior_pull = (
            per_replica(value, gradient) for value in (temperature, trust_region, prior_pull)
        )
        exact = self.damping == "exact"
        pull = None
        if needs_mean and (isinstance(prior_pull, Tensor) or prior_pull > 0.0):
            pull = prior_pull * temperature * self._times_prior(mean - self.prior_mean)
        if exact and pull is not None:
            gradient = gradient + pull
        rows, self._rows = self._rows, None
        solved = None if rows is None else self._solved(rows)
        self._followed = {}
        if rows is None or solved is None:
            step = self._apply_solver(gradient)
            power = self._product(step, gradient)
        else:  # the same without a pass over a matrix of the gradient's size
            d, x, share = solved
            power = share**2 * self._product(d @ rows.d.mT, x @ rows.x.mT)
        power = power.clamp(min=0.0) / math.prod(self.shape[int(self.stacked) :])
        length = fraction * (power / temperature).sqrt()
        tiny = torch.finfo(length.dtype).tiny
        scale = -fraction * (bound / length.clamp(min=tiny)).clamp(max=1.0)
        if solved is None:
            step.mul_(scale)
        else:
            product = Product(d * (share * scale), x)
            if pull is None:
                return product
            step = product.multiplied()
        if pull is not None and not exact:
            steps: Number = ages[0]
            if self.stacked:  # none where the inverse stays
                late = [age * fresh for age, fresh in zip(ages, refreshed, strict=True)]
                steps = per_replica(torch.tensor(late), gradient)
            back, way = self._apply_solver(pull), 1.0 - (1.0 - fraction) ** steps
            if any(self._merges):  # merged factors may understate P: no further than to the optimum along the way
                held = prior_pull * temperature * self._times_prior(back)
                optimum = self._product(back, pull) / self._product(back, held).clamp(min=tiny)
                way = torch.as_tensor(way, dtype=optimum.dtype, device=optimum.device).expand_as(optimum).clone()
                here = _places(self._merges)
                way[here] = torch.minimum(optimum[here], way[here])
            step -= way * back
        return step

    def _product(self, one: Tensor, other: Tensor) -> Tensor:
        """The inner product of two matrices of weights, for each replica, to broadcast against them."""
        first = int(self.stacked)
        product: Tensor = torch.linalg.vecdot(one.flatten(first), other.flatten(first))
        return product.view(*product.shape, *[1] * (one.dim() - first))

    def _refresh(self, temperature: Number, replicas: list[bool]) -> None:
        """Invert the factors of some replicas."""
        self._due = [False] * len(replicas)
        self._followed = {}
        damped = zip(self._damped, replicas, strict=True)
        self._damped = [1.0 if fresh else left for left, fresh in damped]
        here = _places(replicas)
        damping = per_replica(temperature, self.prior_precision) * self.prior_precision
        if self.damping == "exact":
            rows, columns = self._eigen()
            spectrum = rows.values.unsqueeze(-1) * columns.values.unsqueeze(-2) + damping
            self.solver_spectrum[here] = spectrum[here]
            for solver, axes in ((self.output_solver, rows), (self.input_solver, columns)):
                if axes.vectors is not None:
                    solver[here] = axes.vectors[here]
            return
        outputs, inputs = self._merged()
        ratio = (_mean_eigenvalue(inputs, self) / _mean_eigenvalue(outputs, self)).sqrt()
        ratio = torch.where(ratio.isfinite() & (ratio > 0.0), ratio, torch.ones_like(ratio))
        root = damping.sqrt()
        for side, factor, value in (("input", inputs, ratio * root), ("output", outputs, root / ratio)):
            damping, solver = getattr(self, f"{side}_damping"), getattr(self, f"{side}_solver")
            damping[here] = value[here].to(damping.dtype)
            solver[here] = damped_inverse(factor[here], damping[here], self._diagonal(f"{side}s"))

    def keeps(self, count: int) -> bool:
        """Whether so many rows are kept as they are: while they are fewer than a side that they can follow."""
        sides = [
            factor.shape[-1]
            for factor in (self.outputs, self.inputs)
            if factor.dim() == self.prior_precision.dim()
        ]
        return looking_is_free(self.inputs) and any(count < size for size in sides)

    def _solved(self, rows: LowRank) -> tuple[Tensor, Tensor, float] | None:
        """d G̃⁻¹, x Ã⁻¹ and the share with which they make the step, where that is the cheaper way to it."""
        if rows.share is None or any(self.diagonal_sides) or self.damping != "factored":
            return None
        count, sizes = rows.x.shape[-2], {"outputs": rows.d.shape[-1], "inputs": rows.x.shape[-1]}
        unsolved = sum(size**2 for side, size in sizes.items() if side not in self._followed)
        product = math.prod(sizes.values())
        if count * (unsolved + product) >= product * sum(sizes.values()):
            return None
        d, x = (
            self._followed[side] if side in self._followed else part @ getattr(self, f"{side[:-1]}_solver")
            for side, part in (("outputs", rows.d), ("inputs", rows.x))
        )
        return d, x, rows.share

    def _apply_solver(self, gradient: Tensor) -> Tensor:
        rows, columns = self._diagonal("outputs"), self._diagonal("inputs")
        if self.damping == "factored":
            product = right_product(gradient, self.input_solver, columns)
            return self.output_solver.unsqueeze(-1) * product if rows else self.output_solver @ product
        inner = gradient if columns else gradient @ self.input_solver
        inner = (inner if rows else self.output_solver.mT @ inner) / self.solver_spectrum
        inner = inner if columns else inner @ self.input_solver.mT
        return inner if rows else self.output_solver @ inner

    # --------------------------------------------------------------------------------------- the posterior
    def spectrum(self) -> Tensor:
        """(b_i a_j + δ)/T along axis (i, j)."""
        rows, columns = self._eigen()
        product = rows.values.unsqueeze(-1) * columns.values.unsqueeze(-2)
        return product / self.temperature + self.prior_precision

    def to_axes(self, values: Tensor) -> Tensor:
        """Vᵀ W U."""
        rows, columns = self._eigen()
        inner = values if columns.vectors is None else values @ columns.vectors
        return inner if rows.vectors is None else rows.vectors.mT @ inner

    def from_axes(self, values: Tensor) -> Tensor:
        """V W Uᵀ."""
        rows, columns = self._eigen()
        inner = values if columns.vectors is None else values @ columns.vectors.mT
        return inner if rows.vectors is None else rows.vectors @ inner

    def variance(self) -> Tensor:
        """The diagonal of S⁻¹: Σ_ij V²_oi U²_kj T/(b_i a_j + δ)."""
        rows, columns = self._eigen()
        inner = self.spectrum().reciprocal()
        if columns.vectors is not None:
            inner = inner @ columns.vectors.square().mT
        return inner if rows.vectors is None else rows.vectors.square() @ inner

    def widen(self, fraction: Number, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
        """Move the precision toward the prior's: of the whole, or of some rows or columns of the weights.

        Of the whole it is S ← S + fraction·(S_prior − S). Of rows (the units of a layer) it is G ← DGD with
        D = √(1 − fraction) there and 1 elsewhere, which removes the same fraction of the information on a row
        with itself, and less of what it shares with others; of columns (its inputs) likewise in A. Both together
        act one after the other.

        Args:
            fraction: in [0, 1].
            rows: true at the rows to widen, (out,) or (..., out).
            columns: true at the columns to widen, (in,) or (..., in).
        """
        check_fraction("fraction", fraction)
        if rows is None and columns is None:
            self.outputs.mul_(1.0 - per_replica(fraction, self.outputs))
        changed = torch.as_tensor(fraction, device=self.outputs.device).expand(len(self._due)) > 0.0
        masks = [(side, mask) for side, mask in (("outputs", rows), ("inputs", columns)) if mask is not None]
        for side, mask in masks:
            self._fade(getattr(self, side), side, mask, fraction)
        if masks:
            first = int(self.stacked)
            changed = changed & torch.stack(
                [mask.expand(*self.shape[:-2], mask.shape[-1]).flatten(first).any(-1) for _, mask in masks]
            ).any(0)
        self._due = [due or now for due, now in zip(self._due, changed.tolist(), strict=True)]

    def widen_part(self, fraction: Number, axes: Tensor | None, units: Tensor | None) -> None:
        """`widen` of some rows."""
        if units is None:
            raise ValueError(
                "where: expected 'everywhere' or 'low_utility' to widen a Kronecker precision, got "
                "'low_curvature': it is a product, and cannot be wider along some axes alone; leave widen=0 and "
                "multiply=1, since axes of low curvature are near the prior as they are"
            )
        self.widen(fraction, rows=units)

    def _by_unit(self, values: Tensor) -> Tensor:
        return values.sum(-1)

    def multiply(self, factor: Number) -> None:
        """G ← G/factor."""
        self.widen(1.0 - 1.0 / factor)

    def forget_curvature(self) -> None:
        """G ⊗ A ← 0."""
        self._forget()

    def set_to_equilibrium(self, temperature: Number, believed: Number, relaxed: Number) -> None:
        """G ← G/relaxed and A ← A/relaxed: S is always at the equilibrium of its factors."""
        for factor in (self.outputs, self.inputs):
            factor.div_(per_replica(relaxed, factor))
        self._note_temperature(temperature)
        self._due = [True] * len(self._due)

    def _fade(self, factor: Tensor, side: str, mask: Tensor, fraction: Number) -> None:
        """factor ← D·factor·D with D = √(1 − fraction) where ``mask`` is true, 1 elsewhere."""
        keep = torch.where(
            mask.expand(factor.shape[: factor.dim() - (not self._diagonal(side))]),
            1.0 - per_replica(fraction, factor[..., 0] if not self._diagonal(side) else factor),
            torch.ones((), dtype=factor.dtype, device=factor.device),
        )
        if not self._diagonal(side):
            root = keep.sqrt()
            keep = root.unsqueeze(-1) * root.unsqueeze(-2)
        factor.mul_(keep)

    def reset(self, mask: Tensor | None = None) -> None:
        """G ⊗ A ← 0; with a mask of the mean's shape, in the rows and columns that it covers entirely.

        G_p ⊗ A_p ← 0 and μ_p ← μ_0 there as well.
        """
        if mask is None:
            self._return_to_origin()
            self._forget()
            return
        mask = mask.expand(self.shape)
        rows, columns = mask.all(-1), mask.all(-2)
        self.widen(1.0, rows=rows, columns=columns)
        if self.prior_outputs is not None and self.prior_inputs is not None:
            self._fade(self.prior_outputs, "outputs", rows, 1.0)
            self._fade(self.prior_inputs, "inputs", columns, 1.0)
            covered = rows.unsqueeze(-1) | columns.unsqueeze(-2)
            self.prior_mean.copy_(torch.where(covered, self.origin[0], self.prior_mean))

    def _forget(self) -> None:
        """G ⊗ A ← 0, to be observed and inverted in the next step."""
        self.outputs.zero_()
        self.inputs.zero_()
        replicas = len(self._due)
        self._interval, self._since_observation, self._due = [1] * replicas, [0] * replicas, [True] * replicas

    # ------------------------------------------------------------------------------------------- the prior
    def consolidate(self, mean: Tensor, weight: Number = 1.0) -> None:
        """μ_p ← mean, G_p ⊗ A_p ← weight·(S − 1/σ_p²), G ⊗ A ← 0."""
        outputs, inputs = self._merged()
        outputs = outputs / self._of_factor(self.temperature, "outputs")
        self._centre_prior(mean)
        self.prior_outputs = per_replica(weight, outputs) * outputs
        self.prior_inputs = inputs.clone()
        self._merges = [True] * len(self._merges)
        self._forget()

    def kl(self, mean: Tensor) -> Tensor:
        """KL divergence from N(mean, S⁻¹) to the prior, in nats: a number, or shape (R,).

        ½ [tr(P S⁻¹) − D + log det S − log det P + (μ − μ_p)ᵀP(μ − μ_p)] over D weights.
        """
        if self.prior_outputs is None or self.prior_inputs is None:
            return super().kl(mean)
        spectrum, (rows, columns) = self.spectrum(), self._eigen()
        along_rows, along_columns = rows.project(self.prior_outputs), columns.project(self.prior_inputs)
        along = along_rows.unsqueeze(-1) * along_columns.unsqueeze(-2) + self.prior_precision
        own_rows = eigen(self.prior_outputs, self._diagonal("outputs")).values
        own_columns = eigen(self.prior_inputs, self._diagonal("inputs")).values
        prior = own_rows.unsqueeze(-1) * own_columns.unsqueeze(-2) + self.prior_precision
        offset = mean - self.prior_mean
        shift = offset * self._times_prior(offset)
        return self._total(0.5 * (along / spectrum - 1.0 + spectrum.log() - prior.log() + shift))

    def _times_prior(self, values: Tensor) -> Tensor:
        """P applied to a matrix: V/σ_p² + G_p V A_p."""
        product = self.prior_precision * values
        if self.prior_outputs is None or self.prior_inputs is None:
            return product
        rows, columns = self.diagonal_sides
        return product + left_product(self.prior_outputs, right_product(values, self.prior_inputs, columns), rows)

    def _merged(self) -> tuple[Tensor, Tensor]:
        """G and A such that S = (G ⊗ A)/T + 1/σ_p²: the factors, merged with those of a consolidated prior."""
        if self.prior_outputs is None or self.prior_inputs is None:
            return self.outputs, self.inputs
        held = self._of_factor(self.temperature, "outputs") * self.prior_outputs, self.prior_inputs
        return merged_product((self.outputs, self.inputs), held, self.diagonal_sides)

    def _of_factor(self, number: Tensor, side: str) -> Tensor:
        """A number of each replica, shaped like the prior's precision, to broadcast against a factor."""
        return number.squeeze(-1) if self._diagonal(side) else number

    def _return_to_origin(self) -> None:
        super()._return_to_origin()
        self.prior_outputs = self.prior_inputs = None
        self._merges = [False] * len(self._merges)

    # ----------------------------------------------------------------------------------------- its factors
    @property
    def shape(self) -> torch.Size:
        """The shape of the mean."""
        leading = self.inputs.shape[: self.inputs.dim() - 2 + self._diagonal("inputs")]
        return torch.Size((*leading, self.outputs.shape[-1], self.inputs.shape[-1]))

    @property
    def diagonal_sides(self) -> tuple[bool, bool]:
        """Whether G and A are diagonal."""
        return self._diagonal("outputs"), self._diagonal("inputs")

    def _diagonal(self, side: str) -> bool:
        return bool(getattr(self, side).dim() < self.prior_precision.dim())

    def _eigen(self) -> tuple[Eigen, Eigen]:
        """Eigenvalues and eigenvectors of G and of A, kept until a factor changes."""
        tensors = [self.outputs, self.inputs]
        if self.prior_outputs is not None and self.prior_inputs is not None:
            tensors += [self.prior_outputs, self.prior_inputs, self.temperature]
        state = tuple((tensor.data_ptr(), tensor._version, tensor.shape) for tensor in tensors)
        if self._axes is None or self._axes[0] != state:
            outputs, inputs = self._merged()
            rows = eigen(outputs, self._diagonal("outputs"))
            self._axes = (state, rows, eigen(inputs, self._diagonal("inputs")))
        return self._axes[1:]

    def __getstate__(self) -> dict[str, Any]:  # copies and pickles make the eigenvectors anew
        return {**self.__dict__, "_axes": None}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "KroneckerPrecision":
        super()._apply(fn, recurse)
        self._axes = None
        return self

    def get_extra_state(self) -> dict[str, Any]:
        """Where the intervals stand."""
        return {name: copy.copy(getattr(self, f"_{name}")) for name in _COUNTERS}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what `get_extra_state` gave."""
        for name in _COUNTERS:
            if name in state:
                setattr(self, f"_{name}", copy.copy(state[name]))

    def extra_repr(self) -> str:
        """Sizes of the factors, and how they are used."""
        sides = [
            f"{side}={getattr(self, side).shape[-1]}{' (diagonal)' * self._diagonal(side)}"
            for side in ("outputs", "inputs")
        ]
        return (
            f"{', '.join(sides)}, damping={self.damping!r}, observe_every={self.observe_every}, "
            f"refresh_every={self.refresh_every}"
        )


def _places(replicas: list[bool]) -> Any:
    """The index of some replicas; of all without a copy."""
    return ... if all(replicas) else [place for place, chosen in enumerate(replicas) if chosen]


def _mean_eigenvalue(factor: Tensor, precision: KroneckerPrecision) -> Tensor:
    full = factor.dim() == precision.prior_precision.dim()
    diagonal = factor.diagonal(dim1=-2, dim2=-1) if full else factor
    return diagonal.mean(-1)[..., None, None]
