"""Plain SGD of stacked perceptrons: without a graph, and with few passes over the weights."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from clagrange._checks import Number, per_replica
from clagrange.replicas import StackedFlatten, StackedLinear, sgd_step, stacked_product

KEPT = 16
"""Examples whose part in the weights is kept beside them, where a weight is wide."""

WIDE = 1 << 20
"""Numbers of a replica's weight that no longer fit a core's cache."""


class PerceptronSGD:
    """Forward pass and step of plain SGD for R perceptrons: stacked linear layers with ReLU between them.

    For W (R, out, in) and b (R, out) of a layer with inputs X (R, in, batch), outputs WX + b, and the gradient
    G (R, out, batch) of the outputs, the step is

        W ← W − lr·GXᵀ,   b ← b − lr·ΣG,

    to rounding what `torch.optim.SGD` makes of the gradients GXᵀ and ΣG, which are never in memory. Examples are
    the last dimension because products with a contiguous G are the faster ones. There is no graph, so that
    small networks do not wait for it.

    Wide weights at small batches are read in both passes, and would be read and written once more in each step.
    That can wait: with the G and X of some steps kept, the outputs are WX − lr·ΣG′(X′ᵀX) + b and the gradient of
    the inputs WᵀG − lr·ΣX′(G′ᵀG), and the weights are brought up to date for all of these steps at once. Weights
    that wait are right after `settle` alone.

    Args:
        layers: in order; their outputs go through ReLU, but for the last.
        rates: learning rate of each layer's weight, a number or (R,).
        waits: whether wide weights on a CPU may be kept waiting.

    Example:
        >>> layer = StackedLinear(3, 2)
        >>> layer.weight, layer.bias = nn.Parameter(torch.zeros(1, 2, 3)), nn.Parameter(torch.zeros(1, 2))
        >>> sgd = PerceptronSGD([layer], {layer.weight: 0.1})
        >>> outputs = sgd.outputs(torch.ones(1, 4, 3))
        >>> sgd.step(torch.full_like(outputs, 0.25))
        >>> layer.bias
        Parameter containing:
        tensor([[-0.1000, -0.1000]], requires_grad=True)
    """

    def __init__(
        self, layers: Sequence[nn.Linear], rates: Mapping[Tensor, Number], *, waits: bool = False
    ) -> None:
        self._layers = [_Layer(layer.weight, layer.bias, rates[layer.weight]) for layer in layers]
        self._waits = waits

    @torch.no_grad()
    def outputs(self, inputs: Tensor) -> Tensor:
        """What the perceptrons answer to inputs (R, batch, ...): (R, batch, out), without a graph."""
        self._values = [inputs.flatten(2).mT]
        last = len(self._layers) - 1
        for index, layer in enumerate(self._layers):
            values = layer.outputs(self._values[-1])
            self._values.append(values if index == last else values.relu_())
        return self._values.pop().mT

    @torch.no_grad()
    def step(self, gradient: Tensor) -> None:
        """Take the step for the last inputs, from the gradient of the outputs, (R, batch, out)."""
        of_outputs = gradient.mT.contiguous()
        for index in range(len(self._layers) - 1, -1, -1):
            layer, values = self._layers[index], self._values[index]
            before = layer.gradient_of_inputs(of_outputs) if index else None
            layer.step(values, of_outputs, self._waits)
            if before is not None:
                of_outputs = torch.ops.aten.threshold_backward(before, values, 0.0)

    @torch.no_grad()
    def forget(self, replicas: Tensor) -> None:
        """Leave out what the weights of some replicas, a mask (R,), wait for."""
        for layer in self._layers:
            layer.forget(replicas)

    @torch.no_grad()
    def settle(self) -> None:
        """Bring weights that were kept waiting up to date."""
        for layer in self._layers:
            layer.settle()


def perceptron(network: nn.Module) -> Sequence[nn.Linear] | None:
    """The layers of a stacked perceptron; None if the network is anything else, or has hooks.

    Example:
        >>> from clagrange import replicas
        >>> perceptron(replicas.stack([nn.Sequential(nn.Flatten(), nn.Linear(3, 2))]))
        [StackedLinear(in_features=3, out_features=2, bias=True)]
    """
    if type(network) is not nn.Sequential or any(map(hooks_of, network.modules())):
        return None
    layers = list(network)
    if layers and type(layers[0]) is StackedFlatten and layers[0].start_dim == 1 and layers[0].end_dim == -1:
        del layers[0]
    linear = [layer for layer in layers[::2] if type(layer) is StackedLinear]
    between = layers[1::2]
    if len(linear) != len(between) + 1 or any(type(layer) is not nn.ReLU for layer in between):
        return None
    return linear if len({layer.weight for layer in linear}) == len(linear) else None


def hooks_of(module: nn.Module) -> int:
    """The number of hooks of a module, of its forward and its backward pass."""
    kinds = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return sum(map(len, kinds))


class _Waiting(NamedTuple):
    """What steps that wait are made of: −lr·G (R, examples, out) and X (R, examples, in)."""

    moves: Tensor
    inputs: Tensor


class _Layer:
    """A linear layer and the steps that its weight waits for."""

    def __init__(self, weight: Tensor, bias: Tensor | None, lr: Number) -> None:
        self.weight = weight
        self.bias = bias
        self.lr = lr
        self._memory: _Waiting | None = None
        self._examples = 0

    def outputs(self, inputs: Tensor) -> Tensor:
        values = _product(self.weight, inputs, self.bias)
        if self._examples:
            waiting = self._waiting()
            values += _product(waiting.moves.mT, _product(waiting.inputs, inputs))
        return values

    def gradient_of_inputs(self, gradient: Tensor) -> Tensor:
        of_inputs = _product(self.weight.mT, gradient)
        if self._examples:
            waiting = self._waiting()
            of_inputs += _product(waiting.inputs.mT, _product(waiting.moves, gradient))
        return of_inputs

    def step(self, inputs: Tensor, gradient: Tensor, waits: bool) -> None:
        """That of `clagrange.replicas.stepping_in_backward`, with examples last; or keep it waiting."""
        wide = self.weight[0].numel() >= WIDE and self.weight.device.type == "cpu"
        if waits and wide and 2 * inputs.shape[-1] <= KEPT:
            moves = (gradient * per_replica(self.lr, gradient)).to(gradient.dtype).neg_()
            self._keep(moves, inputs)
            if self.bias is not None:
                self.bias += moves.sum(-1)
        else:
            self.settle()
            sgd_step(self.weight, self.bias, inputs.mT, gradient.mT, self.lr)

    def settle(self) -> None:
        if self._examples:
            waiting = self._waiting()
            self.weight.baddbmm_(waiting.moves.mT, waiting.inputs)
            self._examples = 0

    def forget(self, replicas: Tensor) -> None:
        if self._examples:
            for part in self._waiting():
                part[replicas] = 0.0

    def _keep(self, moves: Tensor, inputs: Tensor) -> None:
        if self._memory is None:
            replicas, out, width = self.weight.shape
            self._memory = _Waiting(moves.new_empty(replicas, KEPT, out), moves.new_empty(replicas, KEPT, width))
        if self._examples + inputs.shape[-1] > KEPT:
            self.settle()
        first, self._examples = self._examples, self._examples + inputs.shape[-1]
        self._memory.moves[:, first : self._examples] = moves.mT
        self._memory.inputs[:, first : self._examples] = inputs.mT

    def _waiting(self) -> _Waiting:
        assert self._memory is not None
        return _Waiting(*(part[:, : self._examples] for part in self._memory))


def _product(matrices: Tensor, values: Tensor, bias: Tensor | None = None) -> Tensor:
    """Matrices (R, m, k) times values (R, k, batch), plus bias (R, m); a single column is faster as a row."""
    if values.shape[-1] == 1:
        return stacked_product(values.mT, matrices, bias).mT
    return torch.bmm(matrices, values) if bias is None else torch.baddbmm(bias.unsqueeze(-1), matrices, values)
