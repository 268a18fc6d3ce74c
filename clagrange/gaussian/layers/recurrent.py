"""Recurrent cells with Gaussian weights."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.rnn import RNNCellBase

from clagrange.gaussian.layers.base import GaussianLayer


class _GaussianCell(GaussianLayer, RNNCellBase):
    """What cells share: gates are sums of an affine function of the inputs and one of the hidden state.

    Both are watched by themselves, each with its weight and bias as one pair. The steps of an unrolled sequence
    are taken as positions of the examples: each use of the cell in a backward pass has positions of its own.
    """

    unrolled = True
    pairs = (("weight_ih", "bias_ih"), ("weight_hh", "bias_hh"))

    @property
    def stacked(self) -> bool:
        """Always False: a cell has no stacked form."""
        return False

    def initial_variance(self, name: str) -> float:
        """2 / (input_size + hidden_size), the number of inputs of one gate."""
        return 2.0 / (self.input_size + self.hidden_size)

    def rows(self, name: str, inputs: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs or hidden states and gradients, one position for each example."""
        return inputs.unsqueeze(-2), gradient.unsqueeze(-2)

    def _gates(self, inputs: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """What all gates get from the inputs, and from the hidden state."""
        parts = []
        for weight, seen in (("weight_ih", inputs), ("weight_hh", hidden)):
            part = self.transform(F.linear, seen, weight)
            self.watch(part, seen, len(seen), len(seen), weight)
            parts.append(part)
        return parts[0], parts[1]

    def _batched(self, inputs: Tensor, *states: Tensor | None) -> tuple[Tensor, ...]:
        """Inputs and states (zeros for None) with a batch dimension, their numbers of dimensions checked."""
        for name, tensor in (("input", inputs), *(("hx", state) for state in states if state is not None)):
            if tensor.dim() not in (1, 2):
                raise ValueError(f"{name}: expected 1 or 2 dimensions, (batch, features), got {tensor.dim()}")
        batch = inputs.reshape(-1, inputs.shape[-1])
        zeros = batch.new_zeros(len(batch), self.hidden_size)
        return batch, *(zeros if state is None else state.reshape(-1, self.hidden_size) for state in states)


class GaussianRNNCell(_GaussianCell, nn.RNNCell):
    """A recurrent cell with Gaussian weights.

    Takes the arguments of `torch.nn.RNNCell`, and ``precision``, ``prior_mean`` and ``prior_variance`` as
    `GaussianLinear` does, in units of 2 / (input_size + hidden_size), the number of inputs of one gate.

    Shapes: inputs (B, input_size), states (B, hidden_size).

    Example:
        >>> GaussianRNNCell(3, 5)(torch.zeros(2, 3)).shape
        torch.Size([2, 5])
    """

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """The next state: tanh or ReLU of W_ih x + b_ih + W_hh h + b_hh."""
        inputs, hidden = self._batched(input, hx)
        from_inputs, from_hidden = self._gates(inputs, hidden)
        nonlinearity = {"tanh": torch.tanh, "relu": torch.relu}[self.nonlinearity]
        return nonlinearity(from_inputs + from_hidden).view(*input.shape[:-1], -1)


class GaussianLSTMCell(_GaussianCell, nn.LSTMCell):
    """A long short-term memory cell with Gaussian weights.

    Takes the arguments of `torch.nn.LSTMCell`, and ``precision``, ``prior_mean`` and ``prior_variance`` as
    `GaussianRNNCell` does.

    Shapes: inputs (B, input_size), both states (B, hidden_size).

    Example:
        >>> hidden, cell = GaussianLSTMCell(3, 5)(torch.zeros(2, 3))
        >>> hidden.shape
        torch.Size([2, 5])
    """

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """The next hidden and cell state: σ(o)·tanh(c'), c' = σ(f)·c + σ(i)·tanh(g)."""
        inputs, hidden, memory = self._batched(input, *((None, None) if hx is None else hx))
        from_inputs, from_hidden = self._gates(inputs, hidden)
        i, f, g, o = (from_hidden + from_inputs).chunk(4, 1)
        memory = f.sigmoid() * memory + i.sigmoid() * g.tanh()
        hidden = o.sigmoid() * memory.tanh()
        return hidden.view(*input.shape[:-1], -1), memory.view(*input.shape[:-1], -1)


class GaussianGRUCell(_GaussianCell, nn.GRUCell):
    """A gated recurrent unit with Gaussian weights.

    Takes the arguments of `torch.nn.GRUCell`, and ``precision``, ``prior_mean`` and ``prior_variance`` as
    `GaussianRNNCell` does.

    Shapes: inputs (B, input_size), states (B, hidden_size).

    Example:
        >>> GaussianGRUCell(3, 5)(torch.zeros(2, 3)).shape
        torch.Size([2, 5])
    """

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """The next state (1 − z)·n + z·h with reset and update gates r and z, n = tanh(W_in x + r·W_hn h)."""
        inputs, hidden = self._batched(input, hx)
        (r_x, z_x, n_x), (r_h, z_h, n_h) = (part.chunk(3, 1) for part in self._gates(inputs, hidden))
        n = (n_x + n_h * (r_h + r_x).sigmoid()).tanh()
        return ((hidden - n) * (z_h + z_x).sigmoid() + n).view(*input.shape[:-1], -1)
