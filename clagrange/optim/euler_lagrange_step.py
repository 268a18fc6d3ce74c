"""One step of the Euler-Lagrange rule for a group of parameters: block by block, or by multi-tensor kernels."""

from typing import Any

import torch
from torch import Tensor

from clagrange._checks import Number, per_replica
from clagrange.dynamics import relaxation_fraction
from clagrange.dynamics.beliefs import averaging_weights
from clagrange.gaussian import DiagonalPrecision
from clagrange.optim.diagonal_step import StepSettings, best_form, diagonal_step
from clagrange.optim.gaussian import Block
from clagrange.optim.motion import foreach_widen, motion_resistance, widened_precision


def squared_gradient(gradient: Tensor, examples: int) -> Tensor:
    """n·g²: an estimate of the diagonal curvature of the mean loss per example.

    For a log-likelihood near its optimum the per-example gradients have mean 0 and covariance H, so the square
    of their mean over n examples has expectation H_ii/n. Away from it the estimate exceeds the mean square of
    the per-example gradients by (n − 1)·(mean gradient)².
    """
    return examples * gradient.square()


def variance_fraction(group: dict[str, Any]) -> Number:
    """The fraction of the way to equilibrium that precisions relax in a step."""
    rate: Number | None = group["variance_rate"]
    return relaxation_fraction(group["lr"], group["discount"]) if rate is None else rate


def step_blocks(blocks: list[Block], group: dict[str, Any]) -> None:
    """Step every block with the settings of its group."""
    fraction = variance_fraction(group)
    decay, gain = averaging_weights(group["curvature_decay"], group["discount"])
    resistance = motion_resistance(group["lr"], group["discount"]) if group["motion"] else None
    if resistance is not None:
        for block in blocks:
            _prepare_velocity(block)
    diagonal = [block for block in blocks if isinstance(block.precision, DiagonalPrecision)]
    others = [block for block in blocks if not isinstance(block.precision, DiagonalPrecision)]
    plain = any(isinstance(number, Tensor) for number in (*group.values(), fraction, decay, gain))
    if group["foreach"] is False or plain:
        diagonal, others = [], blocks
    if diagonal:
        settings = StepSettings(
            lr=group["lr"],
            temperature=group["temperature"],
            discount=group["discount"],
            fraction=float(fraction),
            decay=float(decay),
            gain=float(gain),
            trust_region=group["trust_region"],
            prior_pull=group["prior_pull"],
        )
        means: list[Tensor] = [block.gaussian.means[0] for block in diagonal]
        form = "compiled" if group["compiled"] else "foreach"
        if group["compiled"] is None and group["foreach"] is None:
            form = best_form(means)
        _step_diagonal(diagonal, means, settings, form, resistance)
    for block in others:
        _step_one(block, group, fraction, decay, gain, resistance)


def _step_diagonal(
    blocks: list[Block], means: list[Tensor], settings: StepSettings, form: str, resistance: Number | None
) -> None:
    """The same as `_step_one` for each, by the fast kernels."""
    precisions = [block.precision for block in blocks]
    steps = diagonal_step(
        means,
        [block.gradient for block in blocks],
        precisions,  # type: ignore[arg-type]  # diagonal ones
        [block.curvature for block in blocks],
        [block.examples for block in blocks],
        settings,
        form=form,
        return_steps=resistance is not None,
    )
    if steps is not None and resistance is not None:
        values, priors = ([getattr(p, name) for p in precisions] for name in ("precision", "prior_precision"))
        velocities = [block.state["velocity"] for block in blocks]
        foreach_widen(values, priors, velocities, tuple(steps), settings.decay, float(resistance))


def _step_one(
    block: Block, group: dict[str, Any], fraction: Number, decay: Number, gain: Number, resistance: Number | None
) -> None:
    precision, curvature = block.precision, block.curvature
    settings = {name: group[name] for name in ("lr", "temperature", "discount", "trust_region", "prior_pull")}
    if isinstance(precision, DiagonalPrecision):
        if curvature is None:
            curvature = squared_gradient(block.gradient, block.examples)
        curvature = curvature * per_replica(gain, curvature)
    precision.observe(curvature, decay)
    precision.relax(group["temperature"], fraction)
    gaussian = block.gaussian
    joint = gaussian.joint_mean() if precision.needs_mean else precision.prior_mean  # joining them takes time
    step = precision.step(joint, block.gradient, **settings)
    gaussian.add(step, block.moving)
    if resistance is not None and isinstance(precision, DiagonalPrecision):
        assert isinstance(step, Tensor)
        velocity = block.state["velocity"].lerp_(step, 1.0 - per_replica(decay, step))
        precision.precision.copy_(
            widened_precision(
                precision.precision, precision.prior_precision, velocity, per_replica(resistance, step)
            )
        )


def _prepare_velocity(block: Block) -> None:
    if not isinstance(block.precision, DiagonalPrecision):
        raise TypeError(
            f"motion: expected diagonal precisions, got a {type(block.precision).__name__}; the motion term is "
            f"known weight by weight only, so set motion=False"
        )
    if "velocity" not in block.state:
        block.state["velocity"] = torch.zeros_like(block.precision.precision)
