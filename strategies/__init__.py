"""Avalanche: interventions as a plugin, and strategies."""

from clagrange.strategies.continual_backprop import ContinualBackprop
from clagrange.strategies.euler_lagrange import EulerLagrange
from clagrange.strategies.plugin import InterventionPlugin

__all__ = ["ContinualBackprop", "EulerLagrange", "InterventionPlugin"]
