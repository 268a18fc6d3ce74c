"""The energy of learning: kept by the motion, taken by friction, given by noise, and broken by a switch.

    python examples/conserved_inertia.py --out conserved_inertia.png

Prints the numbers and draws four pictures: energy drift of symplectic integrators; momentum descent with the
energy that the discrete law predicts; Langevin motion on its way to the energy of equilibrium; and a network on
permuted digits, where the defect of the energy jumps at each new task.
"""

import argparse
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import clagrange
from clagrange import mechanics

CURVATURE = torch.tensor([1.0, 4.0], dtype=torch.float64)
START = torch.tensor([2.0, 1.0], dtype=torch.float64)
REST = torch.zeros(2, dtype=torch.float64)
STEPS = (0.1, 0.05, 0.025)
BLUE, ROSE, SAND, GREEN, INK, PALE = "#332288", "#CC6677", "#C4A93A", "#117733", "#333333", "#BBBBBB"


def loss_of(position: Tensor) -> Tensor:
    """½(θ₁² + 4θ₂²)."""
    return 0.5 * (CURVATURE * position.square()).sum(-1)


def gradient_of(position: Tensor) -> Tensor:
    """Its gradient."""
    return CURVATURE * position


def drifts() -> dict[str, tuple[Tensor, Tensor]]:
    """Times and |C(t)/C(0) − 1| for Verlet at three steps and Forest-Ruth at the largest."""
    found = {}
    for name, method, step in [
        *((f"Verlet, h = {step:g}", mechanics.velocity_verlet, step) for step in STEPS),
        ("Forest-Ruth, h = 0.1", mechanics.forest_ruth, 0.1),
    ]:
        run = mechanics.integrate(method, START, REST, gradient_of, step=step, steps=round(20.0 / step))
        energy = run.energy(loss_of)
        found[name] = (run.times, (energy / energy[0] - 1.0).abs())
    return found


def momentum_descent(momentum: float, step_size: float = 0.01, steps: int = 250) -> tuple[Tensor, Tensor, Tensor]:
    """Times, measured energy, and energy by adding up the predicted changes, from a torch optimizer."""
    theta = START.clone().requires_grad_(True)
    optimizer = torch.optim.SGD([theta], lr=step_size, momentum=momentum)
    meter = mechanics.InertiaMeter(optimizer)
    measured, predicted = [], []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(theta)
        loss.backward()
        meter.observe(loss)
        optimizer.step()
        reading = meter.reading
        assert reading is not None
        measured.append(reading.energy)
        predicted.append(reading.energy if reading.predicted is None else predicted[-1] + reading.predicted)
    times = math.sqrt(step_size) * torch.arange(1, steps + 1)
    return times, torch.tensor(measured, dtype=torch.float64), torch.tensor(predicted, dtype=torch.float64)


def langevin_motion(
    damping: float = 0.5, noise: float = 0.3, particles: int = 4000
) -> tuple[Tensor, Tensor, Tensor]:
    """Times, mean energy over particles and its standard error, from rest at the minimum."""
    step = partial(mechanics.langevin, damping=damping, noise=noise, generator=torch.Generator().manual_seed(0))
    still = torch.zeros(particles, 2, dtype=torch.float64)
    run = mechanics.integrate(step, still, still, gradient_of, step=0.1, steps=250)
    energy = run.energy(loss_of)
    return run.times, energy.mean(1), energy.std(1) / math.sqrt(particles)


