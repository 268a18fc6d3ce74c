"""What every intervention must do: replicas equal single runs, checkpoints and copies go on identically."""

import copy
import pickle
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from cases import R, assert_same_tensors, batch, mlp, tensor
from torch import Tensor, nn
from torch.optim import Optimizer

import clagrange
from clagrange import gaussianize, interventions, replicas
from clagrange.interventions import CUSUM, EnergyJump, Intervention, PredictiveSurprise
from clagrange.optim import EulerLagrange


@dataclass(frozen=True)
class Case:
    """An intervention with settings under which it acts within a few steps."""

    name: str
    settings: dict[str, Any]
    stacked: dict[str, Tensor] = field(default_factory=dict)
    """Settings that may differ between replicas."""
    seeded: bool = True
    gaussian_only: bool = False
    told: bool = False
    detector: Callable[[Any], Any] | None = None
    """Makes a detector that alarms often, given seeds."""
    kinds: tuple[str, ...] = ("Adam", "SGD", "EulerLagrange")

    @property
    def label(self) -> str:
        """The name and the options that are words or counts."""
        options = [str(value) for value in self.settings.values() if type(value) in (str, int)]
        if self.detector is not None:
            options.append(type(self.detector(0)).__name__)
        return "-".join([self.name, *options])

    def make(self, seed: Any = 0, **settings: Any) -> Intervention:
        seeds = {"seed": seed} if self.seeded else {}
        if self.detector is not None:
            seeds["detector"] = self.detector(seed)
        return getattr(interventions, self.name)(**self.settings, **seeds, **settings)


OFTEN = {"threshold": 0.05, "drift": 0.0, "warm_up": 1}


CASES = [
    Case("Consolidation", {}, {"weight": tensor(1.0, 0.0, 0.5)}, seeded=False, gaussian_only=True, told=True),
    Case("Consolidation", {"every": 4}, {"weight": tensor(0.5, 1.0, 0.0)}, seeded=False, gaussian_only=True),
    Case(
        "ContinualBackprop",
        {"maturity": 3, "utility": "adaptable_contribution", "decay": 0.9},
        {"replacement_rate": tensor(0.2, 0.0, 0.5)},
    ),
    *(
        Case(
            "ContinualBackprop",
            {"maturity": 2, "utility": utility, "decay": 0.9},
            {"replacement_rate": tensor(0.2, 0.0, 0.5)},
        )
        for utility in ("weight", "adaptation", "random")
    ),
    Case("FullReset", {}, told=True),
    Case("GradedContinualBackprop", {"every": 3, "decay": 0.5}, {"rate": tensor(0.5, 0.0, 0.1)}),
    Case("HareAndTortoise", {"every": 5}, {"decay": tensor(0.9, 0.0, 0.99)}, seeded=False),
    Case("HeadReset", {}, seeded=False, told=True),
    Case("InputNormalization", {"eps": 1e-3}, seeded=False),
    Case("L2Init", {"resample": "step"}, {"strength": tensor(0.1, 0.0, 1.0)}),
    Case("L2Init", {"resample": "switch"}, {"strength": tensor(0.1, 0.0, 1.0)}, told=True),
    Case("L2Init", {}, {"strength": tensor(0.1, 0.0, 1.0)}),
    Case("LastLayerReset", {"every": 4, "forget": False}),
    Case("LastLayerReset", {}, told=True),
    Case("NormalizeAndProject", {"every": 2}, seeded=False),
    Case("ReDo", {"every": 3}, {"threshold": tensor(0.9, 0.0, 0.5)}),
    Case("ReDo", {"every": 4, "score": "gradient", "window": 2}, {"threshold": tensor(0.9, 0.0, 0.5)}),
    Case("RegenerativeL1", {}, {"strength": tensor(0.01, 0.0, 0.1)}),
    Case("SelfNormalizedResets", {"longest": 4}, {"rejection": tensor(0.5, 0.0, 0.2)}),
    Case("ShrinkAndPerturb", {}, {"shrink": tensor(0.01, 0.0, 0.1), "noise": tensor(0.0, 0.01, 0.1)}),
    Case(
        "ShrinkAndPerturb",
        {"every": "switch"},
        {"shrink": tensor(0.5, 0.0, 0.1), "noise": tensor(0.0, 0.01, 0.1)},
        told=True,
    ),
    Case(
        "ShrinkAndPerturb",
        {"every": 4, "perturbation": "initial"},
        {"shrink": tensor(0.5, 0.0, 0.1), "noise": tensor(0.0, 0.01, 0.1)},
    ),
    *(
        Case(
            "SoftReset",
            {"scope": scope, "origin": origin},
            {"gamma_lr": tensor(0.05, 0.0, 1.0), "posterior_scale": tensor(0.5, 0.9, 1.0)},
            seeded=False,
        )
        for scope, origin in (("layer", "initial"), ("weight", "zero"))
    ),
    Case("SpectralRegularization", {}, {"strength": tensor(0.01, 0.0, 0.03)}),
    Case(
        "VarianceInjection",
        {"layers": ["0", "2"]},
        {"strength": tensor(0.3, 0.0, 1.0), "widen": tensor(0.0, 0.5, 0.1)},
        gaussian_only=True,
        told=True,
    ),
    *(
        Case(
            "VarianceInjection",
            settings,
            {
                "strength": tensor(0.3, 0.0, 1.0),
                "widen": tensor(0.0, 0.5, 0.1),
                "multiply": tensor(1.0, 3.0, 2.0),
                "share": tensor(0.5, 0.2, 0.9),
            },
            gaussian_only=True,
            told=True,
        )
        for settings in (
            {"where": "low_curvature", "draw": "posterior"},
            {"where": "low_utility"},
            {"over": 4},
            {"equilibrium": 4},
        )
    ),
    Case("FullReset", {}, detector=lambda _: CUSUM(**OFTEN, decay=0.5), kinds=("SGD", "EulerLagrange")),
    Case(
        "L2Init",
        {"resample": "switch"},
        {"strength": tensor(0.1, 0.0, 1.0)},
        detector=lambda _: CUSUM(**OFTEN, decay=0.5),
    ),
    Case(
        "ShrinkAndPerturb",
        {"every": "switch"},
        {"shrink": tensor(0.5, 0.1, 0.2)},
        detector=lambda _: EnergyJump(**OFTEN),
    ),
    Case(
        "Consolidation",
        {},
        {"weight": tensor(1.0, 0.0, 0.5)},
        seeded=False,
        gaussian_only=True,
        detector=lambda _: CUSUM(**OFTEN, decay=0.5),
    ),
    Case(
        "VarianceInjection",
        {"over": 3},
        {"strength": tensor(0.3, 0.1, 1.0)},
        gaussian_only=True,
        detector=lambda seed: PredictiveSurprise(**OFTEN, samples=2, seed=seed),
    ),
]

