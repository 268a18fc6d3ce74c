"""Which layer feeds which: found by tracing, given by hand, or refused by name."""

from collections.abc import Callable

import pytest
import torch
from cases import assert_same_tensors, batch, step_with, still, tensors_of
from torch import Tensor, nn
from torch.nn import functional as F

from clagrange import gaussianize, replicas
from clagrange.interventions import ContinualBackprop
from clagrange.networks import initialize
from clagrange.wiring import connections, output_layers


class Plain(nn.Module):
    """Not a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(5, 6)
        self.fc2 = nn.Linear(6, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.fc2(self.fc1(inputs).relu())


class Deciding(Plain):
    """Its way depends on numbers."""

    def forward(self, inputs: Tensor) -> Tensor:
        return self.fc2(self.fc1(inputs) if inputs.sum() > 0 else self.fc1(-inputs))


class Residual(nn.Module):
    """A stem, a block whose output is added to its input, pooling and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.first = nn.Conv2d(8, 6, 3, padding=1, bias=False)
        self.block_norm = nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 8, 1)
        self.fc = nn.Linear(8, 4)
        self.out = nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        stream = F.relu(self.norm(self.stem(inputs)))
        stream = stream + self.second(torch.relu(self.block_norm(self.first(stream))))
        pooled = F.adaptive_avg_pool2d(F.max_pool2d(stream, 2), 1)
        return self.out(F.dropout(self.fc(pooled.view(pooled.size(0), -1)), 0.0).tanh())


class Function(nn.Module):
    """Layers a and b (6 units each) with a function between."""

    def __init__(self, function: Callable[["Function", Tensor], Tensor], width: int = 6) -> None:
        super().__init__()
        self.a = nn.Linear(5, 6)
        self.b = nn.Linear(width, 5)
        self.c = nn.Linear(5, 6)
        self.table = nn.Embedding(7, 6)
        self.attention = nn.MultiheadAttention(6, 2)
        self.function = function

    def forward(self, inputs: Tensor) -> Tensor:
        return self.function(self, inputs)


def links(net: nn.Module) -> list[tuple[str, list[str], list[str], list[str]]]:
    """Name, producers, consumers and norms of every connection."""
    names = {module: name for name, module in net.named_modules()}
    return [
        (
            link.name,
            *([names[module] for module in group] for group in (link.producers, link.consumers, link.norms)),
        )
        for link in connections(net)
    ]


def test_residual_sums_norms_and_functions_are_followed() -> None:
    net = Residual()
    assert links(net) == [
        ("stem", ["stem", "second"], ["first", "fc"], ["norm"]),
        ("first", ["first"], ["second"], ["block_norm"]),
        ("fc", ["fc"], ["out"], []),
    ]
    assert [name for name, _ in output_layers(net)] == ["out"]


def test_a_traced_chain_of_any_form() -> None:
    net = Plain()
    expected = [("fc1", ["fc1"], ["fc2"], [])]
    assert links(net) == links(gaussianize(Plain())) == expected
    sequence = nn.Sequential(*Plain().children())
    stacked = replicas.stack([sequence, sequence])
    assert links(stacked) == [("0", ["0"], ["1"], [])]
    assert connections(stacked)[0].stacked


@pytest.mark.parametrize(
    "function",
    [
        lambda net, x: (net.b(net.a(x)), net.c(x)),
        lambda net, x: net.b(F.gelu(net.a(x).clamp(min=0.0)) * 2.0 + 1.0),
        lambda net, x: F.log_softmax(net.b(net.a(x)), -1),
        lambda net, x: net.b(net.a(x)) + x,
    ],
)
def test_only_what_layers_make_and_layers_read_is_hidden(function) -> None:
    assert links(Function(function)) == [("a", ["a"], ["b"], [])]


def test_sums_with_what_no_layer_makes_are_left_out() -> None:
    """A stream to which an embedding or the inputs are added cannot start over; what lies beside it can."""
    net = Function(lambda net, x: net.c(net.b(net.a(x).relu()) + x))
    assert links(net) == [("a", ["a"], ["b"], [])]
    with_table = Function(lambda net, x: net.b(net.a(x) + net.table.weight[0] + net.table(x.long())[0]))
    with pytest.raises(ValueError, match="at least two linear or convolution layers"):
        connections(with_table)


