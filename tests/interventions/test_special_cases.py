"""Layers that take no part, batches without examples, weights that are frozen, shared, or 0."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import R, assert_same_tensors, backward, batch, images, mlp, still, tensors_of, train
from test_every_intervention import CASES, Case, optimizer_of, run
from test_unit_groups import residual
from torch import Tensor, nn

from clagrange import gaussianize, networks, replicas
from clagrange.interventions import (
    ContinualBackprop,
    FullReset,
    GradedContinualBackprop,
    HeadReset,
    InputNormalization,
    Intervention,
    LastLayerReset,
    NormalizeAndProject,
    ReDo,
    SelfNormalizedResets,
    ShrinkAndPerturb,
    SpectralRegularization,
)
from clagrange.optim import EulerLagrange


def step(net: nn.Module, method: Intervention, inputs: Tensor, targets: Tensor, lr: float = 0.0) -> None:
    """One step of SGD by the summed loss, whose gradients are 0 where there are no examples."""
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=lr)
    logits = net(inputs)
    nn.functional.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="sum").backward()
    method.gradient_known(net, optimizer)
    optimizer.step()
    method.step_taken(net, optimizer)
    optimizer.zero_grad()


# --------------------------------------------------------------------------------------- without a start
@pytest.mark.parametrize("copied", [False, True])
def test_what_was_not_started_says_so(copied: bool) -> None:
    net, method = mlp(), ContinualBackprop()
    optimizer = still(net)
    if copied:
        method.on_start(net, optimizer)
        method.step_taken(net, optimizer)
        method = copy.deepcopy(method)
    for moment in (method.gradient_known, method.step_taken, method.switch_announced):
        with pytest.raises(RuntimeError, match=r"ContinualBackprop: expected on_start\(network, optimizer\)"):
            moment(net, optimizer)


# ------------------------------------------------------------------------------- layers that take no part
class Branches(nn.Module):
    """Two ways from inputs to outputs, of which one is taken at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.a_out, self.b, self.b_out = (nn.Linear(*shape) for shape in ((5, 6), (6, 3), (5, 4), (4, 3)))
        self.second = False
        self.double()
        networks.initialize(self, torch.Generator().manual_seed(0))

    def forward(self, inputs: Tensor) -> Tensor:
        first, last = (self.b, self.b_out) if self.second else (self.a, self.a_out)
        return last(first(inputs).relu())


@pytest.mark.parametrize("score", ["activation", "gradient"])
def test_redo_leaves_a_branch_that_was_not_taken(score: str) -> None:
    """Neither before it is taken nor afterwards; and when it is, all goes by what it did itself."""
    net = Branches()
    with torch.no_grad():
        net.b.bias[1] = -100.0
    method = ReDo(0.01, every=3, score=score, layers={"a": "a_out", "b": "b_out"})
    method.on_start(net, still(net))
    before = tensors_of(net)
    for number in range(3):
        step(net, method, *batch(number))
    for name in ("b.weight", "b.bias", "b_out.weight"):
        assert torch.equal(net.state_dict()[name], before[name]), name
    net.second = True
    for number in range(3):
        step(net, method, *batch(number))
    assert (net.b.weight != before["b.weight"]).any(1).tolist() == [False, True, False, False]
    net.second, taken = False, net.b.weight.detach().clone()
    for number in range(3):
        step(net, method, *batch(number))
    assert torch.equal(net.b.weight, taken)


@pytest.mark.parametrize("stacked", [False, True])
def test_redo_by_gradients_leaves_frozen_layers(stacked: bool) -> None:
    """And lets a dead unit of another layer start over, in a stacked network that of one replica."""
    net = replicas.stack([mlp(seed) for seed in range(R)]) if stacked else mlp()
    net[0].requires_grad_(False)
    dead = (1, 3) if stacked else (3,)
    with torch.no_grad():
        net[2].bias.fill_(5.0)
        net[2].bias[dead] = -100.0
    method, before = ReDo(0.0, every=2, score="gradient"), tensors_of(net)
    method.on_start(net, still(net))
    for number in range(2):
        inputs, targets = batch(number)
        step(net, method, *((inputs.expand(R, -1, -1), targets.expand(R, -1)) if stacked else (inputs, targets)))
    for name in ("0.weight", "0.bias"):
        assert torch.equal(net.state_dict()[name], before[name])
    changed = (net[2].weight != before["2.weight"]).any(-1)
    assert changed.nonzero().tolist() == [list(dead)]


