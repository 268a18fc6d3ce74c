"""Learning as a matter of time: samples and seconds to a threshold, and Fermat's form of it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike

from clagrange.metrics.efficiency import first_crossing
from clagrange.metrics.intervals import Array, Interval, interval


@dataclass(frozen=True)
class TimeToThreshold:
    """When the error of each seed first was at most the threshold.

    Attributes:
        threshold: δ.
        per_seed: one time for each seed; inf for one that never was.
        interval: mean over seeds and its confidence interval; its mean is None if a seed never was, because
            leaving that one out would flatter the method.
        reached: fraction of the seeds that were.
    """

    threshold: float
    per_seed: tuple[float, ...]
    interval: Interval
    reached: float


def samples_to_threshold(
    errors: ArrayLike, samples: ArrayLike, threshold: float, *, confidence: float = 0.95
) -> TimeToThreshold:
    """T_sample(δ): the number of samples after which the error is first at most δ, over seeds.

    Args:
        errors: (seeds, points), or (points,) for one seed.
        samples: how many samples each point had seen, ascending: (points,), or (seeds, points).
        threshold: δ.
        confidence: of the percentile bootstrap over seeds, see `clagrange.metrics.intervals.interval`.

    Raises:
        ValueError: if shapes do not fit, samples do not ascend, or an error is not a number.

    Example:
        >>> found = samples_to_threshold([[0.9, 0.4, 0.2], [0.8, 0.6, 0.3]], [10, 20, 30], threshold=0.4)
        >>> found.per_seed, found.interval.mean
        ((20.0, 30.0), 25.0)
    """
    return _times(errors, samples, threshold, confidence, "samples")


def seconds_to_threshold(
    errors: ArrayLike, seconds: ArrayLike, threshold: float, *, confidence: float = 0.95
) -> TimeToThreshold:
    """T_compute(δ): the wall time after which the error is first at most δ, over seeds.

    Args:
        errors: (seeds, points), or (points,) for one seed.
        seconds: time since the start at each point, ascending: (points,), or (seeds, points).
        threshold: δ.
        confidence: as in `samples_to_threshold`.

    Raises:
        ValueError: as in `samples_to_threshold`.

    Example:
        >>> seconds_to_threshold([0.9, 0.4], [1.5, 3.0], threshold=0.1).per_seed
        (inf,)
    """
    return _times(errors, seconds, threshold, confidence, "seconds")


@dataclass(frozen=True)
class LearningSpeed:
    """How fast the error falls at each level of it: r(ε) = −dε/dt, constant between two levels.

    Attributes:
        levels: falling errors ε₀ > ε₁ > …, (n + 1,).
        rates: r between ε_{i} and ε_{i+1}, (n,), positive.
    """

    levels: Array
    rates: Array

    def rate(self, errors: ArrayLike) -> Array:
        """r at the given errors; 0 outside the levels."""
        where = np.asarray(errors, dtype=np.float64)
        index = np.searchsorted(-self.levels, -where, side="left") - 1
        inside = (index >= 0) & (index < len(self.rates))
        return np.where(inside, self.rates[np.clip(index, 0, len(self.rates) - 1)], 0.0)


def learning_speed(errors: ArrayLike, at: ArrayLike) -> LearningSpeed:
    """r(ε) of a measured error curve: each new lowest error over the time since the one before.

    A curve that rises in between counts as standing still: what it lost it has to win again.

    Args:
        errors: (points,); average over seeds first. The first is ε[∅].
        at: samples or seconds of the points, strictly ascending.

    Raises:
        ValueError: if shapes do not fit, times do not ascend, or the error never falls.

    Example:
        >>> learning_speed([1.0, 0.5, 0.6, 0.25], [0, 1, 2, 3]).rates
        array([0.5  , 0.125])
    """
    curve, times = np.atleast_1d(np.asarray(errors, np.float64)), np.atleast_1d(np.asarray(at, np.float64))
    if curve.ndim != 1 or curve.shape != times.shape:
        raise ValueError(
            f"at: expected the shape of errors, one dimension, got {times.shape} and {curve.shape}; average over "
            f"seeds first"
        )
    if not np.isfinite(curve).all():
        raise ValueError("errors: expected finite numbers, got some that are not; leave these points out")
    if not (np.diff(times) > 0).all():
        raise ValueError("at: expected strictly ascending samples or seconds; sort the points")
    lowest = np.minimum.accumulate(curve)
    new = np.concatenate([[True], lowest[1:] < lowest[:-1]])
    levels, moments = lowest[new], times[new]
    if len(levels) < 2:
        raise ValueError("errors: expected a curve that falls, got none below the first; it learned nothing")
    return LearningSpeed(levels, -np.diff(levels) / np.diff(moments))


def fermat_time(speeds: LearningSpeed | Sequence[LearningSpeed], threshold: float) -> float:
    """Fermat's T(δ) = ∫_δ^{ε[∅]} dε / max_s r(ε, s): the least time of whoever is fastest at each level.

    For one curve it is the time from its first point to its first crossing of δ, between points on a straight
    line. For several it is what changing over to the fastest of them at every level would take, as light takes
    the fastest path, if what was learned by one served the next; it is at most the time of each alone.

    Args:
        speeds: one `learning_speed` or several; the integral begins at the largest of their errors.
        threshold: δ.

    Returns:
        The time in the unit of the curves; inf if none gets there; 0 if all start there.

    Example:
        >>> fast_then_slow = learning_speed([1.0, 0.5, 0.0], [0.0, 1.0, 11.0])
        >>> slow_then_fast = learning_speed([1.0, 0.5, 0.0], [0.0, 10.0, 11.0])
        >>> fermat_time(fast_then_slow, 0.0), fermat_time([fast_then_slow, slow_then_fast], 0.0)
        (11.0, 2.0)
    """
    curves = [speeds] if isinstance(speeds, LearningSpeed) else list(speeds)
    if not curves:
        raise ValueError("speeds: expected at least one learning_speed, got none")
    start = max(float(curve.levels[0]) for curve in curves)
    if threshold >= start:
        return 0.0
    cuts = np.unique(np.concatenate([[threshold, start], *(curve.levels for curve in curves)]))
    cuts = cuts[cuts >= threshold]
    middles, widths = 0.5 * (cuts[1:] + cuts[:-1]), np.diff(cuts)
    fastest = np.max([curve.rate(middles) for curve in curves], axis=0)
    if (fastest <= 0.0).any():
        return float("inf")
    return float((widths / fastest).sum())


def _times(errors: ArrayLike, at: ArrayLike, threshold: float, confidence: float, name: str) -> TimeToThreshold:
    curves = np.atleast_2d(np.array(errors, dtype=np.float64))
    if curves.ndim != 2:
        raise ValueError(f"errors: expected shape (points,) or (seeds, points), got {curves.shape}")
    if np.isnan(curves).any():
        raise ValueError("errors: expected numbers, got NaN; a seed that diverged has the error inf")
    points = np.array(at, dtype=np.float64)
    found = first_crossing(torch.from_numpy(curves), torch.from_numpy(points), threshold, name=name).numpy()
    return TimeToThreshold(
        float(threshold),
        tuple(float(value) for value in found),
        interval(found, confidence=confidence),
        float(np.isfinite(found).mean()),
    )
