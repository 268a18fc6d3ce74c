"""Optimizers of other packages for stacked networks: one for each replica."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from clagrange._checks import check_number, check_replicas


class OneByOne(Optimizer):
    """An optimizer of its own for each of the R networks of a stacked one, behind the interface of a single one.

    An optimizer that looks at the shape of a parameter, as SOAP does, takes a stack of R matrices for one
    tensor of three dimensions. Here each replica has an optimizer that sees its rows of the parameters alone, as
    parameters of their own on the same memory. R replicas take R times as long as one. One whose matrices have no
    decomposition any more, because it has diverged, becomes NaN; the others go on.

    Args:
        params: of the stacked network, all with R in front; those that require gradients are trained.
        make: the optimizer, called for each replica with its parameters and its ``numbers``.
        replicas: R.
        numbers: that may differ between replicas, under the names of the optimizer's parameter groups: a number,
            a tensor of shape (R,), or a tuple of these. They may be changed in ``param_groups``.

    Raises:
        TypeError: if a number is none.
        ValueError: if a tensor of numbers has not R of them.

    Example:
        >>> net = nn.Linear(3, 2)
        >>> pair = [nn.Parameter(torch.stack([p, p])) for p in net.parameters()]
        >>> optimizer = OneByOne(pair, torch.optim.SGD, replicas=2, lr=torch.tensor([0.0, 1.0]))
        >>> sum(p.sum() for p in pair).backward()
        >>> optimizer.step()
        >>> [bool((p[0] == q).all() and (p[1] == q - 1).all()) for p, q in zip(pair, net.parameters())]
        [True, True]
    """

    def __init__(
        self, params: Iterable[nn.Parameter], make: Callable[..., Optimizer], *, replicas: int, **numbers: Any
    ) -> None:
        for name, value in numbers.items():
            for entry in value if isinstance(value, tuple) else (value,):
                check_number(name, entry)
                check_replicas(name, entry, replicas)
        super().__init__(params, numbers)
        self._names = tuple(numbers)
        self._parameters = [
            parameter for group in self.param_groups for parameter in group["params"] if parameter.requires_grad
        ]
        self._rows = [
            [nn.Parameter(parameter.detach()[replica]) for parameter in self._parameters]
            for replica in range(replicas)
        ]
        self._optimizers = [make(rows, **self._numbers(replica)) for replica, rows in enumerate(self._rows)]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Let every replica take its step; a closure is evaluated first and its value returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for replica, (optimizer, rows) in enumerate(zip(self._optimizers, self._rows, strict=True)):
            for row, parameter in zip(rows, self._parameters, strict=True):
                row.data = parameter.detach()[replica]  # anew: the network may have moved in memory
                row.grad = None if parameter.grad is None else parameter.grad[replica]
            for group in optimizer.param_groups:
                group.update(self._numbers(replica))
            try:
                optimizer.step()
            except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
                for row in rows:
                    row.fill_(torch.nan)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The numbers, and the state of each replica's optimizer."""
        return {**super().state_dict(), "replicas": [optimizer.state_dict() for optimizer in self._optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        super().load_state_dict(state_dict)
        for optimizer, state in zip(self._optimizers, state_dict["replicas"], strict=True):
            optimizer.load_state_dict(state)

    def __getstate__(self) -> dict[str, Any]:  # torch's leaves out what a subclass adds
        own = {name: self.__dict__[name] for name in ("_names", "_parameters", "_rows", "_optimizers")}
        return {**super().__getstate__(), **own}

    def _numbers(self, replica: int) -> dict[str, Any]:
        return {name: of_replica(self.param_groups[0][name], replica) for name in self._names}


def of_replica(value: Any, replica: int) -> Any:
    """The number of one replica, of a number, a tensor of shape (R,), or a tuple of these."""
    if isinstance(value, tuple):
        return tuple(of_replica(entry, replica) for entry in value)
    return float(value[replica]) if isinstance(value, Tensor) and value.dim() else float(value)
