"""Figure 6: Gaussian weights through a task switch: exact paths, the optimizer's rule, and who gains variance."""

import math
from typing import Any

import numpy as np
import torch

from clagrange.dynamics import (
    Trajectory,
    decay_rate,
    gaussian_weights,
    second_order_manifold,
    settling_trajectory,
)
from clagrange.figures.convergence import (
    STEPS,
    discrete_time_errors,
    distance_errors,
    follow_rule,
    mesu_differences,
    orders,
    overdamped_errors,
)
from clagrange.figures.style import BLUE, BY_DISCOUNT, GREEN, INK, SAND, letter

DISCOUNTS = (0.0, 1.0, 10.0)
SHIFTS = (0.25, 0.5, 1.0, 2.0, 5.0)
SHOWN_SHIFT = 2.0
SIZES = (0.4, 0.2, 0.1)
TEMPERATURE, PRIOR_VARIANCE = 0.01, 1.0
ALMOST_ZERO = 1e-6
"""What the optimizer's rule takes for discount 0: its learning rate is ητ·Δt/γ."""
STEP = 0.2
"""Of the optimizer's rule, in units of the decay time 1/λ."""


def exact_path(shift: float, log_ratio: float, discount: float) -> Trajectory:
    """The exact path in x = (μ − μ*)/σ*, y = log(σ/σ*) with ητ = 1, from a boundary-value problem."""
    one = torch.ones(1, dtype=torch.float64)
    lagrangian = gaussian_weights(one, torch.zeros(1), discount=discount)
    start = torch.tensor([shift, log_ratio], dtype=torch.float64)
    stages = max(1, math.ceil(max(shift, abs(log_ratio)) / 2.5))
    return settling_trajectory(lagrangian, start, torch.zeros(2), tolerance=1e-9, continuation=stages)


def compute() -> tuple[dict[str, Any], dict[str, Any]]:
    """Peaks of log σ for a range of shifts and discounts, and paths of the three kinds of weight."""
    rates = [float(decay_rate(1.0, discount)) for discount in DISCOUNTS]
    peaks: dict[str, list[dict[str, float]]] = {}
    shown, drift = [], 0.0
    for discount, rate in zip(DISCOUNTS, rates, strict=True):
        peaks[f"{discount:g}"] = rows = []
        for shift in SHIFTS:
            path = exact_path(shift, 0.0, discount)
            rows.append(
                {
                    "shift": shift,
                    "exact": float(path.positions[:, 1].max()),
                    "second_order": rate * shift**2 / (8.0 * (3.0 * rate + discount)),
                }
            )
            if shift == SHOWN_SHIFT:
                shown.append(path)
            if discount == 0.0:
                one = torch.ones(1, dtype=torch.float64)
                energy = gaussian_weights(one, torch.zeros(1), discount=0.0).energy(
                    path.positions, path.velocities
                )
                drift = max(drift, float((energy - energy[-1]).abs().max()))
    weights = _kinds(rates)
    by_time = {
        "discrete_time_rule_discount_0": discrete_time_errors(0.0),
        "discrete_time_rule_discount_1": discrete_time_errors(1.0),
        "optimizer_rule_infinite_discount": overdamped_errors(),
    }
    in_distance = distance_errors(1.0, SIZES)
    numbers = {
        "parameters": {
            "eta_tau": 1.0,
            "discounts": list(DISCOUNTS),
            "decay_rates": rates,
            "shift_in_a_and_b": SHOWN_SHIFT,
            "temperature_in_d": TEMPERATURE,
            "prior_variance_in_d": PRIOR_VARIANCE,
            "step_of_the_rule": f"{STEP:g}/λ",
            "discount_0_of_the_rule": ALMOST_ZERO,
        },
        "max_log_deviation": peaks,
        "energy_drift_at_discount_0": drift,
        "mesu": mesu_differences(),
        "convergence": {
            name: {"steps": list(STEPS), "errors": errors, "orders": orders(errors)}
            for name, errors in by_time.items()
        },
        "optimizer_rule_in_the_distance_at_discount_1": {
            "sizes": list(SIZES),
            "errors": in_distance,
            "orders": orders(in_distance),
        },
        "variance_after_switch": {
            kind: {
                f"{discount:g}": {
                    "exact_max": float(entry["exact"].max()),
                    "rule_max": float(entry["rule"].max()),
                }
                for discount, entry in zip(DISCOUNTS, entries, strict=True)
            }
            for kind, entries in weights.items()
        },
    }
    curves: dict[str, Any] = {"exact": [], "rule": [], "rule_without": [], "manifold": [], "weights": weights}
    for discount, rate, path in zip(DISCOUNTS, rates, shown, strict=True):
        curves["exact"].append(_scaled(path, rate))
        curves["manifold"].append(_manifold(rate, discount))
        for name, motion in (("rule", True), ("rule_without", False)):
            curves[name].append(_rule(SHOWN_SHIFT, 1.0, 1.0, 1e-9, 1.0, rate, discount, motion=motion))
    return numbers, curves


