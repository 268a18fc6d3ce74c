"""Closed forms, conservation laws, exact gradients and samplers, checked on this machine."""

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from clagrange._checks import check_choice
from clagrange.dynamics import mean_displacement, ornstein_uhlenbeck, relaxation_fraction, stable_root
from clagrange.gaussian import DiagonalPrecision, collapse, gaussianize, variances
from clagrange.mechanics import (
    damped,
    forest_ruth,
    half_squared_error,
    integrate,
    langevin,
    least_action,
    linear_error,
    pc_alm_gradients,
    planned_inputs,
    planned_samples,
    residual_network,
    velocity_verlet,
)
from clagrange.networks import cross_entropy, initialize
from clagrange.optim import EulerLagrange
from clagrange.replicas import stack, unstack

DTYPES = {"float64": torch.float64, "float32": torch.float32}


@dataclass(frozen=True)
class Check:
    """One comparison of what theory says with what this machine computed.

    Attributes:
        part: what it belongs to.
        name: what was compared.
        expected: the value of the theory, in words or digits.
        found: what came.
        error: distance between the two, in the unit of ``tolerance``.
        tolerance: largest error that passes.
    """

    part: str
    name: str
    expected: str
    found: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the error is a number and within the tolerance."""
        return self.error <= self.tolerance


@dataclass(frozen=True)
class Place:
    """Where a check computes, with its random stream and its tolerances."""

    device: torch.device
    dtype: torch.dtype

    def tensor(self, values: Any) -> Tensor:
        """A tensor there."""
        return torch.as_tensor(values, dtype=self.dtype, device=self.device)

    def stream(self) -> torch.Generator:
        """A random stream of its own, the same in every run."""
        return torch.Generator(self.device).manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers, the same on every device."""
        drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        return self.tensor(drawn)

    def rounding(self, times: float) -> float:
        """So many units of the last digit: 2.2e-16 or 1.2e-7 each."""
        return times * torch.finfo(self.dtype).eps


CHECKS: list[tuple[str, str, Callable[[Place], tuple[Any, Any, float, float]]]] = []
"""Part, name, and a function that gives expected, found, error and tolerance."""


def _check(part: str, name: str) -> Callable[[Any], Any]:
    def register(function: Callable[[Place], tuple[Any, Any, float, float]]) -> Any:
        CHECKS.append((part, name, function))
        return function

    return register


def verify(device: str | torch.device = "cpu", dtype: str = "float64") -> list[Check]:
    """Run all checks; a check that raises an exception has failed.

    Args:
        device: where to compute, such as "cpu" or "cuda".
        dtype: "float64" or "float32"; tolerances follow it.

    Raises:
        ValueError: for another dtype.
        RuntimeError: if torch cannot compute there.

    Example:
        >>> all(check.passed for check in verify())
        True
    """
    check_choice("dtype", dtype, DTYPES)
    place = Place(torch.device(device), DTYPES[dtype])
    place.tensor([0.0])
    results = []
    for part, name, function in CHECKS:
        try:
            with torch.random.fork_rng(devices=[]), torch.enable_grad():
                torch.manual_seed(0)
                expected, found, error, tolerance = function(place)
            results.append(Check(part, name, _text(expected), _text(found), float(error), tolerance))
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            results.append(Check(part, name, "a result", reason, math.inf, 0.0))
    return results


def report(checks: Sequence[Check], console: Console, *, seconds: float, where: str) -> None:
    """Print a table of checks and a last line that says whether all passed."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for title, justify in (("", "left"), ("expected", "left"), ("found", "left"), ("error", "right")):
        table.add_column(title, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    table.add_column("tolerance", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    part = ""
    for check in checks:
        if check.part != part:
            part = check.part
            table.add_row(f"[bold]{part}[/bold]")
        mark = "[green]ok[/green]" if check.passed else "[bold red]FAILED[/bold red]"
        cells = (check.expected, check.found, f"{check.error:.1e}", f"{check.tolerance:.1e}")
        table.add_row(f"  {check.name}", *cells, mark)
    console.print(table)
    failed = sum(not check.passed for check in checks)
    told = f"{failed} of {len(checks)} checks failed" if failed else f"all {len(checks)} checks passed"
    console.print(f"\n{told} on {where} in {seconds:.1f} s", highlight=False)


def run(device: str, dtype: str) -> tuple[list[Check], dict[str, Any]]:
    """`verify`, with what a program wants to know: a JSON-ready summary."""
    begun = time.perf_counter()
    checks = verify(device, dtype)
    return checks, {
        "passed": all(check.passed for check in checks),
        "device": device,
        "dtype": dtype,
        "torch": str(torch.__version__),
        "seconds": round(time.perf_counter() - begun, 2),
        "checks": [
            {
                **vars(check),
                "error": check.error if math.isfinite(check.error) else None,
                "passed": check.passed,
            }
            for check in checks
        ],
    }


def _text(value: Any) -> str:
    return f"{value:.7g}" if isinstance(value, float) else str(value)


def _largest(found: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest entry."""
    return float((found - expected).abs().max() / expected.abs().max())


