"""PC-ALM: predictive coding in which multipliers make the layers' constraints exact."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clagrange._checks import check_nonnegative, check_positive

SETTLED = 1e-3
"""Constraint force, relative to all of it, below which a relaxation counts as settled."""


_DIVERGED = 100.0
"""Norm of the forces, relative to backpropagation's, above which a relaxation has diverged."""


class NotSettledWarning(UserWarning):
    """The constraints of PC-ALM are not met, so its gradient is not backpropagation's."""


@dataclass(frozen=True)
class PCALMResult:
    """What one relaxation found.

    Attributes:
        loss: mean loss of the forward pass.
        gradients: of the mean loss, by the parameters' names; exact at equilibrium only.
        residuals: ρ‖r‖/‖λ + ρr‖ of the batch after each step, shape (steps,): the part of the force between
            layers that the multipliers do not carry. 0 at equilibrium for α > 0; for α = 0 always 1.
        step: η_h of each example, shape (B,).
        cosine: of ``gradients`` with the true gradient, all parameters together.
    """

    loss: float
    gradients: dict[str, Tensor]
    residuals: Tensor
    step: Tensor
    cosine: float

    @property
    def settled(self) -> bool:
        """Whether the last residual is below `SETTLED`."""
        return bool(self.residuals[-1] < SETTLED)


def half_squared_error(output: Tensor, targets: Tensor) -> Tensor:
    """½‖y − output‖² of each example, shape (B,)."""
    return 0.5 * (targets - output).square().flatten(1).sum(1)


def pc_alm_gradients(
    network: nn.Sequential,
    inputs: Tensor,
    targets: Tensor,
    *,
    rho: float = 1.0,
    alpha: float = 1.0,
    step: float | None = None,
    steps: int | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] = half_squared_error,
) -> PCALMResult:
    """Gradients by augmented-Lagrangian predictive coding.

    The activities h_l of the hidden layers are free variables, bound by r_l = h_l − f_l(h_(l−1)) = 0. From the
    forward pass and λ = 0, each step moves all layers of all examples at once:

        L_ρ = loss + Σ_l [λ_lᵀr_l + (ρ/2)‖r_l‖²],   h ← h − η_h ∇_h L_ρ,   λ ← λ + α r

    The weights' gradient is that of L_ρ: −(∂f_l/∂W_l)ᵀ(λ_l + ρr_l), plus the last layer's own. At equilibrium
    r = 0, λ_l = −∂loss/∂h_l, and it is backpropagation's. That is a statement about equilibrium: at the default
    T = 2L steps, with which it was published, the cosine is above 0.9 in networks of 32 layers, not 1. α = 0 is
    predictive coding, which settles elsewhere.

    For linear layers the steps converge if and only if η_h σ²(2ρ + α) < 4 and η_h ρσ² < 2, the second being
    implied by the first. For nonlinear ones ρ must be large enough for L_ρ to be convex around the solution; with
    ρ = 1 some networks never settle, with ρ = α = 16 they do, but need thousands of steps.

    Args:
        network: each child is one layer f_l, the last gives the output; no child may mix examples.
        inputs: shape (B, ...).
        targets: what ``loss`` wants, one for each example.
        rho: ρ > 0.
        alpha: α ≥ 0.
        step: η_h of every example. None takes 3/4 of `largest_stable_step` of each, 1/(ρσ²) for ρ = α; the
            published 0.25 is that for σ² = 4.
        steps: T; default 2L, for L children.
        loss: of each example, shape (B,).

    Returns:
        A `PCALMResult`; ``assign_gradients`` puts its gradients where an optimizer finds them.

    Raises:
        ValueError: if the network has no hidden layer or nothing to learn, or a number is out of range.

    Warns:
        NotSettledWarning: if the constraints diverge; or after more than 2L steps, which are taken to reach the
            equilibrium, if they are not met for α > 0. It says what to change.

    Source: "Augmented Lagrangian Predictive Coding", arXiv 2605.31022; the conditions at equilibrium are
    LeCun's (1988).

    Example:
        >>> net = clagrange.mechanics.residual_network(4, 8, 4, 3, activation="linear").double()
        >>> result = pc_alm_gradients(net, torch.ones(2, 4).double(), torch.eye(3)[:2].double(), steps=1000)
        >>> round(result.cosine, 9), result.settled
        (1.0, True)
    """
    layers = _layers(network)
    check_positive("rho", rho)
    check_nonnegative("alpha", alpha)
    if steps is None:
        steps = 2 * len(layers)
    elif isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps: expected a whole number of at least 1, got {steps!r}")
    if step is None:
        rate = 0.75 * largest_stable_step(network, inputs, rho=rho, alpha=alpha)
    else:
        check_positive("step", step)
        rate = inputs.new_full((len(inputs),), step)
    parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError("network: expected a parameter that requires a gradient, got none")
    with torch.enable_grad():
        states = _forward(layers, inputs)
        mean_loss = loss(states.pop(), targets).mean()
        truth = torch.autograd.grad(mean_loss, [*parameters.values(), *states])
    scale = len(inputs) * _norm(truth[len(parameters) :])  # of the forces at equilibrium
    truth = truth[: len(parameters)]
    rates = [_each(rate, h) for h in states]
    multipliers = residuals = tuple(torch.zeros_like(h) for h in states)
    states, images, total = _evaluate(layers, inputs, states, targets, loss)
    trace = []
    for _ in range(steps):
        multipliers = torch._foreach_add(multipliers, residuals, alpha=alpha)
        forces = torch._foreach_add(multipliers, residuals, alpha=rho)
        pulled = _pull(images, total, forces, states)
        slopes = torch._foreach_add(forces, pulled)
        moved = torch._foreach_addcmul(_detached(states), slopes, rates, value=-1.0)
        states, images, total = _evaluate(layers, inputs, moved, targets, loss)
        residuals = torch._foreach_sub(list(moved), _detached(images))
        forces = torch._foreach_add(multipliers, residuals, alpha=rho)
        trace.append(rho * _norm(residuals) / _norm(forces))
    history = torch.stack(trace)
    _warn(history, float(_norm(forces) / scale), rho, alpha, 2 * len(layers))
    found = torch._foreach_div(_pull(images, total, forces, list(parameters.values())), float(len(inputs)))
    flat, flat_truth = (torch.cat([g.flatten() for g in gradients]) for gradients in (found, truth))
    return PCALMResult(
        loss=float(mean_loss.detach()),
        gradients=dict(zip(parameters, found, strict=True)),
        residuals=history,
        step=rate,
        cosine=float(nn.functional.cosine_similarity(flat, flat_truth, 0, eps=torch.finfo(flat.dtype).tiny)),
    )


