"""The Euler-Lagrange rule for Gaussian weights as a torch optimizer."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from clagrange._checks import Number, check_choice, check_fraction, check_number, check_positive
from clagrange.dynamics.beliefs import Belief, as_belief, as_numbers
from clagrange.optim.euler_lagrange_step import step_blocks
from clagrange.optim.gaussian import Block, GaussianOptimizer


class EulerLagrange(GaussianOptimizer):
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
    are not Gaussian (such as those of normalisations) take an Adam step with ``deterministic_lr``, which
    is the rule of the same theory for weights without variance (Eq. 14).

    Under torch.distributed the examples of all processes count, and gradients are taken to be averages over
    the processes, as DistributedDataParallel makes them.

    The defaults are plain values that do for a first step. Searches (`clagrange list methods` shows the winners)
    found better ones, with which to begin: lr=6e-4, temperature=6e-6, variance_rate=5e-3, trust_region=0.3 for
    diagonal precisions, made with prior_variance=0.2, and lr=6e-3, temperature=1e-4, variance_rate=1e-2,
    trust_region=0.1, prior_pull=0.1 for Kronecker ones.

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
            for none. Of a Kronecker precision it bounds the root mean square over the layer.
        prior_pull: share in [0, 1] of the prior's force δ(μ − μ_p) that acts on the mean; the prior's part in the
            precision stays. With sampled injection 0 to .1 has worked better than the whole.
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
        foreach: use torch's multi-tensor kernels for diagonal precisions. None: where every number of the group
            is a plain one.
        compiled: make one loop of the step of large diagonal parameters by torch.compile. None: on a CPU from
            300,000 weights on, where it repays the seconds that it takes, unless ``foreach`` is chosen; see
            `clagrange.optim.diagonal_step`.

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
        compiled: bool | None = None,
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
            "compiled": compiled,
        }
        super().__init__(params, defaults)

    def _check(self, group: dict[str, Any]) -> None:
        group["curvature_decay"] = as_numbers(group["curvature_decay"])
        _check_settings(group)
        super()._check(group)

    def _step_blocks(self, blocks: list[Block], group: dict[str, Any]) -> None:
        step_blocks(blocks, group)


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
    check_choice("foreach", group["foreach"], (None, True, False))
    check_choice("compiled", group["compiled"], (None, True, False))
    if group["foreach"] and any(isinstance(value, torch.Tensor) for value in group.values()):
        raise ValueError("foreach: expected None or False where a number is a tensor of shape (R,), got True")
