"""Checks of arguments: every message names the argument, what was expected, what came."""

import difflib
import math
from collections.abc import Iterable

import torch
from torch import Tensor

Number = float | Tensor
"""A hyper-parameter: one number, or a tensor of shape (R,) with one number for each of R replicas."""


def check_number(
    name: str,
    value: object,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    open_low: bool = False,
    open_high: bool = False,
    hint: str = "",
) -> None:
    """Raise unless ``value`` is a number, or a (R,) tensor of numbers, between ``low`` and ``high``.

    Raises:
        TypeError: if it is neither a number nor a tensor.
        ValueError: if it is outside the interval, not a number, or a tensor of more than one dimension.
    """
    if isinstance(value, Tensor):
        if value.dim() > 1:
            raise ValueError(
                f"{name}: expected a number or a tensor of shape (replicas,), got shape {tuple(value.shape)}"
            )
        entries = [float(entry) for entry in value.reshape(-1)]
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        entries = [float(value)]
    else:
        raise TypeError(f"{name}: expected a number or a tensor of shape (replicas,), got {value!r}")
    for entry in entries:
        below = entry <= low if open_low else entry < low
        above = entry >= high if open_high else entry > high
        if math.isnan(entry) or below or above:
            interval = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"
            raise ValueError(f"{name}: expected a number in {interval}, got {entry:g}{hint and '; ' + hint}")


def check_positive(name: str, value: object, *, hint: str = "") -> None:
    """Raise unless ``value`` is a finite number above 0 (or a (R,) tensor of such numbers)."""
    check_number(name, value, low=0.0, high=math.inf, open_low=True, open_high=True, hint=hint)


def check_fraction(name: str, value: object, *, hint: str = "") -> None:
    """Raise unless ``value`` is in [0, 1] (or a (R,) tensor of such numbers)."""
    check_number(name, value, low=0.0, high=1.0, hint=hint)


def check_nonnegative(name: str, value: object, *, hint: str = "") -> None:
    """Raise unless ``value`` is a finite number of at least 0 (or a (R,) tensor of such numbers)."""
    check_number(name, value, low=0.0, high=math.inf, open_high=True, hint=hint)


def check_count(name: str, value: object) -> None:
    """Raise unless ``value`` is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected a whole number of at least 1, got {value!r}")
    if value < 1:
        raise ValueError(f"{name}: expected a whole number of at least 1, got {value}")


def check_replicas(name: str, value: object, replicas: int | None) -> None:
    """Raise if ``value`` is a (R,) tensor for a network of another number of replicas, or a single one (None).

    Shapes alone do not tell: R numbers also broadcast along the R units of a single layer.
    """
    if isinstance(value, Tensor) and value.dim() == 1 and len(value) != replicas:
        raise ValueError(
            f"{name}: expected a number{'' if replicas is None else f' or one for each of {replicas} replicas'}, "
            f"got {len(value)} numbers; stack the networks with clagrange.replicas.stack"
        )


def check_choice(name: str, value: object, choices: Iterable[object]) -> None:
    """Raise unless ``value`` is one of ``choices``; a near miss is named."""
    known = list(choices)
    if value not in known:
        words = [str(choice) for choice in known]
        raise ValueError(f"{name}: expected one of {', '.join(words)}; got {value!r}{did_you_mean(value, words)}")


def did_you_mean(value: object, known: Iterable[str]) -> str:
    """The tail of an error message that names the nearest known word, empty when none is near."""
    near = difflib.get_close_matches(str(value), list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def one_line(said: object) -> str:
    """What an error, or a text, says, in one line."""
    return " ".join(str(said).split())


def per_replica(value: Number, like: Tensor) -> Number:
    """Shape a hyper-parameter of shape (R,) so that it broadcasts along the leading dimension of ``like``.

    Numbers and 0-dimensional tensors pass through.

    Raises:
        ValueError: if the leading dimension of ``like`` is not R.
    """
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    if like.dim() == 0 or like.shape[0] != value.shape[0]:
        raise ValueError(
            f"a hyper-parameter of shape {tuple(value.shape)} needs tensors with {value.shape[0]} replicas in "
            f"front, got shape {tuple(like.shape)}; stack the networks with clagrange.replicas.stack"
        )
    return value.to(device=like.device, dtype=torch.promote_types(like.dtype, torch.float32)).view(
        -1, *[1] * (like.dim() - 1)
    )
