"""Learning in the least time: which examples to see next, how fast the error falls, what a state is worth.

    python examples/least_time.py --out least_time.png

Prints the numbers and draws four pictures: planned against random order in linear regression; the same on real
digits, for the last layer of a network that was trained on other digits; Fermat's time to each error; and the
costates of a controlled path, which are the slope of Bellman's value.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

import clagrange
from clagrange import mechanics
from clagrange.metrics.intervals import interval
from clagrange.tasks.digits import digits

P, THRESHOLD = 10, 1.5
DIGITS_THRESHOLD = 0.35
BLUE, ROSE, GREEN, SAND, INK = "#332288", "#CC6677", "#117733", "#C4A93A", "#333333"
COLOURS = {"random": ROSE, "greedy": GREEN, "blocks of 10": BLUE}


def regression_orders(draws: int = 40, samples: int = 60) -> dict[str, np.ndarray]:
    """Expected test error (draws, samples) of linear regression, p = 10, noise 1, in three orders."""
    generator = torch.Generator().manual_seed(0)
    errors: dict[str, list[list[float]]] = {"random": [], "greedy": [], "planned": []}
    for _ in range(draws):
        random = F.normalize(torch.randn(samples, P, generator=generator, dtype=torch.float64), dim=1)
        rows = {
            "random": random,
            "greedy": mechanics.greedy_inputs(samples, random[:3]),
            "planned": mechanics.planned_inputs(samples, P, generator=generator),
        }
        for name, inputs in rows.items():
            errors[name].append([mechanics.linear_error(inputs[:n]) for n in range(1, samples + 1)])
    return {name: np.array(curves) for name, curves in errors.items()}


def other_digits(seed: int) -> tuple[Tensor, Tensor]:
    """The digits 5–9 as features of an MLP that learned 0–4, and their classes."""
    inputs, targets = digits()
    old = targets < 5
    seen, labels = inputs[old], targets[old]
    net = clagrange.networks.mlp(64, [32], 5, seed=seed)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(150):
        chosen = torch.randint(len(seen), (64,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(seen[chosen]), labels[chosen]).backward()
        optimizer.step()
    return mechanics.last_layer_features(net, inputs[~old]).double(), targets[~old] - 5


def digits_orders(seeds: int, samples: np.ndarray) -> dict[str, np.ndarray]:
    """Squared test error (seeds, points) of a last layer fitted to the first samples of three orders."""
    errors: dict[str, list[list[float]]] = {name: [] for name in COLOURS}
    for seed in range(seeds):
        features, targets = other_digits(seed)
        wanted = F.one_hot(targets, 5).double()
        shuffled = torch.randperm(len(features), generator=torch.Generator().manual_seed(100 + seed))
        test, train = shuffled[:300], shuffled[300:]
        pool, most = features[train], int(samples[-1])
        orders = {
            "random": list(range(most)),
            "greedy": list(mechanics.PlannedSampler(pool, samples=most)),
            "blocks of 10": list(mechanics.PlannedSampler(pool, samples=most, block=10)),
        }
        prior = float(pool.square().sum(1).mean()) / pool.shape[1] * torch.eye(pool.shape[1]).double()
        for name, order in orders.items():
            curve = []
            for count in samples:
                rows, labels = pool[order[:count]], wanted[train[order[:count]]]
                weights = torch.linalg.solve(rows.T @ rows + prior, rows.T @ labels)
                curve.append(float((features[test] @ weights - wanted[test]).square().sum(1).mean()))
            errors[name].append(curve)
    return {name: np.array(curves) for name, curves in errors.items()}


def controlled_path(steps: int = 20) -> tuple[Tensor, Tensor, Tensor]:
    """States (n + 1, 2), costates, and the slope of Bellman's value, on the best path of a driven oscillator."""
    size = {"dtype": torch.float64}
    transition = torch.tensor([[1.0, 0.3], [-0.3, 1.0]], **size)  # turns, and grows a little
    control = torch.tensor([[0.0], [0.3]], **size)
    cost, effort, end = 0.1 * torch.eye(2, **size), 0.2 * torch.eye(1, **size), torch.eye(2, **size)
    solved = mechanics.bellman_quadratic(transition, control, cost, effort, end, steps)
    start = torch.tensor([2.0, 0.0], **size)
    state, actions = start, []
    for step in range(steps):
        actions.append(solved.action(step, state))
        state = transition @ state + control @ actions[-1]
    found = mechanics.costates(
        start,
        actions,
        lambda s, a: transition @ s + control @ a,
        lambda s: -0.5 * s @ end @ s,
        lambda s, a: -0.5 * (s @ cost @ s + a @ effort @ a),
    )
    states = torch.stack(found.states)
    slopes = torch.stack([-solved.values[k] @ s for k, s in enumerate(found.states)])
    return states, torch.stack(found.costates), slopes


