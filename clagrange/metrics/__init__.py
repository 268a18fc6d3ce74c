"""Measures of plasticity and of calibration."""

import importlib
from typing import TYPE_CHECKING, Any

from clagrange.metrics.plasticity import dead_units, effective_rank, mean_variance, weight_magnitude

if TYPE_CHECKING:
    from clagrange.metrics.calibration import (
        BrierScore,
        ExpectedCalibrationError,
        NegativeLogLikelihood,
        brier_score,
        expected_calibration_error,
        negative_log_likelihood,
    )

__all__ = [
    "BrierScore",
    "ExpectedCalibrationError",
    "NegativeLogLikelihood",
    "brier_score",
    "dead_units",
    "effective_rank",
    "expected_calibration_error",
    "mean_variance",
    "negative_log_likelihood",
    "weight_magnitude",
]


def __getattr__(name: str) -> Any:
    if name in __all__:  # the rest of it needs torchmetrics, which takes seconds to import
        return getattr(importlib.import_module("clagrange.metrics.calibration"), name)
    raise AttributeError(f"module 'clagrange.metrics' has no attribute {name!r}")
