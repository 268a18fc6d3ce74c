"""Which examples to learn from next: A-optimal order in closed form, greedily and in blocks.

Linear regression y = xᵀβ + e with noise variance σ² on rows X has the expected test error
σ²(1 + tr((XᵀX)⁻¹M)), M = E xxᵀ of the test inputs. It depends on the inputs alone, so an order can be planned
before any label is seen.
"""

import torch
from torch import Tensor

from clagrange._checks import check_number, check_positive


def planned_error(samples: int, parameters: int, noise: float = 1.0) -> float:
    """min ε = σ²(1 + p/n): the least test error that n inputs of length 1 allow (n ≥ p).

    By Jensen's inequality it needs XᵀX = (n/p)I, which blocks of p orthogonal inputs give.

    Args:
        samples: n.
        parameters: p.
        noise: σ².

    Raises:
        ValueError: if n < p: then some direction is not seen at all.

    Example:
        >>> planned_error(20, 10)
        1.5
    """
    check_number("samples", samples, low=parameters, hint="each parameter needs a sample")
    return noise * (1.0 + parameters / samples)


def planned_samples(threshold: float, parameters: int, noise: float = 1.0) -> float:
    """T(δ) = pσ²/(δ − σ²): the least number of samples to the test error δ, at least p.

    Args:
        threshold: δ > σ².
        parameters: p.
        noise: σ².

    Raises:
        ValueError: if δ ≤ σ², which no number of samples reaches.

    Example:
        >>> planned_samples(1.5, 10)
        20.0
    """
    check_positive("noise", noise)
    check_number("threshold", threshold, low=noise, open_low=True, hint="noise stays in every test error")
    return max(float(parameters), parameters * noise / (threshold - noise))


def linear_error(inputs: Tensor, noise: float = 1.0, moment: Tensor | None = None, ridge: float = 0.0) -> float:
    """σ²(1 + tr((XᵀX + λI)⁻¹M)): expected test error of a linear model (infinite where it is not determined).

    With λ = σ²/σ_p² > 0 it is the Bayesian prediction error under the prior N(0, σ_p²) of the weights.

    Args:
        inputs: X, (n, p).
        noise: σ².
        moment: M, (p, p); default I/p, inputs uniform on the unit sphere.
        ridge: λ ≥ 0.

    Example:
        >>> round(linear_error(torch.eye(2).repeat(3, 1)), 6)
        1.333333
    """
    rows = inputs.double()
    p = rows.shape[1]
    gram = rows.T @ rows + ridge * torch.eye(p, dtype=rows.dtype, device=rows.device)
    target = torch.eye(p, dtype=rows.dtype, device=rows.device) / p if moment is None else moment.double()
    factor, failed = torch.linalg.cholesky_ex(gram)
    pivots = factor.diagonal().square()
    if failed or float(pivots.min()) < 1e-13 * float(pivots.max()):  # rounding leaves 1e-16 where there is none
        return float("inf")
    return noise * (1.0 + float(torch.cholesky_solve(target, factor).trace()))


