"""Factors that are hard for float32: their eigenvectors and inverses against float64."""

import pytest
import torch
from torch import Tensor

from clagrange.gaussian.factors import damped_inverse, eigen, follow

SIZE = 200


def rotation(size: int = SIZE) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=stream(), dtype=torch.float64))[0]


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def spectrum(values: Tensor) -> Tensor:
    """A matrix of these eigenvalues."""
    axes = rotation(len(values))
    return axes * values @ axes.mT


HARD = {
    "nothing": torch.zeros(SIZE, SIZE).double(),
    "of rank one": torch.ones(SIZE, SIZE).double(),
    "denormal": torch.full((SIZE, SIZE), 1e-42).double(),
    "mostly zero rows": torch.diag((torch.arange(SIZE) % 3 == 0).double()) * 1e-30,
    "graded": torch.outer(*[torch.logspace(0, -22, SIZE, dtype=torch.float64)] * 2),
    "of condition 1e8": spectrum(torch.logspace(0, -8, SIZE, dtype=torch.float64)),
    "of rank 8": spectrum((torch.arange(SIZE) < 8).double()),
}


def relative(inverse: Tensor, exact: Tensor) -> Tensor:
    """Eigenvalues of M^{1/2} X M^{1/2}: what a step along X is beside that along M⁻¹, direction by direction."""
    half = torch.linalg.cholesky(exact)
    return torch.linalg.eigvalsh(half.mT @ inverse.double() @ half)


def average_with_dead_units(seed: int, dead: float) -> Tensor:
    """An average of squares of which so many rows and columns are zero."""
    rows = torch.randn(200, 100, generator=stream(seed)) * (torch.rand(100, generator=stream(seed)) >= dead)
    return (rows.mT @ rows / 200).double()


CASES = {**HARD, **{f"dead units {seed}": average_with_dead_units(seed, 0.9) for seed in range(6)}}


@pytest.mark.parametrize("exact", CASES.values(), ids=CASES)
def test_eigenvectors(exact: Tensor) -> None:
    values, vectors = eigen(exact.float(), diagonal=False)
    assert vectors is not None
    values, vectors = values.double(), vectors.double()
    assert (values >= 0).all()
    identity = torch.eye(len(exact), dtype=torch.float64)
    torch.testing.assert_close(vectors.mT @ vectors, identity, rtol=0, atol=1e-4)
    assert (vectors * values @ vectors.mT - exact).norm() <= 1e-5 * exact.norm() + 1e-40


def test_eigenvectors_in_float64() -> None:
    exact = spectrum(torch.linspace(0, 3, 20, dtype=torch.float64))
    values, vectors = eigen(torch.stack([exact, 5e-300 * exact]), diagonal=False)
    torch.testing.assert_close(values[0], torch.linspace(0, 3, 20, dtype=torch.float64), rtol=0, atol=1e-14)
    torch.testing.assert_close(values[1], 5e-300 * values[0], rtol=1e-13, atol=5e-314)
    torch.testing.assert_close(vectors * values.unsqueeze(-2) @ vectors.mT, torch.stack([exact, 5e-300 * exact]))


@pytest.mark.parametrize("exact", CASES.values(), ids=CASES)
@pytest.mark.parametrize("damping", [1e-2, 1e-5, 1e-8, 1e-12])
def test_damped_inverse_is_positive_definite_and_never_much_too_large(exact: Tensor, damping: float) -> None:
    """In the metric of F + damping all directions lie in (0, 1.5); where damping exceeds rounding they are 1."""
    inverse = damped_inverse(exact.float(), torch.full((1, 1), damping), diagonal=False)
    damped = exact + damping * torch.eye(len(exact), dtype=torch.float64)
    share = relative(inverse, damped)
    assert share.min() > 0
    assert share.max() < 1.5
    if damping == 1e-2:
        assert share.min() > 0.99


def test_damped_inverse_raises_no_damping_without_need() -> None:
    """At condition 1e8 a damping of 20 machine epsilons still counts."""
    exact = HARD["of condition 1e8"]
    inverse = damped_inverse(exact.float(), torch.full((1, 1), 2.5e-6), diagonal=False)
    share = relative(inverse, exact + 2.5e-6 * torch.eye(SIZE, dtype=torch.float64))
    assert share.min() > 0.5


