"""What layers with Gaussian parameters share: the mean keeps the usual name, the precision stands beside it."""

import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from clagrange._checks import Number
from clagrange.gaussian.curvature import Observer
from clagrange.gaussian.precision import Precision
from clagrange.gaussian.structures import Structure, as_structure

_owners: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def owner_of(parameter: Tensor) -> "tuple[GaussianLayer, str] | None":
    """The Gaussian layer of which a tensor is a mean and the mean's name in it, or None."""
    entry = _owners.get(parameter)
    if entry is None:
        return None
    layer = entry[0]()
    return None if layer is None else (layer, entry[1])


class GaussianBlock(NamedTuple):
    """Parameters of a layer that share one precision: one alone, or a weight and its bias.

    Attributes:
        layer: the layer.
        names: of the parameters in the layer.
        precision: of their joint mean.
    """

    layer: "GaussianLayer"
    names: tuple[str, ...]
    precision: Precision

    @property
    def means(self) -> tuple[nn.Parameter, ...]:
        """The parameters."""
        return tuple(self.layer.get_parameter(name) for name in self.names)

    def joint(self, tensors: Sequence[Tensor]) -> Tensor:
        """Tensors of the parameters' shapes as one of the precision's: a matrix with the bias as last column."""
        if not self.layer.structure.joint:
            return tensors[0]
        matrices = [self.layer.as_matrix(name, tensor) for name, tensor in zip(self.names, tensors, strict=True)]
        return torch.cat(matrices, -1)

    def split(self, joint: Tensor) -> tuple[Tensor, ...]:
        """The inverse of `joint`."""
        if not self.layer.structure.joint:
            return (joint,)
        widths = [
            self.layer.as_matrix(name, mean).shape[-1] for name, mean in zip(self.names, self.means, strict=True)
        ]
        matrices = joint.split(widths, -1)
        return tuple(
            self.layer.from_matrix(name, matrix) for name, matrix in zip(self.names, matrices, strict=True)
        )

    def joint_mean(self) -> Tensor:
        """The means as one tensor, without gradients."""
        return self.joint([mean.detach() for mean in self.means])

    def set_mean(self, joint: Tensor) -> None:
        """Copy a joint mean into the parameters."""
        for mean, value in zip(self.means, self.split(joint), strict=True):
            mean.copy_(value)

    def reset(self, name: str, mask: Tensor) -> None:
        """Return the precision to its prior at some entries of one parameter.

        Where weight and bias share a precision, a bias follows the row of its weight.
        """
        mask = mask.expand(self.layer.get_parameter(name).shape)
        if self.layer.structure.joint:
            if name != self.names[0]:
                return
            mask = self.layer.as_matrix(name, mask)
            mask = torch.cat([mask, *[mask.all(-1, keepdim=True)] * (len(self.names) - 1)], -1)
        self.precision.reset(mask)


