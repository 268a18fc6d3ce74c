"""Captured steps, on a stand-in for CUDA graphs that repeats recorded operations on recorded memory."""

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from cases import study_methods
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import clagrange
from clagrange import interventions
from clagrange.gaussian import Diagonal
from clagrange.optim import EulerLagrange, StackedAdam, StackedMuon
from clagrange.study import capture, engine
from clagrange.study.capture import ORDINARY, CUDAGraphs, StepReplay, graphs_of, may_capture
from clagrange.study.engine import Run
from clagrange.study.methods import METHODS
from clagrange.study.side_by_side import stacked
from clagrange.tasks import PermutedDigits, RotatedMNIST, SlowlyChangingRegression, SplitClasses, TaskStream

CAPTURED = {
    "adam",
    "adam_l2",
    "crelu",
    "euler_lagrange",
    "euler_lagrange_injection",
    "fresh_network",
    "head_reset",
    "last_layer_reset",
    "layer_norm",
    "muon",
    "sgd",
}
WAITS = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal)


class Recorder(TorchDispatchMode):
    """What a CUDA graph keeps: operations, with the memory and the plain numbers that they were called with."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self._before: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket in WAITS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}\nand more")
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

    def replay(self) -> None:
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

    def record(self, step: Callable[..., Any], *given: Tensor) -> tuple[Callable[[], None], Any]:
        recorder = Recorder()
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
    monkeypatch.setattr(Graphs, "replays", 0)
    return Graphs


def finished(method: Any, streams: list[Any], network: Any = (8, 6), **settings: Any) -> Run:
    run = Run(method, streams, network, **settings)
    while run.next_task < run.tasks:
        run.run_task()
    return run


def streams(tasks: int = 3) -> list[PermutedDigits]:
    return [PermutedDigits(tasks=tasks, examples=80, batch_size=8, seed=seed) for seed in (3, 8)]


def assert_same(run: Run, other: Run) -> None:
    for name, values in run.metrics.items():
        np.testing.assert_allclose(values, other.metrics[name], rtol=1e-6, atol=1e-7, err_msg=name)
    for one, another in zip(run.network.parameters(), other.network.parameters(), strict=True):
        torch.testing.assert_close(one, another)


@pytest.mark.parametrize("name", study_methods())
def test_replayed_steps_are_ordinary_steps(
    name: str, on_graphs: type[Graphs], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And methods that a replay would get wrong are not captured."""
    replayed = finished(METHODS[name](), streams())
    steps = 3 * (10 - ORDINARY)
    assert on_graphs.replays == (steps if name in CAPTURED else 0)
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


def test_a_step_that_waits_fails_to_be_captured() -> None:
    with pytest.raises(RuntimeError, match="dense"):
        Graphs().record(lambda inputs, targets: (targets + float(inputs[0]),), torch.ones(2), torch.ones(2))


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


def test_an_optimizer_of_torch_hears_of_the_capture(on_graphs: type[Graphs]) -> None:
    """It refuses otherwise, and complains if it is told so outside of one."""
    optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(2))], fused=True)
    told: list[bool] = []

    def step(inputs: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        told.append(optimizer.param_groups[0]["capturable"])
        return (inputs + targets,)

    replay = StepReplay(optimizer, Graphs())  # type: ignore[arg-type]
    replay.begin([], ORDINARY + 3)
    for number in range(ORDINARY + 3):
        assert replay(step, torch.full((2,), number), torch.ones(2))[0].tolist() == [number + 1.0] * 2
    assert told == [False] * ORDINARY + [True]
    assert not optimizer.param_groups[0]["capturable"]


@pytest.mark.parametrize(
    ("precision", "may"),
    [
        ("diagonal", True),
        ("kronecker", False),
        (Diagonal(sampling="batch"), False),
        (Diagonal("per_example"), False),
    ],
)
def test_which_gaussian_weights_may_be_captured(precision: Any, may: bool) -> None:
    net = clagrange.gaussianize(nn.Linear(3, 2), precision=precision)
    assert may_capture(EulerLagrange(net), []) is may


def test_which_optimizers_and_interventions_may_be_captured() -> None:
    weight = nn.Parameter(torch.zeros(2))
    fused, plain = (torch.optim.Adam([weight], fused=fused) for fused in (True, False))
    assert may_capture(fused, [])
    assert not may_capture(plain, [])
    assert not may_capture(torch.optim.RMSprop([weight]), [])
    for intervention, may in (
        (interventions.FullReset(), True),
        (interventions.FullReset(detector=interventions.CUSUM()), False),
        (interventions.LastLayerReset(), True),
        (interventions.LastLayerReset(every=3), False),
        (interventions.Consolidation(), True),
        (interventions.Consolidation(every=3), False),
        (interventions.ShrinkAndPerturb(every="switch"), True),
        (interventions.ShrinkAndPerturb(every=3), False),
        (interventions.VarianceInjection(), True),
        (interventions.VarianceInjection(over=3), False),
        (interventions.L2Init(), False),
    ):
        assert may_capture(fused, [intervention]) is may, intervention


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


def test_the_order_of_streams_and_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of torch.cuda, which no machine without a GPU can answer."""
    asked: list[str] = []

    class Stream:
        def __init__(self, name: Any) -> None:
            self.name = name if isinstance(name, str) else "own"

        def wait_stream(self, other: "Stream") -> None:
            asked.append(f"{self.name} waits for {other.name}")

    class Graph:
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
    replay, _ = graphs.record(step, torch.ones(1), torch.ones(1))
    assert asked[2:4] == ["capture on own", "step"]
    assert asked[:2] == ["cuda:1", "stream main"]
    replay()
    assert asked[-1] == "replay"
