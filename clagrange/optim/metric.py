"""What NaturalGradient and GeometricMean share: beliefs over the Fisher matrix, diagonal or Kronecker."""

from typing import Any

import torch
from torch import Tensor, nn

from clagrange._checks import check_choice, check_nonnegative, check_number, check_positive, per_replica
from clagrange.distributed import mean_over_processes
from clagrange.optim.base import CurvatureOptimizer, squares
from clagrange.optim.kronecker import FisherObserver, observe_layers


class FisherOptimizer(CurvatureOptimizer):
    """Optimizers with a Fisher matrix: diagonal from squared gradients, or Kronecker factors of linear layers."""

    _observers: list[tuple[Tensor, FisherObserver]]

    def __init__(self, params: Any, defaults: dict[str, Any], structure: str) -> None:
        check_choice("structure", structure, ("diagonal", "kronecker"))
        self._observers = []
        if structure == "kronecker":
            if not isinstance(params, nn.Module):
                raise TypeError(
                    f"params: expected the network itself for structure='kronecker', which is seen through hooks "
                    f"on its layers, got {type(params).__name__}"
                )
            self._observers = list(observe_layers(params))
        super().__init__(params.named_parameters() if isinstance(params, nn.Module) else params, defaults)

    def __getstate__(self) -> dict[str, Any]:
        """What is copied and pickled: the observers too, which the network's hooks call."""
        return {**super().__getstate__(), "_observers": self._observers}

    def step(self, closure: Any = None) -> Any:
        """Take one step; a closure is evaluated first and its value returned."""
        loss = super().step(closure)
        for _, observer in self._observers:
            observer.clear()
        return loss

    def _check(self, group: dict[str, Any]) -> None:
        check_nonnegative("lr", group["lr"])
        check_positive("damping", group["damping"])
        check_positive("examples", group["examples"])
        for name in ("metric_decay", "curvature_decay"):
            if group.get(name) is not None:
                check_number(name, group[name], low=0.0, high=1.0, open_high=bool(self._observers))

    def _set(self, name: str, parameter: Tensor, value: Tensor | float) -> None:
        if self._observer_of(parameter) is not None:
            raise ValueError(
                f"{name}: expected a parameter with a diagonal one, got one of a linear layer, whose factors are "
                f"seen through hooks; set it with structure='diagonal'"
            )
        super()._set(name, parameter, value)

    def _observer_of(self, parameter: Tensor) -> FisherObserver | None:
        return next((observer for known, observer in self._observers if known is parameter), None)

    def _observed(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> tuple[Tensor, ...]:
        """What was seen of the Fisher matrix: its diagonal, or its factors (B, A); means over processes."""
        observer = self._observer_of(parameter)
        if observer is None:
            return (squares(gradient, group),)
        factors = observer.factors()
        if factors is None:
            raise RuntimeError(
                f"a parameter of shape {tuple(parameter.shape)} has a gradient, but its layer saw no example "
                f"since the last step; run forward and backward through the layer"
            )
        outputs, inputs = factors
        scale = observer.scale(gradient, torch.finfo(parameter.dtype).eps ** 0.5)
        outputs = outputs * per_replica(scale, outputs)
        if gradient.dim() < outputs.dim():  # a bias: its inputs are 1
            return (mean_over_processes(outputs.diagonal(dim1=-2, dim2=-1)),)
        return mean_over_processes(outputs), mean_over_processes(inputs)

    def _averaged(
        self,
        name: str,
        parameter: Tensor,
        observed: tuple[Tensor, ...],
        state: dict[str, Any],
        group: dict[str, Any],
    ) -> tuple[Tensor, ...]:
        """Beliefs over what was seen, the diagonal or both factors."""
        if len(observed) == 1:
            return (self._average(name, parameter, observed[0], state, group),)
        keys = (f"{name}_outputs", f"{name}_inputs")
        if keys[0] not in state:
            state.update(zip(keys, map(torch.zeros_like, observed), strict=True))
            state[f"{name}_unseen"] = torch.ones((), dtype=observed[0].dtype)
        keep = per_replica(group[f"{name}_decay"], observed[0])
        state[f"{name}_unseen"] = state[f"{name}_unseen"] * keep
        for key, factor in zip(keys, observed, strict=True):
            state[key].mul_(keep).add_((1.0 - keep) * factor)
        return tuple(state[key] / (1.0 - state[f"{name}_unseen"]) for key in keys)
