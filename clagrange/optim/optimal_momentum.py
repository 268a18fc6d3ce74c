"""Optimal steps on a local quadratic over a finite horizon: between SGD, Newton and the ballistic rule."""

import math
from typing import Any

import torch
from torch import Tensor

from clagrange._checks import Number, check_number, check_positive
from clagrange.dynamics import stable_root
from clagrange.dynamics.beliefs import Belief, as_numbers
from clagrange.optim.base import CurvatureOptimizer, numbers, phi, squares


class OptimalMomentum(CurvatureOptimizer):
    """θ ← θ − (1 − e^{−λΔt})·g/h with λ = √(γ²/4 + ηkh) − γ/2, ηk = γ·lr: a path with optimal momentum.

    An agent that pays for its speed and for the loss, θ' = p, p' = γp + ηk∇L, and sees the loss as a quadratic
    with diagonal Hessian h, follows the decaying root λ of λ² + γλ = γ·lr·h; the step is where it is after Δt.
    It is computed as −Δt·(λ/h)·(1 − e^{−λΔt})/(λΔt)·g with λ/h = 2·lr/(1 + √(1 + 4·lr·h/γ)), so a curvature of 0
    gives −lr·Δt·g and nothing is divided by it.

    Limits: γ² ≫ 4ηkh and lr·h·Δt ≪ 1: SGD with learning rate lr·Δt. Δt → ∞: Newton's step −g/h, which no
    lr overshoots. γ² ≪ 4ηkh, short horizon: −√(γ·lr)·Δt·g/√h, `Ballistic`. The curvature belief is an average of
    n·g² (see `set_curvature` for another source), divided by the weight of what it has seen.

    Args:
        params: parameters, or groups of them; may have a leading replica dimension.
        lr: ηk/γ > 0: learning rate per step of the overdamped limit.
        discount: γ > 0 per step; infinite is the gradient flow of the local quadratic, 1 − e^{−lr·h·Δt}.
        horizon: Δt > 0, in steps: how far the local quadratic is followed. Infinite is Newton's method.
        curvature_decay: β in [0, 1] of the curvature belief; or a `Belief` (needs a finite discount), or the
            mapping of its numbers. At 1 the curvature is held where it was set.
        examples: n > 0: the batch size makes h the curvature of the mean loss per example.
        maximize: ascend instead of descend.

    Every number may be a tensor of shape (R,).

    Raises:
        ValueError: if a number is out of range; in ``step``, if the horizon is infinite and the Hessian singular
            in a direction that has a gradient: the loss is then linear there and has no minimum to step to.
        RuntimeError: in ``step``, if ``curvature_decay`` is 1 and no curvature was set.

    Source: Vastola, Gershman, Rajan (2025), Eqs. 3-7 and 53-87.

    Example:
        >>> weight = nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = OptimalMomentum([weight], lr=1.0, discount=1.0, curvature_decay=1.0)
        >>> optimizer.set_curvature(weight, 1.0)
        >>> weight.grad = weight.detach().clone()  # of ½θ²: θ falls to e^{−.618034}
        >>> optimizer.step(); weight.data
        tensor([0.5390])
    """

    def __init__(
        self,
        params: Any,
        lr: Number = 1e-2,
        discount: Number = math.inf,
        horizon: Number = 1.0,
        *,
        curvature_decay: Number | Belief = 0.99,
        examples: Number = 1,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "discount": discount,
            "horizon": horizon,
            "curvature_decay": as_numbers(curvature_decay),
            "examples": examples,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def _check(self, group: dict[str, Any]) -> None:
        check_positive("lr", group["lr"])
        check_number("discount", group["discount"], low=0.0, open_low=True)
        check_number("horizon", group["horizon"], low=0.0, open_low=True)
        super()._check(group)

    def _displacement(
        self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> Tensor:
        lr, discount, horizon = numbers(group, gradient, "lr", "discount", "horizon")
        curvature = self._average("curvature", parameter, squares(gradient, group), state, group)
        if isinstance(horizon, Tensor) or math.isinf(horizon):
            endless = torch.isinf(torch.as_tensor(horizon))
            if bool((endless & (curvature == 0) & (gradient != 0)).any()):
                raise ValueError(
                    "horizon: expected a finite one where the Hessian is singular, got inf; with curvature 0 and "
                    "a gradient the loss is linear in that direction and Newton's step has no minimum to go to"
                )
            newton = torch.where(gradient == 0, torch.zeros_like(gradient), gradient / curvature)
            if not isinstance(horizon, Tensor):
                return -newton
            finite = torch.where(endless, torch.ones_like(horizon), horizon)
            return torch.where(endless, -newton, _step(gradient, curvature, lr, discount, finite))
        return _step(gradient, curvature, lr, discount, horizon)


def _step(gradient: Tensor, curvature: Tensor, lr: Number, discount: Number, horizon: Number) -> Tensor:
    root = stable_root(lr * curvature, discount)
    assert isinstance(root, Tensor)
    speed = lr * (2.0 / (1.0 + torch.sqrt(1.0 + 4.0 * lr * curvature / discount)))  # λ/h
    return -horizon * speed * phi(root * horizon) * gradient
