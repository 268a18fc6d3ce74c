"""What a method of a study is, and methods that stand on SGD or Adam."""

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from clagrange._checks import Number, check_choice
from clagrange.interventions import Intervention
from clagrange.optim import StackedAdam, StackedSGD
from clagrange.study.extras import extra_module


@dataclass(frozen=True)
class Method(ABC):
    """One way of training a network on a stream.

    Attributes:
        source: where the method was published.
        samples_weights: whether the network computes with drawn weights in training; its predictions are then
            those of an evaluation, at the mean.
        extra: the optional extra of clagrange that it needs, see `clagrange.study.extras`; None for most.
    """

    source: ClassVar[str]
    samples_weights: ClassVar[bool] = False
    extra: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        """Say at once where a package is missing."""
        if self.extra is not None:
            extra_module(self.extra)

    def prepare(self, network: nn.Module, seeds: int | Sequence[int]) -> None:  # noqa: B027
        """Change the fresh network in place, such as by making it Gaussian, with the seeds of the replicas."""

    @abstractmethod
    def optimizer(self, network: nn.Module) -> Optimizer:
        """The optimizer of the prepared network."""

    def interventions(self, seeds: int | Sequence[int]) -> list[Intervention]:
        """What else is done to the network, with the seeds of the replicas' random streams."""
        return []

    @property
    def told_of_switches(self) -> bool:
        """Whether the method uses the announcement of task switches."""
        return any(intervention.told_of_switches for intervention in self.interventions(0))


def sgd(network: nn.Module, lr: Number, l2: Number = 0.0) -> Optimizer:
    """torch's SGD, or its stacked form where a number differs between replicas."""
    stacked = isinstance(lr, Tensor) or isinstance(l2, Tensor)
    kind: Any = StackedSGD if stacked else torch.optim.SGD
    return kind(network.parameters(), lr=lr, weight_decay=l2)  # type: ignore[no-any-return]


def adam(network: nn.Module, lr: Number, l2: Number = 0.0) -> Optimizer:
    """torch's Adam, or its stacked form where a number differs between replicas."""
    if isinstance(lr, Tensor) or isinstance(l2, Tensor):
        return StackedAdam(network.parameters(), lr=lr, weight_decay=l2)
    return torch.optim.Adam(network.parameters(), lr=lr, weight_decay=l2, fused=True)


_BASES = {"sgd": sgd, "adam": adam}


class BasedMethod(Method):
    """A method that stands on SGD or Adam: its settings are the learning rate ``lr`` and the name ``base``."""

    lr: float
    base: str

    def optimizer(self, network: nn.Module) -> Optimizer:
        """The base optimizer."""
        check_choice("base", self.base, _BASES)
        return _BASES[self.base](network, self.lr)


def snake_case(name: str) -> str:
    """The name of a class as study files write it.

    Example:
        >>> snake_case("PermutedMNIST"), snake_case("AdamL2"), snake_case("L2Init")
        ('permuted_mnist', 'adam_l2', 'l2_init')
    """
    return re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=\d)(?=[A-Z])", "_", name).lower()
