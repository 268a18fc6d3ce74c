"""The abstract precision of a Gaussian parameter and its diagonal form."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from clagrange._checks import (
    Number,
    check_choice,
    check_fraction,
    check_number,
    check_positive,
    per_replica,
)
from clagrange.dynamics import mean_displacement, ornstein_uhlenbeck, relaxed_precision
from clagrange.replicas import Generators, randn_like


def looking_is_free(tensor: Tensor) -> bool:
    """Whether the host need not wait for a tensor's numbers, as it must for those on a GPU."""
    return tensor.device.type == "cpu"


class Product(NamedTuple):
    """A matrix leftᵀ right of low rank.

    Attributes:
        left: (..., k, out).
        right: (..., k, in).
    """

    left: Tensor
    right: Tensor

    def multiplied(self) -> Tensor:
        """The matrix, (..., out, in)."""
        return self.left.mT @ self.right


class Precision(nn.Module, ABC):
    """What is known of a Gaussian parameter beside its mean: precision, curvature belief and prior.

    The mean stays a parameter of the layer and is handed in. Every precision is diagonal along its own
    orthogonal axes; a form says what these are (`to_axes`, `from_axes`) and what the precision along them is
    (`spectrum`), and how it learns (`observe`, `relax`) and moves the mean (`step`).

    All state is in buffers, so that it is in ``state_dict``; it stays in float32 (float64 in a float64 network)
    when the network goes to half precision. Tensors may have a leading replica dimension.

    The prior is the same in every direction until `consolidate` makes a posterior the next prior. The prior from
    before the first consolidation, N(μ_0, σ_0²), is kept as the origin: injection draws from it what nothing
    holds, retained information is measured against it, and weights that are drawn anew return to it (`reset`).
    The other methods know the present prior only.

    Attributes:
        prior_mean: μ_p, broadcasts against the mean.
        prior_precision: 1/σ_p², of as many dimensions as the mean, broadcasts against it.
        prior_at_start: whether the prior's mean is "initial".
        origin_mean: μ_0 once consolidated; None before.
        host_state: names of the attributes in which steps are counted.
    """

    host_state: ClassVar[tuple[str, ...]] = ()
    prior_mean: Tensor
    prior_precision: Tensor
    origin_mean: Tensor | None

    def __init__(self, mean: Tensor, prior_mean: str, prior_variance: Number, stacked: bool) -> None:
        super().__init__()
        check_choice("prior_mean", prior_mean, ("zero", "initial"))
        check_positive("prior_variance", prior_variance)
        state = mean.detach().to(torch.promote_types(mean.dtype, torch.float32))
        self._event_dims = mean.dim() - stacked
        self.prior_at_start = prior_mean == "initial"
        ones = state.new_ones([1] * state.dim())
        if stacked:
            ones = ones.expand(state.shape[0], *ones.shape[1:])
        self.register_buffer("prior_precision", ones / per_replica(prior_variance, state))
        self.register_buffer(
            "prior_mean", state.clone() if prior_mean == "initial" else torch.zeros_like(self.prior_precision)
        )
        self.register_buffer("origin_mean", None)

    @property
    def stacked(self) -> bool:
        """Whether the tensors have a leading replica dimension."""
        return self.prior_precision.dim() > self._event_dims

    @property
    def consolidated(self) -> bool:
        """Whether the prior is an earlier posterior."""
        return self.origin_mean is not None

    @property
    def origin(self) -> tuple[Tensor, Tensor]:
        """Mean μ_0 and precision 1/σ_0² of the prior before any consolidation."""
        return (self.prior_mean if self.origin_mean is None else self.origin_mean), self.prior_precision

    @property
    @abstractmethod
    def shape(self) -> torch.Size:
        """The shape of the mean."""

    @abstractmethod
    def observe(self, curvature: Any, decay: Number) -> None:
        """Average an estimate of the curvature of the mean loss per example into the belief."""

    @abstractmethod
    def relax(self, temperature: Number, fraction: Number) -> None:
        """Move the precision the given fraction of the way to its equilibrium (H + T/σ_p²)/T."""

    @property
    def needs_mean(self) -> bool:
        """Whether the next `step` depends on the mean; where not, any ``mean`` will do."""
        return True

    @abstractmethod
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
        """The step of the mean along the covariance, by the stable root; a `Product` where it is of low rank."""

    @property
    def replay_key(self) -> Hashable:
        """What the host decides in the next `observe`, `relax` and `step`; where it is equal they do the same.

        None where a CUDA graph cannot replay them, or that is not known.
        """
        return None

    def step_replayed(self) -> None:
        """Hear that a step was replayed, and count it where steps are counted."""

    def displacement(self, mean: Tensor, gradient: Tensor, **settings: Number) -> Tensor:
        """`step`, which takes the same settings, multiplied out."""
        step = self.step(mean, gradient, **settings)
        return step if isinstance(step, Tensor) else step.multiplied()

    @abstractmethod
    def spectrum(self) -> Tensor:
        """The precision along the axes, of the shape of the mean."""

    def to_axes(self, values: Tensor) -> Tensor:
        """Coordinates along the axes of a tensor of the mean's shape (further leading dimensions are kept)."""
        return values

    def from_axes(self, values: Tensor) -> Tensor:
        """The inverse of `to_axes`."""
        return values

    @abstractmethod
    def variance(self) -> Tensor:
        """The marginal variance of every weight."""

    @abstractmethod
    def consolidate(self, mean: Tensor, weight: Number = 1.0) -> None:
        """Make N(mean, S⁻¹) the prior, and forget the curvature, which is in it now.

        The prior's precision becomes 1/σ_0² + weight·(S − 1/σ_0²); see `clagrange.consolidate`.
        """

    @abstractmethod
    def reset(self, mask: Tensor | None = None) -> None:
        """Forget the curvature, everywhere or where ``mask`` is true, for weights that are drawn anew.

        The precision returns to the prior's; where the prior was consolidated, that returns to the origin first.
        """

    @abstractmethod
    def widen(self, fraction: Number) -> None:
        """Move the precision the given fraction of the way to the prior's: s ← s + fraction·(1/σ_p² − s)."""

    @abstractmethod
    def widen_part(self, fraction: Number, axes: Tensor | None, units: Tensor | None) -> None:
        """`widen` along some axes, or in some rows of the weights.

        Args:
            fraction: in [0, 1].
            axes: true at the axes, of the shape of the mean; None with ``units``.
            units: true at the rows, (out,) or (..., out); None with ``axes``.

        Raises:
            ValueError: where the form has no precision that is wider along some axes alone.
        """

    @abstractmethod
    def multiply(self, factor: Number) -> None:
        """Make the variance ``factor`` times as large, no further than to the prior's.

        Exact for every weight with a diagonal precision. A matrix Gaussian divides what it knows beyond the prior
        by ``factor``, which comes to the same where that is much.
        """

    @abstractmethod
    def forget_curvature(self) -> None:
        """Be at the prior's precision, and know of no curvature; a consolidated prior stays."""

    @abstractmethod
    def set_to_equilibrium(self, temperature: Number, believed: Number, relaxed: Number) -> None:
        """After `forget_curvature`: take the curvature seen since for all of it, and be at its equilibrium.

        Args:
            temperature: T.
            believed: the weight in (0, 1] of what was seen since in a belief over the curvature.
            relaxed: its weight in what relaxes at every step.
        """

    def retained_information(self) -> Tensor:
        """1 − σ²/σ_0² of every weight, clamped to [0, 1]: 0 where nothing was learnt, 1 where determined."""
        return (1.0 - self.origin[1] * self.variance()).clamp(0.0, 1.0)

    def solve(self, gradient: Tensor) -> Tensor:
        """The covariance applied to a gradient: S⁻¹g."""
        return self.from_axes(self.to_axes(gradient) / self.spectrum())

    def sample(self, mean: Tensor, generators: Generators | None = None) -> Tensor:
        """A draw of the parameter from N(mean, S⁻¹): μ + S^{−1/2}ε.

        The root is the symmetric one, which does not depend on the choice of the axes where these are degenerate.
        """
        spectrum = self.spectrum()
        noise = self.to_axes(randn_like(spectrum, generators))
        return (mean + self.from_axes(spectrum.rsqrt() * noise)).to(mean.dtype)

    def injected(
        self,
        mean: Tensor,
        strength: Number,
        widen: Number,
        generators: Generators | None,
        *,
        multiply: Number = 1.0,
        draw: str = "prior",
        where: str = "everywhere",
        share: Number = 0.5,
    ) -> Tensor:
        """Widen the precision, in place, and return the mean resampled where it is uncertain.

        `widen` and `multiply`; then, along every axis with precision s, a draw: "prior" is `ornstein_uhlenbeck`
        toward N(μ_0, σ_0²) with the retained information i = 1 − (1/σ_0²)/s, clamped to [0, 1], where what a
        consolidated prior holds counts as retained; "posterior" adds √strength·s^{−1/2}·ε.

        With ``where`` all of this happens in a part only, the ``share`` of the axes of lowest precision
        ("low_curvature") or of the rows of lowest `unit_utility` ("low_utility"), both as they were before.
        """
        check_injection(strength, widen, multiply, draw, where, share)
        axes = units = None
        if where == "low_curvature":
            axes = _lowest(self.spectrum(), share, self.stacked, self._event_dims)
        elif where == "low_utility":
            units = _lowest(self.unit_utility(mean), share, self.stacked, 1)
        fraction = 1.0 - (1.0 - widen) / multiply  # both at once, for what a part knows of both
        if where == "everywhere":
            if _any_positive(widen):
                self.widen(widen)
            if _any_positive(multiply - 1.0):
                self.multiply(multiply)
        elif _any_positive(fraction):
            self.widen_part(fraction, axes, units)
        if not _any_positive(strength):
            return mean
        spectrum = self.spectrum()
        strength = per_replica(strength, spectrum)
        origin_mean, origin_precision = self.origin
        before = self.to_axes(mean - origin_mean)
        noise = self.to_axes(randn_like(spectrum, generators))
        if draw == "posterior":
            drawn = before + strength**0.5 * spectrum.rsqrt() * noise
        else:
            retained = (1.0 - origin_precision / spectrum).clamp(0.0, 1.0)
            drawn = ornstein_uhlenbeck(before, 0.0, origin_precision.rsqrt(), retained, strength, noise)
        if axes is not None:
            drawn = torch.where(axes, drawn, before)
        new = origin_mean + self.from_axes(drawn)
        if units is not None:
            new = torch.where(self._of_units(units), new, mean)
        return new.to(mean.dtype)

    def unit_utility(self, mean: Tensor) -> Tensor:
        """Σ_w (μ − μ_0)_w (S(μ − μ_0))_w over the weights w of each row: what the posterior would lose with it.

        Half of it is the rise of the negative log posterior, to second order, if the weights of a unit went back
        to the origin, with what they share with other units counted half (exact for a diagonal precision).

        Returns:
            Shape (out,), or (..., out) with leading dimensions; of a vector every entry is a unit.
        """
        offset = mean - self.origin[0]
        product = offset * self.from_axes(self.spectrum() * self.to_axes(offset))
        return self._by_unit(product)

    @abstractmethod
    def _by_unit(self, values: Tensor) -> Tensor:
        """Sums over each row of a tensor of the mean's shape."""

    def _of_units(self, units: Tensor) -> Tensor:
        """A mask of rows, shaped to broadcast against the mean."""
        return units.view(*units.shape, *[1] * (len(self.shape) - units.dim()))

    def entropy(self) -> Tensor:
        """½ log det(2πe S⁻¹), in nats: a number, or shape (R,)."""
        return self._total(0.5 * (math.log(2.0 * math.pi * math.e) - self.spectrum().log()))

    def kl(self, mean: Tensor) -> Tensor:
        """KL divergence from N(mean, S⁻¹) to the prior, in nats: a number, or shape (R,).

        ½ Σ [s_p/s − 1 − log(s_p/s)] over the axes + ½ s_p‖μ − μ_p‖².
        """
        ratio = self.prior_precision / self.spectrum()
        shift = self.prior_precision * (mean - self.prior_mean).square()
        return self._total(0.5 * (ratio - 1.0 - ratio.log() + shift))

    def start_over(self, mean: Tensor) -> None:
        """Be as new for a freshly drawn mean: `reset`; a prior mean of "initial" becomes ``mean``."""
        self.reset()
        if self.prior_at_start:
            self.prior_mean.copy_(mean)

    def _centre_prior(self, mean: Tensor) -> None:
        """Move the prior's mean, and keep the origin's."""
        if self.origin_mean is None:
            self.origin_mean = self.prior_mean
        self.prior_mean = mean.detach().to(self.origin_mean.dtype, copy=True)

    def _return_to_origin(self) -> None:
        """Undo all consolidation of the prior."""
        if self.origin_mean is not None:
            self.prior_mean, self.origin_mean = self.origin_mean, None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # a consolidated precision has further and larger buffers: take on the form of what is loaded
        if f"{prefix}prior_mean" in state_dict:
            consolidated = f"{prefix}origin_mean" in state_dict
            if consolidated and not self.consolidated:
                self.consolidate(self.prior_mean.expand(self.shape), 0.0)
            elif self.consolidated and not consolidated:
                self._return_to_origin()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _total(self, terms: Tensor) -> Tensor:
        return terms.flatten(1).sum(1) if self.stacked else terms.sum()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Precision":
        # .half() and .bfloat16() would lose the precision's digits: follow the device, keep the type
        for name, buffer in self.named_buffers(recurse=False):
            moved = fn(buffer)
            if moved.dtype in (torch.float16, torch.bfloat16):
                moved = buffer.to(moved.device)
            setattr(self, name, moved)
        return self


