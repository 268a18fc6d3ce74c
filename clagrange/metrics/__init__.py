"""Measures of plasticity."""

from clagrange.metrics.plasticity import dead_units, effective_rank, mean_variance, weight_magnitude

__all__ = ["dead_units", "effective_rank", "mean_variance", "weight_magnitude"]