def draw(out: Path, seeds: int) -> dict[str, Any]:
    """Compute everything, draw the picture, return the numbers."""
    numbers: dict[str, Any] = {}
    figure = Figure(figsize=(11, 7.6), layout="constrained")
    axes = figure.subplots(2, 2)

    axis = axes[0, 0]
    curves, counts = regression_orders(), np.arange(1, 61)
    for name, colour in (("random", ROSE), ("greedy", GREEN), ("planned", BLUE)):
        errors = curves[name]
        shown = np.minimum(errors, 1e3)  # infinite before all directions are seen
        axis.fill_between(counts, *np.quantile(shown, [0.1, 0.9], axis=0), color=colour, alpha=0.2, lw=0)
        axis.plot(counts, np.median(shown, 0), color=colour, lw=1.5, label=name)
        times = mechanics.samples_to_threshold(errors, counts, THRESHOLD * (1 + 1e-12))
        numbers[f"regression, {name}: samples to {THRESHOLD}"] = times.interval.mean
    axis.plot(counts[9:], 1.0 + P / counts[9:], color=INK, lw=1, ls="--", label="σ²(1 + p/n)")
    least = mechanics.planned_samples(THRESHOLD, P)
    axis.plot([0, least, least], [THRESHOLD, THRESHOLD, 1.0], color=INK, lw=0.8, ls=":")
    axis.annotate(
        f"T(1.5) = pσ²/(δ − σ²) = {least:.0f}",
        (least, 1.02),
        xytext=(5, 0),
        textcoords="offset points",
        color=INK,
    )
    axis.set(
        title="Linear regression, p = 10: the order of the inputs",
        xlabel="samples",
        ylabel="test error / σ²",
        ylim=(1, 4),
        xlim=(5, 60),
    )
    axis.legend()

    axis = axes[0, 1]
    samples = np.arange(5, 151, 5)
    curves = digits_orders(seeds, samples)
    times = {
        name: mechanics.samples_to_threshold(errors, samples, DIGITS_THRESHOLD) for name, errors in curves.items()
    }
    for place, (name, errors) in enumerate(curves.items()):
        low, high = np.quantile(errors, [0.1, 0.9], axis=0)
        axis.fill_between(samples, low, high, color=COLOURS[name], alpha=0.15, lw=0)
        axis.plot(samples, errors.mean(0), color=COLOURS[name], lw=1.5, label=name)
        found = times[name].interval
        numbers[f"digits, {name}: samples to {DIGITS_THRESHOLD}"] = found.mean
        numbers[f"digits, {name}: 95 % interval"] = (found.low, found.high)
        if found.mean is not None and found.low is not None and found.high is not None:
            height = 0.21 - 0.022 * place
            axis.plot([found.low, found.high], [height, height], color=COLOURS[name], lw=2.5)
            axis.plot(found.mean, height, "o", color=COLOURS[name], ms=5)
    for name in ("greedy", "blocks of 10"):
        saved = interval(np.subtract(times["random"].per_seed, times[name].per_seed))
        numbers[f"digits, saved by {name}, seed by seed"] = (saved.mean, saved.low, saved.high)
    axis.axhline(DIGITS_THRESHOLD, color=INK, lw=0.8, ls=":")
    axis.text(
        150, 0.19, "samples to the dotted line,\n95 % over seeds", ha="right", va="center", fontsize=9, color=INK
    )
    axis.set(
        title="Digits 5–9 on features learned from 0–4",
        xlabel="samples",
        ylabel="squared test error",
        ylim=(0.14, 0.9),
    )
    axis.legend()

    axis = axes[1, 0]
    levels = np.linspace(0.26, 0.6, 35)
    speeds = {name: mechanics.learning_speed(errors.mean(0), samples) for name, errors in curves.items()}
    for name, speed in speeds.items():
        reached = [mechanics.fermat_time(speed, level) + samples[0] for level in levels]
        axis.plot(levels, reached, color=COLOURS[name], lw=1.5, label=name)
        numbers[f"digits, {name}: Fermat's time to {DIGITS_THRESHOLD}"] = (
            mechanics.fermat_time(speed, DIGITS_THRESHOLD) + samples[0]
        )
    axis.set(
        title="Fermat's time  T(δ) = ∫ dε / r(ε)  of the mean curves",
        xlabel="error to reach, δ",
        ylabel="samples",
        xlim=(0.6, 0.26),
        ylim=(0, 150),
    )
    axis.legend(loc="upper left")

    axis = axes[1, 1]
    states, costates, slopes = controlled_path()
    moments = np.arange(len(states))
    for index, (name, colour) in enumerate((("first", BLUE), ("second", ROSE))):
        axis.plot(moments, costates[:, index], color=colour, lw=1.5, label=f"costate, {name} component")
        axis.plot(moments, slopes[:, index], "o", color=colour, ms=4, mfc="white")
    axis.plot(moments, states.norm(dim=1), color=SAND, lw=1.2, ls="--", label="distance from the goal")
    numbers["largest difference, costate and slope of V"] = float((costates - slopes).abs().max())
    axis.axhline(0.0, color=INK, lw=0.5)
    axis.set(title="Control: costates are the slope of Bellman's value", xlabel="step", ylabel="λ (dots: ∇V)")
    axis.legend()

    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.title.set_fontsize(11)
        axis.get_legend().set_frame_on(False)
    figure.savefig(out, dpi=130, facecolor="white")
    return numbers


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the example from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=Path("least_time.png"), help="where the picture goes")
    parser.add_argument("--seeds", type=int, default=10, help="seeds of the digits experiment")
    given = parser.parse_args(arguments)
    numbers = draw(given.out, given.seeds)
    for name, value in numbers.items():
        shown = ", ".join(f"{part:.4g}" for part in (value if isinstance(value, tuple) else (value,)))
        print(f"{name:50s} {shown}")
    print(f"picture: {given.out}")
    return numbers


if __name__ == "__main__":
    main()
