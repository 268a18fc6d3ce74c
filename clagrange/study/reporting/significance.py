"""Whether differences between methods could be chance: paired permutation tests, corrected for their number."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

PERMUTATIONS = 10_000
"""Most exchanges that are enumerated; beyond them as many are drawn."""
_SEED = 0


def paired_permutation_test(a: ArrayLike, b: ArrayLike) -> float | None:
    """Two-sided p of the mean paired difference a − b, if the labels "a" and "b" meant nothing.

    Under that hypothesis both labels of a pair could be exchanged, which turns the sign of its difference d_i.
    p is the share of the 2ⁿ choices of signs s_i for which |Σ s_i d_i| ≥ |Σ d_i| (Fisher, The Design of
    Experiments, 1935, section 21). All are enumerated where they are at most 10,000 (13 pairs); else 10,000 are
    drawn, always the same, and p = 2 (1 + k) / (1 + 10,000), where k of them are as far out on the same side. The
    smallest p that n pairs can give is 2/2ⁿ (`smallest_p`): .0625 with 5 seeds, .0078 with 8, whatever the
    difference.

    Args:
        a: one score for each pair, any shape; pairs are runs of the same seed on the same stream.
        b: the same shape.

    Returns:
        None with fewer than two pairs, or where one has no finite difference.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> paired_permutation_test([0.7, 0.8, 0.9], [0.5, 0.6, 0.7])
        0.25
    """
    of_a, of_b = (np.asarray(values, dtype=np.float64) for values in (a, b))
    if of_a.shape != of_b.shape:
        raise ValueError(
            f"b: expected the shape of a {of_a.shape}, got {of_b.shape}; only pairs can be exchanged"
        )
    if of_a.size < 2 or not (np.isfinite(of_a).all() and np.isfinite(of_b).all()):
        return None
    from scipy import stats

    tested = stats.permutation_test(
        (of_a.reshape(-1), of_b.reshape(-1)),
        lambda first, second, axis: (first - second).mean(axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=PERMUTATIONS,
        alternative="two-sided",
        rng=np.random.default_rng(_SEED),
    )
    return float(tested.pvalue)


def smallest_p(pairs: int, comparisons: int = 1) -> float:
    """The smallest p, corrected by `holm`, that a paired permutation test of n pairs gives: comparisons · 2/2ⁿ.

    With 8 seeds and 15 comparisons it is .12: then no p can be below .05, however large the difference.

    Example:
        >>> smallest_p(8), smallest_p(8, 15)
        (0.0078125, 0.1171875)
    """
    drawn = 2.0**pairs > PERMUTATIONS
    return min(1.0, comparisons * (2 / (1 + PERMUTATIONS) if drawn else 2.0 ** (1 - pairs)))


def pairs_needed(comparisons: int, level: float = 0.05) -> int:
    """The smallest number of pairs with which a corrected p below ``level`` is possible.

    Example:
        >>> pairs_needed(1), pairs_needed(15)
        (6, 10)
    """
    return math.floor(math.log2(2 * comparisons / level)) + 1


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """p values corrected for their number, such that any false rejection is as rare as the level says.

    Ordered p_(1) ≤ … ≤ p_(m), the corrected p_(i) is max_{j ≤ i} (m − j + 1) p_(j), at most 1 (Holm, Scandinavian
    Journal of Statistics 6, 1979). It holds for tests that depend on each other. None, of what was not tested,
    stays None and is not counted.

    Args:
        p_values: of one family of tests.

    Returns:
        In the same order.

    Raises:
        ValueError: for a p that is not between 0 and 1.

    Example:
        >>> holm([0.01, None, 0.04, 0.03])
        [0.03, None, 0.06, 0.06]
    """
    for p in p_values:
        if p is not None and not 0 <= p <= 1:
            raise ValueError(f"p_values: expected numbers between 0 and 1, got {p}")
    tested = sorted((p, at) for at, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for before, (p, at) in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - before) * p))
        corrected[at] = largest
    return corrected
