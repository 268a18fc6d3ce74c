"""How far a least-action relaxation is from backpropagation, step by step."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clagrange.mechanics.least_action import LeastAction, Phase, gradient_of


@dataclass(frozen=True)
class RelaxationErrors:
    """How far from backpropagation a relaxation is after each step, as relative Euclidean errors.

    Attributes:
        gradient: of all parameters' gradients together, shape (steps + 1,); entry 0 is the start.
        states: of each layer's state against the forward pass, shape (steps + 1, L).
        tensions: of −s^l/β against ∂C/∂x^l, shape (steps + 1, L).
    """

    gradient: Tensor
    states: Tensor
    tensions: Tensor


def relaxation_errors(
    network: nn.Module,
    inputs: Tensor,
    cost: Callable[[Tensor], Tensor],
    *,
    beta: float = 1.0,
    steps: int | None = None,
    step_size: float = 1.0,
    time: float | None = None,
    start: Phase | None = None,
) -> RelaxationErrors:
    """Error against autograd after every step of `least_action_gradients`, which has the same arguments.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
        >>> errors = relaxation_errors(net, torch.ones(2, 3).double(), lambda out: out.square().sum())
        >>> [bool(error < 1e-12) for error in errors.gradient]
        [False, False, False, False, True]
    """
    relaxed = LeastAction(network, beta=beta, steps=steps, step_size=step_size, time=time)
    inputs = inputs.detach()
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError("network: expected at least one trainable parameter, got none")
    with torch.enable_grad():
        states = relaxed._states(inputs.requires_grad_())
        truth = torch.autograd.grad(cost(states[-1]), [*parameters, *states])
    inputs = inputs.detach()
    slopes = truth[len(parameters) :]
    phase = relaxed.start(inputs) if start is None else start
    rows: list[list[float]] = []

    def note(phase: Phase) -> None:
        found = relaxed.gradients(phase, inputs, parameters)
        total = _relative(
            torch.cat([g.flatten() for g in found]), torch.cat([g.flatten() for g in truth[: len(found)]])
        )
        rows.append(
            [total]
            + [_relative(x, y.detach()) for x, y in zip(phase.states, states, strict=True)]
            + [_relative(-s / relaxed.beta, y) for s, y in zip(phase.tensions, slopes, strict=True)]
        )

    note(phase)
    for moved in relaxed.relax(inputs, gradient_of(cost), phase):
        note(moved)
    table = torch.tensor(rows, dtype=torch.float64)
    depth = relaxed.depth
    return RelaxationErrors(table[:, 0], table[:, 1 : 1 + depth], table[:, 1 + depth :])


def _relative(found: Tensor, truth: Tensor) -> float:
    return float(torch.linalg.vector_norm(found - truth) / torch.linalg.vector_norm(truth))
