"""Checks of the learning dynamics against closed forms."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from clagrange.dynamics import mean_displacement, relaxation_fraction, stable_root
from clagrange.gaussian import DiagonalPrecision, gaussianize, variances
from clagrange.optim import EulerLagrange
from clagrange.verify.check import Place, check, largest


@check("Euler-Lagrange dynamics", "stable root at γ = 1 and γ = 10")
def _stable_root(place: Place) -> tuple[Any, Any, float, float]:
    exact = [(math.sqrt(5.0) - 1.0) / 2.0, math.sqrt(26.0) - 5.0]
    found = stable_root(place.tensor([1.0, 0.1]), place.tensor([1.0, 10.0]))
    assert isinstance(found, Tensor)
    return (
        f"{exact[0]:.5f} {exact[1]:.5f}",
        f"{found[0]:.5f} {found[1]:.5f}",
        largest(found, place.tensor(exact)),
        place.rounding(8),
    )


@check("Euler-Lagrange dynamics", "λ² + γλ = γr over 16 decades of r/γ")
def _root_equation(place: Place) -> tuple[Any, Any, float, float]:
    rate = 10.0 ** torch.linspace(-8, 8, 65, dtype=place.dtype, device=place.device)
    root = stable_root(rate, 1.0)
    assert isinstance(root, Tensor)
    error = float(((root * root + root - rate) / rate).abs().max())
    return 0, f"{error:.1e}", error, place.rounding(16)


@check("Euler-Lagrange dynamics", "mean on a parabola: e^(−λt)")
def _mean_path(place: Place) -> tuple[Any, Any, float, float]:
    one, theta = place.tensor([1.0]), place.tensor([1.0])
    for _ in range(100):
        theta = theta + mean_displacement(2.0 * theta, 0.0 * one, one, 2.0 * one, 0.0, 1.0, 0.01, 0.05)
    exact = math.exp(-100 * (math.sqrt(0.05**2 / 4 + 0.05 * 0.02) - 0.025))
    return exact, float(theta), abs(float(theta) / exact - 1), place.rounding(2000)


@check("Euler-Lagrange dynamics", "its least discounted action: λ/2η")
def _least_cost(place: Place) -> tuple[Any, Any, float, float]:
    discount, curvature = 0.5, 2.0
    root = float(stable_root(curvature / discount, discount))
    times = torch.linspace(0.0, 40.0, 20_001, dtype=place.dtype, device=place.device)

    def action(rate: float) -> float:
        running = 0.5 * (rate**2 + curvature) * torch.exp(-(discount + 2.0 * rate) * times)
        weights = torch.ones_like(times)
        weights[1:-1:2], weights[2:-1:2] = 4.0, 2.0  # Simpson
        return float((weights * running).sum() * (40.0 / 20_000) / 3.0)

    found = action(root)
    error = abs(found - root / 2) if min(action(0.95 * root), action(1.05 * root)) > found else math.inf
    return root / 2, found, error, max(1e-8, place.rounding(100))


@check("Euler-Lagrange dynamics", "precision flow at γ = ∞ and γ = 0.1")
def _precision_flow(place: Place) -> tuple[Any, Any, float, float]:
    errors, ends = [], []
    for discount in (math.inf, 0.1):
        precision = DiagonalPrecision(place.tensor([0.0, 0.0]), prior_variance=0.5)
        precision.curvature.copy_(place.tensor([3.0, 0.0]))
        for _ in range(50):
            precision.relax(0.01, relaxation_fraction(0.02, discount))
        root = 0.02 if math.isinf(discount) else math.sqrt(0.1**2 / 4 + 0.1 * 0.02) - 0.05
        rest = 3.0 / 0.01 + 2.0
        exact = place.tensor([rest + (2.0 - rest) * math.exp(-50 * root), 2.0])
        errors.append(largest(precision.precision, exact))
        ends.append((float(exact[0]), float(precision.precision[0])))
    expected, found = (" ".join(f"{end[at]:.3f}" for end in ends) for at in (0, 1))
    return expected, found, max(errors), place.rounding(500)


@check("Euler-Lagrange dynamics", "KL and entropy, against torch")
def _information(place: Place) -> tuple[Any, Any, float, float]:
    mean = place.normal(50)
    precision = DiagonalPrecision(mean, prior_variance=0.7)
    precision.precision.copy_(place.normal(50).square() + 0.1)
    posterior = torch.distributions.Normal(mean, precision.variance().sqrt())
    prior = torch.distributions.Normal(torch.zeros_like(mean), math.sqrt(0.7))
    kl, entropy = torch.distributions.kl_divergence(posterior, prior).sum(), posterior.entropy().sum()
    error = abs(float(precision.kl(mean) / kl) - 1) + abs(float(precision.entropy() / entropy) - 1)
    return float(kl), float(precision.kl(mean)), error, place.rounding(200)


@check("Linear regression", "EulerLagrange: posterior mean")
def _posterior_mean(place: Place) -> tuple[Any, Any, float, float]:
    examples, prior_variance = 50, 0.2
    inputs = place.normal(examples, 3)
    targets = inputs @ place.tensor([[1.0], [-2.0], [0.5]]) + place.normal(examples, 1)
    layer = nn.Sequential(nn.Linear(3, 1, bias=False).to(place.device, place.dtype))
    gaussianize(layer, prior_variance=prior_variance / (2 / 3))
    optimizer = EulerLagrange(layer, lr=0.2, temperature=1 / examples, trust_region=math.inf)
    for step in range(1500):
        if step == 300:
            optimizer.param_groups[0]["lr"] = 0.03
        optimizer.zero_grad()
        (0.5 * (layer(inputs) - targets).square().sum(-1).mean()).backward()
        optimizer.step()
    exact = torch.linalg.solve(
        inputs.T @ inputs + torch.eye(3, dtype=place.dtype, device=place.device) / prior_variance,
        inputs.T @ targets,
    )
    found = next(layer.parameters()).detach().T
    show = [" ".join(f"{value:.2f}" for value in values.flatten().tolist()) for values in (exact, found)]
    return show[0], show[1], largest(found, exact), max(1e-6, place.rounding(100))


@check("Linear regression", "EulerLagrange: posterior variances")
def _posterior_variance(place: Place) -> tuple[Any, Any, float, float]:
    examples, prior_variance, outputs = 200, 0.2, 256
    inputs = place.normal(examples, 3) * place.tensor([2.0, 1.0, 0.1])
    layer = nn.Sequential(nn.Linear(3, outputs, bias=False).to(place.device, place.dtype))
    gaussianize(layer, prior_mean="initial", prior_variance=prior_variance / (2 / 3))
    truth = next(layer.parameters()).detach().clone()
    optimizer = EulerLagrange(layer, lr=5e-3, temperature=1 / examples, variance_rate=0.01)
    stream = place.stream()
    total = torch.zeros_like(truth)
    for step in range(900):
        chosen = torch.randint(examples, (16,), generator=stream, device=place.device)
        noise = torch.randn(16, outputs, generator=stream, dtype=place.dtype, device=place.device)
        optimizer.zero_grad()
        (0.5 * (layer(inputs[chosen]) - inputs[chosen] @ truth.T - noise).square().sum(-1).mean()).backward()
        optimizer.step()
        if step >= 500:
            total += 1.0 / variances(layer)["0.weight"] / 400
    exact = 1.0 / (inputs.square().sum(0) + 1.0 / prior_variance)
    found = 1.0 / total.mean(0)
    show = [" ".join(f"{float(value):.2g}" for value in values[[0, 2]]) for values in (exact, found)]
    return show[0], show[1], float((found / exact - 1).abs().max()), 0.05
