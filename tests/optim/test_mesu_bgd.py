"""MESU and BGD: the published formulas, the Euler-Lagrange flow that they approximate, and what they refuse."""

import math

import pytest
import torch
from cases import BGD_CASE, DRAWS, MESU_CASE, OptimizerCase, assert_same_tensors, backward, batch, mlp
from torch import Tensor, nn

import clagrange
from clagrange.dynamics import gaussian_weights, mean_displacement, relaxed_precision
from clagrange.gaussian import Diagonal, DiagonalPrecision, set_sampling
from clagrange.optim import BGD, MESU
from clagrange.optim.bgd import bgd_step
from clagrange.optim.mesu import mesu_step

each = pytest.mark.parametrize("case", [MESU_CASE, BGD_CASE], ids=lambda case: case.name)

N = 50.0
PRIOR_MEAN, PRIOR_VARIANCE = 0.2, 0.7


def weights(count: int = 6) -> tuple[Tensor, DiagonalPrecision, Tensor, Tensor]:
    """Means, their precision away from the prior N(.2, .7), a gradient, and a curvature of both signs."""
    torch.manual_seed(4)
    mean = torch.full((count,), PRIOR_MEAN, dtype=torch.float64)
    precision = DiagonalPrecision(mean, prior_mean="initial", prior_variance=PRIOR_VARIANCE)
    precision.precision.copy_(torch.rand(count, dtype=torch.float64) * 3 + 0.5)
    return torch.randn_like(mean), precision, torch.randn_like(mean), torch.randn_like(mean)


def test_mesu_is_the_published_rule() -> None:
    """Eqs. of Bonnet et al. in σ, with ∂C/∂μ = g and ∂C/∂σ = σĤ, for one example and lr = 1."""
    mean, precision, gradient, curvature = weights()
    expected = []
    for mu, s, g, h in zip(mean, precision.precision, gradient, curvature, strict=True):
        sigma = s**-0.5
        new_mu = mu - sigma**2 * g + sigma**2 * (PRIOR_MEAN - mu) / (N * PRIOR_VARIANCE)
        new_sigma = (
            sigma - 0.5 * sigma**2 * (sigma * h) + sigma * (PRIOR_VARIANCE - sigma**2) / (2 * N * PRIOR_VARIANCE)
        )
        expected.append((new_mu, new_sigma))
    mesu_step(mean, precision, gradient, curvature, rate=1.0, memory=N, trust_region=1e9)
    for mu, variance, (new_mu, new_sigma) in zip(mean, precision.variance(), expected, strict=True):
        assert float(mu) == pytest.approx(float(new_mu), rel=1e-12)
        assert float(variance) == pytest.approx(float(new_sigma**2), rel=1e-12)


