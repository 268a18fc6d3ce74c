"""Figure 1: the path of least action crosses into the better well of a double well; gradient flow stays."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from clagrange.dynamics import LearningLagrangian, minimize_action
from clagrange.figures.style import BLUE, INK, RED, SAND, contours, letter

DISCOUNT, DURATION, POINTS = 0.1, 4.0, 50
START, END = (-0.6, 0.55), (1.0625, 0.0)
TILT = -0.5
BASINS_START = (0.6, 0.5)
STAGES = (0, 5, 20)
"""Iterations of the minimiser that are drawn, besides the last."""


def double_well(theta: Tensor) -> Tensor:
    """L = (θ₁² − 1)² + θ₂² − ½θ₁ (Eq. 28)."""
    return (theta[..., 0] ** 2 - 1.0) ** 2 + theta[..., 1] ** 2 + TILT * theta[..., 0]


def two_basins(theta: Tensor) -> Tensor:
    """−e^{−|θ + (2, 0)|²} − ½e^{−|θ − (2, 0)|²}: a deep and a shallow basin (panel a)."""
    x, y = theta[..., 0], theta[..., 1].square()
    return -torch.exp(-((x + 2.0) ** 2) - y) - 0.5 * torch.exp(-((x - 2.0) ** 2) - y)


def compute() -> tuple[dict[str, Any], dict[str, Any]]:
    """The minimised action, the path's crossing, energies along it, and gradient flow from the same start."""
    from scipy.integrate import solve_ivp

    lagrangian = LearningLagrangian(double_well, discount=DISCOUNT)
    start, end = (torch.tensor(point, dtype=torch.float64) for point in (START, END))
    stages: list[Tensor] = []
    best = minimize_action(lagrangian, start, end, duration=DURATION, points=POINTS, callback=stages.append)
    straight = start + (best.times / DURATION).unsqueeze(1) * (end - start)
    stages.insert(0, straight)
    local, saddle, deepest = sorted(np.roots([4.0, 0.0, -4.0, TILT]).real)
    left = torch.tensor([local, 0.0], dtype=torch.float64)
    to_local = minimize_action(lagrangian, start, left, duration=DURATION, points=POINTS)

    basins = LearningLagrangian(lambda theta: two_basins(theta) + 1.0)
    origin = torch.tensor(BASINS_START, dtype=torch.float64)
    route = minimize_action(basins, origin, torch.tensor([-2.0, 0.0]), duration=8.0, points=120)

    def basin_slope(_: float, theta: Any) -> Any:
        return -torch.func.grad(two_basins)(torch.from_numpy(theta)).numpy()

    basins_flow = solve_ivp(basin_slope, (0.0, 30.0), BASINS_START, rtol=1e-6, t_eval=np.linspace(0, 30, 300))

    def slope(_: float, theta: Any) -> list[float]:
        return [-(4.0 * theta[0] * (theta[0] ** 2 - 1.0) + TILT), -2.0 * theta[1]]

    flow = solve_ivp(slope, (0.0, 8.0), START, rtol=1e-9, atol=1e-11, t_eval=np.linspace(0.0, 8.0, 400))

    x = best.positions
    before = int((x[:, 0] > 0).nonzero()[0, 0]) - 1
    part = float(-x[before, 0] / (x[before + 1, 0] - x[before, 0]))
    kinetic = 0.5 * x.diff(dim=0).square().sum(1)
    potential = lagrangian.potential(x)
    numbers = {
        "parameters": {
            "loss": "(θ₁² − 1)² + θ₂² − θ₁/2",
            "discount": DISCOUNT,
            "lr": 1.0,
            "loss_weight": 1.0,
            "duration": DURATION,
            "points": POINTS,
            "start": list(START),
            "end": list(END),
        },
        "action_per_interval": best.action / DURATION,
        "action": best.action,
        "action_of_straight_line_per_interval": float(lagrangian.action(straight, best.times)) / DURATION,
        "action_to_local_minimum": to_local.action,
        "iterations": best.iterations,
        "crosses_to_right_well": bool(x[0, 0] < saddle < x[-2, 0]),
        "crossing": {
            "time": float(best.times[before] + part * best.times.diff()[before]),
            "theta_2": float(x[before, 1] + part * (x[before + 1, 1] - x[before, 1])),
        },
        "two_basins": {
            "least_action_ends_at": [-2.0, 0.0],
            "gradient_flow_ends_at": basins_flow.y[:, -1].tolist(),
        },
        "minima": [local, deepest],
        "losses_at_minima": [float(double_well(torch.tensor([m, 0.0]).double())) for m in (local, deepest)],
        "saddle": saddle,
        "gradient_flow_end": flow.y[:, -1].tolist(),
        "kinetic_per_step": {
            "start": float(kinetic[0]),
            "max": float(kinetic.max()),
            "at": int(kinetic.argmax()),
        },
        "potential": {
            "start": float(potential[0]),
            "max": float(potential.max()),
            "at": int(potential.argmax()),
            "end": float(potential[-1]),
        },
        "remark": "the published gradient-flow curve ends at -0.8376 because its code has a slope of 2a in place "
        "of 4a; here it ends in the minimum",
    }
    actions = [float(lagrangian.action(stage, best.times)) / DURATION for stage in stages]
    return numbers, {
        "times": best.times.numpy(),
        "path": x.numpy(),
        "stages": [stages[min(stage, len(stages) - 1)].numpy() for stage in STAGES],
        "actions": actions,
        "flow": flow.y,
        "basins_route": route.positions.numpy(),
        "basins_flow": basins_flow.y,
        "kinetic": kinetic.numpy(),
        "potential": potential.numpy(),
    }


