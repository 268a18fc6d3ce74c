"""SGD, Adam and Muon whose hyper-parameters may differ between replicas.

torch's SGD and Adam serve a stacked network as long as all replicas share their settings; its Muon takes single
matrices only. These take a tensor of shape (R,) for any number, and equal torch's for each replica.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from clagrange import replicas
from clagrange._checks import (
    Number,
    check_choice,
    check_fraction,
    check_nonnegative,
    check_number,
    per_replica,
)
from clagrange.optim.base import PerParameterOptimizer


def adam_update(
    parameter: Tensor,
    gradient: Tensor,
    gradient_mean: Tensor,
    gradient_square: Tensor,
    step: Tensor,
    *,
    lr: Number,
    betas: tuple[Number, Number] = (0.9, 0.999),
    eps: Number = 1e-8,
) -> None:
    """One Adam step in place: θ ← θ − lr · m̂ / (√v̂ + ε), with bias-corrected averages m̂ and v̂.

    In the theory this is the rule of an agent that believes gradient and squared gradient to be
    Ornstein-Uhlenbeck processes, in the ballistic regime (Vastola et al. 2025, Eqs. 12-14).

    Args:
        parameter: θ, changed in place.
        gradient: g, same shape.
        gradient_mean: m, changed in place.
        gradient_square: v, changed in place.
        step: number of steps including this one, 0-dimensional.
        lr: learning rate.
        betas: decay of m and v.
        eps: ε.
    """
    gradient = gradient.to(gradient_mean.dtype)
    tensors, numbers = (parameter, gradient, gradient_mean, gradient_square), (lr, *betas, eps)
    lr, beta1, beta2, eps = (per_replica(value, parameter) for value in numbers)
    if all(_in_one_pass(tensor, parameter.dtype) for tensor in tensors):
        _adam_in_one_pass(tensors, numbers, step)
        return
    gradient_mean.lerp_(gradient, 1.0 - beta1)
    gradient_square.lerp_(gradient.square(), 1.0 - beta2)
    count = step.double()  # not a number of Python's, for which a GPU would be waited for
    deviation = gradient_square.sqrt() / (1.0 - beta2**count) ** 0.5 + eps
    parameter.sub_((lr / (1.0 - beta1**count)) * gradient_mean / deviation)


def _in_one_pass(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether torch's fused kernel can take a tensor. On a GPU one launch for each replica would not repay."""
    return tensor.device.type == "cpu" and tensor.dtype == dtype and tensor.is_contiguous()


def _adam_in_one_pass(tensors: Sequence[Tensor], numbers: Sequence[Number], step: Tensor) -> None:
    """`adam_update` by torch's fused kernel, which takes plain numbers: replica by replica where they differ."""
    replicas = next((len(value) for value in numbers if isinstance(value, Tensor) and value.dim() == 1), None)
    rows = [tuple(tensors)] if replicas is None else zip(*(tensor.unbind() for tensor in tensors), strict=True)
    columns = [
        [float(value)] * (replicas or 1) if not isinstance(value, Tensor) or value.dim() == 0 else value.tolist()
        for value in numbers
    ]
    for (weight, gradient, mean, square), (lr, beta1, beta2, eps) in zip(
        rows, zip(*columns, strict=True), strict=True
    ):
        torch._fused_adam_(
            [weight],
            [gradient],
            [mean],
            [square],
            [],
            [step],
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            weight_decay=0.0,
            eps=eps,
            amsgrad=False,
            maximize=False,
        )
    parameter, _, gradient_mean, gradient_square = tensors  # of which the kernel does not say that they changed
    torch.autograd.graph.increment_version((parameter, gradient_mean, gradient_square))


def _with_decay(gradient: Tensor, parameter: Tensor, weight_decay: Number) -> Tensor:
    """g + weight_decay·θ; without a pass where the number is 0."""
    if isinstance(weight_decay, Tensor):
        return gradient + per_replica(weight_decay, parameter) * parameter
    return gradient.add(parameter, alpha=weight_decay) if weight_decay else gradient


