"""Scores of many seeds and streams as one number, with stratified bootstrap intervals.

The definitions are those of Agarwal, Schwarzer, Castro, Courville, Bellemare, "Deep reinforcement learning at
the edge of the statistical precipice" (NeurIPS 2021, arXiv 2108.13264) and of their package rliable. Scores are
a matrix (seeds, streams): one number for each run, more is better. Its streams are the strata: a resample draws,
for each stream by itself, as many seeds as there are, with replacement. Draws are fixed, so that equal scores
give equal intervals. An interval says what other seeds would change, not what other streams would.
"""

import numpy as np
from numpy.typing import ArrayLike

from clagrange.metrics.intervals import RESAMPLES, Array, Interval, check_confidence

PROFILE_RESAMPLES = 2_000
"""Bootstrap resamples of the band of a profile, which is only looked at."""
_SEED = 0


def interquartile_mean(values: ArrayLike) -> Array:
    """Mean of the middle half of the last dimension, without the ⌊n/4⌋ smallest and the ⌊n/4⌋ largest values.

    Less moved by single runs than the mean, and statistically more efficient than the median (Agarwal et al.
    2021, section 4.3). With fewer than 4 values it is the mean.

    Args:
        values: shape (..., n).

    Returns:
        Shape (...).

    Example:
        >>> float(interquartile_mean([0.0, 2.0, 3.0, 100.0]))
        2.5
    """
    ordered = np.sort(np.asarray(values, dtype=np.float64), axis=-1)
    cut = ordered.shape[-1] // 4
    means: Array = ordered[..., cut : ordered.shape[-1] - cut].mean(-1)
    return means


def interquartile_interval(scores: ArrayLike, *, confidence: float = 0.95) -> Interval:
    """Interquartile mean over all runs of all streams, with its stratified bootstrap interval (percentiles).

    Args:
        scores: shape (seeds, streams), or (seeds,) of one stream.
        confidence: between 0 and 1.

    Returns:
        The interquartile mean in place of the mean. All None where a run has no finite number; no interval with
        one seed.

    Raises:
        ValueError: for another shape, or a confidence out of range.

    Example:
        >>> interquartile_interval([0.5, 0.5, 0.5, 0.9]).mean
        0.5
    """
    matrix = _scores(scores, "scores")
    check_confidence(confidence)
    if not np.isfinite(matrix).all():
        return Interval(None, None, None)
    middle = float(interquartile_mean(matrix.reshape(-1)))
    if len(matrix) == 1:
        return Interval(middle, None, None)
    seeds, streams = matrix.shape
    drawn = np.random.default_rng(_SEED).integers(seeds, size=(RESAMPLES, seeds, streams))
    resampled = matrix[drawn, np.arange(streams)].reshape(RESAMPLES, -1)
    return Interval(middle, *_percentiles(interquartile_mean(resampled), confidence))


def performance_profile(
    scores: ArrayLike, thresholds: ArrayLike, *, confidence: float = 0.95
) -> tuple[Array, Array, Array]:
    """Share of the runs whose score is above τ, for each threshold τ, with a stratified bootstrap band.

    F(τ) = 1/(seeds · streams) Σ 1[score > τ] (Agarwal et al. 2021, section 4.2, "score distribution"). A curve
    that lies above another everywhere belongs to a method that is stochastically better. The band (2,000
    resamples) holds at each τ by itself, not for the whole curve at once. Between streams of different
    difficulty scores are comparable only as far as their unit is.

    Args:
        scores: shape (seeds, streams), or (seeds,) of one stream.
        thresholds: τ, shape (thresholds,).
        confidence: between 0 and 1.

    Returns:
        Share, low and high, each (thresholds,): NaN where a run has no finite number; low and high are NaN with
        one seed.

    Raises:
        ValueError: for another shape, or a confidence out of range.

    Example:
        >>> share, low, high = performance_profile([0.2, 0.4, 0.6, 0.8], [0.0, 0.5, 1.0])
        >>> share
        array([1. , 0.5, 0. ])
    """
    matrix, taus = _scores(scores, "scores"), np.asarray(thresholds, dtype=np.float64)
    check_confidence(confidence)
    if taus.ndim != 1:
        raise ValueError(f"thresholds: expected shape (thresholds,), got {taus.shape}")
    nothing = np.full(taus.shape, np.nan)
    if not np.isfinite(matrix).all():
        return nothing, nothing, nothing
    above = matrix[..., None] > taus  # (seeds, streams, thresholds)
    share: Array = above.mean((0, 1))
    if len(matrix) == 1:
        return share, nothing, nothing
    counts = _counts(matrix, PROFILE_RESAMPLES, np.random.default_rng(_SEED))
    shares = np.tensordot(counts, above.astype(np.float64), axes=((1, 2), (1, 0))) / matrix.size
    tail = (1 - confidence) / 2
    low, high = np.quantile(shares, [tail, 1 - tail], axis=0)
    return share, low, high