def assign_gradients(network: nn.Module, gradients: dict[str, Tensor]) -> None:
    """Add gradients to the ``grad`` of the parameters of these names, as ``backward`` does.

    Example:
        >>> net = nn.Linear(1, 1, bias=False)
        >>> assign_gradients(net, {"weight": torch.ones(1, 1)})
        >>> net.weight.grad
        tensor([[1.]])
    """
    for name, gradient in gradients.items():
        parameter = network.get_parameter(name)
        parameter.grad = gradient.clone() if parameter.grad is None else parameter.grad + gradient


def constraint_curvature(network: nn.Sequential, inputs: Tensor, iterations: int = 30) -> Tensor:
    """σ² of each example: the largest eigenvalue of AᵀA for A = ∂r/∂h at the forward pass, shape (B,).

    A maps a change of the hidden activities to the change of all residuals r_l = h_l − f_l(h_(l−1)). Power
    iteration from a fixed random start; it approaches from below (30 iterations: to about a tenth).

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Identity(), nn.Linear(2, 1))
        >>> constraint_curvature(net, torch.zeros(1, 2))  # A = [[1, 0], [−1, 1]]
        tensor([2.6180])
    """
    first, *others = _layers(network)[:-1]
    generator = torch.Generator().manual_seed(0)
    with torch.enable_grad():
        states = [first(inputs.detach()).detach().requires_grad_()]
        images = []
        for layer in others:
            images.append(layer(states[-1]))
            states.append(images[-1].detach().requires_grad_())
        directions = [torch.randn(h.shape, generator=generator, dtype=torch.float64).to(h) for h in states]
        dual = [torch.zeros_like(image, requires_grad=True) for image in images]
        # Dᵀu as a graph, linear in u: its own gradient in u is D
        pulled = torch.autograd.grad(images, states[:-1], dual, create_graph=True) if images else ()
    curvature = inputs.new_ones(len(inputs))
    for _ in range(iterations):
        sizes = [v.flatten(1).square().sum(1) for v in directions]
        directions = [v / _each(torch.stack(sizes).sum(0).sqrt(), v) for v in directions]
        if not images:
            break
        pushed = torch.autograd.grad(pulled, dual, directions[:-1], retain_graph=True)
        shifts = [directions[0], *(v - d for v, d in zip(directions[1:], pushed, strict=True))]  # A v
        curvature = torch.stack([shift.flatten(1).square().sum(1) for shift in shifts]).sum(0)
        back = torch.autograd.grad(images, states[:-1], shifts[1:], retain_graph=True)
        directions = [*(s - b for s, b in zip(shifts[:-1], back, strict=True)), shifts[-1]]  # Aᵀ A v
    return curvature


