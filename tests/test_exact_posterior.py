"""Bayesian linear regression: what the flow and the optimizer end at, and predict, against the exact law."""

import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from clagrange import gaussianize, predict
from clagrange.gaussian import Diagonal, Kronecker, KroneckerPrecision
from clagrange.gaussian.kronecker import Factors

PATH = Path(__file__).parents[1] / "benchmarks" / "exact_posterior.py"
spec = importlib.util.spec_from_file_location("exact_posterior", PATH)
assert spec is not None
assert spec.loader is not None
benchmark = importlib.util.module_from_spec(spec)
sys.modules["exact_posterior"] = benchmark  # dataclasses look their module up
spec.loader.exec_module(benchmark)

PROBLEM = benchmark.regression()
UNITS = pytest.mark.parametrize("unit", [1.0, PROBLEM.noise], ids=["squared error", "nats"])
DISCOUNTS = pytest.mark.parametrize("discount", [math.inf, 1.0])


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_the_exact_posterior_by_adding_one_example_after_the_other() -> None:
    """The oracle itself, against Kalman's recursion."""
    mean = torch.zeros_like(PROBLEM.mean)
    covariance = PROBLEM.prior_variance * torch.eye(mean.shape[1], dtype=torch.float64)
    for x, y in zip(PROBLEM.inputs, PROBLEM.targets, strict=True):
        gain = covariance @ x / (x @ covariance @ x + PROBLEM.noise)
        mean = mean + torch.outer(y - mean @ x, gain)
        covariance = covariance - torch.outer(gain, x @ covariance)
    close(PROBLEM.mean, mean, 1e-10)
    close(torch.linalg.inv(PROBLEM.precision), covariance, 1e-10)


@UNITS
@DISCOUNTS
def test_diagonal_flow_ends_at_the_mean_field_optimum(unit: float, discount: float) -> None:
    precision = benchmark.fresh(PROBLEM, "diagonal")
    mean = benchmark.flow(PROBLEM, precision, unit=unit, discount=discount)
    close(mean, PROBLEM.mean, 1e-6)
    close(precision.precision, PROBLEM.precision.diagonal().expand_as(mean), 1e-9)
    least, _ = benchmark.divergence(PROBLEM, mean, precision)
    for factor in (0.95, 1.05):
        for index in range(mean.shape[1]):
            other = benchmark.fresh(PROBLEM, "diagonal")
            other.precision.copy_(precision.precision)
            other.precision[:, index] *= factor
            assert benchmark.divergence(PROBLEM, mean, other)[0] > least


@UNITS
@DISCOUNTS
@pytest.mark.parametrize("settings", [{"damping": "exact"}, {"damping": "factored", "refresh_every": 1}])
def test_kronecker_flow_ends_at_the_exact_posterior(unit: float, discount: float, settings: dict) -> None:
    precision = benchmark.fresh(PROBLEM, "kronecker", **settings)
    mean = benchmark.flow(PROBLEM, precision, unit=unit, discount=discount, steps=400)
    close(mean, PROBLEM.mean, 1e-8)
    exact = torch.kron(
        torch.eye(mean.shape[0], dtype=torch.float64), torch.linalg.inv(PROBLEM.precision).contiguous()
    )
    close(benchmark.covariance(precision), exact, 1e-10)
    assert sum(map(abs, benchmark.divergence(PROBLEM, mean, precision))) < 1e-10


def test_one_output_is_enough() -> None:
    problem = benchmark.regression(seed=3, outputs=1, noise=0.04)
    precision = benchmark.fresh(problem, "kronecker", damping="exact")
    mean = benchmark.flow(problem, precision, steps=400)
    assert sum(map(abs, benchmark.divergence(problem, mean, precision))) < 1e-10


def exact_network(structure: str) -> nn.Linear:
    """A Gaussian layer that holds the stationary posterior."""
    outputs, columns = PROBLEM.mean.shape
    net = gaussianize(nn.Linear(columns - 1, outputs).double(), structure)
    precision = benchmark.fresh(PROBLEM, structure, **({"refresh_every": 1} if structure == "kronecker" else {}))
    mean = benchmark.flow(PROBLEM, precision, steps=1000)
    with torch.no_grad():
        net.weight.copy_(mean[:, :-1])
        net.bias.copy_(mean[:, -1])
    if structure == "kronecker":
        net.weight_precision.load_state_dict(precision.state_dict())
    else:
        net.weight_precision.precision.copy_(precision.precision[:, :-1])
        net.bias_precision.precision.copy_(precision.precision[:, -1])
    return net