each = pytest.mark.parametrize("case", CASES, ids=[case.label for case in CASES])
each_kind = pytest.mark.parametrize(
    ("case", "kind"),
    [
        pytest.param(case, kind, id=f"{case.label}-{kind}")
        for case in CASES
        for kind in (["EulerLagrange"] if case.gaussian_only else case.kinds)
    ],
)


def network(kind: str, seed: int = 0) -> nn.Module:
    return gaussianize(mlp(seed)) if kind == "EulerLagrange" else mlp(seed)


def optimizer_of(kind: str, net: nn.Module) -> Optimizer:
    if kind == "EulerLagrange":
        return EulerLagrange(net, lr=0.02, temperature=1e-3)
    if kind == "SGD":
        return torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    return torch.optim.Adam(net.parameters(), lr=0.01)


def run(
    net: nn.Module,
    optimizer: Optimizer,
    method: Intervention,
    steps: Iterable[int],
    batches: Callable[[int], tuple[Tensor, Tensor]] = batch,
) -> None:
    """A stream with a switch at every sixth step."""
    for step in steps:
        if step and step % 6 == 0:
            method.switch_announced(net, optimizer)
        inputs, targets = batches(step)
        optimizer.zero_grad()
        losses = clagrange.networks.cross_entropy(net(inputs), targets, reduction="none").mean(-1)
        losses.sum().backward()
        method.loss_known(net, losses)
        method.gradient_known(net, optimizer)
        optimizer.step()
        method.step_taken(net, optimizer)


