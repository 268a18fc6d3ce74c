"""gaussianize and collapse: in place, layer by layer, back and forth, and what they refuse."""

import copy
import pickle
import warnings

import pytest
import torch
from cases import assert_same_tensors, batch, convnet, gaussian_parameters, images, mlp, train
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrizations, prune
from torch.utils._python_dispatch import TorchDispatchMode

from clagrange import (
    DiagonalPrecision,
    GaussianConv2d,
    GaussianLinear,
    collapse,
    gaussianize,
    inject_variance,
    predict,
    replicas,
    variances,
)
from clagrange.gaussian import Diagonal, Kronecker, gaussian_blocks, gaussian_layers, owner_of, set_sampling
from clagrange.optim import EulerLagrange


def test_in_place_keeps_objects_hooks_references_and_outputs() -> None:
    net = convnet()
    calls = []
    handle = net[0].register_forward_hook(lambda *_: calls.append(1))
    reference, layers, parameters = net[5], list(net), dict(net.named_parameters())
    inputs, _ = images()
    before = net(inputs)
    result = gaussianize(net)

    assert result is net
    assert all(new is old for new, old in zip(net, layers, strict=True))
    assert type(reference) is GaussianLinear
    assert [type(layer) for _, layer in gaussian_layers(net)] == [GaussianConv2d] * 2 + [GaussianLinear] * 2
    assert list(dict(net.named_parameters())) == list(parameters)
    assert all(value is parameters[name] for name, value in net.named_parameters())
    torch.testing.assert_close(net(inputs), before, rtol=0, atol=0)
    assert len(calls) == 2
    handle.remove()


def test_every_mean_starts_at_its_prior() -> None:
    net = gaussianize(convnet(), prior_variance=0.5)
    fan_ins = {"0": 2 * 9, "2": 4 * 9, "5": 12, "7": 5}
    for name, variance in variances(net).items():
        torch.testing.assert_close(variance, torch.full_like(variance, 0.5 * 2 / fan_ins[name.split(".")[0]]))
    for _, mean, precision in gaussian_parameters(net):
        assert not precision.prior_mean.any()
        assert not precision.curvature.any()
        assert precision.precision.shape == mean.shape


def test_prior_mean_at_the_initial_weights() -> None:
    net = gaussianize(mlp(), prior_mean="initial")
    weights = {name: mean.detach().clone() for name, mean, _ in gaussian_parameters(net)}
    with torch.no_grad():
        net[0].weight.add_(1.0)
    for name, _, precision in gaussian_parameters(net):
        torch.testing.assert_close(precision.prior_mean, weights[name], rtol=0, atol=0)


def test_copy_leaves_the_original_alone() -> None:
    net = mlp()
    copied = gaussianize(net, copied=True)
    assert [type(layer) for layer in net if isinstance(layer, nn.Linear)] == [nn.Linear] * 3
    assert "0.weight_precision.precision" in copied.state_dict()
    assert "0.weight_precision.precision" not in net.state_dict()
    assert owner_of(net[0].weight) is None
    assert owner_of(copied[0].weight) == (copied[0], "weight")
    with torch.no_grad():
        copied[0].weight.zero_()
    assert net[0].weight.any()


def test_settings_by_layer_later_patterns_win_and_none_stays_deterministic() -> None:
    net = gaussianize(
        convnet(),
        layers={
            "*": {"prior_variance": 0.1},
            "[57]": {"prior_mean": "initial"},
            "7": {"prior_variance": 3.0},
            "0": None,
        },
    )
    assert type(net[0]) is nn.Conv2d
    found = {name: float(v.flatten()[0]) for name, v in variances(net).items() if "weight" in name}
    expected = {"2.weight": 0.1 * 2 / 36, "5.weight": 0.1 * 2 / 12, "7.weight": 3.0 * 2 / 5}
    assert found == pytest.approx(expected)
    torch.testing.assert_close(net[7].weight_precision.prior_mean, net[7].weight.detach())
    assert not net[2].weight_precision.prior_mean.any()


def test_a_pattern_after_none_makes_the_layer_gaussian_again() -> None:
    net = gaussianize(mlp(), layers={"*": None, "4": {}})
    assert [name for name, _ in gaussian_layers(net)] == ["4"]


