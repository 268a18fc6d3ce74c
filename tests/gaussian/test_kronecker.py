"""KroneckerPrecision against dense matrices, against R separate copies of itself, and across interruption."""

import copy
import io
import itertools
import math
import pickle

import pytest
import torch
from cases import EULER_LAGRANGE, R, assert_same_tensors, backward, batch, convnet, images, mlp, tensor, train
from scipy import stats
from scipy.linalg import sqrtm
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, kl_divergence

from clagrange import gaussianize, inject_variance, replicas
from clagrange.dynamics import relaxation_fraction
from clagrange.gaussian import Kronecker, KroneckerPrecision, gaussian_layers
from clagrange.gaussian.factors import damped_inverse
from clagrange.gaussian.kronecker import Factors, LowRank
from clagrange.optim import EulerLagrange

ROWS, COLUMNS = 3, 4
T, PRIOR_VARIANCE = 0.3, 0.7
DELTA = T / PRIOR_VARIANCE

FORMS = {
    "full": {},
    "diagonal inputs": {"diagonal_inputs": True},
    "diagonal outputs": {"diagonal_outputs": True},
    "both diagonal": {"diagonal_inputs": True, "diagonal_outputs": True},
}
SHAPES = {
    f"{name}{', groups' * bool(leading)}": (leading, form)
    for leading, (name, form) in itertools.product([(), (2,)], FORMS.items())
}
every_form = pytest.mark.parametrize(("leading", "form"), SHAPES.values(), ids=SHAPES)


# -------------------------------------------------------------------------------------------------- oracles
def rows_of(seed: int, leading: tuple[int, ...] = (), examples: int = 10) -> LowRank:
    """Random rows x and d, of which dᵀd and xᵀx are the factors of a batch."""
    generator = torch.Generator().manual_seed(seed)
    x, d = (
        torch.randn(*leading, examples, size, generator=generator, dtype=torch.float64)
        * torch.arange(1, size + 1)
        / math.sqrt(examples)
        for size in (COLUMNS, ROWS)
    )
    return LowRank(x, d, examples)


def observation(
    seed: int, leading: tuple[int, ...] = (), diagonal_inputs: bool = False, diagonal_outputs: bool = False
) -> Factors:
    """The factors of the same batch."""
    x, d, *_ = rows_of(seed, leading)
    return Factors(
        d.square().sum(-2) if diagonal_outputs else d.mT @ d,
        x.square().sum(-2) if diagonal_inputs else x.mT @ x,
        x.shape[-2],
    )


def learned(
    seed: int = 0, leading: tuple[int, ...] = (), temperature: float = T, prior_mean: str = "initial", **settings
) -> tuple[Tensor, KroneckerPrecision]:
    """A mean, and a precision that has seen the factors of one batch."""
    generator = torch.Generator().manual_seed(seed)
    mean, prior = torch.randn(2, *leading, ROWS, COLUMNS, generator=generator, dtype=torch.float64)
    precision = KroneckerPrecision(prior, prior_mean=prior_mean, **{"prior_variance": PRIOR_VARIANCE, **settings})
    sides = {name: settings[name] for name in ("diagonal_inputs", "diagonal_outputs") if name in settings}
    precision.observe(observation(seed, leading, **sides))
    precision.relax(temperature, 0.5)
    return mean, precision


def factors(precision: KroneckerPrecision) -> list[tuple[Tensor, Tensor]]:
    """G and A of every block, as full matrices."""
    sides = []
    for factor, diagonal in zip((precision.outputs, precision.inputs), precision.diagonal_sides, strict=True):
        full = torch.diag_embed(factor) if diagonal else factor
        sides.append(full.reshape(-1, *full.shape[-2:]))
    return list(zip(*sides, strict=True))


def identity(size: int = ROWS * COLUMNS) -> Tensor:
    return torch.eye(size, dtype=torch.float64)


def dense(precision: KroneckerPrecision, temperature: float = T) -> Tensor:
    """S of every block, (blocks, D, D) for the rows of the weights one after the other."""
    delta = temperature * precision.prior_precision.flatten()[0]
    return torch.stack([(torch.kron(G, A) + delta * identity()) / temperature for G, A in factors(precision)])


def vec(weights: Tensor) -> Tensor:
    """(..., out, in) as (blocks, D)."""
    return weights.reshape(-1, ROWS * COLUMNS)


def times(matrices: Tensor, vectors: Tensor) -> Tensor:
    return (matrices @ vectors.unsqueeze(-1)).squeeze(-1)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def noise_like(mean: Tensor, seed: int = 5) -> tuple[Tensor, torch.Generator]:
    """Standard normal numbers, and a stream that is about to give them."""
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return noise, torch.Generator().manual_seed(seed)


def root(matrices: Tensor) -> Tensor:
    """The symmetric square root of every matrix, by Schur's decomposition."""
    return torch.stack([torch.from_numpy(sqrtm(matrix.numpy()).real) for matrix in matrices])


# --------------------------------------------------------------------------------------- what it is, densely
@every_form
def test_axes_make_the_precision_diagonal(leading: tuple[int, ...], form: dict) -> None:
    mean, precision = learned(leading=leading, **form)
    blocks = math.prod(leading)
    basis = identity().reshape(-1, *[1] * len(leading), ROWS, COLUMNS).expand(-1, *mean.shape)
    axes = precision.from_axes(basis).reshape(-1, blocks, ROWS * COLUMNS).permute(1, 2, 0)  # in columns
    close(axes.mT @ axes, identity().expand(blocks, -1, -1))
    close(axes.mT @ dense(precision) @ axes, torch.diag_embed(vec(precision.spectrum())))
    close(precision.to_axes(precision.from_axes(basis)), basis.contiguous())
    close(vec(precision.to_axes(mean)), times(axes.mT, vec(mean)))


