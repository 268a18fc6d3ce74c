"""The learning dynamics as pure functions of tensors."""

from clagrange.dynamics.rules import (
    mean_displacement,
    ornstein_uhlenbeck,
    relaxation_fraction,
    relaxed_precision,
    stable_root,
)

__all__ = [
    "mean_displacement",
    "ornstein_uhlenbeck",
    "relaxation_fraction",
    "relaxed_precision",
    "stable_root",
]