def test_damped_inverse_in_float64() -> None:
    exact = spectrum(torch.logspace(0, -6, 20, dtype=torch.float64))
    dampings = torch.tensor([1e-3, 1e-1], dtype=torch.float64)[:, None, None]
    inverse = damped_inverse(torch.stack([exact, 7 * exact]), dampings, diagonal=False)
    for index, (factor, damping) in enumerate(((exact, 1e-3), (7 * exact, 1e-1))):
        expected = torch.linalg.inv(factor + damping * torch.eye(20, dtype=torch.float64))
        torch.testing.assert_close(inverse[index], expected, rtol=1e-10, atol=1e-10)


def test_damped_inverse_of_a_diagonal() -> None:
    inverse = damped_inverse(
        torch.tensor([[0.0, 3.0], [1.0, 0.5]]), torch.tensor([[[1.0]], [[0.5]]]), diagonal=True
    )
    torch.testing.assert_close(inverse, torch.tensor([[1.0, 0.25], [1 / 1.5, 1.0]]))


def test_the_units_of_one_input_take_nothing_from_the_others() -> None:
    """Even where two inputs are the same, so that the diagonal has to be raised."""
    rows = torch.randn(500, 50, generator=stream())
    rows[:, 49] = rows[:, 48]
    scale = torch.where(torch.arange(50) == 7, 1e6, 1.0)
    factor = scale * (rows.mT @ rows / 500) * scale[:, None]
    inverse = damped_inverse(factor, torch.full((1, 1), 1e-9), diagonal=False)
    expected = torch.linalg.inv((rows[:, :49].mT @ rows[:, :49]).double() / 500)
    unscaled = (scale * inverse * scale[:, None]).double()
    torch.testing.assert_close(unscaled[:48, :48], expected[:48, :48], rtol=1e-3, atol=1e-3)


def test_a_hard_block_changes_nothing_in_another() -> None:
    factors = torch.stack([HARD["of rank one"], HARD["of condition 1e8"]]).float()
    together = damped_inverse(factors, torch.full((2, 1, 1), 1e-5), diagonal=False)
    for index in range(2):
        alone = damped_inverse(factors[index], torch.full((1, 1), 1e-5), diagonal=False)
        assert torch.equal(together[index], alone)


def test_what_is_no_average_of_squares_counts_by_its_diagonal_and_spoils_no_other() -> None:
    blocks = torch.tensor([[[1.0, 5.0], [5.0, 1.0]], [[2.0, 1.0], [1.0, 2.0]]])
    inverse = damped_inverse(blocks, torch.full((2, 1, 1), 0.5), diagonal=False)
    torch.testing.assert_close(inverse[0], torch.eye(2) / 1.5)
    torch.testing.assert_close(inverse[1], torch.linalg.inv(blocks[1] + 0.5 * torch.eye(2)))


@pytest.mark.parametrize("examples", [1, 16])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.9, torch.tensor([0.01, 0.0]).double()[:, None, None]])
def test_followed_inverse_is_that_of_the_new_matrix(examples: int, share: float | Tensor) -> None:
    rows = torch.randn(2, examples, 30, generator=stream(), dtype=torch.float64)
    before = torch.stack([spectrum(torch.linspace(0.01, 3, 30, dtype=torch.float64))] * 2)
    inverse = torch.linalg.inv(before)
    follow(inverse, rows, share)
    expected = torch.linalg.inv((1 - share) * before + share * rows.mT @ rows)
    torch.testing.assert_close(inverse, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("share", [0.01, 1.0, torch.full((2, 1, 1), 0.01)], ids=["number", "all", "tensor"])
@pytest.mark.parametrize("size", [1.0, 1e1, 1e2, 1e3, 1e4, 1e6, 1e10, 1e30])
def test_followed_inverse_stays_positive_definite_whatever_the_rows(share: float | Tensor, size: float) -> None:
    """Rows that outweigh all before leave the inverse of their block as it was, and of no other block."""
    before = spectrum(torch.logspace(0, -4, SIZE, dtype=torch.float64)).expand(2, -1, -1)
    inverse = torch.linalg.inv(before).float().contiguous()
    stale = inverse.clone()
    rows = torch.randn(2, 16, SIZE, generator=stream()) / 4 * torch.tensor([0.1, size])[:, None, None]
    follow(inverse, rows, share)
    part = float(share if isinstance(share, float) else share[0])
    after = (1 - part) * torch.linalg.inv(stale.double()) + part * rows.double().mT @ rows.double()
    kept = [torch.equal(*pair) for pair in zip(inverse, stale, strict=True)]
    assert kept == [part == 1, part == 1 or size >= 100]
    for index in range(2):
        if not kept[index]:
            ones = torch.ones(SIZE, dtype=torch.float64)
            torch.testing.assert_close(relative(inverse[index], after[index]), ones, rtol=0, atol=0.05)
