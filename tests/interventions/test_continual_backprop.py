"""Continual backprop: which units go, what exactly is reset, and that the outputs do not jump."""

import math

import numpy as np
import oracles
import pytest
import torch
from cases import R, assert_same_tensors, backward, batch, convnet, images, mlp
from torch import Tensor, nn
from torch.optim import Optimizer

from clagrange import gaussianize, replicas
from clagrange.gaussian import owner_of
from clagrange.interventions import ContinualBackprop
from clagrange.optim import EulerLagrange
from clagrange.wiring import Connection, connections


def step(
    net: nn.Module, optimizer: Optimizer, method: ContinualBackprop, inputs: Tensor, targets: Tensor
) -> None:
    backward(net, optimizer, inputs, targets)
    optimizer.step()
    method.on_step(net, optimizer)


def still(net: nn.Module) -> Optimizer:
    """An optimizer that changes nothing."""
    return torch.optim.SGD(net.parameters(), lr=0.0)


def ages(method: ContinualBackprop, layer: str = "0") -> Tensor:
    return method.state[layer]["age"]


# ------------------------------------------------------------------------------------------ which units go
def test_a_dead_unit_comes_back() -> None:
    net = mlp()
    with torch.no_grad():
        net[0].bias[2] = -100.0
    before = {name: value.clone() for name, value in net.state_dict().items()}
    method, inputs = ContinualBackprop(replacement_rate=1 / 6, maturity=4, layers=["0", "2"]), batch(size=64)
    optimizer = still(net)
    method.on_start(net, optimizer)
    assert not net[:2](inputs[0])[:, 2].any()
    for _ in range(4):
        step(net, optimizer, method, *inputs)
    assert_same_tensors(dict(net.state_dict()), before)
    step(net, optimizer, method, *inputs)

    assert net[:2](inputs[0])[:, 2].any()
    bound = math.sqrt(2) * math.sqrt(3 / 5)
    assert net[0].weight[2].abs().max() <= bound
    assert not torch.equal(net[0].weight[2], before["0.weight"][2])
    assert net[0].bias[2] == 0
    assert not net[2].weight[:, 2].any()
    others = torch.arange(6) != 2
    assert torch.equal(net[0].weight[others], before["0.weight"][others])
    assert torch.equal(net[2].weight[:, others], before["2.weight"][:, others])
    assert torch.equal(net[2].bias, before["2.bias"])  # the dead unit contributed nothing
    assert ages(method).tolist() == [5, 5, 0, 5, 5, 5]


def test_new_weights_are_uniform_within_the_bound() -> None:
    from scipy import stats

    net = nn.Sequential(nn.Linear(50, 40), nn.ReLU(), nn.Linear(40, 2)).double()
    method = ContinualBackprop(replacement_rate=1.0, maturity=0, gain=2.0)
    optimizer = still(net)
    method.on_start(net, optimizer)
    step(net, optimizer, method, torch.randn(8, 50, dtype=torch.float64), torch.randint(2, (8,)))
    bound = 2 * math.sqrt(3 / 50)
    law = stats.uniform(-bound, 2 * bound)
    assert stats.kstest(net[0].weight.detach().flatten().numpy(), law.cdf).pvalue > 0.01


@pytest.mark.parametrize("utility", ["contribution", "zero_contribution", "adaptable_contribution"])
def test_a_planted_useless_unit_goes_first(utility: str) -> None:
    net = mlp()
    with torch.no_grad():
        net[2].weight[:, 4] *= 1e-3
        net[0].bias.fill_(1.0)
    method = ContinualBackprop(replacement_rate=1 / 6, maturity=2, utility=utility)
    optimizer = still(net)
    method.on_start(net, optimizer)
    for _ in range(3):
        step(net, optimizer, method, *batch())
    assert ages(method).tolist() == [3, 3, 3, 3, 0, 3]


