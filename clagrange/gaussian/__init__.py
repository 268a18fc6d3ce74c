"""Gaussian weights: precisions, layers, and what a user does with a network of them."""

from clagrange.gaussian.layers import GaussianConv2d, GaussianLayer, GaussianLinear, owner_of
from clagrange.gaussian.network import (
    collapse,
    gaussian_layers,
    gaussian_parameters,
    gaussianize,
    inject_variance,
    predict,
    sample_parameters,
    variances,
)
from clagrange.gaussian.precision import DiagonalPrecision, Precision

__all__ = [
    "DiagonalPrecision",
    "GaussianConv2d",
    "GaussianLayer",
    "GaussianLinear",
    "Precision",
    "collapse",
    "gaussian_layers",
    "gaussian_parameters",
    "gaussianize",
    "inject_variance",
    "owner_of",
    "predict",
    "sample_parameters",
    "variances",
]
