"""The fast diagonal step in both forms: equal to the plain path for all shapes, layouts, types and settings."""

import copy
import functools
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from clagrange import _compilation, gaussianize
from clagrange.gaussian import DiagonalPrecision
from clagrange.optim import diagonal_step as module
from clagrange.optim.diagonal_step import COMPILED_FROM, STRETCH, StepSettings, best_form, diagonal_step

SETTINGS = StepSettings(
    lr=0.02, temperature=1e-2, discount=math.inf, fraction=0.03, decay=0.9, gain=0.8, trust_region=math.inf
)
VARIANTS = {
    "overdamped": SETTINGS,
    "finite discount": replace(SETTINGS, discount=0.3),
    "trust region": replace(SETTINGS, trust_region=0.05),
    "both": replace(SETTINGS, discount=3.0, trust_region=0.1),
    "weak prior": replace(SETTINGS, prior_pull=0.1, discount=0.3),
    "precision rests": replace(SETTINGS, lr=2.0, fraction=0.0, trust_region=10.0),
    "slow": replace(SETTINGS, lr=1e-9, fraction=1e-9),
    "precision is fast": replace(SETTINGS, lr=0.03, fraction=0.3),
    "both, precision is fast": replace(SETTINGS, lr=0.015, fraction=0.3, discount=3.0, trust_region=0.1),
    "end of a schedule": replace(SETTINGS, lr=0.0, trust_region=0.1),
}
FORMS = ("foreach", "compiled")
PRIORS = ("zero", "initial", "consolidated")


@dataclass
class Problem:
    """All that a step wants."""

    means: list[Tensor]
    gradients: list[Tensor]
    precisions: list[DiagonalPrecision]
    curvatures: list[Tensor | None]
    examples: list[int]

    def step(self, settings: StepSettings, form: str) -> list[Tensor]:
        """The fast step."""
        steps = diagonal_step(**vars(self), settings=settings, form=form, return_steps=True)
        assert steps is not None
        return steps

    def plain_step(self, settings: StepSettings) -> list[Tensor]:
        """The same by the methods of the precisions, one parameter after the other."""
        steps = []
        for mean, gradient, precision, curvature, examples in zip(*vars(self).values(), strict=True):
            gradient = gradient.to(precision.precision.dtype)
            estimate = examples * gradient.square() if curvature is None else curvature.to(gradient.dtype)
            precision.observe(settings.gain * estimate, settings.decay)
            precision.relax(settings.temperature, settings.fraction)
            step = precision.displacement(
                precision.prior_mean + settings.prior_pull * (mean - precision.prior_mean),
                gradient,
                lr=settings.lr,
                temperature=settings.temperature,
                discount=settings.discount,
                trust_region=settings.trust_region,
            )
            mean += step
            steps.append(step)
        return steps

    def double(self) -> "Problem":
        """A copy in float64."""
        other = copy.deepcopy(self)
        return Problem(
            [mean.double() for mean in other.means],
            [gradient.double() for gradient in other.gradients],
            [precision.double() for precision in other.precisions],
            [None if curvature is None else curvature.double() for curvature in other.curvatures],
            other.examples,
        )

    def assert_close_to(self, other: "Problem", **tolerance: float) -> None:
        """Means, precisions and curvatures agree."""
        for mine, theirs in zip(self.means, other.means, strict=True):
            torch.testing.assert_close(mine.to(theirs.dtype), theirs, **tolerance)
        for precision, expected in zip(self.precisions, other.precisions, strict=True):
            for name, buffer in expected.named_buffers():
                actual = getattr(precision, name).to(buffer.dtype)
                torch.testing.assert_close(actual, buffer, **tolerance)


