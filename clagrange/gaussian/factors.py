"""Symmetric factors of a Kronecker product, full or diagonal: their eigenvectors and damped inverses."""

from typing import NamedTuple

import torch
from torch import Tensor


class Eigen(NamedTuple):
    """A factor along its axes.

    Attributes:
        values: eigenvalues, at least 0, (..., n).
        vectors: orthogonal, in columns, (..., n, n); None for a diagonal factor.
    """

    values: Tensor
    vectors: Tensor | None


def eigen(factor: Tensor, diagonal: bool) -> Eigen:
    """Eigenvalues and eigenvectors of a positive semi-definite factor; rounding below 0 is cut off."""
    if diagonal:
        return Eigen(factor.clamp(min=0.0), None)
    values, vectors = torch.linalg.eigh(factor)
    return Eigen(values.clamp(min=0.0), vectors)


def damped_inverse(factor: Tensor, damping: Tensor, diagonal: bool) -> Tensor:
    """(F + damping·I)⁻¹ by Cholesky, with more damping where rounding has made a matrix indefinite.

    Args:
        factor: F, positive semi-definite, (..., n, n), or its diagonal, (..., n).
        damping: > 0, (..., 1, 1).
        diagonal: which of the two.
    """
    if diagonal:
        return (factor + damping.squeeze(-1)).reciprocal()
    identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    extra = torch.zeros_like(damping)
    scale: Tensor = factor.diagonal(dim1=-2, dim2=-1).amax(-1)[..., None, None]
    for jitter in (0.0, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3):
        root, failed = torch.linalg.cholesky_ex(factor + (damping + extra) * identity)
        if not failed.any():
            break
        extra = torch.where(failed[..., None, None] > 0, jitter * scale * 10.0, extra)
    return torch.cholesky_inverse(root)


def right_product(matrix: Tensor, factor: Tensor, diagonal: bool) -> Tensor:
    """M F for a full or a diagonal factor."""
    return matrix * factor.unsqueeze(-2) if diagonal else matrix @ factor
