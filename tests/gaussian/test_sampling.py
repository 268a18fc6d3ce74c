"""Weights drawn in training: their distribution, how long a draw holds, its random streams, what is refused."""

import copy
import io
import math
import pickle

import pytest
import torch
from cases import convnet, images, mlp
from scipy.stats import kstest
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from clagrange import collapse, gaussianize, replicas
from clagrange.gaussian import Diagonal, Kronecker, set_sampling
from clagrange.gaussian.sampling import WeightSampler

MODES = [Diagonal(sampling="batch"), Diagonal(sampling="example"), Kronecker(sampling="batch")]
STREAMS = [*MODES, Diagonal("sampled", "example", antithetic=True)]


def short(structure: object) -> str:
    """What a test is called."""
    return f"{type(structure).__name__}-{structure.sampling}{'-antithetic' * structure.antithetic}"


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def seeded(net: nn.Module, structure: object, seed: int = 0) -> nn.Module:
    """A Gaussian network with known random streams."""
    net = gaussianize(net, precision=structure)
    set_sampling(net, structure.sampling, stream(seed), antithetic=structure.antithetic)
    return net


def spent(net: nn.Module, inputs: Tensor) -> Tensor:
    """The outputs of a pass that is backpropagated, so that the next one has a draw of its own."""
    outputs = net(inputs)
    outputs.sum().backward()
    return outputs.detach()


def wide_variances(layer: nn.Module) -> None:
    """Variances that differ from weight to weight."""
    generator = stream(9)
    for block in layer.blocks():
        precision = block.precision.precision
        precision.copy_(0.5 + torch.rand(precision.shape, generator=generator, dtype=precision.dtype))


# ---------------------------------------------------------------------------------------------- when it draws
@pytest.mark.parametrize("structure", MODES, ids=short)
def test_only_training_passes_with_gradients_are_drawn(structure: object) -> None:
    plain = mlp()
    net = seeded(copy.deepcopy(plain), structure)
    inputs = torch.randn(4, 5, dtype=torch.float64)
    mean = plain(inputs)
    assert not torch.isclose(spent(net, inputs), mean).any()
    with torch.no_grad():
        torch.testing.assert_close(net(inputs), mean, rtol=0, atol=0)
    torch.testing.assert_close(net.eval()(inputs), mean, rtol=0, atol=0)


def test_mean_is_the_default_and_comes_back() -> None:
    net = gaussianize(mlp())
    inputs, keys = torch.randn(4, 5, dtype=torch.float64), set(net.state_dict())
    mean = net(inputs)
    set_sampling(net, "batch", layers=["2"])
    assert set(net.state_dict()) == keys | {"2.sampler._extra_state"}
    assert not torch.equal(spent(net, inputs), mean)
    set_sampling(net, "mean")
    torch.testing.assert_close(net(inputs), mean, rtol=0, atol=0)
    assert set(net.state_dict()) == keys


# ----------------------------------------------------------------------------------------------- distribution
@pytest.mark.parametrize("structure", MODES, ids=short)
def test_outputs_have_the_predictive_distribution(structure: object) -> None:
    """One example: y ~ N(xμ + b, [x, 1] S⁻¹ [x, 1]), from 400 draws."""
    layer = seeded(nn.Linear(3, 1).double(), structure)
    if isinstance(structure, Kronecker):
        root = torch.randn(4, 4, generator=stream(1), dtype=torch.float64)
        layer.weight_precision.inputs.copy_(root @ root.T)
        layer.weight_precision.outputs.fill_(0.7)
    else:
        wide_variances(layer)
    x = torch.tensor([[0.3, -1.0, 0.5]], dtype=torch.float64)
    outputs = torch.cat([spent(layer, x) for _ in range(400)]).flatten()
    row = torch.cat([x, torch.ones(1, 1, dtype=torch.float64)], 1)
    if isinstance(structure, Kronecker):
        precision = layer.weight_precision
        dense = 0.7 * precision.inputs + precision.prior_precision.flatten() * torch.eye(4, dtype=torch.float64)
        variance = row @ dense.inverse() @ row.T
    else:
        variance = row.square() @ torch.cat([block.precision.variance().flatten() for block in layer.blocks()])
    standard = (outputs - layer.eval()(x).item()) / variance.item() ** 0.5
    assert kstest(standard.numpy(), "norm").pvalue > 0.01