def planned_inputs(samples: int, parameters: int, *, generator: torch.Generator | None = None) -> Tensor:
    """Inputs of length 1 in the A-optimal order: an orthonormal basis, over and over. Shape (n, p), float64.

    After each block of p the error is `planned_error`; no order is optimal at every n between.

    Args:
        samples: n ≥ 1.
        parameters: p ≥ 1.
        generator: draws the basis; default the coordinate axes.

    Example:
        >>> planned_inputs(3, 2)
        tensor([[1., 0.],
                [0., 1.],
                [1., 0.]], dtype=torch.float64)
    """
    check_number("samples", samples, low=1)
    check_number("parameters", parameters, low=1)
    basis = torch.eye(parameters, dtype=torch.float64)
    if generator is not None:
        basis = torch.linalg.qr(torch.randn(parameters, parameters, generator=generator, dtype=torch.float64)).Q
    return basis.repeat(-(-samples // parameters), 1)[:samples]


def greedy_inputs(samples: int, first: Tensor) -> Tensor:
    """Go on from given inputs, each next one the eigenvector of XᵀX with the smallest eigenvalue.

    It is the input of length 1 that lowers tr((XᵀX)⁻¹) most.

    Args:
        samples: n, with the first ones.
        first: the inputs before, (m, p) with m ≥ 1.

    Returns:
        (n, p), float64.

    Example:
        >>> greedy_inputs(2, torch.tensor([[1.0, 0.0]])).abs()
        tensor([[1., 0.],
                [0., 1.]], dtype=torch.float64)
    """
    rows = list(first.double())
    gram = first.double().T @ first.double()
    while len(rows) < samples:
        direction = torch.linalg.eigh(gram).eigenvectors[:, 0]
        rows.append(direction)
        gram = gram + torch.outer(direction, direction)
    return torch.stack(rows[:samples])


class _Design:
    """The chosen rows of a pool, with tr(A⁻¹M) of A = XᵀX + λI kept by rank-one updates of pool × A⁻¹.

    One update and one search cost O(pool · p).
    """

    def __init__(self, pool: Tensor, moment: Tensor, ridge: float, chosen: Tensor) -> None:
        self.pool = pool
        p = pool.shape[1]
        rows = pool[chosen]
        gram = rows.T @ rows + ridge * torch.eye(p, dtype=pool.dtype, device=pool.device)
        factor = torch.linalg.cholesky(gram)
        self.solved = torch.cholesky_solve(pool.T, factor).T  # pool A⁻¹
        self.moment = moment
        self.weighed = self.solved @ moment  # pool A⁻¹ M
        self.free = torch.ones(len(pool), dtype=torch.bool, device=pool.device)
        self.free[chosen] = False

    def best(self) -> tuple[int, float]:
        """The free row that lowers the trace most, xᵀA⁻¹MA⁻¹x/(1 + xᵀA⁻¹x), and by how much."""
        gain = (self.weighed * self.solved).sum(1) / (1.0 + (self.solved * self.pool).sum(1))
        value, index = gain.masked_fill(~self.free, -torch.inf).max(0)
        return int(index), float(value)

    def add(self, index: int, sign: float = 1.0) -> None:
        """Take the row (or give it back, sign = −1)."""
        row, solved, weighed = self.pool[index], self.solved[index].clone(), self.weighed[index].clone()
        overlap = (self.pool @ solved) * (sign / (1.0 + sign * (row @ solved)))
        self.solved = self.solved - torch.outer(overlap, solved)
        self.weighed = self.weighed - torch.outer(overlap, weighed)
        self.free[index] = sign < 0


def plan(
    features: Tensor,
    samples: int,
    *,
    ridge: float = 1.0,
    moment: Tensor | None = None,
    chosen: Tensor | None = None,
    exchange: int = 0,
) -> list[int]:
    """The rows of a finite pool to learn from next, so that tr((XᵀX + λI)⁻¹M) falls fast.

    Greedy: each time the row by which it falls most, with rank-one updates. With ``exchange`` the rows are a
    block, for which only the trace at its end counts: every row of it is put back and replaced by the best one,
    up to so many times over, until nothing changes. The trace never rises by that.

    Args:
        features: the pool, (N, p).
        samples: how many rows, at most those that are left.
        ridge: the prior is worth so many average samples: λ = ridge · tr(M)/p.
        moment: M, (p, p), of the inputs on which it shall be right; default the pool's mean xxᵀ.
        chosen: numbers of rows that are learned already, (n,).
        exchange: rounds of exchange.

    Returns:
        Row numbers, in the order in which they were chosen.

    Raises:
        ValueError: if there are not enough rows, or ``ridge`` is not positive.

    Example:
        >>> plan(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), 2)
        [0, 2]
    """
    check_positive("ridge", ridge, hint="with fewer rows than features the trace is infinite without it")
    check_number("exchange", exchange, low=0)
    pool = (features.cpu() if features.device.type == "mps" else features).detach().double()
    if pool.dim() != 2:
        raise ValueError(f"features: expected shape (pool, features), got {tuple(pool.shape)}; flatten them")
    past = torch.zeros(0, dtype=torch.long) if chosen is None else chosen
    check_number("samples", samples, low=0, high=len(pool) - len(past), hint="rows are taken once")
    target = pool.T @ pool / len(pool) if moment is None else moment.to(pool)
    design = _Design(pool, target, ridge * float(target.trace()) / pool.shape[1], past.to(pool.device))
    order = []
    for _ in range(samples):
        index, _ = design.best()
        design.add(index)
        order.append(index)
    for _ in range(exchange):
        before = list(order)
        for place, index in enumerate(before):
            design.add(index, -1.0)
            order[place], _ = design.best()
            design.add(order[place])
        if order == before:
            break
    return order
