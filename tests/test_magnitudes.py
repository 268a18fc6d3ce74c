"""Sums of magnitudes: the same by every way, and without a compiler."""

import pytest
import torch
from torch import Tensor, nn

from clagrange import _compilation
from clagrange import _magnitudes as module
from clagrange._magnitudes import add_outer_product, columns_becoming_0, follow_sums, sums_of_magnitudes


@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("shape", [(3, 4), (1100, 1000), (700, 1501), (5, 300, 401), (2, 1, 1001, 300)])
def test_sums_are_those_of_torch(shape: tuple[int, ...], dim: int) -> None:
    values = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(sums_of_magnitudes(values, dim), values.abs().sum(dim))


def test_without_a_compiler_the_sums_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> None:
        raise RuntimeError("No working\nC++ compiler found\nand much more")

    monkeypatch.setattr(module, "_compiled", broken)
    monkeypatch.setattr(module, "_LARGE", 12)
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
    monkeypatch.setattr(module, "_LARGE", 12)
    torch._dynamo.reset()
    for shape in ((1000, 700), (1003, 701), (3, 805, 400), (2, 1, 1001, 300)):
        values = torch.randn(shape)
        torch.testing.assert_close(sums_of_magnitudes(values, dim), values.abs().sum(dim))
        transposed = torch.randn(*shape[:-2], shape[-1], shape[-2]).mT
        torch.testing.assert_close(sums_of_magnitudes(transposed, dim), transposed.abs().sum(dim))
    assert _compilation.may_compile()


def steps(weight: Tensor, wanted: bool) -> list[Tensor]:
    """Whatever a step makes of a weight; the same step for the same shape."""
    generator = torch.Generator().manual_seed(0)
    replicas, rows, columns = weight.shape
    column, row, left = (
        torch.randn(replicas, *size, generator=generator, dtype=weight.dtype)
        for size in ((rows, 1), (1, columns), (1, rows))
    )
    product = add_outer_product(weight, column, row, left if wanted else None)
    assert (product is not None) == wanted
    return [weight, *(sums_of_magnitudes(weight, dim) for dim in (-1, -2)), *([product] if wanted else [])]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_the_compiled_step_is_the_same_for_all_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PART", 12)
    torch._dynamo.reset()
    compiled: list[Tensor] = []
    by_compiler = module._add_by_compiler
    monkeypatch.setattr(
        module, "_add_by_compiler", lambda weight, *rest: compiled.append(weight) or by_compiler(weight, *rest)
    )
    for shape in ((1, 64, 50), (2, 67, 31), (3, 20, 128), (1, 128, 64)):
        for wanted in (True, False):
            weight = torch.randn(shape, dtype=torch.float64)
            made = []
            for large in (12, 1 << 30):
                monkeypatch.setattr(module, "_LARGE", large)
                own = weight.clone()
                follow_sums(own, -1)
                follow_sums(own, -2)
                made.append(steps(own, wanted))
            for one, other in zip(*made, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert len(compiled) == 8
    assert _compilation.may_compile()


def test_without_a_compiler_the_step_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> None:
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(module, "_compiled", broken)
    monkeypatch.setattr(module, "_LARGE", 12)
    monkeypatch.setattr(module, "PART", 12)
    monkeypatch.setattr(_compilation, "_failure", "")
    weight = torch.randn(2, 20, 30)
    followed = weight.clone()
    follow_sums(followed, -1)
    with pytest.warns(RuntimeWarning, match="a tenth more time") as seen:
        made = steps(followed, True)
    steps(followed, True)  # no second warning
    assert len(seen) == 1
    for one, other in zip(made[1:], steps(weight, True)[1:], strict=True):
        torch.testing.assert_close(one, other)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The passes that are made for sums alone; weights of more than 12 numbers step in parts."""
    made: list[int] = []
    magnitudes = Tensor.abs
    monkeypatch.setattr(module, "PART", 12)
    monkeypatch.setattr(Tensor, "abs", lambda values: made.append(values.numel()) or magnitudes(values))
    return made


@pytest.mark.parametrize("dims", [(-1,), (-2,), (-1, -2)])
@pytest.mark.parametrize(
    ("shape", "dtype"), [((1, 40, 30), torch.float32), ((3, 41, 5), torch.float64), ((2, 7, 3), torch.bfloat16)]
)
def test_a_followed_weight_steps_with_its_sums(
    shape: tuple[int, ...], dtype: torch.dtype, dims: tuple[int, ...], passes: list[int]
) -> None:
    """And whoever changes it otherwise gets the sums of what it then is."""
    weight = nn.Parameter(torch.randn(shape, dtype=dtype))
    for dim in dims:
        follow_sums(weight, dim)
    in_one_pass = dtype != torch.bfloat16  # whose sums are not added up in parts
    for wanted in (True, False):
        column, row, left = (
            torch.randn(size, dtype=dtype)
            for size in ((*shape[:2], 1), (shape[0], 1, shape[2]), (shape[0], 1, shape[1]))
        )
        product = left @ weight.detach()
        expected = torch.addcmul(weight.detach(), column, row)
        with torch.no_grad():
            made = add_outer_product(weight, column, row, left if wanted else None)
        torch.testing.assert_close(made, product if wanted else None)
        torch.testing.assert_close(weight.detach(), expected)
        for dim in (-1, -2):
            passes.clear()
            sums = sums_of_magnitudes(weight, dim)
            assert bool(passes) == (not in_one_pass or dim not in dims)
            torch.testing.assert_close(sums, expected.abs().sum(dim))
    with torch.no_grad():
        weight[:, 0] = 0.0
    for dim in dims:
        torch.testing.assert_close(sums_of_magnitudes(weight, dim), weight.detach().abs().sum(dim))


def test_sums_are_kept_while_columns_become_0(passes: list[int]) -> None:
    weight = nn.Parameter(torch.randn(2, 9, 6, dtype=torch.float64))
    for dim in (-1, -2):
        follow_sums(weight, dim)
    mask = torch.tensor([[[True, False, False, True, False, False]], [[False] * 6]])
    with torch.no_grad():
        add_outer_product(weight, torch.randn(2, 9, 1).double(), torch.randn(2, 1, 6).double())
        before = sums_of_magnitudes(weight, -1).clone()
        with columns_becoming_0(weight, mask):
            weight.masked_fill_(mask, 0.0)
        passes.clear()
        for dim in (-1, -2):
            torch.testing.assert_close(sums_of_magnitudes(weight, dim), torch.linalg.vector_norm(weight, 1, dim))
        assert not passes
        assert before[0].gt(sums_of_magnitudes(weight, -1)[0]).all()
        weight.mul_(2.0)
        with columns_becoming_0(weight, mask):  # of which nothing is known any more
            weight.masked_fill_(mask, 0.0)
    torch.testing.assert_close(sums_of_magnitudes(weight, -1), weight.detach().abs().sum(-1))