@pytest.mark.parametrize(
    ("layer", "shape"), [(nn.Linear(4, 3), (4,)), (nn.Conv2d(2, 3, 2), (2, 5, 5))], ids=["linear", "convolution"]
)
def test_a_draw_serves_a_batch_or_one_example(layer: nn.Module, shape: tuple[int, ...]) -> None:
    same = torch.randn(1, *shape).expand(6, *shape)
    outputs = spent(seeded(copy.deepcopy(layer), Diagonal(sampling="batch")), same)
    torch.testing.assert_close(outputs, outputs[:1].expand_as(outputs))
    outputs = spent(seeded(copy.deepcopy(layer), Diagonal(sampling="example")), same)
    assert (outputs.std(0) > 0.01).all()


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
def test_outputs_of_a_convolution_have_the_variance_of_its_weights(padding_mode: str) -> None:
    """Of a draw for every example: the same as of one for a batch, and that of the convolution of the squares."""
    variances = {}
    inputs = torch.randn(1, 4, 4, 4, generator=stream(1), dtype=torch.float64).expand(300, -1, -1, -1)
    for mode in ("batch", "example"):
        torch.manual_seed(0)
        conv = nn.Conv2d(4, 6, 3, padding=1, groups=2, padding_mode=padding_mode).double()
        single = gaussianize(conv, precision=Diagonal(sampling=mode))
        wide_variances(single)
        if mode == "example":
            variances[mode] = spent(single, inputs).var(0)
        else:
            many = replicas.stack([single] * 300)
            set_sampling(many, mode, [stream(seed) for seed in range(300)])
            variances[mode] = spent(many, inputs[:, None])[:, 0].var(0)
    parts = {block.names[0]: block.precision.variance() for block in single.blocks()}
    exact = torch.func.functional_call(collapse(copy.deepcopy(single)), parts, (inputs[:1].square(),))[0]
    for found in variances.values():
        assert (found / exact - 1).abs().max() < 5 * math.sqrt(2 / 300)


def test_vectors_of_an_embedding_have_their_variance() -> None:
    layer = seeded(nn.Embedding(3, 2), Diagonal(sampling="example"))
    wide_variances(layer)
    for token in range(3):
        spread = spent(layer, torch.full((4000,), token)).var(0)
        torch.testing.assert_close(spread, layer.weight_precision.variance()[token], rtol=0.1, atol=0)


def test_weights_and_biases_that_share_no_precision() -> None:
    """A frozen bias beside a trained weight has a Kronecker precision of its own; both are drawn."""
    linear = nn.Linear(3, 2)
    linear.bias.requires_grad_(False)
    layer = seeded(linear, Kronecker(sampling="batch"))
    assert not torch.isclose(layer(torch.zeros(1, 3)), layer.bias).any()
    assert not torch.isclose(drawn_weight(layer), layer.weight).any()


def test_gradients_flow_through_the_drawn_weights() -> None:
    """The gradient of inputs and mean is that of the drawn weights, and of √(x²σ²)ε where outputs are drawn."""
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    for structure in MODES:
        layer = seeded(nn.Linear(3, 4).double(), structure)
        state = copy.deepcopy(layer)

        def outputs(inputs: Tensor, weight: Tensor, state: nn.Module = state) -> Tensor:
            again = copy.deepcopy(state)  # with the same stream
            return torch.func.functional_call(again, {"weight": weight}, (inputs,))

        assert torch.autograd.gradcheck(outputs, (x, layer.weight))


def test_an_example_without_inputs_has_no_noise_and_finite_gradients() -> None:
    layer = seeded(nn.Linear(3, 4, bias=False), Diagonal("sampled", "example"))
    x = torch.zeros(2, 3, requires_grad=True)
    outputs = layer(x)
    assert not outputs.abs().gt(1e-15).any()
    outputs.sum().backward()
    for tensor in (x.grad, layer.weight.grad, layer.observation_of("weight").curvature(layer.weight.grad, 2)):
        assert tensor.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", ["batch", "example"])
def test_small_variances_in_low_precision(dtype: torch.dtype, mode: str) -> None:
    """The noise is computed in float32, where a variance of 1e-9 is more than nothing."""
    layer = gaussianize(nn.Linear(4, 2, bias=False), precision=Diagonal("sampled", mode))
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight_precision.precision.fill_(1e9)
    for low in (False, True):
        if low:
            layer.to(dtype)
        with torch.autocast("cpu", dtype, enabled=not low):
            outputs = layer(torch.full((500, 4), 0.5, dtype=dtype if low else torch.float32))
        outputs.float().sum().backward()
        assert layer.weight.dtype == (dtype if low else torch.float32)
        assert outputs.dtype == dtype
        spread = float(outputs.detach().float().square().mean().sqrt())
        assert spread == pytest.approx(1e-9**0.5, rel=0.1 if mode == "example" else 2)
        assert layer.observation_of("weight").curvature(layer.weight.grad, 500).isfinite().all()
        layer.zero_grad()


# --------------------------------------------------------------------------------- how long a draw holds
def drawn_weight(layer: nn.Linear) -> Tensor:
    """The weight of a pass that is not backpropagated."""
    return (layer(torch.eye(layer.in_features)) - layer(torch.zeros(1, layer.in_features))).mT.detach()


