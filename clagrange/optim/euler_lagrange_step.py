"""One step of the Euler-Lagrange rule for a group of parameters: block by block, or by multi-tensor kernels."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clagrange._checks import Number, per_replica
from clagrange.dynamics import relaxation_fraction
from clagrange.dynamics.beliefs import averaging_weights
from clagrange.gaussian import DiagonalPrecision, GaussianBlock, KroneckerPrecision, Precision
from clagrange.gaussian.kronecker import LowRank
from clagrange.optim.motion import foreach_widen, motion_resistance, widened_precision


class Block(NamedTuple):
    """Gaussian parameters that share a precision, in a step.

    Attributes:
        gaussian: the parameters and their precision, both changed in place.
        gradient: of the mean loss per example, of the shape of the joint mean.
        low_rank: the gradient by the rows of a small batch, where that is known.
        curvature: what an observer saw; None leaves the squared gradient.
        examples: behind the gradient.
        state: of the optimizer; holds the velocity where the motion term is on.
    """

    gaussian: GaussianBlock
    gradient: Tensor
    low_rank: LowRank | None
    curvature: Any
    examples: int
    state: dict[str, Any]

    @property
    def precision(self) -> Precision:
        """The precision of the block."""
        return self.gaussian.precision


def squared_gradient(gradient: Tensor, examples: int) -> Tensor:
    """n·g²: an estimate of the diagonal curvature of the mean loss per example.

    For a log-likelihood near its optimum the per-example gradients have mean 0 and covariance H, so the square
    of their mean over n examples has expectation H_ii/n. Away from it the estimate exceeds the mean square of
    the per-example gradients by (n − 1)·(mean gradient)².
    """
    return examples * gradient.square()


def step_blocks(blocks: list[Block], group: dict[str, Any]) -> None:
    """Step every block with the settings of its group."""
    rate = group["variance_rate"]
    fraction = relaxation_fraction(group["lr"], group["discount"]) if rate is None else rate
    decay, gain = averaging_weights(group["curvature_decay"], group["discount"])
    foreach = group["foreach"]
    if foreach is None:
        foreach = not any(isinstance(number, Tensor) for number in (*group.values(), decay, gain))
    resistance = motion_resistance(group["lr"], group["discount"]) if group["motion"] else None
    if resistance is not None:
        for block in blocks:
            _prepare_velocity(block)
    diagonal = [block for block in blocks if isinstance(block.precision, DiagonalPrecision)] if foreach else []
    if diagonal:
        assert not isinstance(decay, Tensor)
        _foreach_step(
            diagonal,
            lr=group["lr"],
            temperature=group["temperature"],
            discount=group["discount"],
            decay=decay,
            gain=gain,
            trust_region=group["trust_region"],
            fraction=fraction,
            resistance=resistance,
        )
    for block in blocks:
        precision = block.precision
        if foreach and isinstance(precision, DiagonalPrecision):
            continue
        curvature = block.curvature
        if isinstance(precision, DiagonalPrecision):
            if curvature is None:
                curvature = squared_gradient(block.gradient, block.examples)
            curvature = curvature * per_replica(gain, curvature)
        precision.observe(curvature, decay)
        precision.relax(group["temperature"], fraction)
        step = precision.displacement(
            block.gaussian.joint_mean(),
            block.gradient,
            lr=group["lr"],
            temperature=group["temperature"],
            discount=group["discount"],
            trust_region=group["trust_region"],
            prior_pull=group["prior_pull"],
            **({"low_rank": block.low_rank} if isinstance(precision, KroneckerPrecision) else {}),
        )
        for mean, part in zip(block.gaussian.means, block.gaussian.split(step), strict=True):
            if mean.grad is not None:
                mean.add_(part)
        if resistance is not None and isinstance(precision, DiagonalPrecision):
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


def _foreach_step(
    blocks: list[Block],
    *,
    lr: float,
    temperature: float,
    discount: float,
    decay: float,
    gain: Number,
    trust_region: float,
    fraction: Number,
    resistance: Number | None,
) -> None:
    """The same as `observe`, `relax`, `displacement` and widening of every block, by multi-tensor kernels."""
    means: list[Tensor] = [block.gaussian.means[0] for block in blocks]
    gradients = [block.gradient for block in blocks]
    precisions, curvatures, prior_means, prior_precisions = (
        [getattr(block.precision, name) for block in blocks]
        for name in ("precision", "curvature", "prior_mean", "prior_precision")
    )
    weights = [(1.0 - decay) * float(gain) * block.examples for block in blocks]
    torch._foreach_mul_(curvatures, decay)
    torch._foreach_addcmul_(curvatures, gradients, gradients, weights)
    prior_curvatures = torch._foreach_mul(prior_precisions, temperature)
    stiffness = torch._foreach_add(curvatures, prior_curvatures)
    torch._foreach_mul_(precisions, 1.0 - float(fraction))
    torch._foreach_add_(precisions, stiffness, alpha=float(fraction) / temperature)

    steps = torch._foreach_div(stiffness, precisions)
    torch._foreach_mul_(steps, -lr / temperature)  # minus the overdamped rate
    if not math.isinf(discount):
        roots = torch._foreach_mul(steps, -4.0 / discount)
        torch._foreach_add_(roots, 1.0)
        torch._foreach_sqrt_(roots)
        torch._foreach_add_(roots, 1.0)
        torch._foreach_mul_(steps, 2.0)
        torch._foreach_div_(steps, roots)
    torch._foreach_expm1_(steps)
    torch._foreach_div_(steps, stiffness)
    forces = torch._foreach_sub(means, prior_means)
    torch._foreach_mul_(forces, prior_curvatures)
    torch._foreach_add_(forces, gradients)
    torch._foreach_mul_(steps, forces)
    if not math.isinf(trust_region):
        bounds = torch._foreach_rsqrt(precisions)
        torch._foreach_mul_(bounds, trust_region)
        torch._foreach_minimum_(steps, bounds)
        torch._foreach_neg_(bounds)
        torch._foreach_maximum_(steps, bounds)
    torch._foreach_add_(means, steps)
    if resistance is not None:
        velocities = [block.state["velocity"] for block in blocks]
        foreach_widen(precisions, prior_precisions, velocities, steps, decay, float(resistance))
