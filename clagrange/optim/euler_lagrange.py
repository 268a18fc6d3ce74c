"""The Euler-Lagrange rule for Gaussian weights as a torch optimizer."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from clagrange._checks import (
    Number,
    check_choice,
    check_fraction,
    check_number,
    check_positive,
    check_replicas,
)
from clagrange.distributed import process_count
from clagrange.dynamics import relaxation_fraction
from clagrange.gaussian import DiagonalPrecision, GaussianLayer, Precision, owner_of
from clagrange.optim.stacked import adam_step, restore_state

_NO_GAUSSIAN = (
    "params: expected at least one Gaussian parameter, got none; call clagrange.gaussianize(net) first, and "
    "copy or unpickle an optimizer together with its network"
)


class EulerLagrange(Optimizer):
    """Mean and variance of Gaussian weights along the Euler-Lagrange flow of the learning objective.

    The objective is the discounted action with kinetic term under the Fisher metric, potential k⟨L⟩ and, in
    place of bare entropy, τ·KL to the prior. For each weight with mean μ, precision s = 1/σ², gradient g of
    the mean loss over n examples, temperature T = τ/k, prior N(μ_p, σ_p²) and δ = T/σ_p², one step is

        h ← β h + (1 − β) n g²                          curvature belief
        s ← s + r ((h + δ)/T − s)                       precision relaxes
        λ ← stable root of λ² + γλ = γ·lr·σ²(h + δ)/T   (γ = ∞: λ = lr·σ²(h + δ)/T)
        μ ← μ − (1 − e^{−λ}) (g + δ(μ − μ_p)) / (h + δ)   at most ``trust_region``·σ

    For small λ the mean moves by lr·σ²/T times the gradient: it learns fast where it is uncertain. Where the
    loss stops holding a weight, h decays and the variance returns to the prior's.

    The state of a Gaussian parameter lives in its layer, so that it survives a new optimizer. Parameters that
    are not Gaussian (of normalisation or embedding layers) take an Adam step with ``deterministic_lr``, which
    is the rule of the same theory for weights without variance (Eq. 14).

    Under torch.distributed the examples of all processes count, and gradients are taken to be averages over
    the processes, as DistributedDataParallel makes them.

    Args:
        params: the network; or parameters, named parameters or parameter groups of it.
        lr: fraction of the way to equilibrium that mean and precision cover in one (small) step, > 0.
        temperature: T = τ/k, in units of the loss. The Bayesian value is 1 / (examples per task); with diagonal
            precisions colder posteriors, 1e-6 to 1e-4, have worked better.
        discount: γ per step, > 0. Infinite is the overdamped flow; a small one leaves the rate of stiff
            directions and slows soft ones less (ballistic).
        variance_rate: r in (0, 1]. None ties it to the mean's rate, r = 1 − e^{−λ_τ}: near equilibrium mean
            and log σ decay alike.
        curvature_decay: β in [0, 1).
        trust_region: bound on the step of each mean, in units of its posterior standard deviation; infinite
            for none.
        deterministic_lr: learning rate of parameters that are not Gaussian.
        loss_reduction: how the loss averages: "mean" over examples, "sum" over examples, or "position_mean"
            over examples and further leading dimensions such as tokens.
        maximize: ascend instead of descend.
        foreach: use torch's multi-tensor kernels. None: where precisions are diagonal and every number of the
            group is a plain one.

    Every number may be a tensor of shape (R,) for a stacked network; torch's schedulers take plain numbers only.

    Raises:
        ValueError: if a number is out of range or no parameter is Gaussian.
        RuntimeError: in ``step``, if a Gaussian parameter has a gradient but its layer saw no example.

    Source: Vastola, Gershman, Rajan (2025), section 6, Eqs. 15-16 and 143-149; the finite-discount rule is
    the stable manifold of the linearised equations.

    Example:
        >>> net = clagrange.gaussianize(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
        >>> optimizer = EulerLagrange(net, lr=1e-3, temperature=1e-3)
        >>> nn.functional.cross_entropy(net(torch.ones(3, 4)), torch.tensor([0, 1, 0])).backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: Number = 1e-3,
        temperature: Number = 1e-5,
        *,
        discount: Number = math.inf,
        variance_rate: Number | None = None,
        curvature_decay: Number = 0.99,
        trust_region: Number = 1.0,
        deterministic_lr: Number = 1e-3,
        loss_reduction: str = "mean",
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "temperature": temperature,
            "discount": discount,
            "variance_rate": variance_rate,
            "curvature_decay": curvature_decay,
            "trust_region": trust_region,
            "deterministic_lr": deterministic_lr,
            "loss_reduction": loss_reduction,
            "maximize": maximize,
            "foreach": foreach,
        }
        super().__init__(params.named_parameters() if isinstance(params, nn.Module) else params, defaults)
        self._require_gaussian()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, with its settings checked."""
        super().add_param_group(param_group)
        try:
            _check_settings(self.param_groups[-1])
        except Exception:
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        super().load_state_dict(state_dict)
        restore_state(self, state_dict)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore, giving settings that an older version did not have their default."""
        super().__setstate__(state)
        for group in self.param_groups:
            for name, default in self.defaults.items():
                group.setdefault(name, default)

    def _require_gaussian(self) -> None:
        if not any(owner_of(p) is not None for group in self.param_groups for p in group["params"]):
            raise ValueError(_NO_GAUSSIAN)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; a closure is evaluated first and its value returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        used: dict[int, GaussianLayer] = {}
        found = False
        for group in self.param_groups:
            blocks: list[tuple[Tensor, Tensor, Precision, int]] = []
            for parameter in group["params"]:
                owner = owner_of(parameter)
                found = found or owner is not None
                if parameter.grad is None:
                    continue
                gradient = -parameter.grad if group["maximize"] else parameter.grad
                if owner is None:
                    adam_step(
                        parameter,
                        gradient,
                        self.state[parameter],
                        lr=group["deterministic_lr"],
                        betas=(0.9, 0.999),
                        eps=1e-8,
                    )
                    continue
                layer, name = owner
                used[id(layer)] = layer
                examples = _examples(layer, name, group["loss_reduction"])
                if group["loss_reduction"] == "sum":
                    gradient = gradient * (process_count() / examples)
                blocks.append((parameter, gradient, layer.precision_of(name), examples))
            if blocks:
                _step_blocks(blocks, group)
        if not found:
            raise RuntimeError(_NO_GAUSSIAN)
        for layer in used.values():
            layer.clear_examples()
        return loss


