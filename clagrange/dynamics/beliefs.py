"""Ornstein-Uhlenbeck beliefs over gradient and curvature: how fast an optimal agent averages what it sees.

The agent believes that a quantity x decays and diffuses, x' = −a·x + s·ξ, and that it observes y ~ N(x, r²).
Its belief x̂ minimises the discounted sum of −log p of path and observations,

    ∫ e^{−γt} [ (y − x̂)²/(2r²) + (x̂' + a·x̂)²/(2s²) ] dt,

whose Euler-Lagrange equation is x̂'' − γx̂' = a(a + γ)x̂ + (s²/r²)(x̂ − y). With y held at its present value the
bounded solution decays to (s²/r²)y/κ² with the rate λ_κ = √(γ²/4 + κ²) − γ/2, κ² = a(a + γ) + s²/r², so that
one step of length Δt is exactly

    x̂ ← β·x̂ + (1 − β)·(s²/r²)/κ²·y,    β = e^{−λ_κ·Δt}.

Time is counted in steps. Left out are the terms by which a planned step of the weights bends the beliefs
(Eq. 142: k·s²·Δθ and (kc/2)·s²·Δθ²): they vanish where the belief is used, at Δθ = 0.

Source: Vastola, Gershman, Rajan (2025), Eqs. 12-14 and 133-142.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from clagrange._checks import Number, check_nonnegative, check_number, check_positive, per_replica
from clagrange.dynamics.rules import stable_root

_SMALLEST = 1e-15  # variance below which an observation is taken to be exact; its square is a float32


@dataclass(frozen=True)
class Belief:
    """What an agent believes of a drifting quantity x: x' = −decay·x + process_noise·ξ, seen with noise.

    Args:
        decay: a ≥ 0, per step: how fast x returns to 0 by itself.
        process_noise: s > 0, units of x per √step: how fast it wanders.
        observation_noise: r > 0, units of x: standard deviation of one observation.

    Each may be a tensor of shape (R,), one number for each replica. Only s/r and a matter to the rate.

    Raises:
        TypeError: if a number is none.
        ValueError: if it is out of range.

    Source: Vastola, Gershman, Rajan (2025), Eqs. 13 and 141-142.

    Example:
        >>> belief = Belief(decay=0.0, process_noise=0.1, observation_noise=1.0)
        >>> round(belief.rate(0.0), 6), round(belief.rate(1.0), 6)
        (0.1, 0.009902)
    """

    decay: Number
    process_noise: Number
    observation_noise: Number

    def __post_init__(self) -> None:
        check_nonnegative("decay", self.decay)
        check_positive("process_noise", self.process_noise)
        check_positive("observation_noise", self.observation_noise)

    @classmethod
    def averaging(cls, beta: float, discount: float, decay: float = 0.0) -> "Belief":
        """The belief that keeps the fraction ``beta`` of itself in a step: e^{−λ_κ} = beta.

        s²/r² = λ(λ + γ) − a(a + γ) with λ = −log beta. With ``decay`` 0 it is the running average with this beta.

        Args:
            beta: in (0, 1).
            discount: γ per step, finite and ≥ 0.
            decay: a, below −log beta.

        Raises:
            ValueError: if a number is out of range.

        Example:
            >>> round(Belief.averaging(0.9, 2.0).rate(2.0), 6)  # −log 0.9
            0.105361
        """
        check_number("beta", beta, low=0.0, high=1.0, open_low=True, open_high=True)
        check_nonnegative("discount", discount)
        check_nonnegative("decay", decay)
        rate = -math.log(beta)
        signal = rate * (rate + discount) - decay * (decay + discount)
        if signal <= 0.0:
            raise ValueError(
                f"decay: expected a number in [0, {rate:g}), got {decay:g}; a belief cannot forget more slowly "
                f"than what it is about decays"
            )
        return cls(decay, math.sqrt(signal), 1.0)

    @property
    def signal(self) -> Number:
        """s²/r²: how much an observation says, per squared step."""
        return (self.process_noise / self.observation_noise) ** 2

    def rate(self, discount: Number) -> Number:
        """λ_κ = √(γ²/4 + κ²) − γ/2 with κ² = a(a + γ) + s²/r², per step.

        γ = 0 gives √(a² + s²/r²), the rate of the stationary Kalman-Bucy filter; for γ → ∞ it falls to a, the
        excess as s²/(r²γ): an agent that does not care for its future does not move its beliefs.

        Args:
            discount: γ per step, ≥ 0 (a tensor: > 0).
        """
        return _rate(self.decay, self.signal, discount)

    def gain(self, discount: Number) -> Number:
        """(s²/r²)/κ², in (0, 1]: where a belief goes that sees 1 for ever; 1 where nothing decays."""
        return _gain(self.decay, self.signal, discount)


def as_numbers(value: Any) -> Any:
    """A belief as a dictionary of plain numbers, for an optimizer's ``state_dict``; all else as it is."""
    return asdict(value) if isinstance(value, Belief) else value


