"""What tests of stored studies share."""

from collections.abc import Iterable

import numpy as np

from clagrange.study.results import METRICS, MethodResult


def assert_same(results: Iterable[MethodResult], others: Iterable[MethodResult]) -> None:
    """The same runs with the same numbers, bit for bit."""
    for result, other in zip(results, others, strict=True):
        assert (result.stream, result.method, result.seeds) == (other.stream, other.method, other.seeds)
        for name in METRICS:
            np.testing.assert_array_equal(result.metrics[name], other.metrics[name])