def test_redo_takes_up_a_state_without_counts() -> None:
    """As earlier versions saved it, loaded after the start."""
    net, method = mlp(), ReDo(every=2)
    method.on_start(net, still(net))
    state = method.state_dict()
    for layer in ("0", "2"):
        del state["state"][layer]["counted"]
    method.load_state_dict(state)
    step(net, method, *batch())
    assert float(method.state["0"]["counted"]) == 1.0


# ---------------------------------------------------------------------------------- batches without examples
METHODS: dict[str, Callable[[], Intervention]] = {
    "contribution": lambda: ContinualBackprop(0.3, maturity=2),
    "adaptable": lambda: ContinualBackprop(0.3, maturity=2, utility="adaptable_contribution"),
    "redo by the last batch": lambda: ReDo(0.5, every=3, window=1),
    "redo by gradients of the last batch": lambda: ReDo(0.5, every=3, score="gradient", window=1),
    "resets": lambda: SelfNormalizedResets(0.5, longest=4),
    "graded": lambda: GradedContinualBackprop(0.3, every=30),
    "inputs": InputNormalization,
}


@pytest.mark.parametrize("name", METHODS)
def test_a_batch_without_examples_has_no_effect(name: str) -> None:
    """Neither the first of all nor a later one, which is that of ReDo's first check; training goes on."""
    net, method = mlp(), METHODS[name]()
    method.on_start(net, still(net))
    step(net, method, *batch(0, 0), lr=0.1)
    step(net, method, *batch(1), lr=0.1)
    before, state = tensors_of(net), copy.deepcopy(method.state)
    step(net, method, *batch(2, 0), lr=0.1)
    assert_same_tensors(dict(net.state_dict()), before)
    if not name.startswith("redo"):  # which has counted the batch before, and starts to count anew
        steps = {} if "steps" not in state else {"steps": state["steps"] + 1}
        torch.testing.assert_close(method.state, state | steps, rtol=0, atol=0)
    for number in range(6):
        step(net, method, *batch(number), lr=0.1)
    assert all(value.isfinite().all() for value in net.state_dict().values())


def test_redo_goes_by_the_batches_that_had_examples() -> None:
    for score in ("activation", "gradient"):
        nets = [mlp(), mlp()]
        for net, sizes in zip(nets, ([8, 8], [8, 0, 8]), strict=True):
            method = ReDo(0.9, every=len(sizes), score=score, seed=3)
            method.on_start(net, still(net))
            numbers = iter(range(2))
            for size in sizes:
                step(net, method, *batch(next(numbers) if size else 0, size))
        assert_same_tensors(*(dict(net.state_dict()) for net in nets))
        assert not torch.equal(nets[0][0].weight, mlp()[0].weight)


def test_an_empty_part_of_an_accumulated_batch_hides_no_other() -> None:
    for score in ("activation", "gradient"):
        net, method = mlp(), ReDo(0.5, every=5, score=score)
        method.on_start(net, still(net))
        for size in (8, 0):
            inputs, targets = batch(0, size)
            nn.functional.cross_entropy(net(inputs), targets, reduction="sum").backward()
        method.gradient_known(net, still(net))
        method.step_taken(net, still(net))
        assert float(method.state["0"]["counted"]) == 1.0
        assert method.state["0"]["magnitude"].any()


# ---------------------------------------------------------------------------------------- frozen parameters
FREEZING = {case.label: case for case in CASES if case.name != "VarianceInjection"}


