"""Avalanche: plugins for interventions, metrics and the energy of training, and strategies."""

from clagrange.strategies.euler_lagrange import EulerLagrange
from clagrange.strategies.inertia_plugin import InertiaPlugin
from clagrange.strategies.named import (
    UPGD,
    ContinualBackprop,
    InterventionStrategy,
    L2Init,
    ReDo,
    SelfNormalizedResets,
    ShrinkAndPerturb,
)
from clagrange.strategies.plasticity_metrics import PlasticityMetrics
from clagrange.strategies.plugin import InterventionPlugin

__all__ = [
    "UPGD",
    "ContinualBackprop",
    "EulerLagrange",
    "InertiaPlugin",
    "InterventionPlugin",
    "InterventionStrategy",
    "L2Init",
    "PlasticityMetrics",
    "ReDo",
    "SelfNormalizedResets",
    "ShrinkAndPerturb",
]