@each_kind
def test_stacked_equals_separate_runs(case: Case, kind: str) -> None:
    """20 steps, float64, relative 1e-10; every setting a tensor of shape (R,), seeds given one by one."""
    seeds = [4, 0, 9]
    stacked = replicas.stack([network(kind, seed) for seed in range(R)])
    optimizer, method = optimizer_of(kind, stacked), case.make(seeds, **case.stacked)
    method.on_start(stacked, optimizer)

    def batches(step: int) -> tuple[Tensor, Tensor]:
        inputs, targets = zip(*(batch(100 * r + step) for r in range(R)), strict=True)
        return torch.stack(inputs), torch.stack(targets)

    run(stacked, optimizer, method, range(20), batches)
    for r, single in enumerate(replicas.unstack(stacked)):
        net = network(kind, r)
        own_optimizer = optimizer_of(kind, net)
        own = case.make(seeds[r], **{name: float(value[r]) for name, value in case.stacked.items()})
        own.on_start(net, own_optimizer)
        run(net, own_optimizer, own, range(20), lambda step, r=r: batch(100 * r + step))
        assert_same_tensors(dict(single.state_dict()), dict(net.state_dict()), rtol=1e-10, atol=1e-10)


@each
def test_one_seed_for_a_stack_counts_up(case: Case) -> None:
    nets = [replicas.stack([network("EulerLagrange", seed) for seed in range(R)]) for _ in range(2)]
    for net, seed in zip(nets, (4, [4, 5, 6]), strict=True):
        optimizer, method = optimizer_of("EulerLagrange", net), case.make(seed)
        method.on_start(net, optimizer)
        run(net, optimizer, method, range(8), _repeated)
    assert_same_tensors(dict(nets[0].state_dict()), dict(nets[1].state_dict()))


def _repeated(step: int) -> tuple[Tensor, Tensor]:
    inputs, targets = batch(step)
    return inputs.expand(R, -1, -1), targets.expand(R, -1)


@each_kind
@pytest.mark.parametrize("load_first", [True, False])
def test_checkpoint_in_the_middle_continues_identically(
    case: Case,
    kind: str,
    load_first: bool,
    tmp_path,
) -> None:
    settings = {name: float(value[0]) for name, value in case.stacked.items()}
    net = network(kind)
    optimizer, method = optimizer_of(kind, net), case.make(3, **settings)
    method.on_start(net, optimizer)
    run(net, optimizer, method, range(10))
    checkpoint = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "method": method.state_dict()}
    torch.save(checkpoint, tmp_path / "checkpoint")
    run(net, optimizer, method, range(10, 20))

    checkpoint = torch.load(tmp_path / "checkpoint", weights_only=True)
    resumed = network(kind, seed=7)
    other_optimizer, other = optimizer_of(kind, resumed), case.make(8, **settings)
    if not load_first:
        other.on_start(resumed, other_optimizer)
    resumed.load_state_dict(checkpoint["net"])
    other_optimizer.load_state_dict(checkpoint["optimizer"])
    other.load_state_dict(checkpoint["method"])
    if load_first:
        other.on_start(resumed, other_optimizer)
    run(resumed, other_optimizer, other, range(10, 20))
    assert_same_tensors(dict(resumed.state_dict()), dict(net.state_dict()))
    assert_same_tensors(other.state_dict(), method.state_dict())


@each
def test_loading_shares_no_memory(case: Case) -> None:
    net = network("EulerLagrange")
    optimizer, method = optimizer_of("EulerLagrange", net), case.make()
    method.on_start(net, optimizer)
    run(net, optimizer, method, range(3))
    before = copy.deepcopy(method.state_dict())
    method.detach()
    other_net = network("EulerLagrange")
    other_optimizer, other = optimizer_of("EulerLagrange", other_net), case.make()
    other.load_state_dict(method.state_dict())
    other.on_start(other_net, other_optimizer)
    run(other_net, other_optimizer, other, range(3))
    assert_same_tensors(method.state_dict(), before)


@each
@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))], ids=["deepcopy", "pickle"]
)
def test_copies_go_on_identically(case: Case, clone) -> None:
    kind = "EulerLagrange"
    net = network(kind)
    optimizer, method = optimizer_of(kind, net), case.make(3)
    method.on_start(net, optimizer)
    run(net, optimizer, method, range(10))
    method.detach()
    copied, other_optimizer, other = clone((net, optimizer, method))
    for model, its_optimizer, its_method in ((net, optimizer, method), (copied, other_optimizer, other)):
        its_method.on_start(model, its_optimizer)
        run(model, its_optimizer, its_method, range(10, 20))
    assert_same_tensors(dict(copied.state_dict()), dict(net.state_dict()))