@pytest.mark.parametrize("structure", ["diagonal", "kronecker"])
def test_sampled_predictions_have_the_law_of_the_posterior(structure: str) -> None:
    net = exact_network(structure)
    inputs = PROBLEM.inputs[:5]
    full = torch.linalg.inv(PROBLEM.precision)
    covariance = full if structure == "kronecker" else torch.diag(PROBLEM.precision.diagonal().reciprocal())
    expected = (inputs @ covariance * inputs).sum(1, keepdim=True).expand(-1, 2)
    samples = 800
    mean, variance = predict(net, inputs[:, :-1], samples=samples, generator=torch.Generator().manual_seed(0))
    assert ((mean - inputs @ PROBLEM.mean.mT).abs() < 4.5 * (expected / samples).sqrt() + 1e-2).all()
    assert ((variance / expected - 1).abs() < 4.5 * math.sqrt(2 / samples)).all()


def test_sampled_predictions_of_several_inputs_are_correlated_as_in_the_posterior() -> None:
    precision = benchmark.fresh(PROBLEM, "kronecker")
    mean = benchmark.flow(PROBLEM, precision, steps=400)
    inputs = PROBLEM.inputs[:3]
    stream = torch.Generator().manual_seed(1)
    draws = torch.stack([(precision.sample(mean, stream) - mean) @ inputs.mT for _ in range(2000)])
    root = torch.linalg.cholesky(inputs @ torch.linalg.inv(PROBLEM.precision) @ inputs.mT)
    white = torch.linalg.solve_triangular(root, draws.flatten(0, 1).mT, upper=False)
    assert stats.kstest(white.flatten().numpy(), stats.norm.cdf).pvalue > 0.01
    assert stats.kstest(white.square().sum(0).numpy(), stats.chi2(3).cdf).pvalue > 0.01


# ---------------------------------------------------------------------------- the optimizer and its estimators
@pytest.mark.parametrize("damping", ["exact", "factored"])
def test_kronecker_optimizer_on_the_full_batch(damping: str) -> None:
    """The mean exactly; the variances up to what the residuals say of the noise."""
    row = benchmark.trained(
        PROBLEM, Kronecker(damping=damping, refresh_every=1), batch=200, steps=600, lr=0.1, variance_rate=0.03
    )
    residuals = PROBLEM.targets - PROBLEM.inputs @ PROBLEM.mean.mT
    outputs = residuals.mT @ residuals / len(residuals) / PROBLEM.noise**2
    precision = benchmark.fresh(PROBLEM, "kronecker")
    precision.observe(Factors(outputs, PROBLEM.moment, len(residuals)))
    precision.relax(PROBLEM.temperature(PROBLEM.noise), 1.0)
    expected, _ = benchmark.divergence(PROBLEM, PROBLEM.mean, precision)
    assert row["mean"] < 1e-8
    assert row["variances"] == pytest.approx(expected, rel=1e-2)
    assert row["variance_error"] < 0.15


def test_per_example_optimizer_on_the_full_batch() -> None:
    row = benchmark.trained(PROBLEM, Diagonal("per_example"), batch=200, steps=400, lr=0.1)
    best = benchmark.fresh(PROBLEM, "diagonal")
    best.precision.copy_(PROBLEM.precision.diagonal().expand_as(PROBLEM.mean))
    least, _ = benchmark.divergence(PROBLEM, PROBLEM.mean, best)
    assert row["mean"] < 0.02
    assert least < row["variances"] < least + 0.02


def test_squared_gradient_sees_nothing_in_the_full_batch() -> None:
    """At the optimum the gradient of the whole is the prior's, so that the variances return to the prior's."""
    few, whole = (
        benchmark.trained(PROBLEM, "diagonal", batch=batch, steps=400, lr=0.1, curvature_decay=0.9)
        for batch in (20, 200)
    )
    assert few["variance_error"] < 1
    assert whole["variance_error"] > 1.5


def test_divergence_of_known_gaussians() -> None:
    """Against torch.distributions, at a mean and a precision that are not the exact ones."""
    precision = benchmark.fresh(PROBLEM, "diagonal")
    mean = PROBLEM.mean + 0.1
    exact = torch.kron(torch.eye(2, dtype=torch.float64), PROBLEM.precision)
    expected = torch.distributions.kl_divergence(
        torch.distributions.MultivariateNormal(mean.flatten(), benchmark.covariance(precision)),
        torch.distributions.MultivariateNormal(PROBLEM.mean.flatten(), precision_matrix=exact),
    )
    close(torch.tensor(sum(benchmark.divergence(PROBLEM, mean, precision))).double(), expected / len(exact), 1e-6)
    assert isinstance(benchmark.fresh(PROBLEM, "kronecker"), KroneckerPrecision)