@every_form
def test_the_posterior_is_that_of_the_dense_matrix(leading: tuple[int, ...], form: dict) -> None:
    mean, precision = learned(leading=leading, **form)
    covariance = torch.linalg.inv(dense(precision))
    close(vec(precision.solve(mean)), times(covariance, vec(mean)))
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    close(vec(precision.variance()), variance)
    close(vec(precision.retained_information()), (1 - variance / PRIOR_VARIANCE).clamp(0, 1))
    posterior = MultivariateNormal(vec(mean), precision_matrix=dense(precision))
    prior = MultivariateNormal(vec(precision.prior_mean), PRIOR_VARIANCE * identity())
    close(precision.entropy(), posterior.entropy().sum())
    close(precision.kl(mean), kl_divergence(posterior, prior).sum())


def test_the_prior_of_mean_zero() -> None:
    mean, precision = learned(prior_mean="zero")
    posterior = MultivariateNormal(vec(mean), precision_matrix=dense(precision))
    prior = MultivariateNormal(torch.zeros(ROWS * COLUMNS, dtype=torch.float64), PRIOR_VARIANCE * identity())
    close(precision.kl(mean), kl_divergence(posterior, prior).squeeze())


def test_at_the_start_it_is_the_prior() -> None:
    mean = torch.randn(2, ROWS, COLUMNS, dtype=torch.float64)
    precision = KroneckerPrecision(mean, prior_mean="initial", prior_variance=0.3)
    assert abs(float(precision.kl(mean))) < 1e-14
    close(precision.variance(), torch.full_like(mean, 0.3))
    assert not precision.retained_information().any()


# ------------------------------------------------------------------------------------- samples and injection
@every_form
def test_a_sample_is_the_symmetric_root_of_the_covariance_times_the_noise(
    leading: tuple[int, ...], form: dict
) -> None:
    mean, precision = learned(leading=leading, **form)
    noise, stream = noise_like(mean)
    drawn = precision.sample(mean, stream)
    close(vec(drawn - mean), times(root(torch.linalg.inv(dense(precision))), vec(noise)))


def test_samples_have_the_law_of_the_posterior() -> None:
    mean, precision = learned()
    stream = torch.Generator().manual_seed(1)
    draws = torch.stack([vec(precision.sample(mean, stream) - mean)[0] for _ in range(4000)])
    white = draws @ torch.linalg.cholesky(dense(precision)[0])
    for one, other in itertools.combinations(white.T, 2):
        assert abs(stats.pearsonr(one, other).statistic) < 4 / math.sqrt(4000)
    assert stats.kstest(white.flatten().numpy(), stats.norm.cdf).pvalue > 0.01
    assert stats.kstest(white.square().sum(1).numpy(), stats.chi2(ROWS * COLUMNS).cdf).pvalue > 0.01


@every_form
@pytest.mark.parametrize(("strength", "widen"), [(0.4, 0.0), (1.0, 0.3), (0.4, 1.0)])
def test_injection_is_the_dense_ornstein_uhlenbeck_step(
    leading: tuple[int, ...], form: dict, strength: float, widen: float
) -> None:
    mean, precision = learned(leading=leading, **form)
    covariance = torch.linalg.inv((1 - widen) * dense(precision) + widen / PRIOR_VARIANCE * identity())
    retained = identity() - covariance / PRIOR_VARIANCE
    keep = identity() - strength * (identity() - retained)
    noise, stream = noise_like(mean)
    spread = root(PRIOR_VARIANCE * (identity() - keep @ keep))
    expected = times(keep, vec(mean - precision.prior_mean)) + times(spread, vec(noise))
    injected = precision.injected(mean, strength, widen, stream)
    close(vec(injected - precision.prior_mean), expected)
    close(torch.linalg.inv(dense(precision)), covariance)


def test_draws_do_not_depend_on_the_choice_of_degenerate_axes() -> None:
    """Of two factors that differ by rounding the eigenvectors of 0 differ altogether, the draws by rounding."""
    rows = torch.randn(2, COLUMNS, dtype=torch.float64)
    mean = torch.randn(ROWS, COLUMNS, dtype=torch.float64)
    pair = [KroneckerPrecision(mean, prior_variance=0.5) for _ in range(2)]
    for precision, inputs in zip(pair, (rows.T @ rows, rows.T @ (rows * (1 + 1e-15))), strict=True):
        precision.observe(Factors(identity(ROWS), 0.5 * (inputs + inputs.T), 2))
        precision.relax(T, 1.0)
    streams = [noise_like(mean)[1] for _ in pair]
    drawn = [precision.sample(mean, stream) for precision, stream in zip(pair, streams, strict=True)]
    injected = [
        precision.injected(mean, 1.0, 0.0, stream) for precision, stream in zip(pair, streams, strict=True)
    ]
    assert (pair[0].from_axes(mean) - pair[1].from_axes(mean)).abs().max() > 1e-3
    close(*drawn)
    close(*injected, tolerance=1e-6)  # √(1 − a²) of a retained information near 1


def test_strength_zero_draws_nothing() -> None:
    mean, precision = learned()
    stream = torch.Generator().manual_seed(1)
    before = stream.get_state()
    assert torch.equal(precision.injected(mean, 0.0, 0.5, stream), mean)
    assert torch.equal(stream.get_state(), before)


# ---------------------------------------------------------------------------------------- widening and reset
@every_form
def test_widening_the_whole_moves_the_precision_to_the_prior(leading: tuple[int, ...], form: dict) -> None:
    _, precision = learned(leading=leading, **form)
    expected = 0.7 * dense(precision) + 0.3 / PRIOR_VARIANCE * identity()
    precision.widen(0.3)
    close(dense(precision), expected)


