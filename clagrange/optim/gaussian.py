"""What optimizers of Gaussian weights share: the loop over blocks, and what a step knows of each."""

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from clagrange._checks import check_choice, check_count, check_fraction, check_positive, check_replicas
from clagrange.distributed import process_count, total_over_processes
from clagrange.gaussian import DiagonalPrecision, GaussianBlock, GaussianLayer, Precision, owner_of
from clagrange.gaussian.curvature import VarianceObserver
from clagrange.gaussian.kronecker import Factors, LowRank
from clagrange.optim.base import CheckedOptimizer
from clagrange.optim.stacked import adam_step

_NO_GAUSSIAN = (
    "params: expected at least one Gaussian parameter, got none; call clagrange.gaussianize(net) first, and "
    "copy or unpickle an optimizer together with its network"
)


class Block(NamedTuple):
    """Gaussian parameters that share a precision, in a step.

    Attributes:
        gaussian: the parameters and their precision, both changed in place.
        moving: names of the parameters that the optimizer has and that have a gradient.
        gradient: of the mean loss per example, of the shape of the joint mean.
        curvature: what an observer saw; None leaves the squared gradient.
        examples: behind the gradient.
        state: of the optimizer; holds the velocity where the motion term is on.
    """

    gaussian: GaussianBlock
    moving: tuple[str, ...]
    gradient: Tensor
    curvature: Any
    examples: int
    state: dict[str, Any]

    @property
    def precision(self) -> Precision:
        """The precision of the block."""
        return self.gaussian.precision


class GaussianOptimizer(CheckedOptimizer):
    """Steps Gaussian parameters block by block, and all others by Adam.

    The state of a Gaussian parameter lives in its layer, so that it survives a new optimizer. Groups have, beside
    what a subclass adds, the settings ``deterministic_lr``, ``loss_reduction`` and ``maximize``.

    Args:
        params: the network; or parameters, named parameters or parameter groups of it.
        defaults: the settings.
    """

    def __init__(self, params: nn.Module | Iterable[Any], defaults: dict[str, Any]) -> None:
        super().__init__(params.named_parameters() if isinstance(params, nn.Module) else params, defaults)
        if not any(owner_of(p) is not None for group in self.param_groups for p in group["params"]):
            raise ValueError(_NO_GAUSSIAN)

    def _step(self) -> None:
        used: dict[int, GaussianLayer] = {}
        found = False
        for group in self.param_groups:
            moving: dict[Precision, tuple[GaussianBlock, tuple[str, ...]]] = {}
            for parameter in group["params"]:
                owner = owner_of(parameter)
                found = found or owner is not None
                if parameter.grad is None:
                    continue
                if owner is None:
                    gradient = -parameter.grad if group["maximize"] else parameter.grad
                    adam_step(
                        parameter,
                        gradient,
                        self.state[parameter],
                        lr=group["deterministic_lr"],
                        betas=(0.9, 0.999),
                        eps=1e-8,
                    )
                    continue
                layer, name = owner
                used[id(layer)] = layer
                gaussian = layer.block_of(name)
                _, names = moving.get(gaussian.precision, (gaussian, ()))
                moving[gaussian.precision] = (gaussian, (*names, name))
            if moving:
                counts = [_examples(gaussian, group) for gaussian, _ in moving.values()]
                device = next(iter(moving.values()))[0].means[0].device
                totals = total_over_processes(counts, device)
                blocks = [
                    self._block(gaussian, names, group, own, total)
                    for (gaussian, names), own, total in zip(moving.values(), counts, totals, strict=True)
                ]
                self._step_blocks(blocks, group)
        if not found:
            raise RuntimeError(_NO_GAUSSIAN)
        for layer in used.values():
            layer.clear_examples()

    def _block(
        self, gaussian: GaussianBlock, moving: tuple[str, ...], group: dict[str, Any], own: int, total: int
    ) -> Block:
        """What a step needs of a block, in units of the mean loss per example.

        Gradients are the mean over processes: of the means over their own examples, or of sums.
        """
        layer, names, _ = gaussian
        means = gaussian.means
        summed = total / process_count() if group["loss_reduction"] == "sum" else None
        gradients = [
            torch.zeros_like(mean) if mean.grad is None or name not in moving else mean.grad
            for name, mean in zip(names, means, strict=True)
        ]
        gradient = gaussian.joint(gradients)
        gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        if summed is not None:
            gradient = gradient / summed
        observer = layer.observation_of(names[0])
        curvature = None if observer is None else observer.curvature(gradient, own, summed)
        if isinstance(curvature, Factors | LowRank):
            curvature = curvature._replace(examples=total)
        if group["maximize"]:
            gradient = -gradient
            if isinstance(curvature, LowRank) and curvature.share is not None:
                curvature = curvature._replace(share=-curvature.share)
            elif isinstance(observer, VarianceObserver) and isinstance(curvature, Tensor):
                curvature = -curvature
        state = self.state[means[0]] if group.get("motion") else {}
        return Block(gaussian, moving, gradient, curvature, total, state)

    def _check(self, group: dict[str, Any]) -> None:
        _check_shared_settings(group)
        _check_shared_precisions(self.param_groups)

    @abstractmethod
    def _step_blocks(self, blocks: list[Block], group: dict[str, Any]) -> None:
        """Step blocks with the settings of their group."""


