"""Training steps as CUDA graphs: a small network's step takes a GPU less time than launching its kernels."""

import contextlib
import copy
import itertools
import operator
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from clagrange.gaussian import DiagonalPrecision, GaussianLayer, Precision
from clagrange.gaussian.sampling import WeightSampler
from clagrange.interventions import Intervention
from clagrange.interventions.hooked import Hooked
from clagrange.optim import BGD, MESU, UPGD, EulerLagrange, StackedAdam, StackedMuon, StackedSGD

ORDINARY = 3
"""Steps before a capture: they make the optimizer's state and what libraries keep for themselves."""

WORTHWHILE = 50
"""Steps of a task from which on one is captured, which takes some milliseconds: a guess until it is measured."""

_REPLAYABLE = (
    torch.optim.SGD,
    torch.optim.Adam,
    StackedSGD,
    StackedAdam,
    StackedMuon,
    UPGD,
    EulerLagrange,
    BGD,
    MESU,
)
"""Optimizers of which a step can be the same operations on the same memory each time."""

Passes = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Forward and backward pass: what they make of inputs and targets, logits and losses."""

Update = Callable[[Tensor], None]
"""What is done with losses and gradients, up to the step of the optimizer."""


def passes_replay(network: nn.Module, interventions: Sequence[Intervention]) -> bool:
    """Whether forward and backward pass do nothing on the host that their replay would miss.

    What they leave there for the update is known of Gaussian layers, and of interventions and detectors that say
    so (``gathers``), not of other hooks. Draws of the weights replay where precisions are diagonal and no draw is
    the negative of the one before.

    Example:
        >>> passes_replay(nn.Linear(2, 1), [])
        True
    """
    hooked = _hooked(interventions)
    modules = list(network.modules())
    known = sum(each.hooks for each in hooked if each.gathers is not None)
    if known < sum(_hooks_of(module) for module in modules):
        return False
    return all(_draws_replay(module) for module in modules if isinstance(module, GaussianLayer))


def update_replays(optimizer: Optimizer, interventions: Sequence[Intervention]) -> bool:
    """Whether what follows the passes, up to the step of the optimizer, is the same at every step.

    That holds for SGD, Adam (torch's: the fused one), Muon, UPGD and the optimizers of Gaussian weights, but for
    steps of which a precision says otherwise (`Precision.replay_key`); and of interventions that look at losses
    and gradients for those that say they replay. Others count steps on the host, or wait for numbers.

    Example:
        >>> update_replays(torch.optim.SGD([torch.zeros(1)]), [])
        True
    """
    if type(optimizer) not in _REPLAYABLE or not all(intervention.replays for intervention in interventions):
        return False
    fused = all(group["fused"] for group in optimizer.param_groups if "fused" in group)
    return fused or type(optimizer) is not torch.optim.Adam  # whose other forms count their steps on the host


class StepReplay:
    """Training steps that are captured after some ordinary ones, and from then on replayed on new batches.

    Forward and backward pass are captured, and with them the update where that replays too. What the passes leave
    on the host for later is handed out again after each replay, which has filled its tensors anew.

    A replay repeats the captured operations on the captured memory with the captured plain numbers. So batches
    must be of one shape until the next `begin`. If anything else that was captured is replaced, such as a buffer
    or a setting of the optimizer, the capture is given up, and made again some steps later. Where a step cannot
    be captured a warning says so, and all steps are ordinary ones.

    Args:
        network: that is trained.
        optimizer: of the network; what of its settings are tensors goes to the device.
        graphs: of the device.
    """

    _modules: list[nn.Module]
    _layers: list[GaussianLayer]
    _precisions: list[Precision]
    _hooked: list[Hooked]
    _ordinary: int  # steps that are left before the capture
    _given: tuple[Tensor, ...]
    _replaceable: list[Any]
    _captured: "dict[Hashable, _Captured]"  # by what differs from step to step

    def __init__(self, network: nn.Module, optimizer: Optimizer, graphs: "CUDAGraphs") -> None:
        self._network = network
        self._optimizer = optimizer
        self._graphs = graphs
        self._failed = False
        self.end()
        if type(optimizer) in _REPLAYABLE:
            for group in optimizer.param_groups:
                _move_tensors(group, graphs.device)

    def begin(self, interventions: Sequence[Intervention], steps: int) -> None:
        """Make ready for so many steps, to capture one if that is worth it and possible with interventions."""
        self.end()
        if self._failed or steps < WORTHWHILE or not passes_replay(self._network, interventions):
            return
        self._may = True
        self._apart = not update_replays(self._optimizer, interventions)
        for intervention in interventions if not self._apart else ():
            _move_tensors(vars(intervention), self._graphs.device)
        self._modules = list(self._network.modules())
        self._layers = [module for module in self._modules if isinstance(module, GaussianLayer)]
        self._precisions = [block.precision for layer in self._layers for block in layer.blocks()]
        self._hooked = _hooked(interventions)

    def end(self) -> None:
        """Give back what was captured, and its memory; steps are ordinary ones until the next `begin`."""
        self._may = self._apart = False
        self._modules, self._layers, self._precisions, self._hooked = [], [], [], []
        self._give_up(ORDINARY)

    def _give_up(self, ordinary: int) -> None:
        """Forget what was captured; so many steps are ordinary ones before the next capture."""
        self._ordinary = ordinary
        self._given, self._replaceable, self._captured = (), [], {}

    def __call__(self, passes: Passes, update: Update, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Make a step on a batch: what the passes make of it, in memory of its own."""

        def step(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            logits, losses = passes(inputs, targets)
            update(losses)
            return logits, losses

        if not self._may:
            return step(inputs, targets)
        if self._captured and not _same(self._replaceable, self._now()):
            self._give_up(WORTHWHILE)
        if self._ordinary > 0:
            self._ordinary -= 1
            return self._graphs.aside(step, inputs, targets)
        # what observers look at, and what precisions do, may differ from step to step
        wanted = tuple(observer.wanted for layer in self._layers for observer in layer.observers())
        keys = tuple(precision.replay_key for precision in self._precisions)
        apart = self._apart or None in keys
        variant = (wanted, apart or keys)
        new = variant not in self._captured
        if new:
            try:
                self._captured[variant] = self._capture(passes if apart else step, inputs, targets)
            except Exception as error:  # CUDA's and torch's own are of many kinds
                self.end()
                self._failed = True
                _warn_of(error)
                return step(inputs, targets)
        for place, value in zip(self._given, (inputs, targets), strict=True):
            place.copy_(value)
        logits, losses = self._captured[variant].replay()
        if apart:
            update(losses)
        for precision in self._precisions if not (apart or new) else ():  # a capture has called all on the host
            precision.step_replayed()
        return logits.clone(), losses.clone()

    def _capture(self, step: Passes, inputs: Tensor, targets: Tensor) -> "_Captured":
        if not self._given:
            self._given = (inputs.clone(), targets.clone())
        samplers = filter(None, map(_sampler_of, self._layers))
        generators = [stream.generator for sampler in samplers for stream in sampler.random_streams]
        if isinstance(self._optimizer, UPGD):
            generators += self._optimizer.generators
        with _said_to_be_captured(self._optimizer):
            replay, made = self._graphs.record(step, generators, *self._given)
        self._replaceable = self._now()
        observers = (observer for layer in self._layers for observer in layer.observers())
        return _Captured(replay, made, self._network.parameters(), [*self._layers, *observers, *self._hooked])

    def _now(self) -> list[Any]:
        """What a step works on and with, in its present form."""
        held: Iterable[Mapping[Any, Any]] = itertools.chain.from_iterable(
            (module._parameters, module._buffers) for module in self._modules
        )
        if not self._apart:
            held = itertools.chain(held, self._optimizer.state.values(), self._optimizer.param_groups)
        return [value for values in held for value in values.values()]


class _Captured:
    """A captured step, with what it left on the host.

    Args:
        replay: makes the step.
        made: what it makes, each time in the same memory.
        parameters: with their gradients.
        gatherers: whatever has ``gathers``.
    """

    def __init__(
        self,
        replay: Callable[[], None],
        made: tuple[Tensor, Tensor],
        parameters: Iterable[nn.Parameter],
        gatherers: Iterable[Any],
    ) -> None:
        self._replay = replay
        self._made = made
        self._gradients = [(parameter, parameter.grad) for parameter in parameters]
        self._gathered = [
            (gatherer, name, copy.copy(getattr(gatherer, name)))
            for gatherer in gatherers
            for name in gatherer.gathers or ()
        ]

    def replay(self) -> tuple[Tensor, Tensor]:
        """Make the step, and leave on the host what it left there when it was captured."""
        self._replay()
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        for gatherer, name, value in self._gathered:
            setattr(gatherer, name, copy.copy(value))
        return self._made


class CUDAGraphs:
    """What torch has for capturing, on one device and a stream of its own.

    Attributes:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)

    def aside(self, step: Passes, *given: Tensor) -> tuple[Tensor, Tensor]:
        """Call on the stream of its own, as torch wants it before a capture."""
        with torch.cuda.device(self.device):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                made = step(*given)
            torch.cuda.current_stream().wait_stream(self._stream)
        return made

    def record(
        self, step: Passes, generators: Iterable[torch.Generator], *given: Tensor
    ) -> tuple[Callable[[], None], tuple[Tensor, Tensor]]:
        """Capture a call without making it: how to replay it, and where it will leave what it makes.

        Random numbers are drawn from these generators, and at each replay they go on.
        """
        graph = torch.cuda.CUDAGraph()
        for generator in generators:
            graph.register_generator_state(generator)
        with (
            torch.cuda.device(self.device),
            torch.cuda.stream(torch.cuda.current_stream(self.device)),  # returns to it where a capture breaks off
            torch.cuda.graph(graph, stream=self._stream),
        ):
            made = step(*given)
        return graph.replay, made


def graphs_of(device: torch.device) -> CUDAGraphs | None:
    """The graphs of a device; None where it has none."""
    return CUDAGraphs(device) if device.type == "cuda" else None


def _hooked(interventions: Sequence[Intervention]) -> list[Hooked]:
    """The interventions, and their detectors."""
    detectors = (intervention.detector for intervention in interventions)
    return [*interventions, *(detector for detector in detectors if detector is not None)]


def _hooks_of(module: nn.Module) -> int:
    kinds = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return sum(map(len, kinds))


def _sampler_of(layer: GaussianLayer) -> WeightSampler | None:
    sampler = layer._modules.get("sampler")
    assert sampler is None or isinstance(sampler, WeightSampler)
    return sampler


def _draws_replay(layer: GaussianLayer) -> bool:
    sampler = _sampler_of(layer)
    if sampler is None:
        return True
    return not sampler.antithetic and all(
        isinstance(block.precision, DiagonalPrecision) for block in layer.blocks()
    )


def _move_tensors(values: Any, device: torch.device) -> None:
    """Put the tensors among values on a device: from elsewhere a capture cannot copy them."""
    values.update({name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)})


def _same(before: list[Any], now: list[Any]) -> bool:
    return len(before) == len(now) and all(map(operator.is_, before, now))


def _warn_of(error: Exception) -> None:
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    warnings.warn(
        f"the training step could not be captured in a CUDA graph, and each of its kernels is launched by "
        f"itself, which takes longer ({reason})",
        RuntimeWarning,
        stacklevel=3,
    )


@contextlib.contextmanager
def _said_to_be_captured(optimizer: Optimizer) -> Iterator[None]:
    """Tell an optimizer of torch's, which else refuses; outside of a capture it would complain."""
    groups = [group for group in optimizer.param_groups if "capturable" in group]
    before = [group["capturable"] for group in groups]
    for group in groups:
        group["capturable"] = True
    try:
        yield
    finally:
        for group, value in zip(groups, before, strict=True):
            group["capturable"] = value
