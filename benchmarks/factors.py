"""Inverses of Kronecker factors: time, accuracy, definiteness; and factorwise relaxation beside the exact flow.

    python benchmarks/factors.py [--store benchmarks/factors.json] [--repetitions 7]

A factor is averaged with rate .01 from batches of 64 rows in float32, as during training, and every ten steps
something is done about its damped inverse X of M = F + damping. The reference is M⁻¹ of the same rows in float64,
at every step where X is used. "share" is the range of the eigenvalues of M^{1/2} X M^{1/2}: what a step along X
is beside that along M⁻¹, direction by direction: 1 is exact, below 0 the step goes uphill.
"""

import argparse
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from speed import medians
from torch import Tensor, nn

from clagrange.gaussian import KroneckerPrecision
from clagrange.gaussian.factors import damped_inverse, follow
from clagrange.gaussian.kronecker import Factors
from clagrange.networks import mlp
from clagrange.study.files import write_json
from clagrange.study.machine import environment
from clagrange.tasks import PermutedDigits

RATE, BATCH, INTERVAL = 0.01, 64, 10
WIDTHS = (64, 256, 1024)
BEFORE = 64
"""Batches of which the factor is the mean at the start."""
DAMPINGS = (1e-2, 1e-6)
"""In units of the mean of the diagonal at the start."""


# ------------------------------------------------------------------------------------------------ trajectories
def layer(width: int, stream: torch.Generator) -> Iterator[Tensor]:
    """Inputs of a hidden layer: rectified correlated features (standard deviations falling to 1 %), and a 1."""
    deviations = torch.logspace(0, -2, width) * math.sqrt(width)
    axes = torch.linalg.qr(torch.randn(width, width, generator=stream))[0]
    while True:
        features = torch.relu(torch.randn(BATCH, width, generator=stream) * deviations @ axes)
        yield torch.cat([features[:, 1:], torch.ones(BATCH, 1)], 1)


def ill_conditioned(width: int, stream: torch.Generator) -> Iterator[Tensor]:
    """Rows whose second moment has the condition 1e8."""
    axes = torch.linalg.qr(torch.randn(width, width, generator=stream))[0]
    while True:
        yield torch.randn(BATCH, width, generator=stream) * torch.logspace(0, -4, width) @ axes


def dead_units(width: int, stream: torch.Generator) -> Iterator[Tensor]:
    """A hidden layer of which half the units are dead, and some so small that their squares are denormal."""
    scale = torch.where(torch.arange(width) % 2 == 0, 0.0, 1.0)
    scale[1::16] = 1e-22
    return (rows * scale for rows in layer(width, stream))


def nearly_constant(width: int, stream: torch.Generator) -> Iterator[Tensor]:
    """Inputs that are all 1 but for a thousandth: a factor that is singular in float32."""
    while True:
        yield 1.0 + 1e-3 * torch.randn(BATCH, width, generator=stream)


def outliers(width: int, stream: torch.Generator) -> Iterator[Tensor]:
    """A hidden layer in which from now on one batch of ten is a thousand times as large as the others."""
    for step, rows in enumerate(layer(width, stream), -BEFORE):
        yield rows * (1e3 if step >= 0 and step % INTERVAL == 3 else 1.0)


TRAJECTORIES: dict[str, Callable[[int, torch.Generator], Iterator[Tensor]]] = {
    "hidden layer": layer,
    "condition 1e8": ill_conditioned,
    "dead units, denormals": dead_units,
    "nearly constant": nearly_constant,
    "outliers": outliers,
}


# --------------------------------------------------------------------------------------------------- methods
class Method(ABC):
    """Something that keeps a damped inverse of a factor.

    Args:
        factor: F at the start.
        damping: to be added to its diagonal.
    """

    def __init__(self, factor: Tensor, damping: float) -> None:
        self.damping = damping
        self.inverse = self.made(factor)

    def made(self, factor: Tensor) -> Tensor:
        """The inverse, anew."""
        return damped_inverse(factor, torch.full((1, 1), self.damping), diagonal=False)

    @abstractmethod
    def step(self, number: int, factor: Tensor, rows: Tensor) -> None:
        """Take notice of a factor into which rows went, of which it was moved towards the mean square."""