class DiagonalPrecision(Precision):
    """An independent precision for every weight of one parameter.

    Args:
        mean: the parameter, shape (...) or (R, ...); gives shape, device and type.
        prior_mean: "zero", or "initial" for the present value of ``mean``.
        prior_variance: σ_p², in squared units of the weight; a number or a tensor of shape (R,).
        stacked: whether ``mean`` has a leading replica dimension.

    Attributes:
        precision: s = 1/σ², shape of ``mean``; starts at 1/σ_p².
        curvature: h, the belief over the diagonal curvature of the mean loss per example; starts at 0.
        prior_mean: μ_p, broadcasts against ``mean``.
        prior_precision: 1/σ_p², broadcasts against ``mean``; of its shape once consolidated.
        prior_at_start: whether the prior's mean is "initial".
        origin_mean: μ_0 once consolidated; None before.
        origin_precision: 1/σ_0² once consolidated; None before.

    Source: Vastola, Gershman, Rajan (2025), Eqs. 15-16 and 143-149, with a Gaussian prior.

    Example:
        >>> DiagonalPrecision(torch.zeros(2), prior_variance=0.5).variance()
        tensor([0.5000, 0.5000])
    """

    precision: Tensor
    curvature: Tensor
    origin_precision: Tensor | None

    def __init__(
        self,
        mean: Tensor,
        *,
        prior_mean: str = "zero",
        prior_variance: Number = 1.0,
        stacked: bool = False,
    ) -> None:
        super().__init__(mean, prior_mean, prior_variance, stacked)
        state = torch.zeros_like(mean, dtype=self.prior_precision.dtype, requires_grad=False)
        self.register_buffer("precision", self.prior_precision.expand_as(state).clone())
        self.register_buffer("curvature", state)
        self.register_buffer("origin_precision", None)

    @property
    def origin(self) -> tuple[Tensor, Tensor]:
        """Mean μ_0 and precision 1/σ_0² of the prior before any consolidation."""
        mean, precision = super().origin
        return mean, (precision if self.origin_precision is None else self.origin_precision)

    @property
    def shape(self) -> torch.Size:
        """The shape of the mean."""
        return self.precision.shape

    @property
    def replay_key(self) -> Hashable:
        """Every step is the same."""
        return ()

    def observe(self, curvature: Tensor, decay: Number) -> None:
        """h ← max(decay·h + (1 − decay)·ĥ, 0).

        The bound at 0 is for estimates that can be negative. Where these have mean H and standard deviation e, it
        raises the belief to about H + bφ(H/b)/Φ(H/b), b = e·√((1 − decay)/2), with the density φ and distribution
        function Φ of a standard normal number: by 3 % for b = H/2, by 29 % for b = H, to twice H for b = 2H.
        """
        self.curvature.lerp_(curvature, 1.0 - per_replica(decay, curvature)).clamp_(min=0.0)

    def relax(self, temperature: Number, fraction: Number) -> None:
        """s ← s + fraction·((h + δ)/T − s), with δ = T/σ_p²."""
        temperature, fraction = (per_replica(value, self.precision) for value in (temperature, fraction))
        prior_curvature = temperature * self.prior_precision
        self.precision.copy_(
            relaxed_precision(self.precision, self.curvature, prior_curvature, temperature, fraction)
        )

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
    ) -> Tensor:
        """The step of the mean, elementwise `mean_displacement`."""
        lr, temperature, discount, trust_region, prior_pull = (
            per_replica(value, self.precision) for value in (lr, temperature, discount, trust_region, prior_pull)
        )
        return mean_displacement(
            gradient,
            prior_pull * (mean - self.prior_mean),
            self.precision,
            self.curvature,
            temperature * self.prior_precision,
            temperature,
            lr,
            discount,
            trust_region,
        )

    def spectrum(self) -> Tensor:
        """s itself: the axes are the weights."""
        return self.precision

    def variance(self) -> Tensor:
        """σ² = 1/s."""
        return self.precision.reciprocal()

    def widen(self, fraction: Number) -> None:
        """s ← s + fraction·(1/σ_p² − s)."""
        self.precision.lerp_(
            self.prior_precision.expand_as(self.precision), per_replica(fraction, self.precision)
        )

    def widen_part(self, fraction: Number, axes: Tensor | None, units: Tensor | None) -> None:
        """s ← s + fraction·(1/σ_p² − s) at the chosen weights."""
        chosen = axes if units is None else self._of_units(units)
        assert chosen is not None
        wider = self.precision.lerp(
            self.prior_precision.expand_as(self.precision), per_replica(fraction, self.precision)
        )
        self.precision.copy_(torch.where(chosen, wider, self.precision))

    def _by_unit(self, values: Tensor) -> Tensor:
        return values.flatten(1 + self.stacked).sum(-1) if self._event_dims > 1 else values

    def multiply(self, factor: Number) -> None:
        """s ← max(s/factor, min(s, 1/σ_p²))."""
        bound = torch.minimum(self.precision, self.prior_precision)
        self.precision.copy_(torch.maximum(self.precision / per_replica(factor, self.precision), bound))

    def forget_curvature(self) -> None:
        """s ← 1/σ_p² and h ← 0."""
        self.precision.copy_(self.prior_precision.expand_as(self.precision))
        self.curvature.zero_()

    def set_to_equilibrium(self, temperature: Number, believed: Number, relaxed: Number) -> None:
        """h ← h/believed and s ← (h + T/σ_p²)/T."""
        self.curvature.div_(per_replica(believed, self.curvature))
        self.relax(temperature, 1.0)

    def consolidate(self, mean: Tensor, weight: Number = 1.0) -> None:
        """μ_p ← mean, 1/σ_p² ← 1/σ_0² + weight·(s − 1/σ_0²), s ← 1/σ_p², h ← 0."""
        _, origin = self.origin
        learnt = (self.precision - origin).clamp(min=0.0)
        self._centre_prior(mean)
        self.origin_precision = origin
        self.prior_precision = origin + per_replica(weight, learnt) * learnt
        self.precision.copy_(self.prior_precision)
        self.curvature.zero_()

    def _return_to_origin(self) -> None:
        super()._return_to_origin()
        if self.origin_precision is not None:
            self.prior_precision, self.origin_precision = self.origin_precision, None

    def reset(self, mask: Tensor | None = None) -> None:
        """s ← 1/σ_p² and h ← 0, where a consolidated prior has returned to N(μ_0, σ_0²)."""
        if mask is None:
            self._return_to_origin()
            self.precision.copy_(self.prior_precision.expand_as(self.precision))
            self.curvature.zero_()
            return
        if self.consolidated:
            mean, precision = self.origin
            self.prior_mean.copy_(torch.where(mask, mean, self.prior_mean))
            self.prior_precision.copy_(torch.where(mask, precision, self.prior_precision))
        self.precision.copy_(torch.where(mask, self.prior_precision, self.precision))
        self.curvature.masked_fill_(mask, 0.0)


