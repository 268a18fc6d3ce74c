"""The Kronecker methods on real digits: no setting within a decade of its default diverges.

With "exact" damping, which moves along axes that are some steps old, a trust region above twice the default is
out of bounds (see `clagrange.gaussian.KroneckerPrecision`), and what was consolidated has to be held by a prior
of the default variance or less.
"""

import dataclasses

import numpy as np
import pytest

import clagrange
from clagrange.study.engine import Run
from clagrange.study.methods import EulerLagrangeKronecker, EulerLagrangeKroneckerInjection, Method
from clagrange.study.side_by_side import stacked
from clagrange.tasks import PermutedDigits

each = pytest.mark.parametrize("damping", ["factored", "exact"])

DECADE = ("lr", "temperature", "prior_variance", "variance_rate", "trust_region")
"""Settings that are tried at a tenth and at ten times their default."""
OTHERS = {"prior_pull": (0.0, 0.01, 1.0), "discount": (0.1, 1.0, 10.0)}
"""Values of those whose default is 0, infinite, or near the end of their range."""
INTERVALS = {"observe_every": (10,), "refresh_every": (2, 200)}
"""Numbers of steps; those are not stacked."""


def varied(default: EulerLagrangeKronecker, **others: tuple[float, ...]) -> dict[str, Method]:
    """A method, and the same with one setting changed at a time."""
    values = {name: (0.1 * getattr(default, name), 10.0 * getattr(default, name)) for name in DECADE} | others
    if default.damping == "exact":
        values["trust_region"] = (0.1 * default.trust_region, 2.0 * default.trust_region)
    changed = {
        f"{name}={value:g}": dataclasses.replace(default, **{name: value})
        for name, several in values.items()
        for value in several
    }
    return {"default": default, **changed}


def accuracies(
    methods: dict[str, Method], tasks: int = 3, examples: int = 1600, consolidate: bool = False
) -> dict[str, np.ndarray]:
    """The online accuracy of every task, of all methods at once; all numbers are finite."""
    stream = PermutedDigits(tasks=tasks, examples=examples, batch_size=4)
    run = Run(stacked(list(methods.values()), 1), [stream] * len(methods), [64, 64])
    for _ in range(tasks):
        run.run_task()
        if consolidate:
            clagrange.consolidate(run.network)
    assert all(parameter.isfinite().all() for parameter in run.network.parameters())
    assert np.isfinite(run.metrics["loss"]).all()
    return dict(zip(methods, run.metrics["online_accuracy"], strict=True))


def assert_learnt(found: dict[str, np.ndarray]) -> None:
    """Every task by every method, far above chance, .1, where those are that have diverged."""
    failed = {name: accuracy for name, accuracy in found.items() if accuracy.min() < 0.25}
    assert not failed, failed


@pytest.mark.slow
@each
def test_no_setting_within_a_decade_of_the_default_diverges(damping: str) -> None:
    """Nor is the last task learnt much worse than the first."""
    default = EulerLagrangeKroneckerInjection(damping=damping)
    found = accuracies(varied(default, strength=(0.03, 1.0), **OTHERS))
    assert found["default"].min() > 0.8
    failed = {name: accuracy for name, accuracy in found.items() if accuracy[-1] <= max(0.5, accuracy[0] - 0.1)}
    assert not failed, failed


@pytest.mark.slow
@each
def test_nor_does_one_without_injection(damping: str) -> None:
    methods = varied(EulerLagrangeKronecker(damping=damping), **OTHERS)
    assert_learnt(accuracies(methods, examples=800))


@pytest.mark.slow
@each
def test_nor_does_one_whose_prior_is_consolidated(damping: str) -> None:
    """After every task, at the temperature that counts its examples once; old tasks hold the weights then."""
    methods = varied(EulerLagrangeKronecker(damping=damping, temperature=1 / 800), **OTHERS)
    if damping == "exact":
        del methods["prior_variance=10"]
    assert_learnt(accuracies(methods, examples=800, consolidate=True))


@pytest.mark.slow
@each
@pytest.mark.parametrize(("name", "steps"), [(name, n) for name, several in INTERVALS.items() for n in several])
def test_nor_does_an_interval(damping: str, name: str, steps: int) -> None:
    method = EulerLagrangeKroneckerInjection(damping=damping, **{name: steps})
    assert_learnt(accuracies({"alone": method}, tasks=2, examples=800))
