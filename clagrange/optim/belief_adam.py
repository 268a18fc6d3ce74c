"""Adam as the rule of an agent that believes gradient and curvature to drift."""

from typing import Any

import torch
from torch import Tensor

from clagrange._checks import Number, check_choice, check_nonnegative, check_number, per_replica
from clagrange.dynamics.beliefs import Belief, as_numbers, averaging_weights, observe_gaussian
from clagrange.optim.base import RuleOptimizer, check_belief, numbers


class BeliefAdam(RuleOptimizer):
    """θ ← θ − lr·m/(√v + ε), with m and v the agent's beliefs over gradient and curvature.

    The agent takes the loss near θ to be mᵀΔθ + (c/2)ΔθᵀVΔθ and believes that m and V are Ornstein-Uhlenbeck
    processes that it observes through the gradient; in the ballistic regime it moves by
    θ' = −√(ηk/c)·V^{−1/2}m, so lr = √(ηk/c)·Δt. The beliefs follow `clagrange.dynamics.Belief`:

        x̂ ← βx̂ + (1 − β)·(s²/r²)/κ²·y,  β = e^{−λ_κ},  λ_κ = √(γ²/4 + κ²) − γ/2,  κ² = a(a + γ) + s²/r²,

    with y = g for m and y = g² for v (``observation="moments"``: two independent observations), or with g ~ N(m,
    v) (``observation="gaussian"``: y = (g − m)² for v, and the observation noises are v and 2v²).

    Beliefs about quantities that do not decay (a = 0), seen as moments, are running averages: with numbers β₁, β₂
    in place of beliefs this is Adam. Under "gaussian" v is the variance about m; where gradients carry no noise
    it goes to 0 and only ε bounds the step.

    Args:
        params: parameters, or groups of them; may have a leading replica dimension.
        lr: √(ηk/c)·Δt ≥ 0.
        gradient_belief: β₁ in [0, 1), or a `Belief` over the gradient, or the mapping of its numbers.
        square_belief: β₂ or a `Belief` over the squared gradient.
        discount: γ ≥ 0 per step, finite: sets the rates of beliefs (not of plain β).
        observation: "moments" or "gaussian"; the latter takes beliefs only, and their observation noises count
            in units of what the model says (1 is the model).
        eps: ε ≥ 0, added to the root.
        bias_correction: divide m and v by 1 − β^t, as Adam does; "gaussian" starts at its first observation.
        maximize: ascend instead of descend.

    Every number may be a tensor of shape (R,).

    Raises:
        TypeError: if a belief is none, or "gaussian" is given a plain β.
        ValueError: if a number is out of range.

    Source: Vastola, Gershman, Rajan (2025), Eqs. 12-14 and 133-142.

    Example:
        >>> weight = nn.Parameter(torch.tensor([1.0]))
        >>> slow = clagrange.dynamics.Belief.averaging(0.999, discount=1.0)
        >>> optimizer = BeliefAdam([weight], lr=0.1, square_belief=slow)
        >>> weight.grad = torch.tensor([5.0])
        >>> optimizer.step(); weight.data
        tensor([0.9000])
    """

    def __init__(
        self,
        params: Any,
        lr: Number = 1e-3,
        gradient_belief: Number | Belief = 0.9,
        square_belief: Number | Belief = 0.999,
        *,
        discount: Number = 1.0,
        observation: str = "moments",
        eps: Number = 1e-8,
        bias_correction: bool = True,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "gradient_belief": as_numbers(gradient_belief),
            "square_belief": as_numbers(square_belief),
            "discount": discount,
            "observation": observation,
            "eps": eps,
            "bias_correction": bias_correction,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def _check(self, group: dict[str, Any]) -> None:
        check_nonnegative("lr", group["lr"])
        check_number("discount", group["discount"], low=0.0, high=float("inf"), open_high=True)
        check_choice("observation", group["observation"], ("moments", "gaussian"))
        check_nonnegative("eps", group["eps"])
        for name in ("gradient_belief", "square_belief"):
            check_belief(name, group[name], group["discount"], open_high=True)
            if group["observation"] == "gaussian" and not isinstance(group[name], dict):
                raise TypeError(
                    f"{name}: expected a Belief, got {group[name]!r}; with observation='gaussian' the rate "
                    f"follows from the variance of the gradient, so that a fixed β has no meaning"
                )

    def _displacement(
        self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> Tensor:
        if not state:
            state["gradient_mean"], state["gradient_square"] = (
                torch.zeros_like(gradient),
                torch.zeros_like(gradient),
            )
            state["step"] = torch.zeros(())
        mean, square = state["gradient_mean"], state["gradient_square"]
        state["step"] += 1
        lr, eps = numbers(group, gradient, "lr", "eps")
        if group["observation"] == "gaussian":
            beliefs = Belief(**group["gradient_belief"]), Belief(**group["square_belief"])
            updated = observe_gaussian(mean, square, gradient, beliefs, group["discount"])
            mean.copy_(updated[0])
            square.copy_(updated[1])
            return _step(mean, square.sqrt() + eps, lr)
        seen: list[Number] = []
        for belief, name, observed in (
            (mean, "gradient_belief", gradient),
            (square, "square_belief", gradient.square()),
        ):
            keep, gain = (
                per_replica(value, gradient) for value in averaging_weights(group[name], group["discount"])
            )
            belief.lerp_(observed * gain, 1.0 - keep)
            seen.append(1.0 - keep ** float(state["step"]) if group["bias_correction"] else 1.0)
        return _step(mean, square.sqrt() / seen[1] ** 0.5 + eps, lr / seen[0])


def _step(mean: Tensor, root: Tensor, lr: Number) -> Tensor:
    return -lr * mean / root
