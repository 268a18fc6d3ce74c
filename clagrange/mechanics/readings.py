"""One reading of the energy, the sums behind it, and the running score of its defect."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from clagrange.mechanics.energy import Metric, dot, standardized
from clagrange.mechanics.laws import coupled_decay, momentum_law, parameters_of


@dataclass(frozen=True)
class Reading:
    """The energy at one step of the optimizer, in units of the loss.

    Attributes:
        step: number of the step, from 1.
        loss: L(θ_k), before the step.
        kinetic: Σm‖θ_{k+1} − θ_k‖²/(2ε).
        potential: L(θ_k) + ½∇L·(θ_{k+1} − θ_k), see `midstep_potential`.
        energy: kinetic + potential.
        change: of the energy since the step before; None at the first step of a run, as all that follow.
        predicted: the change that the law gives, with what noise adds.
        damping: −2βK dt with the mean K of the two steps, what friction takes in the continuous motion; None
            where friction is not known.
        noise: the part of ``predicted`` that gradient noise adds; 0 where it is not asked for.
        defect: change − predicted.
        surprise: how many running standard deviations the defect lies off its running mean: far from 0 where
            data or network changed all at once. A detector of switches needs no more than this number.
    """

    step: int
    loss: float
    kinetic: float
    potential: float
    energy: float
    change: float | None = None
    predicted: float | None = None
    damping: float | None = None
    noise: float = 0.0
    defect: float | None = None
    surprise: float | None = None

    def as_dict(self) -> dict[str, float]:
        """The numbers that there are, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


class RunningScore:
    """How unusual each number of a sequence is: `standardized` with its mean, variance and count kept.

    Args:
        decay: weight of the past in the running mean and variance, in [0, 1].

    Example:
        >>> score = RunningScore()
        >>> usual = [score.update(value) for value in (1.0, -1.0) * 20]
        >>> round(score.update(10.0))
        10
    """

    def __init__(self, decay: float = 0.98) -> None:
        self.decay = decay
        self.mean = 0.0
        self.variance = 0.0
        self.count = 0

    def update(self, value: float) -> float:
        """The score of ``value`` against all before it; then it counts among them."""
        score, self.mean, self.variance = standardized(
            value, self.mean, self.variance, self.count, decay=self.decay
        )
        self.count += 1
        return score

    def state_dict(self) -> dict[str, Any]:
        """Mean, variance and count."""
        return {"mean": self.mean, "variance": self.variance, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.mean, self.variance, self.count = state["mean"], state["variance"], state["count"]


class Sums(NamedTuple):
    """What the laws need of one parameter group at step k; g holds the gradient of weight decay λ too."""

    momentum: float
    step_size: float
    squared: float
    """‖Δ_k‖², in the metric."""
    overlap: float
    """Δ_{k−1}·Δ_k, in the metric."""
    squared_before: float
    """‖Δ_{k−1}‖², in the metric."""
    work: float
    """g_k·Δ_k."""
    work_before: float
    """g_k·Δ_{k−1}."""
    decay: float
    """½λ‖θ_k‖²."""
    jump: float
    """‖g_k − g_{k−1}‖² in the inverse metric; 0 unless asked for."""

    @property
    def kinetic(self) -> float:
        """‖Δ_k‖²/(2ε)."""
        return self.squared / (2.0 * self.step_size) if self.step_size else 0.0


def group_sums(
    optimizer: Optimizer,
    starts: Sequence[Tensor],
    gradients: Sequence[Tensor],
    before: Sequence[Tensor] | None,
    gradients_before: Sequence[Tensor] | None,
    weigh: Metric,
    unweigh: Metric | None,
) -> tuple[list[Sums], list[Tensor]]:
    """Sums of every parameter group after a step, and the displacements; all sums reach the host together.

    Args:
        optimizer: the stepped parameters are read off it.
        starts: θ_k of every parameter.
        gradients: those of this step.
        before: Δ_{k−1} of every parameter; None at the first step.
        gradients_before: those of the step before, for ``jump``; None leaves it 0.
        weigh: the metric.
        unweigh: its inverse, needed with ``gradients_before``.
    """
    displacements, rows, owners = [], [], []
    for index, (number, parameter) in enumerate(parameters_of(optimizer)):
        group, start, raw = optimizer.param_groups[number], starts[index], gradients[index]
        decay = coupled_decay(group)
        displacement = parameter.detach() - start
        gradient = (-raw if group.get("maximize") else raw) + decay * start
        old = torch.zeros_like(start) if before is None else before[index].to(displacement)
        weighed = weigh(parameter, displacement)
        row = [
            dot(displacement, weighed),
            dot(old, weighed),
            dot(old, weigh(parameter, old)),
            dot(gradient, displacement),
            dot(gradient, old),
            0.5 * decay * dot(start, start),
        ]
        if gradients_before is not None and unweigh is not None:
            jump = raw - gradients_before[index].to(raw)
            row.append(dot(jump, unweigh(parameter, jump)))
        else:
            row.append(torch.zeros_like(row[0]))
        rows.append(torch.stack(row).to(starts[0].device))
        owners.append(number)
        displacements.append(displacement)
    totals = [[0.0] * 7 for _ in optimizer.param_groups]
    for number, values in zip(owners, torch.stack(rows).tolist(), strict=True):
        totals[number] = [total + value for total, value in zip(totals[number], values, strict=True)]
    groups = zip(optimizer.param_groups, totals, strict=True)
    return [Sums(*momentum_law(group), *total) for group, total in groups], displacements


def noting(closure: Callable[[], Any], note: Callable[[Any], None]) -> Callable[[], Any]:
    """The closure, with what its first evaluation gives handed to ``note``."""
    first = True

    def wrapped() -> Any:
        nonlocal first
        loss = closure()
        if first:
            note(loss)
        first = False
        return loss

    return wrapped
