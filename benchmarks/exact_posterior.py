"""How close the stationary posterior of the Euler-Lagrange flow is to the exact one of linear regression.

    python benchmarks/exact_posterior.py [--store benchmarks/exact_posterior.json]

Targets y = Wx + noise of variance ν, prior N(0, σ_p²) on every weight: the posterior is Gaussian in closed form.
The loss is the mean of ½‖y − Wx‖²/u with u = 1 (squared error) or u = ν (nats); the temperature that makes the
flow Bayesian is T = (ν/u)/n. First with exact curvature, the full batch and the flow's own rules, where it must
agree; then what every estimator and approximation of the package costs. The divergence KL(flow‖exact), in nats
per weight, is split into the parts of the variances and of the mean, averaged over the last half of the steps.
"""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import clagrange
from clagrange.gaussian import (
    Diagonal,
    DiagonalPrecision,
    GaussianLinear,
    Kronecker,
    KroneckerPrecision,
    Structure,
)
from clagrange.gaussian.kronecker import Factors
from clagrange.optim import EulerLagrange
from clagrange.study.files import write_json
from clagrange.study.machine import environment


# -------------------------------------------------------------------------------------------------- the problem
@dataclass(frozen=True)
class Regression:
    """A regression with correlated inputs, and its exact posterior N(mean, (I ⊗ precision)⁻¹).

    Attributes:
        inputs: X with a 1 as last column, (n, in + 1).
        targets: Y, (n, out).
        noise: ν.
        prior_variance: σ_p².
    """

    inputs: Tensor
    targets: Tensor
    noise: float
    prior_variance: float

    @property
    def moment(self) -> Tensor:
        """XᵀX/n."""
        return self.inputs.mT @ self.inputs / len(self.inputs)

    @property
    def precision(self) -> Tensor:
        """XᵀX/ν + I/σ_p², the same for every output."""
        prior = torch.eye(self.inputs.shape[1], dtype=torch.float64) / self.prior_variance
        return self.inputs.mT @ self.inputs / self.noise + prior

    @property
    def mean(self) -> Tensor:
        """(out, in + 1)."""
        return torch.linalg.solve(self.precision, self.inputs.mT @ self.targets / self.noise).mT

    def gradient(self, weights: Tensor, unit: float) -> Tensor:
        """Of the mean loss over all examples, (out, in + 1)."""
        return (weights @ self.moment - self.targets.mT @ self.inputs / len(self.inputs)) / unit

    def temperature(self, unit: float) -> float:
        """T = (ν/u)/n."""
        return self.noise / unit / len(self.inputs)


