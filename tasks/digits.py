"""scikit-learn's 1,797 real handwritten digits of 8×8 pixels, which need no download."""

import functools

import torch
from sklearn.datasets import load_digits
from torch import Tensor

DIGITS = 1797
PIXELS = 64


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """Inputs (1797, 64) in [0, 1] and targets (1797,)."""
    data = load_digits()
    return torch.from_numpy(data.data / 16.0).float(), torch.from_numpy(data.target).long()
