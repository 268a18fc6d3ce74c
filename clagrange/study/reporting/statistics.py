"""Intervals over seeds: of a mean, of a curve, of the paired difference of two methods."""

import math

import numpy as np
from numpy.typing import ArrayLike

from clagrange.metrics.intervals import Array, Interval, bootstrap, check_confidence, interval
from clagrange.study.results import MethodResult

__all__ = ["Array", "Interval", "band", "interval", "paired_difference", "tenths"]

CURVE_RESAMPLES = 1_000
"""Bootstrap resamples of a band, which is only looked at."""


def band(curves: ArrayLike, *, confidence: float = 0.95) -> tuple[Array, Array, Array]:
    """Mean, low and high over seeds at each task, by the percentile bootstrap of `interval` (1,000 resamples).

    The band holds for each task on its own, not for the whole curve at once.

    Args:
        curves: shape (seeds, tasks).
        confidence: between 0 and 1.

    Returns:
        Three arrays of shape (tasks,): NaN at tasks where a seed has no finite number; low and high are NaN
        everywhere with one seed.

    Raises:
        ValueError: if ``curves`` is not a matrix with at least one seed, or ``confidence`` is out of range.

    Example:
        >>> mean, low, high = band([[0.0, 0.5], [1.0, 0.5]])
        >>> mean, low
        (array([0.5, 0.5]), array([0. , 0.5]))
    """
    values = _matrix(curves, "curves")
    check_confidence(confidence)
    mean, low, high = (np.full(values.shape[1], np.nan) for _ in range(3))
    finite = np.isfinite(values).all(0)
    mean[finite] = values[:, finite].mean(0)
    if len(values) > 1 and finite.any():
        bounds = bootstrap(values[:, finite], confidence, CURVE_RESAMPLES)
        low[finite], high[finite] = bounds.low, bounds.high
    return mean, low, high


def tenths(values: ArrayLike) -> tuple[Array, Array]:
    """Mean of each seed over the first and over the last ⌈tasks/10⌉ tasks.

    Args:
        values: shape (seeds, tasks).

    Returns:
        Two arrays of shape (seeds,). Their difference, last minus first, is the change that a loss of
        plasticity makes negative.

    Raises:
        ValueError: if ``values`` is not a matrix with at least one seed and one task.

    Example:
        >>> tenths([[0.9, 0.8, 0.7]])
        (array([0.9]), array([0.7]))
    """
    matrix = _matrix(values, "values")
    tenth = math.ceil(matrix.shape[1] / 10)
    return matrix[:, :tenth].mean(1), matrix[:, -tenth:].mean(1)


def paired_difference(
    a: MethodResult, b: MethodResult, *, metric: str | None = None, confidence: float = 0.95
) -> Interval:
    """Interval of a − b, the mean over tasks of ``metric`` (default: what they are judged by), seed by seed.

    The same seed means the same data in the same order and the same initial weights, so what the seeds share
    cancels, and the interval is usually narrower than those of the two methods suggest. What `interval` says
    about few seeds holds here too.

    Raises:
        ValueError: if the two are of different streams, seeds or numbers of tasks.

    Example:
        >>> import numpy as np
        >>> accuracy = {"online_accuracy": np.array([[0.5, 0.7], [0.8, 1.0]])}
        >>> a = MethodResult("digits", "a", False, (0, 1), accuracy, (False, False), 10, 1.0)
        >>> paired_difference(a, a)
        Interval(mean=0.0, low=0.0, high=0.0)
    """
    for what in ("stream", "seeds", "tasks"):
        of_a, of_b = getattr(a, what), getattr(b, what)
        if of_a != of_b:
            raise ValueError(
                f"b: expected the {what} of a ({of_a}), got {of_b}; only runs on the same data can be paired"
            )
    metric = metric or a.measure
    of_seeds_a, of_seeds_b = (_matrix(result.metrics[metric], metric).mean(1) for result in (a, b))
    with np.errstate(invalid="ignore"):
        difference = of_seeds_a - of_seeds_b
    return interval(difference, confidence=confidence)


def _matrix(values: ArrayLike, name: str) -> Array:
    matrix = np.asarray(values, dtype=np.float64)
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise ValueError(f"{name}: expected shape (seeds, tasks) with at least one of each, got {matrix.shape}")
    return matrix