def regression(
    seed: int = 0, examples: int = 200, features: int = 6, outputs: int = 2, noise: float = 0.25
) -> Regression:
    """Inputs of standard deviations 1 to 0.1 with correlations, a random linear map, and noise."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mixed = draw(examples, features) * torch.logspace(0, -1, features, dtype=torch.float64)
    mixed = mixed @ torch.linalg.qr(draw(features, features))[0]
    inputs = torch.cat([mixed, torch.ones(examples, 1, dtype=torch.float64)], 1)
    prior_variance = 2 / features
    weights = prior_variance**0.5 * draw(outputs, features + 1)
    targets = inputs @ weights.mT + noise**0.5 * draw(examples, outputs)
    return Regression(inputs, targets, noise, prior_variance)


# ---------------------------------------------------------------------------------------- distance to the exact
def covariance(precision: DiagonalPrecision | KroneckerPrecision) -> Tensor:
    """S⁻¹ as a matrix over the weights of a (out, in) precision, row after row."""
    count = precision.spectrum().numel()
    basis = torch.eye(count, dtype=torch.float64).view(count, *precision.spectrum().shape)
    return precision.solve(basis).reshape(count, count)


def divergence(
    problem: Regression, mean: Tensor, precision: DiagonalPrecision | KroneckerPrecision
) -> tuple[float, float]:
    """KL(N(mean, S⁻¹)‖exact) per weight, in nats: the parts of the variances and of the mean."""
    exact = torch.kron(torch.eye(problem.targets.shape[1], dtype=torch.float64), problem.precision)
    offset = (mean - problem.mean).flatten()
    return excess(exact @ covariance(precision)), float(offset @ exact @ offset) / (2 * len(exact))


def excess(product: Tensor) -> float:
    """½(tr P − D − log det P)/D of a precision times a covariance: the divergence of centred Gaussians."""
    count = len(product)
    return float(product.trace() - count - torch.linalg.slogdet(product)[1]) / (2 * count)


def variance_error(problem: Regression, precision: DiagonalPrecision | KroneckerPrecision) -> float:
    """Mean of |σ²/σ²_exact − 1| over the marginal variances."""
    exact = torch.linalg.inv(problem.precision).diagonal()
    return float((precision.variance() / exact - 1).abs().mean())


# ------------------------------------------------------------------------------------- the flow, all of it exact
def flow(
    problem: Regression,
    precision: DiagonalPrecision | KroneckerPrecision,
    *,
    unit: float = 1.0,
    steps: int = 2000,
    lr: float = 0.4,
    discount: float = math.inf,
) -> Tensor:
    """The stationary mean of the flow with exact curvature and the full batch; the precision is left there."""
    outputs = problem.targets.shape[1]
    temperature = problem.temperature(unit)
    mean = torch.zeros_like(problem.mean)
    fraction = clagrange.dynamics.relaxation_fraction(lr, discount)
    assert isinstance(fraction, float)
    for _ in range(steps):
        if isinstance(precision, DiagonalPrecision):
            precision.observe(problem.moment.diagonal().expand_as(mean) / unit, 0.9)
        else:
            gauss_newton = torch.eye(outputs, dtype=torch.float64) / unit
            precision.observe(Factors(gauss_newton, problem.moment, len(problem.inputs)), 0.9)
        precision.relax(temperature, fraction)
        mean = mean + precision.displacement(
            mean, problem.gradient(mean, unit), lr=lr, temperature=temperature, discount=discount
        )
    return mean


def fresh(problem: Regression, structure: str, **settings: Any) -> DiagonalPrecision | KroneckerPrecision:
    """A precision at the prior."""
    form = DiagonalPrecision if structure == "diagonal" else KroneckerPrecision
    return form(torch.zeros_like(problem.mean), prior_variance=problem.prior_variance, **settings)


EXACT: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "diagonal": ("diagonal", {}, {}),
    "diagonal, loss in nats": ("diagonal", {}, {"unit": 0.25}),
    "diagonal, discount 0.1": ("diagonal", {}, {"discount": 0.1}),
    "Kronecker, exact damping": ("kronecker", {"damping": "exact"}, {}),
    "Kronecker, exact damping, loss in nats": ("kronecker", {"damping": "exact"}, {"unit": 0.25}),
    "Kronecker, exact damping, discount 0.1": ("kronecker", {"damping": "exact"}, {"discount": 0.1}),
    "Kronecker, factored damping": ("kronecker", {"refresh_every": 1}, {}),
    "Kronecker, factored damping, refreshed every 10": ("kronecker", {}, {}),
}
"""Structure, settings of the precision and of the flow."""


# ------------------------------------------------------------------- what estimators and approximations cost
def relaxed(problem: Regression, rate: float, batch: int = 20, steps: int = 4000) -> dict[str, dict[str, float]]:
    """Precisions at the exact mean from factors of minibatches: each factor relaxed by itself, or S as one."""
    torch.manual_seed(0)
    temperature = problem.temperature(problem.noise)
    factorwise = fresh(problem, "kronecker")
    curvature = torch.zeros(2 * [problem.mean.numel()], dtype=torch.float64)
    prior = torch.eye(len(curvature), dtype=torch.float64) / problem.prior_variance
    exact = torch.kron(torch.eye(problem.targets.shape[1], dtype=torch.float64), problem.precision)
    totals, counted = torch.zeros(4, dtype=torch.float64), 0
    for step in range(steps):
        chosen = torch.randperm(len(problem.inputs))[:batch]
        x = problem.inputs[chosen]
        d = (x @ problem.mean.mT - problem.targets[chosen]) / problem.noise
        factors = Factors(d.mT @ d / batch, x.mT @ x / batch, batch)
        factorwise.observe(factors, 0.0)
        factorwise.relax(temperature, rate)
        curvature.lerp_(torch.kron(factors.outputs, factors.inputs), rate)
        if step >= steps // 2 and step % 25 == 0:
            for index, covariances in enumerate(
                (covariance(factorwise), torch.linalg.inv(curvature / temperature + prior))
            ):
                error = (covariances.diagonal() / torch.linalg.inv(exact).diagonal() - 1).abs().mean()
                totals[2 * index] += excess(exact @ covariances)
                totals[2 * index + 1] += error
            counted += 1
    values = (totals / counted).tolist()
    return {
        "factorwise": {"variances": values[0], "mean": 0.0, "variance_error": values[1]},
        "as one": {"variances": values[2], "mean": 0.0, "variance_error": values[3]},
    }


def trained(
    problem: Regression,
    structure: str | Structure,
    *,
    batch: int = 20,
    steps: int = 4000,
    unit: float | None = None,
    **settings: Any,
) -> dict[str, float]:
    """Divergence of the optimizer's posterior, on minibatches, averaged over the last half of the steps."""
    torch.manual_seed(0)
    unit = problem.noise if unit is None else unit
    examples, features = problem.inputs.shape
    layer = nn.Linear(features - 1, problem.targets.shape[1]).double()
    net = clagrange.gaussianize(layer, structure, prior_variance=problem.prior_variance * (features - 1) / 2)
    assert isinstance(net, GaussianLinear)
    settings = {"lr": 0.01, "temperature": problem.temperature(unit), **settings}
    optimizer = EulerLagrange(net, **settings)
    totals, counted = torch.zeros(3, dtype=torch.float64), 0
    for step in range(steps):
        chosen = torch.randperm(examples)[:batch]
        errors = problem.targets[chosen] - net(problem.inputs[chosen, :-1])
        optimizer.zero_grad()
        (0.5 / unit * errors.square().sum(1)).mean().backward()
        optimizer.step()
        if step >= steps // 2 and step % 25 == 0:
            mean = torch.cat([net.weight, net.bias[:, None]], 1).detach()
            precision = joint_precision(problem, net)
            totals += torch.tensor([*divergence(problem, mean, precision), variance_error(problem, precision)])
            counted += 1
    variances, of_mean, error = (totals / counted).tolist()
    return {"variances": variances, "mean": of_mean, "variance_error": error}


