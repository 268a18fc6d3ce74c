"""Figure 2: what the discount does on a quadratic loss, and the ballistic rule on real data."""

from typing import Any

import numpy as np
import torch

from clagrange.dynamics import LinearRule, decay_rate
from clagrange.figures import ballistic_training
from clagrange.figures.style import BY_DISCOUNT, INK, RED, contours, letter

DISCOUNTS = (0.0, 1.0, 10.0)
HESSIAN, START = (1.0 / 9.0, 1.0), (-3.0, -3.0)


def compute() -> tuple[dict[str, Any], dict[str, Any]]:
    """Decay rates, their ratios at four times the curvature, paths, and shortened training runs."""
    times = torch.linspace(0.0, 10.0, 2000, dtype=torch.float64)
    long_times = torch.cat(
        [
            torch.linspace(0.0, 20.0, 400, dtype=torch.float64),
            torch.linspace(20.5, 500.0, 600, dtype=torch.float64),
        ]
    )
    curvatures = np.linspace(0.01, 4.0, 400)
    rates = {f"{discount:g}": float(decay_rate(1.0, discount)) for discount in DISCOUNTS}
    one, origin = torch.ones(1, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    lines, paths, oracle = [], [], []
    for discount in DISCOUNTS:
        rule = LinearRule(one, one, discount=discount)
        oracle.append(float(rule.decay))
        lines.append(rule.path(torch.zeros(1), times)[:, 0].numpy())
        plane = LinearRule(torch.tensor(HESSIAN), origin, discount=discount)
        paths.append(plane.path(torch.tensor(START), long_times).numpy())
    trained = ballistic_training.train_all()
    numbers = {
        "parameters": {
            "curvature": 1.0,
            "minimum": 1.0,
            "start": 0.0,
            "lr": 1.0,
            "loss_weight": 1.0,
            "discounts": list(DISCOUNTS),
            "hessian_of_c": list(HESSIAN),
            "start_of_c": list(START),
        },
        "rates": rates,
        "rates_by_riccati_equation": dict(zip(rates, oracle, strict=True)),
        "ratios_at_curvature_4": {
            f"{discount:g}": float(decay_rate(4.0, discount)) / float(decay_rate(1.0, discount))
            for discount in DISCOUNTS
        },
        "training": trained,
    }
    return numbers, {
        "times": times.numpy(),
        "lines": lines,
        "paths": paths,
        "curvatures": curvatures,
        "ratios": [
            [float(decay_rate(h, discount)) / float(decay_rate(1.0, discount)) for h in curvatures]
            for discount in DISCOUNTS
        ],
    }


def draw(numbers: dict[str, Any], curves: dict[str, Any]) -> Any:
    """Six panels: paths, distances, paths in the plane, rates against curvature, two training runs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7), layout="constrained")
    panels = figure.subplots(2, 3)
    times = curves["times"]
    names = [f"γ = {discount:g}" for discount in DISCOUNTS]

    panel = panels[0, 0]
    letter(panel, "a", "the optimal path for three discounts")
    for line, colour, name in zip(curves["lines"], BY_DISCOUNT, names, strict=True):
        panel.plot(times, line, color=colour, label=name)
    panel.axhline(1.0, color=INK, linewidth=0.6, linestyle=":")
    panel.annotate("minimum", (0.1, 1.015), color=INK, fontsize=8)
    panel.set(xlabel="time t", ylabel="θ", xlim=(0, 10), ylim=(0, 1.09))
    panel.legend(loc="lower right")

    panel = panels[0, 1]
    letter(panel, "b", "distance to the minimum: e$^{-λt}$")
    for line, colour, rate in zip(curves["lines"], BY_DISCOUNT, numbers["rates"].values(), strict=True):
        panel.semilogy(times, np.abs(1.0 - line), color=colour)
        at = min(9.6, 7.5 / rate)
        panel.annotate(f"λ = {rate:.6g}", (at * 0.62, np.exp(-rate * at * 0.62) * 1.35), color=colour)
    panel.set(xlabel="time t", ylabel="|θ − θ*|", xlim=(0, 10), ylim=(2e-4, 2))

    panel = panels[0, 2]
    letter(panel, "c", "the path in a valley, curvatures 1/9 and 1")
    side = np.meshgrid(np.linspace(-3.4, 0.6, 81), np.linspace(-3.4, 0.6, 81))
    contours(panel, side, 0.5 * (HESSIAN[0] * side[0] ** 2 + HESSIAN[1] * side[1] ** 2), 12)
    for path, colour, name in zip(curves["paths"], BY_DISCOUNT, names, strict=True):
        panel.plot(path[:, 0], path[:, 1], color=colour, label=name)
    panel.plot(*START, "o", color=INK, markersize=6)
    panel.plot(0, 0, "*", color=RED, markersize=12, markeredgecolor="white", zorder=5)
    panel.legend(loc="lower right")
    panel.set(xlabel="θ₁", ylabel="θ₂", aspect="equal", xlim=(-3.4, 0.6), ylim=(-3.4, 0.6))

    panel = panels[1, 0]
    letter(panel, "d", "rate against curvature: from √h to h")
    for ratios, colour, name in zip(curves["ratios"], BY_DISCOUNT, names, strict=True):
        panel.plot(curves["curvatures"], ratios, color=colour, label=f"{name}: {ratios[-1]:.3f} at h = 4")
    panel.plot([0, 4], [0, 4], color=INK, linewidth=0.7, linestyle=":")
    panel.annotate("∝ h, as gradient descent", (2.0, 2.2), color=INK, fontsize=8, rotation=39)
    panel.legend(loc="upper left")
    panel.set(xlabel="curvature h", ylabel="λ(h) / λ(1)", xlim=(0, 4), ylim=(0, 4.7))

    for panel, name, data in ((panels[1, 1], "e", "mnist"), (panels[1, 2], "f", "cifar10")):
        ballistic_training.draw(panel, name, data, numbers["training"][data])
    return figure