def test_units_beside_themselves_as_of_a_concatenated_relu() -> None:
    net = Function(lambda net, x: net.b(torch.cat([net.a(x).relu(), (-net.a(x)).relu()], -1)), 12)
    with pytest.raises(ValueError, match="'a' is used more than once"):
        connections(net)

    def doubled(net: Function, x: Tensor) -> Tensor:
        h = net.a(x)
        return net.b(torch.cat([h.relu(), (-h).relu()], -1))

    net = Function(doubled, 12).double()
    (link,) = connections(net)
    columns = torch.arange(12.0).double()
    assert link.activations(columns.expand(2, 12)).tolist() == 2 * [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]
    assert link.mean_over_copies(columns).tolist() == [3, 4, 5, 6, 7, 8]
    assert link.outgoing(columns[:6]).tolist() == [[0, 1, 2, 3, 4, 5] * 2]


@pytest.mark.parametrize(
    ("function", "rectified"),
    [
        (lambda net, x: net.b(F.relu(net.a(x))), True),
        (lambda net, x: net.b(net.a(x).relu().tanh()), False),
        (lambda net, x: net.b(net.a(x)), False),
        (lambda net, x: net.b(net.a(x).relu() - 1.0), False),
    ],
)
def test_what_is_known_not_to_be_negative(function, rectified: bool) -> None:
    (link,) = connections(Function(function))
    assert link.rectified == (rectified,)


def test_a_pool_keeps_the_sign_and_a_norm_does_not() -> None:
    layers = [nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3)]
    assert connections(nn.Sequential(*layers))[0].rectified == (True,)
    layers.insert(2, nn.BatchNorm2d(4))
    assert connections(nn.Sequential(*layers))[0].rectified == (False,)


# --------------------------------------------------------------------------------------- where it cannot be told
@pytest.mark.parametrize(
    ("function", "width", "message"),
    [
        (
            lambda net, x: net.b(net.a(x).unflatten(-1, (2, 3)).flatten(-2)),
            6,
            r"past 'unflatten' .* units of 'a'",
        ),
        (lambda net, x: net.b(torch.cat([net.a(x), net.c(x)], -1)), 12, r"past 'cat' \(cat\)"),
        (
            lambda net, x: net.b(net.attention(*[net.a(x)] * 3)[0]),
            6,
            r"past 'attention' of type MultiheadAttention",
        ),
        (lambda net, x: net.b(net.a(x)[:, :3]), 3, r"past 'getitem' .* layers=\['fc1', 'fc2', \.\.\.\]"),
        (
            lambda net, x: net.b(net.c(net.b(net.a(x)))),
            6,
            r"layer 'b' is used more than once; give the chain by hand",
        ),
    ],
    ids=["unflatten", "cat", "attention", "slice", "twice"],
)
def test_what_cannot_be_told_is_named_with_the_remedy(function, width: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}"):
        connections(Function(function, width))


def test_what_cannot_be_traced_is_named_and_the_map_can_be_given() -> None:
    net = nn.Sequential(nn.Linear(5, 5), nn.Sequential(nn.ReLU(), Deciding())).double()
    with pytest.raises(
        ValueError, match=r"in '1\.1' of type Deciding, which torch\.fx does not trace .* by hand"
    ):
        connections(net)
    for layers in (["1.1.fc1", "1.1.fc2"], {"1.1.fc1": "1.1.fc2"}, {"1.1.fc1": ["1.1.fc2"], "0": "1.1.fc1"}):
        initialize(net, torch.Generator().manual_seed(0))
        method = ContinualBackprop(replacement_rate=1.0, maturity=0, layers=layers)
        method.on_start(net, still(net))
        step_with(net, still(net), method, *batch())
        assert not net[1][1].fc2.weight.any()
        assert bool(net[1][1].fc1.weight.any()) == ("0" not in layers)