def test_bgd_is_the_published_rule() -> None:
    """Algorithm 1 of Zeno et al., with E[ε∂C/∂w] = σĤ."""
    mean, precision, gradient, curvature = weights()
    sigma = precision.variance().sqrt()
    by_noise = sigma * curvature
    new_mean = mean - 0.3 * sigma**2 * gradient
    new_sigma = sigma * torch.sqrt(1 + (0.5 * sigma * by_noise) ** 2) - 0.5 * sigma**2 * by_noise
    bgd_step(mean, precision, gradient, curvature, lr=0.3, trust_region=math.inf)
    torch.testing.assert_close(mean, new_mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(precision.variance().sqrt(), new_sigma, rtol=1e-12, atol=0)


@pytest.mark.parametrize("rate", [0.1, 1e-3])
def test_mesu_is_euler_s_step_of_the_overdamped_flow_with_eta_k_over_gamma_one_and_n_k_over_tau(
    rate: float,
) -> None:
    """Term by term, at any rate: the flow of the free energy with the Fisher metric, in (μ, σ)."""
    mean, precision, _, _ = weights()
    root = torch.randn(6, 6, dtype=torch.float64)
    hessian, minimum = root @ root.T / 6, torch.randn(6, dtype=torch.float64)
    flow = gaussian_weights(
        hessian,
        minimum,
        discount=1e3,
        lr=1e3,
        loss_weight=1.0,
        entropy_weight=1.0 / N,
        prior_variance=PRIOR_VARIANCE,
        prior_mean=PRIOR_MEAN,
        coordinates="deviation",
    )
    position = torch.cat([mean, precision.variance().sqrt()])
    expected = position + rate * flow.overdamped_velocity(position)
    gradient = hessian @ (mean - minimum)
    mesu_step(mean, precision, gradient, hessian.diagonal(), rate=rate, memory=N, trust_region=1e9)
    moved = torch.cat([mean, precision.variance().sqrt()])
    torch.testing.assert_close(moved, expected, rtol=1e-12, atol=1e-14)


def test_mesu_is_the_derivative_of_the_euler_lagrange_rule_at_a_step_of_zero() -> None:
    """The rules agree to first order in lr = rate/N: Δμ to that of `mean_displacement`, −2Δσ/σ³ to Δs."""
    mean, precision, gradient, curvature = weights()
    curvature, rate = curvature.abs(), 0.1
    before, s = mean.clone(), precision.precision.clone()
    sigma, delta = s.rsqrt(), 1.0 / (N * PRIOR_VARIANCE)

    def euler_lagrange(lr: Tensor) -> tuple[Tensor, Tensor]:
        step = mean_displacement(gradient, before - PRIOR_MEAN, s, curvature, delta, 1.0 / N, lr)
        return step, relaxed_precision(s, curvature, delta, 1.0 / N, -torch.expm1(-lr))

    slopes = torch.autograd.functional.jacobian(euler_lagrange, torch.zeros((), dtype=torch.float64))
    mesu_step(mean, precision, gradient, curvature, rate=rate, memory=N, trust_region=0.9)
    torch.testing.assert_close(mean - before, slopes[0] * rate / N, rtol=1e-12, atol=1e-15)
    widening = precision.variance().sqrt() - sigma
    torch.testing.assert_close(widening, -0.5 * sigma**3 * slopes[1] * rate / N, rtol=1e-12, atol=1e-15)


def test_bgd_is_mesu_with_an_infinite_memory_for_small_steps() -> None:
    """To first order: their log σ differ by e²/2 where they agree on e = ½σ²Ĥ."""
    differences = []
    for scale in (1e-2, 1e-3):
        results = []
        for method in (BGD, MESU):
            mean, precision, gradient, curvature = weights()
            if method is BGD:
                bgd_step(mean, precision, scale * gradient, scale * curvature, lr=1.0, trust_region=math.inf)
            else:
                mesu_step(mean, precision, gradient, curvature, rate=scale, memory=math.inf, trust_region=0.9)
            results.append((mean, precision.precision.log()))
        torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-12, atol=1e-15)
        differences.append(results[0][1] - results[1][1])
    torch.testing.assert_close(differences[0], 100 * differences[1], rtol=0.05, atol=0)


def test_mesu_rests_at_the_posterior_of_n_examples() -> None:
    """With exact gradients: s = N·H + 1/σ_p² and the mean between minimum and prior, as for T = 1/N."""
    mean, precision, _, _ = weights()
    curvature, minimum = torch.rand_like(mean) + 0.1, torch.randn_like(mean)
    for _ in range(4000):
        mesu_step(mean, precision, curvature * (mean - minimum), curvature, rate=0.5, memory=N, trust_region=0.1)
    posterior = N * curvature + 1 / PRIOR_VARIANCE
    torch.testing.assert_close(precision.precision, posterior, rtol=1e-9, atol=0)
    center = (N * curvature * minimum + PRIOR_MEAN / PRIOR_VARIANCE) / posterior
    torch.testing.assert_close(mean, center, rtol=1e-9, atol=1e-12)


def test_bgd_adds_up_the_curvature_of_all_examples() -> None:
    """s_t ≈ s_0 + Σ n·H: each step adds n·H, but for a share of n·H/2s."""
    mean, precision, _, _ = weights()
    start = precision.precision.clone()
    curvature = torch.rand_like(mean) * 0.002
    for _ in range(500):
        bgd_step(mean, precision, torch.zeros_like(mean), curvature, lr=1.0, trust_region=math.inf)
    torch.testing.assert_close(precision.precision, start + 500 * curvature, rtol=1e-3, atol=0)


@each
def test_steps_are_bounded_in_units_of_the_deviation(case: OptimizerCase) -> None:
    for sign in (-1.0, 1.0):
        mean, precision, gradient, _ = weights()
        before, sigma = mean.clone(), precision.variance().sqrt()
        curvature = torch.full_like(mean, sign * 1e6)
        gradient = gradient.sign() * 1e6
        if case is MESU_CASE:
            mesu_step(mean, precision, gradient, curvature, rate=1.0, memory=N, trust_region=0.2)
        else:
            bgd_step(mean, precision, gradient, curvature, lr=1.0, trust_region=0.2)
        torch.testing.assert_close(mean, before - 0.2 * sigma * gradient.sign())
        torch.testing.assert_close(precision.variance().sqrt(), sigma * (1.0 - sign * 0.2))