def _scaled(path: Trajectory, rate: float) -> Any:
    """λt, x, σ/σ*, (3, m)."""
    x, y = path.positions.unbind(1)
    return torch.stack([rate * path.times, x, y.exp()]).numpy()


def _manifold(rate: float, discount: float) -> Any:
    """The second-order stable manifold from the same start, integrated: λt, x, σ/σ*."""
    from scipy.integrate import solve_ivp

    def field(_: float, state: Any) -> list[float]:
        x, y = second_order_manifold(torch.tensor(state[0]), torch.tensor(state[1]), rate, discount)
        return [float(x) / rate, float(y) / rate]

    found = solve_ivp(field, (0.0, 6.0), [SHOWN_SHIFT, 0.0], rtol=1e-8, t_eval=np.linspace(0.0, 6.0, 200))
    return np.stack([found.t, found.y[0], np.exp(found.y[1])])


def _rule(
    offset: float,
    precision: float,
    curvature: float,
    prior_precision: float,
    temperature: float,
    rate: float,
    discount: float,
    *,
    motion: bool,
) -> Any:
    """The optimizer's rule: λt, μ − μ*, σ, (3, m)."""
    path = follow_rule(
        offset,
        precision,
        curvature=curvature,
        prior_precision=prior_precision,
        temperature=temperature,
        speed_squared=1.0,
        discount=max(discount, ALMOST_ZERO),
        step=STEP / rate,
        steps=round(6.0 / STEP),
        motion=motion,
    )
    times = STEP * torch.arange(len(path), dtype=path.dtype)
    return torch.stack([times, path[:, 0], path[:, 1].sqrt()]).numpy()


def _kinds(rates: list[float]) -> dict[str, list[dict[str, Any]]]:
    """Variance over time of live, dead and shifted weights, exact and by the rule, for each discount."""
    held = TEMPERATURE / (1.0 + TEMPERATURE / PRIOR_VARIANCE)
    prior = 1.0 / PRIOR_VARIANCE
    kinds: dict[str, list[dict[str, Any]]] = {"live": [], "dead": [], "shifted": []}
    for discount, rate in zip(DISCOUNTS, rates, strict=True):
        for kind in kinds:
            curvature, resting = (0.0, PRIOR_VARIANCE) if kind == "dead" else (1.0, held)
            shift = SHOWN_SHIFT if kind == "shifted" else 0.0
            log_ratio = 0.5 * math.log(held / resting)
            if shift or log_ratio:
                path = exact_path(shift, log_ratio, discount)
                times, logs = rate * path.times, path.positions[:, 1]
            else:
                times, logs = torch.tensor([0.0, 6.0]), torch.zeros(2, dtype=torch.float64)
            rule = _rule(
                shift * math.sqrt(held), 1.0 / held, curvature, prior, TEMPERATURE, rate, discount, motion=True
            )
            kinds[kind].append(
                {
                    "times": times.numpy(),
                    "exact": (resting * torch.exp(2.0 * logs)).numpy(),
                    "rule_times": rule[0],
                    "rule": rule[2] ** 2,
                }
            )
    return kinds


