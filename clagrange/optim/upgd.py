"""Utility-based perturbed gradient descent."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clagrange._checks import Number, check_choice, check_nonnegative, check_number, per_replica
from clagrange.optim.base import CheckedOptimizer
from clagrange.optim.stacked import is_stacked, one_more_step
from clagrange.replicas import Generators, generators_from_seeds, randn_like

SCOPES = ("global", "local")


class UPGD(CheckedOptimizer):
    """Gradient descent with noise, less of both where a weight is of use.

    For a parameter w with gradient g, utility by first-order Taylor expansion of what the loss would lose:

        u ← βu + (1 − β)(−g·w),   û = u/(1 − βᵗ),   ū = sigmoid(û/s)
        w ← (1 − lr·weight_decay)·w − lr·(g + noise·ξ)(1 − ū)        protecting
        w ← (1 − lr·weight_decay)·w − lr·(g + noise·ξ·(1 − ū))       otherwise

    with ξ standard normal. The scale s is the largest û of all weights ("global"), or the norm of û over the
    weights that enter a unit ("local"; over all of a bias). The published code of the global form divides by
    the largest u before its bias correction; this is the paper's.

    The random stream is the optimizer's own, in its ``state_dict``; every process draws the same. All numbers
    but the seed may be tensors of shape (R,).

    Args:
        params: parameters, with a leading replica dimension or not.
        lr: learning rate.
        noise: standard deviation of the perturbation, in units of the gradient.
        decay: β in [0, 1), of the average of the utility.
        weight_decay: decoupled, in units of the learning rate.
        scope: "global" or "local".
        protecting: whether useful weights are also held against the gradient, not against the noise alone.
        seed: of the random stream; for stacked parameters a sequence with one seed for each replica (a single
            number s gives replica r the seed s + r).
        stacked: whether parameters have a leading replica dimension. None: as the numbers say, if one of them is
            a tensor of shape (R,) or ``seed`` a sequence.
        maximize: ascend instead of descend; the weight decay still decays.

    Raises:
        ValueError: if a number is out of range, or an option unknown.

    Source: Elsayed and Mahmood, "Addressing loss of plasticity and catastrophic forgetting in continual
    learning", ICLR 2024, Algorithm 1, with its weight decay (there UPGD-W).

    Example:
        >>> optimizer = UPGD(torch.nn.Linear(3, 2).parameters(), lr=0.01, noise=0.1)
    """

    def __init__(
        self,
        params: Any,
        lr: Number = 0.01,
        noise: Number = 1e-3,
        decay: Number = 0.9999,
        weight_decay: Number = 0.0,
        *,
        scope: str = "global",
        protecting: bool = True,
        seed: int | Sequence[int] = 0,
        stacked: bool | None = None,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "noise": noise,
            "decay": decay,
            "weight_decay": weight_decay,
            "scope": scope,
            "protecting": protecting,
            "stacked": stacked,
            "maximize": maximize,
        }
        self._generators: Generators | None = None
        self._streams: list[Tensor] | None = None
        self.seed(seed)
        super().__init__(params, defaults)

    def seed(self, seed: int | Sequence[int]) -> None:
        """Choose the seeds of the random streams; streams that have begun, or were loaded, go on."""
        self._seed: int | list[int] = seed if isinstance(seed, int) else list(seed)

    def _check(self, group: dict[str, Any]) -> None:
        check_nonnegative("lr", group["lr"])
        check_nonnegative("noise", group["noise"])
        check_number("decay", group["decay"], low=0.0, high=1.0, open_high=True)
        check_nonnegative("weight_decay", group["weight_decay"])
        check_choice("scope", group["scope"], SCOPES)
        check_choice("protecting", group["protecting"], (True, False))
        check_choice("stacked", group["stacked"], (None, True, False))

    def _step(self) -> None:
        if not self.state:  # new, or emptied to be as new
            self._generators = None
        trained = [
            (parameter, group)
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        utilities = [self._utility(parameter, group) for parameter, group in trained]
        stacked = self._stacked()
        largest: Tensor | None = None
        for (_, group), utility in zip(trained, utilities, strict=True):
            if group["scope"] == "global":
                own = utility.flatten(1).amax(1) if stacked else utility.amax()
                largest = own if largest is None else torch.maximum(largest, own.to(largest))
        for (parameter, group), utility in zip(trained, utilities, strict=True):
            if group["scope"] == "local":
                scale = _norm_of_units(utility, stacked)
            else:
                assert largest is not None
                scale = largest.view(-1, *[1] * (utility.dim() - 1)) if stacked else largest
            self._update(parameter, torch.sigmoid(utility / _away_from_zero(scale.to(utility))), group)

    def _utility(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """Average −g·w into the state and return it, corrected for its start at 0."""
        state = self.state[parameter]
        if "step" not in state:
            state["step"] = torch.zeros(())
            # in half precision products of weights and gradients would be 0
            state["utility"] = torch.zeros_like(
                parameter, dtype=torch.promote_types(parameter.dtype, torch.float32)
            )
        count = one_more_step(state, parameter).double()  # a GPU would be waited for if it were a plain number
        utility = state["utility"]
        decay = per_replica(group["decay"], utility)
        saliency = _gradient(parameter, group).to(utility.dtype) * parameter
        utility.mul_(decay).sub_((1.0 - decay) * saliency)
        corrected: Tensor = utility / (1.0 - decay**count)
        return corrected

    def _update(self, parameter: Tensor, useful: Tensor, group: dict[str, Any]) -> None:
        lr, noise, weight_decay = (
            per_replica(group[name], parameter) for name in ("lr", "noise", "weight_decay")
        )
        perturbation = noise * randn_like(parameter, self._random_streams(parameter))
        gradient, open_to_change = _gradient(parameter, group), (1.0 - useful).to(parameter.dtype)
        if group["protecting"]:
            step = (gradient + perturbation) * open_to_change
        else:
            step = gradient + perturbation * open_to_change
        parameter.mul_(1.0 - lr * weight_decay).sub_(lr * step)

    # -------------------------------------------------------------------------------------- random streams
    @property
    def generators(self) -> list[torch.Generator]:
        """The random streams, one for each replica; none before the first step."""
        return [] if self._generators is None else _listed(self._generators)

    def _stacked(self) -> bool:
        return not isinstance(self._seed, int) or any(is_stacked(group) for group in self.param_groups)

    def _random_streams(self, parameter: Tensor) -> Generators:
        if self._generators is None:
            seed = self._seed
            if self._stacked() and isinstance(seed, int):
                seed = [seed + replica for replica in range(len(parameter))]
            self._generators = generators_from_seeds(seed, parameter.device, purpose="UPGD")
            if self._streams is not None:
                for generator, state in zip(_listed(self._generators), self._streams, strict=True):
                    generator.set_state(state.cpu().clone())  # torch 2.13 crashes on a part of a tensor
                self._streams = None
        return self._generators

    def _stream_states(self) -> list[Tensor] | None:
        if self._generators is None:
            return self._streams
        return [generator.get_state() for generator in _listed(self._generators)]

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state and its random streams."""
        return {**super().state_dict(), "random_streams": self._stream_states()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        super().load_state_dict(state_dict)
        self._generators, self._streams = None, state_dict.get("random_streams")

    def __getstate__(self) -> dict[str, Any]:  # generators do not pickle
        streams = {"_seed": self._seed, "_generators": None, "_streams": self._stream_states()}
        return {**super().__getstate__(), **streams}


def _listed(generators: Generators) -> list[torch.Generator]:
    return [generators] if isinstance(generators, torch.Generator) else list(generators)


def _gradient(parameter: Tensor, group: dict[str, Any]) -> Tensor:
    assert parameter.grad is not None
    return -parameter.grad if group["maximize"] else parameter.grad


def _norm_of_units(values: Tensor, stacked: bool) -> Tensor:
    """The norm over the weights that enter each unit, to broadcast against ``values``; over all of a bias."""
    first = int(stacked)
    dims = tuple(range(first + 1, values.dim())) or tuple(range(first, values.dim()))
    return values.square().sum(dims, keepdim=True).sqrt()


def _away_from_zero(scale: Tensor) -> Tensor:
    """The scale, and 1 where it is 0: all utilities are 0 there."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)