@every_form
@pytest.mark.parametrize("side", ["rows", "columns"])
def test_widening_rows_or_columns(leading: tuple[int, ...], form: dict, side: str) -> None:
    _, precision = learned(leading=leading, **form)
    size = ROWS if side == "rows" else COLUMNS
    mask = torch.arange(size) == 1
    keep = torch.diag(1.0 - 0.4 * mask.double()).sqrt()
    keep = torch.kron(keep, identity(COLUMNS)) if side == "rows" else torch.kron(identity(ROWS), keep)
    curvature = T * dense(precision) - DELTA * identity()
    precision.widen(0.4, **{side: mask})
    close(T * dense(precision), keep @ curvature @ keep + DELTA * identity())


def test_a_row_widened_entirely_is_free_and_the_others_know_what_they_knew() -> None:
    """The marginal precision of a row that is given up returns to the prior's; between others nothing changes."""
    _, precision = learned()
    before = dense(precision)[0].reshape(ROWS, COLUMNS, ROWS, COLUMNS)
    precision.widen(1.0, rows=torch.tensor([False, True, False]))
    after = dense(precision)[0].reshape(ROWS, COLUMNS, ROWS, COLUMNS)
    close(after[1, :, 1], identity(COLUMNS) / PRIOR_VARIANCE)
    close(after[0, :, 2], before[0, :, 2])
    close(precision.variance()[1], torch.full((COLUMNS,), PRIOR_VARIANCE, dtype=torch.float64))


def test_masks_may_differ_between_groups_and_sides_act_together() -> None:
    _, precision = learned(leading=(2,))
    outputs, inputs = precision.outputs.clone(), precision.inputs.clone()
    rows = torch.tensor([[True, False, False], [False, False, True]])
    columns = torch.tensor([[False] * 4, [True, False, False, False]])
    precision.widen(1.0, rows, columns)
    for factor, before, mask in ((precision.outputs, outputs, rows), (precision.inputs, inputs, columns)):
        gone = mask.unsqueeze(-1) | mask.unsqueeze(-2)
        close(factor, before.masked_fill(gone, 0.0))


@every_form
def test_reset_returns_to_the_prior(leading: tuple[int, ...], form: dict) -> None:
    mean, precision = learned(leading=leading, **form)
    precision.reset()
    close(precision.variance(), torch.full_like(mean, PRIOR_VARIANCE))
    assert not precision.inputs.any()
    assert not precision.outputs.any()


@every_form
def test_reset_with_a_mask_takes_the_rows_and_columns_that_it_covers(
    leading: tuple[int, ...], form: dict
) -> None:
    mean, precision = learned(leading=leading, **form)
    one, other = copy.deepcopy(precision), copy.deepcopy(precision)
    mask = torch.zeros(mean.shape, dtype=torch.bool)
    mask[..., 1, :] = mask[..., :, 2] = mask[..., 0, 0] = True
    one.reset(mask)
    other.widen(1.0, rows=torch.tensor([False, True, False]), columns=torch.arange(COLUMNS) == 2)
    assert_same_tensors(one.state_dict(), other.state_dict())
    close(one.variance()[..., 1, :], torch.full_like(mean[..., 1, :], PRIOR_VARIANCE))
    close(one.variance()[..., 2], torch.full_like(mean[..., 2], PRIOR_VARIANCE))
    one.reset(torch.tensor([[False], [False], [True]]))  # broadcasts
    close(one.variance()[..., 2, :], torch.full_like(mean[..., 2, :], PRIOR_VARIANCE))


def test_start_over_takes_the_new_mean_as_that_of_the_prior() -> None:
    mean, precision = learned()
    precision.start_over(mean)
    assert abs(float(precision.kl(mean))) < 1e-14


# ------------------------------------------------------------------------------------------ the step, densely
def force(precision: KroneckerPrecision, mean: Tensor, gradient: Tensor, pull: float = 1.0) -> Tensor:
    return vec(gradient + pull * DELTA * (mean - precision.prior_mean))


def factored_covariance(precision: KroneckerPrecision) -> Tensor:
    """(G + √δ/π)⁻¹ ⊗ (A + π√δ)⁻¹ of every block."""
    blocks = []
    for G, A in factors(precision):
        ratio = math.sqrt((A.trace() / COLUMNS) / (G.trace() / ROWS))
        G = G + math.sqrt(DELTA) / ratio * identity(ROWS)
        A = A + math.sqrt(DELTA) * ratio * identity(COLUMNS)
        blocks.append(torch.kron(torch.linalg.inv(G), torch.linalg.inv(A)))
    return torch.stack(blocks)


@every_form
@pytest.mark.parametrize(("lr", "discount"), [(0.2, math.inf), (0.2, 0.5), (3.0, 4.0)])
def test_the_exact_step(leading: tuple[int, ...], form: dict, lr: float, discount: float) -> None:
    mean, precision = learned(leading=leading, damping="exact", **form)
    gradient = torch.randn_like(mean)
    step = precision.displacement(mean, gradient, lr=lr, temperature=T, discount=discount, prior_pull=0.3)
    solved = torch.linalg.solve(T * dense(precision), force(precision, mean, gradient, 0.3))
    close(vec(step), -relaxation_fraction(lr, discount) * solved)


@every_form
@pytest.mark.parametrize(("lr", "discount"), [(0.2, math.inf), (0.2, 0.5)])
def test_the_factored_step(leading: tuple[int, ...], form: dict, lr: float, discount: float) -> None:
    mean, precision = learned(leading=leading, refresh_every=1, **form)
    gradient = torch.randn_like(mean)
    step = precision.displacement(mean, gradient, lr=lr, temperature=T, discount=discount, prior_pull=0.3)
    solved = times(factored_covariance(precision), force(precision, mean, gradient, 0.3))
    close(vec(step), -relaxation_fraction(lr, discount) * solved)


@pytest.mark.parametrize("damping", ["factored", "exact"])
def test_without_curvature_the_step_is_the_priors(damping: str) -> None:
    mean = torch.randn(ROWS, COLUMNS, dtype=torch.float64)
    precision = KroneckerPrecision(mean, prior_variance=PRIOR_VARIANCE, damping=damping, refresh_every=1)
    gradient = torch.randn_like(mean)
    step = precision.displacement(mean, gradient, lr=0.2, temperature=T)
    close(step, -(1 - math.exp(-0.2)) * (gradient / DELTA + mean))


