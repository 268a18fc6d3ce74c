"""DiagonalPrecision against torch.distributions, the pure rules, and R separate copies of itself."""

import math

import pytest
import torch
from cases import R, tensor
from scipy import stats
from torch import Tensor
from torch.distributions import Independent, Normal, kl_divergence

from clagrange import DiagonalPrecision
from clagrange.dynamics import mean_displacement


def random_precision(
    shape: tuple[int, ...], seed: int = 0, **settings: object
) -> tuple[Tensor, DiagonalPrecision]:
    """A mean and a precision with arbitrary state."""
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    mean = draw() - 0.5
    precision = DiagonalPrecision(draw(), prior_mean="initial", **settings)
    precision.precision.mul_(0.5 + 3 * draw())
    precision.curvature.add_(draw())
    return mean, precision


def distributions(mean: Tensor, precision: DiagonalPrecision) -> tuple[Independent, Independent]:
    """Posterior and prior."""
    prior_deviation = precision.prior_precision.rsqrt().expand_as(mean)
    return (
        Independent(Normal(mean, precision.variance().sqrt()), mean.dim()),
        Independent(Normal(precision.prior_mean, prior_deviation), mean.dim()),
    )


def test_entropy_and_kl() -> None:
    mean, precision = random_precision((4, 3), prior_variance=0.7)
    posterior, prior = distributions(mean, precision)
    torch.testing.assert_close(precision.entropy(), posterior.entropy())
    torch.testing.assert_close(precision.kl(mean), kl_divergence(posterior, prior))


def test_kl_of_the_prior_is_zero() -> None:
    mean = torch.randn(5, dtype=torch.float64)
    assert abs(float(DiagonalPrecision(mean, prior_mean="initial", prior_variance=0.3).kl(mean))) < 1e-14


def test_observe_averages() -> None:
    _, precision = random_precision((4, 3))
    before, seen = precision.curvature.clone(), torch.rand(4, 3, dtype=torch.float64)
    precision.observe(seen, 0.8)
    torch.testing.assert_close(precision.curvature, 0.8 * before + 0.2 * seen)


def test_relax_reaches_its_equilibrium() -> None:
    _, precision = random_precision((4, 3), prior_variance=0.7)
    precision.relax(0.01, 1.0)
    torch.testing.assert_close(precision.precision, (precision.curvature + 0.01 / 0.7) / 0.01)


def test_displacement_is_the_rule() -> None:
    mean, precision = random_precision((4, 3), prior_variance=0.7)
    gradient = torch.randn(4, 3, dtype=torch.float64)
    settings = {"lr": 0.1, "temperature": 0.01, "discount": 0.5, "trust_region": 0.2}
    expected = mean_displacement(
        gradient,
        mean - precision.prior_mean,
        precision.precision,
        precision.curvature,
        0.01 / 0.7,
        **settings,
    )
    torch.testing.assert_close(precision.displacement(mean, gradient, **settings), expected)


def test_solve_applies_the_covariance() -> None:
    mean, precision = random_precision((4, 3))
    torch.testing.assert_close(precision.solve(mean), precision.variance() * mean)


def test_retained_information_is_clamped() -> None:
    precision = DiagonalPrecision(torch.zeros(3), prior_variance=0.5)
    precision.precision.copy_(torch.tensor([1.0, 2.0, 8.0]))
    torch.testing.assert_close(precision.retained_information(), torch.tensor([0.0, 0.0, 0.75]))


def test_samples_have_the_law_of_the_posterior() -> None:
    mean, precision = random_precision((2,), prior_variance=0.7)
    generator = torch.Generator().manual_seed(1)
    draws = torch.stack([precision.sample(mean, generator) for _ in range(4000)])
    for index in range(2):
        law = stats.norm(float(mean[index]), math.sqrt(float(precision.variance()[index])))
        assert stats.kstest(draws[:, index].numpy(), law.cdf).pvalue > 0.01
    assert abs(stats.pearsonr(draws[:, 0], draws[:, 1]).statistic) < 4 / math.sqrt(4000)


def test_samples_have_the_type_of_the_mean() -> None:
    mean = torch.zeros(3, dtype=torch.bfloat16)
    assert DiagonalPrecision(mean).sample(mean).dtype == torch.bfloat16


