"""The ballistic rule: the speed of the step does not depend on how steep the loss is."""

from typing import Any

from torch import Tensor

from clagrange._checks import Number, check_nonnegative
from clagrange.dynamics.beliefs import Belief, as_numbers
from clagrange.optim.base import CurvatureOptimizer, numbers, squares


class Ballistic(CurvatureOptimizer):
    """θ ← θ − lr·g/√(h + ε): optimal steps at small discount, with the diagonal curvature h of the loss.

    Where γ² ≪ 4ηkh an optimal path toward the minimum of a local quadratic moves by −√(ηk)Δt·H^{−1/2}g, so
    lr = √(ηk)·Δt. The curvature belief averages squared gradients,

        s ← βs + (1 − β)·n·g²,    h = s / (1 − β^t)   (or s itself without ``bias_correction``).

    With ``bias_correction=False`` and ``examples=1`` this is to the letter the rule that the authors ran:
    s ← β₂s + (1 − β₂)g², θ ← θ − lr·g/√(s + 1e-8), whose first step is lr/√(1 − β₂). That is RMSprop with ε
    inside the root. For large ε it is SGD with learning rate lr/√ε; with β = 0 and ε = 0 it is sign descent. With
    the curvature set by hand (`set_curvature`, ``curvature_decay=1``) it is Eq. 32 itself.

    Args:
        params: parameters, or groups of them; may have a leading replica dimension.
        lr: √(ηk)·Δt ≥ 0, in units of θ per root of curvature.
        curvature_decay: β in [0, 1]; or a `Belief`, taken at discount 0 as the ballistic limit says; or the
            mapping of its numbers.
        eps: ε ≥ 0, in units of the curvature (not of its root).
        examples: n > 0: the batch size makes h the curvature of the mean loss per example; 1 as published.
        bias_correction: divide the average by the weight of what it has seen.
        maximize: ascend instead of descend.

    Every number may be a tensor of shape (R,).

    Raises:
        ValueError: if a number is out of range.
        RuntimeError: in ``step``, if ``curvature_decay`` is 1 and no curvature was set.

    Source: Vastola, Gershman, Rajan (2025), Eqs. 7, 32 and 87, and the authors' notebook for Fig. 2e,f.

    Example:
        >>> weight = nn.Parameter(torch.tensor([3.0, 3.0]))
        >>> optimizer = Ballistic([weight], lr=0.1, curvature_decay=1.0, eps=0.0)
        >>> optimizer.set_curvature(weight, torch.tensor([1.0, 4.0]))
        >>> weight.grad = torch.tensor([3.0, 12.0])  # of ½hθ²: θ falls by lr·√h·θ
        >>> optimizer.step(); weight.data
        tensor([2.7000, 2.4000])
    """

    def __init__(
        self,
        params: Any,
        lr: Number = 1e-3,
        curvature_decay: Number | Belief = 0.999,
        eps: Number = 1e-8,
        *,
        examples: Number = 1,
        bias_correction: bool = True,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "curvature_decay": as_numbers(curvature_decay),
            "eps": eps,
            "examples": examples,
            "bias_correction": bias_correction,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        check_nonnegative("lr", group["lr"])
        check_nonnegative("eps", group["eps"])

    def _displacement(
        self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> Tensor:
        lr, eps = numbers(group, gradient, "lr", "eps")
        curvature = self._average(
            "curvature", parameter, squares(gradient, group), state, group, correct=group["bias_correction"]
        )
        # a gradient of 0 asks for no step, also where nothing was ever seen and ε is 0
        return -lr * (gradient * (curvature + eps).rsqrt()).masked_fill_(gradient == 0, 0.0)