class Cholesky(Method):
    """Made anew every ten steps, with the relative damping that rounding cannot overcome."""

    def step(self, number: int, factor: Tensor, rows: Tensor) -> None:
        """Every ten steps."""
        if number % INTERVAL == 0:
            self.inverse = self.made(factor)


class Followed(Cholesky):
    """What the package does: between it follows the rows by Woodbury's identity, where they are fewer than n."""

    def step(self, number: int, factor: Tensor, rows: Tensor) -> None:
        """Anew every ten steps, or in every step where that is no dearer than to follow."""
        if number % INTERVAL == 0 or len(factor) <= BATCH:
            self.inverse = self.made(factor)
        else:
            follow(self.inverse, rows / BATCH**0.5, RATE)


class Escalating(Cholesky):
    """By Cholesky with only the damping asked for, and ten times more with every failure."""

    def made(self, factor: Tensor) -> Tensor:
        """As often as it takes."""
        identity, extra = torch.eye(len(factor)), 0.0
        for jitter in (1e-6, 1e-5, 1e-4, 1e-3, 1e-2):
            root, failed = torch.linalg.cholesky_ex(factor + (self.damping + extra) * identity)
            if not failed:
                break
            extra = jitter * float(factor.diagonal().max())
        return torch.cholesky_inverse(root)


class Eigenvectors(Cholesky):
    """By eigenvectors, with eigenvalues below 0 cut off."""

    dtype = torch.float32

    def made(self, factor: Tensor) -> Tensor:
        """NaN where LAPACK gives up."""
        try:
            values, vectors = torch.linalg.eigh(factor.to(self.dtype))
        except torch.linalg.LinAlgError:
            return torch.full_like(factor, math.nan)
        return (vectors / (values.clamp(min=0.0) + self.damping) @ vectors.mT).float()


class DoubleEigenvectors(Eigenvectors):
    """The same in float64."""

    dtype = torch.float64


class InverseFree(Method):
    """K ← K(I − ½r(KᵀMK − I)) with X = KKᵀ: positive definite by form, no inversion, first order in r (SINGD)."""

    def __init__(self, factor: Tensor, damping: float) -> None:
        super().__init__(factor, damping)
        self.root = torch.linalg.cholesky(self.inverse)

    def step(self, number: int, factor: Tensor, rows: Tensor) -> None:
        """With the rows of every step."""
        projected = rows @ self.root
        move = projected.mT @ projected / BATCH + self.damping * self.root.mT @ self.root
        self.root = self.root - 0.5 * RATE * (self.root @ move - self.root)
        self.inverse = self.root @ self.root.mT


class Woodbury(Method):
    """Following alone, never made anew; the damping returns as rows too, on a few coordinates in every step."""

    def step(self, number: int, factor: Tensor, rows: Tensor) -> None:
        """With the rows of every step and BATCH rows of damping."""
        width = factor.shape[-1]
        chosen = torch.arange(number * BATCH, (number + 1) * BATCH) % width
        damping = torch.zeros(BATCH, width)
        damping[torch.arange(BATCH), chosen] = (self.damping * width / BATCH) ** 0.5
        follow(self.inverse, torch.cat([rows / BATCH**0.5, damping]), RATE)


METHODS: dict[str, type[Method]] = {
    "Cholesky": Cholesky,
    "Cholesky, followed between": Followed,
    "Cholesky, more damping on failure": Escalating,
    "eigenvectors": Eigenvectors,
    "eigenvectors in float64": DoubleEigenvectors,
    "inverse-free (SINGD)": InverseFree,
    "Woodbury alone": Woodbury,
}


