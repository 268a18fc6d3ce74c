"""What layers with Gaussian parameters share: the mean keeps the usual name, the precision stands beside it."""

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from clagrange._checks import Number, check_choice
from clagrange._modes import under_torch_func
from clagrange.gaussian.curvature import Observer, VarianceObserver
from clagrange.gaussian.precision import Precision, Product
from clagrange.gaussian.sampling import MODES, WeightSampler, streams_for
from clagrange.gaussian.structures import Structure, as_structure
from clagrange.replicas import Generators

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
        parameters = self.layer._parameters  # get_parameter takes as long as small parameters do to step
        return tuple(parameters[name] for name in self.names)  # type: ignore[misc]  # None are no means

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

    def add(self, step: Tensor | Product, moving: Collection[str]) -> None:
        """Add a step of the joint mean to those of the parameters that move."""
        if isinstance(step, Product) and not self.layer.structure.joint:
            step = step.multiplied()
        if isinstance(step, Tensor):
            for name, mean, part in zip(self.names, self.means, self.split(step), strict=True):
                if name in moving:
                    mean.add_(part)
            return
        matrices = [
            self.layer.as_matrix(name, mean.detach()) for name, mean in zip(self.names, self.means, strict=True)
        ]
        rights = step.right.split([matrix.shape[-1] for matrix in matrices], -1)
        for name, mean, matrix, right in zip(self.names, self.means, matrices, rights, strict=True):
            if name not in moving:
                continue
            in_place = matrix.data_ptr() == mean.data_ptr() and matrix.is_contiguous()
            if in_place and matrix.dtype == right.dtype:
                many = (tensor.reshape(-1, *tensor.shape[-2:]) for tensor in (matrix, step.left.mT, right))
                torch.Tensor.baddbmm_(*many)
            else:
                mean.add_(self.layer.from_matrix(name, step.left.mT @ right))

    def joint_mean(self) -> Tensor:
        """The means as one tensor, without gradients."""
        return self.joint([mean.detach() for mean in self.means])

    def set_mean(self, joint: Tensor) -> None:
        """Copy a joint mean into the parameters; those that are frozen stay."""
        for mean, value in zip(self.means, self.split(joint), strict=True):
            if mean.requires_grad:
                mean.copy_(value)
        self.layer.settle()

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
    examples once, and these positions: whether another use is another place of a sequence it cannot know. Only
    recurrent cells take each use for further positions, the steps of an unrolled sequence. Give any other layer
    the places of a sequence together, (B, T, ...), where positions count.

    Attributes:
        pairs: the weights and the bias that belongs to each, or None.
        gathers: names of the attributes that a backward pass leaves for the optimizer, beside its observers'; see
            `clagrange.interventions.hooked.Hooked`.
        one_hot: whether inputs are one-hot.
        by_default: whether `gaussianize` makes such layers Gaussian without being asked for them by name or type.
        unrolled: whether each use in a backward pass is of other positions, the steps of a sequence.
        stackable: whether `clagrange.replicas.stack` may give its tensors a replica dimension.
        shared: names of the means that other layers use too; one of the layers has their precision.
        examples: number of examples behind the present gradients (of each replica).
        positions: the same times the length of any further leading dimensions, such as tokens of a sequence.
        structure: of its precisions.
    """

    pairs: ClassVar[tuple[tuple[str, str | None], ...]] = (("weight", "bias"),)
    gathers: ClassVar[tuple[str, ...]] = ("examples", "positions", "_backward", "_before")
    one_hot: ClassVar[bool] = False
    by_default: ClassVar[bool] = True
    unrolled: ClassVar[bool] = False
    stackable: ClassVar[bool] = False
    shared: frozenset[str]
    examples: int
    positions: int
    structure: Structure
    _block_names: tuple[tuple[str, ...], ...]  # the means by the precision that they share
    _observers: dict[str, Observer]
    _backward: int  # the backward pass that counted last
    _before: tuple[int, int]  # the counts before it
    _steps: dict[str, int]  # positions of each weight in it, of all uses of an unrolled layer

    def __init__(
        self,
        *args: Any,
        precision: str | Structure = "diagonal",
        prior_mean: str = "zero",
        prior_variance: Number = 1.0,
        **settings: Any,
    ) -> None:
        super().__init__(*args, **settings)
        self.become_gaussian(precision, prior_mean, prior_variance)

    def become_gaussian(
        self,
        precision: str | Structure,
        prior_mean: str,
        prior_variance: Number,
        *,
        shared: Collection[str] = (),
        tied: Collection[str] = (),
    ) -> None:
        """Give every mean a precision at its prior.

        Args:
            precision: a structure or the name of one.
            prior_mean: "zero" or "initial".
            prior_variance: in units of the layer's initialisation variance, 2 / fan_in (He et al. 2015).
            shared: names of the parameters that other layers use too.
            tied: those among them whose precision another layer has.
        """
        self.structure = self.admitted(as_structure(precision))
        self.shared = frozenset(shared)
        self._block_names = self._grouped(tied)
        self._observers = {}
        for names in self._block_names:
            means = [self.get_parameter(name).detach() for name in names]
            block = GaussianBlock(self, names, None)  # type: ignore[arg-type]
            center, prior = self.prior_center(names[0], block.joint(means), prior_mean)
            self.add_module(
                f"{names[0]}_precision",
                self.structure.precision(
                    center,
                    prior_mean=prior,
                    prior_variance=prior_variance * self.initial_variance(names[0]),
                    stacked=self.stacked,
                    one_hot=self.one_hot,
                ),
            )
        for block in self.blocks():
            observer = self.structure.observer(block.precision, len(block.names) > 1)
            if observer is not None:
                self._observers[block.names[0]] = observer
        self.set_sampling(self.structure.sampling, antithetic=self.structure.antithetic)
        self._link()

    def become_deterministic(self) -> None:
        """Drop the precisions; the means stay."""
        for block in list(self.blocks()):
            delattr(self, f"{block.names[0]}_precision")
            for mean in block.means:
                _owners.pop(mean, None)
        self._modules.pop("sampler", None)
        for attribute in (
            "structure",
            "examples",
            "positions",
            "shared",
            "_block_names",
            "_observers",
            "_backward",
            "_before",
            "_steps",
        ):
            delattr(self, attribute)

    def means(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The Gaussian parameters by name."""
        for names in self._block_names:
            for name in names:
                parameter = self._parameters.get(name)
                if parameter is not None:
                    yield name, parameter

    def blocks(self) -> Iterator[GaussianBlock]:
        """The means by the precision that they share."""
        for names in self._block_names:
            yield self.block_of(names[0])

    def block_of(self, name: str) -> GaussianBlock:
        """The block to which the mean called ``name`` belongs."""
        names = next(names for names in self._block_names if name in names)
        precision = self._modules[f"{names[0]}_precision"]
        assert isinstance(precision, Precision)
        return GaussianBlock(self, names, precision)

    def precision_of(self, name: str) -> Precision:
        """The precision of the mean called ``name``, alone or with the weight to which it belongs."""
        return self.block_of(name).precision

    def _grouped(self, tied: Collection[str]) -> tuple[tuple[str, ...], ...]:
        """The means by the precision that they are to share.

        A bias stands alone if it is not trained as its weight is, or belongs to several weights.
        """
        known = {name: p for name, p in self._parameters.items() if p is not None and name not in tied}
        pairs = [pair for pair in self.pairs if self._parameters.get(pair[0]) is not None]
        groups: dict[tuple[str, ...], None] = {}  # in order, each once
        for pair in pairs:
            names = tuple(name for name in pair if name in known)
            alike = len({known[name].requires_grad for name in names}) == 1
            if self.structure.joint and alike and sum(names[-1] in other for other in pairs) == 1:
                groups[names] = None
            else:
                groups |= {(name,): None for name in names}
        return tuple(groups)

    def admitted(self, structure: Structure) -> Structure:
        """The structure that the layer takes where this one is asked for."""
        return structure

    def prior_center(self, name: str, mean: Tensor, prior_mean: str) -> tuple[Tensor, str]:
        """A tensor of the mean's shape, and whether it ("initial") or 0 ("zero") is the mean of the prior."""
        return mean, prior_mean

    def settle(self) -> None:
        """Restore what always holds of the means, after they were set."""

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

    def set_sampling(self, mode: str, generator: Generators | None = None, *, antithetic: bool = False) -> None:
        """Choose what the layer is at in training; see `clagrange.gaussian.set_sampling`."""
        self.check_sampling(mode)
        self._modules.pop("sampler", None)
        if mode != "mean":
            replicas = next(self.means())[1].shape[0] if self.stacked else None
            self.sampler = WeightSampler(mode, streams_for(replicas, generator), antithetic)

    def check_sampling(self, mode: str) -> None:
        """Raise unless the layer can be at this in training."""
        check_choice("mode", mode, MODES)
        if mode != "mean" and self.shared:
            raise ValueError(
                f"mode: a {type(self).__name__} that shares its {' and '.join(sorted(self.shared))} with another "
                f"layer has no draws of its own, got {mode!r}; leave these layers out by layers=..."
            )
        if mode == "example" and self.structure.joint:
            raise ValueError(
                f"mode: a {type(self).__name__} with a Kronecker precision cannot be drawn for every example; "
                f"got 'example', use 'batch', or precision='diagonal' for this layer"
            )
        sampled = any(isinstance(observer, VarianceObserver) for observer in self._observers.values())
        if mode == "mean" and sampled:
            raise ValueError(
                f"mode: a {type(self).__name__} with curvature='sampled' reads its curvature off draws of its "
                f"weights, got 'mean'; use 'batch' or 'example'"
            )

    def transform(self, function: Callable[..., Tensor], inputs: Tensor, weight: str = "weight") -> Tensor:
        """A function of inputs, weight and bias at the means of these or, in training, at a draw.

        Drawn in training mode where gradients are on, if the layer has a sampler (`set_sampling`). The function
        has to be linear in the inputs, and in weight and bias.
        """
        pair = next(pair for pair in self.pairs if pair[0] == weight)
        sampler = self._modules.get("sampler") if self.training and torch.is_grad_enabled() else None
        if sampler is None:
            return function(inputs, *(None if name is None else getattr(self, name) for name in pair))
        assert isinstance(sampler, WeightSampler)
        return sampler.transform(self, function, inputs, pair)

    @abstractmethod
    def rows(self, name: str, inputs: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs x (..., n, P, in) and output gradients d (..., n, P, out) of a weight, for its observer.

        For a diagonal precision dᵀx has the entries of the weight in their order. Of a bias, d alone counts.
        """

    def watch(
        self,
        output: Tensor,
        inputs: Tensor,
        examples: int,
        positions: int,
        weight: str = "weight",
        units: slice | None = None,
    ) -> None:
        """Note, when the gradient of ``output`` arrives, how many examples it stands for, and observe it.

        Frozen parameters learn nothing, so that nothing is noted of them.

        Args:
            output: what a weight made of its inputs.
            inputs: its inputs.
            examples: the size of the batch.
            positions: the same times the length of further leading dimensions.
            weight: its name.
            units: which of the parameters' units the output is, where a parameter has more.
        """
        if not output.requires_grad or not torch.is_grad_enabled():
            return
        this = weakref.ref(self)
        pair = next(pair for pair in self.pairs if pair[0] == weight)
        used = (getattr(self, name) for name in pair if name is not None)
        if not any(parameter.requires_grad for parameter in used if parameter is not None):
            return
        names = [name for name in pair if name in self._observers and self._observers[name].wanted]
        transformed = under_torch_func()
        seen = inputs.detach() if names and not transformed else None

        def note(gradient: Tensor) -> None:
            layer = this()
            if layer is None:
                return
            backward = torch._C._current_graph_task_id()
            if backward != layer._backward:
                fresh = all(mean.grad is None for _, mean in layer.means())
                layer._before = (0, 0) if fresh else (layer.examples, layer.positions)
                layer.examples, layer.positions = layer._before
                layer._backward, layer._steps = backward, {}
                if fresh:
                    layer._clear_observers()
            layer.examples = max(layer.examples, layer._before[0] + examples)
            steps = positions + (layer._steps.get(weight, 0) if layer.unrolled else 0)
            layer._steps[weight] = steps
            layer.positions = max(layer.positions, layer._before[1] + steps)
            if seen is None:
                return
            with torch.autocast(gradient.device.type, enabled=False):
                for name in names:
                    x, d = layer.rows(name, seen, gradient)
                    if name != weight:
                        x = d.new_ones(()).expand(*d.shape[:-1], 1)  # a bias is a weight of them
                    layer._observers[name].add(x, layer._of_all_units(name, d, units))

        output.register_hook(note)

    def _of_all_units(self, name: str, d: Tensor, units: slice | None) -> Tensor:
        """The gradients of all units of a parameter, 0 for those that are not among ``units``."""
        width = len(self.get_parameter(name))
        if units is None or width == d.shape[-1]:
            return d
        widened = d.new_zeros(*d.shape[:-1], width)
        widened[..., units] = d
        return widened

    def observation_of(self, name: str) -> Observer | None:
        """The observer of the block whose first mean is called ``name``, None where there is none."""
        return self._observers.get(name)

    def observers(self) -> Iterator[Observer]:
        """What observes the curvature of the layer's parameters."""
        yield from self._observers.values()

    def clear_examples(self) -> None:
        """Forget what was counted and observed, once the gradients have been used."""
        self.examples = self.positions = 0
        self._backward = -1
        self._before = (0, 0)
        self._steps = {}
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
        if "_block_names" not in self.__dict__:
            return False
        return any(name in names and f"{names[0]}_precision" in self._modules for names in self._block_names)

    def __setstate__(self, state: dict[str, Any]) -> None:  # unpickling and deepcopy
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._link()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter, and link it where it replaces a mean."""
        super().register_parameter(name, param)
        if param is not None and self._is_gaussian(name):
            _owners[param] = (weakref.ref(self), name)

    def __delattr__(self, name: str) -> None:
        if self._is_gaussian(name):
            raise RuntimeError(
                f"a mean cannot be taken off a Gaussian layer, got {name!r} of a {type(self).__name__}; to "
                f"parametrize it make the layer deterministic first, by clagrange.collapse"
            )
        super().__delattr__(name)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._link()
        return result

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A deterministic checkpoint has means without precisions: these return to their prior.
        for names in self._block_names:
            block = f"{prefix}{names[0]}_precision."
            if prefix + names[0] in state_dict and not any(key.startswith(block) for key in state_dict):
                precision = self.precision_of(names[0])
                precision.reset()
                state_dict.update({block + key: value for key, value in precision.state_dict().items()})
        if "sampler" not in self._modules:
            state_dict.pop(f"{prefix}sampler._extra_state", None)  # of a network that sampled
        super()._load_from_state_dict(state_dict, prefix, *args)