def joint_precision(problem: Regression, net: GaussianLinear) -> DiagonalPrecision | KroneckerPrecision:
    """The precision of weight and bias as one."""
    precision = net.precision_of("weight")
    if isinstance(precision, KroneckerPrecision):
        return precision
    joint = fresh(problem, "diagonal")
    assert isinstance(joint, DiagonalPrecision)
    joint.precision.copy_(torch.cat([net.weight_precision.precision, net.bias_precision.precision[:, None]], 1))
    return joint


EXACT_DAMPING = Kronecker(damping="exact")
ARMS: dict[str, tuple[str | Structure, dict[str, Any]]] = {
    "diagonal, n g²": ("diagonal", {}),
    "diagonal, n g², full batch": ("diagonal", {"batch": 200}),
    "diagonal, n g², batch 1": ("diagonal", {"batch": 1}),
    "diagonal, per example": (Diagonal("per_example"), {}),
    "diagonal, per example, full batch": (Diagonal("per_example"), {"batch": 200}),
    "diagonal, sampled": (Diagonal("sampled", sampling="batch"), {"curvature_decay": 0.999}),
    "diagonal, n g², squared error": ("diagonal", {"unit": 1.0}),
    "diagonal, n g², discount 0.1": ("diagonal", {"discount": 0.1}),
    "diagonal, n g², prior's pull 0.1": ("diagonal", {"prior_pull": 0.1}),
    "Kronecker": (EXACT_DAMPING, {}),
    "Kronecker, full batch": (EXACT_DAMPING, {"batch": 200}),
    "Kronecker, batch 4": (EXACT_DAMPING, {"batch": 4}),
    "Kronecker, lr 0.001": (EXACT_DAMPING, {"lr": 0.001, "steps": 8000}),
    "Kronecker, lr 0.1": (EXACT_DAMPING, {"lr": 0.1}),
    "Kronecker, rate of the factors 0.1": (EXACT_DAMPING, {"variance_rate": 0.1}),
    "Kronecker, squared error": (EXACT_DAMPING, {"unit": 1.0}),
    "Kronecker, discount 0.1": (EXACT_DAMPING, {"discount": 0.1}),
    "Kronecker, prior's pull 0.1": (EXACT_DAMPING, {"prior_pull": 0.1}),
    "Kronecker, trust region 0.1": (EXACT_DAMPING, {"trust_region": 0.1}),
    "Kronecker, no trust region": (EXACT_DAMPING, {"trust_region": math.inf}),
    "Kronecker, factored damping": ("kronecker", {}),
    "Kronecker, factored damping, full batch": ("kronecker", {"batch": 200}),
}
"""Structure of the precision and what differs from batches of 20 of 200, lr 0.01, loss in nats."""


def main() -> None:
    """Measure, print, and store when asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, default=None, help="JSON file for the figures")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    problem = regression()
    figures: dict[str, Any] = {"environment": environment(), "exact": {}, "relaxed": {}, "optimizer": {}}
    header = f"{'':52s}{'KL variances':>14s}{'KL mean':>12s}{'variances off':>15s}"

    def show(name: str, row: dict[str, float]) -> None:
        print(f"  {name:50s}{row['variances']:14.2e}{row['mean']:12.2e}{row['variance_error']:15.2e}", flush=True)

    print("The flow with exact curvature and the full batch (diagonal: the best there is, in the first column)")
    print(header)
    for name, (structure, settings, numbers) in EXACT.items():
        precision = fresh(problem, structure, **settings)
        parts = divergence(problem, flow(problem, precision, **numbers), precision)
        row = {"variances": parts[0], "mean": parts[1], "variance_error": variance_error(problem, precision)}
        figures["exact"][name] = row
        show(name, row)
    print("Factors of batches of 20 at the exact mean, rate of relaxation in brackets")
    print(header)
    for rate in (0.01, 0.1):
        for name, row in relaxed(problem, rate).items():
            figures["relaxed"][f"{name} ({rate:g})"] = row
            show(f"{name} ({rate:g})", row)
    print("The optimizer on batches of 20, lr 0.01, if not said otherwise")
    print(header)
    for name, (form, numbers) in ARMS.items():
        figures["optimizer"][name] = trained(problem, form, **numbers)
        show(name, figures["optimizer"][name])
    if chosen.store is not None:
        write_json(chosen.store, figures)


if __name__ == "__main__":
    main()