# -------------------------------------------------------------------------------------------------- measuring
def accuracy(trajectory: str, width: int, relative_damping: float, steps: int) -> dict[str, list[float] | None]:
    """Least and largest share of every method over the last interval of a trajectory; None if not finite."""
    batches = TRAJECTORIES[trajectory](width, torch.Generator().manual_seed(0))
    first = torch.cat([next(batches) for _ in range(BEFORE)])
    factor = first.mT @ first / len(first)
    exact = first.double().mT @ first.double() / len(first)
    damping = relative_damping * float(exact.diagonal().mean())
    methods = {name: form(factor, damping) for name, form in METHODS.items()}
    shares: dict[str, list[float] | None] = {}
    for step in range(steps):
        rows = next(batches)
        factor.lerp_(rows.mT @ rows / BATCH, RATE)
        exact.lerp_(rows.double().mT @ rows.double() / BATCH, RATE)
        root = torch.linalg.cholesky(exact + damping * torch.eye(width, dtype=torch.float64))
        for name, method in methods.items():
            method.step(step, factor, rows)
            if step < steps - INTERVAL or (width > 256 and step % 3):
                continue
            inverse = method.inverse.double()
            before = shares.get(name, [math.inf, -math.inf])
            if before is None or not inverse.isfinite().all():
                shares[name] = None
                continue
            values = torch.linalg.eigvalsh(root.mT @ inverse @ root)
            shares[name] = [min(before[0], float(values[0])), max(before[1], float(values[-1]))]
    return shares


def times(width: int, repetitions: int) -> dict[str, float]:
    """Median seconds that each method takes for ten steps, beside the averaging of the factor itself."""
    batches = layer(width, torch.Generator().manual_seed(0))
    rows = [next(batches) for _ in range(INTERVAL)]
    first = torch.cat([next(batches) for _ in range(BEFORE)])
    factor = first.mT @ first / len(first)
    methods = {name: form(factor, 0.1) for name, form in METHODS.items()}

    def interval(method: Method) -> Callable[[], None]:
        def run() -> None:
            for number in range(INTERVAL):
                method.step(number, factor, rows[number])

        return run

    def averaging() -> None:
        for batch in rows:
            factor.lerp_(batch.mT @ batch / BATCH, RATE)

    actions: dict[str, Callable[[], Any]] = {name: interval(method) for name, method in methods.items()}
    return medians({"averaging the factor": averaging, **actions}, repetitions)


def joint_steps() -> list[dict[str, Any]]:
    """Relative error of float32 steps of the precision, along its stiffest and softest and two mixed axes.

    In the posterior's metric, for both dampings, by the condition b_max·a_max/δ of the whole precision. What is
    exact for factored damping is what its own formula gives in float64.
    """
    table = []
    sizes, stream = (24, 48), torch.Generator().manual_seed(0)
    axes = [torch.linalg.qr(torch.randn(size, size, generator=stream, dtype=torch.float64))[0] for size in sizes]
    for condition in (1e2, 1e4, 1e6, 1e8, 1e10):
        row: dict[str, Any] = {"condition": condition}
        for damping in ("exact", "factored"):
            steps = []
            for dtype in (torch.float32, torch.float64):
                mean = torch.zeros(sizes, dtype=dtype)
                precision = KroneckerPrecision(mean, prior_variance=condition, damping=damping)
                spectra = [torch.logspace(0, -8, size, dtype=torch.float64) for size in sizes]
                factors = [
                    (axis * values @ axis.mT).to(dtype) for axis, values in zip(axes, spectra, strict=True)
                ]
                precision.observe(Factors(factors[0], factors[1], 0))
                precision.relax(1.0, 1.0)
                steps.append(
                    [
                        precision.displacement(
                            mean,
                            torch.outer(axes[0][:, i], axes[1][:, j]).to(dtype),
                            lr=1.0,
                            temperature=1.0,
                            prior_pull=0.0,
                        ).double()
                        for i in (0, -1)
                        for j in (0, -1)
                    ]
                )
            curvature = spectra[0][:, None] * spectra[1] + 1.0 / condition
            errors = []
            for single, double in zip(*steps, strict=True):
                lengths = [
                    float((curvature * (axes[0].mT @ step @ axes[1]).square()).sum().sqrt())
                    for step in (single - double, double)
                ]
                errors.append(lengths[0] / lengths[1])
            row[damping] = errors
        table.append(row)
    return table