def test_a_draw_holds_until_a_backward_pass_has_used_it() -> None:
    layer = seeded(nn.Linear(3, 2), Diagonal(sampling="batch"))
    first = drawn_weight(layer)
    torch.testing.assert_close(drawn_weight(layer), first)
    spent(layer, torch.ones(1, 3))
    second = drawn_weight(layer)
    assert not torch.isclose(second, first).any()
    layer.weight_precision.precision.fill_(4.0)  # the noise holds, the weight is of the present variance
    torch.testing.assert_close(drawn_weight(layer) - layer.weight, (second - layer.weight) * (3 / 2 / 4) ** 0.5)


def test_a_frozen_layer_draws_for_every_pass() -> None:
    layer = seeded(nn.Linear(3, 2).requires_grad_(False), Diagonal(sampling="batch"))
    x = torch.ones(1, 3)
    assert not torch.isclose(layer(x), layer(x)).any()


@pytest.mark.parametrize(
    "structure",
    [
        Diagonal(sampling="batch", antithetic=True),
        Diagonal(sampling="example", antithetic=True),
        Kronecker(sampling="batch", antithetic=True),
    ],
    ids=short,
)
def test_antithetic_passes_have_opposite_noise(structure: object) -> None:
    layer, x = seeded(nn.Linear(3, 2), structure), torch.eye(3)
    mean = layer.eval()(x).detach()
    first, second, third = passes(layer.train(), x) - mean
    torch.testing.assert_close(second, -first)
    assert not torch.isclose(third.abs(), first.abs()).any()


# ------------------------------------------------------------------------------------------- random streams
def passes(net: nn.Module, inputs: Tensor, count: int = 3) -> Tensor:
    """Outputs of passes with a draw each."""
    return torch.stack([spent(net, inputs) for _ in range(count)])


@pytest.mark.parametrize("structure", STREAMS, ids=short)
def test_the_generator_decides(structure: object) -> None:
    inputs, _ = images()
    first, again, other = (passes(seeded(convnet(), structure, seed), inputs) for seed in (1, 1, 2))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert not torch.isclose(first, other).any()


def test_layers_have_streams_of_their_own_from_the_global_one() -> None:
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        net = gaussianize(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), precision=Diagonal(sampling="batch"))
        before = torch.get_rng_state()
        draws.append([(drawn_weight(layer) - layer.weight).detach() for layer in net])
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(draws[0][0], draws[1][0])
    assert not torch.isclose(draws[0][0], draws[2][0]).any()
    assert not torch.isclose(draws[0][0], draws[0][1]).any()


@pytest.mark.parametrize("structure", STREAMS, ids=short)
@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_run_goes_on_after_loading_copying_and_pickling(structure: object, steps: int) -> None:
    """Also between two passes of opposite noise, and from a file that loads with weights_only."""
    inputs, _ = images()
    net, file = seeded(convnet(), structure), io.BytesIO()
    passes(net, inputs, steps) if steps else None
    torch.save(net.state_dict(), file)
    file.seek(0)
    loaded = seeded(convnet(5), structure, seed=7)
    passes(loaded, inputs)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    others = [loaded, copy.deepcopy(net), pickle.loads(pickle.dumps(net))]
    expected = passes(net, inputs)
    for other in others:
        torch.testing.assert_close(passes(other, inputs), expected, rtol=0, atol=0)


def test_a_copy_between_forward_and_backward_begins_a_pass_of_its_own() -> None:
    net = seeded(mlp(), Diagonal(sampling="batch"))
    x = torch.randn(4, 5, dtype=torch.float64)
    outputs = net(x)
    copied = copy.deepcopy(net)
    outputs.sum().backward()
    torch.testing.assert_close(passes(copied, x), passes(net, x), rtol=0, atol=0)


@pytest.mark.parametrize("structure", STREAMS, ids=short)
def test_stacked_networks_draw_what_single_ones_draw(structure: object) -> None:
    singles = [seeded(convnet(seed), structure, seed) for seed in range(3)]
    inputs = torch.stack([images(seed)[0] for seed in range(3)])
    plain = replicas.stack([convnet(seed) for seed in range(3)])
    stacks = [replicas.stack(singles), gaussianize(plain, structure)]
    streams = [stream(seed) for seed in range(3)]
    set_sampling(stacks[1], structure.sampling, streams, antithetic=structure.antithetic)
    expected = torch.stack([passes(net, x) for net, x in zip(singles, inputs, strict=True)], 1)
    for stacked in stacks:
        torch.testing.assert_close(passes(stacked, inputs), expected, rtol=1e-10, atol=1e-12)
    apart = replicas.unstack(stacks[0])
    expected = torch.stack([passes(net, x) for net, x in zip(apart, inputs, strict=True)], 1)
    torch.testing.assert_close(passes(stacks[0], inputs), expected, rtol=1e-10, atol=1e-12)