def test_a_constant_unit_is_useless_to_the_utility_that_subtracts_the_mean() -> None:
    """Unit 1 is large and constant: most useful by its contribution, least by what varies."""
    gone = {}
    for utility in ("contribution", "zero_contribution"):
        net = mlp()
        with torch.no_grad():
            net[0].weight[1] = 0.0
            net[0].bias.fill_(1.0)
            net[0].bias[1] = 50.0
        method = ContinualBackprop(replacement_rate=1 / 6, maturity=2, utility=utility)
        optimizer = still(net)
        method.on_start(net, optimizer)
        for _ in range(3):
            step(net, optimizer, method, *batch())
        gone[utility] = (ages(method) == 0).nonzero().flatten().tolist()
    assert gone["zero_contribution"] == [1]
    assert gone["contribution"] != [1]


def test_only_mature_units_are_replaced_and_all_in_turn() -> None:
    net, method = mlp(), ContinualBackprop(replacement_rate=1.0, maturity=7)
    optimizer = still(net)
    method.on_start(net, optimizer)
    replaced_at = []
    for number in range(1, 25):
        step(net, optimizer, method, *batch(number))
        if not ages(method).any():
            replaced_at.append(number)
        else:
            assert len(set(ages(method).tolist())) == 1
        assert ages(method).max() <= 8
    assert replaced_at == [8, 16, 24]


@pytest.mark.parametrize(("rate", "maturity"), [(1 / 64, 10), (3 / 64, 0), (19 / 64, 5)])  # exact in binary
def test_exact_number_over_many_steps(rate: float, maturity: int) -> None:
    """The counter loses nothing: after n steps floor(Σ rate · mature units) units were replaced."""
    net, method = mlp(), ContinualBackprop(replacement_rate=rate, maturity=maturity)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    method.on_start(net, optimizer)
    owed = {"0": 0.0, "2": 0.0}
    replaced = {"0": 0, "2": 0}
    for number in range(300):
        before = {layer: ages(method, layer).clone() for layer in owed}
        step(net, optimizer, method, *batch(number % 5))
        for layer in owed:
            owed[layer] += rate * int((before[layer] + 1 > maturity).sum())
            replaced[layer] += int((ages(method, layer) == 0).sum())
            assert replaced[layer] == math.floor(owed[layer])
    assert min(replaced.values()) > 5


def test_rate_zero_replaces_nothing() -> None:
    nets = [mlp() for _ in range(2)]
    for net, rate in zip(nets, (0.0, None), strict=True):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        method = ContinualBackprop(replacement_rate=rate, maturity=0) if rate is not None else None
        if method:
            method.on_start(net, optimizer)
        for number in range(10):
            backward(net, optimizer, *batch(number))
            optimizer.step()
            if method:
                method.on_step(net, optimizer)
    assert_same_tensors(dict(nets[0].state_dict()), dict(nets[1].state_dict()))


# -------------------------------------------------------------------------------------- utilities and order
class Watcher:
    """Records the inputs of every consumer by hooks of its own."""

    def __init__(self, links: list[Connection]) -> None:
        self.entering: dict[str, Tensor] = {}
        for link in links:
            link.consumer.register_forward_pre_hook(self._hook(link.name))

    def _hook(self, name: str):
        def note(_: nn.Module, args: tuple[Tensor]) -> None:
            self.entering[name] = args[0].detach()

        return note