def problem(means: list[Tensor], *, prior: str = "zero", stacked: bool = False, observed: bool = True) -> Problem:
    """A random state away from the prior; every other parameter has a curvature estimate of its own."""
    precisions = []
    for mean in means:
        variance = torch.linspace(0.2, 0.7, len(mean), dtype=torch.float64) if stacked else 0.5
        precisions.append(
            DiagonalPrecision(
                mean,
                prior_mean="zero" if prior == "zero" else "initial",
                prior_variance=variance,
                stacked=stacked,
            )
        )
        precisions[-1].precision *= 0.5 + torch.rand_like(precisions[-1].precision)
        if prior == "consolidated":
            precisions[-1].consolidate(mean)
        precisions[-1].curvature.copy_(torch.rand_like(precisions[-1].curvature))
        mean += 0.3 * torch.randn_like(mean)
    # of widely different sizes, with the sign of the prior's pull, so that no force is a small difference
    gradients = [
        0.1 * torch.randn_like(mean).exp() * torch.sign(mean - precision.prior_mean).to(mean.dtype)
        for mean, precision in zip(means, precisions, strict=True)
    ]
    # some so negative that the belief is held at 0
    estimates = [torch.rand_like(mean) - 30.0 * (torch.rand_like(mean) < 0.2) for mean in means]
    curvatures = [estimate if observed and i % 2 else None for i, estimate in enumerate(estimates)]
    return Problem(means, gradients, precisions, curvatures, [3 + i for i in range(len(means))])


def layouts(dtype: torch.dtype) -> dict[str, list[Tensor]]:
    """Parameters that a step must take, whatever their shapes and their layout in memory."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64).to(dtype)

    return {
        "small": [randn(3, 4), randn(7), randn(), randn(0, 3), randn(2, 3, 3, 2), *map(randn, range(9))],
        "large": [randn(260, 261), randn(STRETCH + 1), randn(5), randn(4, 3)],
        "not contiguous": [
            randn(5, 4).T,
            randn(260, 261).T,
            randn(4, 60, 60)[:, :, ::2],
            randn(16, 8, 24, 24).to(memory_format=torch.channels_last),
        ],
    }


def stacked_means(dtype: torch.dtype) -> list[Tensor]:
    """Parameters of three replicas."""
    return [torch.randn(shape, dtype=dtype) for shape in ((3, 150, 170), (3, 150), (3,), (3, 4, 5))]


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled form's arithmetic without the seconds that compiling takes, also for small parameters."""
    monkeypatch.setattr(module, "_compiled", lambda: module._elementwise)
    monkeypatch.setattr(_compilation, "_failure", "")
    monkeypatch.setattr(module, "STRETCH", 16)


@pytest.mark.parametrize("layout", ["small", "large", "not contiguous"])
@pytest.mark.parametrize("name", VARIANTS)
def test_it_is_the_plain_path_in_float64(name: str, layout: str) -> None:
    prior = {"both": "initial", "weak prior": "consolidated"}.get(name, "zero")
    fast = problem(layouts(torch.float64)[layout], prior=prior)
    plain = fast.double()
    for _ in range(2):
        steps, expected = fast.step(VARIANTS[name], "foreach"), plain.plain_step(VARIANTS[name])
        torch.testing.assert_close(steps, expected, rtol=1e-12, atol=0.0)
    fast.assert_close_to(plain, rtol=1e-12, atol=1e-14)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("form", FORMS)