def improvement(a: ArrayLike, b: ArrayLike) -> float:
    """Probability that a run of a scores higher than a run of b on the same stream, a tie counting one half.

    P = 1/streams Σ_stream 1/(n·m) Σ_ij (1[a_i > b_j] + ½·1[a_i = b_j]), which is the Mann-Whitney statistic over
    n·m (Agarwal et al. 2021, section 4.3). It says how often a wins, not by how much. Runs are taken as
    independent: the pairing by seed is not used.

    Args:
        a: finite scores, shape (n, streams), or (n,) of one stream.
        b: finite scores, shape (m, streams), or (m,).

    Raises:
        ValueError: for other shapes or different numbers of streams.

    Example:
        >>> improvement([0.5, 0.7], [0.5, 0.6])
        0.625
    """
    return float(_wins(a, b).mean())


def improvement_interval(a: ArrayLike, b: ArrayLike, *, confidence: float = 0.95) -> Interval:
    """`improvement` with its stratified bootstrap interval; runs of a and of b are drawn independently.

    Where every run of a is better than every run of b the interval is [1, 1], however few the seeds: the
    bootstrap knows no other runs. Read it together with a test.

    Args:
        a: shape (n, streams), or (n,) of one stream.
        b: shape (m, streams), or (m,).
        confidence: between 0 and 1.

    Returns:
        All None where a run has no finite number; no interval with one seed on either side.

    Raises:
        ValueError: for other shapes, different numbers of streams, or a confidence out of range.

    Example:
        >>> improvement_interval([0.8, 0.9], [0.1, 0.2])
        Interval(mean=1.0, low=1.0, high=1.0)
    """
    of_a, of_b = _scores(a, "a"), _scores(b, "b")
    check_confidence(confidence)
    wins = _wins(of_a, of_b)
    if not (np.isfinite(of_a).all() and np.isfinite(of_b).all()):
        return Interval(None, None, None)
    mean = float(wins.mean())
    if min(len(of_a), len(of_b)) == 1:
        return Interval(mean, None, None)
    random = np.random.default_rng(_SEED)
    counts_a, counts_b = (_counts(matrix, RESAMPLES, random) for matrix in (of_a, of_b))
    resampled = np.einsum("rsi,sij,rsj->r", counts_a, wins, counts_b, optimize=True) / wins.size
    return Interval(mean, *_percentiles(resampled, confidence))


def _wins(a: ArrayLike, b: ArrayLike) -> Array:
    """Shape (streams, n, m): 1 where the run of a is better, ½ where both are equal."""
    of_a, of_b = _scores(a, "a").T, _scores(b, "b").T
    if len(of_a) != len(of_b):
        raise ValueError(f"b: expected the {len(of_a)} streams of a, got {len(of_b)}")
    left, right = of_a[:, :, None], of_b[:, None, :]
    wins: Array = (left > right) + 0.5 * (left == right)
    return wins


def _counts(matrix: Array, resamples: int, random: np.random.Generator) -> Array:
    """Shape (resamples, streams, seeds): how often each seed is in each resample of each stream."""
    seeds, streams = matrix.shape
    counts: Array = random.multinomial(seeds, np.full(seeds, 1 / seeds), (resamples, streams)).astype(np.float64)
    return counts


def _percentiles(resampled: Array, confidence: float) -> tuple[float, float]:
    tail = (1 - confidence) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return float(low), float(high)


def _scores(values: ArrayLike, name: str) -> Array:
    matrix = np.asarray(values, dtype=np.float64)
    if matrix.ndim == 1:
        matrix = matrix[:, None]
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise ValueError(
            f"{name}: expected shape (seeds, streams) or (seeds,) with at least one of each, got {matrix.shape}"
        )
    return matrix