@pytest.mark.parametrize("frozen", ["0", "2", "4"])
@pytest.mark.parametrize("case", FREEZING.values(), ids=FREEZING)
def test_frozen_layers_stay(case: Case, frozen: str) -> None:
    kind = "EulerLagrange" if case.gaussian_only else "SGD"
    net: nn.Module = mlp()
    net.get_submodule(frozen).requires_grad_(False)
    if case.gaussian_only:
        gaussianize(net)
    before = tensors_of(net)
    method, optimizer = case.make(), optimizer_of(kind, net)
    method.on_start(net, optimizer)
    run(net, optimizer, method, range(14))
    for name in (f"{frozen}.weight", f"{frozen}.bias"):
        assert torch.equal(net.state_dict()[name], before[name]), name


def replaced_in(net: nn.Module, names: list[str]) -> tuple[dict[str, Tensor], Tensor]:
    """Which numbers change, and which units, as half of those between two layers are replaced."""
    method = ContinualBackprop(0.5, maturity=0, layers=names)
    method.on_start(net, still(net))
    before = tensors_of(net)
    backward(net, still(net), *batch(size=32))
    method.on_step(net, still(net))
    replaced = method.state[names[0]]["age"] == 0
    assert 0 < int(replaced.sum()) < len(replaced)
    return {name: value != before[name] for name, value in net.state_dict().items()}, replaced


@pytest.mark.parametrize(
    ("frozen", "moved"),
    [
        ("0.weight", {"0.bias", "2.weight", "2.bias"}),
        ("0.bias", {"0.weight", "2.weight", "2.bias"}),
        ("2.weight", {"0.weight", "0.bias"}),  # which gives no less than it did, so that nothing moves on
        ("2.bias", {"0.weight", "0.bias", "2.weight"}),
    ],
)
def test_of_a_unit_that_starts_over_what_is_trained_changes(frozen: str, moved: set[str]) -> None:
    net = mlp()
    net.get_parameter(frozen).requires_grad_(False)
    changed, replaced = replaced_in(net, ["0", "2"])
    assert {name for name, where in changed.items() if where.any()} == moved
    for name in moved - {"2.bias"}:
        where = changed[name].any(0) if name == "2.weight" else changed[name].view(6, -1).any(1)
        assert torch.equal(where, replaced), name


def test_frozen_norms_and_statistics_of_frozen_weights_stay() -> None:
    net = residual()
    for module in (net.norm, net.first):
        module.requires_grad_(False)
    for parameter in net.norm.parameters():
        nn.init.constant_(parameter, 2.0)
    optimizer, method = still(net), ContinualBackprop(1.0, maturity=0)
    method.on_start(net, optimizer)
    backward(net, optimizer, *images())
    before = tensors_of(net)
    method.on_step(net, optimizer)
    after = tensors_of(net)
    for name in ("norm.weight", "norm.bias", "first.weight", "block_norm.running_mean"):
        assert torch.equal(after[name], before[name]), name
    assert before["norm.running_mean"].any()
    assert not after["norm.running_mean"].any()  # its inputs are those of new weights


def test_a_full_reset_leaves_what_is_frozen() -> None:
    """Also the statistics of a frozen normalisation layer, and a frozen Gaussian precision."""
    net = nn.Sequential(
        nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)
    ).double()
    for layer in net[:2]:
        layer.requires_grad_(False)
    gaussianize(net, layers={"4": None})
    optimizer, method = EulerLagrange(net, lr=0.02, temperature=1e-3), FullReset(seed=11)
    method.on_start(net, optimizer)
    train(net, optimizer, range(3))
    net[0].weight_precision.precision.mul_(2.0)
    net[2].weight_precision.precision.mul_(2.0)
    before = tensors_of(net)
    method.on_switch(net, optimizer)
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert {"2.weight", "2.weight_precision.precision", "3.running_mean", "4.weight"} <= changed
    assert not any(name.startswith(("0.", "1.")) for name in changed), changed