# --------------------------------------------------------------------------- factorwise relaxation and the flow
def recorded(units: int = 16, steps: int = 250, batch: int = 8) -> tuple[list[Tensor], list[Tensor], int]:
    """Rows x and per-example gradients d of the first layer of a network on two tasks of permuted digits.

    Returns:
        Rows x, rows d, of every step, and the step of the switch.
    """
    network = mlp(64, [units], 10)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    stream = PermutedDigits(tasks=2, seed=0)
    inputs, gradients = [], []
    for number in range(2):
        task = stream.task(number)
        for step in range(steps):
            chosen = torch.arange(step * batch, (step + 1) * batch) % len(task.targets)
            hidden = network[1](task.inputs[chosen])
            hidden.retain_grad()
            loss = nn.functional.cross_entropy(network[2:](hidden), task.targets[chosen])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            assert hidden.grad is not None
            inputs.append(torch.cat([task.inputs[chosen], torch.ones(batch, 1)], 1).double())
            gradients.append(batch * hidden.grad.double())
    return inputs, gradients, steps


def fisher(x: Tensor, d: Tensor) -> Tensor:
    """The mean over examples of (d ⊗ x)(d ⊗ x)ᵀ."""
    rows = torch.einsum("no,ni->noi", d, x).flatten(1)
    return rows.mT @ rows / len(rows)


def divergence(first: Tensor, second: Tensor) -> float:
    """KL(N(0, S_1⁻¹)‖N(0, S_2⁻¹)) per dimension, in nats."""
    roots = [torch.linalg.cholesky(matrix) for matrix in (first, second)]
    white = torch.linalg.solve_triangular(roots[0], roots[1], upper=False)
    logs = [root.diagonal().log().sum() for root in roots]
    return float((white.square().sum() - len(first)) / 2 + logs[0] - logs[1]) / len(first)


