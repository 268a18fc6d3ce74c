"""What is done to some replicas of a stacked network, and not to the others."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from clagrange.replicas import lists_by_replica

if TYPE_CHECKING:
    from clagrange.interventions.base import Intervention


@contextmanager
def only_replicas(
    chosen: Tensor, network: nn.Module, optimizer: Optimizer, intervention: "Intervention"
) -> Iterator[None]:
    """Let the body act on some replicas: weights, optimizer, state and random streams of the others stay.

    Optimizer state that the body removes comes back with zeros for the chosen replicas; a number that all
    replicas share, such as a step counter, is one for all. Nothing is copied where all replicas are chosen.

    Args:
        chosen: true at the replicas, (R,), or one entry for a single network.
        network: what the body changes.
        optimizer: of the network.
        intervention: that acts in the body.
    """
    if bool(chosen.all()):
        yield
        return
    keep = ~chosen
    parameters = [(parameter, parameter.detach().clone()) for parameter in network.parameters()]
    buffers = [
        (module, name, None if buffer is None else buffer.clone())
        for module in network.modules()
        for name, buffer in module._buffers.items()
    ]
    lists = [
        (module, name, list(getattr(module, name)))
        for module in network.modules()
        for name in lists_by_replica(module)
    ]
    optimizer_state = {parameter: _copied(state) for parameter, state in optimizer.state.items()}
    state = copy.deepcopy(intervention.state)
    generators: Any = intervention.generators
    streams = [generator.get_state() for generator in generators]
    yield
    with torch.no_grad():
        for parameter, start in parameters:
            _restore(parameter.data, start, keep)
        for module, name, earlier in buffers:
            _restore_buffer(module, name, earlier, keep)
        for module, name, listed in lists:
            now = zip(getattr(module, name), listed, keep.tolist(), strict=True)
            setattr(module, name, [earlier if stays else new for new, earlier, stays in now])
        for trained, entries in optimizer_state.items():
            _restore_entries(optimizer.state[trained], entries, keep)
        _restore_entries(intervention.state, state, keep)
    for stays, generator, stream in zip(keep.tolist(), generators, streams, strict=True):
        if stays:
            generator.set_state(stream)


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()}


def _restore(now: Tensor, before: Tensor, keep: Tensor) -> None:
    """Put the rows of ``before`` back into ``now``."""
    if now.dim() and now.shape[0] == len(keep):
        rows = keep.to(now.device)
        now[rows] = before[rows].to(now)


def _with_zeros(before: Tensor, keep: Tensor) -> Tensor:
    """A tensor as it was where a replica keeps it, and 0 elsewhere; a shared number as it was."""
    if before.dim() and before.shape[0] == len(keep):
        before[~keep.to(before.device)] = 0
    return before


def _restore_entries(now: dict[str, Any], before: dict[str, Any], keep: Tensor) -> None:
    for name, value in before.items():
        if isinstance(value, dict):
            _restore_entries(now[name], value, keep)
        elif isinstance(value, Tensor):
            if name in now:
                _restore(now[name], value, keep)
            else:
                now[name] = _with_zeros(value, keep)
        else:
            now.setdefault(name, value)


def _restore_buffer(module: nn.Module, name: str, before: Tensor | None, keep: Tensor) -> None:
    """As for other tensors; a precision that is consolidated in some replicas has an origin in all of them.

    Where it is not consolidated the prior's mean and precision are the origin's, and its factors 0.
    """
    now = module._buffers[name]
    if now is None:
        if before is not None:
            module._buffers[name] = before if name.startswith("origin") else _with_zeros(before, keep)
    elif before is not None and before.shape == now.shape:
        _restore(now, before, keep)
    elif before is not None:
        rows = keep.to(now.device).view(-1, *[1] * (now.dim() - 1))
        module._buffers[name] = torch.where(rows, before, now)
    elif not name.startswith("origin"):
        _with_zeros(now, ~keep)  # what a replica keeps is nothing
