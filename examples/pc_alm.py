"""Predictive coding with multipliers: backpropagation at equilibrium, when it gets there.

Run it with ``python examples/pc_alm.py --out pc_alm.png``.

Four questions on residual networks: how near to backpropagation 2L steps come at each depth, whether a long
relaxation settles, where steps become unstable, and whether a network learns real digits.
"""

import argparse
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import clagrange  # noqa: F401 - before anything that imports torchvision
from clagrange.mechanics import (
    NotSettledWarning,
    assign_gradients,
    half_squared_error,
    largest_stable_step,
    pc_alm_gradients,
    residual_network,
)
from clagrange.tasks.digits import digits

INK, BLUE, RED, GOLD, GREEN = "#333333", "#332288", "#CC6677", "#C4A93A", "#117733"


def depths() -> dict[str, list[tuple[int, float]]]:
    """Cosine to the true gradient after 2L steps with the published settings, for depths up to 32."""
    inputs, classes = digits()
    x, y = inputs[:64], nn.functional.one_hot(classes[:64], 10).float()
    found: dict[str, list[tuple[int, float]]] = {"PC-ALM (α = 1)": [], "predictive coding (α = 0)": []}
    for depth in (4, 8, 16, 24, 32):
        net = residual_network(64, 32, depth, 10)
        for curve, alpha in zip(found.values(), (1.0, 0.0), strict=True):
            curve.append((depth, pc_alm_gradients(net, x, y, alpha=alpha, step=0.25).cosine))
    return found


def relaxations() -> dict[str, tuple[torch.Tensor, float]]:
    """Constraint residuals of long relaxations, and their final cosines."""
    found = {}
    for name, activation, rho, steps in [
        ("linear, ρ = 1", "linear", 1.0, 1500),
        ("tanh, ρ = 1", "tanh", 1.0, 1500),
        ("tanh, ρ = 16", "tanh", 16.0, 1500),
    ]:
        net = residual_network(16, 8, 8, 10, activation=activation, seed=4).double()
        generator = torch.Generator().manual_seed(104)
        x, y = (torch.randn(4, n, generator=generator, dtype=torch.float64)[:1] for n in (16, 10))
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", NotSettledWarning)
            result = pc_alm_gradients(net, x, y, rho=rho, alpha=rho, steps=steps)
        for warning in told:
            print(f"{name}: {warning.message}")
        found[name] = (result.residuals, result.cosine)
    return found


def stability() -> list[tuple[float, float]]:
    """Size of the gradient after 400 steps, relative to the true one, for steps around the bound."""
    net = residual_network(16, 8, 8, 10, activation="linear").double()
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(4, n, generator=generator, dtype=torch.float64) for n in (16, 10))
    bound = float(largest_stable_step(net, x, iterations=300).max())
    half_squared_error(net(x), y).mean().backward()
    true = math.sqrt(sum(float(p.grad.square().sum()) for p in net.parameters() if p.grad is not None))
    sizes = []
    for factor in (0.96, 0.97, 0.98, 0.99, 1.01, 1.02, 1.03):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotSettledWarning)
            result = pc_alm_gradients(net, x, y, step=factor * bound, steps=400)
        sizes.append((factor, math.sqrt(sum(float(g.square().sum()) for g in result.gradients.values())) / true))
    return sizes


