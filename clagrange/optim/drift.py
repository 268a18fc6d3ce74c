"""Rotation and weight decay as optimal rules: steps that are not along a gradient, and why they pay."""

import math
from typing import Any

import torch
from torch import Tensor

from clagrange._checks import Number, check_nonnegative, check_number, check_positive
from clagrange.dynamics import stable_root
from clagrange.dynamics.beliefs import Belief, as_numbers
from clagrange.optim.base import CurvatureOptimizer, numbers, phi, squares


class Drift(CurvatureOptimizer):
    """Optimal steps of an agent that drifts by f(θ) = −jθ + qJθ for free and pays for departing from it.

    J turns the planes of neighbouring entries (2i, 2i + 1) of a parameter's last dimension by a right angle; an
    odd last entry only decays. With ηk = γ·lr, local curvature h and each plane taken as a complex number, the
    Euler-Lagrange equation of ‖θ' − f‖²/(2η) + kL has the decaying solution

        θ(t) = θ_∞ + e^{(−Λ + iq)t}(θ₀ − θ_∞),    Λ = √(γ²/4 + ηkh + j(j + γ)) − γ/2,
        θ_∞ = ηkh·θ* / (ηkh + j(j + γ) + q² − iγq),    θ* = θ − g/h,

    and the step is where it leads after t = 1: Δθ = −[(1 − e^{−z})/z]·[(j + (j² + q²)/γ − iq)θ + lr·g]/(1 + (z +
    2iq)/γ) with z = Λ − iq. Nothing is divided by h. With a rotation h is averaged over each plane, as the
    solution needs.

    Limits: q = 0, γ → ∞ and a short step: θ − lr·g − jθ, SGD with weight decay j/lr. j = q = 0:
    `OptimalMomentum` with horizon 1. g = 0, h = 0: the drift itself at γ → ∞, θ·e^{−j + iq}.

    Args:
        params: parameters, or groups of them; may have a leading replica dimension.
        lr: ηk/γ > 0: learning rate per step of the overdamped limit.
        weight_decay: j ≥ 0 per step: the weights decay by themselves, and the agent plans with it.
        rotation: q, radians per step.
        discount: γ > 0 per step; small ones (with lr·γ kept) are the limit γ → 0⁺ of the figures. At γ = 0 itself
            the objective is infinite: resisting the drift at the end point costs something for ever.
        curvature_decay: β in [0, 1] of the curvature belief, an average of n·g²; or a `Belief` (needs a finite
            discount), or the mapping of its numbers. At 1 the curvature is held where it was set.
        examples: n > 0: the batch size makes h the curvature of the mean loss per example.
        maximize: ascend instead of descend; the drift stays as it is.

    Every number may be a tensor of shape (R,).

    Raises:
        ValueError: if a number is out of range.
        RuntimeError: in ``step``, if ``curvature_decay`` is 1 and no curvature was set.

    Source: Vastola, Gershman, Rajan (2025), Eqs. 11 and 96-128, with j(j + γ) where their notebook has j(j − γ).

    Example:
        >>> weight = nn.Parameter(torch.tensor([1.0, 0.0]))
        >>> optimizer = Drift([weight], lr=0.1, rotation=math.pi / 2)
        >>> weight.grad = torch.zeros(2)
        >>> optimizer.step(); weight.data.round(decimals=5)
        tensor([0., 1.])
    """

    def __init__(
        self,
        params: Any,
        lr: Number = 1e-2,
        weight_decay: Number = 0.0,
        rotation: Number = 0.0,
        *,
        discount: Number = math.inf,
        curvature_decay: Number | Belief = 0.99,
        examples: Number = 1,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "rotation": rotation,
            "discount": discount,
            "curvature_decay": as_numbers(curvature_decay),
            "examples": examples,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def _check(self, group: dict[str, Any]) -> None:
        check_positive("lr", group["lr"])
        check_nonnegative("weight_decay", group["weight_decay"])
        check_number("rotation", group["rotation"])
        check_number(
            "discount",
            group["discount"],
            low=0.0,
            open_low=True,
            hint="at 0 the objective is infinite with a drift; take a small one and lr = ηk/discount",
        )
        super()._check(group)

    def _displacement(
        self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> Tensor:
        lr, decay, turn, discount = numbers(group, gradient, "lr", "weight_decay", "rotation", "discount")
        curvature = self._average("curvature", parameter, squares(gradient, group), state, group)
        position = parameter.to(gradient.dtype)
        if not isinstance(turn, Tensor) and turn == 0.0:
            return _decaying(position, gradient, curvature, lr, decay, discount)
        turn = torch.as_tensor(turn, dtype=gradient.dtype, device=gradient.device)
        paired = 2 * (gradient.shape[-1] // 2) if gradient.dim() else 0
        step = _decaying(position, gradient, curvature, lr, decay, discount)
        if paired:
            x, g, h = (t[..., :paired].unflatten(-1, (-1, 2)) for t in (position, gradient, curvature))
            turned = _turning(
                torch.view_as_complex(x.contiguous()),
                torch.view_as_complex(g.contiguous()),
                h.mean(-1),
                lr,
                decay,
                turn,
                discount,
            )
            turned_step = torch.view_as_real(turned).flatten(-2)
            step[..., :paired] = torch.where(turn == 0, step[..., :paired], turned_step)
        return step


def _decaying(
    position: Tensor, gradient: Tensor, curvature: Tensor, lr: Number, decay: Number, discount: Number
) -> Tensor:
    """−(1 − e^{−Λ})(θ − Bθ*), B = ηkh/(ηkh + j(j + γ))."""
    pull = decay + decay * decay / discount
    root = stable_root(lr * curvature + pull, discount)
    assert isinstance(root, Tensor)
    return -phi(root) * (pull * position + lr * gradient) / (1.0 + root / discount)


def _turning(
    position: Tensor,
    gradient: Tensor,
    curvature: Tensor,
    lr: Number,
    decay: Number,
    turn: Tensor,
    discount: Number,
) -> Tensor:
    """The same in planes that turn by ``turn``; complex but for the curvature."""
    root = stable_root(lr * curvature + decay + decay * decay / discount, discount)
    assert isinstance(root, Tensor)
    turn = turn.expand_as(root)
    exponent = torch.complex(root, -turn)
    # 1 − e^{−z}, without cancellation in its real part
    moved = torch.complex(
        -torch.expm1(-root) + 2.0 * torch.exp(-root) * torch.sin(turn / 2).square(),
        -torch.exp(-root) * torch.sin(turn),
    )
    still = exponent == 0
    share = torch.where(still, torch.ones_like(exponent), moved / torch.where(still, 1.0, exponent))
    pull = torch.complex(
        torch.as_tensor(decay + decay * decay / discount + turn.square() / discount).expand_as(root), -turn
    )
    inertia = 1.0 + torch.complex(root, turn) / discount  # 1 + (z + 2iq)/γ
    return -share * (pull * position + lr * gradient) / inertia
