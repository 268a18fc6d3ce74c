"""Checks of samplers, replicas and conversions."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from clagrange.dynamics import ornstein_uhlenbeck
from clagrange.gaussian import DiagonalPrecision, collapse, gaussianize
from clagrange.mechanics import langevin
from clagrange.networks import cross_entropy, initialize
from clagrange.optim import EulerLagrange
from clagrange.replicas import stack, unstack
from clagrange.verify.check import Place, check


def _moments(drawn: Tensor, mean: Tensor, variance: Tensor) -> tuple[Any, Any, float, float]:
    """Moments of draws along dimension 0, in standard errors; the largest of 2n of them is rarely above 4.5."""
    count = len(drawn)
    of_mean = (drawn.mean(0) - mean) / (variance / count).sqrt()
    of_variance = (drawn.var(0) / variance - 1) / math.sqrt(2 / count)
    ratio = float((drawn.var(0) / variance).mean())
    return "variance ratio 1", f"{ratio:.5f}", float(torch.cat([of_mean, of_variance]).abs().max()), 4.5


@check("Samplers (in standard errors)", "DiagonalPrecision.sample")
def _sample(place: Place) -> tuple[Any, Any, float, float]:
    mean = place.normal(20)
    precision = DiagonalPrecision(mean.expand(20_000, 20))
    precision.precision.copy_((place.normal(20).square() + 0.1).expand(20_000, 20))
    return _moments(precision.sample(mean, place.stream()), mean, precision.variance()[0])


@check("Samplers (in standard errors)", "Ornstein-Uhlenbeck: keeps the prior")
def _injection(place: Place) -> tuple[Any, Any, float, float]:
    stream = place.stream()
    prior_mean, deviation = place.normal(20), place.normal(20).abs() + 0.1
    shape = (20_000, 20)
    weights = prior_mean + deviation * torch.randn(
        shape, generator=stream, dtype=place.dtype, device=place.device
    )
    retained = torch.linspace(0, 1, 20, dtype=place.dtype, device=place.device)
    for _ in range(5):
        noise = torch.randn(shape, generator=stream, dtype=place.dtype, device=place.device)
        weights = ornstein_uhlenbeck(weights, prior_mean, deviation, retained, 0.7, noise)
    return _moments(weights, prior_mean, deviation.square())


@check("Samplers (in standard errors)", "Langevin: energy E[C] = dς²/2β")
def _langevin_energy(place: Place) -> tuple[Any, Any, float, float]:
    stiffness, stream = place.tensor([1.0, 4.0]), place.stream()
    x = v = place.tensor([[0.0, 0.0]]).expand(4000, 2)
    for _ in range(300):  # 30 time units: 15 times the slowest relaxation 1/β
        x, v = langevin(x, v, lambda x: stiffness * x, 0.1, damping=0.5, noise=0.3, generator=stream)
    energies = (0.5 * (v.square() + stiffness * x.square())).sum(-1)
    found = float(energies.mean())
    return 0.18, found, abs(found - 0.18) / (float(energies.std()) / math.sqrt(4000)), 4.5


@check("Networks", "3 stacked replicas = 3 networks")
def _replicas(place: Place) -> tuple[Any, Any, float, float]:
    singles = []
    for seed in range(3):
        net = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))
        initialize(net, torch.Generator().manual_seed(seed))
        singles.append(gaussianize(net.to(place.device, place.dtype)))
    stacked = stack(singles)
    inputs, targets = place.normal(3, 8, 5), torch.arange(24, device=place.device).view(3, 8) % 3
    pairs: list[tuple[nn.Module, Tensor, Tensor]] = [
        (stacked, inputs, targets),
        *zip(singles, inputs, targets, strict=True),
    ]
    for network, x, y in pairs:
        optimizer = EulerLagrange(network, lr=1e-2, temperature=1e-3)
        for _ in range(20):
            optimizer.zero_grad()
            cross_entropy(network(x), y).backward()
            optimizer.step()
    error = 0.0
    for ours, single in zip(unstack(stacked), singles, strict=True):
        theirs = single.state_dict()
        for name, tensor in ours.state_dict().items():
            error = max(error, float((tensor - theirs[name]).abs().max() / (theirs[name].abs().max() + 1e-12)))
    return "equal", f"{error:.1e}", error, place.rounding(1e4)


@check("Networks", "gaussianize, then collapse")
def _collapse(place: Place) -> tuple[Any, Any, float, float]:
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).to(place.device, place.dtype)
    inputs = place.normal(8, 5)
    before = net(inputs).detach()
    after = collapse(gaussianize(net))(inputs).detach()
    error = float((after - before).abs().max())
    return "equal", f"{error:.1e}", error, 0.0
