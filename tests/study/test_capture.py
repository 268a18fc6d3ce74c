"""Captured steps, on a stand-in for CUDA graphs that repeats recorded operations on recorded memory."""

import contextlib
import gc
import importlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from cases import study_methods
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from clagrange import gaussianize, interventions
from clagrange.dynamics import Belief
from clagrange.gaussian import Diagonal, Kronecker, Structure, curvature, kronecker, sampling, set_sampling
from clagrange.interventions import Intervention
from clagrange.optim import EulerLagrange, StackedAdam, StackedMuon
from clagrange.replicas import generators_from_seeds, stack
from clagrange.study import capture, engine
from clagrange.study.capture import ORDINARY, CUDAGraphs, StepReplay, graphs_of, passes_replay, update_replays
from clagrange.study.engine import Run
from clagrange.study.methods import METHODS, Method
from clagrange.study.side_by_side import stacked
from clagrange.tasks import PermutedDigits, RotatedMNIST, SlowlyChangingRegression, SplitClasses, TaskStream

FROM_PACKAGES = {"ivon", "soap"}
"""Methods with the optimizer of another package, whose steps stay ordinary ones."""
WAITS = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal)


class Recorder(TorchDispatchMode):
    """What a CUDA graph keeps: operations, with the memory and the plain numbers that they were called with."""

    def __init__(self, generators: Iterable[torch.Generator] = ()) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self._before: list[tuple[Tensor, Tensor]] = []
        self._streams = [(generator, generator.get_state()) for generator in generators]
        self._registered = {generator._cdata for generator, _ in self._streams}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket in WAITS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}\nand more")
        drawn_from = kwargs.get("generator")
        if drawn_from is not None and drawn_from._cdata not in self._registered:
            raise RuntimeError(f"a generator that was not registered is used during capture: {func}")
        named = {argument.name: argument for argument in func._schema.arguments}
        for name, value in [*zip(named, args, strict=False), *kwargs.items()]:
            written = named[name].alias_info is not None and named[name].alias_info.is_write
            if written or name in ("running_mean", "running_var"):  # which schemas of batch norm do not mark
                self._before += [(tensor, tensor.clone()) for tensor in tree_leaves(value)]
        made = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, made))
        return made

    def undo(self) -> None:
        """A capture makes nothing happen."""
        for tensor, value in reversed(self._before):
            tensor.copy_(value)
        for generator, state in self._streams:
            generator.set_state(state)

    def replay(self) -> None:
        touched = tuple(value for value in tree_leaves(self.calls) if isinstance(value, Tensor))
        with torch.autograd._unsafe_preserve_version_counter(touched):  # nobody tells the host of changes
            self._repeat()

    def _repeat(self) -> None:
        for func, args, kwargs, made in self.calls:
            for place, value in zip(tree_leaves(made), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(place, Tensor) and place.data_ptr() != value.data_ptr():
                    place.copy_(value)


class Graphs:
    """In place of `clagrange.study.capture.CUDAGraphs`."""

    replays = 0
    device = torch.device("cpu")

    def aside(self, step: Callable[..., Any], *given: Tensor) -> Any:
        return step(*given)

    def record(
        self, step: Callable[..., Any], generators: Iterable[torch.Generator], *given: Tensor
    ) -> tuple[Callable[[], None], Any]:
        recorder = Recorder(generators)
        try:
            with recorder:
                made = step(*given)
        finally:
            with torch.no_grad():
                recorder.undo()

        def replay() -> None:
            type(self).replays += 1
            with torch.no_grad():
                recorder.replay()

        return replay, made


@pytest.fixture
def on_graphs(monkeypatch: pytest.MonkeyPatch) -> type[Graphs]:
    monkeypatch.setattr(engine, "graphs_of", lambda device: Graphs())
    monkeypatch.setattr(capture, "WORTHWHILE", 5)
    for module in (curvature, kronecker):
        monkeypatch.setattr(module, "looking_is_free", lambda tensor: False)
    monkeypatch.setattr(Graphs, "replays", 0)
    return Graphs


def finished(method: Any, streams: list[Any], network: Any = (8, 6), **settings: Any) -> Run:
    run = Run(method, streams, network, **settings)
    while run.next_task < run.tasks:
        run.run_task()
    return run


def streams(tasks: int = 3, examples: int = 80, batch_size: int = 8) -> list[PermutedDigits]:
    shape = {"tasks": tasks, "examples": examples, "batch_size": batch_size}
    return [PermutedDigits(**shape, seed=seed) for seed in (3, 8)]


def assert_same(run: Run, other: Run) -> None:
    for name, values in run.metrics.items():
        np.testing.assert_allclose(values, other.metrics[name], rtol=1e-6, atol=1e-7, err_msg=name)
    for one, another in zip(run.network.parameters(), other.network.parameters(), strict=True):
        torch.testing.assert_close(one, another)
    kept, expected = (tree_leaves([each.state for each in these.interventions]) for these in (run, other))
    for one, another in zip(kept, expected, strict=True):
        torch.testing.assert_close(one, another)


@pytest.mark.parametrize("name", study_methods())
def test_replayed_steps_are_ordinary_steps(
    name: str, on_graphs: type[Graphs], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all methods but IVON, whose package draws from torch's global stream."""
    replayed = finished(METHODS[name](), streams())
    assert on_graphs.replays == (0 if name == "ivon" else 3 * (10 - ORDINARY))
    assert update_replays(replayed.optimizer, replayed.interventions) is (name not in FROM_PACKAGES)
    monkeypatch.setattr(engine, "graphs_of", lambda device: None)
    assert_same(replayed, finished(METHODS[name](), streams()))


@pytest.mark.parametrize("name", ["sgd", "adam", "euler_lagrange"])
def test_settings_may_differ_between_replicas(
    name: str, on_graphs: type[Graphs], monkeypatch: pytest.MonkeyPatch
) -> None:
    methods = [METHODS[name](lr=lr) for lr in (1e-3, 3e-3)]
    replayed = finished(stacked(methods, 1), streams())
    assert on_graphs.replays > 0
    monkeypatch.setattr(engine, "graphs_of", lambda device: None)
    assert_same(replayed, finished(stacked(methods, 1), streams()))


@pytest.mark.parametrize("name", ["sgd", "adam"])
@pytest.mark.parametrize("kind", ["images", "numbers"])
def test_convolutions_norms_and_other_losses(
    name: str, kind: str, on_graphs: type[Graphs], monkeypatch: pytest.MonkeyPatch
) -> None:
    def some() -> tuple[list[TaskStream], Any]:
        shape: dict[str, Any] = {"tasks": 2, "examples": 80, "batch_size": 8}
        if kind == "numbers":
            return [SlowlyChangingRegression(**shape, seed=seed) for seed in (0, 1)], [4]
        turning: list[TaskStream] = [RotatedMNIST("digits", **shape, seed=seed) for seed in (0, 1)]
        return turning, {"kind": "resnet18", "norm": "batch", "width": 2}

    replayed = finished(METHODS[name](), *some())
    assert on_graphs.replays == 2 * (10 - ORDINARY)
    monkeypatch.setattr(engine, "graphs_of", lambda device: None)
    assert_same(replayed, finished(METHODS[name](), *some()))


def test_outputs_that_take_no_part_and_divergence(
    on_graphs: type[Graphs], monkeypatch: pytest.MonkeyPatch
) -> None:
    def split() -> list[SplitClasses]:
        return [SplitClasses("digits", tasks=3, examples=80, batch_size=8, seed=seed) for seed in (0, 1)]

    method = stacked([METHODS["sgd"](lr=lr) for lr in (0.1, 1e30)], 1)
    replayed = finished(method, split())
    assert replayed.diverged.tolist() == [False, True]
    assert on_graphs.replays > 0
    monkeypatch.setattr(engine, "graphs_of", lambda device: None)
    assert_same(replayed, finished(method, split()))


def test_where_the_capture_fails_steps_are_ordinary_ones_and_one_warning_says_so(
    on_graphs: type[Graphs], monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[int] = []

    def refuse(self: Graphs, step: Any, *given: Tensor) -> Any:
        tries.append(1)
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(Graphs, "record", refuse)
    refusal = r"could not be captured .*\(RuntimeError: operation not permitted when stream is capturing\)"
    with pytest.warns(RuntimeWarning, match=refusal) as seen:
        ordinary = finished(METHODS["adam"](), streams(5))
    assert len(seen) == len(tries) == 1
    monkeypatch.setattr(engine, "graphs_of", lambda device: None)
    assert_same(ordinary, finished(METHODS["adam"](), streams(5)))


@pytest.mark.parametrize("breaks_off", ["passes", "update"])
@pytest.mark.parametrize("name", ["draws", "factors", "surprise", "units"])
def test_a_capture_that_breaks_off_leaves_nothing_behind(
    name: str, breaks_off: str, on_graphs: type[Graphs], monkeypatch: pytest.MonkeyPatch
) -> None:
    def surprised(seeds: Any) -> list[Intervention]:
        detector = interventions.PredictiveSurprise(threshold=0.1, warm_up=3, samples=2, seed=seeds)
        return [interventions.VarianceInjection(0.5, detector=detector, seed=seeds)]

    method = {
        "draws": With(Diagonal("sampled", sampling="batch")),
        "factors": With(Kronecker(observe_every=3, refresh_every=6)),
        "surprise": With(Diagonal(), surprised),
        "units": With("adam", WHOLE["units"]),
    }[name]

    def record(
        graphs: Graphs, step: Callable[..., Any], generators: Iterable[torch.Generator], *given: Tensor
    ) -> Any:
        garbage = [torch.full_like(given[0], torch.nan), torch.zeros_like(given[1])]
        forward = nn.Module.__call__

        def breaking(module: nn.Module, *inputs: Any) -> Any:
            made = forward(module, *inputs)
            if module is network:
                raise RuntimeError("out of memory")
            return made

        states = [generator.get_state() for generator in generators]
        with monkeypatch.context() as broken:
            if breaks_off == "passes":
                network = runs[-1].network
                broken.setattr(nn.Module, "__call__", breaking)
            with Recorder(generators) as recorder:
                try:
                    step(*garbage)
                finally:
                    with torch.no_grad():
                        recorder.undo()
                    for generator, state in zip(generators, states, strict=True):
                        generator.set_state(state)
        raise RuntimeError("out of memory")

    runs: list[Run] = []
    start = Run.__init__
    monkeypatch.setattr(
        Run, "__init__", lambda run, *args, **rest: (runs.append(run), start(run, *args, **rest))[1]
    )
    monkeypatch.setattr(Graphs, "record", record)
    with pytest.warns(RuntimeWarning, match="out of memory"):
        after = finished(method, streams())
    monkeypatch.setattr(engine, "graphs_of", lambda device: None)
    assert_same(after, finished(method, streams()))


def test_a_step_that_waits_fails_to_be_captured() -> None:
    with pytest.raises(RuntimeError, match="dense"):
        Graphs().record(lambda inputs, targets: (targets + float(inputs[0]),), [], torch.ones(2), torch.ones(2))


def test_short_tasks_are_not_captured(on_graphs: type[Graphs], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "WORTHWHILE", 11)
    finished(METHODS["adam"](), streams())
    assert on_graphs.replays == 0


def test_nothing_outlives_its_task(on_graphs: type[Graphs]) -> None:
    """Graphs have memory of their own, which evaluation and other runs need."""
    run = Run(METHODS["adam"](), streams(), [8, 6])
    run.run_task()
    run.try_steps(5)
    gone = weakref.ref(run)
    gc.disable()
    try:
        del run
        assert gone() is None
    finally:
        gc.enable()


@dataclass(frozen=True)
class With(Method):
    """A base optimizer, or the Euler-Lagrange flow with some precision, beside any interventions."""

    source = "a test"
    base: str | Structure
    acting: Callable[[Any], list[Intervention]] = lambda seeds: []

    @property
    def samples_weights(self) -> bool:  # type: ignore[override]
        return isinstance(self.base, Structure) and self.base.sampling != "mean"

    def prepare(self, network: nn.Module, seeds: Any) -> None:
        if isinstance(self.base, Structure):
            gaussianize(network, self.base)
            if self.samples_weights:
                set_sampling(
                    network, self.base.sampling, generators_from_seeds(seeds), antithetic=self.base.antithetic
                )

    def optimizer(self, network: nn.Module) -> torch.optim.Optimizer:
        if isinstance(self.base, Structure):
            return EulerLagrange(network, lr=1e-2, temperature=1e-3)
        return METHODS[self.base]().optimizer(network)

    def interventions(self, seeds: Any) -> list[Intervention]:
        return self.acting(seeds)


def shown_twice(method: Method, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> tuple[int, int, Run]:
    """Replays, captured updates, and the run; which is the same without replays."""
    updates: list[int] = []
    update = Run._update
    monkeypatch.setattr(Run, "_update", lambda self, losses: (updates.append(1), update(self, losses))[1])
    Graphs.replays = 0
    replayed = finished(method, streams(**settings))
    replays, made = Graphs.replays, len(updates)
    with monkeypatch.context() as without:
        without.setattr(engine, "graphs_of", lambda device: None)
        assert_same(replayed, finished(method, streams(**settings)))
    return replays, made, replayed


WHOLE = {
    "hare and tortoise": lambda seeds: [interventions.HareAndTortoise(0.9, every=4)],
    "shrink and perturb": lambda seeds: [interventions.ShrinkAndPerturb(0.1, 0.01, every=2, seed=seeds)],
    "last layer": lambda seeds: [interventions.LastLayerReset(every=3, seed=seeds)],
    "normalize": lambda seeds: [interventions.NormalizeAndProject(every=2)],
    "w0 of switches": lambda seeds: [interventions.L2Init(0.1, resample="switch", seed=seeds)],
    "units": lambda seeds: [interventions.ContinualBackprop(0.1, maturity=2, seed=seeds)],
    "units by gradients": lambda seeds: [interventions.ReDo(0.9, every=4, score="gradient", seed=seeds)],
    "units a little": lambda seeds: [interventions.GradedContinualBackprop(0.5, every=3, seed=seeds)],
    "layers a little": lambda seeds: [interventions.SoftReset()],
    "weights a little": lambda seeds: [interventions.SoftReset(scope="weight")],
    "spectrum": lambda seeds: [interventions.SpectralRegularization(0.1, seed=seeds)],
    "inputs": lambda seeds: [interventions.InputNormalization()],
    "several": lambda seeds: [
        interventions.L2Init(0.1),
        interventions.ContinualBackprop(0.1, maturity=2, utility="adaptable_contribution", seed=seeds),
        interventions.SelfNormalizedResets(0.2, longest=5, seed=seeds),
        interventions.InputNormalization(),
    ],
}
APART = {
    "w0 of steps": lambda seeds: [interventions.RegenerativeL1(0.1, resample="step", seed=seeds)],
    "a window of gradients": lambda seeds: [
        interventions.ReDo(0.9, every=4, score="gradient", window=2, seed=seeds)
    ],
    "jumps of the loss": lambda seeds: [
        interventions.FullReset(detector=interventions.CUSUM(threshold=0.1, warm_up=3), seed=seeds)
    ],
    "jumps of the energy": lambda seeds: [
        interventions.FullReset(detector=interventions.EnergyJump(threshold=0.1, warm_up=3), seed=seeds)
    ],
}
GAUSSIAN = {
    "consolidated": lambda seeds: [interventions.Consolidation(every=8)],
    "injected in parts": lambda seeds: [interventions.VarianceInjection(0.5, over=5, seed=seeds)],
    "to the equilibrium": lambda seeds: [interventions.VarianceInjection(0.5, equilibrium=5, seed=seeds)],
}


@pytest.mark.parametrize("base", ["sgd", "adam"])
@pytest.mark.parametrize("name", WHOLE | APART)
def test_what_acts_beside_the_optimizer(
    name: str, base: str, on_graphs: type[Graphs], monkeypatch: pytest.MonkeyPatch
) -> None:
    replays, updates, _ = shown_twice(With(base, (WHOLE | APART)[name]), monkeypatch)
    assert replays == 3 * (10 - ORDINARY)
    assert updates == 3 * (10 if name in APART else ORDINARY + 1)


@pytest.mark.parametrize("name", GAUSSIAN)
def test_what_acts_on_gaussian_weights(
    name: str, on_graphs: type[Graphs], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may replace memory that is captured, which is then captured again."""
    replays, _, _ = shown_twice(With(Diagonal(), GAUSSIAN[name]), monkeypatch, examples=160)
    assert replays >= 20


@pytest.mark.parametrize(
    ("precision", "updates"),
    [
        (Diagonal("per_example"), 4),
        (Diagonal(sampling="batch"), 4),
        (Diagonal("sampled", sampling="example"), 4),
        (Diagonal("sampled", sampling="batch", antithetic=True), None),
        (Kronecker(sampling="batch"), None),
    ],
    ids=str,
)
def test_curvature_and_draws(
    precision: Structure, updates: int | None, on_graphs: type[Graphs], monkeypatch: pytest.MonkeyPatch
) -> None:
    replays, made, _ = shown_twice(With(precision), monkeypatch)
    assert replays == (0 if updates is None else 3 * (10 - ORDINARY))
    assert made == 3 * (updates or 10)


@pytest.mark.parametrize("precision", [Diagonal("per_example"), Diagonal("sampled", sampling="batch")], ids=str)
def test_what_was_observed_waits_for_an_ordinary_update(
    precision: Structure, on_graphs: type[Graphs], monkeypatch: pytest.MonkeyPatch
) -> None:
    def acting(seeds: Any) -> list[Intervention]:
        return [interventions.VarianceInjection(0.5, detector=interventions.CUSUM(), seed=seeds)]

    replays, updates, _ = shown_twice(With(precision, acting), monkeypatch)
    assert replays == 3 * (10 - ORDINARY)
    assert updates == 3 * 10


@pytest.mark.parametrize(("observe_every", "refresh_every"), [(3, 6), (4, 10)])
@pytest.mark.parametrize("damping", ["factored", "exact"])
def test_steps_that_observe_factors_and_steps_that_invert_them(
    damping: str, observe_every: int, refresh_every: int, on_graphs: type[Graphs], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each kind of steps is captured once in a task; the update of those that invert stays ordinary."""
    kinds: list[int] = []
    record = Graphs.record
    monkeypatch.setattr(Graphs, "record", lambda *given: (kinds.append(1), record(*given))[1])
    precision = Kronecker(damping, observe_every=observe_every, refresh_every=refresh_every)
    steps = 2 * refresh_every * 2
    method = With(precision, WHOLE["layers a little"])
    replays, updates, _ = shown_twice(method, monkeypatch, tasks=2, examples=steps * 8)
    assert replays == 2 * (steps - ORDINARY)
    inverted = range(0, 2 * steps, refresh_every)
    observing = {step for step in inverted if step % observe_every == 0}
    captured = 2 + bool(observing) + bool(set(inverted) - observing - {0})
    assert len(kinds) == 2 * captured
    first = [step for step in inverted if step % steps < ORDINARY]
    assert updates == 2 * (ORDINARY + 2) + len(inverted) - len(first)


def test_what_the_host_decides_of_a_step_with_factors(on_graphs: type[Graphs]) -> None:
    """After how many steps they are observed: a step without examples is made up for in the next."""
    network = gaussianize(nn.Linear(4, 2), Kronecker(observe_every=3, refresh_every=20))
    optimizer = EulerLagrange(network)
    keys = []
    for step in range(9):
        keys.append(network.weight_precision.replay_key)
        optimizer.zero_grad()
        network(torch.ones(30, 4)).sum().backward()
        if step == 6:
            for observer in network.observers():
                observer.clear()
        optimizer.step()
    assert keys == [None, 0, 0, 3, 0, 0, 3, 4, 0]


def test_surprise_of_what_the_network_saw(on_graphs: type[Graphs], monkeypatch: pytest.MonkeyPatch) -> None:
    def acting(seeds: Any) -> list[Intervention]:
        detector = interventions.PredictiveSurprise(threshold=0.1, warm_up=3, samples=2, seed=seeds)
        return [interventions.VarianceInjection(0.5, detector=detector, seed=seeds)]

    replays, updates, _ = shown_twice(With(Diagonal(), acting), monkeypatch)
    assert replays == 3 * (10 - ORDINARY)
    assert updates == 3 * 10


class Halving(Intervention):
    """Halves a learning rate after some step, or replaces a parameter's memory there."""

    def __init__(self, at: int, what: str) -> None:
        super().__init__()
        self.state["left"] = at
        self.what = what

    def on_step(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.state["left"] -= 1
        if self.state["left"] == 0 and self.what == "setting":
            optimizer.param_groups[0]["lr"] *= 0.5
        elif self.state["left"] == 0:
            state = optimizer.state[next(network.parameters())]
            state["exp_avg"] = 0.5 * state["exp_avg"]


@pytest.mark.parametrize("what", ["setting", "memory"])
def test_what_was_captured_and_is_replaced_is_noticed(
    what: str, on_graphs: type[Graphs], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After some more ordinary steps the next one is captured."""
    replays, _, _ = shown_twice(With("adam", lambda seeds: [Halving(6, what)]), monkeypatch, examples=160)
    assert replays == 3 * (20 - ORDINARY) - capture.WORTHWHILE


def test_a_setting_of_an_intervention_may_be_changed(
    on_graphs: type[Graphs], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Growing(interventions.L2Init):
        def on_step(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
            self.state["steps"] = self.state.get("steps", 0) + 1
            if self.state["steps"] == 6:
                self.strength = 0.5

    replays, _, _ = shown_twice(With("adam", lambda seeds: [Growing(0.1)]), monkeypatch, examples=160)
    assert replays == 3 * (20 - ORDINARY) - capture.WORTHWHILE


def test_a_step_that_replaces_its_memory_is_not_captured(
    on_graphs: type[Graphs], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(()))

        def forward(self, inputs: Tensor) -> Tensor:
            if self.training:
                self.mean = 0.9 * self.mean + inputs.detach().mean()
            return inputs + self.mean

    class Centred(With):
        def prepare(self, network: nn.Module, seeds: Any) -> None:
            network[1] = nn.Sequential(Counting(), network[1])

    with pytest.warns(RuntimeWarning, match="replaces what it works on by something new"):
        replayed = finished(Centred("adam"), streams())
    monkeypatch.setattr(engine, "graphs_of", lambda device: None)
    assert_same(replayed, finished(Centred("adam"), streams()))


def test_layers_that_are_not_trained_have_no_say(
    on_graphs: type[Graphs], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their factors are never inverted, so that they are due in every step."""

    class Frozen(With):
        def prepare(self, network: nn.Module, seeds: Any) -> None:
            super().prepare(network, seeds)
            next(module for module in network if isinstance(module, nn.Linear)).requires_grad_(False)

    _, updates, _ = shown_twice(Frozen(Kronecker(observe_every=3, refresh_every=100)), monkeypatch)
    assert updates == 3 * (ORDINARY + 2)


def test_hooks_that_nobody_knows(on_graphs: type[Graphs]) -> None:
    class Watching(Intervention):
        def on_start(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
            super().on_start(network, optimizer)
            self._handles.append(network.register_forward_hook(lambda *_: None))

    finished(With("adam", lambda seeds: [Watching()]), streams())
    assert on_graphs.replays == 0
    network = nn.Linear(2, 1)
    assert passes_replay(network, [])
    network.register_full_backward_hook(lambda *_: None)
    assert not passes_replay(network, [])


def test_settings_of_interventions_go_to_the_device(
    on_graphs: type[Graphs], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A capture cannot copy them from the host."""
    monkeypatch.setattr(Graphs, "device", torch.device("meta"))
    network = nn.Linear(2, 1)
    optimizer, l2 = StackedAdam(network.parameters(), lr=torch.ones(2)), interventions.L2Init(torch.ones(2))
    StepReplay(network, optimizer, Graphs()).begin([l2], 100)  # type: ignore[arg-type]
    assert l2.strength.device.type == optimizer.param_groups[0]["lr"].device.type == "meta"


def test_an_optimizer_of_torch_hears_of_the_capture(on_graphs: type[Graphs]) -> None:
    """It refuses otherwise, and complains if it is told so outside of one."""
    network = nn.Linear(2, 1)
    optimizer = torch.optim.Adam(network.parameters(), fused=True)
    told: list[bool] = []

    def passes(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return inputs + targets, inputs

    replay = StepReplay(network, optimizer, Graphs())  # type: ignore[arg-type]
    replay.begin([], ORDINARY + 3)
    for number in range(ORDINARY + 3):
        made, _ = replay(
            passes,
            lambda _: told.append(optimizer.param_groups[0]["capturable"]),
            torch.full((2,), number),
            torch.ones(2),
        )
        assert made.tolist() == [number + 1.0] * 2
    assert told == [False] * ORDINARY + [True]
    assert not optimizer.param_groups[0]["capturable"]


def test_which_optimizers_step_the_same_each_time() -> None:
    weight = nn.Parameter(torch.zeros(2))
    fused, plain = (torch.optim.Adam([weight], fused=fused) for fused in (True, False))
    assert update_replays(fused, [])
    assert not update_replays(plain, [])
    assert not update_replays(torch.optim.RMSprop([weight]), [])


@pytest.mark.parametrize("kind", [StackedAdam, StackedMuon])
def test_stacked_optimizers_never_wait_for_a_gpu(kind: Any) -> None:
    """On tensors without values whatever asks for one fails."""
    with FakeTensorMode():
        weight = nn.Parameter(torch.zeros(2, 4, 3, device="cuda"))
        optimizer = kind([weight])
        optimizer.param_groups[0]["lr"] = torch.zeros(2, device="cuda")
        for _ in range(2):
            weight.grad = torch.zeros_like(weight)
            optimizer.step()
    assert {value.device.type for value in optimizer.state[weight].values()} == {"cuda"}


class Watch(TorchDispatchMode):
    """Refuses what a capture does: to take a tensor from the host to the device or back, and to wait."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        tensors = [value for value in tree_leaves((args, kwargs, made)) if isinstance(value, Tensor)]
        copied = "copy" in str(func) and len({tensor.device for tensor in tensors}) > 1
        if copied or func.overloadpacket in WAITS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        return made


class OnHost(torch.Generator):
    """A random stream for a device that has none."""

    def __new__(cls, device: Any = "cpu") -> "OnHost":
        return super().__new__(cls, "cpu")


def refusing(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function that makes tensors of plain numbers, which a capture cannot bring to the device."""

    def checked(data: Any, **settings: Any) -> Tensor:
        made = make(data, **settings)
        if made.device.type != "cpu" and not isinstance(data, Tensor):
            raise RuntimeError(f"operation not permitted when stream is capturing: {make.__name__}({data})")
        return made

    return checked


@pytest.fixture
def on_meta(on_graphs: type[Graphs], monkeypatch: pytest.MonkeyPatch) -> str:
    """A device without numbers, so that who asks for one fails; with what torch lacks on it."""

    def record(
        graphs: Graphs, step: Callable[..., Any], generators: Any, *given: Tensor
    ) -> tuple[Callable[[], None], Any]:
        with Watch(), monkeypatch.context() as capturing:
            for name in ("tensor", "as_tensor"):
                capturing.setattr(torch, name, refusing(getattr(torch, name)))
            return lambda: None, step(*given)

    monkeypatch.setattr(Graphs, "record", record)
    monkeypatch.setattr(Graphs, "device", torch.device("meta"))
    monkeypatch.setattr(torch, "Generator", OnHost)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(sampling.Stream, "move", lambda *_: None)
    monkeypatch.setattr(kronecker, "damped_inverse", lambda factor, *_: torch.empty_like(factor))
    optimizers = importlib.import_module("torch.optim.optimizer")
    monkeypatch.setattr(optimizers, "_get_fused_kernels_supported_devices", lambda: ["meta"])
    return "meta"


def captured_kinds(run: Run) -> int:
    """How many kinds of steps are captured when some were made, on a device without numbers."""
    run._prepare_steps()
    replay = run._replay
    assert isinstance(replay, StepReplay)
    for _ in range(2 * ORDINARY):
        inputs, targets = torch.zeros(2, 8, 64), torch.zeros(2, 8, dtype=torch.long)
        replay(run._passes, run._update, inputs.to(run.device), targets.to(run.device))
    return len(replay._captured)


@pytest.mark.parametrize("varied", [False, True])
@pytest.mark.parametrize("name", study_methods())
def test_what_is_captured_takes_nothing_from_the_host(name: str, varied: bool, on_meta: str) -> None:
    """Such as a setting that differs between replicas, of which a stand-in on a CPU cannot tell where it is."""
    method = METHODS[name]()
    if varied:
        settings = ("lr", "temperature", "variance_rate", "l2", "strength", "rate", "gamma_lr", "noise", "memory")
        numbers = {setting: getattr(method, setting, None) for setting in settings}
        halves = {setting: 0.5 * number for setting, number in numbers.items() if isinstance(number, float)}
        method = stacked([method, replace(method, **halves)], 1)
    run = Run(method, streams(), [8, 6], device=on_meta)
    for intervention in run.interventions:
        intervention.on_start(run.network, run.optimizer)
    assert captured_kinds(run) == (name != "ivon")


@dataclass(frozen=True)
class Nested(With):
    """Settings that are tensors inside of tuples and of beliefs."""

    def optimizer(self, network: nn.Module) -> torch.optim.Optimizer:
        some, others = torch.tensor([0.9, 0.8]), torch.tensor([0.99, 0.9])
        if isinstance(self.base, str):
            return StackedAdam(network.parameters(), betas=(some, others))
        return EulerLagrange(network, discount=0.5, curvature_decay=Belief(some, others, 0.1), lr=some)


@pytest.mark.parametrize("base", ["adam", Diagonal(), Kronecker(observe_every=2)], ids=str)
def test_settings_inside_of_settings(base: Any, on_meta: str) -> None:
    """Those of a belief stay on the host, which works out its rate at each step: updates are ordinary ones."""
    run = Run(Nested(base), streams(), [8, 6], device=on_meta)
    assert captured_kinds(run)
    assert update_replays(run.optimizer, []) is (base == "adam")


def test_without_a_capture_settings_may_be_on_the_host(on_meta: str) -> None:
    network = stack([nn.Linear(4, 2) for _ in range(2)]).to(on_meta)
    gaussianize(network, Kronecker(observe_every=2))
    optimizer = EulerLagrange(network, lr=torch.tensor([1e-3, 3e-3]), temperature=torch.tensor([1e-3, 1e-2]))
    for _ in range(4):
        optimizer.zero_grad()
        network(torch.zeros(2, 8, 4, device=on_meta)).sum().backward()
        optimizer.step()


def test_the_order_of_streams_and_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of torch.cuda, which no machine without a GPU can answer."""
    asked: list[str] = []

    class Stream:
        def __init__(self, name: Any) -> None:
            self.name = name if isinstance(name, str) else "own"

        def wait_stream(self, other: "Stream") -> None:
            asked.append(f"{self.name} waits for {other.name}")

    class Graph:
        def register_generator_state(self, generator: torch.Generator) -> None:
            asked.append("registered")

        def replay(self) -> None:
            asked.append("replay")

    @contextlib.contextmanager
    def within(name: str) -> Iterator[None]:
        asked.append(name)
        yield
        asked.append(f"end of {name}")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Stream("main"))
    monkeypatch.setattr(torch.cuda, "device", lambda device: within(str(device)))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: within(f"stream {stream.name}"))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: within(f"capture on {stream.name}"))
    graphs = graphs_of(torch.device("cuda:1"))
    assert isinstance(graphs, CUDAGraphs)

    def step(inputs: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        asked.append("step")
        return (inputs,)

    graphs.aside(step, torch.ones(1), torch.ones(1))
    assert asked == [
        "cuda:1",
        "own waits for main",
        "stream own",
        "step",
        "end of stream own",
        "main waits for own",
        "end of cuda:1",
    ]
    asked.clear()
    replay, _ = graphs.record(step, [torch.Generator()], torch.ones(1), torch.ones(1))
    assert asked[:5] == ["registered", "cuda:1", "stream main", "capture on own", "step"]
    replay()
    assert asked[-1] == "replay"
