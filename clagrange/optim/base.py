"""What optimizers share: checks, closure, states; the loop over parameters; beliefs over the curvature."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from clagrange._checks import Number, check_choice, check_positive, per_replica
from clagrange.dynamics.beliefs import Belief, as_belief, as_numbers, averaging_weights

_BELIEFS = ("curvature_decay", "metric_decay", "gradient_belief", "square_belief")


class CheckedOptimizer(Optimizer, ABC):
    """An optimizer whose settings are checked and whose state is restored in its own precision."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, with its settings checked."""
        super().add_param_group(param_group)
        try:
            check_choice("maximize", self.param_groups[-1]["maximize"], (True, False))
            self._check(self.param_groups[-1])
        except Exception:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step, outside of autocast; a closure is evaluated first and its value returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        device = next((p.device.type for group in self.param_groups for p in group["params"]), "cpu")
        autocast = torch.is_autocast_enabled(device)
        with torch.autocast(device, enabled=False) if autocast else contextlib.nullcontext():
            self._step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        super().load_state_dict(state_dict)
        _restore_state(self, state_dict)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore, giving settings that an older version did not have their default."""
        super().__setstate__(state)
        for group in self.param_groups:
            for name, default in self.defaults.items():
                group.setdefault(name, default)

    @abstractmethod
    def _check(self, group: dict[str, Any]) -> None:
        """Raise if a setting of a group is out of range."""

    @abstractmethod
    def _step(self) -> None:
        """Step all parameters by the gradients that they have."""


def _restore_state(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Put the tensors of a checkpoint into an optimizer as they are.

    `Optimizer.load_state_dict` casts them to the type of the parameter, which loses digits in half precision,
    and shares their memory.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=True):
        for name, value in state_dict["state"].get(number, {}).items():
            if isinstance(value, Tensor):
                on_host = value.dim() == 0 and value.device.type == "cpu"  # a counter of steps
                device = value.device if on_host else parameter.device
                optimizer.state[parameter][name] = value.to(device, copy=True)


class PerParameterOptimizer(CheckedOptimizer):
    """The loop over parameters, with the sign of ``maximize``."""

    def _step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    gradient = -parameter.grad if group["maximize"] else parameter.grad
                    self._update(parameter, gradient, self.state[parameter], group)

    @abstractmethod
    def _update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Change one parameter in place; ``gradient`` is that of what is minimised."""


class RuleOptimizer(PerParameterOptimizer, ABC):
    """Optimizers whose rule gives a displacement, in float32 at least.

    Beliefs among the settings are kept as dictionaries of numbers, so that a ``state_dict`` loads with
    ``weights_only=True``.
    """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, with its settings checked."""
        param_group.update({name: as_numbers(param_group[name]) for name in _BELIEFS if name in param_group})
        super().add_param_group(param_group)

    def _update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        gradient = gradient.to(torch.promote_types(parameter.dtype, torch.float32))
        parameter.add_(self._displacement(parameter, gradient, state, group))

    @abstractmethod
    def _displacement(
        self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> Tensor:
        """The step of one parameter, at least in float32, as ``gradient`` is."""


class CurvatureOptimizer(RuleOptimizer):
    """Optimizers that hold a belief over the diagonal of the Hessian, of squared gradients or set by hand."""

    def set_curvature(self, parameter: Tensor, curvature: Tensor | float) -> None:
        """Say what the diagonal curvature of a parameter is; with ``curvature_decay=1`` it stays so.

        Args:
            parameter: one of the optimizer's.
            curvature: h ≥ 0, a number or a tensor that broadcasts to the parameter's shape.

        Raises:
            ValueError: if it is negative or not finite: the local quadratic then has no minimum, and no bounded
                path is optimal.
        """
        self._set("curvature", parameter, curvature)

    def _set(self, name: str, parameter: Tensor, value: Tensor | float) -> None:
        like = _zeros(parameter)
        value = torch.as_tensor(value, dtype=like.dtype, device=like.device)
        if not bool((value.isfinite() & (value >= 0)).all()):
            raise ValueError(
                f"{name}: expected finite numbers of at least 0, got {float(value.min()):g} to "
                f"{float(value.max()):g}; where it is negative the local quadratic has no minimum and no bounded "
                f"path is optimal"
            )
        state = self.state[parameter]
        state[name] = value.expand_as(like).clone()
        state[f"{name}_unseen"] = torch.zeros((), dtype=like.dtype)

    def _check(self, group: dict[str, Any]) -> None:
        check_belief("curvature_decay", group["curvature_decay"], group.get("discount", 0.0))
        check_positive("examples", group["examples"])

    def _average(
        self,
        name: str,
        parameter: Tensor,
        observed: Tensor,
        state: dict[str, Any],
        group: dict[str, Any],
        correct: bool = True,
    ) -> Tensor:
        """Average an observation into a belief and return it, divided by the weight of what has been seen.

        ``name`` is "curvature" or "metric"; the setting ``<name>_decay`` says how.
        """
        keep, gain = averaging_weights(group[f"{name}_decay"], group.get("discount", 0.0))
        keep, gain = (per_replica(value, observed) for value in (keep, gain))
        if name not in state:
            if bool((keep == 1.0).any()) if isinstance(keep, Tensor) else keep == 1.0:
                raise RuntimeError(
                    f"{name}_decay: at 1 the {name} is held where it was set, and none was; call "
                    f"set_{name}(parameter, value) for every parameter first, or give a number below 1"
                )
            state[name] = _zeros(parameter)
            state[f"{name}_unseen"] = torch.ones((), dtype=state[name].dtype)
        belief = state[name]
        belief.mul_(keep).add_((1.0 - keep) * gain * observed)
        unseen = state[f"{name}_unseen"] = state[f"{name}_unseen"] * keep
        corrected: Tensor = belief / (1.0 - unseen) if correct else belief
        return corrected


def check_belief(name: str, value: object, discount: object, *, open_high: bool = False) -> None:
    """Raise unless ``value`` is a decay in [0, 1] or a belief; a belief needs a finite discount."""
    belief = as_belief(name, value, open_high=open_high)
    if isinstance(belief, Belief) and bool(torch.isinf(torch.as_tensor(discount)).any()):
        raise ValueError(
            f"{name}: expected a finite discount for a belief, since at an infinite one its rate is its own "
            f"decay and it never heeds an observation; got discount inf. Give the average's β instead, or "
            f"Belief.averaging(β, discount)"
        )


def squares(gradient: Tensor, group: dict[str, Any]) -> Tensor:
    """n·g²: an estimate of the diagonal curvature of the mean loss per example."""
    return gradient.square() * per_replica(group["examples"], gradient)


def _zeros(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32)).detach()


def phi(exponent: Tensor) -> Tensor:
    """(1 − e^{−z})/z for z ≥ 0, 1 at 0."""
    safe = torch.where(exponent == 0, torch.ones_like(exponent), exponent)
    return torch.where(exponent == 0, torch.ones_like(exponent), -torch.expm1(-safe) / safe)


def numbers(group: dict[str, Any], like: Tensor, *names: str) -> list[Number]:
    """Settings of a group by name, shaped to broadcast along the replicas of ``like``."""
    return [per_replica(group[name], like) for name in names]