def test_float32_is_right_to_a_few_digits_of_its_last_place(form: str, name: str, prior: str) -> None:
    fast = problem(layouts(torch.float32)["large"], prior=prior)
    exact = fast.double()
    steps, expected = fast.step(VARIANTS[name], form), exact.plain_step(VARIANTS[name])
    torch.testing.assert_close([step.double() for step in steps], expected, rtol=3e-6, atol=0.0)
    fast.assert_close_to(exact, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("form", FORMS)
def test_replicas_with_priors_of_their_own(form: str, prior: str) -> None:
    fast = problem(stacked_means(torch.float32), prior=prior, stacked=True)
    exact = fast.double()
    steps, expected = fast.step(VARIANTS["both"], form), exact.plain_step(VARIANTS["both"])
    torch.testing.assert_close([step.double() for step in steps], expected, rtol=3e-6, atol=0.0)
    fast.assert_close_to(exact, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_half_precision_means_keep_float32_state(form: str, dtype: torch.dtype) -> None:
    fast = problem(layouts(dtype)["large"] + layouts(dtype)["small"])
    plain = copy.deepcopy(fast)
    fast.step(VARIANTS["both"], form)
    plain.plain_step(VARIANTS["both"])
    assert all(precision.precision.dtype == torch.float32 for precision in fast.precisions)
    for mean, expected in zip(fast.means, plain.means, strict=True):
        torch.testing.assert_close(mean, expected, rtol=torch.finfo(dtype).eps, atol=1e-6)
        assert (mean != expected).sum() <= 0.01 * mean.numel()  # where a sum lies between two numbers
    for precision, expected in zip(fast.precisions, plain.precisions, strict=True):
        torch.testing.assert_close(precision.precision, expected.precision, rtol=1e-6, atol=0.0)
        torch.testing.assert_close(precision.curvature, expected.curvature, rtol=1e-6, atol=0.0)


def test_large_parameters_are_stepped_in_stretches_that_fit_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    step = module._foreach_step

    def recording(blocks: list[module._Block], settings: StepSettings) -> None:
        seen.append([block.mean.numel() for block in blocks])
        step(blocks, settings)

    monkeypatch.setattr(module, "_foreach_step", recording)
    means = [torch.randn(shape) for shape in ((300, 301), (10,), (20,))] + stacked_means(torch.float32)[:1]
    problem(means).step(SETTINGS, "foreach")
    assert seen == [[STRETCH], [300 * 301 - STRETCH, 10, 20], [STRETCH], [3 * 150 * 170 - STRETCH]]
    seen.clear()
    problem(stacked_means(torch.float32), stacked=True).step(SETTINGS, "foreach")
    assert sum(map(sum, seen)) == 3 * (150 * 170 + 150 + 1 + 20)
    assert max(map(sum, seen)) <= STRETCH


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(("form", "device"), [("foreach", "cuda"), ("foreach", "cpu"), ("compiled", "cpu")])
@pytest.mark.parametrize("name", ["overdamped", "both"])
def test_it_never_waits_for_a_device(form: str, device: str, name: str) -> None:
    """On tensors without values whatever asks for one fails; so the step can be captured in a CUDA graph."""
    with FakeTensorMode():
        means = [torch.zeros(shape, device=device) for shape in ((300, 300), (7,), ())]
        steps = diagonal_step(
            means,
            [torch.zeros_like(mean) for mean in means],
            [DiagonalPrecision(mean, prior_mean="initial") for mean in means],
            [None, torch.zeros_like(means[1]), None],
            [4, 4, 4],
            VARIANTS[name],
            form=form,
            return_steps=True,
        )
    assert steps is not None
    assert [(step.shape, step.device) for step in steps] == [(mean.shape, mean.device) for mean in means]


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("form", FORMS)
def test_a_backward_pass_through_stepped_weights_is_an_error(form: str) -> None:
    small = problem([torch.randn(5, 4)])
    weight = small.means[0].requires_grad_()
    loss = weight.square().sum()
    small.step(SETTINGS, form)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("form", FORMS)
def test_nothing_to_step(form: str) -> None:
    assert diagonal_step([], [], [], [], [], SETTINGS, form=form) is None
    assert diagonal_step([], [], [], [], [], SETTINGS, form=form, return_steps=True) == []


def test_what_does_not_fit_is_refused() -> None:
    small = problem([torch.zeros(3)])
    with pytest.raises(ValueError, match="form: expected one of foreach, compiled; got 'loop'"):
        small.step(SETTINGS, "loop")
    with pytest.raises(ValueError, match="zip"):
        replace(small, examples=[]).step(SETTINGS, "foreach")


def test_no_more_state_than_adam() -> None:
    net = gaussianize(nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 5)))
    weights = sum(mean.numel() for mean in net.parameters())
    state = sum(buffer.numel() for buffer in net.buffers())
    assert state <= 2 * weights + 2 * len(list(net.parameters()))  # the prior is two numbers a parameter


