"""The Euler-Lagrange step of diagonal Gaussians, fast: by multi-tensor kernels or as one compiled function.

Both forms do what `DiagonalPrecision.observe`, ``relax`` and ``displacement`` do one after the other. A step must
read four numbers a weight (mean, gradient, precision, curvature) and write three; what comes between should not
travel to main memory and back. So "foreach" works through the weights in stretches that stay in the cache, with
torch's own kernels, and "compiled" makes one loop of the whole step, by torch.compile.
"""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from clagrange._checks import check_choice
from clagrange._compilation import compiling, give_up, may_compile
from clagrange.dynamics import stable_root
from clagrange.gaussian import DiagonalPrecision

FORMS = ("foreach", "compiled")

STRETCH = 65_536
"""Weights that "foreach" works on at a time on a CPU, more with more than two threads: the eight tensors of a
step then fit the cache. Nor is a smaller parameter worth the call of a compiled function, about .1 ms."""

COMPILED_FROM = 300_000
"""Weights from which `best_form` compiles. It takes 5 to 10 s and saves 5 to 9 ns a weight and step on one core,
so that so many repay it within some thousand steps, and a network of 10,000 hardly ever does."""

SERIES = {6: 0.2, 8: 1.125}
"""Terms of a series with which the compiled function gets by instead of an exponential, and the bound on λ up to
which it does. The rate of the mean is at most lr/r with the variance rate r. Tied to the mean's, λ stays below
the second bound unless ``lr`` exceeds .24; with r five times lr or more it stays below the first."""


@dataclass(frozen=True)
class StepSettings:
    """The plain numbers of a parameter group.

    Attributes:
        lr: step size > 0, the fraction of the way to equilibrium.
        temperature: T > 0.
        discount: γ per step, > 0; may be infinite.
        fraction: r in [0, 1], by which precisions relax.
        decay: β in [0, 1], of the curvature's average.
        gain: c in h ← βh + (1 − β)·c·ĥ.
        trust_region: bound on a mean's step in posterior standard deviations; may be infinite.
        prior_pull: multiplies δ(μ − μ_p) in the force; the stiffness h + δ keeps the whole δ.
    """

    lr: float
    temperature: float
    discount: float
    fraction: float
    decay: float
    gain: float
    trust_region: float
    prior_pull: float = 1.0


def best_form(means: list[Tensor]) -> str:
    """The form for these parameters: "compiled" where compiling repays its seconds, else "foreach".

    It repays them from `COMPILED_FROM` weights on, counted over the parameters that the compiled function takes
    (contiguous, not float64, of more than `STRETCH` weights) and on a CPU. On other devices multi-tensor kernels
    are the default, as in torch.optim.

    Example:
        >>> best_form([torch.zeros(10, 64)])
        'foreach'
    """
    if not may_compile() or any(mean.device.type != "cpu" for mean in means):
        return "foreach"
    weights = sum(
        mean.numel()
        for mean in means
        if mean.numel() > STRETCH and mean.is_contiguous() and mean.dtype != torch.float64
    )
    return "compiled" if weights >= COMPILED_FROM else "foreach"