def largest_stable_step(
    network: nn.Sequential, inputs: Tensor, *, rho: float = 1.0, alpha: float = 1.0, iterations: int = 30
) -> Tensor:
    """The bound 4/(σ²(2ρ + α)) on η_h for each example, shape (B,); sharp for linear layers.

    For σ² see `constraint_curvature`. The second condition, η_h ρσ² < 2, follows from it.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Identity(), nn.Linear(2, 1))
        >>> largest_stable_step(net, torch.zeros(1, 2))
        tensor([0.5093])
    """
    check_positive("rho", rho)
    check_nonnegative("alpha", alpha)
    return 4.0 / (constraint_curvature(network, inputs, iterations) * (2.0 * rho + alpha))


def _layers(network: nn.Sequential) -> list[nn.Module]:
    if not isinstance(network, nn.Sequential) or len(network) < 2:
        raise ValueError(
            f"network: expected an nn.Sequential of at least two layers (its children), "
            f"got {type(network).__name__}{f' of {len(network)}' if isinstance(network, nn.Sequential) else ''}"
        )
    return list(network)


def _forward(layers: Sequence[nn.Module], inputs: Tensor) -> list[Tensor]:
    """The states of a forward pass."""
    states = [inputs]
    for layer in layers:
        states.append(layer(states[-1]))
    return states[1:]


def _images(layers: Sequence[nn.Module], inputs: Tensor, states: Sequence[Tensor]) -> list[Tensor]:
    """f_l(h_(l−1)) of the given layers."""
    return [layer(h) for layer, h in zip(layers, (inputs, *states), strict=False)]


def _evaluate(
    layers: Sequence[nn.Module],
    inputs: Tensor,
    states: Sequence[Tensor],
    targets: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """The states as leaves of a graph, the hidden layers' images f_l(h_(l−1)), the sum of the losses."""
    with torch.enable_grad():
        leaves = [h.detach().requires_grad_() for h in states]
        *images, output = _images(layers, inputs, leaves)
        return leaves, images, loss(output, targets).sum()


def _pull(
    images: Sequence[Tensor], total: Tensor, forces: Sequence[Tensor], variables: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The slope of loss − Σ_l forces_lᵀ f_l, which is that of L_ρ in all that the f_l depend on."""
    return torch.autograd.grad(
        [total, *images], variables, [torch.ones_like(total), *torch._foreach_neg(list(forces))]
    )


def _detached(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach() for tensor in tensors]


def _each(numbers: Tensor, like: Tensor) -> Tensor:
    """Shape one number for each example so that it broadcasts against ``like``."""
    return numbers.view(-1, *[1] * (like.dim() - 1))


def _norm(parts: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of all parts together."""
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(_detached(parts))))
    return norm


def _warn(residuals: Tensor, growth: float, rho: float, alpha: float, published_steps: int) -> None:
    """Say when the constraints are not met, how badly, and what helps."""
    last = float(residuals[-1])
    if not growth < _DIVERGED:
        _say(
            f"the activities diverged: after {len(residuals)} steps the forces between layers are "
            f"{growth:.2g} times backpropagation's. The step is above the bound 4/(σ²(2ρ + α)); "
            f"leave step=None, which stays below it"
        )
        return
    if alpha == 0.0 or len(residuals) <= published_steps or last < SETTLED:
        return
    quarter = max(1, len(residuals) // 4)
    early, late = float(residuals[quarter : 2 * quarter].mean()), float(residuals[-quarter:].mean())
    if late < 0.8 * early:
        cure = "it is still falling: take more steps"
    else:
        cure = (
            f"it does not fall any more, so L_ρ is not convex enough for rho={rho:g}: take a larger rho (with "
            f"alpha=rho, step=None; 16 has settled such networks) and then more steps"
        )
    _say(
        f"the relative constraint residual has not settled: {last:.2g} after {len(residuals)} steps, expected "
        f"below {SETTLED:g}. The gradient is not backpropagation's. {cure[0].upper()}{cure[1:]}"
    )


def _say(message: str) -> None:
    warnings.warn(f"pc_alm_gradients: {message}", NotSettledWarning, stacklevel=4)
