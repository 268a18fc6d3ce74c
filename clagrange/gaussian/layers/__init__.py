"""Layers whose parameters are Gaussian, one family a file."""

from clagrange.gaussian.layers.attention import GaussianMultiheadAttention, GaussianOutProjection
from clagrange.gaussian.layers.base import GaussianBlock, GaussianLayer, owner_of
from clagrange.gaussian.layers.convolution import (
    GaussianConv1d,
    GaussianConv2d,
    GaussianConv3d,
    GaussianConvTranspose1d,
    GaussianConvTranspose2d,
    GaussianConvTranspose3d,
)
from clagrange.gaussian.layers.embedding import GaussianEmbedding
from clagrange.gaussian.layers.linear import GaussianLinear
from clagrange.gaussian.layers.normalization import (
    GaussianBatchNorm1d,
    GaussianBatchNorm2d,
    GaussianBatchNorm3d,
    GaussianGroupNorm,
    GaussianLayerNorm,
    GaussianRMSNorm,
)
from clagrange.gaussian.layers.recurrent import GaussianGRUCell, GaussianLSTMCell, GaussianRNNCell

__all__ = [
    "GaussianBatchNorm1d",
    "GaussianBatchNorm2d",
    "GaussianBatchNorm3d",
    "GaussianBlock",
    "GaussianConv1d",
    "GaussianConv2d",
    "GaussianConv3d",
    "GaussianConvTranspose1d",
    "GaussianConvTranspose2d",
    "GaussianConvTranspose3d",
    "GaussianEmbedding",
    "GaussianGRUCell",
    "GaussianGroupNorm",
    "GaussianLSTMCell",
    "GaussianLayer",
    "GaussianLayerNorm",
    "GaussianLinear",
    "GaussianMultiheadAttention",
    "GaussianOutProjection",
    "GaussianRMSNorm",
    "GaussianRNNCell",
    "owner_of",
]
