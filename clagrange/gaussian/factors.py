"""Symmetric factors of a Kronecker product, full or diagonal: their eigenvectors and damped inverses.

A factor is an average of squares, and so positive semi-definite but for rounding. The functions see to it that
rounding cannot make a result indefinite or infinite, or let the computation fail.
"""

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

    def project(self, factor: Tensor) -> Tensor:
        """v_iᵀ F v_i of another factor F along these axes, (..., n); F itself where both are diagonal."""
        return factor if self.vectors is None else (self.vectors * (factor @ self.vectors)).sum(-2)


def eigen(factor: Tensor, diagonal: bool) -> Eigen:
    """Eigenvalues and eigenvectors of a positive semi-definite factor; rounding below 0 is cut off.

    LAPACK's float32 routine does not converge, or gives NaN, for many matrices with zero rows (dead units) or
    with entries near the smallest numbers. The factor is therefore brought to size 1 and shifted by the machine
    epsilon, which changes no eigenvector and is within the routine's own error.

    Args:
        factor: (..., n, n), or its diagonal, (..., n).
        diagonal: which of the two.

    Example:
        >>> eigen(torch.diag(torch.tensor([0.0, 4.0])), diagonal=False).values
        tensor([0., 4.])
    """
    if diagonal:
        return Eigen(factor.clamp(min=0.0), None)
    numbers = torch.finfo(factor.dtype)
    size = factor.diagonal(dim1=-2, dim2=-1).amax(-1, keepdim=True).clamp(min=numbers.tiny)
    shifted = factor / size.unsqueeze(-1)
    shifted.diagonal(dim1=-2, dim2=-1).add_(numbers.eps)
    values, vectors = torch.linalg.eigh(shifted)
    return Eigen((values - numbers.eps).clamp(min=0.0) * size, vectors)


def damped_inverse(factor: Tensor, damping: Tensor, diagonal: bool) -> Tensor:
    """(F + damping·I)⁻¹ by Cholesky, positive definite whatever rounding has done to F.

    A pivot says how much of a diagonal entry the entries before it leave open. Where one is a share of less than
    n machine epsilons, as far as rounding can reach, or the decomposition fails, the inverse may be noise in some
    directions: far too large, or negative. There the diagonal is raised by 2n machine epsilons of itself, which
    rounding does not overcome, whatever the units of the inputs are. (To raise it always would shorten the steps
    along directions of little curvature for nothing.) What fails even then, because it is no average of squares,
    counts by its diagonal alone.

    Args:
        factor: F, positive semi-definite, (..., n, n), or its diagonal, (..., n).
        damping: > 0, (..., 1, 1).
        diagonal: which of the two.

    Example:
        >>> damped_inverse(torch.ones(2, 2), torch.ones(1, 1), diagonal=False)
        tensor([[ 0.6667, -0.3333],
                [-0.3333,  0.6667]])
    """
    if diagonal:
        return (factor + damping.squeeze(-1)).reciprocal()
    rounding = factor.shape[-1] * torch.finfo(factor.dtype).eps
    damped = factor.clone()
    own = damped.diagonal(dim1=-2, dim2=-1)
    own.add_(damping.squeeze(-1))
    root, failed = torch.linalg.cholesky_ex(damped)
    pivots = root.diagonal(dim1=-2, dim2=-1).square()
    doubtful = (failed > 0) | ~(pivots > rounding * own).all(-1)
    if bool(doubtful.any()):
        own.mul_(1.0 + 2.0 * rounding)
        raised, failed = torch.linalg.cholesky_ex(damped)
        alone = torch.diag_embed(own.abs().sqrt())
        raised = torch.where(failed[..., None, None] > 0, alone, raised)
        root = torch.where(doubtful[..., None, None], raised, root)
    return torch.cholesky_inverse(root)


