"""Intervals over seeds, against independent computations."""

import itertools
import math

import numpy as np
import pytest

from clagrange.study.reporting.statistics import Interval, band, interval, paired_difference, tenths
from clagrange.study.results import METRICS, MethodResult


def result(accuracy, *, stream="digits", method="sgd", seeds=None):
    accuracy = np.asarray(accuracy, dtype=np.float64)
    metrics = {name: np.full(accuracy.shape, np.nan) for name in METRICS} | {"online_accuracy": accuracy}
    seeds = tuple(range(len(accuracy))) if seeds is None else seeds
    return MethodResult(stream, method, False, seeds, metrics, (False,) * len(accuracy), 10, 1.0)


def exact_bootstrap(values, confidence=0.95):
    """Quantiles over all n^n equally likely resamples."""
    means = [sum(drawn) / len(values) for drawn in itertools.product(values, repeat=len(values))]
    tail = (1 - confidence) / 2
    return np.quantile(means, tail), np.quantile(means, 1 - tail)


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_interval_is_the_percentile_bootstrap(confidence):
    values = np.random.default_rng(0).normal(0.8, 0.02, 5)
    got = interval(values, confidence=confidence)
    low, high = exact_bootstrap(values, confidence)
    assert got.mean == pytest.approx(values.mean(), abs=1e-15)
    # 10,000 random resamples against all 3,125: the quantiles agree to a few percent of the width.
    assert got.low == pytest.approx(low, abs=0.05 * (high - low))
    assert got.high == pytest.approx(high, abs=0.05 * (high - low))


def test_interval_is_the_same_every_time_whatever_the_global_seed():
    values = [0.1, 0.4, 0.35, 0.2]
    np.random.seed(1)
    first = interval(values)
    np.random.seed(2)
    assert interval(values) == first


def test_interval_of_a_large_sample_is_the_normal_one():
    values = np.random.default_rng(3).normal(0.0, 1.0, 400)
    got = interval(values)
    half = 1.96 * values.std(ddof=1) / 20
    assert got.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert got.high == pytest.approx(values.mean() + half, abs=0.1 * half)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.3], Interval(0.3, None, None)),
        ([0.3, 0.3, 0.3], Interval(0.3, 0.3, 0.3)),
        ([0.3, math.nan], Interval(None, None, None)),
        ([0.3, math.inf, 0.1], Interval(None, None, None)),
        ([], Interval(None, None, None)),
    ],
)
def test_interval_of_unusual_values(values, expected):
    assert interval(values) == expected


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: interval([[0.1, 0.2]]), r"values_per_seed: expected shape \(seeds,\), got \(1, 2\)"),
        (lambda: interval([0.1], confidence=95), "confidence: expected a number between 0 and 1, got 95"),
        (lambda: band([0.1]), r"curves: expected shape \(seeds, tasks\)"),
        (lambda: tenths(np.empty((2, 0))), r"values: expected shape \(seeds, tasks\)"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_band_is_the_interval_at_each_task():
    curves = np.random.default_rng(4).normal(0.8, 0.02, (5, 7))
    mean, low, high = band(curves)
    for task in range(7):
        of_task = interval(curves[:, task])
        width = of_task.high - of_task.low
        assert mean[task] == pytest.approx(of_task.mean)
        # 1,000 resamples here, 10,000 there.
        assert low[task] == pytest.approx(of_task.low, abs=0.12 * width)
        assert high[task] == pytest.approx(of_task.high, abs=0.12 * width)


def test_band_has_no_number_where_a_seed_has_none():
    curves = np.ones((3, 4))
    curves[1, 2] = np.nan
    curves[0, 3] = np.inf
    for of in band(curves):
        np.testing.assert_array_equal(of, [1, 1, np.nan, np.nan])
    mean, low, high = band([[0.1, 0.2]])
    np.testing.assert_array_equal(mean, [0.1, 0.2])
    assert np.isnan(low).all()
    assert np.isnan(high).all()


@pytest.mark.parametrize(("tasks", "tenth"), [(1, 1), (9, 1), (10, 1), (11, 2), (100, 10), (101, 11)])
def test_tenths_take_the_ceiling(tasks, tenth):
    values = np.arange(2.0 * tasks).reshape(2, tasks)
    first, last = tenths(values)
    for seed in range(2):
        assert first[seed] == pytest.approx(sum(values[seed, at] for at in range(tenth)) / tenth)
        assert last[seed] == pytest.approx(sum(values[seed, -1 - at] for at in range(tenth)) / tenth)


def test_pairing_removes_what_seeds_share():
    random = np.random.default_rng(5)
    shared = random.normal(0, 0.1, (6, 1))
    a = 0.8 + shared + random.normal(0, 0.001, (6, 20))
    b = 0.79 + shared + random.normal(0, 0.001, (6, 20))
    paired = paired_difference(result(a), result(b))
    assert paired == interval([a[seed].mean() - b[seed].mean() for seed in range(6)])
    assert paired.low > 0.009
    assert paired.high < 0.011
    assert interval(a.mean(1)).low < interval(b.mean(1)).high  # unpaired, the two overlap


def test_pairing_of_numbers_that_are_none():
    a, b = result([[np.inf], [0.5]]), result([[np.inf], [0.4]])
    assert paired_difference(a, b) == Interval(None, None, None)
    assert paired_difference(result([[0.5]]), result([[0.25]])) == Interval(0.25, None, None)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (result([[0.5], [0.5]], seeds=(0, 2)), r"b: expected the seeds of a \(\(0, 1\)\), got \(0, 2\)"),
        (result([[0.5], [0.5]], stream="mnist"), r"b: expected the stream of a \(digits\), got mnist"),
        (result([[0.5, 0.5], [0.5, 0.5]]), r"b: expected the tasks of a \(1\), got 2"),
    ],
)
def test_only_runs_on_the_same_data_can_be_paired(other, message):
    with pytest.raises(ValueError, match=message):
        paired_difference(result([[0.5], [0.5]]), other)
