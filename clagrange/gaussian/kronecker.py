"""The matrix-Gaussian precision: a Kronecker product of two factors, with a prior."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clagrange._checks import Number, check_choice, check_count, check_fraction, per_replica
from clagrange.dynamics import relaxation_fraction
from clagrange.gaussian.factors import Eigen, damped_inverse, eigen, right_product
from clagrange.gaussian.precision import Precision


class LowRank(NamedTuple):
    """A gradient dᵀx as the rows that made it.

    Attributes:
        x: (..., N, in).
        d: (..., N, out).
    """

    x: Tensor
    d: Tensor


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

    The mean moves by −φ(G ⊗ A + δ)⁻¹ g, φ = `relaxation_fraction`(lr, discount): S is always at the equilibrium of
    its curvature, so that all directions share one stable root. With ``damping="factored"`` the inverse is
    (G + √δ/π)⁻¹ ⊗ (A + π√δ)⁻¹, π² = (tr A/in)/(tr G/out) (Martens and Grosse 2015), which adds cross terms,
    needs no eigenvectors, and has been the more robust; with "exact" it is taken along the axes.

    Args:
        mean: shape (..., out, in); leading dimensions are independent blocks (groups of a convolution).
        prior_mean: "zero", or "initial" for the present value of ``mean``.
        prior_variance: σ_p², in squared units of the weight; a number or a tensor of shape (R,).
        stacked: whether the first dimension of ``mean`` is that of replicas.
        damping: "factored" or "exact".
        observe_every: steps from one observation of the factors to the next.
        refresh_every: steps from one inversion of the factors to the next.
        diagonal_inputs: keep only the diagonal of A: exact where inputs are one-hot, and what is left where a
            layer is too wide for a full factor.
        diagonal_outputs: keep only the diagonal of G.

    Attributes:
        inputs: A, (..., in, in), or (..., in) if diagonal; starts at 0.
        outputs: G, (..., out, out), or (..., out) if diagonal; starts at 0.
        temperature: T of the last step; 1 before it.

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
    input_solver: Tensor
    output_solver: Tensor
    solver_spectrum: Tensor

    def __init__(
        self,
        mean: Tensor,
        *,
        prior_mean: str = "zero",
        prior_variance: Number = 1.0,
        stacked: bool = False,
        damping: str = "factored",
        observe_every: int = 1,
        refresh_every: int = 10,
        diagonal_inputs: bool = False,
        diagonal_outputs: bool = False,
    ) -> None:
        super().__init__(mean, prior_mean, prior_variance, stacked)
        check_choice("damping", damping, ("factored", "exact"))
        check_count("observe_every", observe_every)
        check_count("refresh_every", refresh_every)
        self.damping = damping
        self.observe_every = observe_every
        self.refresh_every = refresh_every
        *leading, rows, columns = mean.shape
        dtype, device = self.prior_precision.dtype, mean.device
        for side, size, diagonal in (("inputs", columns, diagonal_inputs), ("outputs", rows, diagonal_outputs)):
            shape = (*leading, size) if diagonal else (*leading, size, size)
            self.register_buffer(side, torch.zeros(shape, dtype=dtype, device=device))
            self.register_buffer(f"{side[:-1]}_solver", torch.zeros(shape, dtype=dtype, device=device))
        self.register_buffer("temperature", torch.ones_like(self.prior_precision))
        if damping == "exact":
            self.register_buffer("solver_spectrum", torch.ones(mean.shape, dtype=dtype, device=device))
        self._seen: tuple[Tensor, Tensor] | None = None
        self._since_observation = 0
        self._since_refresh = refresh_every  # due at once
        self._axes: tuple[Any, Eigen, Eigen] | None = None

    # ------------------------------------------------------------------------------------------- learning
    @property
    def observes(self) -> bool:
        """Whether the factors of the next step are wanted."""
        return (self._since_observation + 1) % self.observe_every == 0

    def observe(self, curvature: tuple[Tensor, Tensor] | None, decay: Number = 0.0) -> None:
        """Note the factors (G, A) of a batch, to which `relax` then moves; ``decay`` has no part in it."""
        self._seen = curvature

    def relax(self, temperature: Number, fraction: Number) -> None:
        """A ← A + r(Â − A) and G ← G + r(Ĝ − G), for every step since the last observation at once.

        An observation that is not finite changes nothing (in that replica).
        """
        self.temperature.copy_(torch.as_tensor(per_replica(temperature, self.temperature)))
        self._since_observation += 1
        if self._seen is None:
            return
        outputs, inputs = self._seen
        self._seen = None
        share = 1.0 - (1.0 - fraction) ** self._since_observation
        self._since_observation = 0
        first = int(self.stacked)
        usable = outputs.flatten(first).isfinite().all(-1) & inputs.flatten(first).isfinite().all(-1)
        for factor, seen in ((self.outputs, outputs), (self.inputs, inputs)):
            weight = torch.as_tensor(per_replica(share, factor), dtype=factor.dtype, device=factor.device)
            allowed = usable.view(*usable.shape, *[1] * (factor.dim() - first)) if self.stacked else usable
            seen = torch.where(allowed, seen, factor)
            factor.lerp_(seen.to(factor.dtype), weight)

    def displacement(
        self,
        mean: Tensor,
        gradient: Tensor,
        *,
        lr: Number,
        temperature: Number,
        discount: Number = math.inf,
        trust_region: Number = math.inf,
        prior_pull: Number = 1.0,
        low_rank: LowRank | None = None,
    ) -> Tensor:
        """−φ(G ⊗ A + δ)⁻¹(g + δ(μ − μ_p)), at most ``trust_region`` posterior standard deviations.

        The length of the step is √(Δᵀ S Δ / D) over the D weights: the root mean square of the step along the
        axes, each in units of its own standard deviation; D/2 times its square is the KL divergence between the
        posteriors before and after the step. A longer step is scaled down as a whole. The prior's pull is outside
        of the bound; with "factored" damping it acts when the factors are inverted, for all steps in between.

        Args:
            low_rank: the same gradient as the rows of a small batch, with which the products are cheaper.
        """
        self._since_refresh += 1
        refreshed = self._since_refresh >= self.refresh_every
        if refreshed:
            self._refresh(temperature)
        fraction = per_replica(relaxation_fraction(lr, discount), gradient)
        temperature, bound, prior_pull = (
            per_replica(value, gradient) for value in (temperature, trust_region, prior_pull)
        )
        pull = prior_pull * temperature * self.prior_precision * (mean - self.prior_mean)
        if self.damping == "exact":
            gradient = gradient + pull
        step = self._apply_solver(gradient) if low_rank is None else self._apply_to_rows(low_rank)
        length = fraction * (self._mean(step * gradient).clamp(min=0.0) / temperature).sqrt()
        tiny = torch.finfo(length.dtype).tiny
        step = step * (-fraction * (bound / length.clamp(min=tiny)).clamp(max=1.0))
        if refreshed and self.damping == "factored":
            step = step - fraction * self.refresh_every * self._apply_solver(pull)
        return step

    def _mean(self, terms: Tensor) -> Tensor:
        """Mean over a network's weights, shaped to broadcast against them."""
        return terms.mean(dim=tuple(range(int(self.stacked), terms.dim())), keepdim=True)

    def _refresh(self, temperature: Number) -> None:
        self._since_refresh = 0
        damping = per_replica(temperature, self.prior_precision) * self.prior_precision
        if self.damping == "exact":
            rows, columns = self._eigen()
            self.solver_spectrum.copy_(rows.values.unsqueeze(-1) * columns.values.unsqueeze(-2) + damping)
            for solver, side in ((self.output_solver, rows), (self.input_solver, columns)):
                if side.vectors is not None:
                    solver.copy_(side.vectors)
            return
        ratio = (_mean_eigenvalue(self.inputs, self) / _mean_eigenvalue(self.outputs, self)).sqrt()
        ratio = torch.where(ratio.isfinite() & (ratio > 0.0), ratio, torch.ones_like(ratio))
        root = damping.sqrt()
        self.input_solver.copy_(damped_inverse(self.inputs, ratio * root, self._diagonal("inputs")))
        self.output_solver.copy_(damped_inverse(self.outputs, root / ratio, self._diagonal("outputs")))

    def prefers(self, rows: LowRank) -> bool:
        """Whether a step is cheaper by the rows of a batch than by the gradient.

        On a GPU the products are cheap, and to look whether they may be used would wait for it.
        """
        count, columns, outputs = rows.x.shape[-2], rows.x.shape[-1], rows.d.shape[-1]
        cheaper = count * (columns**2 + outputs**2 + columns * outputs) < columns * outputs * (columns + outputs)
        full = not any(self.diagonal_sides)
        return cheaper and full and self.damping == "factored" and rows.x.device.type == "cpu"

    def _apply_to_rows(self, rows: LowRank) -> Tensor:
        return (rows.d @ self.output_solver).mT @ (rows.x @ self.input_solver)

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
        for factor, side, mask in ((self.outputs, "outputs", rows), (self.inputs, "inputs", columns)):
            if mask is None:
                continue
            keep = torch.where(
                mask.expand(factor.shape[: factor.dim() - (not self._diagonal(side))]),
                1.0 - per_replica(fraction, factor[..., 0] if not self._diagonal(side) else factor),
                torch.ones((), dtype=factor.dtype, device=factor.device),
            )
            if not self._diagonal(side):
                root = keep.sqrt()
                keep = root.unsqueeze(-1) * root.unsqueeze(-2)
            factor.mul_(keep)
        self._since_refresh = self.refresh_every

    def reset(self, mask: Tensor | None = None) -> None:
        """G ⊗ A ← 0; with a mask of the mean's shape, in the rows and columns that it covers entirely."""
        if mask is None:
            for factor in (self.inputs, self.outputs):
                factor.zero_()
            self._since_refresh = self.refresh_every
            return
        mask = mask.expand(torch.broadcast_shapes(mask.shape, self.prior_mean.shape, self._shape()))
        self.widen(1.0, rows=mask.all(-1), columns=mask.all(-2))

    def _shape(self) -> torch.Size:
        leading = self.inputs.shape[: self.inputs.dim() - 2 + self._diagonal("inputs")]
        return torch.Size((*leading, self.outputs.shape[-1], self.inputs.shape[-1]))

    # ----------------------------------------------------------------------------------------- its factors
    @property
    def diagonal_sides(self) -> tuple[bool, bool]:
        """Whether G and A are diagonal."""
        return self._diagonal("outputs"), self._diagonal("inputs")

    def _diagonal(self, side: str) -> bool:
        return bool(getattr(self, side).dim() < self.prior_precision.dim())

    def _eigen(self) -> tuple[Eigen, Eigen]:
        """Eigenvalues and eigenvectors of G and of A, kept until a factor changes."""
        state = tuple(
            (factor.data_ptr(), factor._version, factor.shape) for factor in (self.outputs, self.inputs)
        )
        if self._axes is None or self._axes[0] != state:
            rows = eigen(self.outputs, self._diagonal("outputs"))
            self._axes = (state, rows, eigen(self.inputs, self._diagonal("inputs")))
        return self._axes[1:]

    def __getstate__(self) -> dict[str, Any]:  # copies and pickles make the eigenvectors anew
        return {**self.__dict__, "_axes": None}

    def get_extra_state(self) -> dict[str, int]:
        """Where the intervals stand."""
        return {"since_observation": self._since_observation, "since_refresh": self._since_refresh}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Restore what `get_extra_state` gave."""
        self._since_observation = state["since_observation"]
        self._since_refresh = state["since_refresh"]

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


def _mean_eigenvalue(factor: Tensor, precision: KroneckerPrecision) -> Tensor:
    full = factor.dim() == precision.prior_precision.dim()
    diagonal = factor.diagonal(dim1=-2, dim2=-1) if full else factor
    return diagonal.mean(-1)[..., None, None]