def follow(inverse: Tensor, rows: Tensor, share: float | Tensor) -> Tensor:
    """Make M⁻¹, in place, the inverse of (1 − share)·M + share·rowsᵀrows, by Woodbury's identity.

    With k rows it costs k·n² operations and k³, and no new inversion. Its error, relative to the new matrix, is
    about two roundings times ρ, the largest eigenvalue of share/(1 − share)·rows M⁻¹ rowsᵀ. Where rows outweigh M
    so far that this could cost positive-definiteness, the inverse stays as it is, until it is made anew.

    Args:
        inverse: M⁻¹, (..., n, n), contiguous.
        rows: (..., k, n).
        share: in (0, 1], or 0 in some replicas; a number, or a tensor that broadcasts against ``inverse``.

    Returns:
        The rows times the new inverse, (..., k, n).

    Example:
        >>> inverse = torch.eye(2)
        >>> follow(inverse, torch.tensor([[1.0, 0.0]]), 0.5).round()
        tensor([[1., 0.]])
        >>> inverse.round()
        tensor([[1., 0.],
                [0., 2.]])
    """
    projected = rows @ inverse
    inner = projected @ rows.mT
    own = inner.diagonal(dim1=-2, dim2=-1)
    odds = torch.as_tensor(share / (1.0 - torch.as_tensor(share, dtype=inverse.dtype, device=inverse.device)))
    weight = odds * own.sum(-1)[..., None, None]  # the trace is at least ρ
    safe = (odds > 0) & (weight < 0.05 / torch.finfo(inverse.dtype).eps)
    own.add_(odds.reciprocal().squeeze(-1) if odds.dim() else odds.reciprocal())
    root = torch.linalg.cholesky_ex(inner).L
    unit = torch.eye(root.shape[-1], dtype=root.dtype, device=root.device)
    # of few rows, two products with the inverse root take a sixth of the time of two solutions for n columns
    inverse_root = torch.linalg.solve_triangular(root, unit, upper=False)
    half = inverse_root @ projected
    solved: Tensor = (inverse_root.mT / share) @ half
    if not isinstance(share, Tensor) and bool(safe.all()):
        grown = 1.0 / (1.0 - share)
    else:
        kept = torch.where(safe, 1.0 - share, 1.0)
        solved = torch.where(safe, solved, projected)
        half = torch.where(safe, half * kept.rsqrt(), 0.0)
        inverse.div_(kept)
        grown = 1.0
    flat, half = (tensor.view(-1, *tensor.shape[-2:]) for tensor in (inverse, half.contiguous()))
    torch.baddbmm(flat, half.mT, half, beta=grown, alpha=-grown, out=flat)
    return solved


def right_product(matrix: Tensor, factor: Tensor, diagonal: bool) -> Tensor:
    """M F for a full or a diagonal factor."""
    return matrix * factor.unsqueeze(-2) if diagonal else matrix @ factor


def left_product(factor: Tensor, matrix: Tensor, diagonal: bool) -> Tensor:
    """F M for a full or a diagonal factor."""
    return factor.unsqueeze(-1) * matrix if diagonal else factor @ matrix


def trace(factor: Tensor, diagonal: bool) -> Tensor:
    """tr F for a full or a diagonal factor, (...)."""
    return (factor if diagonal else factor.diagonal(dim1=-2, dim2=-1)).sum(-1)


def merged_product(
    first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], diagonal: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """One Kronecker product in place of the sum of two, G_1 ⊗ A_1 + G_2 ⊗ A_2.

    With g_i = tr G_i and a_i = tr A_i it is (a_1 G_1 + a_2 G_2) ⊗ (g_1 A_1 + g_2 A_2)/(a_1 g_1 + a_2 g_2), the
    product that has the partial traces of the sum: every row and every column of the weights keeps the
    information that the sum holds on it. It is positive semi-definite, and exact where one of the two is 0, where
    A_1 and A_2 are equal but for a factor, or where G_1 and G_2 are.

    On what two tasks of real digits leave of a 64-32-24-10 network, its relative distance from the sum in
    Frobenius norm was 0.05, 0.14 and 0.45 in the three layers for classes 0-4 and then 5-9, and 0.36, 0.28 and
    0.06 for permuted pixels; the nearest of all products is at most 0.02 closer. With the prior added, 80 % of
    all directions have their precision to 30 %; the worst have 0.4 and 28 times theirs. The product by which
    damping is split, (G_1 + G_2/π) ⊗ (A_1 + πA_2), has all cross terms in addition, and a distance of about 1.

    Args:
        first: G_1 (..., m, m) and A_1 (..., n, n), or their diagonals (..., m) and (..., n).
        second: G_2 and A_2, of the same shapes.
        diagonal: whether the first and the second factors are diagonals.

    Example:
        >>> G, A = torch.eye(2), torch.ones(3, 3)
        >>> outputs, inputs = merged_product((G, A), (2 * G, 3 * A), (False, False))
        >>> torch.allclose(torch.kron(outputs, inputs), 7 * torch.kron(G, A))
        True
    """
    (G_1, A_1), (G_2, A_2) = first, second
    g_1, g_2 = (trace(factor, diagonal[0]) for factor in (G_1, G_2))
    a_1, a_2 = (trace(factor, diagonal[1]) for factor in (A_1, A_2))
    information = a_1 * g_1 + a_2 * g_2
    scale = torch.where(information > 0.0, (g_1 + g_2) / information, torch.zeros_like(information))
    size = (g_1 + g_2).clamp(min=torch.finfo(g_1.dtype).tiny)

    def weighted(weights: tuple[Tensor, Tensor], factors: tuple[Tensor, Tensor], alone: bool) -> Tensor:
        first, second = (weight[..., None] if alone else weight[..., None, None] for weight in weights)
        return first * factors[0] + second * factors[1]

    return (
        weighted((scale * a_1, scale * a_2), (G_1, G_2), diagonal[0]),
        weighted((g_1 / size, g_2 / size), (A_1, A_2), diagonal[1]),
    )
