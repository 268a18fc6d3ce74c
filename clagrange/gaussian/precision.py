"""The abstract precision of a Gaussian parameter and its diagonal form."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from clagrange._checks import Number, check_choice, check_fraction, check_positive, per_replica
from clagrange.dynamics import mean_displacement, ornstein_uhlenbeck, relaxed_precision
from clagrange.replicas import Generators, randn_like


class Precision(nn.Module, ABC):
    """What is known of a Gaussian parameter beside its mean: precision, curvature belief and prior.

    The mean stays a parameter of the layer and is handed in. All state is in buffers, so that it is in
    ``state_dict``; it stays in float32 (float64 in a float64 network) when the network goes to half
    precision. Tensors may have a leading replica dimension.
    """

    @property
    @abstractmethod
    def stacked(self) -> bool:
        """Whether the tensors have a leading replica dimension."""

    @abstractmethod
    def observe(self, curvature: Tensor, decay: Number) -> None:
        """Average an estimate of the curvature of the mean loss per example into the belief.

        h ← decay·h + (1 − decay)·ĥ
        """

    @abstractmethod
    def relax(self, temperature: Number, fraction: Number) -> None:
        """Move the precision the given fraction of the way to its equilibrium (h + T/σ_p²)/T."""

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
    ) -> Tensor:
        """The step of the mean along the covariance, by the stable root (see `mean_displacement`)."""

    @abstractmethod
    def solve(self, gradient: Tensor) -> Tensor:
        """The covariance applied to a gradient: S⁻¹g."""

    @abstractmethod
    def variance(self) -> Tensor:
        """The marginal variance of every weight."""

    @abstractmethod
    def retained_information(self) -> Tensor:
        """1 − s_prior/s, clamped to [0, 1]: 0 where only the prior holds a weight, 1 where it is determined."""

    @abstractmethod
    def sample(self, mean: Tensor, generators: Generators | None = None) -> Tensor:
        """A draw of the parameter from N(mean, S⁻¹)."""

    @abstractmethod
    def injected(self, mean: Tensor, strength: Number, widen: Number, generators: Generators | None) -> Tensor:
        """Widen the precision toward the prior, in place, and return the mean resampled where it is uncertain."""

    @abstractmethod
    def entropy(self) -> Tensor:
        """½ log det(2πe S⁻¹): a number, or shape (R,)."""

    @abstractmethod
    def kl(self, mean: Tensor) -> Tensor:
        """KL divergence from N(mean, S⁻¹) to the prior: a number, or shape (R,)."""

    @abstractmethod
    def reset(self, mask: Tensor | None = None) -> None:
        """Return the precision to its prior and forget the curvature, everywhere or where ``mask`` is true."""

    @abstractmethod
    def start_over(self, mean: Tensor) -> None:
        """Be as new for a freshly drawn mean: `reset`, with a prior around initial weights moved to these."""

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
    prior_mean: Tensor
    prior_precision: Tensor

    def __init__(
        self,
        mean: Tensor,
        *,
        prior_mean: str = "zero",
        prior_variance: Number = 1.0,
        stacked: bool = False,
    ) -> None:
        super().__init__()
        check_choice("prior_mean", prior_mean, ("zero", "initial"))
        check_positive("prior_variance", prior_variance)
        mean = mean.detach()
        state = mean.to(torch.promote_types(mean.dtype, torch.float32))
        self._event_dims = mean.dim() - stacked
        self.prior_at_start = prior_mean == "initial"
        ones = state.new_ones([1] * state.dim())
        if stacked:
            ones = ones.expand(state.shape[0], *ones.shape[1:])
        self.register_buffer("prior_precision", ones / per_replica(prior_variance, state))
        self.register_buffer(
            "prior_mean", state.clone() if prior_mean == "initial" else torch.zeros_like(self.prior_precision)
        )
        self.register_buffer("precision", self.prior_precision.expand_as(state).clone())
        self.register_buffer("curvature", torch.zeros_like(state))

    @property
    def stacked(self) -> bool:
        """Whether the tensors have a leading replica dimension."""
        return self.precision.dim() > self._event_dims

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
    ) -> Tensor:
        """The step of the mean, elementwise `mean_displacement`."""
        lr, temperature, discount, trust_region = (
            per_replica(value, self.precision) for value in (lr, temperature, discount, trust_region)
        )
        return mean_displacement(
            gradient,
            mean - self.prior_mean,
            self.precision,
            self.curvature,
            temperature * self.prior_precision,
            temperature,
            lr,
            discount,
            trust_region,
        )

    def solve(self, gradient: Tensor) -> Tensor:
        """σ²·g."""
        return gradient / self.precision

    def variance(self) -> Tensor:
        """σ² = 1/s."""
        return self.precision.reciprocal()

    def retained_information(self) -> Tensor:
        """1 − s_prior/s, clamped to [0, 1]."""
        return (1.0 - self.prior_precision / self.precision).clamp(0.0, 1.0)

    def sample(self, mean: Tensor, generators: Generators | None = None) -> Tensor:
        """μ + σ·ε."""
        return (mean + self.precision.rsqrt() * randn_like(self.precision, generators)).to(mean.dtype)

    def injected(self, mean: Tensor, strength: Number, widen: Number, generators: Generators | None) -> Tensor:
        """s ← s + widen·(1/σ_p² − s); then μ by `ornstein_uhlenbeck` with the retained information of s."""
        check_fraction("strength", strength)
        check_fraction("widen", widen)
        if _any_positive(widen):
            self.precision.lerp_(
                self.prior_precision.expand_as(self.precision), per_replica(widen, self.precision)
            )
        if not _any_positive(strength):
            return mean
        drawn = ornstein_uhlenbeck(
            mean,
            self.prior_mean,
            self.prior_precision.rsqrt(),
            self.retained_information(),
            per_replica(strength, self.precision),
            randn_like(self.precision, generators),
        )
        return drawn.to(mean.dtype)

    def entropy(self) -> Tensor:
        """½ Σ log(2πe/s), in nats."""
        return self._total(0.5 * (math.log(2.0 * math.pi * math.e) - self.precision.log()))

    def kl(self, mean: Tensor) -> Tensor:
        """½ Σ [s_p/s − 1 − log(s_p/s) + s_p(μ − μ_p)²], in nats."""
        ratio = self.prior_precision / self.precision
        shift = self.prior_precision * (mean - self.prior_mean).square()
        return self._total(0.5 * (ratio - 1.0 - ratio.log() + shift))

    def reset(self, mask: Tensor | None = None) -> None:
        """s ← 1/σ_p² and h ← 0."""
        if mask is None:
            self.precision.copy_(self.prior_precision.expand_as(self.precision))
            self.curvature.zero_()
        else:
            self.precision.copy_(torch.where(mask, self.prior_precision, self.precision))
            self.curvature.masked_fill_(mask, 0.0)

    def start_over(self, mean: Tensor) -> None:
        """`reset`; a prior mean of "initial" becomes ``mean``."""
        self.reset()
        if self.prior_at_start:
            self.prior_mean.copy_(mean)

    def _total(self, terms: Tensor) -> Tensor:
        return terms.flatten(1).sum(1) if self.stacked else terms.sum()


def _any_positive(value: Number) -> bool:
    return bool((value > 0).any()) if isinstance(value, Tensor) else value > 0


PRECISIONS: dict[str, type[DiagonalPrecision]] = {"diagonal": DiagonalPrecision}
"""The structures that `gaussianize` knows by name."""