@each
def test_a_copy_before_the_start_is_as_new(case: Case) -> None:
    nets = [network("EulerLagrange") for _ in range(2)]
    original = case.make(3)
    for net, method in zip(nets, (original, copy.deepcopy(original)), strict=True):
        optimizer = optimizer_of("EulerLagrange", net)
        method.on_start(net, optimizer)
        run(net, optimizer, method, range(8))
        method.detach()
    assert_same_tensors(dict(nets[0].state_dict()), dict(nets[1].state_dict()))


@each
def test_starting_again_changes_nothing(case: Case) -> None:
    """A new fit in the middle of a stream: no hook doubles, no state or random stream starts over."""
    nets = [network("EulerLagrange") for _ in range(2)]
    for net, again in zip(nets, (False, True), strict=True):
        optimizer, method = optimizer_of("EulerLagrange", net), case.make(3)
        method.on_start(net, optimizer)
        run(net, optimizer, method, range(7))
        if again:
            method.on_start(net, optimizer)
        run(net, optimizer, method, range(7, 14))
    assert_same_tensors(dict(nets[0].state_dict()), dict(nets[1].state_dict()))


@each
def test_detach_leaves_no_hook(case: Case) -> None:
    net = network("EulerLagrange")
    optimizer, method = optimizer_of("EulerLagrange", net), case.make()
    method.on_start(net, optimizer)
    method.detach()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in net.modules())


@each
def test_told_of_switches(case: Case) -> None:
    assert case.make().told_of_switches == case.told


@pytest.mark.parametrize("case", [case for case in CASES if case.seeded], ids=lambda case: case.name)
def test_wrong_number_of_seeds_is_refused(case: Case) -> None:
    for net in (network("EulerLagrange"), replicas.stack([network("EulerLagrange", seed) for seed in range(R)])):
        with pytest.raises(ValueError, match=r"seed: expected a number, or one for each of (no|3) replicas"):
            case.make([1, 2]).on_start(net, optimizer_of("EulerLagrange", net))


@each
def test_method_does_something_and_the_loss_still_falls(case: Case) -> None:
    """Guards the other tests: with and without the method, training differs."""
    nets = [network("EulerLagrange") for _ in range(2)]
    settings = {
        "ContinualBackprop": {"replacement_rate": 0.2},
        "GradedContinualBackprop": {"rate": 0.5},
        "ReDo": {"threshold": 0.9},
    }.get(case.name, {})
    for net, method in zip(nets, (case.make(**settings), interventions.L2Init(0.0)), strict=True):
        optimizer = optimizer_of("EulerLagrange", net)
        method.on_start(net, optimizer)
        run(net, optimizer, method, range(14))
    assert not torch.allclose(nets[0][0].weight, nets[1][0].weight, rtol=1e-6)


def test_the_table_covers_every_intervention() -> None:
    kinds = {name for name in interventions.__all__ if issubclass(getattr(interventions, name), Intervention)}
    assert {case.name for case in CASES} == kinds - {"Intervention"}
    assert clagrange.interventions is interventions


