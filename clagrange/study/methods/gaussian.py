"""Gaussian weights along the Euler-Lagrange flow."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from clagrange import interventions
from clagrange._checks import check_choice
from clagrange.gaussian import Kronecker, gaussianize
from clagrange.interventions import Detector, Intervention
from clagrange.optim import EulerLagrange as EulerLagrangeOptimizer
from clagrange.study.methods.base import Method


@dataclass(frozen=True)
class EulerLagrange(Method):
    """Gaussian weights along the Euler-Lagrange flow, not told of switches.

    Args:
        lr: fraction of the way to equilibrium covered in one step.
        temperature: T = τ/k.
        prior_variance: of the weights, in units of the initialisation variance.
        variance_rate: fraction by which precisions relax in one step; null ties it to lr.
        curvature_decay: of the curvature belief.
        trust_region: bound on a mean's step, in posterior standard deviations.
        discount: γ per step.
    """

    source = "Vastola, Gershman, Rajan (2025), section 6"
    lr: float = 6e-4
    temperature: float = 6e-6
    prior_variance: float = 0.2
    variance_rate: float | None = 5e-3
    curvature_decay: float = 0.99
    trust_region: float = 0.3
    discount: float = math.inf

    def prepare(self, network: nn.Module, seeds: int | Sequence[int]) -> None:
        """Make the network Gaussian."""
        gaussianize(network, prior_variance=self.prior_variance)

    def optimizer(self, network: nn.Module) -> Optimizer:
        """The Euler-Lagrange optimizer."""
        return EulerLagrangeOptimizer(
            network,
            lr=self.lr,
            temperature=self.temperature,
            discount=self.discount,
            variance_rate=self.variance_rate,
            curvature_decay=self.curvature_decay,
            trust_region=self.trust_region,
        )


@dataclass(frozen=True)
class EulerLagrangeKronecker(Method):
    """Matrix-Gaussian weights along the Euler-Lagrange flow, not told of switches.

    Args:
        lr: fraction of the way to equilibrium covered in one step.
        temperature: T = τ/k; a quarter to all of one over the examples of a task.
        prior_variance: of the weights, in units of the initialisation variance.
        variance_rate: fraction by which the factors relax in one step; null ties it to lr.
        trust_region: bound on a step of a layer, in posterior standard deviations (root mean square).
        prior_pull: share of the prior's force that acts on the mean.
        discount: γ per step.
        damping: "factored" or "exact".
        observe_every: steps between observations of the factors; null for the layers' default.
        refresh_every: steps between inversions of the factors; null for the layers' default.
    """

    source = "Vastola, Gershman, Rajan (2025), section 6, with the factors of Martens and Grosse (2015)"
    lr: float = 6e-3
    temperature: float = 1e-4
    prior_variance: float = 1.0
    variance_rate: float | None = 1e-2
    trust_region: float = 0.1
    prior_pull: float = 0.1
    discount: float = math.inf
    damping: str = "factored"
    observe_every: int | None = None
    refresh_every: int | None = None

    def prepare(self, network: nn.Module, seeds: int | Sequence[int]) -> None:
        """Make the network Gaussian."""
        structure = Kronecker(
            damping=self.damping, observe_every=self.observe_every, refresh_every=self.refresh_every
        )
        gaussianize(network, precision=structure, prior_variance=self.prior_variance)

    def optimizer(self, network: nn.Module) -> Optimizer:
        """The Euler-Lagrange optimizer."""
        return EulerLagrangeOptimizer(
            network,
            lr=self.lr,
            temperature=self.temperature,
            discount=self.discount,
            variance_rate=self.variance_rate,
            trust_region=self.trust_region,
            prior_pull=self.prior_pull,
        )


@dataclass(frozen=True)
class _Injection(Method):
    """Variance injected at every switch, beside the settings of another method.

    Args:
        strength: of the sampled injection, in [0, 1].
        widen: fraction by which precisions move to the prior's at a switch.
        multiply: factor of the variance at a switch.
        draw: "prior" or "posterior", what the mean is drawn from.
        where: "everywhere", "low_curvature" or "low_utility".
        share: of the weights or units, with ``where``.
        over: steps over which the injection is spread.
        equilibrium: steps after which precisions go to the equilibrium of the new curvature; 0: they do not.
        detector: of switches that are not announced: "cusum", "page_hinkley", "predictive_surprise" or
            "energy_jump"; null goes by the announcement.
        threshold: of the detector; null for its default.
    """

    strength: float = 1.0
    widen: float = 0.0
    multiply: float = 1.0
    draw: str = "prior"
    where: str = "everywhere"
    share: float = 0.5
    over: int = 1
    equilibrium: int = 0
    detector: str | None = None
    threshold: float | None = None

    def interventions(self, seeds: int | Sequence[int]) -> list[Intervention]:
        """Variance injection."""
        return [
            interventions.VarianceInjection(
                self.strength,
                self.widen,
                seed=seeds,
                multiply=self.multiply,
                draw=self.draw,
                where=self.where,
                share=self.share,
                over=self.over,
                equilibrium=self.equilibrium,
                detector=_detector(self.detector, self.threshold, seeds),
            )
        ]


@dataclass(frozen=True)
class EulerLagrangeInjection(_Injection, EulerLagrange):
    """Gaussian weights along the Euler-Lagrange flow, with variance injected at every switch.

    Its settings are those of `EulerLagrange`, and then those of `clagrange.interventions.VarianceInjection`.
    """


@dataclass(frozen=True)
class EulerLagrangeKroneckerInjection(_Injection, EulerLagrangeKronecker):
    """Matrix-Gaussian weights along the Euler-Lagrange flow, with variance injected at every switch.

    Its settings are those of `EulerLagrangeKronecker`, and then those of
    `clagrange.interventions.VarianceInjection`.
    """

    prior_pull: float = 0.0
    strength: float = 0.3


_DETECTORS: dict[str, Any] = {
    "cusum": interventions.CUSUM,
    "page_hinkley": interventions.PageHinkley,
    "predictive_surprise": interventions.PredictiveSurprise,
    "energy_jump": interventions.EnergyJump,
}


def _detector(name: str | None, threshold: float | None, seeds: int | Sequence[int]) -> Detector | None:
    if name is None:
        return None
    check_choice("detector", name, _DETECTORS)
    settings: dict[str, Any] = {} if threshold is None else {"threshold": threshold}
    if name == "predictive_surprise":
        settings["seed"] = seeds
    detector: Detector = _DETECTORS[name](**settings)
    return detector