# ----------------------------------------------------------------------------------------- learning dynamics
@_check("Euler-Lagrange dynamics", "stable root at γ = 1 and γ = 10")
def _stable_root(place: Place) -> tuple[Any, Any, float, float]:
    exact = [(math.sqrt(5.0) - 1.0) / 2.0, math.sqrt(26.0) - 5.0]
    found = stable_root(place.tensor([1.0, 0.1]), place.tensor([1.0, 10.0]))
    assert isinstance(found, Tensor)
    return (
        f"{exact[0]:.5f} {exact[1]:.5f}",
        f"{found[0]:.5f} {found[1]:.5f}",
        _largest(found, place.tensor(exact)),
        place.rounding(8),
    )


@_check("Euler-Lagrange dynamics", "λ² + γλ = γr over 16 decades of r/γ")
def _root_equation(place: Place) -> tuple[Any, Any, float, float]:
    rate = 10.0 ** torch.linspace(-8, 8, 65, dtype=place.dtype, device=place.device)
    root = stable_root(rate, 1.0)
    assert isinstance(root, Tensor)
    error = float(((root * root + root - rate) / rate).abs().max())
    return 0, f"{error:.1e}", error, place.rounding(16)


@_check("Euler-Lagrange dynamics", "mean on a parabola: e^(−λt)")
def _mean_path(place: Place) -> tuple[Any, Any, float, float]:
    one, theta = place.tensor([1.0]), place.tensor([1.0])
    for _ in range(100):
        theta = theta + mean_displacement(2.0 * theta, 0.0 * one, one, 2.0 * one, 0.0, 1.0, 0.01, 0.05)
    exact = math.exp(-100 * (math.sqrt(0.05**2 / 4 + 0.05 * 0.02) - 0.025))
    return exact, float(theta), abs(float(theta) / exact - 1), place.rounding(2000)


@_check("Euler-Lagrange dynamics", "its least discounted action: λ/2η")
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


@_check("Euler-Lagrange dynamics", "precision flow at γ = ∞ and γ = 0.1")
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
        errors.append(_largest(precision.precision, exact))
        ends.append((float(exact[0]), float(precision.precision[0])))
    expected, found = (" ".join(f"{end[at]:.3f}" for end in ends) for at in (0, 1))
    return expected, found, max(errors), place.rounding(500)


@_check("Euler-Lagrange dynamics", "KL and entropy, against torch")
def _information(place: Place) -> tuple[Any, Any, float, float]:
    mean = place.normal(50)
    precision = DiagonalPrecision(mean, prior_variance=0.7)
    precision.precision.copy_(place.normal(50).square() + 0.1)
    posterior = torch.distributions.Normal(mean, precision.variance().sqrt())
    prior = torch.distributions.Normal(torch.zeros_like(mean), math.sqrt(0.7))
    kl, entropy = torch.distributions.kl_divergence(posterior, prior).sum(), posterior.entropy().sum()
    error = abs(float(precision.kl(mean) / kl) - 1) + abs(float(precision.entropy() / entropy) - 1)
    return float(kl), float(precision.kl(mean)), error, place.rounding(200)


# ----------------------------------------------------------------------------------------- linear regression
@_check("Linear regression", "EulerLagrange: posterior mean")
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
    return show[0], show[1], _largest(found, exact), max(1e-6, place.rounding(100))


@_check("Linear regression", "EulerLagrange: posterior variances")
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


# ---------------------------------------------------------------------------------------------- conservation
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


@_check("Energy", "velocity Verlet: drift of ½v² + L")
def _verlet_order(place: Place) -> tuple[Any, Any, float, float]:
    order = math.log2(_drift(place, 0.1, velocity_verlet) / _drift(place, 0.05, velocity_verlet))
    return "order 2", f"order {order:.3f}", abs(order - 2), 0.05


@_check("Energy", "Forest-Ruth: drift of ½v² + L")
def _forest_ruth_order(place: Place) -> tuple[Any, Any, float, float]:
    order = math.log2(_drift(place, 0.2, forest_ruth) / _drift(place, 0.1, forest_ruth))
    return "order 4", f"order {order:.3f}", abs(order - 4), 0.2


@_check("Energy", "momentum SGD: discrete energy law")
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


