"""Curvature estimates in training: accumulated gradients, reductions, clipping, mixed precision, groups."""

import copy
import functools
import io
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cases import assert_same_tensors, batch, convnet, images, mlp, tensors_of
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from clagrange import gaussianize, replicas
from clagrange.gaussian import Diagonal, DiagonalPrecision, Kronecker, gaussian_blocks, set_sampling
from clagrange.networks import cross_entropy
from clagrange.optim import EulerLagrange, StackedSGD

STRUCTURES = {
    "squared_gradient": Diagonal(),
    "per_example": Diagonal("per_example"),
    "sampled_batch": Diagonal("sampled", "batch"),
    "sampled_example": Diagonal("sampled", "example", antithetic=True),
    "kronecker": Kronecker(refresh_every=2),
    "kronecker_batch": Kronecker(damping="exact", sampling="batch"),
}
each = pytest.mark.parametrize("name", STRUCTURES)
unsampled = pytest.mark.parametrize("name", ["squared_gradient", "per_example", "kronecker"])

Backward = Callable[[nn.Module, Tensor, Tensor], None]


def make(name: str, seed: int = 0, form: Callable[[int], nn.Module] = mlp, **settings: object) -> tuple:
    """A network with known random streams and its optimizer."""
    net = gaussianize(form(seed), precision=STRUCTURES[name])
    if STRUCTURES[name].sampling != "mean":
        generator = torch.Generator().manual_seed(seed)
        set_sampling(net, STRUCTURES[name].sampling, generator, antithetic=STRUCTURES[name].antithetic)
    settings = {"lr": 0.02, "temperature": 1e-3, "variance_rate": 0.05, "curvature_decay": 0.5, **settings}
    return net, EulerLagrange(net, **settings)


def trained(
    name: str,
    backward: Backward,
    before_step: Callable[[nn.Module], None] = lambda _: None,
    form: Callable[[int], nn.Module] = mlp,
    data: Callable[[int], tuple[Tensor, Tensor]] = batch,
    **settings: object,
) -> dict[str, Tensor]:
    """The state after three steps whose gradients ``backward`` makes."""
    net, optimizer = make(name, form=form, **settings)
    for step in range(3):
        optimizer.zero_grad()
        backward(net, *data(step))
        before_step(net)
        optimizer.step()
    return {key: value for key, value in net.state_dict().items() if isinstance(value, Tensor)}


def mean_loss(net: nn.Module, inputs: Tensor, targets: Tensor) -> None:
    nn.functional.cross_entropy(net(inputs), targets).backward()


# ----------------------------------------------------------------------------------- accumulation, reductions
@unsampled
@pytest.mark.parametrize(("form", "data"), [(mlp, batch), (convnet, images)], ids=["mlp", "convnet"])
@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_gradients_equal_the_joint_batch(
    name: str, form: Callable, data: Callable, parts: int
) -> None:
    def accumulate(net: nn.Module, inputs: Tensor, targets: Tensor) -> None:
        for x, y in zip(inputs.chunk(parts), targets.chunk(parts), strict=True):
            (nn.functional.cross_entropy(net(x), y) / parts).backward()

    joint = trained(name, mean_loss, form=form, data=data)
    assert_same_tensors(trained(name, accumulate, form=form, data=data), joint, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["sampled_batch", "sampled_example"])
def test_accumulated_draws_average_their_estimates(name: str) -> None:
    """Of passes that also stand alone, in a copy with the same streams."""
    net, _ = make(name)
    alone = copy.deepcopy(net)
    separate = []
    for part, (x, y) in enumerate(zip(*(tensor.chunk(2) for tensor in batch()), strict=True)):
        (nn.functional.cross_entropy(net(x), y) / 2).backward()
        alone.zero_grad()
        nn.functional.cross_entropy(alone(x), y).backward()
        separate.append(alone[2].observation_of("weight").curvature(alone[2].weight.grad, 4))
        assert net[2].examples == 4 * (part + 1)
    found = net[2].observation_of("weight").curvature(net[2].weight.grad, 8)
    torch.testing.assert_close(found, (separate[0] + separate[1]) / 2, rtol=1e-10, atol=0)
    assert (separate[0] - separate[1]).norm() > 0.1 * found.norm()