def test_calling_it_again_changes_nothing() -> None:
    net = gaussianize(mlp(), prior_variance=0.3)
    with torch.no_grad():
        net[0].weight_precision.precision.mul_(7)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    gaussianize(net, prior_variance=1.0)
    assert_same_tensors(dict(net.state_dict()), before)


def test_calling_it_again_adds_new_layers() -> None:
    net = gaussianize(mlp())
    net.append(nn.Linear(3, 2).double())
    gaussianize(net)
    assert type(net[5]) is GaussianLinear
    assert owner_of(net[5].bias) == (net[5], "bias")


def test_stacked_network_with_a_prior_variance_for_each_replica() -> None:
    scales = torch.tensor([0.1, 1.0, 4.0])
    net = gaussianize(replicas.stack([mlp(seed) for seed in range(3)]), prior_variance=scales)
    for name, variance in variances(net).items():
        for replica, scale in enumerate(scales.tolist()):
            single = gaussianize(mlp(), prior_variance=scale)
            torch.testing.assert_close(variance[replica], variances(single)[name], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "diagonl"}, r"precision: expected one of .*diagonal.* did you mean 'diagonal'\?"),
        ({"prior_mean": "inital"}, r"prior_mean: expected one of zero, initial; .* did you mean 'initial'\?"),
        ({"prior_variance": -1.0}, r"prior_variance: expected a number in \(0, inf\), got -1"),
        ({"prior_variance": 0.0}, r"prior_variance: "),
        ({"layers": {"fc.haed": {}}}, r"layers: .*fc\.haed.*did you mean 'fc\.head'\?"),
        (
            {"layers": {"fc.*": {"prior_varience": 1.0}}},
            r"layers\['fc\.\*'\]: .* did you mean 'prior_variance'\?",
        ),
        ({"layers": {"fc.head": {"prior_variance": -2.0}}}, r"prior_variance: .*got -2"),
    ],
)
def test_bad_settings_are_refused_and_change_nothing(settings: dict, message: str) -> None:
    net = nn.ModuleDict({"fc": nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Linear(4, 2)})})
    with pytest.raises(ValueError, match=message):
        gaussianize(net, **settings)
    assert {type(module) for module in net["fc"].values()} == {nn.Linear}