@each
def test_the_optimizer_takes_gradient_and_curvature_of_the_draw(case: OptimizerCase) -> None:
    """A linear layer whose draw w = μ + σε is told by its outputs: g at w, Ĥ = gε/σ, times the 8 examples."""
    layer = nn.Linear(5, 3, bias=False).double()
    case.make_gaussian(layer, 7, prior_variance=0.4)
    optimizer = case.make(layer)
    mean, precision = layer.weight.detach().clone(), layer.weight_precision.precision.clone()
    probe, _ = batch(1, size=8)
    outputs = layer(probe)
    outputs.square().mul(0.5).sum(1).mean().backward()
    weight = torch.linalg.lstsq(probe, outputs.detach()).solution.T
    gradient = layer.weight.grad.clone()
    torch.testing.assert_close(gradient, (outputs.T @ probe / 8).detach())
    expected = DiagonalPrecision(mean, prior_variance=0.4 * 2 / 5)
    expected.precision.copy_(precision)
    curvature = gradient * (weight - mean) * precision
    if case is MESU_CASE:
        mesu_step(mean, expected, gradient, curvature, rate=0.1 * 8, memory=1e3, trust_region=0.1)
    else:
        bgd_step(mean, expected, 8 * gradient, 8 * curvature, lr=0.1, trust_region=0.1)
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), mean, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(layer.weight_precision.precision, expected.precision, rtol=1e-9, atol=1e-12)


@each
def test_several_passes_over_a_batch_count_its_examples_once(case: OptimizerCase) -> None:
    """Three passes with one and the same draw, each with a third of the loss, are one pass."""
    once, thrice = case.network(), case.network()
    optimizers = case.make(once), case.make(thrice, samples=3)
    inputs, targets = batch()
    backward(once, optimizers[0], inputs, targets)
    for _ in range(3):
        set_sampling(thrice, "batch", torch.Generator().manual_seed(0))
        (nn.functional.cross_entropy(thrice(inputs), targets) / 3).backward()
    for optimizer in optimizers:
        optimizer.step()
    assert_same_tensors(dict(thrice.state_dict()), dict(once.state_dict()), rtol=1e-12, atol=1e-14)


@each
def test_sums_and_ascent_are_the_same_step(case: OptimizerCase) -> None:
    inputs, targets = batch()
    plain = case.network()
    optimizer = case.make(plain)
    backward(plain, optimizer, inputs, targets)
    optimizer.step()
    for settings, reduction, sign in (({"loss_reduction": "sum"}, "sum", 1), ({"maximize": True}, "mean", -1)):
        other = case.network()
        optimizer = case.make(other, **settings)
        (sign * nn.functional.cross_entropy(other(inputs), targets, reduction=reduction)).backward()
        optimizer.step()
        assert_same_tensors(dict(other.state_dict()), dict(plain.state_dict()), rtol=1e-11, atol=1e-13)


@each
@pytest.mark.parametrize("precision", ["diagonal", "kronecker", Diagonal("per_example", sampling="batch")])
def test_layers_that_do_not_observe_by_draws_are_refused(case: OptimizerCase, precision) -> None:
    net = clagrange.gaussianize(mlp(), precision=precision)
    with pytest.raises(ValueError, match=r"draw their weights, got a GaussianLinear .*Diagonal\('sampled'"):
        case.make(net)
    with pytest.raises(ValueError, match="at least one Gaussian parameter"):
        case.make(mlp())


@each
def test_gradients_of_an_evaluation_are_refused(case: OptimizerCase) -> None:
    net = case.network()
    optimizer = case.make(net)
    net.eval()
    backward(net, optimizer, *batch())
    with pytest.raises(RuntimeError, match=r"'weight' of a GaussianLinear is not that of drawn weights"):
        optimizer.step()


@each
def test_parameters_that_are_not_gaussian_take_adam_s_step(case: OptimizerCase) -> None:
    net = mlp()
    clagrange.gaussianize(net, precision=DRAWS, layers={"2": None})
    optimizer = case.make(net, deterministic_lr=0.01)
    before = net[2].weight.detach().clone()
    backward(net, optimizer, *batch())
    optimizer.step()
    moved = net[2].weight.detach() - before
    torch.testing.assert_close(
        moved, -0.01 * net[2].weight.grad.sign() * (net[2].weight.grad != 0), atol=1e-5, rtol=1e-3
    )
