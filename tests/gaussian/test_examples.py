"""Gaussian layers count the examples behind their gradients."""

import pytest
import torch
from cases import R, batch, convnet, images, mlp
from torch import nn

from clagrange import GaussianConv2d, GaussianLinear, gaussianize, replicas
from clagrange.gaussian import gaussian_layers
from clagrange.optim import EulerLagrange


def counts(net: nn.Module) -> set[tuple[int, int]]:
    """(examples, positions) of all Gaussian layers."""
    return {(layer.examples, layer.positions) for _, layer in gaussian_layers(net)}


@pytest.mark.parametrize("size", [1, 8])
def test_one_batch(size: int) -> None:
    net = gaussianize(convnet())
    assert counts(net) == {(0, 0)}
    output = net(images(size=size)[0])
    assert counts(net) == {(0, 0)}
    output.sum().backward()
    assert counts(net) == {(size, size)}


def test_accumulation_adds_and_zero_grad_starts_afresh() -> None:
    net = gaussianize(mlp())
    for size, total in [(3, 3), (5, 8), (1, 9)]:
        net(batch(size=size)[0]).sum().backward()
        assert counts(net) == {(total, total)}
    net.zero_grad()
    net(batch(size=4)[0]).sum().backward()
    assert counts(net) == {(4, 4)}


def test_gradients_of_zero_after_a_step_start_afresh() -> None:
    net = gaussianize(mlp())
    net(batch(size=4)[0]).sum().backward()
    for _, layer in gaussian_layers(net):
        layer.clear_examples()
    net.zero_grad(set_to_none=False)
    net(batch(size=6)[0]).sum().backward()
    assert counts(net) == {(6, 6)}


def test_forward_without_gradients_counts_nothing() -> None:
    net = gaussianize(mlp())
    with torch.no_grad():
        net(batch()[0])
    with torch.inference_mode():
        net(batch()[0])
    net(batch(size=2)[0])  # never goes backward
    assert counts(net) == {(0, 0)}
    net(batch(size=3)[0]).sum().backward()
    assert counts(net) == {(3, 3)}


def test_second_backward_through_the_same_graph_adds_as_its_gradient_does() -> None:
    net = gaussianize(mlp())
    loss = net(batch(size=3)[0]).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert counts(net) == {(6, 6)}


def test_a_layer_used_twice_saw_its_examples_once() -> None:
    layer = nn.Linear(4, 4)
    net = gaussianize(nn.Sequential(layer, nn.ReLU(), layer))
    for total in (5, 10):
        net(torch.randn(5, 4)).sum().backward()
        assert counts(net) == {(total, total)}


def test_sequences_have_more_positions_than_examples() -> None:
    layer = GaussianLinear(4, 2)
    layer(torch.randn(3, 7, 2, 4)).sum().backward()
    assert counts(layer) == {(3, 42)}


@pytest.mark.parametrize("cell", [nn.RNNCell, nn.LSTMCell, nn.GRUCell])
def test_steps_of_a_recurrent_cell_are_positions(cell: type[nn.Module]) -> None:
    """Of all backward passes that accumulate; a frozen weight leaves the other's count."""
    net = gaussianize(cell(3, 5))

    def unroll(batch: int, steps: int) -> None:
        state, outputs = None, []
        for _ in range(steps):
            state = net(torch.randn(batch, 3), state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        torch.stack(outputs).mean().backward()

    unroll(4, 6)
    assert counts(net) == {(4, 24)}
    unroll(2, 3)
    assert counts(net) == {(6, 30)}
    net.zero_grad()
    net.weight_hh.requires_grad_(False)
    net.bias_hh.requires_grad_(False)
    unroll(4, 6)
    assert counts(net) == {(4, 24)}
    net.clear_examples()
    net.zero_grad(set_to_none=False)
    unroll(4, 1)
    assert counts(net) == {(4, 4)}


def test_an_unrolled_cell_learns_of_the_mean_over_positions_what_its_head_does() -> None:
    """n·g² with n the positions, of the cell as of the head that gets all steps together."""

    class Unrolled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = nn.RNNCell(3, 5), nn.Linear(5, 2)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            states = [self.cell(inputs[:, 0])]
            for step in range(1, inputs.shape[1]):
                states.append(self.cell(inputs[:, step], states[-1]))
            return self.head(torch.stack(states, 1))

    torch.manual_seed(0)
    net = gaussianize(Unrolled())
    optimizer = EulerLagrange(net, curvature_decay=0.5, loss_reduction="position_mean")
    targets = torch.randint(2, (24,))
    nn.functional.cross_entropy(net(torch.randn(4, 6, 3)).flatten(0, 1), targets).backward()
    squares = [0.5 * net.cell.weight_hh.grad.square(), 0.5 * net.head.weight.grad.square()]
    optimizer.step()
    for square, precision in zip(squares, (net.cell.weight_hh_precision, net.head.weight_precision), strict=True):
        torch.testing.assert_close(precision.curvature, 24 * square)


def test_inputs_without_a_batch() -> None:
    linear, convolution = GaussianLinear(4, 2), GaussianConv2d(2, 3, 3)
    linear(torch.randn(4)).sum().backward()
    convolution(torch.randn(2, 5, 5)).sum().backward()
    assert counts(linear) == counts(convolution) == {(1, 1)}


def test_stacked_layers_count_the_examples_of_each_replica() -> None:
    dense = gaussianize(replicas.stack([mlp(seed) for seed in range(R)]))
    dense(torch.stack([batch(seed)[0] for seed in range(R)])).sum().backward()
    assert counts(dense) == {(8, 8)}
    convolutions = gaussianize(replicas.stack([convnet(seed) for seed in range(R)]))
    convolutions(torch.stack([images(seed)[0] for seed in range(R)])).sum().backward()
    assert counts(convolutions) == {(8, 8)}
    sequence = gaussianize(replicas.stack([mlp(seed) for seed in range(R)]))
    sequence(torch.randn(R, 4, 6, 5, dtype=torch.float64)).sum().backward()
    assert counts(sequence) == {(4, 24)}


def test_frozen_weight_beside_a_trained_bias() -> None:
    layer = GaussianLinear(4, 2)
    layer.weight.requires_grad_(False)
    for total in (3, 6):
        layer(torch.randn(3, 4)).sum().backward()
        assert layer.examples == total


def test_activations_that_overwrite_the_output() -> None:
    net = gaussianize(nn.Sequential(nn.Linear(5, 4), nn.ReLU(inplace=True), nn.Linear(4, 1)).double())
    net(batch(size=3)[0]).sum().backward()
    assert counts(net) == {(3, 3)}


def test_the_count_keeps_no_network_alive() -> None:
    import gc
    import weakref

    layer = GaussianLinear(4, 2)
    output = layer(torch.randn(3, 4))
    alive = weakref.ref(layer)
    del layer
    gc.collect()
    assert alive() is None
    output.sum().backward()  # the hook finds no layer and says nothing
