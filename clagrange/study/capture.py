"""Training steps as CUDA graphs: a small network's step takes a GPU less time than launching its kernels."""

import contextlib
import copy
import itertools
import operator
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from clagrange.gaussian import DiagonalPrecision, GaussianLayer, Precision
from clagrange.gaussian.sampling import WeightSampler
from clagrange.interventions import Intervention
from clagrange.interventions.hooked import Hooked
from clagrange.optim import BGD, MESU, UPGD, EulerLagrange, StackedAdam, StackedMuon, StackedSGD
from clagrange.optim.perceptron_sgd import hooks_of

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
    if known < sum(map(hooks_of, modules)):
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
    settings = itertools.chain.from_iterable(group.values() for group in optimizer.param_groups)
    beliefs = (value for value in settings if isinstance(value, dict))
    if any(isinstance(number, Tensor) for belief in beliefs for number in belief.values()):
        return False  # which the host works with in each step
    fused = all(group["fused"] for group in optimizer.param_groups if "fused" in group)
    return fused or type(optimizer) is not torch.optim.Adam  # whose other forms count their steps on the host


class StepReplay:
    """Training steps that are captured after some ordinary ones, and from then on replayed on new batches.

    Forward and backward pass are captured, and with them the update where that replays too. What the passes leave
    on the host for later is handed out again after each replay, which has filled its tensors anew.

    A replay repeats the captured operations on the captured memory with the captured plain numbers. So batches
    must be of one shape until the next `begin`. If a parameter, a buffer, the optimizer's state, or a setting of
    it or of an intervention is replaced, the capture is given up, and made again some steps later. Where a step
    cannot be captured, or replaces any of these itself, a warning says so, and all steps are ordinary ones.

    Args:
        network: that is trained.
        optimizer: of the network; settings of it that are tensors go to the device.
        graphs: of the device.
    """

    _modules: list[nn.Module]
    _layers: list[GaussianLayer]
    _precisions: list[Precision]
    _interventions: Sequence[Intervention]
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
        blocks = (block for layer in self._layers for block in layer.blocks())
        self._precisions = [
            block.precision for block in blocks if any(mean.requires_grad for mean in block.means)
        ]
        self._interventions = interventions

    def end(self) -> None:
        """Give back what was captured, and its memory; steps are ordinary ones until the next `begin`."""
        self._may = self._apart = False
        self._modules, self._layers, self._precisions, self._interventions = [], [], [], []
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
        """Capture a step; where that fails all is on the host as it was."""
        if not self._given:
            self._given = (inputs.clone(), targets.clone())
        samplers = list(filter(None, map(_sampler_of, self._layers)))
        generators = [stream.generator for sampler in samplers for stream in sampler.random_streams]
        if isinstance(self._optimizer, UPGD):
            generators += self._optimizer.generators
        observers = (observer for layer in self._layers for observer in layer.observers())
        gatherers = [*self._layers, *observers, *samplers, *_hooked(self._interventions)]
        before, counters = _Attributes(gatherers, "gathers"), _Attributes(self._precisions, "host_state")
        held = [(values, dict(values)) for values in self._held()]
        self._replaceable = self._now()
        try:
            with _said_to_be_captured(self._optimizer):
                replay, made = self._graphs.record(step, generators, *self._given)
            if not _same(self._replaceable, self._now()):
                raise RuntimeError("the step replaces what it works on by something new, such as a buffer")
        except Exception:
            before.restore()
            counters.restore()
            for values, earlier in held:
                values.update(earlier)
            raise
        return _Captured(replay, made, self._network.parameters(), _Attributes(gatherers, "gathers"))

    def _held(self) -> Iterator[dict[Any, Any]]:
        """What holds the memory that a step works on, and the settings that it works with."""
        for module in self._modules:
            yield from (module._parameters, module._buffers)
        if not self._apart:
            yield from (*self._optimizer.state.values(), *self._optimizer.param_groups)
            yield from map(vars, self._interventions)

    def _now(self) -> list[Any]:
        """Both as they are; of interventions not what they keep, which is theirs to look after."""
        held = itertools.chain.from_iterable(values.values() for values in self._held())
        return [value for value in held if not isinstance(value, dict | list)]


class _Captured:
    """A captured step, with what it left on the host.

    Args:
        replay: makes the step.
        made: what it makes, each time in the same memory.
        parameters: with their gradients.
        left: on the host, beside these.
    """

    def __init__(
        self,
        replay: Callable[[], None],
        made: tuple[Tensor, Tensor],
        parameters: Iterable[nn.Parameter],
        left: "_Attributes",
    ) -> None:
        self._replay = replay
        self._made = made
        self._gradients = [(parameter, parameter.grad) for parameter in parameters]
        self._left = left

    def replay(self) -> tuple[Tensor, Tensor]:
        """Make the step, and leave on the host what it left there when it was captured."""
        self._replay()
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        self._left.restore()
        return self._made


class _Attributes:
    """Attributes of objects, as they are now.

    Args:
        owners: the objects.
        names: of the attribute of each in which their names are; None there for none.
    """

    def __init__(self, owners: Iterable[Any], names: str) -> None:
        self._values = [
            (owner, name, _copied(getattr(owner, name)))
            for owner in owners
            for name in getattr(owner, names) or ()
        ]

    def restore(self) -> None:
        """Make them so again."""
        for owner, name, value in self._values:
            setattr(owner, name, _copied(value))


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


def _move_tensors(settings: dict[str, Any], device: torch.device) -> None:
    """Put tensors among settings, alone or in tuples, on a device: from elsewhere a capture cannot copy them."""
    for name, value in settings.items():
        if isinstance(value, Tensor):
            settings[name] = value.to(device)
        elif isinstance(value, tuple):
            settings[name] = tuple(part.to(device) if isinstance(part, Tensor) else part for part in value)


def _copied(value: Any) -> Any:
    return copy.copy(value) if isinstance(value, dict | list) else value


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