def draw(numbers: dict[str, Any], curves: dict[str, Any]) -> Any:
    """Four panels: the half-plane, width over time, height of the rise, three kinds of weight."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(11.5, 8.2), layout="constrained")
    (plane, width), (height, kinds) = figure.subplots(2, 2)
    names = [f"γ = {discount:g}" for discount in DISCOUNTS]
    styles = [
        Line2D([], [], color=INK, label="exact (boundary-value problem)"),
        Line2D([], [], color=INK, linestyle="--", linewidth=1, label="second-order manifold"),
        Line2D([], [], color=INK, marker="o", linestyle="", markersize=4, label="optimizer's rule, motion=True"),
        Line2D([], [], color=INK, marker="x", linestyle="", markersize=4, label="optimizer's rule, motion=False"),
    ]

    letter(plane, "a", "the minimum moves by 2σ*: mean and width on their way")
    letter(width, "b", "width over time: it rises because the mean moves")
    for number, (colour, name) in enumerate(zip(BY_DISCOUNT, names, strict=True)):
        exact, rule, without, manifold = (
            curves[key][number] for key in ("exact", "rule", "rule_without", "manifold")
        )
        for panel, axis in ((plane, 1), (width, 0)):
            panel.plot(exact[axis], exact[2], color=colour, label=name, linewidth=2)
            panel.plot(manifold[axis], manifold[2], color=colour, linestyle="--", linewidth=1)
            panel.plot(rule[axis], rule[2], "o", color=colour, markersize=3.5)
            panel.plot(without[axis], without[2], "x", color=colour, markersize=3, alpha=0.6)
    plane.set(
        xlabel="distance of the mean from the new minimum, (μ − μ*)/σ*", ylabel="width σ/σ*", xlim=(2.08, -0.08)
    )
    width.set(xlabel="time λt, in decay times", ylabel="width σ/σ*", xlim=(0, 6))
    plane.legend(loc="upper left")
    width.legend(handles=styles, loc="upper right")

    letter(height, "c", "how high the width rises, against the shift")
    for (discount, rows), colour in zip(numbers["max_log_deviation"].items(), BY_DISCOUNT, strict=True):
        shifts = np.array([row["shift"] for row in rows])
        factor = rows[0]["second_order"] / shifts[0] ** 2
        grid = np.geomspace(0.2, 6.0, 50)
        height.loglog(grid, factor * grid**2, color=colour, linestyle="--", linewidth=1)
        height.loglog(shifts, [row["exact"] for row in rows], "o", color=colour, label=f"γ = {discount}, exact")
    height.plot([], [], color=INK, linestyle="--", linewidth=1, label="λx₀²/(8(3λ + γ))")
    height.legend(loc="upper left")
    height.set_xticks(SHIFTS, [f"{shift:g}" for shift in SHIFTS])
    height.minorticks_off()
    height.set(xlabel="shift x₀ of the minimum, in σ*", ylabel="highest log(σ/σ*)", xlim=(0.2, 6))

    letter(kinds, "d", "variance of three weights after a switch at t = 0")
    for entries, colour in zip(curves["weights"].values(), (INK, SAND, BLUE), strict=True):
        for entry, line in zip(entries, ("-", "--", ":"), strict=True):
            kinds.semilogy(entry["times"], entry["exact"], color=colour, linestyle=line)
        kinds.semilogy(entries[1]["rule_times"], entries[1]["rule"], "o", color=colour, markersize=3.5)
    kinds.axhline(PRIOR_VARIANCE, color=GREEN, linewidth=0.8)
    kinds.plot([-1.0, 0.0], [curves["weights"]["live"][0]["exact"][0]] * 2, color=INK)
    kinds.axvline(0.0, color=INK, linewidth=0.8, linestyle=":")
    kinds.text(5.9, 1.05, "prior", color=GREEN, ha="right", va="bottom")
    kinds.text(-0.9, 0.3, "dead: the loss lets go", color=SAND, fontweight="bold")
    kinds.text(1.6, 0.0135, "shifted: the minimum moves", color=BLUE, fontweight="bold")
    kinds.text(5.9, 0.0082, "live: nothing changes", color=INK, ha="right", fontweight="bold", va="top")
    handles = [
        Line2D([], [], color=INK, linestyle=line, label=f"exact, {name}")
        for line, name in zip(("-", "--", ":"), names, strict=True)
    ]
    dots = Line2D([], [], color=INK, marker="o", linestyle="", markersize=3.5, label="rule, γ = 1")
    kinds.legend(handles=[*handles, dots], loc="center right")
    kinds.set(xlabel="time λt, in decay times", ylabel="variance v", xlim=(-1, 6), ylim=(0.006, 1.6))
    return figure