def network_run(tasks: int = 3, epochs: int = 6) -> tuple[list[float], list[float], int]:
    """Loss and surprise of every step of a network on permuted digits, and the steps of a task."""
    stream = clagrange.tasks.PermutedDigits(tasks=tasks, examples=1000, batch_size=20, seed=0)
    net = clagrange.networks.mlp(64, [64], 10, seed=0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
    meter = mechanics.InertiaMeter(optimizer, noise=True)
    losses, surprises = [], []
    for number in range(tasks):
        task = stream.task(number)
        for _ in range(epochs):
            for chosen in stream.order(number, 0):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(net(task.inputs[chosen]), task.targets[chosen])
                loss.backward()
                meter.observe(loss)
                optimizer.step()
                assert meter.reading is not None
                losses.append(meter.reading.loss)
                surprises.append(meter.reading.surprise or 0.0)
    return losses, surprises, epochs * stream.steps


def draw(out: Path) -> dict[str, Any]:
    """Compute everything, draw the picture, return the numbers."""
    numbers: dict[str, Any] = {}
    figure = Figure(figsize=(11, 7.6), layout="constrained")
    axes = figure.subplots(2, 2)

    axis = axes[0, 0]
    for (name, (times, drift)), colour in zip(drifts().items(), (ROSE, SAND, GREEN, BLUE), strict=True):
        axis.semilogy(times[1:], drift[1:].clamp(min=1e-9), color=colour, lw=1.3, label=name)
        numbers[f"drift {name}"] = float(drift.max())
    axis.set(
        title="Symplectic motion keeps the energy", xlabel="time", ylabel="|C(t)/C(0) − 1|", ylim=(1e-7, 0.1)
    )
    axis.legend(ncols=2, loc="upper center")

    axis = axes[0, 1]
    worst = 0.0
    for momentum, colour in ((1.0, BLUE), (0.99, GREEN), (0.95, SAND), (0.8, ROSE)):
        times, measured, predicted = momentum_descent(momentum)
        axis.plot(times, measured, color=colour, lw=1.5, label=f"m = {momentum:g}")
        axis.plot(times[::10], predicted[::10], "o", color=colour, ms=3.5, mfc="white")
        worst = max(worst, float((measured - predicted).abs().max()))
        if momentum == 1.0:
            numbers["largest change of the energy, m = 1"] = float((measured - measured[0]).abs().max())
    numbers["largest difference, measured and predicted"] = worst
    axis.set(title="Momentum SGD: friction takes it", xlabel="time k√ε", ylabel="energy", ylim=(0, 4.8))
    axis.legend(title="line: measured\ndots: discrete law", loc="upper right", bbox_to_anchor=(1.0, 0.86))

    axis = axes[1, 0]
    times, mean, error = langevin_motion()
    final = mechanics.langevin_energy(2, damping=0.5, noise=0.3)
    axis.fill_between(times, mean - 3 * error, mean + 3 * error, color=BLUE, alpha=0.25, lw=0)
    axis.plot(times, mean, color=BLUE, lw=1.5, label="4,000 particles, ± 3 standard errors")
    axis.axhline(final, color=INK, lw=1, ls="--", label="dς²/(2β) = 0.18")
    axis.plot(times, 0.09 * times, color=ROSE, lw=1, ls=":", label="½tr(ΣΣᵀ)·t: noise alone")
    axis.set(title="Langevin motion: noise gives it", xlabel="time", ylabel="mean energy", ylim=(0, 0.21))
    axis.legend(loc="lower right")
    numbers["stationary energy, Langevin"] = float(mean[-1])
    numbers["its standard error"] = float(error[-1])

    axis = axes[1, 1]
    losses, surprises, per_task = network_run()
    axis.plot(surprises, color=BLUE, lw=0.8)
    for start in range(per_task, len(losses), per_task):
        axis.axvline(start, color=PALE, lw=6, alpha=0.5, zorder=0)
        numbers[f"surprise at the switch after {start} steps"] = surprises[start]
        axis.annotate(
            "new task",
            (start, surprises[start]),
            xytext=(8, -4),
            textcoords="offset points",
            color=INK,
            fontsize=9,
        )
    ordinary = [abs(s) for i, s in enumerate(surprises) if i % per_task > 60]
    numbers["largest other surprise"] = max(ordinary)
    axis.set(
        title="A network on permuted digits: the defect jumps at a switch",
        xlabel="step",
        ylabel="defect (running standard deviations)",
    )
    other = axis.twinx()
    other.plot(losses, color=ROSE, lw=0.5, alpha=0.5)
    other.set_ylabel("loss", color=ROSE)
    other.set_ylim(0, 4 * max(losses))
    other.set_yticks([0, 1, 2])

    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.title.set_fontsize(11)
        if axis.get_legend():
            axis.get_legend().set_frame_on(False)
    other.spines[["top"]].set_visible(False)
    figure.savefig(out, dpi=130, facecolor="white")
    return numbers


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the example from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=Path("conserved_inertia.png"), help="where the picture goes")
    out = parser.parse_args(arguments).out
    numbers = draw(out)
    for name, value in numbers.items():
        print(f"{name:45s} {value:.4g}")
    print(f"picture: {out}")
    return numbers


if __name__ == "__main__":
    main()
