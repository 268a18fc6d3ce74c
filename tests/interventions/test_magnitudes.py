"""Sums of magnitudes: the same by every way, and without a compiler."""

import pytest
import torch

from clagrange import _compilation
from clagrange.interventions import magnitudes as module
from clagrange.interventions.magnitudes import sums_of_magnitudes


@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("shape", [(3, 4), (1100, 1000), (700, 1501), (5, 300, 401), (2, 1, 1001, 300)])
def test_sums_are_those_of_torch(shape: tuple[int, ...], dim: int) -> None:
    values = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(sums_of_magnitudes(values, dim), values.abs().sum(dim))


def test_without_a_compiler_the_sums_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> None:
        raise RuntimeError("No working\nC++ compiler found\nand much more")

    monkeypatch.setattr(module, "_compiled", broken)
    monkeypatch.setattr(module, "_COMPILED_FROM", 12)
    monkeypatch.setattr(_compilation, "_failure", "")
    values = torch.randn(600, 500)
    with pytest.warns(
        RuntimeWarning, match=r"twice the time \(RuntimeError: No working C\+\+ compiler found\)"
    ) as seen:
        sums_of_magnitudes(values, -1)
    torch.testing.assert_close(sums_of_magnitudes(values, -2), values.abs().sum(-2))  # no second warning
    assert len(seen) == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("dim", [-1, -2])
def test_the_compiled_sums_are_the_same_for_all_sizes(monkeypatch: pytest.MonkeyPatch, dim: int) -> None:
    monkeypatch.setattr(module, "_COMPILED_FROM", 12)
    torch._dynamo.reset()
    for shape in ((1000, 700), (1003, 701), (3, 805, 400), (2, 1, 1001, 300)):
        values = torch.randn(shape)
        torch.testing.assert_close(sums_of_magnitudes(values, dim), values.abs().sum(dim))
        transposed = torch.randn(*shape[:-2], shape[-1], shape[-2]).mT
        torch.testing.assert_close(sums_of_magnitudes(transposed, dim), transposed.abs().sum(dim))
    assert _compilation.may_compile()