def draw(numbers: dict[str, Any], curves: dict[str, Any]) -> Any:
    """Four panels: a landscape with a step and a route, the paths, the action while minimising, energies."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 7.4), layout="constrained")
    panels = figure.subplots(2, 2)
    _landscape(panels[0, 0], curves)
    _paths(panels[0, 1], numbers, curves)

    panel = panels[1, 0]
    letter(panel, "c", "the action while it is minimised (mean per interval)")
    panel.plot(curves["actions"], color=BLUE)
    panel.axhline(numbers["action_per_interval"], color=INK, linewidth=0.8, linestyle=":")
    panel.annotate(
        f"{numbers['action_per_interval']:.5f}",
        (len(curves["actions"]) - 1, numbers["action_per_interval"]),
        xytext=(0, 6),
        textcoords="offset points",
        ha="right",
    )
    panel.set(xlabel="L-BFGS iteration", ylabel="action", ylim=(0, None), xlim=(0, len(curves["actions"]) - 1))

    panel = panels[1, 1]
    letter(panel, "d", "energies along the optimal path")
    times = curves["times"]
    step = times[1] - times[0]
    panel.plot(times, curves["potential"], color=RED)
    panel.plot(times[:-1] + step / 2, curves["kinetic"] / step**2, color=BLUE)
    panel.annotate("kinetic T", (0.72, 1.1), color=BLUE)
    panel.annotate("potential U = kL", (1.4, -0.38), color=RED)
    panel.axhline(0, color=INK, linewidth=0.6)
    panel.axvline(numbers["crossing"]["time"], color=INK, linewidth=0.8, linestyle=":")
    panel.annotate("crosses θ₁ = 0", (numbers["crossing"]["time"] + 0.06, -0.68), color=INK, fontsize=8)
    panel.set(xlabel="time t", ylabel="energy", xlim=(0, DURATION), ylim=(-0.75, 1.8))
    return figure


def _landscape(panel: Any, curves: dict[str, Any]) -> None:
    letter(panel, "a", "following the slope, or planning a route")
    side = np.linspace(-2, 2, 121)
    x, y = np.meshgrid(side, side)
    surface = two_basins(torch.from_numpy(np.stack([x, y], -1))).numpy()
    contours(panel, (x, y), surface, 14)
    panel.plot(*curves["basins_route"].T, color=BLUE)
    panel.plot(*curves["basins_flow"], color=SAND, linewidth=2)
    panel.plot(*BASINS_START, "o", color=INK, markersize=6)
    panel.text(1.4, 0.62, "gradient flow", color=SAND, ha="center", fontweight="bold")
    panel.text(-0.4, 0.5, "least action", color=BLUE, ha="center", fontweight="bold")
    panel.text(-1.9, -0.1, "L = −1", color=INK, va="top")
    panel.text(1.9, -0.35, "L = −½", color=INK, va="top", ha="right")
    panel.set(xlabel="θ₁", ylabel="θ₂", aspect="equal", xticks=range(-2, 3), yticks=range(-2, 3))


def _paths(panel: Any, numbers: dict[str, Any], curves: dict[str, Any]) -> None:
    letter(panel, "b", "double well: the optimal path crosses, gradient flow stays")
    x, y = np.meshgrid(np.linspace(-1.5, 1.5, 161), np.linspace(-0.55, 0.85, 121))
    loss = double_well(torch.from_numpy(np.stack([x, y], -1))).numpy()
    contours(panel, (x, y), loss, np.linspace(-0.5, 2.0, 16))
    for number, path in enumerate(curves["stages"]):
        panel.plot(path[:, 0], path[:, 1], color=BLUE, alpha=0.25 + 0.15 * number, linewidth=1, linestyle="--")
    panel.plot(*curves["path"].T, ".-", color=BLUE, markersize=4)
    panel.plot(*curves["flow"], color=SAND, linewidth=2)
    panel.plot(*START, "o", color=INK, markersize=6)
    for minimum in numbers["minima"]:
        panel.plot(minimum, 0, "*", color=RED, markersize=11, markeredgecolor="white", zorder=5)
    panel.text(-0.62, 0.6, "start", color=INK, ha="center", va="bottom")
    panel.text(0.45, 0.42, "least action", color=BLUE, fontweight="bold")
    panel.text(-0.97, 0.22, "gradient\nflow", color=SAND, ha="right", fontweight="bold")
    panel.text(0.05, 0.08, "while minimising", color=BLUE, alpha=0.7, fontsize=8, ha="center")
    panel.set(xlabel="θ₁", ylabel="θ₂", xlim=(-1.5, 1.5), ylim=(-0.55, 0.85))
