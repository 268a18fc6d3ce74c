"""Backpropagation as a relaxation: a wave of states goes up the network, a wave of tensions comes back.

Run it with ``python examples/least_action.py --out least_action.png``.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import clagrange
from clagrange.mechanics import RelaxationErrors, least_action, relaxation_errors
from clagrange.tasks.digits import digits

INK, BLUE, RED, GOLD = "#333333", "#332288", "#CC6677", "#C4A93A"


def network(depth: int, width: int = 32) -> nn.Sequential:
    """A perceptron with ``depth`` weight matrices for digits."""
    net = nn.Sequential()
    for layer in range(depth - 1):
        net.extend([nn.Linear(64 if layer == 0 else width, width), nn.Tanh()])
    net.append(nn.Linear(width, 10))
    clagrange.networks.initialize(net, torch.Generator().manual_seed(0))
    return net.double()


def waves(depth: int = 8) -> tuple[RelaxationErrors, RelaxationErrors]:
    """Errors step by step, with unit steps and with steps of 0.2 of the continuous flow."""
    inputs, targets = digits()
    net, x = network(depth), inputs[:16].double()

    def cost(output: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, targets[:16])

    unit = relaxation_errors(net, x, cost, steps=2 * depth + 4)
    return unit, relaxation_errors(net, x, cost, step_size=0.2, time=50.0)


def train(steps: int = 40) -> tuple[list[float], list[float], list[float]]:
    """Losses with autograd, losses with least action, largest difference of their weights after each step."""
    inputs, targets = digits()
    nets = [network(4), network(4)]
    optimizers = [torch.optim.Adam(net.parameters(), lr=3e-3) for net in nets]
    losses: tuple[list[float], list[float]] = ([], [])
    differences = []
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    for step in range(steps):
        chosen = order[32 * step % 1700 :][:32]
        for which, (net, optimizer) in enumerate(zip(nets, optimizers, strict=True)):
            optimizer.zero_grad()
            if which == 0:
                loss = nn.functional.cross_entropy(net(inputs[chosen].double()), targets[chosen])
                loss.backward()
            else:
                with least_action(net):
                    loss = nn.functional.cross_entropy(net(inputs[chosen].double()), targets[chosen])
                    loss.backward()
            optimizer.step()
            losses[which].append(loss.item())
        pairs = zip(nets[0].parameters(), nets[1].parameters(), strict=True)
        differences.append(max(float((a - b).detach().abs().max()) for a, b in pairs))
    return losses[0], losses[1], differences


def draw(
    unit: RelaxationErrors,
    flow: RelaxationErrors,
    training: tuple[list[float], list[float], list[float]],
    out: Path,
) -> None:
    """The picture: both waves, the gradient's error, a training run."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    depth = unit.states.shape[1]
    figure = Figure(figsize=(13, 6.4), layout="constrained")
    grid = figure.add_gridspec(2, 3, width_ratios=[1.25, 1, 1])
    norm = LogNorm(1e-3, 1.0, clip=True)
    for row, (errors, title) in enumerate(
        [
            (unit.tensions, "tension s: the gradient comes down"),
            (unit.states, "state x: the forward pass goes up"),
        ]
    ):
        panel = figure.add_subplot(grid[row, 0])
        shown = panel.pcolormesh(
            range(len(errors)), range(1, depth + 1), errors.T.clamp(min=1e-17), cmap="magma", norm=norm
        )
        panel.set_title(title, fontsize=11, color=INK, loc="left")
        panel.set_ylabel("layer", color=INK)
        panel.set_yticks([1, depth // 2, depth])
        panel.set_xticks([0, depth, 2 * depth], ["0", "L", "2L"])
    panel.set_xlabel("unit step", color=INK)
    figure.colorbar(
        shown, ax=figure.axes, label="relative error (black: exact)", location="left", shrink=0.7, pad=0.03
    )

    panel = figure.add_subplot(grid[:, 1])
    panel.semilogy(unit.gradient.clamp(min=1e-17), "o-", color=BLUE, markersize=4, label="unit steps")
    times = torch.arange(len(flow.gradient)) * 0.2
    panel.semilogy(
        times, flow.gradient.clamp(min=1e-17), color=RED, linewidth=2, label="continuous flow (steps of 0.2)"
    )
    panel.axvline(2 * depth, color=GOLD, linewidth=1.5)
    panel.annotate("exact after 2L steps", (2 * depth, 1e-9), (2 * depth + 4, 1e-9), color="#8A7A20", va="center")
    panel.set_title("error of the gradient of all weights", fontsize=11, color=INK, loc="left")
    panel.set_xlabel("time", color=INK)
    panel.set_ylim(3e-18, 5)
    panel.text(2 * depth - 1, 1e-12, "unit steps", color=BLUE, ha="right")
    panel.text(31, 3e-4, "continuous flow\n(steps of 0.2)", color=RED)

    exact, relaxed, differences = training
    panel = figure.add_subplot(grid[:, 2])
    panel.plot(exact, color=GOLD, linewidth=6, alpha=0.6, label="autograd")
    panel.plot(relaxed, color=BLUE, linewidth=1.5, label="least action")
    panel.set_title("training loss on digits, Adam", fontsize=11, color=INK, loc="left")
    panel.set_xlabel("optimizer step", color=INK)
    told = f"largest difference of the two\nnetworks' weights at the end: {differences[-1]:.1g}"
    panel.legend(frameon=False, title=told, alignment="left")
    for panel in figure.axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(colors=INK)
    figure.savefig(out, dpi=130, facecolor="white")


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Relax, train, draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=Path("least_action.png"), help="where the picture goes")
    out = parser.parse_args(arguments).out
    unit, flow = waves()
    training = train()
    depth = unit.states.shape[1]
    numbers = {
        "depth L": float(depth),
        "error of the gradient after 2L - 1 steps": float(unit.gradient[2 * depth - 1]),
        "error after 2L steps": float(unit.gradient[2 * depth]),
        "error of the continuous flow at time 50": float(flow.gradient[-1]),
        "last loss with autograd": training[0][-1],
        "last loss with least action": training[1][-1],
        "largest difference of the weights": training[2][-1],
    }
    for name, value in numbers.items():
        print(f"{name:45s} {value:.4g}")
    draw(unit, flow, training, out)
    print(f"picture: {out}")
    return numbers


if __name__ == "__main__":
    main()
