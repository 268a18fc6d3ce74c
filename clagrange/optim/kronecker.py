"""Kronecker factors of the Fisher matrix of linear layers, seen through hooks."""

import math
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from clagrange._modes import under_torch_func
from clagrange.distributed import mean_over_processes
from clagrange.gaussian.curvature import projection, proportion


class FisherObserver:
    """Collects Σxxᵀ and Σδδᵀ of a linear layer while gradients accumulate.

    For a layer y = Wx + b and a loss that is the mean over n examples, per-example output gradients δ and inputs
    x give the Fisher matrix of W, in row-major order of its entries (out, in), approximately as E[δδᵀ] ⊗ E[xxᵀ]
    (K-FAC). The output gradients that arrive are δ/n.

    It is called by a forward hook. Stacked layers, weight (R, out, in) and inputs (R, B, ..., in), give factors
    (R, ., .). Every leading position of an input counts as an example. Gradients that were set to None start the
    collection afresh; a layer used several times in one graph counts each use. Passes under torch.func are no
    training steps and are not seen.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget what was collected."""
        self.examples = 0
        self.inputs: Tensor | None = None
        self.outputs: Tensor | None = None
        self._probe: Tensor | None = None  # the gradients of weight and bias that they make, projected
        self._backward = -1

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """(B, A): means of δδᵀ, (…, out, out), and of xxᵀ, (…, in, in); None if no gradient has passed."""
        if self.inputs is None or self.outputs is None:
            return None
        return self.outputs * self.examples, self.inputs / self.examples

    def scale(self, gradient: Tensor, rounding: float) -> Tensor:
        """c² where a gradient is c times what was seen, () or (R,): unscaled from mixed precision, or clipped.

        Found as `clagrange.gaussian.curvature` does, by a projection of both.

        Args:
            gradient: of the weight, (…, out, in), or of the bias, (…, out).
            rounding: the relative error up to which c counts as 1.
        """
        assert self._probe is not None
        stacked = self._probe.dim() - 2
        bias = gradient.dim() == 1 + stacked
        probe = mean_over_processes(self._probe[..., int(bias)])
        c, _ = proportion(gradient if bias else projection(gradient), probe, bool(stacked))
        return torch.where((c.abs() - 1.0).abs() <= rounding, 1.0, c.square())

    def __call__(self, layer: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Collect, when the gradient of the output arrives."""
        if not output.requires_grad or under_torch_func():
            return
        (seen,) = inputs
        seen = seen.detach()

        def note(gradient: Tensor) -> None:
            backward = torch._C._current_graph_task_id()
            if backward != self._backward and all(parameter.grad is None for parameter in layer.parameters()):
                self.clear()
            self._backward = backward
            stacked = layer.weight.dim() - 2
            x, d = (_rows(tensor, stacked) for tensor in (seen, gradient))
            self.examples += x.shape[-2]
            self.inputs = _added(self.inputs, x.mT @ x)
            self.outputs = _added(self.outputs, d.mT @ d)
            made = d.mT @ projection(x)
            self._probe = _added(self._probe, torch.cat([made, d.sum(-2).unsqueeze(-1)], -1))

        output.register_hook(note)


class _Hook:
    """A forward hook that calls an observer for as long as an optimizer has it, and is copied along with it."""

    def __init__(self, observer: FisherObserver | None) -> None:
        self.observer = weakref.ref(observer or FisherObserver())  # one that is gone already

    def __call__(self, layer: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        observer = self.observer()
        if observer is not None:
            observer(layer, inputs, output)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, (self.observer(),)


def _rows(tensor: Tensor, stacked: int) -> Tensor:
    """(…, positions, width), at least in float32."""
    tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    return tensor.reshape(*tensor.shape[:stacked], -1, tensor.shape[-1])


def _added(total: Tensor | None, term: Tensor) -> Tensor:
    return term if total is None else total + term


def observe_layers(network: nn.Module) -> list[tuple[Tensor, FisherObserver]]:
    """Hook an observer on every linear layer; pairs of weight (and of bias) and observer.

    A layer that has one already shares it. The hooks hold their observers weakly and go when these do.

    Raises:
        ValueError: if there is no linear layer, or two share a weight.
    """
    layers = [layer for layer in network.modules() if isinstance(layer, nn.Linear)]
    if not layers:
        raise ValueError(
            f"params: expected a network with torch.nn.Linear layers for structure='kronecker', got "
            f"{type(network).__name__} without one"
        )
    if len({id(layer.weight) for layer in layers}) < len(layers):
        raise ValueError("params: expected linear layers with weights of their own, got two that share one")
    pairs: list[tuple[Tensor, FisherObserver]] = []
    for layer in layers:
        observer = None
        for number, hook in list(layer._forward_hooks.items()):
            if isinstance(hook, _Hook):
                observer = hook.observer()
                if observer is None:  # the hook was copied without its optimizer
                    del layer._forward_hooks[number]
        if observer is None:
            observer = FisherObserver()
            weakref.finalize(observer, layer.register_forward_hook(_Hook(observer)).remove)
        pairs += [(parameter, observer) for parameter in (layer.weight, layer.bias) if parameter is not None]
    return pairs


def raised_diagonal(factor: Tensor) -> Tensor:
    """A factor with 1e-6·(mean of its diagonal) added to the diagonal, so that it can be inverted.

    Of a large factor more, four roundings of its trace: computed eigenvalues may be that far off.
    """
    numbers, size = torch.finfo(factor.dtype), factor.shape[-1]
    diagonal: Tensor = factor.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    identity = torch.eye(size, dtype=factor.dtype, device=factor.device)
    result: Tensor = factor + (max(1e-6, 4 * size * numbers.eps) * diagonal + numbers.tiny**0.5) * identity
    return result


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (…, n) and eigenvectors of symmetric matrices; NaN for one that is not finite, and it alone."""
    finite = matrix.isfinite().flatten(-2).all(-1)[..., None]
    values, vectors = torch.linalg.eigh(torch.where(finite.unsqueeze(-1), matrix, torch.zeros_like(matrix)))
    return torch.where(finite, values, math.nan), vectors


def kronecker_solve(factors: tuple[Tensor, Tensor], gradient: Tensor, damping: Any, power: float = 1.0) -> Tensor:
    """((B ⊗ A)^power + damping)⁻¹ vec(g), exactly, in the joint eigenbasis of the factors.

    Args:
        factors: B (…, out, out) and A (…, in, in), symmetric and positive semi-definite.
        gradient: g (…, out, in), its entries in row-major order.
        damping: ≥ 0; a number or a tensor that broadcasts against ``gradient``.
        power: of the product.

    Example:
        >>> B, A, g = torch.eye(2) * 3.0, torch.eye(3), torch.ones(2, 3)
        >>> kronecker_solve((B, A), g, damping=1.0)[0]
        tensor([0.2500, 0.2500, 0.2500])
    """
    (b, V), (a, U) = (eigh(factor) for factor in factors)
    eigenvalues = (b.clamp(min=0).unsqueeze(-1) * a.clamp(min=0).unsqueeze(-2)) ** power
    solution: Tensor = V @ ((V.mT @ gradient @ U) / (eigenvalues + damping)) @ U.mT
    return solution
