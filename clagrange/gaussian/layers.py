"""Layers whose parameters are Gaussian: the mean keeps the usual name, the precision stands beside it."""

import math
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from clagrange._checks import Number, check_choice
from clagrange.gaussian.precision import PRECISIONS, Precision
from clagrange.replicas import conv2d, fan_in, linear

_owners: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def owner_of(parameter: Tensor) -> "tuple[GaussianLayer, str] | None":
    """The Gaussian layer of which a tensor is a mean and the mean's name in it, or None."""
    entry = _owners.get(parameter)
    if entry is None:
        return None
    layer = entry[0]()
    return None if layer is None else (layer, entry[1])


class GaussianLayer(nn.Module, ABC):
    """What Gaussian layers share: the link from mean to precision, and the count of examples.

    The precision of the mean ``weight`` is the submodule ``weight_precision``. A layer counts the examples
    whose gradients its means hold, because an optimizer that turns gradients into curvature has to know it:
    the count starts afresh when gradients were set to None and adds up while they accumulate. A layer that is
    used several times between the same inputs and loss saw these examples once.

    Attributes:
        examples: number of examples behind the present gradients (of each replica).
        positions: the same times the length of any further leading dimensions, such as tokens of a sequence.
    """

    mean_names: ClassVar[tuple[str, ...]] = ("weight", "bias")
    examples: int
    positions: int
    _backward: int  # the backward pass that counted last
    _before: tuple[int, int]  # the counts before it

    def become_gaussian(self, precision: str, prior_mean: str, prior_variance: Number) -> None:
        """Give every mean a precision at its prior.

        Args:
            precision: structure, a key of `PRECISIONS`.
            prior_mean: "zero" or "initial".
            prior_variance: in units of the layer's initialisation variance, 2 / fan_in (He et al. 2015).
        """
        check_choice("precision", precision, PRECISIONS)
        assert isinstance(self, (nn.Linear, nn.Conv2d))
        scale = 2.0 / fan_in(self)
        for name, mean in self.means():
            block = PRECISIONS[precision](
                mean,
                prior_mean=prior_mean,
                prior_variance=prior_variance * scale,
                stacked=self.stacked,
            )
            self.add_module(f"{name}_precision", block)
        self._link()

    def become_deterministic(self) -> None:
        """Drop the precisions; the means stay."""
        for name, _ in self.means():
            delattr(self, f"{name}_precision")
            _owners.pop(getattr(self, name), None)
        for attribute in ("examples", "positions", "_backward", "_before"):
            delattr(self, attribute)

    def means(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The Gaussian parameters by name."""
        for name in self.mean_names:
            parameter = self._parameters.get(name)
            if parameter is not None:
                yield name, parameter

    def precision_of(self, name: str) -> Precision:
        """The precision of the mean called ``name``."""
        precision = self._modules[f"{name}_precision"]
        assert isinstance(precision, Precision)
        return precision

    @property
    @abstractmethod
    def stacked(self) -> bool:
        """Whether the layer has a leading replica dimension."""

    def count_examples(self, output: Tensor, examples: int, positions: int) -> None:
        """Note, when the gradient of ``output`` arrives, how many examples it stands for."""
        if not output.requires_grad or not torch.is_grad_enabled():
            return
        this = weakref.ref(self)

        def note(_: Tensor) -> None:
            layer = this()
            if layer is None:
                return
            backward = torch._C._current_graph_task_id()
            if backward != layer._backward:
                fresh = all(mean.grad is None for _, mean in layer.means())
                layer._before = (0, 0) if fresh else (layer.examples, layer.positions)
                layer.examples, layer.positions = layer._before
                layer._backward = backward
            layer.examples = max(layer.examples, layer._before[0] + examples)
            layer.positions = max(layer.positions, layer._before[1] + positions)

        output.register_hook(note)

    def clear_examples(self) -> None:
        """Forget the count, once the gradients have been used."""
        self.examples = self.positions = 0
        self._backward = -1
        self._before = (0, 0)

    # The link from mean to precision: wherever a parameter object can change, it is made anew.
    def _link(self) -> None:
        self.clear_examples()
        for name, mean in self.means():
            if f"{name}_precision" in self._modules:
                _owners[mean] = (weakref.ref(self), name)

    def __setstate__(self, state: dict[str, Any]) -> None:  # unpickling and deepcopy
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._link()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter, and link it where it replaces a mean."""
        super().register_parameter(name, param)
        if param is not None and f"{name}_precision" in self._modules:
            _owners[param] = (weakref.ref(self), name)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._link()
        return result

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A deterministic checkpoint has means without precisions: these return to their prior.
        for name, _ in self.means():
            block = f"{prefix}{name}_precision."
            if prefix + name in state_dict and not any(key.startswith(block) for key in state_dict):
                precision = self.precision_of(name)
                precision.reset()
                state_dict.update({block + key: value for key, value in precision.state_dict().items()})
        super()._load_from_state_dict(state_dict, prefix, *args)


class GaussianLinear(GaussianLayer, nn.Linear):
    """A linear layer with Gaussian weights: y = x Wᵀ + b at the mean.

    Args:
        in_features: inputs of each unit.
        out_features: number of units.
        bias: whether there is one; it is Gaussian too.
        precision: structure of the precision, "diagonal".
        prior_mean: "zero" or "initial".
        prior_variance: in units of the initialisation variance 2 / in_features.
        device: of all tensors.
        dtype: of the means.

    Shapes: inputs (..., in), outputs (..., out); stacked: inputs (R, ..., in), weight (R, out, in).

    Example:
        >>> layer = GaussianLinear(8, 4, prior_variance=0.5)
        >>> float(layer.weight_precision.variance().mean())
        0.125
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        precision: str = "diagonal",
        prior_mean: str = "zero",
        prior_variance: Number = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.become_gaussian(precision, prior_mean, prior_variance)

    @property
    def stacked(self) -> bool:
        """Whether the weight is (R, out, in)."""
        return self.weight.dim() == 3

    def forward(self, inputs: Tensor) -> Tensor:
        """Apply the layer at its mean."""
        output = linear(inputs, self.weight, self.bias)
        leading = inputs.shape[int(self.stacked) : -1]
        self.count_examples(output, leading[0] if leading else 1, math.prod(leading))
        return output


class GaussianConv2d(GaussianLayer, nn.Conv2d):
    """A convolution with Gaussian weights.

    Takes the arguments of `torch.nn.Conv2d`, and ``precision``, ``prior_mean`` and ``prior_variance`` (in units
    of 2 / (in_channels / groups · kernel height · kernel width)) as `GaussianLinear` does.

    Shapes: inputs (B, C, H, W); stacked: inputs (R, B, C, H, W), weight (R, out, in / groups, h, w).

    Example:
        >>> GaussianConv2d(3, 8, 5, padding=2)(torch.zeros(1, 3, 6, 6)).shape
        torch.Size([1, 8, 6, 6])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        *args: Any,
        precision: str = "diagonal",
        prior_mean: str = "zero",
        prior_variance: Number = 1.0,
        **settings: Any,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, *args, **settings)
        self.become_gaussian(precision, prior_mean, prior_variance)

    @property
    def stacked(self) -> bool:
        """Whether the weight is (R, out, in / groups, h, w)."""
        return self.weight.dim() == 5

    def forward(self, inputs: Tensor) -> Tensor:
        """Apply the convolution at its mean."""
        output = conv2d(self, inputs, self.weight, self.bias)
        batched = inputs.dim() == self.weight.dim()
        examples = inputs.shape[int(self.stacked)] if batched else 1
        self.count_examples(output, examples, examples)
        return output
