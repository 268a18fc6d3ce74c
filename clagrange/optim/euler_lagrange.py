"""The Euler-Lagrange rule for Gaussian weights as a torch optimizer."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
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
from clagrange.dynamics.beliefs import Belief, as_belief, as_numbers
from clagrange.gaussian import GaussianBlock, GaussianLayer, Precision, owner_of
from clagrange.gaussian.curvature import FactorObserver
from clagrange.gaussian.kronecker import LowRank
from clagrange.optim.euler_lagrange_step import Block, step_blocks
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
        curvature_decay: β in [0, 1); or a `clagrange.dynamics.Belief`: the curvature decays, wanders and is seen
            with noise, which gives β = e^{−λ_κ} at the discount, and h ← βh + (1 − β)·(s²/r²)/κ²·n g². A mapping
            of its three numbers serves too, for files. Needs a finite discount.
        trust_region: bound on the step of each mean, in units of its posterior standard deviation; infinite
            for none.
        motion: let variance rise because the mean moves, the force −μ'² of Eq. 16. With u the average of the
            steps of the mean, with the memory of the curvature, s ← s_p + (s − s_p)·exp(−u²s/(γ + 3λ_τ)) after
            each step (see `clagrange.optim.motion`, also for what it is worth). Costs one more tensor per weight
            and the time named there. The velocity u is the optimizer's, so a new one starts at rest. Needs
            diagonal precisions and a finite discount, since the effect vanishes as 1/γ² (a replica whose entry of
            a tensor is infinite goes without).
        deterministic_lr: learning rate of parameters that are not Gaussian.
        loss_reduction: how the loss averages: "mean" over examples, "sum" over examples, or "position_mean"
            over examples and further leading dimensions such as tokens.
        maximize: ascend instead of descend.
        foreach: use torch's multi-tensor kernels. None: where precisions are diagonal and every number of the
            group is a plain one.

    Every number may be a tensor of shape (R,) for a stacked network; torch's schedulers take plain numbers only.

    Raises:
        TypeError: if a setting is of the wrong kind; in ``step``, if ``motion`` meets a precision that is not
            diagonal.
        ValueError: if a number is out of range, no parameter is Gaussian, or a belief or ``motion`` meets an
            infinite discount.
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
        curvature_decay: Number | Belief = 0.99,
        trust_region: Number = 1.0,
        prior_pull: Number = 1.0,
        motion: bool = False,
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
            "curvature_decay": as_numbers(curvature_decay),
            "trust_region": trust_region,
            "prior_pull": prior_pull,
            "motion": motion,
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
        group = self.param_groups[-1]
        group["curvature_decay"] = as_numbers(group["curvature_decay"])
        try:
            _check_settings(group)
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
            blocks: dict[Precision, Block] = {}
            for parameter in group["params"]:
                owner = owner_of(parameter)
                found = found or owner is not None
                if parameter.grad is None:
                    continue
                if owner is None:
                    gradient = -parameter.grad if group["maximize"] else parameter.grad
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
                gaussian = layer.block_of(name)
                if gaussian.precision not in blocks:
                    blocks[gaussian.precision] = self._block(gaussian, group)
            if blocks:
                step_blocks(list(blocks.values()), group)
        if not found:
            raise RuntimeError(_NO_GAUSSIAN)
        for layer in used.values():
            layer.clear_examples()
        return loss

    def _block(self, gaussian: GaussianBlock, group: dict[str, Any]) -> Block:
        """What a step needs of a block, in units of the mean loss per example."""
        layer, names, _ = gaussian
        reduction = group["loss_reduction"]
        examples = layer.positions if reduction == "position_mean" else layer.examples
        if examples == 0:
            shape = tuple(layer.get_parameter(names[0]).shape)
            raise RuntimeError(
                f"parameter {names[0]!r} of a {type(layer).__name__} of shape {shape} has a gradient, but the "
                f"layer saw no example since the last step; run forward and backward through the layer, or set "
                f"layer.examples"
            )
        gradients = [torch.zeros_like(mean) if mean.grad is None else mean.grad for mean in gaussian.means]
        gradient = gaussian.joint(gradients)
        gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        if reduction == "sum":
            gradient = gradient / examples
        observer = layer.observation_of(names[0])
        unit = 1.0 / examples if reduction == "sum" else 1.0
        curvature = None if observer is None else observer.curvature(gradient, examples, unit)
        low_rank = observer.low_rank(gradient) if isinstance(observer, FactorObserver) else None
        if group["maximize"]:
            gradient = -gradient
            low_rank = None if low_rank is None else LowRank(low_rank.x, -low_rank.d)
        state = self.state[gaussian.means[0]] if group["motion"] else {}
        return Block(gaussian, gradient, low_rank, curvature, examples * process_count(), state)


def _check_settings(group: dict[str, Any]) -> None:
    check_positive("lr", group["lr"])
    check_positive("temperature", group["temperature"], hint="1e-5 is a usual value")
    check_number("discount", group["discount"], low=0.0, open_low=True)
    if group["variance_rate"] is not None:
        check_number("variance_rate", group["variance_rate"], low=0.0, high=1.0, open_low=True)
    belief = as_belief("curvature_decay", group["curvature_decay"])
    endless = torch.isinf(torch.as_tensor(group["discount"]))
    if isinstance(belief, Belief) and bool(endless.any()):
        raise ValueError(
            "curvature_decay: expected a finite discount for a belief, since at an infinite one its rate is its "
            "own decay and it never heeds an observation; give the average's β instead, or "
            "Belief.averaging(β, discount); got discount inf"
        )
    if not isinstance(group["motion"], bool):
        raise TypeError(f"motion: expected True or False, got {group['motion']!r}")
    if group["motion"] and bool(endless.all()):
        raise ValueError(
            "motion: expected a finite discount for the motion term, which vanishes as 1/discount² and is 0 at "
            "an infinite one; got discount inf"
        )
    check_number("trust_region", group["trust_region"], low=0.0, open_low=True)
    check_fraction("prior_pull", group["prior_pull"])
    check_fraction("deterministic_lr", group["deterministic_lr"])
    check_choice("loss_reduction", group["loss_reduction"], ("mean", "sum", "position_mean"))
    check_choice("foreach", group["foreach"], (None, True, False))
    if group["foreach"] and any(isinstance(value, torch.Tensor) for value in group.values()):
        raise ValueError("foreach: expected None or False where a number is a tensor of shape (R,), got True")
    for parameter in group["params"]:
        owner = owner_of(parameter)
        if owner is not None:
            replicas = parameter.shape[0] if owner[0].stacked else None
            for name, value in {**group, **(vars(belief) if isinstance(belief, Belief) else {})}.items():
                check_replicas(name, value, replicas)