@pytest.mark.parametrize("prior_variance", [torch.tensor([0.1, 0.2]), torch.tensor([0.1, 0.2, 0.3, 0.4])])
def test_a_prior_variance_for_each_replica_needs_a_stacked_network(prior_variance: torch.Tensor) -> None:
    """Also where its length happens to be that of the layer."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"replicas"):
        gaussianize(net, prior_variance=prior_variance)
    assert {type(layer) for layer in net} == {nn.Linear}


def test_network_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"module: expected a network with torch.nn.Linear .* got Sequential"):
        gaussianize(nn.Sequential(nn.ReLU(), nn.LayerNorm(3)))


# ------------------------------------------------------------------------------- layers by name and by type
def mixed() -> nn.ModuleDict:
    """Layers of several kinds."""
    return nn.ModuleDict(
        {
            "embedding": nn.Embedding(7, 4),
            "norm": nn.LayerNorm(4),
            "body": nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4, bias=False)),
            "head": nn.Linear(4, 3),
        }
    )


def gaussian_names(net: nn.Module) -> set[str]:
    return {name for name, _ in gaussian_layers(net)}


WITH_WEIGHTS = {"embedding", "body.0", "body.2", "head"}


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ({}, WITH_WEIGHTS),
        ({nn.Embedding: None}, WITH_WEIGHTS - {"embedding"}),
        ({nn.Linear: None, "head": {}}, {"embedding", "head"}),
        ({nn.Module: None, nn.LayerNorm: {}}, {"norm"}),
        ({nn.LayerNorm: {}}, WITH_WEIGHTS | {"norm"}),
        ({"norm": {}}, WITH_WEIGHTS | {"norm"}),
        ({"no*": {}, "body.1": {"prior_variance": 0.1}}, WITH_WEIGHTS | {"norm", "body.1"}),
        ({"*": {}}, WITH_WEIGHTS),
        ({"body*": {}, nn.Module: {}}, WITH_WEIGHTS),
        ({nn.modules.batchnorm._BatchNorm: {}, "body.*": {"prior_variance": 0.1}}, WITH_WEIGHTS | {"body.1"}),
        ({nn.LayerNorm: {}, "*": None}, set()),
        ({nn.LayerNorm: {}, "norm": None}, WITH_WEIGHTS),
    ],
)
def test_layers_by_name_pattern_and_type(layers: dict, expected: set[str]) -> None:
    assert gaussian_names(gaussianize(mixed(), layers=layers)) == expected


def test_parts_of_a_network_have_their_own_settings() -> None:
    net = gaussianize(
        mixed(),
        layers={
            nn.Linear: {"precision": Kronecker(refresh_every=3), "prior_variance": 0.5},
            "head": {"precision": "diagonal", "prior_mean": "initial"},
            "norm": {"precision": "kronecker", "prior_variance": 0.01},
        },
    )
    assert isinstance(net["embedding"].weight_precision, DiagonalPrecision)
    assert net["body"][0].weight_precision.refresh_every == 3
    assert isinstance(net["head"].weight_precision, DiagonalPrecision)
    assert torch.equal(net["head"].bias_precision.prior_mean, net["head"].bias.detach())
    assert isinstance(net["norm"].weight_precision, DiagonalPrecision)
    found = {name: float(v.flatten()[0]) for name, v in variances(net).items() if "weight" in name}
    assert found == pytest.approx(
        {
            "embedding.weight": 1,
            "norm.weight": 0.01,
            "body.0.weight": 0.25,
            "body.2.weight": 0.25,
            "head.weight": 0.25,
        }
    )


def test_keys_that_fit_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match=r"layers: .*embedding, norm, body\.0.* got 'Conv2d', which fits none"):
        gaussianize(mixed(), layers={nn.Conv2d: {}})
    with pytest.raises(ValueError, match=r"got 'hed', which fits none; did you mean 'head'"):
        gaussianize(mixed(), layers={"hed": {}})
    assert gaussian_names(mixed()) == set()


def test_attention_takes_its_output_projection_along() -> None:
    def network() -> nn.Module:
        return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

    everything = {"self_attn", "self_attn.out_proj", "linear1", "linear2"}
    assert gaussian_names(gaussianize(network())) == everything
    assert gaussian_names(gaussianize(network(), layers={"self_attn.out_proj": None})) == everything - {
        "self_attn.out_proj"
    }
    for key in ("self_attn", nn.MultiheadAttention):  # torch's attention never calls its output projection
        assert gaussian_names(gaussianize(network(), layers={key: None})) == {"linear1", "linear2"}
    attention = gaussianize(nn.MultiheadAttention(4, 2))
    assert gaussian_names(attention) == {"", "out_proj"}
    collapse(attention)
    assert type(attention) is nn.MultiheadAttention
    assert type(attention.out_proj) is NonDynamicallyQuantizableLinear


def test_layers_of_a_transformer_that_puts_the_sequence_first_are_refused() -> None:
    encoder = nn.TransformerEncoderLayer(8, 2, 16)
    with pytest.raises(
        ValueError, match=r"'linear1' .*the sequence in a TransformerEncoderLayer with batch_first="
    ):
        gaussianize(encoder)
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16), 1)
    with pytest.raises(ValueError, match=r"'layers\.0\.norm2' .*a TransformerDecoderLayer with batch_first="):
        gaussianize(decoder, layers={nn.Linear: None, "layers.0.norm2": {}})
    assert gaussian_names(encoder) | gaussian_names(decoder) == set()
    attention = gaussianize(encoder, layers={"linear?": None})  # it knows where its batch is
    assert gaussian_names(attention) == {"self_attn", "self_attn.out_proj"}
    attention(torch.randn(7, 3, 8)).sum().backward()
    assert {(layer.examples, layer.positions) for _, layer in gaussian_layers(attention)} == {(3, 21)}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")  # torch's encoder uses them
def test_transformers_train_and_take_their_fast_path_at_the_mean() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    net = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True).double()
    inputs = torch.randn(4, 5, 8, dtype=torch.float64)
    padding = torch.tensor([[False] * 5, [False] * 4 + [True]] * 2)
    gaussianize(net, "kronecker", layers={nn.LayerNorm: {"prior_variance": 0.01}})
    optimizer = EulerLagrange(net, lr=0.02, temperature=1e-3)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = net(inputs, src_key_padding_mask=padding)[~padding].square().mean()
        loss.backward()
        assert {(layer.examples, layer.positions) for _, layer in gaussian_layers(net)} == {(4, 20)}
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    net.eval()
    with torch.no_grad():
        fast = net(inputs, src_key_padding_mask=padding)
    slow = net(inputs, src_key_padding_mask=padding)
    torch.testing.assert_close(fast[~padding], slow[~padding], rtol=1e-10, atol=1e-10)
    assert not fast[padding].any()  # what torch's fused kernel makes of padding
    assert slow[padding].any()


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.LSTM(4, 4), r"type LSTM .*inside of one operation; unroll a torch\.nn\.LSTMCell"),
        (nn.GRU(4, 4), r"type GRU .*unroll a torch\.nn\.GRUCell"),
        (nn.RNN(4, 4), r"type RNN .*unroll a torch\.nn\.RNNCell"),
        (nn.Bilinear(4, 4, 2), r"type Bilinear .*not linear in its inputs"),
        (nn.EmbeddingBag(4, 4), r"type EmbeddingBag .*torch\.nn\.Embedding"),
        (nn.LazyLinear(4), r"type LazyLinear .*run the network once on a batch first"),
        (nn.LazyConv2d(4, 3), r"type LazyConv2d .*run the network once"),
        (nn.Embedding(4, 4, sparse=True), r"type Embedding .*with sparse=True"),
        (nn.Embedding(4, 4, scale_grad_by_freq=True), r"type Embedding .*with scale_grad_by_freq=True"),
        (nn.Embedding(4, 4, max_norm=1.0), r"type Embedding .*with max_norm=1\.0"),
        (nn.Embedding.from_pretrained(torch.ones(4, 4), padding_idx=1), r"type Embedding .*padding_idx=1 is"),
        (parametrizations.weight_norm(nn.Linear(4, 4)), r"type ParametrizedLinear .*remove_parametrizations"),
        (parametrizations.spectral_norm(nn.Conv1d(4, 4, 2)), r"type ParametrizedConv1d .*other parameters"),
        (parametrizations.orthogonal(nn.Linear(4, 4)), r"type ParametrizedLinear .*other parameters"),
        (parametrizations.weight_norm(nn.LSTMCell(4, 4), "weight_hh"), r"type ParametrizedLSTMCell "),
        (prune.identity(nn.Linear(4, 4), "weight"), r"type Linear .*other parameters"),
    ],
)
def test_layers_that_cannot_be_gaussian_are_refused_by_name(layer: nn.Module, reason: str) -> None:
    net = nn.ModuleDict({"inner": nn.ModuleDict({"odd": layer}), "head": nn.Linear(4, 2)})
    with pytest.raises(ValueError, match=rf"layer 'inner\.odd' of {reason}.*layers=\{{'inner\.odd': None\}}"):
        gaussianize(net)
    assert gaussian_names(net) == set()
    gaussianize(net, layers={"inner.odd": None})
    assert gaussian_names(net) == {"head"}


def test_what_stays_deterministic_without_being_refused() -> None:
    class Own(nn.Linear):
        """A layer that may do anything with its weight."""

    net = nn.Sequential(nn.Linear(4, 4), nn.PReLU(), Own(4, 4), nn.LazyBatchNorm1d(), nn.InstanceNorm1d(4))
    assert gaussian_names(gaussianize(net)) == {"0"}


def test_a_lazy_layer_that_has_met_a_batch_becomes_gaussian() -> None:
    net = nn.Sequential(nn.LazyLinear(3))
    net(torch.zeros(2, 5))
    assert gaussian_names(gaussianize(net)) == {"0"}


def test_parametrized_layers_train_beside_gaussian_ones() -> None:
    net = nn.Sequential(parametrizations.weight_norm(nn.Linear(5, 4)), nn.ReLU(), nn.Linear(4, 3)).double()
    gaussianize(net, layers={"0": None})
    before = [parameter.detach().clone() for parameter in net.parameters()]
    train(net, EulerLagrange(net, lr=0.05, temperature=1e-3), range(3))
    assert not any(map(torch.equal, net.parameters(), before))


@pytest.mark.parametrize("precision", ["diagonal", "kronecker"])
def test_a_gaussian_layer_is_not_parametrized(precision: str) -> None:
    net = gaussianize(mlp(), precision)
    with pytest.raises(RuntimeError, match=r"'weight' of a GaussianLinear; .*clagrange\.collapse"):
        parametrizations.weight_norm(net[0])
    train(net, EulerLagrange(net, lr=0.05, temperature=1e-3), range(1))
    parametrizations.weight_norm(collapse(net)[0])


# ------------------------------------------------------------------------------------------ wide and one-hot
def test_a_factor_that_is_diagonal_for_its_width_is_told_of() -> None:
    net = nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 3), nn.Embedding(50, 3))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        gaussianize(net, Kronecker(widest=8))
    assert [str(warning.message).split(",")[0] for warning in told] == [
        "layer '0': its weight has 9 outputs",
        "layer '2': its weight has 10 inputs",
    ]
    assert net[0].weight_precision.diagonal_sides == (True, False)
    assert net[2].weight_precision.diagonal_sides == (False, True)


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return result


@pytest.mark.parametrize("precision", ["diagonal", "kronecker"])
def test_a_large_vocabulary_costs_no_more_than_its_table(precision: str) -> None:
    net = gaussianize(nn.Embedding(2000, 3), precision)
    optimizer = EulerLagrange(net, lr=0.05, temperature=1e-3)
    with Largest() as largest:
        for step in range(2):
            optimizer.zero_grad()
            tokens = torch.randint(2000, (16, 32), generator=torch.Generator().manual_seed(step))
            net(tokens).square().mean().backward()
            optimizer.step()
    assert largest.numbers <= 2000 * 3


@pytest.mark.parametrize("precision", ["diagonal", "kronecker"])
def test_padding_is_neither_learnt_nor_drawn(precision: str) -> None:
    net = nn.Sequential(nn.Embedding(7, 4, padding_idx=3), nn.Flatten(), nn.Linear(8, 2)).double()
    gaussianize(net, precision, layers={"2": None})
    tokens = torch.tensor([[3, 3], [1, 3], [2, 5]])
    optimizer = EulerLagrange(net, lr=0.05, temperature=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        net(tokens).square().mean().backward()
        optimizer.step()
        inject_variance(net, strength=1.0)
    assert not net[0].weight[3].any()
    assert net[0].weight[[0, 1, 2, 4, 5, 6]].all()
    variance = predict(net, tokens, samples=8).variance
    assert not variance[0].any()
    assert variance[1:].all()
    set_sampling(net, "batch")
    assert not net[0](tokens)[0].any()


# ---------------------------------------------------------------------------------------- shared and frozen
class Tied(nn.Module):
    """A language model whose output layer has the weights of its embedding."""

    def __init__(self, **settings: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4, **settings)
        self.body = nn.Linear(4, 4)
        self.output = nn.Linear(4, 7)
        self.output.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.output(self.body(self.embedding(tokens)).tanh())


TOKENS = torch.randint(7, (6, 3), generator=torch.Generator().manual_seed(0))


def train_tied(net: Tied, steps: int = 3) -> None:
    optimizer = EulerLagrange(net, lr=0.02, temperature=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(TOKENS).flatten(0, 1), TOKENS.roll(1, 1).flatten()).backward()
        optimizer.step()


@pytest.mark.parametrize("precision", ["diagonal", "kronecker"])
def test_a_shared_weight_has_one_precision(precision: str) -> None:
    torch.manual_seed(0)
    net = Tied(padding_idx=2).double()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        gaussianize(net, precision)
    names = ["embedding", "output"] if precision == "kronecker" else []
    assert [str(warning.message).split(":")[0] for warning in told] == [f"layer {name!r}" for name in names]
    assert net.output.weight is net.embedding.weight
    assert owner_of(net.output.weight) == (net.embedding, "weight")
    assert isinstance(net.embedding.weight_precision, DiagonalPrecision)
    assert isinstance(net.body.weight_precision, DiagonalPrecision) == (precision == "diagonal")
    assert [(name, block.names) for name, block in gaussian_blocks(net) if name != "body"] == [
        ("embedding", ("weight",)),
        ("output", ("bias",)),
    ]
    assert "output.weight" not in variances(net)
    optimizer = EulerLagrange(net, lr=0.02, temperature=1e-3, curvature_decay=0.0)
    nn.functional.cross_entropy(net(TOKENS).flatten(0, 1), TOKENS.roll(1, 1).flatten()).backward()
    gradient, n = net.embedding.weight.grad.clone(), net.embedding.examples
    assert n == 6
    optimizer.step()
    torch.testing.assert_close(net.embedding.weight_precision.curvature, n * gradient.square())

    copied = pickle.loads(pickle.dumps(copy.deepcopy(net)))
    train_tied(net)
    train_tied(copied)
    assert_same_tensors(dict(copied.state_dict()), dict(net.state_dict()))
    assert copied.output.weight is copied.embedding.weight
    other = gaussianize(Tied(padding_idx=2).double())
    if precision == "diagonal":
        other.load_state_dict(net.state_dict())
        assert_same_tensors(dict(other.state_dict()), dict(net.state_dict()))
    assert net.embedding.weight[2].any()  # a row of the output layer like the others
    with torch.no_grad():
        expected = net(TOKENS)
    types = [type(layer) for layer in Tied().modules()]
    assert [type(layer) for layer in collapse(net).modules()] == types
    torch.testing.assert_close(net(TOKENS), expected, rtol=0, atol=0)
    assert owner_of(net.output.weight) is None


def test_a_layer_may_share_the_weight_of_a_gaussian_one_later() -> None:
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU())
    gaussianize(net)
    net.append(nn.Linear(4, 4))
    net[2].weight = net[0].weight
    gaussianize(net)
    assert [(name, block.names) for name, block in gaussian_blocks(net)] == [("0", ("weight",)), ("2", ("bias",))]
    with pytest.raises(ValueError, match=r"mode: a GaussianLinear that shares its weight with another"):
        set_sampling(net, "batch", layers=["0"])


@pytest.mark.parametrize("settings", [{"precision": "kronecker"}, {"precision": Diagonal("per_example")}])
def test_sharing_with_a_layer_that_is_gaussian_for_itself_is_refused(settings: dict) -> None:
    net = nn.Sequential(nn.Linear(4, 4, bias=False))
    gaussianize(net, **settings)
    net.append(nn.Linear(4, 4))
    net[1].weight = net[0].weight
    with pytest.raises(ValueError, match=r"layer '1' shares its weight with a GaussianLinear .*\{'1': None\}"):
        gaussianize(net)
    assert type(net[1]) is nn.Linear


def test_a_weight_that_a_deterministic_layer_uses_too_is_shared() -> None:
    net = Tied().double()
    with pytest.warns(
        UserWarning, match=r"layer 'embedding': its weight is shared with another layer.*Kronecker"
    ):
        gaussianize(net, "kronecker", layers={"output": None})
    assert isinstance(net.embedding.weight_precision, DiagonalPrecision)
    train_tied(net)


def test_a_parameter_object_that_moved_from_a_gaussian_layer_outside_is_taken_over() -> None:
    old = gaussianize(nn.Linear(4, 4))
    net = nn.Sequential(nn.Linear(4, 4))
    net[0].weight = old.weight
    gaussianize(net)
    assert owner_of(net[0].weight) == (net[0], "weight")


def frozen_state(net: nn.Module, *names: str) -> dict[str, torch.Tensor]:
    state = {name: value for name, value in net.state_dict().items() if name.startswith(names)}
    return {name: value.clone() for name, value in state.items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("precision", ["diagonal", "kronecker"])
def test_frozen_layers_stay_as_they_are_until_they_are_unfrozen(precision: str) -> None:
    net = mlp()
    net[2].requires_grad_(False)
    gaussianize(net, precision)
    optimizer = EulerLagrange(net, lr=0.02, temperature=1e-3)
    train(net, optimizer, range(2))
    net[0].requires_grad_(False)
    optimizer.zero_grad()
    before, head = frozen_state(net, "0", "2"), [net[4].weight.clone(), net[4].bias.clone()]
    train(net, optimizer, range(2, 5))
    inject_variance(net, strength=1.0, widen=0.5)
    assert_same_tensors(frozen_state(net, "0", "2"), before)
    assert not any(map(torch.equal, (net[4].weight, net[4].bias), head))
    assert net[0].examples == net[2].examples == 0
    net.requires_grad_(True)
    train(net, optimizer, range(5, 8))
    for name in ("0.weight", "0.bias", "2.weight", "2.bias"):
        assert not torch.equal(net.state_dict()[name], before[name])
    fresh = variances(gaussianize(mlp(), precision))
    assert not any(torch.equal(variances(net)[name], fresh[name]) for name in fresh)


@pytest.mark.parametrize("precision", ["diagonal", "kronecker"])
@pytest.mark.parametrize(("frozen", "trained"), [("weight", "bias"), ("bias", "weight")])
def test_a_layer_that_is_frozen_in_part(precision: str, frozen: str, trained: str) -> None:
    net = mlp()
    net[2].get_parameter(frozen).requires_grad_(False)
    gaussianize(net, precision)
    optimizer = EulerLagrange(net, lr=0.02, temperature=1e-3)
    before, other = frozen_state(net, f"2.{frozen}"), frozen_state(net, f"2.{trained}")
    train(net, optimizer, range(4))
    assert_same_tensors(frozen_state(net, f"2.{frozen}"), before)
    now = frozen_state(net, f"2.{trained}")
    assert not torch.equal(now[f"2.{trained}"], other[f"2.{trained}"])
    assert not torch.equal(variances(net)[f"2.{trained}"], torch.full_like(now[f"2.{trained}"], 2 / 6))
    net.requires_grad_(True)
    train(net, optimizer, range(4, 8))
    assert not torch.equal(net[2].get_parameter(frozen), before[f"2.{frozen}"])
    assert all(value.isfinite().all() for value in variances(net).values())


def test_a_kronecker_pair_that_is_frozen_in_part_later() -> None:
    net = gaussianize(mlp(), "kronecker")
    optimizer = EulerLagrange(net, lr=0.02, temperature=1e-3)
    train(net, optimizer, range(2))
    net[2].weight.requires_grad_(False)
    weight, bias = net[2].weight.detach().clone(), net[2].bias.detach().clone()
    train(net, optimizer, range(2, 5))
    inject_variance(net, strength=1.0)
    assert torch.equal(net[2].weight, weight)
    assert not torch.equal(net[2].bias, bias)


def test_a_layer_used_twice_is_one_layer() -> None:
    layer = nn.Linear(4, 4)
    net = gaussianize(nn.Sequential(layer, nn.ReLU(), layer))
    assert [name for name, _ in gaussian_layers(net)] == ["0"]


def test_collapse_is_the_inverse() -> None:
    net = convnet()
    keys, types = list(net.state_dict()), [type(layer) for layer in net]
    inputs, _ = images()
    expected = net(inputs)
    parameters = list(net.parameters())
    result = collapse(gaussianize(net))
    assert result is net
    assert list(net.state_dict()) == keys
    assert [type(layer) for layer in net] == types
    assert all(new is old for new, old in zip(net.parameters(), parameters, strict=True))
    assert all(owner_of(parameter) is None for parameter in parameters)
    assert [vars(layer).keys() for layer in net] == [vars(layer).keys() for layer in convnet()]
    torch.testing.assert_close(net(inputs), expected, rtol=0, atol=0)


def test_collapse_of_a_stacked_network() -> None:
    net = replicas.stack([mlp(seed) for seed in range(3)])
    types = [type(layer) for layer in net]
    inputs = torch.stack([batch(seed)[0] for seed in range(3)])
    expected = net(inputs)
    collapse(gaussianize(net))
    assert [type(layer) for layer in net] == types
    torch.testing.assert_close(net(inputs), expected, rtol=0, atol=0)


def test_layers_made_directly_equal_gaussianized_ones() -> None:
    torch.manual_seed(3)
    linear = GaussianLinear(4, 3, prior_variance=0.2, dtype=torch.float64)
    convolution = GaussianConv2d(2, 4, 3, stride=2, groups=2, bias=False, prior_mean="initial")
    torch.manual_seed(3)
    plain = nn.Sequential(nn.Linear(4, 3, dtype=torch.float64))
    other = nn.Conv2d(2, 4, 3, stride=2, groups=2, bias=False)
    gaussianize(plain, prior_variance=0.2)
    gaussianize(other, prior_mean="initial")
    assert_same_tensors(dict(linear.state_dict()), dict(plain[0].state_dict()))
    assert_same_tensors(dict(convolution.state_dict()), dict(other.state_dict()))
    assert float(convolution.weight_precision.variance().mean()) == pytest.approx(2 / (1 * 9))


def test_parameters_of_no_gaussian_network_are_asked_for() -> None:
    with pytest.raises(ValueError, match=r"call clagrange.gaussianize\(module\) first"):
        variances(mlp())
