"""Checks of energy laws, exact gradients and least time."""

import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn

from clagrange.mechanics import (
    damped,
    forest_ruth,
    half_squared_error,
    integrate,
    least_action,
    linear_error,
    pc_alm_gradients,
    planned_inputs,
    planned_samples,
    residual_network,
    velocity_verlet,
)
from clagrange.verify.check import Place, check


def _drift(place: Place, step: float, integrator: Any) -> float:
    """Largest relative change of energy over 20 time units on ½(x² + 4y²), from (2, 1) at rest."""
    stiffness = place.tensor([1.0, 4.0])
    path = integrate(
        integrator,
        place.tensor([2.0, 1.0]),
        place.tensor([0.0, 0.0]),
        lambda x: stiffness * x,
        step=step,
        steps=round(20 / step),
    )
    energy = path.energy(lambda x: 0.5 * (stiffness * x.square()).sum(-1))
    return float((energy / energy[0] - 1).abs().max())


@check("Energy", "velocity Verlet: drift of ½v² + L")
def _verlet_order(place: Place) -> tuple[Any, Any, float, float]:
    order = math.log2(_drift(place, 0.1, velocity_verlet) / _drift(place, 0.05, velocity_verlet))
    return "order 2", f"order {order:.3f}", abs(order - 2), 0.05


@check("Energy", "Forest-Ruth: drift of ½v² + L")
def _forest_ruth_order(place: Place) -> tuple[Any, Any, float, float]:
    order = math.log2(_drift(place, 0.2, forest_ruth) / _drift(place, 0.1, forest_ruth))
    return "order 4", f"order {order:.3f}", abs(order - 4), 0.2


@check("Energy", "momentum SGD: discrete energy law")
def _momentum_law(place: Place) -> tuple[Any, Any, float, float]:
    momentum, lr = 0.9, 0.05
    factor = place.normal(5, 5)
    hessian = factor @ factor.T / 5
    theta = nn.Parameter(place.normal(5))
    optimizer = torch.optim.SGD([theta], lr=lr, momentum=momentum)
    points = [theta.detach().clone()]
    for _ in range(100):
        optimizer.zero_grad()
        (0.5 * theta @ hessian @ theta).backward()
        optimizer.step()
        points.append(theta.detach().clone())
    moves = [after - before for before, after in itertools.pairwise(points)]
    energy = [
        move @ move / (2 * lr) + 0.5 * (end @ hessian @ start)
        for move, start, end in zip(moves, points[:-1], points[1:], strict=True)
    ]
    defect = max(
        abs(
            float(
                energy[k] - energy[k - 1] + (1 - momentum) / (2 * lr) * (moves[k - 1] @ (moves[k] + moves[k - 1]))
            )
        )
        for k in range(1, 100)
    )
    return 0, f"{defect:.1e} of {float(energy[0]):.3g}", defect / float(energy[0]), place.rounding(50)


@check("Energy", "friction: C(10) − C(0) = −2β ∫ K dt")
def _damped_balance(place: Place) -> tuple[Any, Any, float, float]:
    stiffness, damping = place.tensor([1.0, 4.0]), 0.5
    start, rest = place.tensor([2.0, 1.0]), place.tensor([0.0, 0.0])
    path = integrate(damped(damping), start, rest, lambda x: stiffness * x, step=0.005, steps=2000)
    energy = path.energy(lambda x: 0.5 * (stiffness * x.square()).sum(-1))
    lost = -2.0 * damping * float(torch.trapezoid(path.kinetic(), path.times))
    found = float(energy[-1] - energy[0])
    return lost, found, abs(found - lost), 1e-4


def _gradient_error(place: Place, net: nn.Sequential, inputs: Tensor) -> tuple[Any, Any, float, float]:
    net = net.to(place.device, place.dtype)
    targets = torch.arange(len(inputs), device=place.device) % 3
    gradients = []
    for relaxed in (False, True):
        net.zero_grad()
        if relaxed:
            with least_action(net):
                nn.functional.cross_entropy(net(inputs), targets).backward()
        else:
            nn.functional.cross_entropy(net(inputs), targets).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]))
    error = float((gradients[1] - gradients[0]).norm() / gradients[0].norm())
    return "autograd", f"|g| = {float(gradients[1].norm()):.6g}", error, place.rounding(1000)


@check("Exact gradients", "least action, perceptron, 2L steps")
def _least_action_mlp(place: Place) -> tuple[Any, Any, float, float]:
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    return _gradient_error(place, net, place.normal(8, 5))


@check("Exact gradients", "least action, convolutions, 2L steps")
def _least_action_conv(place: Place) -> tuple[Any, Any, float, float]:
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 3, 3, stride=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(12, 3),
    )
    return _gradient_error(place, net, place.normal(8, 2, 6, 6))


@check("Exact gradients", "PC-ALM, linear, at equilibrium")
def _pc_alm(place: Place) -> tuple[Any, Any, float, float]:
    net = residual_network(5, 5, 4, 3, activation="linear").to(place.device, place.dtype)
    inputs, targets = place.normal(4, 5), place.normal(4, 3)
    result = pc_alm_gradients(net, inputs, targets, steps=1500)
    half_squared_error(net(inputs), targets).mean().backward()
    truth = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
    found = torch.cat([gradient.flatten() for gradient in result.gradients.values()])
    error = float((found - truth).norm() / truth.norm())
    return "cosine 1", f"cosine {result.cosine:.7f}", error, max(1e-8, place.rounding(200))


@check("Least time", "planned order: T = pσ²/(δ − σ²)")
def _planned_samples(place: Place) -> tuple[Any, Any, float, float]:
    samples = planned_samples(1.5, 10)
    inputs = planned_inputs(round(samples), 10).to(place.device, place.dtype)
    found = linear_error(inputs)
    return "error 1.5 at 20", f"error {found:.5g} at {samples:g}", abs(found - 1.5) + abs(samples - 20), 1e-6