def test_reset_everywhere_or_where_asked() -> None:
    _, precision = random_precision((2, 3), prior_variance=0.7)
    before = precision.precision.clone(), precision.curvature.clone()
    mask = torch.tensor([[True, False, False], [False, False, True]])
    precision.reset(mask)
    torch.testing.assert_close(precision.precision, before[0].masked_fill(mask, 1 / 0.7))
    torch.testing.assert_close(precision.curvature, before[1].masked_fill(mask, 0.0))
    precision.reset()
    torch.testing.assert_close(precision.precision, torch.full((2, 3), 1 / 0.7, dtype=torch.float64))
    assert not precision.curvature.any()


def test_a_mask_of_rows_or_columns_broadcasts() -> None:
    _, precision = random_precision((2, 3), prior_variance=0.5)
    precision.reset(torch.tensor([[True], [False]]))
    assert (precision.precision[0] == 2).all()
    assert (precision.precision[1] != 2).all()
    precision.reset(torch.tensor([[False, True, False]]))
    assert (precision.precision == 2).sum() == 4


def test_stacked_equals_separate() -> None:
    variances, decay = tensor(0.5, 1.0, 2.0), tensor(0.0, 0.5, 0.99)
    temperature, fraction, lr = tensor(1e-3, 1e-2, 1.0), tensor(0.1, 1.0, 0.0), tensor(0.1, 1.0, 10.0)
    discount, trust = tensor(math.inf, 0.1, 5.0), tensor(math.inf, 0.01, 1.0)
    singles = [random_precision((4, 2), seed, prior_variance=float(variances[seed])) for seed in range(R)]
    stacked = DiagonalPrecision(
        torch.stack([p.prior_mean for _, p in singles]),
        prior_mean="initial",
        prior_variance=variances,
        stacked=True,
    )
    stacked.precision.copy_(torch.stack([p.precision for _, p in singles]))
    stacked.curvature.copy_(torch.stack([p.curvature for _, p in singles]))
    mean = torch.stack([m for m, _ in singles])
    gradient = torch.randn(R, 4, 2, dtype=torch.float64)
    assert stacked.stacked
    assert not singles[0][1].stacked

    stacked.observe(gradient**2, decay)
    stacked.relax(temperature, fraction)
    step = stacked.displacement(
        mean, gradient, lr=lr, temperature=temperature, discount=discount, trust_region=trust
    )
    streams = [torch.Generator().manual_seed(seed) for seed in range(R)]
    drawn = stacked.sample(mean, streams)
    injected = stacked.injected(mean, tensor(0.0, 0.5, 1.0), tensor(0.0, 0.2, 1.0), streams)
    for r, (_, single) in enumerate(singles):
        single.observe(gradient[r] ** 2, float(decay[r]))
        single.relax(float(temperature[r]), float(fraction[r]))
        alone = single.displacement(
            mean[r],
            gradient[r],
            lr=float(lr[r]),
            temperature=float(temperature[r]),
            discount=float(discount[r]),
            trust_region=float(trust[r]),
        )
        torch.testing.assert_close(step[r], alone)
        stream = torch.Generator().manual_seed(r)
        torch.testing.assert_close(drawn[r], single.sample(mean[r], stream))
        strength, widen = (0.0, 0.5, 1.0)[r], (0.0, 0.2, 1.0)[r]
        torch.testing.assert_close(injected[r], single.injected(mean[r], strength, widen, stream))
        torch.testing.assert_close(stacked.precision[r], single.precision)
        torch.testing.assert_close(stacked.entropy()[r], single.entropy())
        torch.testing.assert_close(stacked.kl(mean)[r], single.kl(mean[r]))
        torch.testing.assert_close(stacked.retained_information()[r], single.retained_information())


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"prior_mean": "mean"}, ValueError, r"prior_mean: expected one of zero, initial; got 'mean'"),
        ({"prior_variance": "wide"}, TypeError, r"prior_variance: expected a number"),
        ({"prior_variance": math.inf}, ValueError, r"prior_variance: .*got inf"),
        ({"prior_variance": torch.ones(3), "stacked": True}, ValueError, r"needs tensors with 3 replicas"),
    ],
)
def test_bad_arguments(settings: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DiagonalPrecision(torch.zeros(2, 4), **settings)