def as_belief(name: str, value: object, *, open_high: bool = True) -> Number | Belief:
    """Check a setting that is either a decay β or a belief (also given as a mapping of its three numbers).

    Args:
        name: of the setting, for the message.
        value: what came.
        open_high: whether β stays below 1; else 1 (a belief that is held) is allowed.

    Raises:
        TypeError: if it is neither.
        ValueError: if a number is out of range, or the mapping has other names.
    """
    if isinstance(value, Mapping):
        names = [field.name for field in fields(Belief)]
        if sorted(value) != sorted(names):
            raise ValueError(f"{name}: expected the numbers {', '.join(names)}, got {', '.join(map(str, value))}")
        value = Belief(**value)
    if isinstance(value, Belief):
        return value
    check_number(name, value, low=0.0, high=1.0, open_high=open_high)
    assert isinstance(value, (int, float, Tensor))
    return value


def averaging_weights(belief: Any, discount: Number) -> tuple[Number, Number]:
    """(β, c) of the average x̂ ← βx̂ + (1 − β)·c·y: a number is β itself with c = 1, a belief gives both.

    Args:
        belief: β in [0, 1], a `Belief`, or the mapping of its numbers.
        discount: γ per step.

    Example:
        >>> averaging_weights(0.9, 1.0)
        (0.9, 1.0)
        >>> averaging_weights(Belief.averaging(0.75, 1.0), 1.0)
        (0.75, 1.0)
    """
    if isinstance(belief, Mapping):
        belief = Belief(**belief)
    if not isinstance(belief, Belief):
        return belief, 1.0
    rate = belief.rate(discount)
    return torch.exp(-rate) if isinstance(rate, Tensor) else math.exp(-rate), belief.gain(discount)


def updated_belief(
    belief: Tensor, observation: Tensor, decay: Number, signal: Number, discount: Number, time: float = 1.0
) -> Tensor:
    """x̂ ← e^{−λΔt}x̂ + (1 − e^{−λΔt})·(s²/r²)/κ²·y: exact for an observation that stays as it is.

    Args:
        belief: x̂, any shape.
        observation: y, same shape.
        decay: a.
        signal: s²/r²; numbers, or tensors that broadcast.
        discount: γ.
        time: Δt.

    Example:
        >>> updated_belief(torch.zeros(1), torch.ones(1), decay=0.0, signal=1.0, discount=0.0, time=1.0)
        tensor([0.6321])
    """
    rate = torch.as_tensor(_rate(decay, signal, discount), dtype=belief.dtype, device=belief.device)
    return belief - torch.expm1(-rate * time) * (_gain(decay, signal, discount) * observation - belief)


def observe_moments(
    mean: Tensor, square: Tensor, gradient: Tensor, beliefs: tuple[Belief, Belief], discount: Number
) -> tuple[Tensor, Tensor]:
    """Beliefs (m, v) after a gradient, seen as g ~ N(m, r_m²) and g² ~ N(v, r_v²), independently.

    The linear model of Eq. 142; v is the mean square. In the regime γ ≫ κ it is Adam's pair of averages.

    Args:
        mean: m, any shape.
        square: v, same shape.
        gradient: g, same shape.
        beliefs: of m and of v.
        discount: γ per step.
    """
    (decay_m, signal_m), (decay_v, signal_v) = (_numbers(belief, mean) for belief in beliefs)
    discount = per_replica(discount, mean)
    return (
        updated_belief(mean, gradient, decay_m, signal_m, discount),
        updated_belief(square, gradient.square(), decay_v, signal_v, discount),
    )


def observe_gaussian(
    mean: Tensor, variance: Tensor, gradient: Tensor, beliefs: tuple[Belief, Belief], discount: Number
) -> tuple[Tensor, Tensor]:
    """Beliefs (m, v) after a gradient, seen as g ~ N(m, v): v is the variance about m (Eqs. 138-140).

    The sources are (s_m²/v)(m − g) and (s_v²/2v²)(v − (g − m)²): the observation noises are r_m² = v and
    r_v² = 2v², the variance of (g − m)², and are held fixed during the step (first-order exact). The noises of
    the beliefs multiply these; 1 is the model itself. A variance of 0 takes the first observation as it is.

    Args:
        mean: m, any shape.
        variance: v ≥ 0, same shape; stays ≥ 0.
        gradient: g, same shape.
        beliefs: of m and of v.
        discount: γ per step.
    """
    (decay_m, signal_m), (decay_v, signal_v) = (_numbers(belief, mean) for belief in beliefs)
    discount = per_replica(discount, mean)
    noise = variance.clamp(min=_SMALLEST)
    return (
        updated_belief(mean, gradient, decay_m, signal_m / noise, discount),
        updated_belief(
            variance, (gradient - mean).square(), decay_v, signal_v / (2.0 * noise.square()), discount
        ),
    )


def _numbers(belief: Belief, like: Tensor) -> tuple[Number, Number]:
    return per_replica(belief.decay, like), per_replica(belief.signal, like)


def _rate(decay: Number, signal: Number, discount: Number) -> Number:
    if not isinstance(discount, Tensor) and discount == 0.0:
        square = decay * decay + signal
        return square.sqrt() if isinstance(square, Tensor) else math.sqrt(square)
    return stable_root(decay + (decay * decay + signal) / discount, discount)


def _gain(decay: Number, signal: Number, discount: Number) -> Number:
    if not isinstance(decay, Tensor) and decay == 0.0:
        return 1.0
    return 1.0 / (1.0 + decay * (decay + discount) / signal)