@_check("Energy", "friction: C(10) − C(0) = −2β ∫ K dt")
def _damped_balance(place: Place) -> tuple[Any, Any, float, float]:
    stiffness, damping = place.tensor([1.0, 4.0]), 0.5
    start, rest = place.tensor([2.0, 1.0]), place.tensor([0.0, 0.0])
    path = integrate(damped(damping), start, rest, lambda x: stiffness * x, step=0.005, steps=2000)
    energy = path.energy(lambda x: 0.5 * (stiffness * x.square()).sum(-1))
    lost = -2.0 * damping * float(torch.trapezoid(path.kinetic(), path.times))
    found = float(energy[-1] - energy[0])
    return lost, found, abs(found - lost), 1e-4


# ------------------------------------------------------------------------------------------- exact gradients
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


@_check("Exact gradients", "least action, perceptron, 2L steps")
def _least_action_mlp(place: Place) -> tuple[Any, Any, float, float]:
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    return _gradient_error(place, net, place.normal(8, 5))


@_check("Exact gradients", "least action, convolutions, 2L steps")
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


@_check("Exact gradients", "PC-ALM, linear, at equilibrium")
def _pc_alm(place: Place) -> tuple[Any, Any, float, float]:
    net = residual_network(5, 5, 4, 3, activation="linear").to(place.device, place.dtype)
    inputs, targets = place.normal(4, 5), place.normal(4, 3)
    result = pc_alm_gradients(net, inputs, targets, steps=1500)
    half_squared_error(net(inputs), targets).mean().backward()
    truth = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
    found = torch.cat([gradient.flatten() for gradient in result.gradients.values()])
    error = float((found - truth).norm() / truth.norm())
    return "cosine 1", f"cosine {result.cosine:.7f}", error, max(1e-8, place.rounding(200))


# ------------------------------------------------------------------------------------------------ least time
@_check("Least time", "planned order: T = pσ²/(δ − σ²)")
def _planned_samples(place: Place) -> tuple[Any, Any, float, float]:
    samples = planned_samples(1.5, 10)
    inputs = planned_inputs(round(samples), 10).to(place.device, place.dtype)
    found = linear_error(inputs)
    return "error 1.5 at 20", f"error {found:.5g} at {samples:g}", abs(found - 1.5) + abs(samples - 20), 1e-6


# -------------------------------------------------------------------------------------------------- sampling
def _moments(drawn: Tensor, mean: Tensor, variance: Tensor) -> tuple[Any, Any, float, float]:
    """Moments of draws along dimension 0, in standard errors; the largest of 2n of them is rarely above 4.5."""
    count = len(drawn)
    of_mean = (drawn.mean(0) - mean) / (variance / count).sqrt()
    of_variance = (drawn.var(0) / variance - 1) / math.sqrt(2 / count)
    ratio = float((drawn.var(0) / variance).mean())
    return "variance ratio 1", f"{ratio:.5f}", float(torch.cat([of_mean, of_variance]).abs().max()), 4.5


@_check("Samplers (in standard errors)", "DiagonalPrecision.sample")
def _sample(place: Place) -> tuple[Any, Any, float, float]:
    mean = place.normal(20)
    precision = DiagonalPrecision(mean.expand(20_000, 20))
    precision.precision.copy_((place.normal(20).square() + 0.1).expand(20_000, 20))
    return _moments(precision.sample(mean, place.stream()), mean, precision.variance()[0])


@_check("Samplers (in standard errors)", "Ornstein-Uhlenbeck: keeps the prior")
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


@_check("Samplers (in standard errors)", "Langevin: energy E[C] = dς²/2β")
def _langevin_energy(place: Place) -> tuple[Any, Any, float, float]:
    stiffness, stream = place.tensor([1.0, 4.0]), place.stream()
    x = v = place.tensor([[0.0, 0.0]]).expand(4000, 2)
    for _ in range(300):  # 30 time units: 15 times the slowest relaxation 1/β
        x, v = langevin(x, v, lambda x: stiffness * x, 0.1, damping=0.5, noise=0.3, generator=stream)
    energies = (0.5 * (v.square() + stiffness * x.square())).sum(-1)
    found = float(energies.mean())
    return 0.18, found, abs(found - 0.18) / (float(energies.std()) / math.sqrt(4000)), 4.5


# -------------------------------------------------------------------------------------------------- networks
@_check("Networks", "3 stacked replicas = 3 networks")
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


@_check("Networks", "gaussianize, then collapse")
def _collapse(place: Place) -> tuple[Any, Any, float, float]:
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).to(place.device, place.dtype)
    inputs = place.normal(8, 5)
    before = net(inputs).detach()
    after = collapse(gaussianize(net))(inputs).detach()
    error = float((after - before).abs().max())
    return "equal", f"{error:.1e}", error, 0.0