def test_rows_of_a_small_batch_give_the_same_step() -> None:
    mean, precision = learned()
    x, d = torch.randn(2, COLUMNS, dtype=torch.float64), torch.randn(2, ROWS, dtype=torch.float64)
    settings = {"lr": 0.1, "temperature": T, "trust_region": 0.2}
    other = copy.deepcopy(precision)
    for _ in range(3):  # with inverses made anew, then with such as have followed the rows
        steps = []
        for each, share in ((precision, 3.0), (other, None)):
            each.observe(LowRank(x, d / 3, share=share))
            each.relax(T, 0.1)
            steps.append(each.displacement(mean, d.T @ x, **settings))
        close(*steps)


# ---------------------------------------------------------------------------------------------- trust region
def relative_length(precision: KroneckerPrecision, step: Tensor) -> float:
    """√(Δᵀ S Δ / D)."""
    return math.sqrt(float((vec(step) * times(dense(precision), vec(step))).sum()) / step.numel())


@every_form
def test_the_trust_region_bounds_the_exact_step_in_standard_deviations(
    leading: tuple[int, ...], form: dict
) -> None:
    mean, precision = learned(leading=leading, damping="exact", **form)
    gradient = 100 * torch.randn_like(mean)
    free = copy.deepcopy(precision).displacement(mean, gradient, lr=0.2, temperature=T)
    bound = 0.1 * relative_length(precision, free)
    step = precision.displacement(mean, gradient, lr=0.2, temperature=T, trust_region=bound)
    close(step, 0.1 * free)
    law = [MultivariateNormal(vec(where), precision_matrix=dense(precision)) for where in (mean + step, mean)]
    close(kl_divergence(*law).sum(), torch.tensor(step.numel() / 2 * bound**2, dtype=torch.float64))


@every_form
def test_the_trust_region_bounds_the_factored_step_from_above(leading: tuple[int, ...], form: dict) -> None:
    """In the metric of its own inverse, which exceeds the posterior's by the cross terms."""
    mean, precision = learned(leading=leading, refresh_every=1, **form)
    gradient = 100 * torch.randn_like(mean)
    settings = {"lr": 0.2, "temperature": T, "prior_pull": 0.0}
    free = copy.deepcopy(precision).displacement(mean, gradient, **settings)
    step = precision.displacement(mean, gradient, trust_region=0.3, **settings)
    close(step, free * (step.norm() / free.norm()))
    own = times(torch.linalg.inv(T * factored_covariance(precision)), vec(step))
    assert math.sqrt(float((vec(step) * own).sum()) / step.numel()) == pytest.approx(0.3)
    assert 0.03 < relative_length(precision, step) < 0.3


@pytest.mark.parametrize("damping", ["factored", "exact"])
def test_a_short_step_is_not_bounded_and_no_gradient_is_no_step(damping: str) -> None:
    mean, precision = learned(damping=damping)
    gradient = 1e-3 * torch.randn_like(mean)
    settings = {"lr": 0.2, "temperature": T, "prior_pull": 0.0}
    free = copy.deepcopy(precision).displacement(mean, gradient, **settings)
    assert_same_tensors(copy.deepcopy(precision).displacement(mean, gradient, trust_region=1.0, **settings), free)
    assert not precision.displacement(mean, torch.zeros_like(mean), trust_region=1.0, **settings).any()


# ------------------------------------------------------------------------------ observations and refreshments
def test_relaxing_averages_each_factor() -> None:
    _, precision = learned()
    outputs, inputs = precision.outputs.clone(), precision.inputs.clone()
    seen = observation(7)
    precision.observe(seen)
    precision.relax(2 * T, 0.2)
    close(precision.outputs, 0.8 * outputs + 0.2 * seen.outputs)
    close(precision.inputs, 0.8 * inputs + 0.2 * seen.inputs)
    assert (precision.temperature == 2 * T).all()


@every_form
@pytest.mark.parametrize("fraction", [0.2, 1.0])
def test_rows_are_observed_as_their_factors(leading: tuple[int, ...], form: dict, fraction: float) -> None:
    by_factors, by_rows = (learned(leading=leading, **form)[1] for _ in range(2))
    by_factors.observe(observation(7, leading, **form))
    by_rows.observe(rows_of(7, leading))
    for precision in (by_factors, by_rows):
        precision.relax(T, fraction)
    close(dense(by_rows), dense(by_factors))


def test_full_relaxation_is_the_equilibrium() -> None:
    _, precision = learned()
    seen = observation(7)
    precision.observe(seen)
    precision.relax(0.01, 1.0)
    expected = (torch.kron(seen.outputs, seen.inputs) + 0.01 / PRIOR_VARIANCE * identity()) / 0.01
    close(dense(precision, 0.01)[0] / expected, torch.ones_like(expected), 1e-9)


