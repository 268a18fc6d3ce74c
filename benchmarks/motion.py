"""Does variance that rises because the mean moves help at switches that nobody announces?

    python benchmarks/motion.py [--store benchmarks/motion.json] [--tasks 24] [--seeds 8]

Two questions. How well does the discrete rule of ``EulerLagrange(motion=True)`` follow the exact solution of the
coupled equations of mean and variance after a shift of the minimum? And what does it do to online accuracy on
permuted digits, where no method here is told of the switches: with and without the motion term, for several
discounts, rates of the variance and temperatures, at settings that were tuned without it. Differences are paired
by seed, with 95 % bootstrap intervals.
"""

import argparse
import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.integrate import solve_bvp, solve_ivp
from torch import nn
from torch.optim import Optimizer

from clagrange.dynamics import mean_displacement, relaxation_fraction, relaxed_precision
from clagrange.gaussian import gaussian_layers, gaussianize
from clagrange.optim import EulerLagrange
from clagrange.optim.motion import motion_resistance, widened_precision
from clagrange.study.engine import Run
from clagrange.study.files import write_json
from clagrange.study.machine import environment
from clagrange.study.methods import EulerLagrange as EulerLagrangeMethod
from clagrange.study.methods import EulerLagrangeInjection
from clagrange.tasks import PermutedDigits


# ------------------------------------------------------------------------------- after a shift of the minimum
def exact_rise(shift: float, discount: float) -> float:
    """max log(σ/σ*) along the exact path after a shift by so many σ*; time in units of 1/√(ητ)."""
    root = math.sqrt(discount**2 / 4 + 1) - discount / 2
    push = root**2 / (2 * (3 * root + discount))

    def field(_: Any, state: Any) -> Any:
        x, u, y, w = state
        return np.stack(
            [
                u,
                (discount + 2 * w) * u + np.exp(2 * y) * x,
                w,
                discount * w - 0.5 * u**2 * np.exp(-2 * y) + 0.5 * np.expm1(2 * y),
            ]
        )

    times = np.linspace(0, 14 / root, 400)
    path = None
    for size in np.linspace(0, shift, max(2, math.ceil(2 * shift)))[1:]:
        if path is None:
            guess = solve_ivp(
                lambda _, q: [-root * q[0], -root * q[1] + push * q[0] ** 2],
                (0, times[-1]),
                [size, 0.0],
                t_eval=times,
                rtol=1e-8,
            ).y
            start = np.stack([guess[0], -root * guess[0], guess[1], -root * guess[1] + push * guess[0] ** 2])
        else:
            times, start = path.x, path.y

        def ends(first: Any, last: Any, size: float = size) -> Any:
            settled = -root * last[2] + push * last[0] ** 2
            return np.array([first[0] - size, first[2], last[1] + root * last[0], last[3] - settled])

        path = solve_bvp(field, ends, times, start, tol=1e-7, max_nodes=50_000)
        if not path.success:
            raise RuntimeError(f"solve_bvp at shift {size:g}, discount {discount:g}: {path.message}")
    assert path is not None
    return float(path.sol(np.linspace(0, path.x[-1], 20_000))[2].max())


def discrete_rise(shift: float, discount: float, duration: float, motion: bool = True) -> float:
    """The same by the optimizer's rules, in steps of ``duration``, with h, T and σ* all 1 and no prior."""
    step_discount = max(discount, 1e-4) * duration
    lr = duration / max(discount, 1e-4)
    fraction = relaxation_fraction(lr, step_discount)
    one, none = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    mean, precision, highest = shift * one, one, 0.0
    for _ in range(math.ceil(14 / (duration * (math.sqrt(discount**2 / 4 + 1) - discount / 2)))):
        precision = relaxed_precision(precision, one, none, 1.0, fraction)
        step = mean_displacement(mean, none, precision, one, none, 1.0, lr, step_discount)
        mean = mean + step
        if motion:
            precision = widened_precision(precision, none, step, motion_resistance(lr, step_discount))
        highest = max(highest, -0.5 * math.log(float(precision)))
    return highest


def after_a_shift() -> list[dict[str, float]]:
    """Exact rise, second-order formula, and discrete rule at three step sizes."""
    rows = []
    for discount in (0.0, 1.0, 10.0):
        root = math.sqrt(discount**2 / 4 + 1) - discount / 2
        for shift in (0.5, 1.0, 2.0, 3.0, 5.0):
            row = {
                "discount": discount,
                "shift": shift,
                "exact": exact_rise(shift, discount),
                "formula": root * shift**2 / (8 * (3 * root + discount)),
                **{f"step_{d:g}": discrete_rise(shift, discount, d / root) for d in (0.4, 0.1, 0.025)},
                "without": discrete_rise(shift, discount, 0.1 / root, motion=False),
            }
            rows.append(row)
            print("  " + "  ".join(f"{name} {value:.4f}" for name, value in row.items()))
    return rows


# ------------------------------------------------------------------------------------------------- its cost
def cost(width: int = 1000, repetitions: int = 15) -> dict[str, float]:
    """Median seconds of an optimizer step on 2·width² weights at discount 1, without and with the motion term."""
    seconds: dict[str, list[float]] = {"without": [], "with": []}
    actions = {}
    for name, motion in (("without", False), ("with", True)):
        network = gaussianize(nn.Sequential(nn.Linear(width, width), nn.Linear(width, width)))
        optimizer = EulerLagrange(network, lr=1e-6, temperature=1e-5, discount=1.0, motion=motion)
        for parameter in network.parameters():
            parameter.grad = torch.full_like(parameter, 1e-3)
        actions[name] = network, optimizer
    for repetition in range(repetitions + 1):
        for name, (network, optimizer) in actions.items():
            for _, layer in gaussian_layers(network):
                layer.examples = 64
            started = time.perf_counter()
            optimizer.step()
            if repetition:  # the first one warms up
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in seconds.items()}


