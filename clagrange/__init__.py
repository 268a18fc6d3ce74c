"""Continual learning with Gaussian weights that follow Euler-Lagrange dynamics.

``import clagrange`` brings the Gaussian layers, optimizers, interventions and metrics. The parts that need
Lightning, Avalanche or data (`clagrange.callbacks`, `clagrange.strategies`, `clagrange.tasks`,
`clagrange.study`) are imported when they are first used.
"""

import importlib
from typing import Any

from clagrange import _torchvision

_torchvision.declare_operators()

from clagrange import dynamics, gaussian, interventions, mechanics, metrics, networks, optim, replicas  # noqa: E402
from clagrange.gaussian import (  # noqa: E402
    DiagonalPrecision,
    GaussianConv2d,
    GaussianLinear,
    Precision,
    collapse,
    consolidate,
    gaussianize,
    inject_variance,
    predict,
    variances,
)

__version__ = "0.1.0"

_LAZY = ("callbacks", "strategies", "study", "tasks")

__all__ = [
    "DiagonalPrecision",
    "GaussianConv2d",
    "GaussianLinear",
    "Precision",
    "collapse",
    "consolidate",
    "dynamics",
    "gaussian",
    "gaussianize",
    "inject_variance",
    "interventions",
    "mechanics",
    "metrics",
    "networks",
    "optim",
    "predict",
    "replicas",
    "variances",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return importlib.import_module(f"clagrange.{name}")
    raise AttributeError(f"module 'clagrange' has no attribute {name!r}")
