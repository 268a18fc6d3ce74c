"""Aggregate scores against enumeration and against scipy's bootstrap and trimmed mean."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from clagrange.metrics.intervals import Interval
from clagrange.study.reporting.aggregates import (
    improvement,
    improvement_interval,
    interquartile_interval,
    interquartile_mean,
    performance_profile,
)


def every_resample(scores):
    """All equally likely stratified resamples of a small (seeds, streams) matrix, as tuples of runs."""
    seeds = len(scores)
    of_stream = [list(itertools.product(column, repeat=seeds)) for column in np.asarray(scores).T]
    return [[run for stream in chosen for run in stream] for chosen in itertools.product(*of_stream)]


def quantiles(values, confidence=0.95):
    tail = (1 - confidence) / 2
    return np.quantile(values, tail), np.quantile(values, 1 - tail)


@pytest.mark.parametrize("count", [1, 3, 4, 5, 8, 11, 104])
def test_interquartile_mean_is_the_trimmed_mean(count):
    values = np.random.default_rng(count).normal(size=(3, count))
    expected = [stats.trim_mean(row, 0.25) for row in values]
    np.testing.assert_allclose(interquartile_mean(values), expected, rtol=1e-13)


def test_interquartile_interval_is_the_stratified_bootstrap():
    scores = np.random.default_rng(1).normal([0.2, 0.8], [0.05, 0.1], (3, 2))
    low, high = quantiles([stats.trim_mean(resample, 0.25) for resample in every_resample(scores)])
    got = interquartile_interval(scores)
    assert got.mean == pytest.approx(stats.trim_mean(scores.reshape(-1), 0.25))
    # 10,000 random resamples against all 729
    assert got.low == pytest.approx(low, abs=0.05 * (high - low))
    assert got.high == pytest.approx(high, abs=0.05 * (high - low))
    assert interquartile_interval(scores) == got


def test_interquartile_interval_of_one_stream_is_scipys():
    scores = np.random.default_rng(2).normal(0.8, 0.02, 9)
    expected = stats.bootstrap(
        (scores,),
        lambda values, axis: stats.trim_mean(values, 0.25, axis=axis),
        method="percentile",
        confidence_level=0.9,
        n_resamples=20_000,
        rng=np.random.default_rng(3),
    ).confidence_interval
    got = interquartile_interval(scores, confidence=0.9)
    width = expected.high - expected.low
    assert got.low == pytest.approx(expected.low, abs=0.05 * width)
    assert got.high == pytest.approx(expected.high, abs=0.05 * width)


def test_streams_are_strata():
    """Two streams far apart: unstratified draws would mix them and give an interval as wide as their distance."""
    scores = np.array([[0.0, 1.0], [0.01, 1.01], [0.02, 1.02], [0.03, 1.03]])
    got = interquartile_interval(scores)
    assert got.high - got.low < 0.05


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([0.3], Interval(0.3, None, None)),
        ([0.3, math.nan], Interval(None, None, None)),
        ([0.5, 0.5], Interval(0.5, 0.5, 0.5)),
    ],
)
def test_unusual_scores(scores, expected):
    assert interquartile_interval(scores) == expected


def test_profile_counts_runs_and_its_band_is_the_stratified_bootstrap():
    scores = np.array([[0.1, 0.1], [0.2, 0.25], [0.4, 0.9]])
    taus = [0.0, 0.15, 0.2, 0.3, 2.0]
    share, low, high = performance_profile(scores, taus)
    runs = scores.reshape(-1)
    np.testing.assert_allclose(share, [sum(run > tau for run in runs) / 6 for tau in taus])
    resamples = np.array(every_resample(scores))
    for at, tau in enumerate(taus):
        expected = quantiles((resamples > tau).mean(1))
        assert (low[at], high[at]) == pytest.approx(expected)
    assert (low[0], high[0], low[-1], high[-1]) == (1, 1, 0, 0)
    assert (low[1:4] < share[1:4]).all()
    assert (share[1:4] < high[1:4]).all()
    assert np.isnan(performance_profile([0.1, np.nan], taus)[0]).all()
    share, low, _ = performance_profile([0.1], taus)
    np.testing.assert_array_equal(share, [1, 0, 0, 0, 0])
    assert np.isnan(low).all()


def test_improvement_is_the_mann_whitney_statistic():
    random = np.random.default_rng(4)
    a, b = random.integers(0, 5, (6, 3)) / 4, random.integers(0, 5, (4, 3)) / 4  # with ties
    expected = [stats.mannwhitneyu(a[:, at], b[:, at]).statistic / 24 for at in range(3)]
    assert improvement(a, b) == pytest.approx(np.mean(expected))
    assert improvement(b, a) == pytest.approx(1 - np.mean(expected))


def test_improvement_interval_is_the_bootstrap_of_both():
    a, b = [0.4, 0.6, 0.7], [0.3, 0.5, 0.65]
    resampled = [
        improvement(drawn_a, drawn_b)
        for drawn_a in itertools.product(a, repeat=3)
        for drawn_b in itertools.product(b, repeat=3)
    ]
    got = improvement_interval(a, b)
    assert got.mean == pytest.approx(6 / 9)
    assert (got.low, got.high) == pytest.approx(quantiles(resampled))
    assert improvement_interval([0.5], [0.4, 0.6]) == Interval(0.5, None, None)
    assert improvement_interval([0.5, math.inf], [0.4, 0.6]) == Interval(None, None, None)


def test_improvement_interval_draws_the_two_independently():
    """Of a method against itself, drawn together it would always win half of the time."""
    scores = np.random.default_rng(5).normal(size=8)
    got = improvement_interval(scores, scores)
    assert got.mean == 0.5
    assert got.low < 0.3
    assert got.high > 0.7


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: interquartile_interval(0.5), r"scores: expected shape \(seeds, streams\) or \(seeds,\)"),
        (lambda: interquartile_interval(np.empty((0, 2))), r"at least one of each, got \(0, 2\)"),
        (lambda: interquartile_interval([0.1], confidence=95), "confidence: expected a number between 0 and 1"),
        (lambda: performance_profile([0.1], 0.5), r"thresholds: expected shape \(thresholds,\), got \(\)"),
        (lambda: improvement([[0.1, 0.2]], [0.1]), "b: expected the 2 streams of a, got 1"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
