"""Optimizers, each a solution of the learning objective in some limit; and stacked forms of torch's baselines."""

from clagrange.optim.ballistic import Ballistic
from clagrange.optim.belief_adam import BeliefAdam
from clagrange.optim.drift import Drift
from clagrange.optim.euler_lagrange import EulerLagrange
from clagrange.optim.natural_gradient import GeometricMean, NaturalGradient
from clagrange.optim.optimal_momentum import OptimalMomentum
from clagrange.optim.stacked import StackedAdam, StackedSGD

__all__ = [
    "Ballistic",
    "BeliefAdam",
    "Drift",
    "EulerLagrange",
    "GeometricMean",
    "NaturalGradient",
    "OptimalMomentum",
    "StackedAdam",
    "StackedSGD",
]