def test_the_form_is_chosen_by_the_weights_that_compiling_serves() -> None:
    side = math.isqrt(COMPILED_FROM) + 1
    assert best_form([torch.empty(side, side)]) == "compiled"
    assert best_form([torch.empty(side, side, dtype=torch.bfloat16)]) == "compiled"
    assert best_form([torch.empty(side, side, dtype=torch.float64)]) == "foreach"
    assert best_form([torch.empty(side, side + 1).T]) == "foreach"
    assert best_form([torch.empty(side, side // 2)]) == "foreach"
    assert best_form([torch.empty(STRETCH)] * 20) == "foreach"
    assert best_form([torch.empty(side, side), torch.empty(3, device="meta")]) == "foreach"
    assert best_form([]) == "foreach"


def test_without_a_compiler_the_step_is_taken_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("No working\nC++ compiler found\nand much more")

    monkeypatch.setattr(module, "_compiled", broken)
    monkeypatch.setattr(_compilation, "_failure", "")
    first = problem([torch.randn(300, 300), torch.randn(400, 200)])
    second = copy.deepcopy(first)
    with pytest.warns(RuntimeWarning, match=r"\(RuntimeError: No working C\+\+ compiler found\)") as seen:
        first.step(SETTINGS, "compiled")
    assert len(seen) == 1
    second.step(SETTINGS, "foreach")
    first.assert_close_to(second, rtol=0.0, atol=0.0)
    first.step(SETTINGS, "compiled")  # no second warning
    assert best_form([torch.empty(2000, 2000)]) == "foreach"


# ------------------------------------------------------------------------------------- with torch's compiler
def compiling(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that compiles: seconds each, and torch 2.13's compiler imports what torch itself deprecates."""
    marks = (
        pytest.mark.slow,
        pytest.mark.usefixtures("_nothing_compiled"),
        pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    )
    return functools.reduce(lambda marked, mark: mark(marked), marks, test)


def compiled_graphs() -> int:
    """How many graphs torch has compiled."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.fixture
def _nothing_compiled() -> None:
    torch._dynamo.reset()


@compiling
@pytest.mark.parametrize(
    ("name", "dtype", "stacked", "prior"),
    [
        ("slow", torch.float32, False, "zero"),
        ("both", torch.float32, False, "initial"),
        ("both", torch.float32, True, "zero"),
        ("precision rests", torch.float32, False, "zero"),
        ("weak prior", torch.bfloat16, False, "zero"),
    ],
)
def test_compiled(name: str, dtype: torch.dtype, stacked: bool, prior: str) -> None:
    means = stacked_means(dtype) if stacked else layouts(dtype)["large"]
    fast = problem(means, prior=prior, stacked=stacked)
    exact = fast.double()
    before = compiled_graphs()
    steps, expected = fast.step(VARIANTS[name], "compiled"), exact.plain_step(VARIANTS[name])
    assert compiled_graphs() > before
    torch.testing.assert_close([step.double() for step in steps], expected, rtol=3e-6, atol=0.0)
    if dtype == torch.float32:
        fast.assert_close_to(exact, rtol=1e-6, atol=1e-6)


@compiling
def test_compiled_once_for_all_shapes_and_numbers() -> None:
    """A schedule, other batch sizes, other shapes and a copied or loaded network compile nothing anew.

    Only when the bound on λ falls below the next one in `SERIES`, once.
    """
    settings = replace(SETTINGS, trust_region=1.0)
    sizes = [(300, 301), (STRETCH + 3,), (2, 3, 110, 120)]
    problem([torch.randn(sizes[0])], observed=False).step(settings, "compiled")
    before = compiled_graphs()
    fast = problem([torch.randn(size) for size in sizes], observed=False)
    exact = fast.double()
    for number in range(5):
        if number == 2:
            fast = copy.deepcopy(fast)
        if number == 3:
            fast = pickle.loads(pickle.dumps(fast))
        settings = replace(settings, lr=settings.lr * 0.7, fraction=settings.fraction * 0.9, temperature=1e-3)
        fast.examples = exact.examples = [64 + number] * 3
        fast.step(settings, "compiled")
        exact.plain_step(settings)
        assert compiled_graphs() == before + (settings.lr / settings.fraction < min(module.SERIES.values()))
    assert compiled_graphs() == before + 1
    fast.assert_close_to(exact, rtol=1e-5, atol=1e-6)


@compiling
def test_kinds_of_arguments_beyond_the_usual_limit_of_compilations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_compilation, "_failure", "")
    fast = problem([torch.randn(300, 300)])
    exact = fast.double()
    before = compiled_graphs()
    for settings in (VARIANTS["overdamped"], VARIANTS["trust region"]) * 2:
        with torch._dynamo.config.patch(recompile_limit=1):
            fast.step(settings, "compiled")
        exact.plain_step(settings)
    assert _compilation._failure == ""
    assert compiled_graphs() == before + 2
    fast.assert_close_to(exact, rtol=1e-6, atol=1e-6)


@compiling
def test_no_working_compiler_is_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_compilation, "_failure", "")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    fast = problem([torch.randn(300, 300)])
    plain = copy.deepcopy(fast)
    missing = torch._inductor.config.patch({"cpp.cxx": (None, "/nonexistent/g++")})
    with missing, pytest.warns(RuntimeWarning, match="form: the compiled step is not available"):
        fast.step(SETTINGS, "compiled")
    plain.step(SETTINGS, "foreach")
    fast.assert_close_to(plain, rtol=0.0, atol=0.0)