@pytest.mark.parametrize(
    ("name", "settings", "error", "message"),
    [
        (
            "ContinualBackprop",
            {"replacement_rate": 1.5},
            ValueError,
            r"replacement_rate: expected .*\[0, 1\].*1\.5",
        ),
        ("ContinualBackprop", {"maturity": -1}, ValueError, r"maturity: "),
        ("ContinualBackprop", {"utility": "contributoin"}, ValueError, r"utility: .*did you mean 'contribution'"),
        ("ContinualBackprop", {"decay": 1.0}, ValueError, r"decay: expected a number in \[0, 1\), got 1"),
        ("ContinualBackprop", {"gain": -1.0}, ValueError, r"gain: "),
        ("Consolidation", {"weight": -1.0}, ValueError, r"weight: expected a number in \[0, inf\), got -1"),
        ("Consolidation", {"weight": "all"}, TypeError, r"weight: expected a number"),
        ("Consolidation", {"every": 0}, ValueError, r"every: expected a whole number of at least 1, got 0"),
        ("Consolidation", {"every": "switch"}, TypeError, r"every: expected a whole number"),
        ("ContinualBackprop", {"as_published": "yes"}, ValueError, r"as_published: "),
        ("GradedContinualBackprop", {"rate": 1.5}, ValueError, r"rate: expected a number in \[0, 1\], got 1\.5"),
        ("GradedContinualBackprop", {"every": 0}, ValueError, r"every: expected a whole number of at least 1"),
        ("GradedContinualBackprop", {"steepness": -1.0}, ValueError, r"steepness: "),
        ("GradedContinualBackprop", {"threshold": "low"}, TypeError, r"threshold: expected a number"),
        ("GradedContinualBackprop", {"decay": 1.0}, ValueError, r"decay: "),
        ("LastLayerReset", {"every": 0}, ValueError, r"every: expected a whole number of at least 1"),
        ("LastLayerReset", {"forget": "all"}, ValueError, r"forget: "),
        ("ReDo", {"threshold": -0.1}, ValueError, r"threshold: "),
        ("ReDo", {"score": "gradients"}, ValueError, r"score: .*did you mean 'gradient'"),
        ("ReDo", {"window": 0}, ValueError, r"window: expected a whole number of at least 1"),
        ("SelfNormalizedResets", {"rejection": 2.0}, ValueError, r"rejection: expected a number in \[0, 1\]"),
        ("SelfNormalizedResets", {"longest": 0}, ValueError, r"longest: expected a whole number of at least 1"),
        ("InputNormalization", {"eps": 0.0}, ValueError, r"eps: "),
        ("L2Init", {"strength": -1.0}, ValueError, r"strength: "),
        ("L2Init", {"resample": "steps"}, ValueError, r"resample: .*did you mean 'step'"),
        ("RegenerativeL1", {"strength": -1.0}, ValueError, r"strength: "),
        ("HareAndTortoise", {"decay": 1.5}, ValueError, r"decay: "),
        ("HareAndTortoise", {"every": 0.5}, TypeError, r"every: expected a whole number"),
        ("NormalizeAndProject", {"every": 0}, ValueError, r"every: "),
        ("SoftReset", {"posterior_scale": 0.0}, ValueError, r"posterior_scale: expected .*\(0, 1\], got 0"),
        ("SoftReset", {"scope": "weights"}, ValueError, r"scope: .*did you mean 'weight'"),
        ("SoftReset", {"origin": "one"}, ValueError, r"origin: "),
        ("SpectralRegularization", {"strength": -1.0}, ValueError, r"strength: "),
        ("SpectralRegularization", {"power": 0.0}, ValueError, r"power: "),
        ("ShrinkAndPerturb", {"every": 0}, ValueError, r"every: expected a whole number of at least 1, got 0"),
        ("ShrinkAndPerturb", {"perturbation": "init"}, ValueError, r"perturbation: .*did you mean 'initial'"),
        ("ShrinkAndPerturb", {"shrink": 2.0}, ValueError, r"shrink: expected a number in \[0, 1\], got 2"),
        ("ShrinkAndPerturb", {"noise": -1.0}, ValueError, r"noise: "),
        ("ShrinkAndPerturb", {"every": "steps"}, ValueError, r"every: .*did you mean 'step'"),
        ("VarianceInjection", {"strength": 1.1}, ValueError, r"strength: "),
        (
            "VarianceInjection",
            {"multiply": 0.5},
            ValueError,
            r"multiply: expected a number in \[1, inf\), got 0.5",
        ),
        ("VarianceInjection", {"draw": "priors"}, ValueError, r"draw: .*did you mean 'prior'"),
        ("VarianceInjection", {"where": "low_utilities"}, ValueError, r"where: .*did you mean 'low_utility'"),
        ("VarianceInjection", {"share": 2.0}, ValueError, r"share: "),
        ("VarianceInjection", {"over": 0}, ValueError, r"over: "),
        ("VarianceInjection", {"equilibrium": 1.5}, TypeError, r"equilibrium: "),
        ("VarianceInjection", {"equilibrium": 5, "over": 2}, ValueError, r"over: expected 1 with equilibrium"),
        ("VarianceInjection", {"widen": "all"}, TypeError, r"widen: expected a number"),
    ],
)
def test_bad_arguments_are_named(name: str, settings: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        getattr(interventions, name)(**settings)
