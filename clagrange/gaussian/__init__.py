"""Gaussian weights: precisions, layers, and what a user does with a network of them."""

from clagrange.gaussian.kronecker import KroneckerPrecision
from clagrange.gaussian.layers import GaussianBlock, GaussianConv2d, GaussianLayer, GaussianLinear, owner_of
from clagrange.gaussian.network import (
    collapse,
    gaussian_blocks,
    gaussian_layers,
    gaussianize,
    inject_variance,
    predict,
    sample_parameters,
    variances,
)
from clagrange.gaussian.precision import DiagonalPrecision, Precision
from clagrange.gaussian.structures import Diagonal, Kronecker, Structure

__all__ = [
    "Diagonal",
    "DiagonalPrecision",
    "GaussianBlock",
    "GaussianConv2d",
    "GaussianLayer",
    "GaussianLinear",
    "Kronecker",
    "KroneckerPrecision",
    "Precision",
    "Structure",
    "collapse",
    "gaussian_blocks",
    "gaussian_layers",
    "gaussianize",
    "inject_variance",
    "owner_of",
    "predict",
    "sample_parameters",
    "variances",
]
