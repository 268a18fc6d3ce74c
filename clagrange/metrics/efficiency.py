"""How fast a network learns: samples or time to a threshold, and the area under the curve."""

import torch
from torch import Tensor

from clagrange._checks import check_number


def time_to_threshold(curve: Tensor, at: Tensor, threshold: float, *, higher_is_better: bool = False) -> Tensor:
    """T(δ): where an error is first at most δ, or an accuracy at least.

    T_sample where the points are counted in samples, T_compute where in seconds. With an interval over seeds:
    `clagrange.mechanics.samples_to_threshold` and `clagrange.mechanics.seconds_to_threshold`.

    Args:
        curve: error, or accuracy, at each point, (points,) or (R, points).
        at: samples or seconds up to each point, ascending, (points,) or (R, points).
        threshold: δ.
        higher_is_better: whether the curve is to rise to the threshold.

    Returns:
        A number in the unit of ``at``, inf where the threshold is never reached, or shape (R,).

    Raises:
        ValueError: if shapes do not fit, or ``at`` does not ascend.

    Example:
        >>> time_to_threshold(torch.tensor([0.9, 0.4, 0.2]), torch.tensor([10, 20, 30]), threshold=0.4)
        tensor(20., dtype=torch.float64)
    """
    return first_crossing(curve, at, threshold, higher_is_better=higher_is_better)


def first_crossing(
    curve: Tensor, at: Tensor, threshold: float, *, higher_is_better: bool = False, name: str = "at"
) -> Tensor:
    """`time_to_threshold`, whose errors call ``at`` by another name."""
    check_number("threshold", threshold)
    at = _checked(curve, at, points=1, name=name)
    reached = curve >= threshold if higher_is_better else curve <= threshold
    first = at.gather(-1, reached.byte().argmax(-1, keepdim=True)).squeeze(-1)
    return torch.where(reached.any(-1), first, torch.inf)


def area_under_curve(curve: Tensor, at: Tensor) -> Tensor:
    """∫ curve d(at) / (last − first), by the trapezoidal rule: the mean height of a learning curve.

    Args:
        curve: a value at each point, (points,) or (R, points); at least 2.
        at: samples or seconds up to each point, ascending, (points,) or (R, points).

    Returns:
        A number in the unit of the curve, or shape (R,).

    Raises:
        ValueError: if shapes do not fit, there are fewer than 2 points, or ``at`` does not ascend.

    Example:
        >>> area_under_curve(torch.tensor([0.0, 1.0, 1.0]), torch.tensor([0, 1, 2]))
        tensor(0.7500, dtype=torch.float64)
    """
    at = _checked(curve, at, points=2)
    return torch.trapezoid(curve.double(), at, dim=-1) / (at[..., -1] - at[..., 0])


def _checked(curve: Tensor, at: Tensor, points: int, name: str = "at") -> Tensor:
    """``at`` in the shape of the curve, in float64, which counts samples exactly."""
    if curve.dim() == 0 or curve.shape[-1] < points or at.shape not in (curve.shape, curve.shape[-1:]):
        raise ValueError(
            f"{name}: expected shape (points,), with at least {points}, or that of the curve "
            f"{tuple(curve.shape)}, got {tuple(at.shape)}"
        )
    if not bool((at.diff(dim=-1) >= 0).all()):
        raise ValueError(
            f"{name}: expected ascending numbers; sort the points, and let them count from the start"
        )
    return at.to(device=curve.device, dtype=torch.float64).expand(curve.shape)