class StackedSGD(PerParameterOptimizer):
    """SGD with momentum and coupled weight decay; every number may be a tensor of shape (R,).

    m ← momentum·m + g + weight_decay·θ;  θ ← θ − lr·m. Equal to `torch.optim.SGD` for each replica.

    Args:
        params: parameters with a leading replica dimension (or not, with plain numbers).
        lr: learning rate.
        momentum: heavy-ball coefficient.
        weight_decay: coupled L2 coefficient.
        maximize: ascend instead of descend; the weight decay still decays.

    Raises:
        ValueError: if a number is out of range, or has more entries than there are replicas.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2, 3))
        >>> optimizer = StackedSGD([weight], lr=torch.tensor([0.1, 0.2]))
    """

    def __init__(
        self,
        params: Any,
        lr: Number = 1e-3,
        momentum: Number = 0.0,
        weight_decay: Number = 0.0,
        *,
        maximize: bool = False,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults)

    def _check(self, group: dict[str, Any]) -> None:
        check_nonnegative("lr", group["lr"])
        check_fraction("momentum", group["momentum"])
        check_nonnegative("weight_decay", group["weight_decay"])

    def _update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        gradient = _with_decay(gradient, parameter, group["weight_decay"])
        momentum = group["momentum"]
        if isinstance(momentum, Tensor) or momentum > 0:
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            gradient = state["momentum_buffer"].mul_(per_replica(momentum, parameter)).add_(gradient)
        lr = per_replica(group["lr"], parameter)
        if isinstance(lr, Tensor):
            parameter.addcmul_(gradient, lr, value=-1.0)
        else:
            parameter.add_(gradient, alpha=-lr)


def rates_of_plain_sgd(network: nn.Module, optimizer: Optimizer) -> dict[Tensor, Number]:
    """The learning rate of each stacked linear layer that SGD without momentum and decay trains, by its weight.

    Their step can be taken in the backward pass, see `clagrange.replicas.stepping_in_backward`, where nothing
    else asks for their gradients; the optimizer then finds none and leaves them alone.

    Example:
        >>> network = replicas.stack([nn.Linear(3, 2)])
        >>> list(rates_of_plain_sgd(network, torch.optim.SGD(network.parameters(), lr=0.1)).values())
        [0.1]
    """
    if type(optimizer) not in (StackedSGD, torch.optim.SGD):
        return {}
    others = ("momentum", "weight_decay", "maximize")
    plain = {
        parameter: group["lr"]
        for group in optimizer.param_groups
        if not any(isinstance(group[name], Tensor) or group[name] for name in others)
        for parameter in group["params"]
        if parameter.requires_grad
    }
    layers = [module for module in network.modules() if type(module) is replicas.StackedLinear]
    return {
        layer.weight: plain[layer.weight]
        for layer in layers
        if all(plain.get(parameter) is plain.get(layer.weight) is not None for parameter in layer.parameters())
    }


