"""What a torch optimizer is as a motion: its momentum, step size, potential of weight decay and metric."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from clagrange.mechanics.energy import Metric


def parameters_of(optimizer: Optimizer) -> Iterator[tuple[int, Tensor]]:
    """Every parameter with the number of its group, in order."""
    for number, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            yield number, parameter


def momentum_law(group: dict[str, Any]) -> tuple[float, float]:
    """Momentum m and step size ε of a parameter group, as in θ_{k+1} − θ_k = m(θ_k − θ_{k−1}) − ε M⁻¹∇L.

    ``momentum`` with ε = lr·(1 − dampening), else ``betas`` with m = β₁ and ε = lr·(1 − β₁), else m = 0.

    Raises:
        ValueError: if lr or momentum is a tensor with several numbers.

    Example:
        >>> momentum_law({"lr": 0.1, "momentum": 0.9})
        (0.9, 0.1)
    """
    lr = _number("lr", group["lr"])
    if "momentum" in group:
        return _number("momentum", group["momentum"]), lr * (1.0 - float(group.get("dampening", 0.0)))
    if "betas" in group:
        momentum = _number("betas[0]", group["betas"][0])
        return momentum, lr * (1.0 - momentum)
    return 0.0, lr


def coupled_decay(group: dict[str, Any]) -> float:
    """λ of a weight decay λθ that is added to the gradient, as SGD and Adam do; 0 for AdamW's form.

    Example:
        >>> coupled_decay({"weight_decay": 0.5})
        0.5
        >>> coupled_decay({"weight_decay": 0.5, "decoupled_weight_decay": True})
        0.0
    """
    if group.get("decoupled_weight_decay"):
        return 0.0
    return _number("weight_decay", group.get("weight_decay", 0.0))


def adam_metric(optimizer: Optimizer) -> Metric:
    """The metric √v̂ + eps in which Adam is momentum descent, read off its state at every call.

    v̂ is the bias-corrected average of squared gradients. The metric changes slowly, and the bias correction of
    the momentum fades, so that the momentum law holds the better the longer the run.

    Raises:
        ValueError: if the optimizer has no ``betas``.

    Example:
        >>> theta = torch.ones(2, requires_grad=True)
        >>> optimizer = torch.optim.Adam([theta])
        >>> theta.grad = torch.tensor([2.0, 3.0])
        >>> optimizer.step()
        >>> adam_metric(optimizer)(theta, torch.ones(2))
        tensor([2.0000, 3.0000])
    """
    if any("betas" not in group for group in optimizer.param_groups):
        raise ValueError(
            f"optimizer: expected one of Adam's kind with betas, got {type(optimizer).__name__}; give mass "
            f"another function (parameter, vector) → metric times vector"
        )
    group_of = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}

    def metric(parameter: Tensor, vector: Tensor) -> Tensor:
        state = optimizer.state[parameter]
        if "exp_avg_sq" not in state:
            return vector
        correction = 1.0 - group_of[parameter]["betas"][1] ** float(state["step"])
        deviation: Tensor = (state["exp_avg_sq"] / correction).sqrt() + group_of[parameter]["eps"]
        return deviation * vector

    return metric


def _number(name: str, value: Any) -> float:
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(
            f"{name}: expected one number for a parameter group, got shape {tuple(value.shape)}; the energy of "
            f"replicas with different settings is not one system: give the meter an optimizer of equal settings"
        )
    return float(value)
