"""The abstract precision of a Gaussian parameter and its diagonal form."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from clagrange._checks import Number, check_choice, check_fraction, check_positive, per_replica
from clagrange.dynamics import mean_displacement, ornstein_uhlenbeck, relaxed_precision
from clagrange.replicas import Generators, randn_like


class Precision(nn.Module, ABC):
    """What is known of a Gaussian parameter beside its mean: precision, curvature belief and prior.

    The mean stays a parameter of the layer and is handed in. Every precision is diagonal along its own
    orthogonal axes; a form says what these are (`to_axes`, `from_axes`) and what the precision along them is
    (`spectrum`), and how it learns (`observe`, `relax`) and moves the mean (`displacement`).

    All state is in buffers, so that it is in ``state_dict``; it stays in float32 (float64 in a float64 network)
    when the network goes to half precision. Tensors may have a leading replica dimension.

    Attributes:
        prior_mean: μ_p, broadcasts against the mean.
        prior_precision: 1/σ_p², of as many dimensions as the mean; the same in every direction.
        prior_at_start: whether the prior's mean is "initial".
    """

    prior_mean: Tensor
    prior_precision: Tensor

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

    @property
    def stacked(self) -> bool:
        """Whether the tensors have a leading replica dimension."""
        return self.prior_precision.dim() > self._event_dims

    @abstractmethod
    def observe(self, curvature: Any, decay: Number) -> None:
        """Average an estimate of the curvature of the mean loss per example into the belief."""

    @abstractmethod
    def relax(self, temperature: Number, fraction: Number) -> None:
        """Move the precision the given fraction of the way to its equilibrium (H + T/σ_p²)/T."""

    @abstractmethod
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
    ) -> Tensor:
        """The step of the mean along the covariance, by the stable root."""

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
    def reset(self, mask: Tensor | None = None) -> None:
        """Return the precision to its prior and forget the curvature, everywhere or where ``mask`` is true."""

    @abstractmethod
    def widen(self, fraction: Number) -> None:
        """Move the precision the given fraction of the way to the prior's: s ← s + fraction·(1/σ_p² − s)."""

    def retained_information(self) -> Tensor:
        """1 − σ²/σ_p² of every weight, clamped to [0, 1]: 0 where only the prior holds it, 1 where determined."""
        return (1.0 - self.prior_precision * self.variance()).clamp(0.0, 1.0)

    def solve(self, gradient: Tensor) -> Tensor:
        """The covariance applied to a gradient: S⁻¹g."""
        return self.from_axes(self.to_axes(gradient) / self.spectrum())

    def sample(self, mean: Tensor, generators: Generators | None = None) -> Tensor:
        """A draw of the parameter from N(mean, S⁻¹)."""
        spectrum = self.spectrum()
        noise = randn_like(spectrum, generators)
        return (mean + self.from_axes(spectrum.rsqrt() * noise)).to(mean.dtype)

    def injected(self, mean: Tensor, strength: Number, widen: Number, generators: Generators | None) -> Tensor:
        """Widen the precision, in place, and return the mean resampled where it is uncertain.

        `widen`; then, along every axis with precision s, `ornstein_uhlenbeck` with the retained information
        i = 1 − (1/σ_p²)/s, clamped to [0, 1].
        """
        check_fraction("strength", strength)
        check_fraction("widen", widen)
        if _any_positive(widen):
            self.widen(widen)
        if not _any_positive(strength):
            return mean
        spectrum = self.spectrum()
        drawn = ornstein_uhlenbeck(
            self.to_axes(mean - self.prior_mean),
            0.0,
            self.prior_precision.rsqrt(),
            (1.0 - self.prior_precision / spectrum).clamp(0.0, 1.0),
            per_replica(strength, spectrum),
            randn_like(spectrum, generators),
        )
        return (self.prior_mean + self.from_axes(drawn)).to(mean.dtype)

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
        prior_precision: 1/σ_p², broadcasts against ``mean``.
        prior_at_start: whether the prior's mean is "initial".

    Source: Vastola, Gershman, Rajan (2025), Eqs. 15-16 and 143-149, with a Gaussian prior.

    Example:
        >>> DiagonalPrecision(torch.zeros(2), prior_variance=0.5).variance()
        tensor([0.5000, 0.5000])
    """

    precision: Tensor
    curvature: Tensor

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

    def observe(self, curvature: Tensor, decay: Number) -> None:
        """h ← decay·h + (1 − decay)·ĥ."""
        self.curvature.lerp_(curvature, 1.0 - per_replica(decay, curvature))

    def relax(self, temperature: Number, fraction: Number) -> None:
        """s ← s + fraction·((h + δ)/T − s), with δ = T/σ_p²."""
        temperature, fraction = (per_replica(value, self.precision) for value in (temperature, fraction))
        prior_curvature = temperature * self.prior_precision
        self.precision.copy_(
            relaxed_precision(self.precision, self.curvature, prior_curvature, temperature, fraction)
        )

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

    def reset(self, mask: Tensor | None = None) -> None:
        """s ← 1/σ_p² and h ← 0."""
        if mask is None:
            self.precision.copy_(self.prior_precision.expand_as(self.precision))
            self.curvature.zero_()
        else:
            self.precision.copy_(torch.where(mask, self.prior_precision, self.precision))
            self.curvature.masked_fill_(mask, 0.0)


def _any_positive(value: Number) -> bool:
    return bool((value > 0).any()) if isinstance(value, Tensor) else value > 0