def relaxation() -> dict[str, Any]:
    """Relative error of the curvature, and divergence, of factors that relax each by itself, after a switch.

    Beside two flows of the dense matrix from the same start: toward the product of each batch's factors (what the
    relaxation alone costs), and toward the mean of (d ⊗ x)(d ⊗ x)ᵀ (with what the product form costs).
    """
    inputs, gradients, switch = recorded()
    batch = len(inputs[0])
    observed = [(d.mT @ d / batch, x.mT @ x / batch) for x, d in zip(inputs, gradients, strict=True)]
    temperature, prior_variance = 1 / 1600, 2 / 64
    prior = torch.eye(observed[0][0].shape[0] * observed[0][1].shape[0], dtype=torch.float64) / prior_variance
    table = []
    for rate in (0.003, 0.01, 0.03, 0.1):
        task = slice(switch // 2, switch)
        outputs, among_inputs = (torch.stack(side[task]).mean(0) for side in zip(*observed, strict=True))
        product = torch.kron(outputs, among_inputs)
        dense = torch.stack([fisher(*rows) for rows in zip(inputs[task], gradients[task], strict=True)]).mean(0)
        for step in range(switch // 2, len(inputs)):
            G, A = observed[step]
            outputs, among_inputs = outputs.lerp(G, rate), among_inputs.lerp(A, rate)
            product.lerp_(torch.kron(G, A), rate)
            dense.lerp_(fisher(inputs[step], gradients[step]), rate)
            since = step + 1 - switch
            if since in (0, 10, 30, 100, 250):
                factorwise = torch.kron(outputs, among_inputs)
                table.append(
                    {
                        "rate": rate,
                        "steps": since,
                        "error": float((factorwise - product).norm() / product.norm()),
                        "divergence": divergence(factorwise / temperature + prior, product / temperature + prior),
                        "dense_error": float((factorwise - dense).norm() / dense.norm()),
                        "dense_divergence": divergence(
                            factorwise / temperature + prior, dense / temperature + prior
                        ),
                    }
                )
    return {"jump": jump(observed, switch), "trajectory": table}


def jump(observed: list[tuple[Tensor, Tensor]], switch: int) -> list[dict[str, float]]:
    """The same without noise: from the mean factors of one task to those of the next.

    With ρ = (1 − r)^t left of the start the difference is exactly ρ(1 − ρ)(G_1 − G_0) ⊗ (A_1 − A_0), whatever the
    rate: at most a quarter, half-way.
    """
    (G_0, A_0), (G_1, A_1) = (
        [torch.stack(side).mean(0) for side in zip(*observed[start : start + switch // 2], strict=True)]
        for start in (switch // 2, switch + switch // 2)
    )
    table = []
    for left in (0.9, 0.75, 0.5, 0.25, 0.1):
        exact = left * torch.kron(G_0, A_0) + (1 - left) * torch.kron(G_1, A_1)
        factorwise = torch.kron(G_1.lerp(G_0, left), A_1.lerp(A_0, left))
        predicted = left * (1 - left) * (G_1 - G_0).norm() * (A_1 - A_0).norm() / exact.norm()
        error = (factorwise - exact).norm() / exact.norm()
        table.append({"left": left, "error": float(error), "predicted": float(predicted)})
    return table


# ------------------------------------------------------------------------------------------------------- main
def main() -> None:
    """Measure, print, and store when asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, default=None, help="JSON file for the figures")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--widths", type=int, nargs="+", default=list(WIDTHS))
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict[str, Any] = {"environment": environment(), "milliseconds_per_ten_steps": {}, "share": []}

    print("Milliseconds for ten steps, one thread; at widths " + ", ".join(map(str, chosen.widths)))
    seconds = {width: times(width, chosen.repetitions) for width in chosen.widths}
    for name in seconds[chosen.widths[0]]:
        row = [1e3 * seconds[width][name] for width in chosen.widths]
        figures["milliseconds_per_ten_steps"][name] = row
        print(f"  {name:36s}" + "".join(f"{value:10.2f}" for value in row))

    print(
        "\nLeast and largest share of the exact step, over all directions, where the inverse is used; 1 is exact"
    )
    for trajectory in TRAJECTORIES:
        for damping in DAMPINGS:
            print(f"  {trajectory}, damping {damping:g} of the mean diagonal")
            shares = {width: accuracy(trajectory, width, damping, 4 * INTERVAL) for width in chosen.widths}
            for name in METHODS:
                row = [shares[width][name] for width in chosen.widths]
                cells = ["not finite" if cell is None else f"{cell[0]:.3g} .. {cell[1]:.3g}" for cell in row]
                print(f"    {name:36s}" + "".join(f"{cell:>22s}" for cell in cells), flush=True)
                figures["share"].append(
                    {"trajectory": trajectory, "damping": damping, "method": name, "range": row}
                )

    print("\nRelative error of float32 steps along stiff-stiff, stiff-soft, soft-stiff, soft-soft axes")
    figures["joint_steps"] = joint_steps()
    for row in figures["joint_steps"]:
        cells = (f"{name} " + " ".join(f"{error:8.1e}" for error in row[name]) for name in ("exact", "factored"))
        print(f"  condition {row['condition']:8.0e}   " + "   ".join(cells))

    print("\nFactors that relax each by itself beside the flow of their product, digits, first layer of 64-16-10")
    figures["relaxation"] = relaxation()
    for row in figures["relaxation"]["jump"]:
        print("  without noise: " + "  ".join(f"{name} {value:.3g}" for name, value in row.items()))
    for row in figures["relaxation"]["trajectory"]:
        print("  " + "  ".join(f"{name} {value:.3g}" for name, value in row.items()))
    if chosen.store is not None:
        write_json(chosen.store, figures)


if __name__ == "__main__":
    main()