@torch.no_grad()
def diagonal_step(
    means: list[Tensor],
    gradients: list[Tensor],
    precisions: list[DiagonalPrecision],
    curvatures: list[Tensor | None],
    examples: list[int],
    settings: StepSettings,
    *,
    form: str,
    return_steps: bool = False,
) -> list[Tensor] | None:
    """Observe, relax and move, in place, for all parameters of a group.

    Per weight, with δ = T/σ_p² and `clagrange.dynamics.stable_root` λ of the rate lr·σ²(h + δ)/T:

        h ← max(β h + (1 − β) c ĥ, 0)
        s ← s + r ((h + δ)/T − s)
        μ ← μ − (1 − e^{−λ}) (g + pull·δ(μ − μ_p)) / (h + δ)    at most ``trust_region``·σ

    Nothing here waits for a device, so a step can be captured in a CUDA graph; the graph then keeps the settings
    and the numbers of examples that it was captured with.

    Args:
        means: the parameters μ, of any shapes and floating types; changed in place.
        gradients: g of the mean loss per example, same shapes.
        precisions: of the means; changed in place.
        curvatures: ĥ, estimates of the diagonal curvature of the mean loss per example, same shapes; None for
            n·g².
        examples: n behind each gradient.
        settings: the numbers.
        form: "foreach" or "compiled". The latter takes contiguous parameters of more than `STRETCH` weights whose
            precision is float32, and leaves the others to "foreach". Where torch.compile fails, for want of a C++
            compiler say, a warning says so once and "foreach" does all.
        return_steps: whether to return what was added to each mean.

    Returns:
        The steps, in the precisions' type and the means' shapes, or None.

    Raises:
        ValueError: if ``form`` is neither, or the lists differ in length.

    Source: Vastola, Gershman, Rajan (2025), Eqs. 15-16 and 143-149, with a Gaussian prior.

    Example:
        >>> mean, gradient = torch.zeros(2), torch.tensor([0.5, -0.5])
        >>> settings = StepSettings(1e-3, 1e-2, math.inf, fraction=0.0, decay=1.0, gain=1.0, trust_region=1.0)
        >>> diagonal_step([mean], [gradient], [DiagonalPrecision(mean)], [None], [1], settings, form="foreach")
        >>> mean  # −lr·σ²/T·g
        tensor([-0.0500,  0.0500])
    """
    check_choice("form", form, FORMS)
    blocks = [
        _Block(
            mean,
            gradient,
            precision.precision,
            precision.curvature,
            precision.prior_mean,
            precision.prior_precision,
            curvature,
            torch.empty_like(precision.precision) if return_steps else None,
            count,
        )
        for mean, gradient, precision, curvature, count in zip(
            means, gradients, precisions, curvatures, examples, strict=True
        )
    ]
    left = _compiled_step(blocks, settings) if form == "compiled" else blocks
    for stretch in _stretches(left):
        _foreach_step(stretch, settings)
    return [block.step for block in blocks if block.step is not None] if return_steps else None