def test_an_observation_now_and_then_stands_for_all_steps_since() -> None:
    seldom, always = learned(observe_every=3)[1], learned()[1]
    seldom._since_observation = [0]
    asked = []
    for step in range(7):
        asked.append(seldom.observes)
        seen = observation(10 + step // 3)
        for precision in (seldom, always):
            precision.observe(seen if precision.observes else None)
            precision.relax(T, 0.1)
        if step % 3 == 2:
            close(dense(seldom), dense(always))
    assert asked == [False, False, True] * 2 + [False]


def test_only_replicas_that_are_changed_are_inverted_anew() -> None:
    mean = torch.zeros(2, 3, 4, dtype=torch.float64)
    precision = KroneckerPrecision(mean, stacked=True, refresh_every=100)
    first_unit = torch.zeros(2, 3, 4, dtype=torch.bool)
    first_unit[1, 0] = True
    for change, expected in (
        (lambda: None, [False, False]),
        (lambda: precision.reset(first_unit), [False, True]),
        (lambda: precision.reset(first_unit & False), [False, False]),
        (lambda: precision.widen(torch.tensor([0.5, 0.0])), [True, False]),
        (lambda: precision.widen(0.5), [True, True]),
    ):
        precision.displacement(mean, torch.ones_like(mean), lr=0.1, temperature=T)
        change()
        assert precision._refreshes() == expected


def inverses(precision: KroneckerPrecision) -> tuple[Tensor, Tensor]:
    return precision.output_solver.clone(), precision.input_solver.clone()


@pytest.mark.parametrize("damping", ["factored", "exact"])
def test_solvers_are_made_now_and_then(damping: str) -> None:
    """Between, they follow neither factors of fewer rows than they have, nor in eigenvectors anything."""
    mean, precision = learned(refresh_every=3, damping=damping)
    made = []
    for step in range(7):
        before = inverses(precision)
        precision.observe(observation(7 + step)._replace(rows=2))
        precision.relax(T, 0.1)
        precision.displacement(mean, torch.randn_like(mean), lr=0.1, temperature=T)
        made.append([not torch.equal(*pair) for pair in zip(before, inverses(precision), strict=True)])
    assert made == [[True, True] if step % 3 == 0 else [False, False] for step in range(7)]


@every_form
def test_between_the_inverses_follow_cheap_observations(leading: tuple[int, ...], form: dict) -> None:
    """Where a factor is diagonal or has seen as many rows as it has itself; the damping stays as it was."""
    mean, precision = learned(leading=leading, **form)
    precision.displacement(mean, mean, lr=0.1, temperature=T)
    dampings = precision.output_damping, precision.input_damping
    precision.observe(observation(7, leading, **form))
    precision.relax(T, 0.1)
    for inverse, blocks, damping in zip(
        inverses(precision), zip(*factors(precision), strict=True), dampings, strict=True
    ):
        damped = torch.stack(blocks) + damping.reshape(-1, 1, 1) * identity(blocks[0].shape[-1])
        full = inverse if inverse.dim() == mean.dim() else torch.diag_embed(inverse)
        close(full.reshape(damped.shape) @ damped, torch.eye(damped.shape[-1]).double().expand_as(damped))


@pytest.mark.parametrize("leading", [(), (2,)])
def test_between_the_inverses_follow_a_few_rows(leading: tuple[int, ...]) -> None:
    """By Woodbury's identity, with the damping fading like what was seen before."""
    mean, precision = learned(leading=leading)
    precision.displacement(mean, mean, lr=0.1, temperature=T)
    x, d, *_ = rows_of(7, leading, examples=2)
    expected = [
        torch.linalg.inv(0.9 * torch.linalg.inv(inverse) + 0.1 * rows.mT @ rows)
        for inverse, rows in zip(inverses(precision), (d, x), strict=True)
    ]
    precision.observe(LowRank(x, d, 2))
    precision.relax(T, 0.1)
    for inverse, followed in zip(inverses(precision), expected, strict=True):
        close(inverse, followed)


@pytest.mark.parametrize("fraction", [0.0, tensor(0.0, 0.1)], ids=["of all", "of a replica"])
def test_a_rate_of_zero_leaves_factors_and_inverses(fraction: float | Tensor) -> None:
    """As at the start of a warm-up or the end of a schedule."""
    stacked = isinstance(fraction, Tensor)
    shape = (2, ROWS, COLUMNS) if stacked else (ROWS, COLUMNS)
    precision = KroneckerPrecision(torch.zeros(*shape, dtype=torch.float64), stacked=stacked)
    rows, mean = rows_of(7, shape[:-2], 2)._replace(share=1.0), torch.zeros(*shape, dtype=torch.float64)
    gradient, settings = rows.d.mT @ rows.x, {"lr": 0.1, "temperature": T, "trust_region": 0.5}
    precision.observe(rows)
    precision.relax(T, 0.1)
    first = precision.displacement(mean, gradient, **settings)
    before = copy.deepcopy(precision)
    precision.observe(rows)
    precision.relax(T, fraction)
    step = precision.displacement(mean, gradient, **settings)
    assert step.isfinite().all()
    still = (slice(1),) if stacked else ()
    close(step[still], first[still])
    for name in ("inputs", "outputs", "input_solver", "output_solver"):
        close(getattr(precision, name)[still], getattr(before, name)[still])


def test_between_inversions_the_factored_step_knows_the_gradient_only() -> None:
    mean, precision = learned(refresh_every=3)
    gradient = torch.randn_like(mean)
    first, *between, again = (
        precision.displacement(mean, gradient, lr=1e-6, temperature=T, prior_pull=0.5) for _ in range(4)
    )
    alone, pull = (times(factored_covariance(precision), vec(x)) for x in (gradient, mean - precision.prior_mean))
    for step in between:
        close(vec(step) * 1e6, -alone, 1e-5)
    for step, steps in ((first, 1), (again, 3)):
        close(vec(step) * 1e6, -alone - steps * 0.5 * DELTA * pull, 1e-5)


@pytest.mark.parametrize(
    ("settings", "rows", "steps"),
    [
        ({}, 4, 20),
        ({"observe_every": 3}, 4, 60),
        ({"observe_every": 3}, 400, 20),  # more rows than inverses follow
        ({"observe_every": 3, "refresh_every": 7}, 4, 7),
        ({"observe_every": 3, "damping": "exact"}, 4, 10),
    ],
)
def test_inverses_are_made_anew_after_20_observations_that_they_followed_else_20_steps(
    settings: dict, rows: int, steps: int
) -> None:
    mean = torch.zeros(300, 300)
    precision = KroneckerPrecision(mean, prior_variance=0.5, **settings)
    seen = []
    for step in range(2 * steps + 1):
        x, d = torch.randn(2, rows, 300)
        precision.observe(LowRank(x, d) if precision.keeps(rows) else Factors(d.mT @ d, x.mT @ x, rows))
        precision.relax(T, 0.01)
        precision.displacement(mean, d.mT @ x, lr=0.1, temperature=T, trust_region=0.1)
        if precision.get_extra_state()["age"] == [0]:
            seen.append(step)
    assert seen == [0, steps, 2 * steps]


def test_inverses_are_made_anew_when_half_of_their_damping_has_faded() -> None:
    precision = KroneckerPrecision(torch.zeros(2, 9, 9, dtype=torch.float64), stacked=True, observe_every=2)
    ages = []
    for _ in range(24):
        x, d = torch.randn(2, 2, 4, 9, dtype=torch.float64)
        precision.observe(LowRank(x, d))
        precision.relax(T, tensor(0.01, 0.1))
        before = precision.input_solver.clone()
        precision.displacement(torch.zeros(2, 9, 9), d.mT @ x, lr=0.1, temperature=T, trust_region=0.1)
        ages.append(precision.get_extra_state()["age"])
        for replica, age in enumerate(ages[-1]):
            solver = precision.input_solver[replica]
            if age == 0:
                close(solver, damped_inverse(precision.inputs, precision.input_damping, diagonal=False)[replica])
            else:
                assert torch.equal(solver, before[replica])
    anew = [[step for step, age in enumerate(ages) if age[replica] == 0] for replica in range(2)]
    assert anew[0] == [0]  # .99^23 > 1/2
    assert anew[1] == [0, 8, 16]  # .9^8 < 1/2 < .9^6


@pytest.mark.parametrize("damping", ["factored", "exact"])
@pytest.mark.parametrize("lr", [0.1, 0.5, 10.0])
def test_the_priors_pull_alone_brings_the_mean_to_the_prior_at_every_rate(damping: str, lr: float) -> None:
    mean = torch.ones(ROWS, COLUMNS, dtype=torch.float64)
    precision = KroneckerPrecision(torch.zeros_like(mean), prior_variance=0.5, damping=damping, refresh_every=10)
    for _ in range(400):
        mean += precision.displacement(mean, torch.zeros_like(mean), lr=lr, temperature=T)
        assert mean.abs().max() <= 1
    assert mean.abs().max() < 1e-10


@pytest.mark.parametrize("where", ["outputs", "inputs"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_observation_that_is_not_finite_is_skipped(where: str, value: float) -> None:
    _, precision = learned()
    before = dense(precision)
    for seen, side in ((observation(7), where), (rows_of(7), {"outputs": "d", "inputs": "x"}[where])):
        getattr(seen, side)[1, 1] = value
        precision.observe(seen)
        precision.relax(T, 0.3)
        assert torch.equal(dense(precision), before)
    precision.observe(observation(8))
    precision.relax(T, 0.3)
    assert not torch.equal(dense(precision), before)


# ------------------------------------------------------------------------------------------------- replicas
VARIANCES = (0.5, 1.0, 2.0)
NUMBERS = {
    "temperature": (0.3, 0.01, 2.0),
    "fraction": (0.1, 1.0, 0.5),
    "lr": (0.1, 1.0, 0.5),
    "discount": (math.inf, 0.1, 5.0),
    "trust_region": (math.inf, 0.01, 0.3),
    "prior_pull": (0.0, 1.0, 0.2),
    "strength": (0.0, 0.5, 1.0),
    "widen": (0.0, 0.2, 1.0),
}


def life(
    precision: KroneckerPrecision, mean: Tensor, seen: list[Factors | LowRank], stream, **number
) -> list[Tensor]:
    """Every number that a precision gives along a short life."""
    numbers = []
    for index, observed in enumerate(seen):
        precision.observe(observed)
        precision.relax(number["temperature"], number["fraction"])
        mean = mean + precision.displacement(
            mean,
            mean.roll(1, -1) * (index + 1),
            **{name: number[name] for name in ("lr", "temperature", "discount", "trust_region", "prior_pull")},
        )
        numbers.append(mean)
    numbers += [precision.sample(mean, stream), precision.solve(mean), precision.variance(), precision.entropy()]
    numbers += [precision.kl(mean), precision.retained_information()]
    mean = precision.injected(mean, number["strength"], number["widen"], stream)
    numbers += [mean, precision.inputs.clone(), precision.outputs.clone()]
    precision.widen(number["widen"], columns=torch.arange(COLUMNS) == 2)
    numbers += [precision.variance(), precision.inputs.clone()]
    precision.reset(torch.tensor([[False], [True], [False]]))
    return [*numbers, precision.variance(), precision.outputs]


@pytest.mark.parametrize("damping", ["factored", "exact"])
@every_form
def test_stacked_equals_separate(leading: tuple[int, ...], form: dict, damping: str) -> None:
    settings = {"damping": damping, "refresh_every": 3, "prior_mean": "initial", **form}
    means = [learned(seed, leading)[0] for seed in range(R)]
    seen = [
        [
            observation(10 * seed, leading, **form),
            *(rows_of(10 * seed + step, leading, 2) for step in (1, 2, 3, 4)),
        ]
        for seed in range(R)
    ]
    together = [
        type(parts[0])(*(torch.stack(x) if isinstance(x[0], Tensor) else x[0] for x in zip(*parts, strict=True)))
        for parts in zip(*seen, strict=True)
    ]
    streams = [torch.Generator().manual_seed(seed) for seed in range(R)]
    stacked = KroneckerPrecision(torch.stack(means), prior_variance=tensor(*VARIANCES), stacked=True, **settings)
    numbers = {name: tensor(*values) for name, values in NUMBERS.items()}
    result = life(stacked, torch.stack(means), together, streams, **numbers)
    for r in range(R):
        single = KroneckerPrecision(means[r], prior_variance=VARIANCES[r], **settings)
        assert (stacked.stacked, single.stacked) == (True, False)
        numbers = {name: values[r] for name, values in NUMBERS.items()}
        alone = life(single, means[r], seen[r], torch.Generator().manual_seed(r), **numbers)
        for ours, theirs in zip(result, alone, strict=True):
            close(ours[r], theirs, 1e-12)


def test_an_observation_that_is_not_finite_is_skipped_in_its_replica_only() -> None:
    precision = KroneckerPrecision(torch.zeros(R, ROWS, COLUMNS, dtype=torch.float64), stacked=True)
    seen = observation(0, (R,))
    seen.inputs[1, 0, 0] = math.nan
    precision.observe(seen)
    precision.relax(tensor(0.1, 0.2, 0.3), tensor(0.5, 0.5, 1.0))
    close(precision.outputs, seen.outputs * tensor(0.5, 0.0, 1.0)[:, None, None])
    assert precision.inputs.isfinite().all()
    assert not precision.inputs[1].any()


def test_a_replica_with_observations_that_are_not_finite_leaves_the_others_to_learn_as_alone() -> None:
    def learn(precision: KroneckerPrecision, rows: list[LowRank]) -> list[Tensor]:
        steps = []
        for seen in rows:
            gradient = seen.d.mT @ seen.x
            precision.observe(seen)
            precision.relax(T, 0.05)
            steps.append(precision.displacement(torch.zeros_like(gradient), gradient, lr=0.1, temperature=T))
        return steps

    wide = [LowRank(*torch.randn(2, 2, 4, 9, dtype=torch.float64), share=1.0) for _ in range(30)]
    alone = [LowRank(seen.x[0].clone(), seen.d[0].clone(), share=1.0) for seen in wide]
    for seen in wide[3::5]:
        seen.d[1, 2, 0] = math.nan
    both = learn(KroneckerPrecision(torch.zeros(2, 9, 9, dtype=torch.float64), stacked=True), wide)
    for step, (ours, theirs) in enumerate(
        zip(both, learn(KroneckerPrecision(torch.zeros(9, 9, dtype=torch.float64)), alone), strict=True)
    ):
        close(ours[0], theirs, 1e-10)
        assert bool(ours[1].isfinite().all()) == (step % 5 != 3)


def in_step(nets: list[nn.Module], stacked: nn.Module, steps: int, data, **numbers: tuple[float, ...]) -> None:
    """Train R networks, alone and stacked, each on its own batches and with its own numbers."""
    optimizers = [
        EulerLagrange(net, **{name: values[r] for name, values in numbers.items()}) for r, net in enumerate(nets)
    ]
    together = EulerLagrange(stacked, **{name: tensor(*values) for name, values in numbers.items()})
    for step in range(steps):
        batches = [data(step + 1000 * r) for r in range(R)]
        for net, optimizer, (inputs, targets) in zip(nets, optimizers, batches, strict=True):
            backward(net, optimizer, inputs, targets)
            optimizer.step()
        backward(stacked, together, *(torch.stack(part) for part in zip(*batches, strict=True)))
        together.step()


LEARNING = {
    "factored": {},
    "exact": {"damping": "exact"},
    "now and then": {"observe_every": 3, "refresh_every": 7},
    "exact, now and then": {"damping": "exact", "observe_every": 3, "refresh_every": 7},
}


@pytest.mark.parametrize("settings", LEARNING.values(), ids=LEARNING)
@pytest.mark.parametrize(
    ("make", "data", "steps"),
    [(mlp, batch, 20), (convnet, images, 10), pytest.param(mlp, batch, 200, marks=pytest.mark.slow)],
)
def test_replicas_learn_as_single_networks(make, data, steps: int, settings: dict) -> None:
    nets = [gaussianize(make(seed), precision=Kronecker(**settings)) for seed in range(R)]
    stacked = replicas.stack(nets)
    before = copy.deepcopy(nets)
    numbers = {"lr": (0.02, 0.005, 0.01), "temperature": (1e-3, 1e-2, 3e-3), "trust_region": (0.3, 0.1, math.inf)}
    numbers |= {"discount": (0.3, math.inf, 20.0), "prior_pull": (1.0, 0.0, 0.1)}
    in_step(nets, stacked, steps, data, **numbers)
    for net, single, start in zip(nets, replicas.unstack(stacked), before, strict=True):
        assert_same_tensors(dict(single.named_parameters()), dict(net.named_parameters()), rtol=1e-8, atol=1e-8)
        assert (net[0].weight - start[0].weight).norm() > 0.02 * start[0].weight.norm()
    streams = [torch.Generator().manual_seed(r) for r in range(R)]
    inject_variance(stacked, tensor(0.3, 1.0, 0.5), tensor(0.0, 0.5, 1.0), streams)
    for r, (net, single) in enumerate(zip(nets, replicas.unstack(stacked), strict=True)):
        inject_variance(net, (0.3, 1.0, 0.5)[r], (0.0, 0.5, 1.0)[r], torch.Generator().manual_seed(r))
        assert_same_tensors(dict(single.named_parameters()), dict(net.named_parameters()), rtol=1e-6, atol=1e-6)


def test_replicas_draw_as_single_networks_where_little_was_seen() -> None:
    """In float32, with factors of two examples, whose many directions without curvature rounding decides."""
    nets = [gaussianize(mlp(seed, torch.float32), precision="kronecker") for seed in range(R)]
    stacked = replicas.stack(nets)
    in_step(nets, stacked, 1, lambda step: batch(step, 2, torch.float32), lr=(0.02, 0.02, 0.02))
    inject_variance(stacked, 0.5, generator=[torch.Generator().manual_seed(r) for r in range(R)])
    for r, (net, single) in enumerate(zip(nets, replicas.unstack(stacked), strict=True)):
        inject_variance(net, 0.5, generator=torch.Generator().manual_seed(r))
        assert_same_tensors(dict(single.named_parameters()), dict(net.named_parameters()), rtol=1e-4, atol=1e-4)


# ----------------------------------------------------------------------------------------------------- state
STRUCTURES = {
    "factored": Kronecker(observe_every=3, refresh_every=4),
    "exact": Kronecker(damping="exact", observe_every=2, refresh_every=5),
}
every_structure = pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES)


def trained(structure: Kronecker, seed: int = 0) -> nn.Sequential:
    """A network in the middle of both intervals."""
    net = gaussianize(mlp(seed), precision=structure, prior_mean="initial")
    train(net, EULER_LAGRANGE.make(net), range(7))
    return net


def everything(net: nn.Module) -> dict:
    """The state, and what follows from it."""
    layers = [layer for _, layer in gaussian_layers(net)]
    given = {str(i): layer.weight_precision.variance() for i, layer in enumerate(layers)}
    return {**net.state_dict(), **given}


@every_structure
def test_an_interrupted_run_goes_on_with_the_same_steps(structure: Kronecker) -> None:
    net = trained(structure)
    optimizer = EULER_LAGRANGE.make(net)
    file = io.BytesIO()
    torch.save((net.state_dict(), optimizer.state_dict()), file)
    train(net, optimizer, range(7, 15))
    resumed = gaussianize(mlp(7), precision=structure, prior_mean="initial")
    other = EULER_LAGRANGE.make(resumed, lr=0.5)
    file.seek(0)
    state, optimizer_state = torch.load(file, weights_only=True)
    resumed.load_state_dict(state)
    other.load_state_dict(optimizer_state)
    train(resumed, other, range(7, 15))
    assert_same_tensors(everything(resumed), everything(net))


@every_structure
@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["deepcopy", "pickle"]
)
def test_copies_are_whole_and_independent(structure: Kronecker, clone) -> None:
    net = trained(structure)
    net[0].weight_precision.variance()  # eigenvectors are there
    copied = clone(net)
    before = copy.deepcopy(everything(net))
    assert_same_tensors(everything(copied), before)
    train(copied, EULER_LAGRANGE.make(copied), range(7, 12))
    assert_same_tensors(everything(net), before)
    train(net, EULER_LAGRANGE.make(net), range(7, 12))
    assert_same_tensors(everything(copied), everything(net))


def test_eigenvectors_are_not_pickled() -> None:
    _, precision = learned()
    size = len(pickle.dumps(precision))
    precision.variance()
    assert len(pickle.dumps(precision)) == size


def test_eigenvectors_are_made_anew_wherever_factors_change() -> None:
    _, precision = learned()
    seen = []

    def check() -> None:
        close(vec(precision.variance()), torch.linalg.inv(dense(precision)).diagonal(dim1=-2, dim2=-1))
        assert not any(torch.equal(precision.variance(), other) for other in seen)
        seen.append(precision.variance())

    check()
    precision.observe(observation(7))
    precision.relax(T, 0.5)
    check()
    precision.widen(0.5)
    check()
    precision.load_state_dict(learned(3)[1].state_dict())
    check()
    precision.outputs.data = 3 * precision.outputs
    check()
    with torch.inference_mode():
        precision.widen(0.5)
        check()
    precision.reset()
    check()


@every_structure
def test_stacks_and_unstacks(structure: Kronecker) -> None:
    nets = [trained(structure, seed) for seed in range(R)]
    for net, single in zip(nets, replicas.unstack(replicas.stack(nets)), strict=True):
        assert_same_tensors(everything(single), everything(net))
        train(single, EULER_LAGRANGE.make(single), range(7, 10))
        train(net, EULER_LAGRANGE.make(net), range(7, 10))
        assert_same_tensors(everything(single), everything(net))


def test_networks_of_different_settings_are_not_stacked() -> None:
    nets = [gaussianize(mlp(), precision=Kronecker(refresh_every=every)) for every in (1, 2)]
    with pytest.raises(ValueError, match="network 1 differs from network 0"):
        replicas.stack(nets)


@every_structure
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_leaves_the_precision_its_digits(structure: Kronecker, dtype: torch.dtype) -> None:
    net = trained(structure).float()
    before = copy.deepcopy({name: value for name, value in net.state_dict().items() if "_precision" in name})
    net.to(dtype)
    assert net[0].weight.dtype == dtype
    assert_same_tensors({name: net.state_dict()[name] for name in before}, before)
    train(net, EULER_LAGRANGE.make(net), range(7, 12))
    assert net[0].weight.dtype == dtype
    assert all(value.isfinite().all() for value in net.parameters())
    assert {value.dtype for value in net[0].weight_precision.buffers()} == {torch.float32}
    inject_variance(net, 0.5, 0.5)
    assert net[0].weight.dtype == dtype


def test_double_and_device_take_the_state_along() -> None:
    net = gaussianize(mlp(dtype=torch.float32), precision="kronecker").double()
    assert {value.dtype for value in net[0].weight_precision.buffers()} == {torch.float64}
    assert {value.device.type for value in net.to("meta")[0].weight_precision.buffers()} == {"meta"}


def test_a_deterministic_checkpoint_returns_to_the_prior() -> None:
    net = trained(STRUCTURES["factored"])
    net.load_state_dict(mlp(7).state_dict())
    variance = net[0].weight_precision.variance()
    close(variance, torch.full_like(variance, 2 / 5))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"damping": "half"}, ValueError, r"damping: expected one of factored, exact; got 'half'"),
        ({"observe_every": 0}, ValueError, r"observe_every: expected a whole number of at least 1, got 0"),
        ({"refresh_every": 1.5}, TypeError, r"refresh_every: expected a whole number of at least 1, got 1\.5"),
        ({"prior_mean": "mean"}, ValueError, r"prior_mean: expected one of zero, initial; got 'mean'"),
        ({"prior_variance": 0.0}, ValueError, r"prior_variance: expected a number in \(0, inf\), got 0"),
    ],
)
def test_bad_arguments(settings: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        KroneckerPrecision(torch.zeros(2, 4), **settings)


def test_a_fraction_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"fraction: expected a number in \[0, 1\], got 1\.5"):
        learned()[1].widen(1.5)
