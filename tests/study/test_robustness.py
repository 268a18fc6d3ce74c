"""The Kronecker method on real digits: no setting within a decade of its default diverges."""

import pytest
import torch

from clagrange.study.engine import Run
from clagrange.study.methods import EulerLagrangeKroneckerInjection
from clagrange.study.search import stacked
from clagrange.tasks import PermutedDigits

FACTORS = (0.1, 10.0)
SETTINGS = ("lr", "temperature", "prior_variance", "variance_rate", "trust_region")


@pytest.mark.slow
@pytest.mark.parametrize("damping", ["factored", "exact"])
def test_no_setting_within_a_decade_of_the_default_diverges(damping: str) -> None:
    default = EulerLagrangeKroneckerInjection(damping=damping)
    changed = {
        (name, factor): EulerLagrangeKroneckerInjection(
            damping=damping, **{name: factor * getattr(default, name)}
        )
        for name in SETTINGS
        for factor in FACTORS
    }
    methods = [default, *changed.values()]
    stream = PermutedDigits(tasks=3, examples=1600, batch_size=4)
    run = Run(stacked(methods, 1), [stream] * len(methods), [64, 64])
    for _ in range(stream.tasks):
        run.run_task()
    assert all(parameter.isfinite().all() for parameter in run.network.parameters())
    usual, *others = run.metrics["online_accuracy"]
    assert usual.min() > 0.8
    for setting, accuracy in zip(changed, others, strict=True):
        assert accuracy[-1] > max(0.5, accuracy[0] - 0.1), (setting, accuracy)
    assert torch.isfinite(torch.from_numpy(run.metrics["loss"])).all()