DRAWS = ("prior", "posterior")
"""What an injection draws the mean from."""
WHERE = ("everywhere", "low_curvature", "low_utility")
"""Where an injection acts."""


def check_injection(
    strength: Number, widen: Number, multiply: Number, draw: str, where: str, share: Number
) -> None:
    """Raise unless these are settings of an injection."""
    check_fraction("strength", strength)
    check_fraction("widen", widen)
    check_number("multiply", multiply, low=1.0, open_high=True)
    check_choice("draw", draw, DRAWS)
    check_choice("where", where, WHERE)
    check_fraction("share", share)


def _lowest(values: Tensor, share: Number, stacked: bool, event_dims: int) -> Tensor:
    """True at the given share of the entries, those of lowest value; each replica and leading block by itself."""
    first = values.dim() - event_dims
    flat = values.flatten(first)
    ranks = flat.argsort(dim=-1, stable=True).argsort(-1)
    wanted = torch.as_tensor(share, device=values.device) * flat.shape[-1]
    if wanted.dim():
        wanted = wanted.view(-1, *[1] * (flat.dim() - 1))
    lowest: Tensor = ranks < wanted.round()
    return lowest.view(values.shape)


def _any_positive(value: Number) -> bool:
    return bool((value > 0).any()) if isinstance(value, Tensor) else value > 0
