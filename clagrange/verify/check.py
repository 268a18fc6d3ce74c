"""A check, where it computes, and the list of all."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Check:
    """One comparison of what theory says with what this machine computed.

    Attributes:
        part: what it belongs to.
        name: what was compared.
        expected: the value of the theory, in words or digits.
        found: what came.
        error: distance between the two, in the unit of ``tolerance``.
        tolerance: largest error that passes.
    """

    part: str
    name: str
    expected: str
    found: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the error is a number and within the tolerance."""
        return self.error <= self.tolerance


@dataclass(frozen=True)
class Place:
    """Where a check computes, with its random stream and its tolerances."""

    device: torch.device
    dtype: torch.dtype

    def tensor(self, values: Any) -> Tensor:
        """A tensor there."""
        return torch.as_tensor(values, dtype=self.dtype, device=self.device)

    def stream(self) -> torch.Generator:
        """A random stream of its own, the same in every run."""
        return torch.Generator(self.device).manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers, the same on every device."""
        drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        return self.tensor(drawn)

    def rounding(self, times: float) -> float:
        """So many units of the last digit: 2.2e-16 or 1.2e-7 each."""
        return times * torch.finfo(self.dtype).eps


CHECKS: list[tuple[str, str, Callable[[Place], tuple[Any, Any, float, float]]]] = []
"""Part, name, and a function that gives expected, found, error and tolerance."""


def check(part: str, name: str) -> Callable[[Any], Any]:
    """Register a function that gives expected, found, error and tolerance."""

    def register(function: Callable[[Place], tuple[Any, Any, float, float]]) -> Any:
        CHECKS.append((part, name, function))
        return function

    return register


def largest(found: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest entry."""
    return float((found - expected).abs().max() / expected.abs().max())
