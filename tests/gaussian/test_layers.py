"""Every Gaussian layer: the same function and gradients as torch's, what it saw, its factors, its state."""

import copy
import io
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import assert_same_tensors
from torch import Tensor, nn

import clagrange
from clagrange import collapse, gaussianize, replicas, variances
from clagrange.gaussian import Diagonal, GaussianLayer, gaussian_blocks, gaussian_layers, set_sampling
from clagrange.gaussian.forms import GAUSSIAN_FORMS
from clagrange.gaussian.kronecker import LowRank
from clagrange.gaussian.structures import Structure
from clagrange.optim import EulerLagrange

N = 4
"""Examples of a batch."""

Call = Callable[[nn.Module, Tensor], Tensor]


def plain(layer: nn.Module, inputs: Tensor) -> Tensor:
    return layer(inputs)


def floats(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens(*shape: int) -> Tensor:
    return torch.randint(7, shape, generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class LayerCase:
    """A layer, a batch for it, and what it must have seen of the batch."""

    make: Callable[[], nn.Module]
    inputs: Tensor
    call: Call = plain
    positions: int = N
    examples: int = N
    asked: dict[Any, Any] = field(default_factory=dict)
    """The entries of ``layers`` that make it Gaussian, beyond the default."""
    exact: bool = True
    """Whether outputs agree bit for bit."""

    def layer(self) -> nn.Module:
        """The layer with parameters that are neither 0 nor 1."""
        torch.manual_seed(0)
        layer = self.make().double()
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter += 0.3 * torch.randn_like(parameter)
        if isinstance(layer, nn.Embedding):
            layer._fill_padding_idx_with_zero()
        return layer

    def gaussian(self, precision: str | Structure = "diagonal", **settings: Any) -> nn.Module:
        """The layer made Gaussian."""
        return gaussianize(self.layer(), precision, layers=self.asked, **settings)


def attend(**settings: Any) -> Call:
    """Self-attention."""
    return lambda layer, x: layer(x, x, x, **settings)[0]


def attend_to(memory: Tensor, value: Tensor | None = None, **settings: Any) -> Call:
    """Cross-attention to another sequence, or to its keys with other values."""
    return lambda layer, x: layer(x, memory, memory if value is None else value, **settings)[0]


def attention_weights(layer: nn.Module, x: Tensor) -> Tensor:
    """The weights of every head beside the output."""
    output, weights = layer(x, x, x, average_attn_weights=False)
    return torch.cat([output.flatten(1), weights.flatten(1)], 1)


def hidden_and_cell(layer: nn.Module, x: Tensor) -> Tensor:
    """Both states of an LSTM cell after two steps."""
    state = layer(x)
    return torch.cat(layer(0.5 * x, state), 1)


def two_steps(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(0.5 * x, layer(x))


CAUSAL = torch.ones(5, 5, dtype=torch.bool).triu(1)
PADDED = torch.tensor([[False] * 5, [False] * 3 + [True] * 2] * 2)
HEADS = floats(N * 2, 5, 5, seed=3)


def attention(**settings: Any) -> Callable[[], nn.Module]:
    return lambda: nn.MultiheadAttention(6, 2, **{"batch_first": True, **settings})


CONVOLUTIONS = {
    "conv 1d": LayerCase(lambda: nn.Conv1d(2, 3, 3, padding=1), floats(N, 2, 6)),
    "conv 1d, stride, dilation, groups": LayerCase(
        lambda: nn.Conv1d(4, 6, 2, stride=2, dilation=2, groups=2), floats(N, 4, 9)
    ),
    "conv 1d, circular": LayerCase(
        lambda: nn.Conv1d(2, 3, 3, padding=2, padding_mode="circular"), floats(N, 2, 6)
    ),
    "conv 2d": LayerCase(lambda: nn.Conv2d(2, 3, (3, 2), padding=(1, 2)), floats(N, 2, 4, 5)),
    "conv 2d, no bias, stride, groups": LayerCase(
        lambda: nn.Conv2d(4, 2, 2, stride=(1, 2), groups=2, bias=False), floats(N, 4, 4, 5)
    ),
    "conv 2d, same, dilation": LayerCase(
        lambda: nn.Conv2d(2, 3, 2, padding="same", dilation=2, padding_mode="reflect"), floats(N, 2, 5, 5)
    ),
    "conv 2d, valid, depthwise": LayerCase(
        lambda: nn.Conv2d(3, 3, 2, padding="valid", groups=3), floats(N, 3, 4, 4)
    ),
    "conv 3d": LayerCase(
        lambda: nn.Conv3d(2, 4, (1, 2, 3), stride=(1, 2, 1), padding=(0, 1, 1), groups=2), floats(N, 2, 2, 3, 4)
    ),
    "conv 3d, replicate": LayerCase(
        lambda: nn.Conv3d(1, 2, 2, padding=1, padding_mode="replicate"), floats(N, 1, 2, 3, 2)
    ),
}

TRANSPOSED = {
    "transposed 1d": LayerCase(lambda: nn.ConvTranspose1d(2, 3, 3, stride=2, padding=1), floats(N, 2, 4)),
    "transposed 1d, output padding": LayerCase(
        lambda: nn.ConvTranspose1d(2, 3, 2, stride=3, output_padding=2, dilation=2), floats(N, 2, 3)
    ),
    "transposed 1d, output size": LayerCase(
        lambda: nn.ConvTranspose1d(2, 3, 3, stride=3),
        floats(N, 2, 3),
        lambda layer, x: layer(x, output_size=[10]),
    ),
    "transposed 2d": LayerCase(
        lambda: nn.ConvTranspose2d(4, 6, (2, 3), stride=(2, 1), padding=(1, 2), groups=2), floats(N, 4, 3, 4)
    ),
    "transposed 2d, no bias": LayerCase(lambda: nn.ConvTranspose2d(2, 3, 2, bias=False), floats(N, 2, 2, 3)),
    "transposed 3d": LayerCase(
        lambda: nn.ConvTranspose3d(2, 2, (1, 2, 2), stride=2, padding=(0, 1, 0), dilation=(1, 2, 1)),
        floats(N, 2, 2, 2, 2),
    ),
}

LINEAR = {
    "linear": LayerCase(lambda: nn.Linear(5, 3), floats(N, 5)),
    "linear of tokens": LayerCase(lambda: nn.Linear(5, 3, bias=False), floats(N, 6, 5), positions=6 * N),
}

EMBEDDINGS = {
    "embedding": LayerCase(lambda: nn.Embedding(7, 3), tokens(N)),
    "embedding of tokens": LayerCase(lambda: nn.Embedding(9, 3), tokens(N, 2, 3), positions=6 * N),
    "embedding with padding": LayerCase(lambda: nn.Embedding(7, 3, padding_idx=2), tokens(N, 5), positions=5 * N),
}

ATTENTION = {
    "self-attention": LayerCase(attention(), floats(N, 5, 6), attend(), positions=5 * N, exact=False),
    "attention without weights": LayerCase(
        attention(bias=False), floats(N, 5, 6), attend(need_weights=False), positions=5 * N, exact=False
    ),
    "attention to a memory": LayerCase(
        attention(), floats(N, 5, 6), attend_to(floats(N, 3, 6, seed=1)), positions=5 * N, exact=False
    ),
    "attention of three": LayerCase(
        attention(),
        floats(N, 5, 6),
        attend_to(floats(N, 3, 6, seed=1), floats(N, 3, 6, seed=2)),
        positions=5 * N,
        exact=False,
    ),
    "attention of three widths": LayerCase(
        attention(kdim=4, vdim=3, batch_first=False),
        floats(5, N, 6),
        attend_to(floats(3, N, 4, seed=1), floats(3, N, 3, seed=2)),
        positions=5 * N,
        exact=False,
    ),
}

MASKED_ATTENTION = {
    "causal": LayerCase(
        attention(batch_first=False),
        floats(5, N, 6),
        attend(attn_mask=CAUSAL, is_causal=True, need_weights=False),
        positions=5 * N,
        exact=False,
    ),
    "causal and padded": LayerCase(
        attention(),
        floats(N, 5, 6),
        attend(attn_mask=CAUSAL, is_causal=True, key_padding_mask=PADDED, need_weights=False),
        positions=5 * N,
        exact=False,
    ),
    "causal with weights": LayerCase(
        attention(), floats(N, 5, 6), attend(attn_mask=CAUSAL, is_causal=True), positions=5 * N, exact=False
    ),
    "padded": LayerCase(
        attention(), floats(N, 5, 6), attend(key_padding_mask=PADDED), positions=5 * N, exact=False
    ),
    "a mask for every head": LayerCase(
        attention(),
        floats(N, 5, 6),
        attend(attn_mask=HEADS, key_padding_mask=PADDED.double()),
        positions=5 * N,
        exact=False,
    ),
    "weights of the heads": LayerCase(
        attention(), floats(N, 5, 6), attention_weights, positions=5 * N, exact=False
    ),
    "added key and value, zero attention": LayerCase(
        attention(add_bias_kv=True, add_zero_attn=True),
        floats(N, 5, 6),
        attend(attn_mask=CAUSAL, key_padding_mask=PADDED),
        positions=5 * N,
        exact=False,
    ),
    "one sequence": LayerCase(
        attention(),
        floats(5, 6),
        attend(key_padding_mask=PADDED[1], attn_mask=CAUSAL),
        positions=5,
        examples=1,
        exact=False,
    ),
}

CELLS = {
    "RNN cell": LayerCase(lambda: nn.RNNCell(3, 4), floats(N, 3), two_steps, 2 * N, exact=False),
    "RNN cell with ReLU": LayerCase(
        lambda: nn.RNNCell(3, 4, bias=False, nonlinearity="relu"), floats(N, 3), two_steps, 2 * N, exact=False
    ),
    "LSTM cell": LayerCase(lambda: nn.LSTMCell(3, 4), floats(N, 3), hidden_and_cell, 2 * N, exact=False),
    "GRU cell": LayerCase(lambda: nn.GRUCell(3, 4), floats(N, 3), two_steps, 2 * N, exact=False),
    "GRU cell, one example": LayerCase(
        lambda: nn.GRUCell(3, 4, bias=False), floats(3), two_steps, positions=2, examples=1, exact=False
    ),
}

NORMS = {
    "layer norm": LayerCase(
        lambda: nn.LayerNorm((2, 3)), floats(N, 5, 2, 3), positions=5 * N, asked={nn.LayerNorm: {}}
    ),
    "layer norm without bias": LayerCase(
        lambda: nn.LayerNorm(3, bias=False, eps=0.1), floats(N, 3), asked={nn.LayerNorm: {}}
    ),
    "RMS norm": LayerCase(lambda: nn.RMSNorm(3), floats(N, 2, 3), positions=2 * N, asked={nn.RMSNorm: {}}),
    "group norm": LayerCase(lambda: nn.GroupNorm(2, 4), floats(N, 4, 3), asked={nn.GroupNorm: {}}),
    "batch norm 1d": LayerCase(lambda: nn.BatchNorm1d(3), floats(N, 3), asked={nn.BatchNorm1d: {}}),
    "batch norm 1d of sequences": LayerCase(
        lambda: nn.BatchNorm1d(3, momentum=None), floats(N, 3, 5), asked={nn.BatchNorm1d: {}}
    ),
    "batch norm 2d": LayerCase(
        lambda: nn.BatchNorm2d(3, track_running_stats=False), floats(N, 3, 4, 4), asked={nn.BatchNorm2d: {}}
    ),
    "batch norm 3d": LayerCase(lambda: nn.BatchNorm3d(2), floats(N, 2, 2, 3, 2), asked={nn.BatchNorm3d: {}}),
}

WEIGHTED = {**LINEAR, **CONVOLUTIONS, **TRANSPOSED, **EMBEDDINGS, **ATTENTION, **MASKED_ATTENTION, **CELLS}
LAYERS = {**WEIGHTED, **NORMS}

every_layer = pytest.mark.parametrize("case", LAYERS.values(), ids=LAYERS)


def loss_of(output: Tensor) -> Tensor:
    """A mean over examples of something whose gradient differs everywhere."""
    examples = output.shape[0] if output.dim() > 1 else 1
    phase = torch.arange(output.numel(), dtype=output.dtype).view(output.shape)
    return (output * phase.cos() + 0.5 * output.square() * phase.sin()).sum() / examples


def gradients(layer: nn.Module, case: LayerCase) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
    """Outputs, gradients of all parameters and of the inputs."""
    inputs = case.inputs.clone()
    inputs.requires_grad_(inputs.is_floating_point())
    layer.zero_grad()
    output = case.call(layer, inputs)
    loss_of(output).backward()
    return output.detach(), {name: p.grad for name, p in layer.named_parameters()}, inputs.grad


def test_every_form_is_tested() -> None:
    stacked = set(replicas.STACKED_FORMS.values())
    tested = {type(module) for case in LAYERS.values() for module in case.layer().modules()}
    assert tested == set(GAUSSIAN_FORMS) - stacked


# ------------------------------------------------------------------------------------------- the function
@every_layer
@pytest.mark.parametrize("training", [True, False])
def test_outputs_and_gradients_are_those_of_torch(case: LayerCase, training: bool) -> None:
    theirs, ours = case.layer().train(training), case.gaussian("kronecker").train(training)
    assert all(isinstance(layer, GaussianLayer) for layer in ours.modules() if layer._parameters)
    tolerance = {"rtol": 0, "atol": 0} if case.exact else {"rtol": 1e-12, "atol": 1e-12}
    for _ in range(2):  # twice: batch norms keep statistics
        expected, actual = gradients(theirs, case), gradients(ours, case)
        torch.testing.assert_close(actual[0], expected[0], **tolerance)
        torch.testing.assert_close(actual[1:], expected[1:], rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        actual, expected = case.call(ours, case.inputs), case.call(theirs, case.inputs)
    torch.testing.assert_close(actual, expected, **tolerance)
    statistics = {name: buffer for name, buffer in ours.named_buffers() if "_precision" not in name}
    assert_same_tensors(statistics, dict(theirs.named_buffers()))


@pytest.mark.parametrize("need_weights", [True, False])
def test_attention_drops_out_what_torch_does(need_weights: bool) -> None:
    theirs = nn.MultiheadAttention(6, 2, dropout=0.5, batch_first=True).double()
    ours, x = gaussianize(theirs, copied=True), floats(N, 5, 6)
    outputs = []
    for layer in (theirs, ours):
        torch.manual_seed(0)
        outputs.append(layer(x, x, x, need_weights=need_weights))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-12, atol=1e-12)


@every_layer
def test_examples_and_positions(case: LayerCase) -> None:
    layer = case.gaussian("kronecker")
    for passes in (1, 2):
        loss_of(case.call(layer, case.inputs)).backward()
        expected = {(passes * case.examples, passes * case.positions)}
        assert {(part.examples, part.positions) for _, part in gaussian_layers(layer)} == expected


# -------------------------------------------------------------------------------------------- the factors
Rows = list[tuple[Tensor, Tensor]]
"""Inputs x, the 1 for the bias included, and output gradients of single positions of a mean over examples."""


def rows_by_jacobian(layer: nn.Module, case: LayerCase) -> list[Rows]:
    """The rows of a layer that is linear in its weights, for each group: ∂y/∂W holds x and nothing else."""
    output = case.call(layer, case.inputs)
    output.retain_grad()
    loss_of(output).backward()
    last = isinstance(layer, (nn.Linear, nn.Embedding))
    groups = getattr(layer, "groups", 1)
    rows: list[Rows] = [[] for _ in range(groups)]
    for example in range(N):

        def of_weight(weight: Tensor, example: int = example) -> Tensor:
            parameters = {**dict(layer.named_parameters()), "weight": weight}
            single = LayerCall(layer, case.call)
            named = {f"layer.{name}": value for name, value in parameters.items()}
            result = torch.func.functional_call(single, named, (case.inputs[example : example + 1],))[0]
            return (result.movedim(-1, 0) if last else result).flatten(1) if result.dim() > 1 else result[:, None]

        jacobian = torch.func.jacrev(of_weight)(layer.weight.detach())  # (channels, places, *weight)
        slopes = output.grad[example]
        slopes = (slopes.movedim(-1, 0) if last else slopes).reshape(len(jacobian), -1)
        per_group = len(jacobian) // groups
        for group in range(groups):
            channel = group * per_group
            seen = jacobian[channel]
            if isinstance(layer, nn.modules.conv._ConvTransposeNd):
                seen = seen.unflatten(1, (groups, -1))[:, group, :, 0]
            else:
                seen = seen[..., 0] if isinstance(layer, nn.Embedding) else seen[:, channel]
            for place in range(seen.shape[0]):
                x, d = seen[place].flatten(), slopes[channel : channel + per_group, place]
                if isinstance(layer, nn.Embedding):
                    d = d * x.any()  # no gradient passes through padding
                if getattr(layer, "bias", None) is not None:
                    x = torch.cat([x, x.new_ones(1)])
                rows[group].append((x, d))
    return rows


class LayerCall(nn.Module):
    """A layer that is called in a certain way."""

    def __init__(self, layer: nn.Module, call: Call) -> None:
        super().__init__()
        self.layer = layer
        self.call = call

    def forward(self, inputs: Tensor) -> Tensor:
        return self.call(self.layer, inputs)


def factors_of_rows(rows: Rows) -> tuple[Tensor, Tensor]:
    """G and A by their definition, one example after the other."""
    x, d = (torch.stack(parts) for parts in zip(*rows, strict=True))
    return N * sum(torch.outer(row, row) for row in d), sum(torch.outer(row, row) for row in x) / len(x)


def gradient_of(layer: GaussianLayer, name: str) -> Tensor:
    """The gradient of the means that share a precision, as one matrix."""
    block = layer.block_of(name)
    return block.joint([mean.grad for mean in block.means])


def gradient_of_rows(rows: Rows) -> Tensor:
    return sum(torch.outer(d, x) for x, d in rows)


def observed_factors(layer: GaussianLayer, name: str) -> tuple[Tensor, Tensor]:
    """What the layer's observer made of the last backward pass."""
    gradient = gradient_of(layer, name)
    seen = layer.observation_of(name).curvature(gradient, layer.examples)
    if isinstance(seen, LowRank):
        return seen.d.mT @ seen.d, seen.x.mT @ seen.x
    return seen.outputs, seen.inputs


LINEAR_IN_WEIGHTS = {**LINEAR, **CONVOLUTIONS, **TRANSPOSED, **EMBEDDINGS}


@pytest.mark.parametrize("case", LINEAR_IN_WEIGHTS.values(), ids=LINEAR_IN_WEIGHTS)
def test_factors_are_those_of_single_examples(case: LayerCase) -> None:
    layer = case.gaussian("kronecker")
    loss_of(case.call(layer, case.inputs)).backward()
    outputs, inputs = observed_factors(layer, "weight")
    by_group = rows_by_jacobian(case.layer(), case)
    gradient = torch.stack([gradient_of_rows(rows) for rows in by_group])
    joint = gradient_of(layer, "weight")
    torch.testing.assert_close(joint, gradient.reshape(joint.shape), rtol=1e-10, atol=1e-12)
    expected = [factors_of_rows(rows) for rows in by_group]
    expected_outputs, expected_inputs = (torch.stack(parts) for parts in zip(*expected, strict=True))
    if len(expected) == 1:
        expected_outputs, expected_inputs = expected_outputs[0], expected_inputs[0]
    if isinstance(layer, nn.Embedding):
        expected_inputs = expected_inputs.diagonal()
        if layer.padding_idx is not None:  # counts as positions
            expected_inputs = expected_inputs.clone()
            expected_inputs[layer.padding_idx] = (case.inputs == layer.padding_idx).double().mean()
    torch.testing.assert_close(outputs, expected_outputs, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(inputs, expected_inputs, rtol=1e-10, atol=1e-12)


class Recorder:
    """Takes the place of a layer and keeps what it is called with."""

    def __call__(self, *args: Tensor, **settings: Any) -> tuple[Tensor, None]:
        self.args = args
        return torch.zeros(N, 1), None


def attention_rows(layer: nn.MultiheadAttention, case: LayerCase) -> dict[str, Rows]:
    """The rows of all projections, from an attention that is written down with each of them by itself."""
    recorder = Recorder()
    case.call(recorder, case.inputs)
    given = [tensor if layer.batch_first else tensor.transpose(0, 1) for tensor in recorder.args]
    packed = layer.in_proj_weight is not None
    weights = layer.in_proj_weight.chunk(3) if packed else [getattr(layer, f"{c}_proj_weight") for c in "qkv"]
    biases = [None] * 3 if layer.in_proj_bias is None else layer.in_proj_bias.chunk(3)
    parts = [F.linear(*part) for part in zip(given, weights, biases, strict=True)]
    heads = [part.unflatten(-1, (2, 3)).transpose(1, 2) for part in parts]
    attended = ((heads[0] @ heads[1].mT / math.sqrt(3)).softmax(-1) @ heads[2]).transpose(1, 2).flatten(2)
    output = layer.out_proj(attended)
    for tensor in (*parts, output):
        tensor.retain_grad()
    loss_of(output if layer.batch_first else output.transpose(0, 1)).backward()

    def with_one(x: Tensor) -> Tensor:
        return x if layer.in_proj_bias is None else torch.cat([x, x.new_ones(1)])

    rows: dict[str, Rows] = {"out_proj": list(zip(*flat(attended, output.grad), strict=True))}
    rows["out_proj"] = [(with_one(x), d) for x, d in rows["out_proj"]]
    d_q, d_k, d_v = (part.grad for part in parts)
    zero = torch.zeros(6, dtype=torch.float64)
    pad = [lambda d: torch.cat([d, zero, zero]), lambda d: torch.cat([zero, d, zero])]
    pad.append(lambda d: torch.cat([zero, zero, d]))
    if not packed:
        rows["in_proj_bias"] = []
        for name, x, grad, padded in zip("qkv", given, (d_q, d_k, d_v), pad, strict=True):
            rows[f"{name}_proj_weight"] = list(zip(*flat(x, grad), strict=True))
            rows["in_proj_bias"] += [(d.new_ones(1), padded(d)) for d in flat(grad)[0]]
        return rows
    query, key, value = given
    if query is key is value:
        used = [(query, torch.cat([d_q, d_k, d_v], -1), lambda d: d)]
    elif key is value:
        used = [(query, d_q, pad[0]), (key, torch.cat([d_k, d_v], -1), lambda d: torch.cat([zero, d]))]
    else:
        used = list(zip(given, (d_q, d_k, d_v), pad, strict=True))
    rows["in_proj_weight"] = [
        (with_one(x), padded(d))
        for inputs, grad, padded in used
        for x, d in zip(*flat(inputs, grad), strict=True)
    ]
    return rows


def flat(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().flatten(0, 1) for tensor in tensors]


@pytest.mark.parametrize("case", ATTENTION.values(), ids=ATTENTION)
def test_factors_of_attention(case: LayerCase) -> None:
    layer = case.gaussian("kronecker")
    loss_of(case.call(layer, case.inputs)).backward()
    expected = attention_rows(case.layer(), case)
    assert {block.names[0] for block in layer.blocks()} | {"out_proj"} == set(expected)
    for name, rows in expected.items():
        part, mean = (layer.out_proj, "weight") if name == "out_proj" else (layer, name)
        torch.testing.assert_close(gradient_of(part, mean), gradient_of_rows(rows), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(observed_factors(part, mean), factors_of_rows(rows), rtol=1e-10, atol=1e-12)


def cell_rows(cell: nn.RNNCellBase, inputs: Tensor) -> dict[str, Rows]:
    """The rows of both weights over two steps, from cells that are written down gate by gate."""
    hidden = memory = torch.zeros(N, 4, dtype=torch.float64)
    seen, outputs = [], []
    for x in (inputs, 0.5 * inputs):
        a, b = F.linear(x, cell.weight_ih, cell.bias_ih), F.linear(hidden, cell.weight_hh, cell.bias_hh)
        a.retain_grad(), b.retain_grad()
        seen += [("weight_ih", x, a), ("weight_hh", hidden, b)]
        if isinstance(cell, nn.LSTMCell):
            i, f, g, o = (a + b).chunk(4, 1)
            memory = torch.sigmoid(f) * memory + torch.sigmoid(i) * torch.tanh(g)
            hidden = torch.sigmoid(o) * torch.tanh(memory)
        elif isinstance(cell, nn.GRUCell):
            r, z = ((a + b)[:, k : k + 4].sigmoid() for k in (0, 4))
            hidden = (1 - z) * torch.tanh(a[:, 8:] + r * b[:, 8:]) + z * hidden
        else:
            hidden = (a + b).tanh() if cell.nonlinearity == "tanh" else (a + b).relu()
        outputs = [hidden, memory] if isinstance(cell, nn.LSTMCell) else [hidden]
    loss_of(torch.cat(outputs, 1)).backward()
    rows: dict[str, Rows] = {"weight_ih": [], "weight_hh": []}
    for name, x, part in seen:
        x = x.detach() if cell.bias_ih is None else torch.cat([x.detach(), torch.ones(N, 1)], 1)
        rows[name] += list(zip(x, part.grad, strict=True))
    return rows


@pytest.mark.parametrize("name", ["RNN cell", "RNN cell with ReLU", "LSTM cell", "GRU cell"])
def test_factors_of_cells(name: str) -> None:
    case = CELLS[name]
    layer = case.gaussian("kronecker")
    loss_of(case.call(layer, case.inputs)).backward()
    for weight, rows in cell_rows(case.layer(), case.inputs).items():
        torch.testing.assert_close(gradient_of(layer, weight), gradient_of_rows(rows), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(observed_factors(layer, weight), factors_of_rows(rows), rtol=1e-10, atol=1e-12)


USED_ONCE = {name: case for name, case in WEIGHTED.items() if case.examples == N and name not in CELLS}


@pytest.mark.parametrize("case", USED_ONCE.values(), ids=USED_ONCE)
def test_squares_of_single_examples(case: LayerCase) -> None:
    """The estimator that adds up the squared gradients of single examples sees the same of every layer."""
    layer, reference = case.gaussian(Diagonal("per_example")), case.layer()
    output = case.call(reference, case.inputs)
    if case.inputs.is_floating_point() and case.inputs.shape[0] != N:
        output = output.transpose(0, 1)
    losses = output.flatten(1).sin().sum(1)
    expected = {name: torch.zeros_like(p) for name, p in reference.named_parameters()}
    for loss in losses:
        reference.zero_grad()
        loss.backward(retain_graph=True)
        for name, parameter in reference.named_parameters():
            expected[name] += parameter.grad.square() / N
    case.call(layer, case.inputs).sin().sum().div(N).backward()
    for name, part in gaussian_layers(layer):
        for block in part.blocks():
            curvature = part.observation_of(block.names[0]).curvature(block.means[0].grad, part.examples)
            full_name = f"{name}.{block.names[0]}" if name else block.names[0]
            torch.testing.assert_close(curvature, expected[full_name], rtol=1e-9, atol=1e-12, msg=full_name)


# ------------------------------------------------------------------------------------ training and state
@every_layer
def test_a_joint_mean_splits_into_its_parts(case: LayerCase) -> None:
    for _, block in gaussian_blocks(case.gaussian("kronecker")):
        joint = block.joint_mean()
        assert joint.shape == block.precision.shape
        for part, mean in zip(block.split(joint), block.means, strict=True):
            assert torch.equal(part, mean)


@every_layer
@pytest.mark.parametrize("precision", ["diagonal", "kronecker"])
def test_training_moves_every_mean_and_its_precision(case: LayerCase, precision: str) -> None:
    layer = case.gaussian(precision)
    optimizer = EulerLagrange(layer, lr=0.02, temperature=1e-3)
    means = {name: p.detach().clone() for name, p in layer.named_parameters()}
    before = {name: variance.clone() for name, variance in variances(layer).items()}
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = loss_of(case.call(layer, case.inputs))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, mean in layer.named_parameters():
        moved = mean != means[name]
        if isinstance(layer, nn.Embedding):
            seen = case.inputs.unique()
            moved = moved[seen[seen != layer.padding_idx]].all()
        assert moved.any(), name
        assert mean.isfinite().all()
    for name, variance in variances(layer).items():
        assert variance.isfinite().all()
        assert (variance > 0).all()
        assert not torch.equal(variance, before[name]), name


def trained(case: LayerCase) -> nn.Module:
    """A Gaussian layer some steps away from its prior."""
    layer = case.gaussian("kronecker")
    optimizer = EulerLagrange(layer, lr=0.02, temperature=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(case.call(layer, case.inputs)).backward()
        optimizer.step()
    return layer


@every_layer
def test_state_survives_copies_files_and_changes_of_type(case: LayerCase) -> None:
    layer = trained(case).eval()
    state, file = layer.state_dict(), io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = case.gaussian("kronecker", prior_variance=3.0).eval()
    loaded.load_state_dict(torch.load(file, weights_only=True))
    expected = case.call(layer, case.inputs)
    for copied in (loaded, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_same_tensors(dict(copied.state_dict()), dict(state))
        torch.testing.assert_close(case.call(copied, case.inputs), expected, rtol=0, atol=0)
        optimizer = EulerLagrange(copied, lr=0.02, temperature=1e-3)
        loss_of(case.call(copied, case.inputs)).backward()
        optimizer.step()  # the means are linked to their precisions
    half = copy.deepcopy(layer).half()
    for name, value in half.state_dict().items():
        if "_precision" in name and isinstance(value, Tensor):
            assert value.dtype == torch.float64
    assert {p.dtype for p in half.parameters()} == {torch.float16}


@every_layer
def test_deterministic_checkpoints_load_and_collapse_is_the_inverse(case: LayerCase) -> None:
    layer, plain_layer = trained(case), case.layer()
    layer.load_state_dict(plain_layer.state_dict())
    fresh = case.gaussian("kronecker")
    assert_same_tensors(dict(variances(layer)), dict(variances(fresh)))
    assert_same_tensors(dict(layer.named_parameters()), dict(fresh.named_parameters()))
    collapse(layer)
    for ours, theirs in zip(layer.modules(), plain_layer.modules(), strict=True):
        assert type(ours) is type(theirs)
        assert vars(ours).keys() == vars(theirs).keys()
    assert_same_tensors(dict(layer.state_dict()), dict(plain_layer.state_dict()))
    assert not any(clagrange.gaussian.owner_of(p) for p in layer.parameters())


DIRECTLY: dict[type[nn.Module], tuple[Any, ...]] = {
    nn.Linear: (4, 3),
    nn.Conv1d: (2, 3, 3),
    nn.Conv2d: (2, 3, 3),
    nn.Conv3d: (2, 3, 3),
    nn.ConvTranspose1d: (2, 3, 3),
    nn.ConvTranspose2d: (2, 3, 3),
    nn.ConvTranspose3d: (2, 3, 3),
    nn.Embedding: (5, 3),
    nn.MultiheadAttention: (6, 2),
    nn.RNNCell: (3, 4),
    nn.LSTMCell: (3, 4),
    nn.GRUCell: (3, 4),
    nn.LayerNorm: (3,),
    nn.RMSNorm: (3,),
    nn.GroupNorm: (2, 4),
    nn.BatchNorm1d: (3,),
    nn.BatchNorm2d: (3,),
    nn.BatchNorm3d: (3,),
}


@pytest.mark.parametrize("kind", DIRECTLY, ids=lambda kind: kind.__name__)
def test_layers_made_directly_equal_gaussianized_ones(kind: type[nn.Module]) -> None:
    settings = {"precision": "kronecker", "prior_variance": 0.2, "prior_mean": "initial"}
    torch.manual_seed(0)
    direct = GAUSSIAN_FORMS[kind](*DIRECTLY[kind], **settings, dtype=torch.float64)
    torch.manual_seed(0)
    other = gaussianize(kind(*DIRECTLY[kind], dtype=torch.float64), **settings, layers={kind: {}})
    assert [type(layer) for layer in direct.modules()] == [type(layer) for layer in other.modules()]
    assert_same_tensors(dict(direct.state_dict()), dict(other.state_dict()))


# ----------------------------------------------------------------------------------------------- draws
@pytest.mark.parametrize("precision", ["diagonal", "kronecker"])
@every_layer
def test_weights_drawn_for_a_batch(case: LayerCase, precision: str) -> None:
    first, second = case.gaussian(precision), case.gaussian(precision)
    at_mean = case.call(case.gaussian(precision), case.inputs)
    for layer in (first, second):
        set_sampling(layer, "batch", torch.Generator().manual_seed(1))
    drawn = case.call(first, case.inputs)
    assert not torch.isclose(drawn, at_mean).all()
    torch.testing.assert_close(case.call(second, case.inputs), drawn, rtol=0, atol=0)
    torch.testing.assert_close(case.call(first, case.inputs), drawn)  # the draw holds until it was used
    loss_of(drawn).backward()
    assert not torch.isclose(case.call(first, case.inputs), drawn).all()
    for parameter in first.parameters():
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize(
    "name", ["linear", "conv 1d", "transposed 2d", "embedding", "self-attention", "GRU cell"]
)
def test_outputs_drawn_for_every_example(name: str) -> None:
    case = WEIGHTED[name]
    layer = case.gaussian()
    set_sampling(layer, "example", torch.Generator().manual_seed(1))
    same = case.inputs[:1].expand(case.inputs.shape)
    output = case.call(layer, same)
    assert not torch.isclose(output[0], output[1]).any()
    if name not in ("self-attention", "GRU cell"):
        draws = torch.stack([case.call(layer, same)[0] for _ in range(400)])
        mean = case.call(layer.eval(), same)[0]
        assert ((draws.mean(0) - mean).abs() < 5 * draws.std(0) / 20).all()


@pytest.mark.parametrize("case", NORMS.values(), ids=NORMS)
def test_normalisations_have_no_draws_for_single_examples(case: LayerCase) -> None:
    with pytest.raises(ValueError, match=r"mode: a Gaussian\w+Norm\w* cannot be drawn for every example"):
        set_sampling(case.gaussian(), "example")


# --------------------------------------------------------------------------------------- normalisations
def test_the_prior_of_a_scale_is_around_1() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    with torch.no_grad():
        net[1].weight.fill_(2.0)
    around_1 = gaussianize(net, layers={nn.LayerNorm: {"prior_variance": 0.01}}, copied=True)[1]
    assert torch.equal(around_1.weight_precision.prior_mean, torch.ones(3))
    assert not around_1.bias_precision.prior_mean.any()
    torch.testing.assert_close(around_1.weight_precision.variance(), torch.full((3,), 0.01))
    initial = gaussianize(net, prior_mean="initial", layers={nn.LayerNorm: {}})[1]
    assert torch.equal(initial.weight_precision.prior_mean, torch.full((3,), 2.0))


STACKED_NORMS = {name: case for name, case in NORMS.items() if type(case.layer()) in replicas.STACKED_FORMS}


@pytest.mark.parametrize("case", STACKED_NORMS.values(), ids=STACKED_NORMS)
def test_stacked_normalisations_train_as_single_ones_do(case: LayerCase) -> None:
    singles = [case.layer() for _ in range(3)]
    for seed, single in enumerate(singles):
        for parameter in single.parameters():
            parameter.data.add_(floats(*parameter.shape, seed=seed))
    inputs = torch.stack([case.inputs + floats(*case.inputs.shape, seed=seed) for seed in range(3)])
    stacked = gaussianize(replicas.stack(singles), layers={type(replicas.stack(singles)): {}})
    singles = [gaussianize(single, layers=case.asked) for single in singles]
    again = replicas.stack(singles)
    assert type(again) is type(stacked) is type(singles[0])
    assert_same_tensors(dict(again.state_dict()), dict(stacked.state_dict()))
    for layer, x in [(stacked, inputs), *zip(singles, inputs, strict=True)]:
        optimizer = EulerLagrange(layer, lr=0.02, temperature=1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            output = layer(x)
            sum(loss_of(part) for part in (output if layer is stacked else [output])).backward()
            optimizer.step()
        assert layer.examples == 0
    for replica, single in enumerate(singles):
        for name, value in single.state_dict().items():
            torch.testing.assert_close(stacked.state_dict()[name][replica], value, rtol=1e-10, atol=1e-12)
    assert type(collapse(stacked)) in replicas.STACKED_FORMS.values()


@pytest.mark.parametrize(
    "name", ["embedding", "self-attention", "GRU cell", "conv 1d", "transposed 2d", "RMS norm"]
)
def test_layers_without_stacked_form_are_refused_by_name(name: str) -> None:
    case = LAYERS[name]
    kind = type(case.gaussian()).__name__
    with pytest.raises(ValueError, match=rf"layer '0' of type {kind} has no stacked form"):
        replicas.stack([nn.Sequential(case.gaussian()) for _ in range(2)])