def test_checkpoints_of_networks_that_did_not_sample_and_the_reverse() -> None:
    drawn, still = seeded(mlp(), Diagonal(sampling="batch")), gaussianize(mlp())
    streams = drawn[0].sampler.get_extra_state()["streams"]
    drawn.load_state_dict(still.state_dict())
    torch.testing.assert_close(drawn[0].sampler.get_extra_state()["streams"], streams)
    drawn.load_state_dict(mlp(3).state_dict())
    still.load_state_dict(drawn.state_dict())
    assert torch.equal(still[0].weight, mlp(3)[0].weight)


def test_a_checkpoint_of_another_number_of_replicas_is_refused() -> None:
    drawn = seeded(mlp(), Diagonal(sampling="batch"))
    with pytest.raises(ValueError, match=r"sampler: expected a checkpoint with 1 random streams.* got 3"):
        drawn[0].sampler.set_extra_state(replicas.stack([drawn] * 3)[0].sampler.get_extra_state())


def test_collapse_takes_the_sampler_away() -> None:
    net = collapse(seeded(mlp(), Diagonal("sampled", "example")))
    assert not any(isinstance(module, WeightSampler) for module in net.modules())
    assert set(net.state_dict()) == set(mlp().state_dict())


# -------------------------------------------------------------------------------------------- recomputation
@pytest.mark.parametrize("structure", STREAMS, ids=short)
def test_activation_checkpointing_draws_the_same_again(structure: object) -> None:
    inputs, labels = images()
    gradients = []
    for recomputed in (False, True):
        net = seeded(convnet(), structure)
        for _ in range(2):
            with set_checkpoint_early_stop(False):  # all layers to the end
                outputs = checkpoint(net, inputs, use_reentrant=False) if recomputed else net(inputs)
            nn.functional.cross_entropy(outputs, labels).backward()
        gradients.append([parameter.grad for parameter in net.parameters()])
        gradients[-1] += [
            observer.curvature(net[0].weight.grad, 16)
            for observer in [net[0].observation_of("weight")]
            if "sampled" in str(structure)
        ]
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain, rtol=1e-12, atol=0)


def test_what_cannot_be_recomputed_is_refused() -> None:
    x = torch.randn(2, 3, requires_grad=True)
    layer = seeded(nn.Linear(3, 3), Diagonal(sampling="batch"))
    with pytest.raises(RuntimeError, match=r"computed in the backward pass, but .* set use_reentrant=False"):
        checkpoint(layer, x, use_reentrant=True).sum().backward()
    layer = seeded(nn.Linear(3, 3), Diagonal(sampling="example"))
    with pytest.raises(RuntimeError, match=r"used several times .* set sampling 'batch'"):
        checkpoint(lambda inputs: layer(layer(inputs)), x, use_reentrant=False).sum().backward()


# ------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("precision", "mode", "settings", "message"),
    [
        ("diagonal", "weights", {}, r"mode: expected one of mean, batch, example; got 'weights'"),
        ("diagonal", "batches", {}, r"did you mean 'batch'"),
        ("diagonal", "batch", {"layers": ["head"]}, r"layers: .*got 'head', which fits none"),
        ("diagonal", "batch", {"generator": [stream(), stream()]}, r"generator: expected one, got 2"),
        ("kronecker", "example", {}, r"mode: a GaussianLinear with a Kronecker .* use 'batch', or precision="),
        (Diagonal("sampled", "batch"), "mean", {}, r"mode: .* curvature='sampled' .* got 'mean'; use 'batch' or"),
    ],
)
def test_bad_arguments_are_refused(precision: object, mode: str, settings: dict, message: str) -> None:
    net = gaussianize(mlp(), precision=precision)
    before = [repr(module) for module in net.modules()]
    with pytest.raises(ValueError, match=message):
        set_sampling(net, mode, **settings)
    assert [repr(module) for module in net.modules()] == before


def test_refused_before_anything_changes() -> None:
    """The second layer cannot, so the first is left as it was."""
    net = gaussianize(mlp(), layers={"2": {"precision": "kronecker"}})
    with pytest.raises(ValueError, match="Kronecker"):
        set_sampling(net, "example")
    assert not any(isinstance(module, WeightSampler) for module in net.modules())


def test_as_many_generators_as_replicas() -> None:
    net = gaussianize(replicas.stack([mlp(seed) for seed in range(3)]))
    with pytest.raises(ValueError, match=r"generator: expected one, or one for each of 3 replicas, got 2"):
        set_sampling(net, "batch", [stream(), stream()])
    with pytest.raises(ValueError, match=r"sampling: expected one of mean, batch; got 'example'"):
        Kronecker(sampling="example")