def _examples(gaussian: GaussianBlock, group: dict[str, Any]) -> int:
    """The number of examples behind the gradient of a block."""
    layer, names, _ = gaussian
    examples = layer.positions if group["loss_reduction"] == "position_mean" else layer.examples
    if examples == 0:
        shape = tuple(layer.get_parameter(names[0]).shape)
        raise RuntimeError(
            f"parameter {names[0]!r} of a {type(layer).__name__} of shape {shape} has a gradient, but the "
            f"layer saw no example since the last step; run forward and backward through the layer, or set "
            f"layer.examples"
        )
    return examples


def _check_shared_settings(group: dict[str, Any]) -> None:
    check_fraction("deterministic_lr", group["deterministic_lr"])
    check_choice("loss_reduction", group["loss_reduction"], ("mean", "sum", "position_mean"))
    settings = dict(group)
    for value in group.values():
        if isinstance(value, dict):  # the numbers of a belief
            settings.update(value)
    for parameter in group["params"]:
        owner = owner_of(parameter)
        if owner is not None:
            for name, value in settings.items():
                check_replicas(name, value, parameter.shape[0] if owner[0].stacked else None)


def _check_shared_precisions(groups: list[dict[str, Any]]) -> None:
    places: dict[Precision, int] = {}
    for number, group in enumerate(groups):
        for parameter in group["params"]:
            owner = owner_of(parameter)
            if owner is None:
                continue
            block = owner[0].block_of(owner[1])
            if places.setdefault(block.precision, number) != number:
                raise ValueError(
                    f"params: expected parameters that share a precision in one group, got "
                    f"{' and '.join(block.names)} of a {type(block.layer).__name__} in two; put them into one, "
                    f"or make the layer Gaussian with precision='diagonal'"
                )


class DrawingOptimizer(GaussianOptimizer):
    """Steps diagonal precisions by what draws of the weights say of the curvature.

    Groups have, beside what a subclass adds, the settings ``lr`` and ``samples``.
    """

    def _check(self, group: dict[str, Any]) -> None:
        check_positive("lr", group["lr"])
        check_count("samples", group["samples"])
        _require_draws(group)
        super()._check(group)

    def _step_blocks(self, blocks: list[Block], group: dict[str, Any]) -> None:
        for block in blocks:
            assert isinstance(block.precision, DiagonalPrecision)
            self._step_drawn(
                block, block.precision, _drawn_curvature(block), block.examples / group["samples"], group
            )

    @abstractmethod
    def _step_drawn(
        self,
        block: Block,
        precision: DiagonalPrecision,
        curvature: Tensor,
        examples: float,
        group: dict[str, Any],
    ) -> None:
        """Step one block.

        Args:
            block: with the gradient of the mean loss per example.
            precision: of the block.
            curvature: Ĥ = E[gε]/σ of the mean loss per example.
            examples: behind each sample of the weights.
            group: the settings.
        """


def _require_draws(group: dict[str, Any]) -> None:
    """Raise unless the Gaussian layers of a group draw their weights and observe the curvature by that."""
    for parameter in group["params"]:
        owner = owner_of(parameter)
        if owner is None:
            continue
        layer, name = owner
        if not isinstance(layer.observation_of(layer.block_of(name).names[0]), VarianceObserver):
            raise ValueError(
                f"params: expected Gaussian layers that draw their weights, got a {type(layer).__name__} with "
                f"precision {layer.structure!r}; call clagrange.gaussianize(net, precision="
                f"clagrange.gaussian.Diagonal('sampled', sampling='batch'))"
            )


def _drawn_curvature(block: Block) -> Tensor:
    """Ĥ = E[gε]/σ of a block.

    Raises:
        RuntimeError: if the gradient is not that of a draw.
    """
    if block.curvature is None:
        raise RuntimeError(
            f"the gradient of {block.gaussian.names[0]!r} of a {type(block.gaussian.layer).__name__} is not that "
            f"of drawn weights; compute it in training mode"
        )
    curvature: Tensor = block.curvature
    return curvature
