"""Least-action backpropagation: gradients as the rest state of a network's doubled phase space."""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from clagrange._checks import check_number, check_positive
from clagrange.mechanics.layer_chain import layers_of


@dataclass(frozen=True)
class Phase:
    """A point of the doubled phase space: two numbers for every unit.

    Attributes:
        states: x^1 … x^L, the mean of the two copies of each layer; shapes of the layers' outputs.
        tensions: s^1 … s^L, their difference; same shapes.
    """

    states: tuple[Tensor, ...]
    tensions: tuple[Tensor, ...]


class LeastAction(nn.Module):
    """A feed-forward network whose backward pass is the relaxation of a doubled phase space.

    Two copies of all layers, with mean x and difference s, follow the action ∫[sᵀ(x' − F(x)) + βC(x^L)]dt of the
    flow x' = F(x), F^l = f_l(x^(l−1)) − x^l. Where the copies differ, the cost C has broken their symmetry. With
    E(x, s) = −sᵀF(x) + βC(x^L) the relaxation is

        x' = −∂E/∂s = F(x),    s' = −∂E/∂x = Dᵀs − s − β∇C,    D^l = ∂f_l/∂x^(l−1)

    and at rest x is the forward pass, s = −β·∂C/∂x and dC/dW = (1/β)·∂E/∂W: exactly, for every β > 0, not only
    in the limit β → 0. A unit Euler step is x ← f(x), s ← Dᵀs − β∇C, for all L layers at once. It is at rest
    after 2L steps from any start, x after L and s after L more, and not before. Smaller steps follow the
    continuous flow, whose distance from rest falls like the chance of fewer than 2L events of a Poisson process.

    ``forward`` gives the network's ordinary output. The backward pass forgets the activations, starts at
    x = s = 0 and relaxes, with ∇C held at the gradient of the loss at that output; it stores no graph.

    What it is not: free of weight transport. The s-update needs Dᵀ, the transposed weights of the layer above
    (taken here from autograd, one layer at a time), and on hardware that does one layer after the other it costs
    2L times a backward pass.

    Args:
        network: a Linear or Conv2d layer, or a (nested) `nn.Sequential` of Linear, Conv2d, pointwise
            nonlinearities and Flatten. It is not copied. Depth L counts its Linear and Conv2d layers.
        beta: β, strength of the cost.
        steps: Euler steps. None takes 2L unit steps; with smaller steps, as many as `steps_to_rest` gives.
        step_size: h in (0, 1].
        time: duration of the flow, in place of ``steps``: they are time/h, rounded.

    Raises:
        ValueError: if a layer is of another kind (it is named), or a number is out of range.

    Source: "A Physical Theory of Backpropagation: Exact Gradients from the Least-Action Principle",
    arXiv 2602.02281; doubled variables after Galley (2013).

    Example:
        >>> net = LeastAction(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)))
        >>> nn.functional.cross_entropy(net(torch.ones(3, 4)), torch.tensor([0, 1, 0])).backward()
        >>> net.depth, net.network[0].weight.grad.shape
        (2, torch.Size([8, 4]))
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        beta: float = 1.0,
        steps: int | None = None,
        step_size: float = 1.0,
        time: float | None = None,
    ) -> None:
        super().__init__()
        check_positive("beta", beta)
        check_number("step_size", step_size, low=0.0, high=1.0, open_low=True)
        if steps is not None and time is not None:
            raise ValueError(
                f"time: expected None beside steps, got {time!r} and steps {steps!r}; give one of them"
            )
        if time is not None:
            check_positive("time", time)
            steps = max(1, round(time / step_size))
        if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
            raise ValueError(f"steps: expected a whole number of at least 1, got {steps!r}")
        self.network = network
        self.beta = beta
        self.steps = steps
        self.step_size = step_size
        self.layers = layers_of(network)

    @property
    def depth(self) -> int:
        """L, the number of Linear and Conv2d layers."""
        return len(self.layers)

    def forward(self, inputs: Tensor) -> Tensor:
        """The network's output; its backward pass is the relaxation."""
        output: Tensor = _Relaxation.apply(self, inputs, *self.network.parameters())  # type: ignore[no-untyped-call]
        return output

    def start(self, inputs: Tensor) -> Phase:
        """The phase x = s = 0 for these inputs."""
        with torch.no_grad():
            states = self._states(inputs)
        return Phase(
            tuple(torch.zeros_like(state) for state in states), tuple(torch.zeros_like(state) for state in states)
        )

    def step(self, phase: Phase, inputs: Tensor, cost_gradient: Callable[[Tensor], Tensor]) -> Phase:
        """One Euler step of all layers at once.

        Args:
            phase: where it starts.
            inputs: x⁰, shape (B, ...).
            cost_gradient: ∇C at a given x^L.
        """
        with torch.enable_grad():
            states = [state.detach().requires_grad_() for state in phase.states]
            images = self._images(inputs.detach(), states)
            inner = _inner(phase.tensions, images)
            pulled = torch.autograd.grad(inner, states[:-1]) if states[:-1] else ()
        pulled = (*pulled, -self.beta * cost_gradient(phase.states[-1]))
        h = self.step_size
        moves = zip((*phase.states, *phase.tensions), (*images, *pulled), strict=True)
        moved = [new.detach() if h == 1.0 else torch.lerp(old, new.detach(), h) for old, new in moves]
        return Phase(tuple(moved[: self.depth]), tuple(moved[self.depth :]))

    def relax(
        self, inputs: Tensor, cost_gradient: Callable[[Tensor], Tensor], start: Phase | None = None
    ) -> Iterator[Phase]:
        """The phases after each Euler step; the last is the rest state if the steps suffice.

        Args:
            inputs: x⁰, shape (B, ...).
            cost_gradient: ∇C at a given x^L.
            start: default x = s = 0.
        """
        phase = self.start(inputs) if start is None else start
        steps = self.steps
        if steps is None:
            steps = steps_to_rest(self.depth, self.step_size, torch.finfo(inputs.dtype).eps)
        for _ in range(steps):
            phase = self.step(phase, inputs, cost_gradient)
            yield phase

    def energy(self, phase: Phase, inputs: Tensor, cost: Tensor | float = 0.0) -> Tensor:
        """E(x, s) = −sᵀF(x) + βC, differentiable in inputs and parameters."""
        images = self._images(inputs, phase.states)
        forces = [image - state for image, state in zip(images, phase.states, strict=True)]
        return self.beta * cost - _inner(phase.tensions, forces)

    def gradients(self, phase: Phase, inputs: Tensor, variables: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """(1/β)·∂E/∂v at this phase for parameters v, and for the inputs if they are among ``variables``."""
        with torch.enable_grad():
            found = torch.autograd.grad(self.energy(phase, inputs), variables, materialize_grads=True)
        return tuple(gradient / self.beta for gradient in found)

    def _images(self, inputs: Tensor, states: list[Tensor] | tuple[Tensor, ...]) -> list[Tensor]:
        """f_l(x^(l−1)) of all layers."""
        return [layer(x) for layer, x in zip(self.layers, (inputs, *states[:-1]), strict=True)]

    def _states(self, inputs: Tensor) -> list[Tensor]:
        """The forward pass."""
        states = [inputs]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return states[1:]


@contextlib.contextmanager
def least_action(
    network: nn.Module,
    *,
    beta: float = 1.0,
    steps: int | None = None,
    step_size: float = 1.0,
    time: float | None = None,
) -> Iterator[LeastAction]:
    """Within the block, the backward pass of ``network`` is the relaxation of its doubled phase space.

    Forward pass and loss belong inside the block. Everything else of a training loop stays as it is. See
    `LeastAction` for the dynamics, the arguments and what the network may consist of.

    Warns:
        UserWarning: if the block ends without a forward pass of the network: gradients of a loss that was
            computed before it came from autograd.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> with least_action(net):
        ...     net(torch.ones(3, 4)).square().mean().backward()
        >>> net[0].weight.grad.shape
        torch.Size([8, 4])
    """
    relaxed = LeastAction(network, beta=beta, steps=steps, step_size=step_size, time=time)
    used = False

    def forward(inputs: Tensor) -> Tensor:
        nonlocal used
        used = True
        return relaxed(inputs)  # type: ignore[no-any-return]

    attributes: dict[str, Any] = vars(network)
    before = attributes.get("forward")
    attributes["forward"] = forward
    try:
        yield relaxed
    finally:
        if before is None:
            attributes.pop("forward", None)
        else:
            attributes["forward"] = before
    if not used:
        warnings.warn(
            "least_action: the network made no forward pass inside the block, so gradients of a loss computed "
            "before it came from autograd; compute the loss inside the block",
            UserWarning,
            stacklevel=3,
        )


def least_action_gradients(
    network: nn.Module,
    inputs: Tensor,
    cost: Callable[[Tensor], Tensor],
    *,
    beta: float = 1.0,
    steps: int | None = None,
    step_size: float = 1.0,
    time: float | None = None,
    start: Phase | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Cost and its gradient by joint relaxation of x and s, with ∇C taken at the present x^L in every step.

    Args:
        network: see `LeastAction`, also for ``beta``, ``steps``, ``step_size`` and ``time``.
        inputs: shape (B, ...).
        cost: C, from the output to a number.
        start: phase to start from; default x = s = 0.

    Returns:
        The cost at the final x^L, and the gradients of the parameters that require one, by name.

    Example:
        >>> net = nn.Linear(3, 1, bias=False)
        >>> cost, gradients = least_action_gradients(net, torch.ones(2, 3), lambda out: out.sum())
        >>> gradients
        {'weight': tensor([[2., 2., 2.]])}
    """
    relaxed = LeastAction(network, beta=beta, steps=steps, step_size=step_size, time=time)
    for phase in relaxed.relax(inputs, gradient_of(cost), start):
        last = phase
    named = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    with torch.no_grad():
        value = cost(last.states[-1])
    gradients = relaxed.gradients(last, inputs.detach(), list(named.values())) if named else ()
    return value, dict(zip(named, gradients, strict=True))


def steps_to_rest(depth: int, step_size: float = 1.0, tolerance: float = 1e-16) -> int:
    """Euler steps after which less than about ``tolerance`` of the start is left: 2L for unit steps.

    n steps of size h are the unit map applied K times on average, K ~ Binomial(n, h); that map has forgotten the
    start after 2L applications, so what is left is P(K < 2L). For nonlinear networks that is an estimate.

    Example:
        >>> steps_to_rest(3), steps_to_rest(3, 0.1)
        (6, 496)
    """
    if step_size == 1.0:
        return 2 * depth

    def left(n: int) -> float:
        logs = (
            math.lgamma(n + 1)
            - math.lgamma(k + 1)
            - math.lgamma(n - k + 1)
            + k * math.log(step_size)
            + (n - k) * math.log1p(-step_size)
            for k in range(min(2 * depth, n + 1))
        )
        return sum(math.exp(log) for log in logs)

    high = 2 * depth
    while left(high) >= tolerance:
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if left(middle) < tolerance else (middle, high)
    return high


class _Relaxation(torch.autograd.Function):
    """Ordinary forward, relaxation as backward."""

    @staticmethod
    def forward(ctx: Any, relaxed: LeastAction, inputs: Tensor, *parameters: Tensor) -> Tensor:
        ctx.relaxed = relaxed
        ctx.save_for_backward(inputs, *parameters)
        output = inputs
        for layer in relaxed.layers:
            for module in layer.modules:
                output = module(output)  # with hooks, as an ordinary forward pass
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        relaxed: LeastAction = ctx.relaxed
        inputs, *parameters = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1:]
        inputs = inputs.detach().requires_grad_(wanted[0])
        for phase in relaxed.relax(inputs, lambda _: gradient):
            last = phase
        variables = [tensor for tensor, want in zip((inputs, *parameters), wanted, strict=True) if want]
        found = iter(relaxed.gradients(last, inputs, variables))
        return None, *(next(found) if want else None for want in wanted)


def _inner(left: tuple[Tensor, ...], right: list[Tensor]) -> Tensor:
    """Σ_l ⟨left_l, right_l⟩."""
    return torch.stack([(x * y).sum() for x, y in zip(left, right, strict=True)]).sum()


def gradient_of(cost: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """∇C as a function of the output."""

    def gradient(output: Tensor) -> Tensor:
        with torch.enable_grad():
            output = output.detach().requires_grad_()
            return torch.autograd.grad(cost(output), output)[0]

    return gradient
