"""Sums of magnitudes: the same by every way, and without a compiler."""

import pytest
import torch
from torch import nn

from clagrange import _compilation
from clagrange import _magnitudes as module
from clagrange._magnitudes import add_outer_product, follow_row_sums, sums_of_magnitudes


@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("shape", [(3, 4), (1100, 1000), (700, 1501), (5, 300, 401), (2, 1, 1001, 300)])
def test_sums_are_those_of_torch(shape: tuple[int, ...], dim: int) -> None:
    values = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(sums_of_magnitudes(values, dim), values.abs().sum(dim))


def test_without_a_compiler_the_sums_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> None:
        raise RuntimeError("No working\nC++ compiler found\nand much more")

    monkeypatch.setattr(module, "_compiled", broken)
    monkeypatch.setattr(module, "LARGE", 12)
    monkeypatch.setattr(_compilation, "_failure", "")
    weight, column, row = nn.Parameter(torch.ones(1, 4, 3)), torch.randn(1, 4, 1), torch.randn(1, 1, 3)
    follow_row_sums(weight)
    with (
        torch.no_grad(),
        pytest.warns(RuntimeWarning, match=r"steps are not compiled.*\(RuntimeError: No working C\+\+ compiler"),
    ):
        add_outer_product(weight, column, row)
    torch.testing.assert_close(weight.detach(), 1 + column * row)
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
    monkeypatch.setattr(module, "LARGE", 12)
    torch._dynamo.reset()
    for shape in ((1000, 700), (1003, 701), (3, 805, 400), (2, 1, 1001, 300)):
        values = torch.randn(shape)
        torch.testing.assert_close(sums_of_magnitudes(values, dim), values.abs().sum(dim))
        transposed = torch.randn(*shape[:-2], shape[-1], shape[-2]).mT
        torch.testing.assert_close(sums_of_magnitudes(transposed, dim), transposed.abs().sum(dim))
    assert _compilation.may_compile()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_followed_weight_steps_with_its_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """And whoever changes it otherwise gets the sums of what it then is."""
    monkeypatch.setattr(module, "LARGE", 12)
    torch._dynamo.reset()
    compiled: list[object] = []
    make = module._compiled
    monkeypatch.setattr(module, "_compiled", lambda function: compiled.append(function) or make(function))
    for shape in ((1, 40, 30), (3, 41, 29)):
        weight = nn.Parameter(torch.randn(shape))
        follow_row_sums(weight)
        for _ in range(2):
            column, row = torch.randn(*shape[:2], 1), torch.randn(shape[0], 1, shape[2])
            expected = weight.detach() + column * row
            compiled.clear()
            with torch.no_grad():
                add_outer_product(weight, column, row)
            torch.testing.assert_close(weight.detach(), expected)
            torch.testing.assert_close(sums_of_magnitudes(weight, -1), expected.abs().sum(-1))
            assert compiled == [module._moved_row_sums]
        with torch.no_grad():
            weight[:, 0] = 0.0
        torch.testing.assert_close(sums_of_magnitudes(weight, -1), weight.detach().abs().sum(-1))
    assert _compilation.may_compile()
