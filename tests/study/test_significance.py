"""Permutation tests and their correction, against enumeration."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from clagrange.study.reporting.significance import holm, paired_permutation_test, pairs_needed, smallest_p


def by_signs(differences):
    """The share of all choices of signs whose sum is as far from 0."""
    observed = abs(sum(differences))
    sums = [
        abs(sum(sign * difference for sign, difference in zip(signs, differences, strict=True)))
        for signs in itertools.product([1, -1], repeat=len(differences))
    ]
    return sum(total >= observed - 1e-12 for total in sums) / len(sums)


@pytest.mark.parametrize("seeds", [2, 3, 5, 8, 10])
def test_few_pairs_are_enumerated(seeds):
    random = np.random.default_rng(seeds)
    for shift in (0.0, 0.02, 1.0):
        a, b = random.normal(0.8 + shift, 0.02, seeds), random.normal(0.8, 0.02, seeds)
        assert paired_permutation_test(a, b) == pytest.approx(by_signs(a - b))
    assert paired_permutation_test(b + 1, b) == smallest_p(seeds) == 2 / 2**seeds
    assert paired_permutation_test(b, b) == 1


def test_ties_count():
    a, b = [0.5, 0.5, 0.7, 0.9], [0.5, 0.3, 0.5, 0.7]
    assert paired_permutation_test(a, b) == pytest.approx(by_signs([0.0, 0.2, 0.2, 0.2])) == 0.25


def test_many_pairs_are_drawn_always_the_same_and_agree_with_the_t_test():
    random = np.random.default_rng(6)
    a, b = random.normal(0.3, 1.0, (10, 6)), random.normal(0.0, 1.0, (10, 6))  # seeds and streams
    p = paired_permutation_test(a, b)
    assert p == pytest.approx(stats.ttest_rel(a.reshape(-1), b.reshape(-1)).pvalue, abs=0.01)
    np.random.seed(1)
    assert paired_permutation_test(a, b) == p
    assert paired_permutation_test(b + 1, b) == pytest.approx(smallest_p(60)) == 2 / 10_001


def test_pairing_sees_what_seeds_share():
    shared = np.linspace(0, 1, 8)
    small = np.random.default_rng(7).normal(0, 0.001, 8)
    assert paired_permutation_test(shared + 0.01 + small, shared) == 2 / 2**8
    assert stats.ttest_ind(shared + 0.01 + small, shared).pvalue > 0.9


def test_what_cannot_be_tested_has_no_p():
    assert paired_permutation_test([0.5], [0.4]) is None
    assert paired_permutation_test([0.5, math.nan], [0.4, 0.3]) is None
    with pytest.raises(ValueError, match=r"b: expected the shape of a \(2,\), got \(3,\)"):
        paired_permutation_test([0.5, 0.6], [0.4, 0.3, 0.2])


def by_closure(p_values):
    """Holm is the closure of Bonferroni: the largest Bonferroni p of all sets of tests that contain one."""
    indices = range(len(p_values))
    sets = [some for size in range(1, len(p_values) + 1) for some in itertools.combinations(indices, size)]
    return [
        min(1.0, max(len(some) * min(p_values[at] for at in some) for some in sets if index in some))
        for index in indices
    ]


@pytest.mark.parametrize("count", [1, 2, 5, 7])
def test_holm_is_the_closure_of_bonferroni(count):
    p_values = list(np.random.default_rng(count).beta(0.3, 2.0, count))
    p_values[-1] = p_values[0]  # a tie
    assert holm(p_values) == pytest.approx(by_closure(p_values))


def test_holm_leaves_out_what_was_not_tested():
    assert holm([None, 0.02, None, 0.03]) == [None, 0.04, None, 0.04]
    assert holm([]) == []
    with pytest.raises(ValueError, match="p_values: expected numbers between 0 and 1, got 2"):
        holm([2.0])


def test_the_smallest_p_and_the_pairs_that_it_needs():
    rejected = paired_permutation_test(np.arange(8.0) + 1, np.arange(8.0))
    assert holm([rejected] * 15) == [smallest_p(8, 15)] * 15
    for comparisons in (1, 4, 15):
        enough = pairs_needed(comparisons)
        assert smallest_p(enough, comparisons) < 0.05 <= smallest_p(enough - 1, comparisons)
    assert smallest_p(2, 15) == 1
