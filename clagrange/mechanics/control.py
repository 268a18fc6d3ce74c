"""Learning as control: costates of a chain of states, and Bellman's equation where it has a closed form.

States s_{k+1} = f_k(s_k, a_k), reward J = h(s_n) + Σ r_k(s_k, a_k). The Hamiltonian is H_k = r_k + f_kᵀλ_{k+1};
the costates run backwards, λ_n = ∇h, λ_k = ∂_s r_k + (∂_s f_k)ᵀλ_{k+1}; the best actions make H_k largest. With
r = 0 and h = −loss, layers as f_k and weights as a_k this is backpropagation: λ_k = −∂loss/∂s_k.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clagrange._checks import check_number

Dynamics = Callable[[Tensor, Tensor], Tensor]
Reward = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Control:
    """A path, its costates and what the actions would gain.

    Attributes:
        states: s_0 … s_n.
        costates: λ_0 … λ_n = ∂J/∂s_k.
        action_gradients: ∂H_k/∂a_k = ∂J/∂a_k, for k = 0 … n − 1; all 0 on a best path.
        reward: J.
    """

    states: tuple[Tensor, ...]
    costates: tuple[Tensor, ...]
    action_gradients: tuple[Tensor, ...]
    reward: float


def costates(
    start: Tensor,
    actions: Sequence[Tensor],
    dynamics: Dynamics | Sequence[Dynamics],
    terminal: Callable[[Tensor], Tensor],
    running: Reward | None = None,
) -> Control:
    """Costates λ_k = ∂_s r + (∂_s f)ᵀλ_{k+1}, one local product with the Jacobian of each step at a time.

    Args:
        start: s_0.
        actions: a_0 … a_{n−1}, such as the weights of layers.
        dynamics: f(s, a), one for all steps or one for each.
        terminal: h(s), a number.
        running: r(s, a), a number; default 0.

    Raises:
        ValueError: if there are not as many dynamics as actions.

    Example:
        >>> found = costates(torch.tensor([3.0]), [torch.tensor([2.0])], lambda s, a: a * s, lambda s: s.sum())
        >>> found.costates[0], found.action_gradients[0]
        (tensor([2.]), tensor([3.]))
    """
    steps = [dynamics] * len(actions) if callable(dynamics) else list(dynamics)
    if len(steps) != len(actions):
        raise ValueError(f"dynamics: expected one for each of {len(actions)} actions, got {len(steps)}")
    states, reward = [start.detach()], 0.0
    for step, action in zip(steps, actions, strict=True):
        with torch.no_grad():
            reward += 0.0 if running is None else float(running(states[-1], action))
            states.append(step(states[-1], action))
    costate = _gradients(terminal, states[-1])[0]
    with torch.no_grad():
        reward += float(terminal(states[-1]))
    found, gains = [costate], []
    for step, state, action in reversed(list(zip(steps, states[:-1], actions, strict=True))):

        def hamiltonian(s: Tensor, a: Tensor, step: Dynamics = step, costate: Tensor = costate) -> Tensor:
            value = (step(s, a) * costate).sum()
            return value if running is None else value + running(s, a)

        costate, gain = _gradients(hamiltonian, state, action.detach())
        found.append(costate)
        gains.append(gain)
    return Control(tuple(states), tuple(reversed(found)), tuple(reversed(gains)), reward)


@dataclass(frozen=True)
class QuadraticValue:
    """V_k(s) = −½sᵀP_k s and the best action a_k = −K_k s of a linear problem with quadratic costs.

    Attributes:
        values: P_0 … P_n, (n + 1, d, d).
        gains: K_0 … K_{n−1}, (n, m, d).
    """

    values: Tensor
    gains: Tensor

    def value(self, step: int, state: Tensor) -> Tensor:
        """V_k(s), the most reward that is still to be had."""
        return -0.5 * state @ self.values[step] @ state

    def action(self, step: int, state: Tensor) -> Tensor:
        """The best action."""
        return -self.gains[step] @ state


def bellman_quadratic(
    transition: Tensor,
    control: Tensor,
    state_cost: Tensor,
    action_cost: Tensor,
    terminal_cost: Tensor,
    steps: int,
) -> QuadraticValue:
    """Solve Bellman's equation V_k(s) = max_a {r(s, a) + V_{k+1}(f(s, a))} where it has a closed form.

    f = As + Ba, r = −½(sᵀQs + aᵀRa), h = −½sᵀQ_n s. Then V_k = −½sᵀP_k s with P_n = Q_n and
    P_k = Q + Aᵀ P_{k+1} (A − B K_k), K_k = (R + Bᵀ P_{k+1} B)⁻¹ Bᵀ P_{k+1} A.

    Args:
        transition: A, (d, d).
        control: B, (d, m).
        state_cost: Q, (d, d), symmetric.
        action_cost: R, (m, m), positive definite.
        terminal_cost: Q_n, (d, d), symmetric.
        steps: n ≥ 1.

    Example:
        >>> one = torch.eye(1)
        >>> bellman_quadratic(one, one, 0 * one, one, one, steps=1).values[0]
        tensor([[0.5000]])
    """
    check_number("steps", steps, low=1)
    value = terminal_cost
    values, gains = [value], []
    for _ in range(steps):
        gain = torch.linalg.solve(action_cost + control.T @ value @ control, control.T @ value @ transition)
        value = state_cost + transition.T @ value @ (transition - control @ gain)
        value = 0.5 * (value + value.T)
        values.append(value)
        gains.append(gain)
    return QuadraticValue(torch.stack(values[::-1]), torch.stack(gains[::-1]))


def _gradients(function: Callable[..., Tensor], *points: Tensor) -> tuple[Tensor, ...]:
    """Derivatives of a scalar function by its arguments, whatever the present gradient mode."""
    with torch.enable_grad():
        leaves = [point.detach().requires_grad_(True) for point in points]
        return torch.autograd.grad(function(*leaves), leaves, materialize_grads=True)