class GaussianLayer(nn.Module, ABC):
    """What Gaussian layers share: the link from mean to precision, and what they see of a backward pass.

    The precision of the mean ``weight`` is the submodule ``weight_precision``; where weight and bias share one
    it is that of both. A layer counts the examples whose gradients its means hold, because an optimizer that
    turns gradients into curvature has to know it: the count starts afresh when gradients were set to None and
    adds up while they accumulate. A layer that is used several times between the same inputs and loss saw these
    examples once.

    Attributes:
        pairs: the weights and the bias that belongs to each, or None.
        examples: number of examples behind the present gradients (of each replica).
        positions: the same times the length of any further leading dimensions, such as tokens of a sequence.
        structure: of its precisions.
    """

    pairs: ClassVar[tuple[tuple[str, str | None], ...]] = (("weight", "bias"),)
    one_hot: ClassVar[bool] = False
    examples: int
    positions: int
    structure: Structure
    _observers: dict[str, Observer]
    _backward: int  # the backward pass that counted last
    _before: tuple[int, int]  # the counts before it

    def become_gaussian(self, precision: str | Structure, prior_mean: str, prior_variance: Number) -> None:
        """Give every mean a precision at its prior.

        Args:
            precision: a structure or the name of one.
            prior_mean: "zero" or "initial".
            prior_variance: in units of the layer's initialisation variance, 2 / fan_in (He et al. 2015).
        """
        self.structure = as_structure(precision)
        self._observers = {}
        for names in self._shared_names():
            means = [self.get_parameter(name).detach() for name in names]
            block = GaussianBlock(self, names, None)  # type: ignore[arg-type]
            self.add_module(
                f"{names[0]}_precision",
                self.structure.precision(
                    block.joint(means),
                    prior_mean=prior_mean,
                    prior_variance=prior_variance * self.initial_variance(names[0]),
                    stacked=self.stacked,
                    one_hot=self.one_hot,
                ),
            )
        for weight, bias in self.pairs:
            if weight in dict(self.means()):
                observer = self.structure.observer(
                    self.precision_of(weight), bias is not None and self._parameters.get(bias) is not None
                )
                if observer is not None:
                    self._observers[weight] = observer
        self._link()

    def become_deterministic(self) -> None:
        """Drop the precisions; the means stay."""
        for block in list(self.blocks()):
            delattr(self, f"{block.names[0]}_precision")
            for mean in block.means:
                _owners.pop(mean, None)
        for attribute in ("structure", "examples", "positions", "_observers", "_backward", "_before"):
            delattr(self, attribute)

    def means(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The Gaussian parameters by name."""
        for pair in self.pairs:
            for name in pair:
                parameter = None if name is None else self._parameters.get(name)
                if name is not None and parameter is not None:
                    yield name, parameter

    def blocks(self) -> Iterator[GaussianBlock]:
        """The means by the precision that they share."""
        for names in self._shared_names():
            yield GaussianBlock(self, names, self.precision_of(names[0]))

    def block_of(self, name: str) -> GaussianBlock:
        """The block to which the mean called ``name`` belongs."""
        return next(block for block in self.blocks() if name in block.names)

    def precision_of(self, name: str) -> Precision:
        """The precision of the mean called ``name``, alone or with the weight to which it belongs."""
        names = next(names for names in self._shared_names() if name in names)
        precision = self._modules[f"{names[0]}_precision"]
        assert isinstance(precision, Precision)
        return precision

    def _shared_names(self) -> list[tuple[str, ...]]:
        known = [name for name, _ in self.means()]
        if not self.structure.joint:
            return [(name,) for name in known]
        return [tuple(name for name in pair if name is not None and name in known) for pair in self.pairs]

    def as_matrix(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of a parameter's shape as a matrix (out, in); a bias as one column."""
        first = 1 + self.stacked
        return tensor.unsqueeze(-1) if tensor.dim() == first else tensor.flatten(first)

    def from_matrix(self, name: str, matrix: Tensor) -> Tensor:
        """The inverse of `as_matrix`."""
        return matrix.reshape(self.get_parameter(name).shape)

    @abstractmethod
    def initial_variance(self, name: str) -> float:
        """The variance with which a parameter is initialised: the unit of ``prior_variance``."""

    @property
    @abstractmethod
    def stacked(self) -> bool:
        """Whether the layer has a leading replica dimension."""

    @abstractmethod
    def rows(self, weight: str, inputs: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs (..., n, P, in) and output gradients (..., n, P, out) of a weight, for its observer."""

    def watch(
        self, output: Tensor, inputs: Tensor, examples: int, positions: int, weight: str = "weight"
    ) -> None:
        """Note, when the gradient of ``output`` arrives, how many examples it stands for, and observe it.

        Args:
            output: what a weight made of its inputs.
            inputs: its inputs.
            examples: the size of the batch.
            positions: the same times the length of further leading dimensions.
            weight: its name.
        """
        if not output.requires_grad or not torch.is_grad_enabled():
            return
        this = weakref.ref(self)
        observer = self._observers.get(weight)
        seen = inputs.detach() if observer is not None and observer.wanted else None

        def note(gradient: Tensor) -> None:
            layer = this()
            if layer is None:
                return
            backward = torch._C._current_graph_task_id()
            if backward != layer._backward:
                fresh = all(mean.grad is None for _, mean in layer.means())
                layer._before = (0, 0) if fresh else (layer.examples, layer.positions)
                layer.examples, layer.positions = layer._before
                layer._backward = backward
                if fresh:
                    layer._clear_observers()
            layer.examples = max(layer.examples, layer._before[0] + examples)
            layer.positions = max(layer.positions, layer._before[1] + positions)
            if seen is not None:
                layer._observers[weight].add(*layer.rows(weight, seen, gradient))

        output.register_hook(note)

    def observation_of(self, name: str) -> Observer | None:
        """The observer of the weight called ``name``, None where there is none."""
        return self._observers.get(name)

    def clear_examples(self) -> None:
        """Forget what was counted and observed, once the gradients have been used."""
        self.examples = self.positions = 0
        self._backward = -1
        self._before = (0, 0)
        self._clear_observers()

    def _clear_observers(self) -> None:
        for observer in self._observers.values():
            observer.clear()

    # The link from mean to precision: wherever a parameter object can change, it is made anew.
    def _link(self) -> None:
        self.clear_examples()
        for name, mean in self.means():
            if self._is_gaussian(name):
                _owners[mean] = (weakref.ref(self), name)

    def _is_gaussian(self, name: str) -> bool:
        if "structure" not in self.__dict__:
            return False
        return any(name in names and f"{names[0]}_precision" in self._modules for names in self._shared_names())

    def __setstate__(self, state: dict[str, Any]) -> None:  # unpickling and deepcopy
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._link()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter, and link it where it replaces a mean."""
        super().register_parameter(name, param)
        if param is not None and self._is_gaussian(name):
            _owners[param] = (weakref.ref(self), name)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._link()
        return result

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A deterministic checkpoint has means without precisions: these return to their prior.
        for names in self._shared_names():
            block = f"{prefix}{names[0]}_precision."
            if prefix + names[0] in state_dict and not any(key.startswith(block) for key in state_dict):
                precision = self.precision_of(names[0])
                precision.reset()
                state_dict.update({block + key: value for key, value in precision.state_dict().items()})
        super()._load_from_state_dict(state_dict, prefix, *args)