@pytest.mark.parametrize("frozen", ["weight", "bias"])
@pytest.mark.parametrize("make", [HeadReset, LastLayerReset])
def test_a_reset_of_the_head_leaves_what_is_frozen(make: Callable[[], Intervention], frozen: str) -> None:
    net, method = mlp(), make()
    (trained,) = {"weight", "bias"} - {frozen}
    head = net[4]
    nn.init.constant_(head.bias, 1.0)
    head.get_parameter(frozen).requires_grad_(False)
    gaussianize(net)
    for name in ("weight_precision", "bias_precision"):
        head.get_submodule(name).precision.mul_(2.0)
    before = tensors_of(head)
    method.on_start(net, still(net))
    method.on_switch(net, still(net))
    for name, changed in ((trained, True), (frozen, False)):
        for tensor in (name, f"{name}_precision.precision"):
            assert (head.state_dict()[tensor] != before[tensor]).all() == changed, tensor


# -------------------------------------------------------------------------------------------- shared weights
def tied() -> nn.Sequential:
    """4-4-4-4-2, in which two layers have the same weight."""
    shapes = [(4, 4), (4, 4), (4, 4), (4, 2)]
    layers = [layer for shape in shapes for layer in (nn.Linear(*shape), nn.ReLU())]
    net = nn.Sequential(*layers[:-1]).double()
    networks.initialize(net, torch.Generator().manual_seed(0))
    net[4].weight = net[2].weight
    return net


@pytest.mark.parametrize("perturbation", ["normal", "initial"])
def test_shared_weights_shrink_once(perturbation: str) -> None:
    net, method = tied(), ShrinkAndPerturb(0.5, 0.0, every="switch", perturbation=perturbation)
    before = tensors_of(net)
    method.on_start(net, still(net))
    method.on_switch(net, still(net))
    assert_same_tensors(dict(net.state_dict()), {name: 0.5 * value for name, value in before.items()})


def test_shared_weights_move_once_on_each_side() -> None:
    """As outgoing weights by 1 − α and as incoming ones by α of the way to fresh ones, with one α for all."""
    net, alpha = tied(), 0.25
    method = GradedContinualBackprop(alpha, every=1, threshold=math.inf, gain=0.0)
    before = tensors_of(net)
    method.on_start(net, still(net))
    method.on_step(net, still(net))
    for name, factor in (("0.weight", 1 - alpha), ("2.weight", (1 - alpha) ** 2), ("6.weight", 1 - alpha)):
        torch.testing.assert_close(net.get_parameter(name).detach(), factor * before[name])


# --------------------------------------------------------------------------------------- weights that are 0
@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_the_spectrum_is_followed_through_a_weight_of_0(power: float) -> None:
    """Of one replica, whose vector is kept in the same memory; the others go on as before."""
    net = replicas.stack([mlp(seed) for seed in range(R)])
    method = SpectralRegularization(0.3, power)
    method.on_start(net, still(net))
    kept = method.state["2.weight"]
    weight, first = net[2].weight.detach().clone(), kept.clone()

    def pull() -> Tensor:
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        method.on_gradient(net, still(net))
        return net[2].weight.grad.clone()

    expected = pull()
    with torch.no_grad():
        net[2].weight[1] = 0.0
    vector = kept[1].clone()
    for _ in range(2):
        without = pull()
        assert not without[1].any()
        assert without[0].any()
        assert torch.equal(kept[1], vector)
    with torch.no_grad():
        net[2].weight.copy_(weight)
    for _ in range(200):
        again = pull()
    torch.testing.assert_close(again[1], expected[1], rtol=0.05, atol=1e-3)
    assert method.state["2.weight"] is kept
    torch.testing.assert_close(kept[1].abs(), first[1].abs(), rtol=0.05, atol=1e-3)