def test_what_cannot_be_traced_is_watched_on_inputs() -> None:
    """The same as is found by tracing; nothing of the network changes, and no hook stays."""

    class Watched(Residual):
        def forward(self, inputs: Tensor) -> Tensor:
            return super().forward(inputs if inputs.sum() > 0 else 1.0 - inputs)

    net = Watched()
    state = tensors_of(net)
    found = connections(net, inputs=[torch.randn(2, 2, 6, 6)])
    names = {module: name for name, module in net.named_modules()}
    assert [
        (
            link.name,
            *([names[module] for module in group] for group in (link.producers, link.consumers, link.norms)),
        )
        for link in found
    ] == links(Residual())
    assert net.training
    assert_same_tensors(tensors_of(net), state)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in net.modules())
    slicing = Function(lambda net, x: net.b(net.a(x if x.sum() > 0 else -x)[:, :3]), 3)
    with pytest.raises(ValueError, match=r"past 'getitem' .* which takes the units of 'a'"):
        connections(slicing, inputs=[torch.ones(2, 5)])


@pytest.mark.parametrize("again", [False, True])
def test_an_intervention_watches_the_first_training_batch(again: bool) -> None:
    """As if it had been told; evaluation before it, and a start without a batch, change nothing."""
    nets, methods = [], []
    for layers in (None, ["0", "1.1.fc1", "1.1.fc2"]):
        net = nn.Sequential(nn.Linear(5, 5), nn.Sequential(nn.ReLU(), Deciding())).double()
        initialize(net, torch.Generator().manual_seed(0))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        method = ContinualBackprop(replacement_rate=0.1, maturity=2, layers=layers)
        method.on_start(net, optimizer)
        with torch.no_grad():
            net(batch()[0])
        for step in range(12):
            if again and step in (0, 6):
                method.on_start(net, optimizer)
            step_with(net, optimizer, method, *batch(step))
        nets.append(net)
        methods.append(method)
    assert_same_tensors(tensors_of(nets[0]), tensors_of(nets[1]))
    assert_same_tensors(methods[0].state_dict(), methods[1].state_dict())
    assert bool((methods[0].state["0"]["age"] < 12).any())


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (["fc1", "fc3"], r"layers: expected names of linear or convolution layers \(fc1, fc2\); got 'fc3'"),
        ({"fc1": ["fc2", "fc3"]}, r"layers: expected names of linear .* got 'fc3'"),
        (["fc2", "fc1"], r"layers: 'fc2' has 3 units, but 'fc1' takes 5 inputs"),
        (["fc1"], r"at least two linear or convolution layers"),
    ],
)
def test_bad_chains_are_refused(layers, message: str) -> None:
    net = Plain()
    with pytest.raises(ValueError, match=message):
        ContinualBackprop(layers=layers).on_start(net, still(net))


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (nn.Sequential(nn.Linear(5, 3)), "at least two linear or convolution layers"),
        (nn.Linear(5, 3), "at least two linear or convolution layers"),
        (nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3, groups=2)), r"'1' is a grouped convolution"),
        (
            nn.Sequential(nn.Linear(5, 4), nn.LayerNorm((7, 4)), nn.Linear(4, 3)),
            r"\(7, 4\) entries of '1' .* of '0'",
        ),
    ],
)
def test_networks_that_it_does_not_know_are_refused(net: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ContinualBackprop().on_start(net, still(net))


@pytest.mark.parametrize("place", [0, 2], ids=["makes units", "takes units"])
def test_weights_computed_from_others_are_refused(place: int) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    nn.utils.parametrizations.weight_norm(net[place])
    with pytest.raises(ValueError, match=rf"'{place}' is computed from other parameters, .*remove_param"):
        connections(net)


def test_pooling_dropout_and_nesting_are_passed() -> None:
    net = nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Sequential(nn.Linear(16, 5), nn.Tanh()),
        nn.Linear(5, 3),
    )
    assert [(link.name, link.units, link.copies) for link in connections(net)] == [("0.0", 4, 4), ("3.0", 5, 1)]
