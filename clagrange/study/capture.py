"""Training steps as CUDA graphs: a small network's step takes a GPU less time than launching its kernels."""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from clagrange.gaussian import DiagonalPrecision, GaussianLayer, owner_of
from clagrange.interventions import Intervention
from clagrange.optim import EulerLagrange, StackedAdam, StackedMuon, StackedSGD

ORDINARY = 3
"""Steps before a capture: they make the optimizer's state and what libraries keep for themselves."""

WORTHWHILE = 50
"""Steps of a task from which on one is captured, which takes some milliseconds: a guess until it is measured."""

_REPLAYABLE = (torch.optim.SGD, torch.optim.Adam, StackedSGD, StackedAdam, StackedMuon, EulerLagrange)
"""Optimizers of which a step can be the same operations on the same memory each time."""

Step = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
"""What a step makes of inputs and targets."""


def may_capture(optimizer: Optimizer, interventions: Sequence[Intervention]) -> bool:
    """Whether a step does nothing on the host that its replay would miss.

    That holds for SGD, Adam (torch's: the fused one), Muon and the Euler-Lagrange flow of diagonal precisions
    that draw no weights and estimate the curvature by squared gradients, where interventions do nothing between
    switches. Others count steps, wait for numbers, or draw from random streams.

    Example:
        >>> may_capture(torch.optim.SGD([torch.zeros(1)]), [])
        True
    """
    if type(optimizer) not in _REPLAYABLE or any(
        intervention.acts_between_switches for intervention in interventions
    ):
        return False
    if type(optimizer) is torch.optim.Adam and not all(group["fused"] for group in optimizer.param_groups):
        return False  # it counts its steps on the host
    owners = (owner_of(parameter) for group in optimizer.param_groups for parameter in group["params"])
    return all(owner is None or _is_plain(*owner) for owner in owners)


def _is_plain(layer: GaussianLayer, name: str) -> bool:
    """Whether a Gaussian parameter is stepped by its gradient alone, without draws."""
    diagonal = isinstance(layer.precision_of(name), DiagonalPrecision)
    return diagonal and layer.observation_of(name) is None and not hasattr(layer, "sampler")


class StepReplay:
    """Training steps that are captured after some ordinary ones, and from then on replayed on new batches.

    A replay repeats the captured operations on the captured memory with the captured plain numbers. So steps must
    be the same until the next `begin`: their batches of one shape, the settings as they were, and nothing that
    they work on replaced. Where they cannot be captured a warning says so, and all steps are ordinary ones.

    Args:
        optimizer: that steps are made with; what of its settings are tensors goes to the device.
        graphs: of the device.
    """

    def __init__(self, optimizer: Optimizer, graphs: "CUDAGraphs") -> None:
        self._optimizer = optimizer
        self._graphs = graphs
        self._failed = False
        self.end()
        if type(optimizer) in _REPLAYABLE:
            for group in optimizer.param_groups:
                group.update((k, v.to(graphs.device)) for k, v in group.items() if isinstance(v, Tensor))

    def begin(self, interventions: Sequence[Intervention], steps: int) -> None:
        """Make ready for so many steps that are the same, if that is worth it and possible with interventions."""
        self.end()
        self._may = not self._failed and steps >= WORTHWHILE and may_capture(self._optimizer, interventions)

    def end(self) -> None:
        """Give back what was captured, and its memory; steps are ordinary ones until the next `begin`."""
        self._may = False
        self._ordinary = 0
        self._given: tuple[Tensor, ...] = ()
        self._made: tuple[Tensor, ...] = ()
        self._replay: Callable[[], None] | None = None

    def __call__(self, step: Step, inputs: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """What the step makes of a batch, in memory of its own."""
        if not self._may:
            return step(inputs, targets)
        if self._replay is None and self._ordinary < ORDINARY:
            self._ordinary += 1
            return self._graphs.aside(step, inputs, targets)
        if self._replay is None:
            self._record(step, inputs, targets)
        if self._replay is None:
            return step(inputs, targets)
        for place, value in zip(self._given, (inputs, targets), strict=True):
            place.copy_(value)
        self._replay()
        return tuple(value.clone() for value in self._made)

    def _record(self, step: Step, inputs: Tensor, targets: Tensor) -> None:
        self._given = (inputs.clone(), targets.clone())
        try:
            with _said_to_be_captured(self._optimizer):
                self._replay, self._made = self._graphs.record(step, *self._given)
        except Exception as error:  # CUDA's and torch's own are of many kinds
            self.end()
            self._failed = True
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            warnings.warn(
                f"the training step could not be captured in a CUDA graph, and each of its kernels is launched "
                f"by itself, which takes longer ({reason})",
                RuntimeWarning,
                stacklevel=3,
            )


class CUDAGraphs:
    """What torch has for capturing, on one device and a stream of its own.

    Attributes:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)

    def aside(self, step: Step, *given: Tensor) -> tuple[Tensor, ...]:
        """Call on the stream of its own, as torch wants it before a capture."""
        with torch.cuda.device(self.device):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                made = step(*given)
            torch.cuda.current_stream().wait_stream(self._stream)
        return made

    def record(self, step: Step, *given: Tensor) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
        """Capture a call without making it: how to replay it, and where it will leave what it makes."""
        graph = torch.cuda.CUDAGraph()
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
