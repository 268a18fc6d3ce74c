"""What continual backprop changes when it replaces a unit: exactly its entries, and no output on average."""

import pytest
import torch
from cases import backward, batch, convnet, images, mlp, step_with, still
from torch import Tensor, nn
from torch.optim import Optimizer

from clagrange import gaussianize
from clagrange.interventions import ContinualBackprop
from clagrange.interventions.base import fill_entries
from clagrange.optim import EulerLagrange


def ages(method: ContinualBackprop, layer: str = "0") -> Tensor:
    return method.state[layer]["age"]


# ------------------------------------------------------------------------------------------ what is reset
def optimizer_for(kind: str, net: nn.Module) -> Optimizer:
    if kind == "EulerLagrange":
        return EulerLagrange(net, lr=0.02, temperature=1e-3)
    if kind == "SGD":
        return torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    return torch.optim.Adam(net.parameters(), lr=0.01)


def snapshot(net: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Every number of network and optimizer, by name."""
    names = {parameter: name for name, parameter in net.named_parameters()}
    kept = {name: value.clone() for name, value in net.state_dict().items()}
    for parameter, state in optimizer.state.items():
        kept |= {f"{names[parameter]}/{key}": v.clone() for key, v in state.items() if isinstance(v, Tensor)}
    return kept


@pytest.mark.parametrize("kind", ["Adam", "SGD", "EulerLagrange"])
@pytest.mark.parametrize("make", [mlp, convnet], ids=["linear", "convolution"])
def test_exactly_the_entries_of_the_replaced_unit_are_reset(kind: str, make) -> None:
    net = gaussianize(make()) if kind == "EulerLagrange" else make()
    data = batch if make is mlp else images
    optimizer = optimizer_for(kind, net)
    names = [name for name, layer in net.named_children() if isinstance(layer, nn.Linear | nn.Conv2d)][:2]
    if make is convnet:
        names = ["2", "5"]  # a channel before the flatten layer: 4 columns for each unit
    method = ContinualBackprop(replacement_rate=0.0, maturity=0, layers=names)
    method.on_start(net, optimizer)
    for number in range(5):
        step_with(net, optimizer, method, *data(number))
    backward(net, optimizer, *data(5))
    optimizer.step()
    producer, consumer = names
    units = net.get_submodule(producer).weight.shape[0]
    before = snapshot(net, optimizer)
    method.replacement_rate = 1 / units
    method.on_step(net, optimizer)
    after = snapshot(net, optimizer)

    assert after.keys() == before.keys()
    unit = int((ages(method, producer) == 0).nonzero())
    copies = net.get_submodule(consumer).weight.shape[1] // units
    masks = {
        f"{producer}.weight": (unit,),
        f"{producer}.bias": (unit,),
        f"{consumer}.weight": (slice(None), slice(unit * copies, (unit + 1) * copies)),
    }
    for name, value in after.items():
        owner = name.split("/")[0].replace("_precision", "").split(".")
        mask = masks.get(".".join(owner[:2]))
        changed = value != before[name]
        if name == f"{consumer}.bias" or mask is None or name.endswith(("step", "prior_precision", "prior_mean")):
            assert not changed.any() or name == f"{consumer}.bias", name
            continue
        rest = torch.ones_like(value, dtype=torch.bool)
        rest[mask] = False
        assert not changed[rest].any(), name
        if name.endswith("_precision.precision"):
            prior = before[name.replace("_precision.precision", "_precision.prior_precision")]
            assert (value[mask] == prior.flatten()[0]).all(), name
        elif name != f"{producer}.weight":
            assert not value[mask].any(), name
            assert before[name][mask].any(), name
        else:
            assert changed[mask].all(), name
    if kind == "Adam":
        assert f"{producer}.weight/exp_avg_sq" in after
    if kind == "SGD":
        assert f"{consumer}.weight/momentum_buffer" in after
    if kind == "EulerLagrange":
        assert f"{consumer}.weight_precision.precision" in after


def start_with_weights_at_rest(
    net: nn.Module, layers: list[str], inputs: tuple[Tensor, Tensor]
) -> ContinualBackprop:
    """Four steps at the end of which some units of the first layer are replaced."""
    method = ContinualBackprop(replacement_rate=0.4, maturity=3, layers=layers)
    optimizer = still(net)
    method.on_start(net, optimizer)
    for _ in range(4):
        step_with(net, optimizer, method, *inputs)
    assert (ages(method, layers[0]) == 0).any()
    return method


def test_the_mean_input_of_the_next_layer_does_not_jump() -> None:
    """With weights at rest f̂ is the mean activation: the next bias takes exactly what the units gave."""
    net, inputs = mlp(), batch(size=32)
    before, weight = net[:3](inputs[0]), net[2].weight.detach().clone()
    start_with_weights_at_rest(net, ["0", "2"], inputs)
    assert not torch.equal(net[2].weight, weight)
    torch.testing.assert_close(net[:3](inputs[0]).mean(0), before.mean(0))
    assert not torch.allclose(net[:3](inputs[0]), before)


@pytest.mark.parametrize(
    ("layers", "copies"), [(["0", "2"], 1), (["2", "5"], 4)], ids=["to_convolution", "to_linear"]
)
def test_the_mean_contribution_of_a_channel_moves_into_the_next_bias(layers: list[str], copies: int) -> None:
    """w_out·f̂ summed over the kernel, or over the positions that flattening made inputs."""
    net, inputs = convnet(), images(size=32)
    producer, consumer = (net.get_submodule(name) for name in layers)
    features = net[: int(layers[0]) + 2](inputs[0]).detach()
    weight, bias = consumer.weight.detach().clone(), consumer.bias.detach().clone()
    method = start_with_weights_at_rest(net, layers, inputs)
    moved = torch.zeros_like(bias)
    for unit in (ages(method, layers[0]) == 0).nonzero().flatten().tolist():
        outgoing = weight[:, copies * unit : copies * (unit + 1)].flatten(1).sum(1)
        moved += outgoing * features[:, unit].mean()
    assert moved.any()
    torch.testing.assert_close(consumer.bias.detach() - bias, moved)
    assert producer.weight.isfinite().all()


def test_a_next_layer_without_bias_just_loses_the_unit() -> None:
    net = nn.Sequential(nn.Linear(5, 6, bias=False), nn.ReLU(), nn.Linear(6, 3, bias=False)).double()
    method = ContinualBackprop(replacement_rate=1.0, maturity=0)
    optimizer = still(net)
    method.on_start(net, optimizer)
    step_with(net, optimizer, method, *batch())
    assert not net[2].weight.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_counts_exactly(dtype: torch.dtype) -> None:
    """A network of 6 + 4 units of which 0.01 are due after each of 400 steps, the last 100 of them mature."""
    net, method = (
        mlp(dtype=dtype),
        ContinualBackprop(replacement_rate=0.01, maturity=300, utility="zero_contribution"),
    )
    optimizer = still(net)
    method.on_start(net, optimizer)
    replaced = 0
    for number in range(400):
        step_with(net, optimizer, method, *batch(number % 3, dtype=dtype))
        replaced += int((ages(method) == 0).sum())
    assert ages(method).max() == 400
    assert 3 <= replaced <= 6
    assert all(value.isfinite().all() for value in net.state_dict().values())


@pytest.mark.parametrize(
    ("shape", "mask_shape"),
    [
        ((300, 400), (1, 400)),
        ((300, 400), (400,)),
        ((300, 400), (300, 1)),
        ((300, 400), (300, 400)),
        ((300, 400), ()),
        ((300, 400), (1, 1)),
        ((3, 200, 150), (3, 1, 150)),
        ((3, 200, 150), (3, 200, 1)),
        ((3, 64, 50, 3, 3), (3, 1, 50, 1, 1)),
        ((1, 300, 400), (1, 1, 400)),
    ],
)
def test_entries_of_large_tensors_are_filled_like_those_of_small_ones(
    shape: tuple[int, ...], mask_shape: tuple[int, ...]
) -> None:
    tensor = torch.randn(shape)
    mask = torch.rand(mask_shape) < 0.3
    mask.view(-1)[-1] = True
    expected = tensor.masked_fill(mask, 7.0)
    fill_entries(tensor, mask, 7.0)
    assert torch.equal(tensor, expected)
    transposed = torch.randn(shape[::-1]).permute(*range(len(shape))[::-1])
    expected = transposed.masked_fill(mask, 7.0)
    fill_entries(transposed, mask, 7.0)
    assert torch.equal(transposed, expected)