@each
def test_a_summed_loss_equals_its_mean(name: str) -> None:
    def summed(net: nn.Module, inputs: Tensor, targets: Tensor) -> None:
        nn.functional.cross_entropy(net(inputs), targets, reduction="sum").backward()

    found = trained(name, summed, loss_reduction="sum")
    assert_same_tensors(found, trained(name, mean_loss), rtol=1e-9, atol=1e-12)


def tokens(step: int) -> tuple[Tensor, Tensor]:
    """Inputs (4, 3, 5) and a class for each of their positions."""
    inputs, targets = batch(step, size=12)
    return inputs.unflatten(0, (4, 3)), targets.unflatten(0, (4, 3))


def mean_over_tokens(net: nn.Module, inputs: Tensor, targets: Tensor) -> None:
    nn.functional.cross_entropy(net(inputs).flatten(0, 1), targets.flatten()).backward()


@pytest.mark.parametrize("name", ["squared_gradient", "sampled_batch", "sampled_example", "kronecker"])
def test_a_mean_over_positions_equals_one_over_examples(name: str) -> None:
    """Where every position is an example of its own; also with the same noise."""
    found = trained(name, mean_over_tokens, data=tokens, loss_reduction="position_mean")
    apart = trained(name, mean_loss, data=lambda step: batch(step, size=12))
    assert_same_tensors(found, apart, rtol=1e-9, atol=1e-12)


def test_per_example_squares_of_a_mean_over_positions() -> None:
    """nP times the squares of what each example adds to the gradient: by one pass an example."""
    net, optimizer = make("per_example", curvature_decay=0.0)
    inputs, targets = tokens(0)
    expected = torch.zeros(3, 4, dtype=torch.float64)
    for x, y in zip(inputs, targets, strict=True):
        (part,) = torch.autograd.grad(nn.functional.cross_entropy(net(x), y, reduction="sum") / 12, net[4].weight)
        expected += 12 * part.square()
    optimizer.param_groups[0]["loss_reduction"] = "position_mean"
    mean_over_tokens(net, inputs, targets)
    optimizer.step()
    torch.testing.assert_close(net[4].weight_precision.curvature, expected, rtol=1e-10, atol=0)


@each
def test_maximizing_minus_the_loss_is_minimizing_it(name: str) -> None:
    def negative(net: nn.Module, inputs: Tensor, targets: Tensor) -> None:
        (-nn.functional.cross_entropy(net(inputs), targets)).backward()

    assert_same_tensors(trained(name, negative, maximize=True), trained(name, mean_loss), rtol=1e-9, atol=1e-12)


# -------------------------------------------------------------------------------- multiplied gradients
@each
def test_clipping_the_norm_is_multiplying_the_loss(name: str) -> None:
    """The norms to clip at are those that a multiplied loss gives, so that the runs are the same."""
    norms, factor = [], 0.3

    def scaled(net: nn.Module, inputs: Tensor, targets: Tensor) -> None:
        (factor * nn.functional.cross_entropy(net(inputs), targets)).backward()
        norms.append(float(nn.utils.get_total_norm([p.grad for p in net.parameters()])))

    expected = trained(name, scaled)

    def clip(net: nn.Module) -> None:
        nn.utils.clip_grad_norm_(net.parameters(), norms.pop(0))

    assert_same_tensors(trained(name, mean_loss, clip), expected, rtol=1e-4, atol=1e-6)