# ------------------------------------------------------------------------------------------ permuted digits
@dataclass(frozen=True)
class Moving(EulerLagrangeMethod):
    """The Euler-Lagrange method, with the motion term or without."""

    motion: bool = False

    def optimizer(self, network: nn.Module) -> Optimizer:
        """The Euler-Lagrange optimizer."""
        optimizer = super().optimizer(network)
        optimizer.param_groups[0]["motion"] = self.motion
        return optimizer


def on_digits(tasks: int, seeds: int, **settings: Any) -> tuple[np.ndarray, float, float]:
    """Online accuracy (seeds, tasks), mean relative variance after a task, and seconds of training."""
    run = Run(
        Moving(**settings), [PermutedDigits(tasks=tasks, seed=500 + seed) for seed in range(seeds)], [64, 64]
    )
    for _ in range(tasks):
        run.run_task()
    return run.metrics["online_accuracy"], float(np.nanmean(run.metrics["mean_variance"])), run.seconds


def after_a_switch(temperature: float, motion: bool, seeds: int = 3, tasks: int = 8) -> list[float]:
    """Mean log of variance over prior variance every 40 steps after a switch, mean from the fourth task on."""
    streams = [PermutedDigits(tasks=tasks, seed=500 + seed) for seed in range(seeds)]
    run = Run(Moving(temperature=temperature, discount=0.01, motion=motion), streams, [64, 64])
    trace: list[float] = []
    steps = 0

    def look() -> None:
        nonlocal steps
        if steps % 40 == 0:
            precisions = [
                block.precision for _, layer in gaussian_layers(run.network) for block in layer.blocks()
            ]
            ratios = [p.prior_precision / p.precision for p in precisions]
            trace.append(float(torch.cat([ratio.flatten() for ratio in ratios]).log().mean()))
        steps += 1

    for _ in range(tasks):
        run.run_task(look)
    mean = np.reshape(trace, (tasks, -1))[3:].mean(0)
    return [round(float(number), 3) for number in mean]


def traces() -> list[dict[str, Any]]:
    """`after_a_switch` for two temperatures, without and with the motion term."""
    return [
        {
            "temperature": temperature,
            "without": after_a_switch(temperature, False),
            "with": after_a_switch(temperature, True),
        }
        for temperature in (6e-7, 6e-6)
    ]


def announced(tasks: int, seeds: int) -> list[float]:
    """The same network told of the switches, with variance injected there: what there is to gain."""
    streams = [PermutedDigits(tasks=tasks, seed=500 + seed) for seed in range(seeds)]
    run = Run(EulerLagrangeInjection(), streams, [64, 64])
    for _ in range(tasks):
        run.run_task()
    return interval(run.metrics["online_accuracy"].mean(1))


def interval(values: np.ndarray) -> list[float]:
    """Mean and 95 % bootstrap interval over seeds."""
    draws = np.random.default_rng(0).choice(values, (10_000, len(values))).mean(1)
    return [round(float(number), 4) for number in (values.mean(), *np.quantile(draws, [0.025, 0.975]))]


def unannounced(tasks: int, seeds: int) -> list[dict[str, Any]]:
    """With and without the motion term."""
    rows = []
    for temperature, rate in ((6e-6, 5e-3), (6e-6, 1e-1), (6e-7, 5e-3)):
        for discount in (1.0, 0.1, 0.01):
            arms = {
                motion: on_digits(
                    tasks, seeds, temperature=temperature, variance_rate=rate, discount=discount, motion=motion
                )
                for motion in (False, True)
            }
            without, with_motion = arms[False][0].mean(1), arms[True][0].mean(1)
            rows.append(
                {
                    "temperature": temperature,
                    "variance_rate": rate,
                    "discount": discount,
                    "without": interval(without),
                    "with": interval(with_motion),
                    "difference": interval(with_motion - without),
                    "difference_last_quarter": interval(
                        (arms[True][0] - arms[False][0])[:, -(tasks // 4) :].mean(1)
                    ),
                    "relative_variance": [round(arms[False][1], 4), round(arms[True][1], 4)],
                    "seconds": [round(arms[False][2], 1), round(arms[True][2], 1)],
                }
            )
            print("  " + "  ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    return rows


def main() -> None:
    """Measure, print, and store when asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, default=None, help="JSON file for the figures")
    parser.add_argument("--tasks", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=8)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    print("max log(σ/σ*) after a shift of the minimum by so many standard deviations")
    figures: dict[str, Any] = {"environment": environment(), "after_a_shift": after_a_shift()}
    print(
        f"online accuracy on permuted digits, {chosen.tasks} tasks, {chosen.seeds} seeds, switches not announced"
    )
    figures["step_seconds"] = cost()
    print(f"an optimizer step of 2 million weights: {figures['step_seconds']}")
    figures["permuted_digits"] = {
        "tasks": chosen.tasks,
        "seeds": chosen.seeds,
        "rows": unannounced(chosen.tasks, chosen.seeds),
        "announced_injection": announced(chosen.tasks, chosen.seeds),
        "log_relative_variance_after_a_switch": traces(),
    }
    if chosen.store is not None:
        write_json(chosen.store, figures)


if __name__ == "__main__":
    main()