def _check_settings(group: dict[str, Any]) -> None:
    check_positive("lr", group["lr"])
    check_positive("temperature", group["temperature"], hint="1e-5 is a usual value")
    check_number("discount", group["discount"], low=0.0, open_low=True)
    if group["variance_rate"] is not None:
        check_number("variance_rate", group["variance_rate"], low=0.0, high=1.0, open_low=True)
    check_number("curvature_decay", group["curvature_decay"], low=0.0, high=1.0, open_high=True)
    check_number("trust_region", group["trust_region"], low=0.0, open_low=True)
    check_fraction("deterministic_lr", group["deterministic_lr"])
    check_choice("loss_reduction", group["loss_reduction"], ("mean", "sum", "position_mean"))
    for parameter in group["params"]:
        owner = owner_of(parameter)
        if owner is not None:
            replicas = parameter.shape[0] if owner[0].stacked else None
            for name, value in group.items():
                check_replicas(name, value, replicas)


def _examples(layer: GaussianLayer, name: str, loss_reduction: str) -> int:
    """How many examples the gradients of a layer stand for, over all processes."""
    examples = layer.positions if loss_reduction == "position_mean" else layer.examples
    if examples == 0:
        shape = tuple(layer.get_parameter(name).shape)
        raise RuntimeError(
            f"parameter {name!r} of a {type(layer).__name__} of shape {shape} has a gradient, but the layer saw "
            f"no example since the last step; run forward and backward through the layer, or set layer.examples"
        )
    return examples * process_count()


def squared_gradient(gradient: Tensor, examples: int) -> Tensor:
    """n·g²: an estimate of the diagonal curvature of the mean loss per example.

    For a log-likelihood near its optimum the per-example gradients have mean 0 and covariance H, so the square
    of their mean over n examples has expectation H_ii/n. Away from it the estimate exceeds the mean square of
    the per-example gradients by (n − 1)·(mean gradient)².
    """
    return examples * gradient.square()


def _step_blocks(blocks: list[tuple[Tensor, Tensor, Precision, int]], group: dict[str, Any]) -> None:
    rate = group["variance_rate"]
    fraction = relaxation_fraction(group["lr"], group["discount"]) if rate is None else rate
    foreach = group["foreach"]
    if foreach is None:
        foreach = not any(isinstance(number, Tensor) for number in group.values())
    diagonal = [block for block in blocks if isinstance(block[2], DiagonalPrecision)] if foreach else []
    if diagonal:
        _foreach_step(
            diagonal,
            lr=group["lr"],
            temperature=group["temperature"],
            discount=group["discount"],
            curvature_decay=group["curvature_decay"],
            trust_region=group["trust_region"],
            fraction=fraction,
        )
    for mean, gradient, precision, examples in blocks:
        if foreach and isinstance(precision, DiagonalPrecision):
            continue
        gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        precision.observe(squared_gradient(gradient, examples), group["curvature_decay"])
        precision.relax(group["temperature"], fraction)
        mean += precision.displacement(
            mean,
            gradient,
            lr=group["lr"],
            temperature=group["temperature"],
            discount=group["discount"],
            trust_region=group["trust_region"],
        )


def _foreach_step(
    blocks: list[tuple[Tensor, Tensor, Precision, int]],
    *,
    lr: float,
    temperature: float,
    discount: float,
    curvature_decay: float,
    trust_region: float,
    fraction: Number,
) -> None:
    """The same as `observe`, `relax`, `displacement` of every block, by multi-tensor kernels."""
    means = [block[0] for block in blocks]
    gradients = [block[1].to(torch.promote_types(block[1].dtype, torch.float32)) for block in blocks]
    precisions, curvatures, prior_means, prior_precisions = (
        [getattr(block[2], name) for block in blocks]
        for name in ("precision", "curvature", "prior_mean", "prior_precision")
    )
    weights = [(1.0 - curvature_decay) * block[3] for block in blocks]
    torch._foreach_mul_(curvatures, curvature_decay)
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