def test_the_spectrum_of_a_head_that_starts_at_0_is_followed() -> None:
    net, method = mlp(), SpectralRegularization(0.3)
    nn.init.zeros_(net[4].weight)
    method.on_start(net, still(net))
    with torch.no_grad():
        net[4].weight.copy_(2.0 * torch.eye(3, 4, dtype=torch.float64))
    backward(net, still(net), *batch())
    before = net[4].weight.grad.clone()
    method.on_gradient(net, still(net))
    # 0.3·2(σ² − 1)·2σ at σ = 2, times u vᵀ of norm 1
    torch.testing.assert_close((net[4].weight.grad - before).norm(), torch.tensor(7.2, dtype=torch.float64))


@pytest.mark.parametrize("stacked", [False, True])
def test_projection_leaves_a_weight_of_0(stacked: bool) -> None:
    net = replicas.stack([mlp(seed) for seed in range(R)]) if stacked else mlp()
    method = NormalizeAndProject()
    with torch.no_grad():
        for layer in (net[0], net[2]):
            layer.weight.mul_(10.0)
    method.on_start(net, still(net))
    norms = net[2].weight.detach().flatten(int(stacked)).norm(dim=-1)
    with torch.no_grad():
        net[2].weight.mul_(3.0)
        (net[2].weight[1] if stacked else net[0].weight).zero_()
    method.on_step(net, still(net))
    assert not (net[2].weight[1] if stacked else net[0].weight).any()
    now = net[2].weight.detach().flatten(int(stacked)).norm(dim=-1)
    torch.testing.assert_close(now, norms * torch.tensor([1.0, 0.0, 1.0]) if stacked else norms)


def test_scales_without_shifts_are_projected() -> None:
    net = nn.Sequential(nn.Linear(5, 6), nn.RMSNorm(6), nn.ReLU(), nn.Linear(6, 3)).double()
    method = NormalizeAndProject()
    method.on_start(net, still(net))
    with torch.no_grad():
        net[1].weight.mul_(torch.linspace(1.0, 3.0, 6))
    direction = nn.functional.normalize(net[1].weight.detach(), dim=0)
    method.on_step(net, still(net))
    torch.testing.assert_close(net[1].weight.detach(), math.sqrt(6.0) * direction)


# ------------------------------------------------------------------------------------- inputs of other kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_of_half_precision_are_kept_in_float32(dtype: torch.dtype) -> None:
    """2000 small batches, the second half of them around another mean: in bfloat16 it would never be noticed."""
    net, method = nn.Sequential(nn.Identity(), nn.Linear(3, 2)).to(dtype), InputNormalization()
    entering: list[Any] = []
    net[0].register_forward_pre_hook(lambda _, args: entering.append(args[0]))
    method.on_start(net, still(net))
    generator = torch.Generator().manual_seed(0)
    given = [(torch.randn(4, 3, generator=generator) + (1.0 if n < 1000 else 3.0)).to(dtype) for n in range(2000)]
    for inputs in given:
        net(inputs)
    everything = torch.cat(given).double()
    torch.testing.assert_close(method.state["mean"], everything.mean(0).float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        method.state["variance"], everything.var(0, correction=0).float(), rtol=1e-3, atol=1e-3
    )
    assert entering[-1].dtype == dtype
    expected = (given[-1].double() - everything.mean(0)) / (everything.var(0, correction=0) + 1e-4).sqrt()
    torch.testing.assert_close(entering[-1].double(), expected, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("training", [True, False])
def test_the_gradient_reaches_the_inputs(training: bool) -> None:
    """By the scale, with the statistics as constants; these stay in the same memory."""
    net, method = nn.Linear(5, 1, bias=False).double(), InputNormalization()
    method.on_start(net, still(net))
    net(batch(0)[0])
    mean = method.state["mean"]
    inputs = batch(1)[0].requires_grad_()
    net.train(training)(inputs).sum().backward()
    scale = (method.state["variance"] + 1e-4).rsqrt()
    torch.testing.assert_close(inputs.grad, (scale * net.weight.detach()[0]).expand(8, 5))
    assert method.state["mean"] is mean
    assert not mean.requires_grad
