"""Figure 3: the optimal path in one bowl, with a metric, with a rotating drift, with weight decay."""

from typing import Any

import numpy as np
import torch

from clagrange.dynamics import LinearRule, decaying_path, rotating_path
from clagrange.figures.style import BLUE, INK, RED, SAND, contours, letter

CURVATURE, MINIMUM, START = 4.0, (0.0, -0.5), (1.5, 1.5)
METRIC, DECAY, ROTATION = (1.0 / 50.0, 1.0), 10.0, 10.0
DISCOUNT = 1e-12
"""γ → 0⁺: with a drift the action at γ = 0 is infinite, while the paths have a limit."""

TITLES = {
    "a": "no metric, no drift",
    "b": "metric G = diag(1/50, 1)",
    "c": "drift: rotation, q = 10",
    "d": "drift: weight decay, j = 10",
}


def compute() -> tuple[dict[str, Any], dict[str, Any]]:
    """Paths in closed form, their rates and ends, and how far the Riccati equation's answer is from them."""
    times = 100.0 * torch.linspace(0.0, 1.0, 4000, dtype=torch.float64) ** 3
    start, minimum = (torch.tensor(point, dtype=torch.float64) for point in (START, MINIMUM))
    hessian = CURVATURE * torch.eye(2, dtype=torch.float64)
    turn = ROTATION * torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
    rules = {
        "a": LinearRule(hessian, minimum, discount=DISCOUNT),
        "b": LinearRule(hessian, minimum, metric=torch.tensor(METRIC, dtype=torch.float64), discount=DISCOUNT),
        "c": LinearRule(hessian, minimum, drift=turn, discount=DISCOUNT),
        "d": LinearRule(hessian, minimum, drift=-DECAY * torch.eye(2, dtype=torch.float64), discount=DISCOUNT),
    }
    turned = rotating_path(start, minimum, times, curvature=CURVATURE, rotation=ROTATION, discount=DISCOUNT)
    decayed = decaying_path(start, minimum, times, hessian=hessian, decay=DECAY, discount=DISCOUNT)
    paths = {name: rule.path(start, times) for name, rule in rules.items()}
    panels = {}
    for name, rule in rules.items():
        values = torch.linalg.eigvals(rule.decay)
        order = values.real.argsort(descending=True, stable=True)
        panels[name] = {
            "title": TITLES[name],
            "rates": values.real[order].tolist(),
            "rotation": float(values.imag.abs().max()),
            "end": rule.end.tolist(),
        }
    for name, (path, end) in {"c": turned, "d": decayed}.items():
        panels[name]["closed_form_end"] = end.tolist()
        panels[name]["closed_form_against_riccati"] = float((path - paths[name]).abs().max())
    numbers = {
        "parameters": {
            "hessian": f"{CURVATURE:g}·I",
            "minimum": list(MINIMUM),
            "start": list(START),
            "metric_of_b": list(METRIC),
            "rotation_of_c": ROTATION,
            "decay_of_d": DECAY,
            "discount": "0⁺",
        },
        "panels": panels,
        "remark": "the published code draws the end of c at (0, -1.85e-4), where a factor ηkh + q² is missing, "
        "and has j(j − γ) for weight decay, which belongs to f = +jθ; neither changes the paths at discount 0",
    }
    return numbers, {"paths": {name: path.numpy() for name, path in paths.items()}, "times": times.numpy()}


def draw(numbers: dict[str, Any], curves: dict[str, Any]) -> Any:
    """The four paths in the plane, and below each its distance to its end."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5.9), layout="constrained")
    panels = figure.subplots(2, 4, height_ratios=(2.2, 1), sharey="row")
    grid = np.meshgrid(np.linspace(-2.0, 2.3, 81), np.linspace(-2.0, 2.3, 81))
    bowl = 0.5 * CURVATURE * (grid[0] ** 2 + (grid[1] - MINIMUM[1]) ** 2)
    times = curves["times"]
    for (name, path), above, below in zip(curves["paths"].items(), panels[0], panels[1], strict=True):
        found = numbers["panels"][name]
        letter(above, name, found["title"])
        contours(above, grid, bowl, 14)
        if name in "cd":
            _drift(above, name)
        above.plot(*path.T, color=BLUE, linewidth=2)
        above.plot(*START, "o", color=INK, markersize=6)
        above.plot(*MINIMUM, "*", color=RED, markersize=12, markeredgecolor="white", zorder=5)
        above.plot(*found["end"], "o", color=BLUE, markersize=4.5, markeredgecolor="white", zorder=6)
        end = (
            " = ("
            + ", ".join(f"{value + 0.0:.4g}".replace("-", "−") for value in np.round(found["end"], 5))
            + ")"
        )
        above.text(0.04, 0.04, f"θ$_∞${end}", transform=above.transAxes, color=BLUE)
        above.set(xlim=(-2.0, 2.3), ylim=(-2.0, 2.3), aspect="equal", xlabel="θ₁")

        for axis, colour in ((0, SAND), (1, INK)):
            rest = np.abs(path[:, axis] - found["end"][axis])
            below.semilogy(times, np.maximum(rest, 1e-12), color=colour, label=f"|θ{'₁₂'[axis]} − θ$_∞$|")
        rates = sorted({round(rate, 3) for rate in found["rates"]}, reverse=True)
        text = "rates " if len(rates) > 1 else "rate "
        text += ", ".join(f"{rate:g}" for rate in rates)
        if found["rotation"] > 0:
            text += f", rotation {found['rotation']:g}"
        below.text(0.97, 0.95, text, transform=below.transAxes, ha="right", va="top", color=INK)
        below.set(xlim=(0, 2.5), ylim=(1e-4, 20), xlabel="time t")
    panels[0, 0].set_ylabel("θ₂")
    panels[0, 0].text(1.6, 1.62, "start", color=INK)
    pale = {"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1}
    panels[0, 3].text(0.15, -0.5, "minimum of the loss", color=RED, va="center", fontsize=8, bbox=pale)
    panels[1, 0].set_ylabel("distance to the end")
    panels[1, 0].legend(loc="lower left")
    return figure


def _drift(panel: Any, name: str) -> None:
    """Arrows of the drift."""
    x, y = np.meshgrid(np.linspace(-1.75, 2.05, 10), np.linspace(-1.3, 2.05, 9))
    along = (-y, x) if name == "c" else (-x, -y)
    panel.quiver(x, y, *along, color=SAND, alpha=0.75, width=0.004, scale=30)