def train(depth: int = 8, epochs: int = 4) -> dict[str, tuple[list[float], float]]:
    """Test accuracy on digits while training, and the mean cosine, for three kinds of gradients."""
    inputs, classes = digits()
    targets = nn.functional.one_hot(classes, 10).float()
    order = torch.randperm(1500, generator=torch.Generator().manual_seed(0))
    found = {}
    for name, alpha in (("backpropagation", None), ("PC-ALM", 1.0), ("predictive coding", 0.0)):
        net = residual_network(64, 32, depth, 10)
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
        accuracy, cosines = [], []
        for start in epochs * [*range(0, 1500, 50)]:
            chosen = order[start : start + 50]
            optimizer.zero_grad()
            if alpha is None:
                half_squared_error(net(inputs[chosen]), targets[chosen]).mean().backward()
                cosines.append(1.0)
            else:
                result = pc_alm_gradients(net, inputs[chosen], targets[chosen], alpha=alpha, step=0.25)
                assign_gradients(net, result.gradients)
                cosines.append(result.cosine)
            optimizer.step()
            with torch.no_grad():
                right = net(inputs[1500:]).argmax(1) == classes[1500:]
            accuracy.append(100 * float(right.float().mean()))
        found[name] = (accuracy, sum(cosines) / len(cosines))
    return found


def draw(out: Path) -> dict[str, float]:
    """Compute, draw, and return the numbers."""
    from matplotlib.figure import Figure

    numbers: dict[str, float] = {}
    figure = Figure(figsize=(12, 8), layout="constrained")
    axes: Any = figure.subplots(2, 2)

    for (name, curve), colour in zip(depths().items(), (BLUE, RED), strict=True):
        axes[0, 0].plot(*zip(*curve, strict=True), "o-", color=colour, label=name)
        axes[0, 0].annotate(f"{curve[-1][1]:.3f}", curve[-1], (6, 0), textcoords="offset points", color=colour)
        numbers[f"cosine at depth 32, {name}"] = curve[-1][1]
    axes[0, 0].set(
        title="cosine to the true gradient after 2L steps", xlabel="depth L", ylim=(0, 1.05), xlim=(2, 36)
    )
    axes[0, 0].legend()

    for (name, (residuals, cosine)), colour in zip(relaxations().items(), (GREEN, RED, BLUE), strict=True):
        axes[0, 1].semilogy(residuals, color=colour, label=f"{name}: final cosine {cosine:.5f}")
        numbers[f"cosine at the end, {name}"] = cosine
    axes[0, 1].set(title="constraints not met, as a share of the force (8 layers)", xlabel="step", ylim=(1e-9, 5))
    axes[0, 1].legend(loc="lower left")

    sizes = stability()
    colours = [BLUE if factor < 1 else RED for factor, _ in sizes]
    axes[1, 0].vlines(
        [factor for factor, _ in sizes], 1, [size for _, size in sizes], colors=colours, linewidth=2
    )
    axes[1, 0].scatter(*zip(*sizes, strict=True), color=colours, zorder=3)
    axes[1, 0].axvline(1.0, color=GOLD)
    axes[1, 0].set(
        title="gradient after 400 steps / true gradient", xlabel="step / bound 4/(σ²(2ρ + α))", yscale="log"
    )
    numbers.update({f"gradient / true at {factor:g} of the bound": size for factor, size in sizes})

    for (name, (accuracy, cosine)), colour in zip(train().items(), (GOLD, BLUE, RED), strict=True):
        label = name if name == "backpropagation" else f"{name}, mean cosine {cosine:.2f}"
        axes[1, 1].plot(accuracy, color=colour, linewidth=5 if colour == GOLD else 1.6, label=label)
        numbers[f"accuracy, {name}"] = accuracy[-1]
    axes[1, 1].set(title="training on digits, 8 layers: test accuracy %", xlabel="optimizer step", ylim=(0, 100))
    axes[1, 1].legend(loc="lower right")

    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.title.set_fontsize(11)
        if axis.get_legend():
            axis.get_legend().set_frame_on(False)
    figure.savefig(out, dpi=130, facecolor="white")
    return numbers


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Run the example from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=Path("pc_alm.png"), help="where the picture goes")
    out = parser.parse_args(arguments).out
    numbers = draw(out)
    for name, value in numbers.items():
        print(f"{name:50s} {value:.4g}")
    print(f"picture: {out}")
    return numbers


if __name__ == "__main__":
    main()
