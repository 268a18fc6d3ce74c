"""Optimizers: the Euler-Lagrange rule for Gaussian weights, and stacked forms of torch's baselines."""

from clagrange.optim.euler_lagrange import EulerLagrange
from clagrange.optim.stacked import StackedAdam, StackedSGD

__all__ = ["EulerLagrange", "StackedAdam", "StackedSGD"]