def as_units(link: Connection, entering: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(samples, units) activations, (units, inputs) and (units, outputs) weights, by plain loops."""
    units = link.producer.weight.shape[0]
    if isinstance(link.consumer, nn.Conv2d):
        columns = [entering[:, unit].flatten() for unit in range(units)]
        outgoing = [link.consumer.weight[:, unit].flatten() for unit in range(units)]
    else:
        copies = entering.shape[1] // units
        spans = [slice(unit * copies, (unit + 1) * copies) for unit in range(units)]
        columns = [entering[:, span].flatten() for span in spans]
        outgoing = [link.consumer.weight[:, span].flatten() for span in spans]
    incoming = link.producer.weight.flatten(1)
    return tuple(x.detach().numpy() for x in (torch.stack(columns, 1), incoming, torch.stack(outgoing)))


@pytest.mark.parametrize("utility", ["contribution", "zero_contribution", "adaptable_contribution"])
@pytest.mark.parametrize(("make", "data"), [(mlp, batch), (convnet, images)], ids=["linear", "convolution"])
def test_utilities_and_choice_against_the_oracle(utility: str, make, data) -> None:
    """40 training steps; after each, ages, averages, utilities and the replaced units agree."""
    net = make()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    method = ContinualBackprop(replacement_rate=0.03, maturity=5, utility=utility, decay=0.9)
    method.on_start(net, optimizer)
    links = connections(net)
    watcher = Watcher(links)
    units = {link.name: oracles.UnitUtilities(link.units, utility, 0.9) for link in links}
    owed = dict.fromkeys(units, 0.0)
    total = 0
    for number in range(40):
        backward(net, optimizer, *data(number))
        optimizer.step()
        # layers are handled in order, and a replacement changes the outgoing weights that the next layer takes
        # for its incoming ones: the oracle sees each layer as the method is about to
        expected_incoming = {link.name: as_units(link, watcher.entering[link.name]) for link in links}
        method.on_step(net, optimizer)
        for link in links:
            oracle = units[link.name]
            activations, incoming, outgoing = expected_incoming[link.name]
            incoming = _after_replacement(links, link, units, incoming)
            corrected = oracle.update(activations, incoming, outgoing)
            mature = np.flatnonzero(oracle.age > 5)
            owed[link.name] += 0.03 * len(mature)
            count = math.floor(owed[link.name])
            owed[link.name] -= count
            chosen = sorted(mature, key=lambda unit: corrected[unit])[:count]
            oracle.replaced = chosen
            for unit in chosen:
                oracle.forget(unit)
            total += count
            state = method.state[link.name]
            np.testing.assert_array_equal(state["age"].numpy(), oracle.age)
            np.testing.assert_allclose(state["mean_activation"].numpy(), oracle.mean_activation, rtol=1e-10)
            np.testing.assert_allclose(state["utility"].numpy(), oracle.utility, rtol=1e-10)
    assert total >= 6


def _after_replacement(
    links: list[Connection], link: Connection, units: dict[str, oracles.UnitUtilities], incoming: np.ndarray
) -> np.ndarray:
    """The incoming weights with the columns of units that the layer before has just replaced at 0."""
    position = links.index(link)
    if position == 0:
        return incoming
    before = units[links[position - 1].name]
    width = incoming.shape[1] // len(before.age)
    changed = incoming.copy()
    for unit in before.replaced:
        changed[:, unit * width : (unit + 1) * width] = 0
    return changed


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
        step(net, optimizer, method, *data(number))
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
        assert owner_of(net.get_submodule(consumer).weight) is not None


def start_with_weights_at_rest(
    net: nn.Module, layers: list[str], inputs: tuple[Tensor, Tensor]
) -> ContinualBackprop:
    """Four steps at the end of which some units of the first layer are replaced."""
    method = ContinualBackprop(replacement_rate=0.4, maturity=3, layers=layers)
    optimizer = still(net)
    method.on_start(net, optimizer)
    for _ in range(4):
        step(net, optimizer, method, *inputs)
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
    step(net, optimizer, method, *batch())
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
        step(net, optimizer, method, *batch(number % 3, dtype=dtype))
        replaced += int((ages(method) == 0).sum())
    assert ages(method).max() == 400
    assert 3 <= replaced <= 6
    assert all(value.isfinite().all() for value in net.state_dict().values())


# ---------------------------------------------------------------------------------- replicas, structure, use
def test_stacked_convolutions_equal_separate_runs() -> None:
    nets = [convnet(seed) for seed in range(R)]
    stacked = replicas.stack(nets)

    def start(net: nn.Module, seed: int | list[int]) -> tuple[Optimizer, ContinualBackprop]:
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        method = ContinualBackprop(0.1, maturity=3, utility="zero_contribution", decay=0.9, seed=seed)
        method.on_start(net, optimizer)
        return optimizer, method

    optimizer, method = start(stacked, [5, 6, 7])
    singles = [start(net, 5 + r) for r, net in enumerate(nets)]
    for number in range(15):
        batches = [images(100 * r + number) for r in range(R)]
        step(stacked, optimizer, method, *(torch.stack(part) for part in zip(*batches, strict=True)))
        for net, single, data in zip(nets, singles, batches, strict=True):
            step(net, *single, *data)
    for net, single in zip(nets, replicas.unstack(stacked), strict=True):
        assert_same_tensors(dict(single.state_dict()), dict(net.state_dict()), rtol=1e-10, atol=1e-10)


def test_evaluation_leaves_no_trace() -> None:
    net, method = mlp(), ContinualBackprop(maturity=0)
    optimizer = still(net)
    method.on_start(net, optimizer)
    backward(net, optimizer, *batch())
    with torch.no_grad():
        net(1e6 * batch(1)[0])
    net.eval()
    net(1e6 * batch(1)[0])
    net.train()
    method.on_step(net, optimizer)
    assert ages(method).tolist() == [1] * 6
    assert method.state["0"]["mean_activation"].max() < 1
    method.on_step(net, optimizer)  # no training step in between
    assert ages(method).tolist() == [1] * 6


class Branches(nn.Module):
    """Not a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(5, 6)
        self.fc2 = nn.Linear(6, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.fc2(self.fc1(inputs).relu())


def test_unknown_structure_is_named_and_the_chain_can_be_given() -> None:
    net = Branches().double()
    optimizer = still(net)
    with pytest.raises(ValueError, match=r"past '\(root\)' of type Branches; give the chain by hand, layers="):
        ContinualBackprop().on_start(net, optimizer)
    nested = nn.Sequential(nn.Linear(5, 5), nn.Sequential(nn.ReLU(), Branches()))
    with pytest.raises(ValueError, match=r"past '1\.1' of type Branches"):
        ContinualBackprop().on_start(nested, still(nested))
    method = ContinualBackprop(replacement_rate=1.0, maturity=0, layers=["fc1", "fc2"])
    method.on_start(net, optimizer)
    step(net, optimizer, method, *batch())
    assert not net.fc2.weight.any()


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (["fc1", "fc3"], r"layers: expected names of linear or convolution layers \(fc1, fc2\); got 'fc3'"),
        (["fc2", "fc1"], r"layers: 'fc2' has 3 units, but 'fc1' takes 5 inputs"),
        (["fc1"], r"at least two linear or convolution layers"),
    ],
)
def test_bad_chains_are_refused(layers: list[str], message: str) -> None:
    net = Branches()
    with pytest.raises(ValueError, match=message):
        ContinualBackprop(layers=layers).on_start(net, still(net))


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (nn.Sequential(nn.Linear(5, 3)), "at least two linear or convolution layers"),
        (nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3)), r"past '1' of type LayerNorm"),
        (nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3, groups=2)), r"'1' is a grouped convolution"),
    ],
)
def test_networks_that_it_does_not_know_are_refused(net: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ContinualBackprop().on_start(net, still(net))


def test_pooling_dropout_and_nesting_are_passed() -> None:
    net = nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Sequential(nn.Linear(16, 5), nn.Tanh()),
        nn.Linear(5, 3),
    )
    links = connections(net)
    assert [(link.name, link.units, link.copies) for link in links] == [("0.0", 4, 4), ("3.0", 5, 1)]