@each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_estimates_by_its_rounding(name: str, dtype: torch.dtype) -> None:
    """After one step in float32: the beliefs differ by per cents, the scale is right."""
    found = []
    for enabled in (False, True):
        net, optimizer = make(name, form=lambda seed: mlp(seed, torch.float32), curvature_decay=0.0)
        inputs, targets = batch(0, 64, torch.float32)
        with torch.autocast("cpu", dtype, enabled=enabled):
            loss = nn.functional.cross_entropy(net(inputs), targets)
        loss.backward()
        optimizer.step()
        found.append([block.precision.spectrum() for _, block in gaussian_blocks(net)])
    assert any(not torch.equal(low, full) for low, full in zip(found[1], found[0], strict=True))
    for low, full in zip(found[1], found[0], strict=True):
        assert low.dtype == torch.float32
        assert (low - full).norm() < 0.06 * full.norm()


@pytest.mark.parametrize("name", ["per_example", "kronecker"])
def test_backward_under_autocast_changes_nothing(name: str) -> None:
    """The sums of an observer stay in float32."""
    found = []
    for inside in (False, True):
        net, optimizer = make(name, form=lambda seed: mlp(seed, torch.float32), curvature_decay=0.0)
        inputs, targets = batch(0, 8, torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            loss = nn.functional.cross_entropy(net(inputs).float(), targets)
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            loss.backward()
        optimizer.step()
        found.append([block.precision.spectrum() for _, block in gaussian_blocks(net)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=0)


@each
def test_a_loss_scale_leaves_no_trace(name: str) -> None:
    """GradScaler with float16 against the same without a scale, where nothing underflows."""
    found = []
    for scale in (1.0, 1024.0):
        net, optimizer = make(name, form=lambda seed: mlp(seed, torch.float32))
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        for step in range(3):
            inputs, targets = batch(step, 8, torch.float32)
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = nn.functional.cross_entropy(net(inputs).float(), targets)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(net.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
        found.append([value for value in net.state_dict().values() if isinstance(value, Tensor)])
    for scaled, plain in zip(*found, strict=True):
        torch.testing.assert_close(scaled, plain, rtol=2e-2, atol=2e-3 * float(plain.abs().max()))


def curvatures(
    name: str, scale: float, prepare: Callable[[nn.Module], None], clip: Callable[[nn.Module], None]
) -> list[Tensor]:
    """What one step in float32 makes of the belief over the curvature, with a scale of the loss."""
    net, optimizer = make(name, form=lambda seed: mlp(seed, torch.float32), curvature_decay=0.0)
    prepare(net)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    inputs, targets = batch(0, 32, torch.float32)
    scaler.scale(nn.functional.cross_entropy(net(inputs), targets)).backward()
    scaler.unscale_(optimizer)
    clip(net)
    scaler.step(optimizer)
    precisions = [block.precision for _, block in gaussian_blocks(net)]
    return [p.curvature if isinstance(p, DiagonalPrecision) else p.outputs for p in precisions]


def nothing(net: nn.Module) -> None:
    """Do nothing."""


def clip_to_half(net: nn.Module) -> None:
    norm = nn.utils.get_total_norm([p.grad for p in net.parameters() if p.grad is not None])
    nn.utils.clip_grad_norm_(net.parameters(), float(norm) / 2)


def clip_values(net: nn.Module, quantile: float) -> None:
    """Clip the largest entries of each parameter's gradient."""
    for parameter in net.parameters():
        bound = parameter.grad.abs().quantile(quantile, interpolation="lower")
        nn.utils.clip_grad_value_([parameter], float(bound))


def freeze(net: nn.Module, part: str) -> None:
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(not name.endswith(part))


@each
@pytest.mark.parametrize("clip", [nothing, clip_to_half])
@pytest.mark.parametrize("frozen", [None, "bias", "weight"])
def test_a_large_loss_scale_leaves_no_trace(name: str, clip: Callable, frozen: str | None) -> None:
    """The curvature is that of a step without a scale, which is that of the clipped norm in both."""
    prepare = nothing if frozen is None else functools.partial(freeze, part=frozen)
    plain, scaled = (curvatures(name, scale, prepare, clip) for scale in (1.0, 65536.0))
    assert any((belief != 0).any() for belief in plain)
    for one, other in zip(plain, scaled, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6 * float(one.abs().max()))


@pytest.mark.parametrize("name", [name for name in STRUCTURES if name != "squared_gradient"])
@pytest.mark.parametrize(("quantile", "factor"), [(0.95, 2.0), (0.5, 200.0)])
def test_clipping_values_after_a_large_loss_scale(name: str, quantile: float, factor: float) -> None:
    """Of the scale, 2^32 in squares, there is no trace; clipping changes the size of a belief by some ``factor``.

    Against a step with neither. Where few values are clipped the median ratio is that of values that are not;
    where half are, to half or less, the curvature is the smaller one of what the optimizer sees.
    """
    plain = curvatures(name, 1.0, nothing, nothing)
    found = curvatures(name, 65536.0, nothing, lambda net: clip_values(net, quantile))
    for one, other in zip(plain, found, strict=True):
        assert one.norm() / factor <= other.norm() <= min(factor, 4.0) * one.norm()


@pytest.mark.parametrize("name", ["per_example", "sampled_example", "kronecker"])
def test_an_overflow_is_skipped_and_forgotten(name: str) -> None:
    """GradScaler leaves out a step with infinite gradients; the next estimate knows nothing of it."""
    found = []
    for overflow in (False, True):
        net, optimizer = make(name, form=lambda seed: mlp(seed, torch.float32))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
        if overflow:
            before = copy.deepcopy(net.state_dict())
            inputs, targets = batch(5, 8, torch.float32)
            scaler.scale(nn.functional.cross_entropy(net(inputs), targets) * math.inf).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            net.load_state_dict(before)  # the streams, too
        mean_loss(net, *batch(0, 8, torch.float32))
        optimizer.step()
        found.append([value for value in net.state_dict().values() if isinstance(value, Tensor)])
    for skipped, plain in zip(*found, strict=True):
        torch.testing.assert_close(skipped, plain)


# ------------------------------------------------------------------------------------- groups, layers, replicas
def test_groups_have_decays_of_their_own() -> None:
    net, _ = make("per_example")
    decays = {0: 0.0, 2: 0.75}
    groups = [{"params": net[index].parameters(), "curvature_decay": decay} for index, decay in decays.items()]
    optimizer = EulerLagrange([*groups, {"params": net[4].parameters()}], lr=0.02, temperature=1e-3)
    mean_loss(net, *batch())
    estimates = [net[i].observation_of("weight").curvature(net[i].weight.grad, 8) for i in (0, 2, 4)]
    optimizer.step()
    for index, share, estimate in zip((0, 2, 4), (1.0, 0.25, 0.01), estimates, strict=True):
        torch.testing.assert_close(net[index].weight_precision.curvature, share * estimate, rtol=1e-9, atol=0)


GROUPS = {
    "temperature": (1e-3, 3e-2),
    "variance_rate": (0.05, 0.5),
    "trust_region": (math.inf, 0.02),
    "curvature_decay": (0.5, 0.9),
    "loss_reduction": ("mean", "sum"),
    "maximize": (False, True),
}
"""Settings of two groups."""


@each
@pytest.mark.parametrize("changed", [*([name] for name in GROUPS), [*GROUPS]], ids="-".join)
def test_two_groups_behave_as_alone(name: str, changed: list[str]) -> None:
    """At every step each layer does what it does under an optimizer of its own; the settings do matter."""
    net, _ = make(name)
    layers = (["0", "4"], ["2"])
    first, second = ({key: GROUPS[key][number] for key in changed} for number in range(2))

    def optimizer_of(model: nn.Module, *groups: tuple[int, dict]) -> EulerLagrange:
        parameters = [[p for layer in part for p in model.get_submodule(layer).parameters()] for part in layers]
        made = [{"params": parameters[number], **settings} for number, settings in groups]
        return EulerLagrange(made, lr=0.02, variance_rate=0.05)

    both = optimizer_of(net, (0, first), (1, second))
    for step in range(3):
        alone = []
        for group in ((0, first), (1, second), (1, first)):
            model = copy.deepcopy(net)
            model.zero_grad()
            mean_loss(model, *batch(step))
            optimizer_of(model, group).step()
            alone.append(model)
        both.zero_grad()
        mean_loss(net, *batch(step))
        both.step()
        for part, model in zip(layers, alone, strict=False):
            for layer in part:
                found, expected = (tensors_of(its.get_submodule(layer)) for its in (net, model))
                assert_same_tensors(found, expected, rtol=1e-12, atol=0)
    found, otherwise = (tensors_of(its[2]) for its in (net, alone[2]))
    matter = changed != ["curvature_decay"] or not name.startswith("kronecker")  # which have no belief
    assert any(not torch.equal(found[key], otherwise[key]) for key in found) == matter


def test_layers_may_have_different_estimators() -> None:
    """After one step each layer is as in a network of its kind alone."""
    names = {"0": "squared_gradient", "2": "per_example", "4": "kronecker"}
    net = gaussianize(mlp(), layers={layer: {"precision": STRUCTURES[name]} for layer, name in names.items()})
    settings = {"lr": 0.02, "temperature": 1e-3, "variance_rate": 0.05, "curvature_decay": 0.5}
    mixed = EulerLagrange(net, **settings)
    mean_loss(net, *batch())
    mixed.step()
    for layer, name in names.items():
        alone, optimizer = make(name)
        mean_loss(alone, *batch())
        optimizer.step()
        for key, value in net.get_submodule(layer).state_dict().items():
            if isinstance(value, Tensor):
                torch.testing.assert_close(value, alone.get_submodule(layer).state_dict()[key])


@each
def test_stacked_networks_learn_what_single_ones_learn(name: str) -> None:
    singles = [make(name, seed) for seed in range(3)]
    stacked = replicas.stack([net for net, _ in singles])
    optimizer = EulerLagrange(stacked, lr=0.02, temperature=1e-3, variance_rate=0.05, curvature_decay=0.5)
    for step in range(4):
        batches = [batch(10 * step + r) for r in range(3)]
        inputs, targets = (torch.stack(parts) for parts in zip(*batches, strict=True))
        optimizer.zero_grad()
        cross_entropy(stacked(inputs), targets).backward()
        optimizer.step()
        for r, (net, own) in enumerate(singles):
            own.zero_grad()
            mean_loss(net, inputs[r], targets[r])
            own.step()
    for r, (net, _) in enumerate(singles):
        for key, value in net.state_dict().items():
            if isinstance(value, Tensor):
                torch.testing.assert_close(stacked.state_dict()[key][r], value, rtol=1e-7, atol=1e-10)


# --------------------------------------------------------------------------------------------- whole runs
@each
def test_a_run_that_is_resumed_is_the_same_run(name: str) -> None:
    """Saved after an odd number of steps, loaded with weights_only."""
    net, optimizer = make(name)
    resumed, file = None, io.BytesIO()
    for step in range(7):
        if step == 3:
            torch.save([net.state_dict(), optimizer.state_dict()], file)
            file.seek(0)
            resumed, other = make(name, seed=5)
            for target, state in zip((resumed, other), torch.load(file, weights_only=True), strict=True):
                target.load_state_dict(state)
        for model, its in ((net, optimizer), *([(resumed, other)] if resumed is not None else [])):
            its.zero_grad()
            mean_loss(model, *batch(step))
            its.step()
    tensors = [{k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)} for model in (net, resumed)]
    assert_same_tensors(*tensors)


@each
def test_training_learns_and_precisions_stay_positive(name: str) -> None:
    """A separable problem with an estimate that is noisy where it is sampled."""
    generator = torch.Generator().manual_seed(0)
    centres = 2 * torch.randn(3, 5, generator=generator, dtype=torch.float64)
    decay = 0.99 if name.startswith("sampled") else 0.9
    net, optimizer = make(name, lr=5e-3, variance_rate=1e-2, curvature_decay=decay)
    losses = []
    for _ in range(100):
        labels = torch.randint(3, (16,), generator=generator)
        inputs = centres[labels] + 0.5 * torch.randn(16, 5, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            losses.append(nn.functional.cross_entropy(net(inputs), labels).item())
        optimizer.zero_grad()
        mean_loss(net, inputs, labels)
        optimizer.step()
        for _, block in gaussian_blocks(net):
            assert (block.precision.spectrum() > 0).all()
    assert sum(losses[-20:]) / 20 < 0.4 * losses[0]


# ----------------------------------------------------------------------------------------- two processes
def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        states = {name: distributed(name, rank) for name in ("per_example", "kronecker")}
        torch.save(states, Path(folder, str(rank)))
    finally:
        dist.destroy_process_group()


def distributed(name: str, rank: int | None) -> dict[str, Tensor]:
    """Three steps on the whole of each batch (rank None), or on the half of a process."""
    net, optimizer = make(name)
    model: nn.Module = net if rank is None else DistributedDataParallel(net)
    part = slice(None) if rank is None else slice(4 * rank, 4 * rank + 4)
    for step in range(3):
        inputs, targets = batch(step)
        optimizer.zero_grad()
        mean_loss(model, inputs[part], targets[part])
        optimizer.step()
    return {key: value for key, value in net.state_dict().items() if isinstance(value, Tensor)}


@pytest.mark.slow
def test_two_processes_equal_the_joint_batch(tmp_path: Path) -> None:
    mp.spawn(worker, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / str(rank), weights_only=True) for rank in range(2))
    for name in first:
        assert_same_tensors(first[name], second[name])
        assert_same_tensors(first[name], distributed(name, None), rtol=1e-9, atol=1e-11)


# ------------------------------------------------------------------------------------- compiled, autocast
class Chain(nn.Module):
    """A convolution and linear layers, called one by one: torch.compile breaks such a graph at each of them."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 1, 3, padding=1)
        self.first, self.middle, self.last = nn.Linear(64, 16), nn.Linear(16, 16), nn.Linear(16, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        seen = self.convolution(inputs.view(-1, 1, 8, 8)).relu().flatten(1)
        return self.last(self.middle(self.first(seen).relu()).relu())


@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch, while it traces
def test_a_compiled_network_learns_the_same() -> None:
    """Tracing is like a transform of torch.func, under which nothing is observed."""
    torch._dynamo.reset()
    observed = []
    for compiled in (False, True):
        torch.manual_seed(0)
        net = gaussianize(Chain(), precision=Kronecker(sampling="batch", observe_every=1))
        call = torch.compile(net, backend="aot_eager") if compiled else net
        optimizer = EulerLagrange(net, temperature=1e-3)
        for step in range(12):
            generator = torch.Generator().manual_seed(step)
            inputs = torch.randn(16, 64, generator=generator)
            optimizer.zero_grad()
            cross_entropy(call(inputs), torch.randint(10, (16,), generator=generator)).backward()
            optimizer.step()
        observed.append(dict(net.state_dict()))
    assert_same_tensors(*observed, rtol=1e-4, atol=1e-6)


@each
def test_a_step_under_autocast_is_the_same(name: str) -> None:
    nets = [make(name, form=lambda seed: mlp(seed, dtype=torch.float32)) for _ in range(2)]
    for autocast, (net, optimizer) in zip((False, True), nets, strict=True):
        for step in range(3):
            inputs, targets = batch(step, dtype=torch.float32)
            optimizer.zero_grad()
            cross_entropy(net(inputs), targets).backward()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                optimizer.step()
    assert_same_tensors(dict(nets[1][0].state_dict()), dict(nets[0][0].state_dict()))


def test_a_group_may_be_empty() -> None:
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    optimizer = StackedSGD([{"params": []}, {"params": [weight]}], lr=0.5)
    optimizer.step()
    assert weight.tolist() == [0.5, 0.5]
