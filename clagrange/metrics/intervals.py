"""Intervals over seeds by the percentile bootstrap."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

RESAMPLES = 10_000
"""Bootstrap resamples of an interval."""
_BOOTSTRAP_SEED = 0


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and its confidence interval; None where there is no number.

    Attributes:
        mean: None if a seed has no finite value: leaving out the seed that diverged would flatter the method.
        low: lower end; None with fewer than two seeds.
        high: upper end; None with fewer than two seeds.
    """

    mean: float | None
    low: float | None
    high: float | None

    def as_dict(self) -> dict[str, float | None]:
        """The form in `summary.json`."""
        return {"mean": self.mean, "low": self.low, "high": self.high}


def interval(values_per_seed: ArrayLike, *, confidence: float = 0.95) -> Interval:
    """Mean over seeds with its percentile-bootstrap interval.

    Seeds are drawn with replacement 10,000 times, and the interval is the middle ``confidence`` share of the
    means. The draws are fixed, so that equal results give equal intervals. With few seeds (about fewer than
    10) the percentile bootstrap is too narrow: with 5 seeds of Gaussian values a nominal 95 % interval covers
    the true mean in about 85 % of cases.

    Args:
        values_per_seed: one number for each seed, shape (seeds,).
        confidence: between 0 and 1.

    Raises:
        ValueError: if the values are not one number per seed, or ``confidence`` is out of range.

    Example:
        >>> interval([0.5, 0.5, 0.5])
        Interval(mean=0.5, low=0.5, high=0.5)
        >>> interval([0.5])
        Interval(mean=0.5, low=None, high=None)
    """
    values = np.asarray(values_per_seed, dtype=np.float64)
    if values.ndim != 1:
        raise ValueError(
            f"values_per_seed: expected shape (seeds,), got {values.shape}; average over tasks first"
        )
    check_confidence(confidence)
    if values.size == 0 or not np.isfinite(values).all():
        return Interval(None, None, None)
    mean = float(values.mean())
    if values.size == 1:
        return Interval(mean, None, None)
    if (values == values[0]).all():
        same = float(values[0])
        return Interval(same, same, same)
    bounds = bootstrap(values, confidence, RESAMPLES)
    return Interval(mean, float(bounds.low), float(bounds.high))


def bootstrap(values: Array, confidence: float, resamples: int) -> Any:
    """The percentile-bootstrap interval of the mean over the first dimension, ``.low`` and ``.high``."""
    from scipy import stats

    return stats.bootstrap(
        (values,),
        np.mean,
        axis=0,
        n_resamples=resamples,
        confidence_level=confidence,
        method="percentile",
        vectorized=True,
        rng=np.random.default_rng(_BOOTSTRAP_SEED),
    ).confidence_interval


def check_confidence(confidence: float) -> None:
    """Raise unless ``confidence`` is between 0 and 1.

    Raises:
        ValueError: if it is not.
    """
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence: expected a number between 0 and 1, got {confidence}; 0.95 means 95 %")