class StackedAdam(PerParameterOptimizer):
    """Adam with coupled weight decay; every number may be a tensor of shape (R,).

    Equal to `torch.optim.Adam` for each replica.

    Args:
        params: parameters with a leading replica dimension (or not, with plain numbers).
        lr: learning rate.
        betas: decay of the averages of gradient and squared gradient.
        eps: added to the root of the squared gradient.
        weight_decay: coupled L2 coefficient.
        maximize: ascend instead of descend; the weight decay still decays.

    Raises:
        ValueError: if a number is out of range, or has more entries than there are replicas.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2, 3))
        >>> optimizer = StackedAdam([weight], lr=torch.tensor([1e-3, 3e-3]))
    """

    def __init__(
        self,
        params: Any,
        lr: Number = 1e-3,
        betas: tuple[Number, Number] = (0.9, 0.999),
        eps: Number = 1e-8,
        weight_decay: Number = 0.0,
        *,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def _check(self, group: dict[str, Any]) -> None:
        check_nonnegative("lr", group["lr"])
        for index, beta in enumerate(group["betas"]):
            check_number(f"betas[{index}]", beta, low=0.0, high=1.0, open_high=True)
        check_nonnegative("eps", group["eps"])
        check_nonnegative("weight_decay", group["weight_decay"])

    def _update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        gradient = _with_decay(gradient, parameter, group["weight_decay"])
        adam_step(parameter, gradient, state, lr=group["lr"], betas=group["betas"], eps=group["eps"])


class StackedMuon(PerParameterOptimizer):
    """Muon on matrices, AdamW on all else; every number may be a tensor of shape (R,).

    For a weight W (out, in) with gradient g,

        m ← momentum·m + (1 − momentum)·g
        W ← (1 − lr·weight_decay)·W − lr·√max(1, out/in)·orthogonal(momentum·m + (1 − momentum)·g)

    where `orthogonal` is nearly U Vᵀ for a matrix U S Vᵀ, so that all directions learn at one rate. Biases, and
    weights that are not matrices (of convolutions, say), take a step of AdamW with ``adamw_lr``.

    Equal for each replica to `torch.optim.Muon` beside `torch.optim.AdamW`, but for rounding: torch's iteration
    for `orthogonal` runs in bfloat16, this one in float32 at least, which changes a step by 1 to 2 %.

    Args:
        params: parameters with a leading replica dimension (or not, with plain numbers).
        lr: learning rate of matrices.
        momentum: decay of the average of the gradients, in [0, 1].
        weight_decay: decoupled, of all parameters, in units of their learning rate.
        adamw_lr: learning rate of what is not a matrix.
        stacked: whether parameters have a leading replica dimension, so that a weight has three dimensions and a
            bias two. None: as the numbers say, if one of them is a tensor of shape (R,).
        maximize: ascend instead of descend; the weight decay still decays.

    Raises:
        ValueError: if a number is out of range, or has more entries than there are replicas.

    Source: Jordan et al. (2024), https://kellerjordan.github.io/posts/muon/

    Example:
        >>> weight, bias = torch.nn.Parameter(torch.zeros(2, 4, 3)), torch.nn.Parameter(torch.zeros(2, 4))
        >>> optimizer = StackedMuon([weight, bias], lr=torch.tensor([0.02, 0.05]))
    """

    def __init__(
        self,
        params: Any,
        lr: Number = 0.02,
        momentum: Number = 0.95,
        weight_decay: Number = 0.1,
        adamw_lr: Number = 1e-3,
        *,
        stacked: bool | None = None,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "adamw_lr": adamw_lr,
            "stacked": stacked,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def _check(self, group: dict[str, Any]) -> None:
        check_nonnegative("lr", group["lr"])
        check_fraction("momentum", group["momentum"])
        check_nonnegative("weight_decay", group["weight_decay"])
        check_nonnegative("adamw_lr", group["adamw_lr"])
        check_choice("stacked", group["stacked"], (None, True, False))

    def _update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        matrix = parameter.dim() - is_stacked(group) == 2
        rate = group["lr"] if matrix else group["adamw_lr"]
        lr, momentum, weight_decay = (
            per_replica(value, parameter) for value in (rate, group["momentum"], group["weight_decay"])
        )
        parameter.mul_(1.0 - lr * weight_decay)
        if not matrix:
            adam_step(parameter, gradient, state, lr=rate, betas=(0.9, 0.999), eps=1e-8)
            return
        gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        average = state["momentum_buffer"].lerp_(gradient, 1.0 - momentum)
        rows, columns = parameter.shape[-2:]
        parameter.sub_(lr * max(1.0, rows / columns) ** 0.5 * orthogonal(gradient.lerp(average, momentum)))


def is_stacked(group: dict[str, Any]) -> bool:
    """Whether the parameters of a group have a leading replica dimension, by ``stacked`` or else the numbers."""
    if group["stacked"] is not None:
        return bool(group["stacked"])
    return any(isinstance(value, Tensor) and value.dim() == 1 for value in group.values())


def orthogonal(matrix: Tensor, steps: int = 5) -> Tensor:
    """A matrix U S Vᵀ with its singular values brought near 1, by Newton-Schulz iteration.

    X ← aX + (b XXᵀ + c(XXᵀ)²)X from X = M/‖M‖_F, with coefficients that raise small singular values fast and let
    the others end anywhere in about [0.7, 1.2].

    Args:
        matrix: M, (..., out, in).
        steps: iterations.

    Source: Jordan et al. (2024), https://kellerjordan.github.io/posts/muon/

    Example:
        >>> bool((torch.linalg.svdvals(orthogonal(torch.randn(4, 3))) < 1.3).all())
        True
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = matrix.shape[-2] <= matrix.shape[-1]
    result = matrix if wide else matrix.mT  # the smaller of both Gram matrices
    result = result / torch.linalg.matrix_norm(result, keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = result @ result.mT
        result = a * result + (b * gram + c * gram @ gram) @ result
    unturned: Tensor = result if wide else result.mT
    return unturned


def one_more_step(state: dict[str, Any], parameter: Tensor) -> Tensor:
    """Count a step in ``state["step"]``, on the parameter's GPU so that the host need not wait: the new count."""
    if parameter.is_cuda:  # new or loaded, it may be elsewhere
        state["step"] = state["step"].to(parameter.device)
    state["step"] += 1
    return state["step"]  # type: ignore[no-any-return]


def adam_step(
    parameter: Tensor, gradient: Tensor, state: dict[str, Any], *, lr: Number, betas: Any, eps: Number
) -> None:
    """`adam_update` with its averages kept, and made at the first call, in an optimizer's state.

    They have at least float32; `restore_state` keeps it so when a checkpoint is loaded.
    """
    if "step" not in state:
        state["step"] = torch.zeros(())
        # in half precision squares of gradients would be 0, and so would ε
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        state["gradient_mean"] = torch.zeros_like(parameter, dtype=dtype)
        state["gradient_square"] = torch.zeros_like(parameter, dtype=dtype)
    adam_update(
        parameter,
        gradient,
        state["gradient_mean"],
        state["gradient_square"],
        one_more_step(state, parameter),
        lr=lr,
        betas=betas,
        eps=eps,
    )
