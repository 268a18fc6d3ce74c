"""Layers whose parameters are Gaussian, one family a file."""

from clagrange.gaussian.layers.base import GaussianBlock, GaussianLayer, owner_of
from clagrange.gaussian.layers.convolution import GaussianConv2d
from clagrange.gaussian.layers.linear import GaussianLinear

__all__ = [
    "GaussianBlock",
    "GaussianConv2d",
    "GaussianLayer",
    "GaussianLinear",
    "owner_of",
]