class _Block(NamedTuple):
    """The tensors of a parameter, or of a part of it."""

    mean: Tensor
    gradient: Tensor
    precision: Tensor
    curvature: Tensor
    prior_mean: Tensor
    prior_precision: Tensor
    estimate: Tensor | None
    step: Tensor | None
    examples: int

    def as_rows(self) -> "_Block | None":
        """The same memory as matrices, a row for each replica where their priors differ; None if that fails."""
        prior, weights = self.prior_precision.numel(), self.mean.numel()
        rows = 1 if prior in (1, weights) else prior
        if (
            not all(tensor.is_contiguous() for tensor in (self.mean, self.precision, self.curvature))
            or (rows > 1 and not self.prior_precision.shape[0] == len(self.mean) == rows)
            or self.prior_mean.numel() not in (rows, weights)
        ):
            return None
        return _Block._make(part.reshape(rows, -1) if isinstance(part, Tensor) else part for part in self)

    def pieces(self, weights: int) -> Iterator["_Block"]:
        """Parts of at most so many weights, where the layout in memory allows it."""
        rows = self.as_rows() if self.mean.numel() > weights else None
        if rows is None:
            yield self
            return
        length, width = rows.mean.shape[1], max(1, weights // len(rows.mean))
        for start in range(0, length, width):
            piece = slice(start, start + width)
            yield _Block._make(
                part[:, piece] if isinstance(part, Tensor) and part.shape[1] == length else part for part in rows
            )


def _stretches(blocks: list[_Block]) -> Iterator[list[_Block]]:
    """What to hand to the multi-tensor kernels at a time: on a CPU what fits the cache, elsewhere all."""
    if any(block.mean.device.type != "cpu" for block in blocks):
        yield blocks
        return
    most = max(STRETCH, 32_768 * torch.get_num_threads())  # torch gives a thread no less than 32,768 numbers
    stretch: list[_Block] = []
    weights = 0
    for block in blocks:
        for piece in block.pieces(most):
            if stretch and weights + piece.mean.numel() > most:
                yield stretch
                stretch, weights = [], 0
            stretch.append(piece)
            weights += piece.mean.numel()
    if stretch:
        yield stretch


def _foreach_step(blocks: list[_Block], settings: StepSettings) -> None:
    lr, temperature, discount = settings.lr, settings.temperature, settings.discount
    means, precisions, curvatures, prior_means, prior_precisions = (
        [getattr(block, name) for block in blocks]
        for name in ("mean", "precision", "curvature", "prior_mean", "prior_precision")
    )
    gradients = [block.gradient.to(block.precision.dtype) for block in blocks]

    torch._foreach_mul_(curvatures, settings.decay)
    share = (1.0 - settings.decay) * settings.gain
    squared = [number for number, block in enumerate(blocks) if block.estimate is None]
    if squared:
        of_those = [gradients[number] for number in squared]
        shares = [share * blocks[number].examples for number in squared]
        torch._foreach_addcmul_([curvatures[number] for number in squared], of_those, of_those, shares)
    for curvature, block in zip(curvatures, blocks, strict=True):
        if block.estimate is not None:
            curvature.add_(block.estimate, alpha=share).clamp_(min=0.0)

    prior_curvatures = torch._foreach_mul(prior_precisions, temperature)
    stiffness = torch._foreach_add(curvatures, prior_curvatures)
    torch._foreach_lerp_(precisions, torch._foreach_div(stiffness, temperature), settings.fraction)

    steps = torch._foreach_div(stiffness, precisions)
    if math.isinf(discount):
        torch._foreach_mul_(steps, -lr / temperature)  # minus the overdamped rate
    else:
        torch._foreach_mul_(steps, -2.0 * lr / temperature)
        roots = torch._foreach_mul(steps, -2.0 / discount)
        torch._foreach_add_(roots, 1.0)
        torch._foreach_sqrt_(roots)
        torch._foreach_add_(roots, 1.0)
        torch._foreach_div_(steps, roots)  # minus the stable root
    torch._foreach_expm1_(steps)
    torch._foreach_div_(steps, stiffness)
    forces = torch._foreach_sub(means, prior_means)
    torch._foreach_mul_(prior_curvatures, settings.prior_pull)
    torch._foreach_mul_(forces, prior_curvatures)
    torch._foreach_add_(forces, gradients)
    torch._foreach_mul_(steps, forces)
    if not math.isinf(settings.trust_region):
        bounds = torch._foreach_rsqrt(precisions)
        torch._foreach_mul_(bounds, settings.trust_region)
        torch._foreach_minimum_(steps, bounds)
        torch._foreach_neg_(bounds)
        torch._foreach_maximum_(steps, bounds)
    torch._foreach_add_(means, steps)
    wanted = [block.step for block in blocks if block.step is not None]  # of all, or of none
    if wanted:
        torch._foreach_copy_(wanted, steps)


def _compiled_step(blocks: list[_Block], settings: StepSettings) -> list[_Block]:
    """Step the blocks that the compiled function takes, and return the others."""
    left = []
    numbers: dict[int, Tensor] = {}  # by the number of examples
    for block in blocks:
        large = block.mean.numel() > STRETCH and block.precision.dtype == torch.float32
        rows = block.as_rows() if large and may_compile() else None
        if rows is None:
            left.append(block)
            continue
        examples = block.examples if block.estimate is None else 1
        if examples not in numbers:
            numbers[examples] = _numbers(settings, examples)
        try:
            _call_compiled(rows, numbers[examples], settings)
        except Exception as error:  # torch.compile raises many kinds
            # nothing was changed: it compiles before it computes
            left.append(block)
            give_up(
                error,
                "form: the compiled step is not available, and multi-tensor kernels, several times slower, take "
                "its place; to be rid of this warning choose the form foreach",
                stacklevel=4,
            )
    return left


def _numbers(settings: StepSettings, examples: int) -> Tensor:
    """What `_elementwise` takes as ``numbers``: inside a tensor they may change without a new compilation."""
    renewal, rate = 1.0 - settings.decay, _rate(settings)
    return torch.tensor(
        (
            renewal,
            renewal * settings.gain * examples,
            settings.fraction,
            settings.fraction / settings.temperature,
            rate,
            2.0 / settings.discount,
            settings.trust_region / math.sqrt(rate) if rate > 0.0 else 0.0,  # a schedule may end at 0
            settings.temperature,
            settings.prior_pull,
        ),
        dtype=torch.float32,
    )


def _rate(settings: StepSettings) -> float:
    return settings.lr / settings.temperature * (1.0 if math.isinf(settings.discount) else 2.0)


def _call_compiled(rows: _Block, numbers: Tensor, settings: StepSettings) -> None:
    # the rate is lr·(h + δ)/(T·s) with the new s ≥ r·(h + δ)/T, and so at most lr/r
    largest = stable_root(settings.lr / settings.fraction, settings.discount) if settings.fraction else math.inf
    # .data, because for a view torch compiles anew whenever that of which it is a view has another rank
    tensors = (part.data if isinstance(part, Tensor) else None for part in rows[:-1])
    _compiled()(
        *tensors,
        numbers,
        finite=not math.isinf(settings.discount),
        bounded=not math.isinf(settings.trust_region),
        terms=next((terms for terms, bound in SERIES.items() if largest <= bound), 0),
    )
    torch.autograd.graph.increment_version((rows.mean, rows.precision, rows.curvature))


@functools.cache
def _compiled() -> Callable[..., None]:
    """`_elementwise` as one loop."""
    import torch._inductor

    # multiply and add in one instruction takes a fifth of the time off; older versions of torch have a bool here
    contract = torch._inductor.config.cpp.enable_floating_point_contract_flag
    fast = "fast" if isinstance(contract, str) else True
    return compiling(_elementwise, **{"cpp.enable_floating_point_contract_flag": fast})


def _elementwise(
    mean: Tensor,
    gradient: Tensor,
    precision: Tensor,
    curvature: Tensor,
    prior_mean: Tensor,
    prior_precision: Tensor,
    estimate: Tensor | None,
    step: Tensor | None,
    numbers: Tensor,
    *,
    finite: bool,
    bounded: bool,
    terms: int,
) -> None:
    """The step in float32, in few and short chains of operations; divisions and roots are the dear ones."""
    renewal, share, fraction, pace, rate, ratio, reach, temperature, prior_pull = numbers.unbind()
    prior_curvature = temperature * prior_precision
    gradient = gradient.to(precision.dtype)
    h = curvature - renewal * curvature
    if estimate is None:
        h = h + share * gradient * gradient
    else:
        h = h + share * estimate.to(precision.dtype)
        h = torch.where(h < 0.0, 0.0, h)
    stiffness = h + prior_curvature
    s = (precision - fraction * precision) + pace * stiffness
    mobility = rate / s
    bound = reach * torch.sqrt(mobility) if bounded else None
    if finite:
        mobility = mobility / (1.0 + torch.sqrt(1.0 + ratio * (mobility * stiffness)))
    root = mobility * stiffness
    force = gradient + prior_pull * prior_curvature * (mean - prior_mean)
    moved = _relaxed_part(root, terms) * (mobility * force)
    if bound is not None:
        moved = torch.where(moved > bound, bound, moved)
        moved = torch.where(moved < -bound, -bound, moved)
    curvature.copy_(h)
    precision.copy_(s)
    mean.copy_(mean + moved)
    if step is not None:
        step.copy_(moved)


def _relaxed_part(root: Tensor, terms: int) -> Tensor:
    """(e^{−λ} − 1)/λ for λ ≥ 0, to a few units of the last place of float32.

    torch's compiler turns expm1(x) into exp(x) − 1, which has no digit left where λ is below 1e-7, the usual case
    of a slow weight. With 6 ``terms`` it is its Taylor series, for λ ≤ .2, off by less than 2e-8. With 8 it is
    q(2 + λq), which doubles the exponent and in which nothing cancels, with the series of q = (e^{−λ/2} − 1)/λ,
    for λ ≤ 1.125, off by less than 3e-8; it also takes less time than exp. With 0, any λ ≥ 0 will do.
    """
    if terms == 6:
        return _exponential_series(root, 1.0, 6)
    q = _exponential_series(root, 0.5, 8)
    q = q * (2.0 + root * q)
    return q if terms else torch.where(root > SERIES[8], (torch.exp(-root) - 1.0) / root, q)


def _exponential_series(root: Tensor, scale: float, terms: int) -> Tensor:
    """(e^{−scale·λ} − 1)/λ by an even number of terms of its Taylor series, in pairs."""
    factors = [(-scale) ** order / math.factorial(order) for order in range(1, terms + 1)]
    square = root * root
    q = factors[-2] + factors[-1] * root
    for index in range(terms - 4, -1, -2):
        q = (factors[index] + factors[index + 1] * root) + square * q
    return q
