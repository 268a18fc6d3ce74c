"""How far predicted probabilities of classes can be trusted: calibration error, likelihood, Brier score.

Each is a function of probabilities and targets, and a torchmetrics class that adds them up over batches and over
processes. Lower is better in all. The module imports torchmetrics, which takes seconds; `clagrange.metrics` loads
it when one of its names is first used.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassCalibrationError
from torchmetrics.functional.classification import multiclass_calibration_error

from clagrange.metrics.calibration_bins import brier_scores

_TOLERANCE = 0.01  # of the sum of probabilities; that of a softmax in bfloat16 is off by some thousandths


def expected_calibration_error(probabilities: Tensor, targets: Tensor, bins: int = 15) -> Tensor:
    """Σ_b (n_b/n)·|accuracy_b − confidence_b| over equal bins b of the confidence, the largest probability.

    Args:
        probabilities: of the classes, (N, C) or (R, N, C); each row sums to 1.
        targets: class numbers, (N,) or (R, N).
        bins: number of bins.

    Returns:
        A number in [0, 1], or shape (R,).

    Raises:
        ValueError: for what are no probabilities, or targets of another shape or range.

    Source: Naeini et al. (2015), Guo et al. (2017); computed by torchmetrics.

    Example:
        >>> expected_calibration_error(torch.tensor([[0.9, 0.1], [0.3, 0.7]]), torch.tensor([0, 0]))
        tensor(0.4000)
    """
    probabilities, targets = _checked(probabilities, targets)
    *replicas, count, classes = probabilities.shape
    networks = zip(probabilities.reshape(-1, count, classes), targets.reshape(-1, count), strict=True)
    errors = [
        multiclass_calibration_error(_below_one(p), y, classes, n_bins=bins, validate_args=False)
        for p, y in networks
    ]
    return torch.stack(errors).view(replicas)


def negative_log_likelihood(probabilities: Tensor, targets: Tensor) -> Tensor:
    """−(1/N) Σ log p(target), in nats an example.

    A probability that rounding has made 0 counts as the smallest normal number, which costs 87 nats in float32.

    Args:
        probabilities: of the classes, (N, C) or (R, N, C); each row sums to 1.
        targets: class numbers, (N,) or (R, N).

    Returns:
        A number, or shape (R,).

    Raises:
        ValueError: for what are no probabilities, or targets of another shape or range.

    Example:
        >>> negative_log_likelihood(torch.tensor([[0.5, 0.5], [0.25, 0.75]]), torch.tensor([0, 0]))
        tensor(1.0397)
    """
    return _surprises(*_checked(probabilities, targets)).mean(-1)


def brier_score(probabilities: Tensor, targets: Tensor) -> Tensor:
    """(1/N) Σ_n Σ_c (p_nc − [c = target_n])²: over all classes, so that two classes give twice the binary score.

    Args:
        probabilities: of the classes, (N, C) or (R, N, C); each row sums to 1.
        targets: class numbers, (N,) or (R, N).

    Returns:
        A number in [0, 2], or shape (R,).

    Raises:
        ValueError: for what are no probabilities, or targets of another shape or range.

    Source: Brier (1950).

    Example:
        >>> brier_score(torch.tensor([[0.5, 0.5], [1.0, 0.0]]), torch.tensor([0, 0]))
        tensor(0.2500)
    """
    return brier_scores(*_checked(probabilities, targets)).mean(-1)


class ExpectedCalibrationError(MulticlassCalibrationError):
    """`expected_calibration_error` of everything since the last reset.

    Args:
        num_classes: C.
        bins: number of bins.
        settings: of `torchmetrics.Metric`.

    Example:
        >>> metric = ExpectedCalibrationError(num_classes=2)
        >>> metric.update(torch.tensor([[0.9, 0.1]]), torch.tensor([0]))
        >>> metric.update(torch.tensor([[0.3, 0.7]]), torch.tensor([0]))
        >>> metric.compute()
        tensor(0.4000)
    """

    def __init__(self, num_classes: int, bins: int = 15, **settings: Any) -> None:
        super().__init__(num_classes, n_bins=bins, norm="l1", validate_args=False, **settings)

    def update(self, probabilities: Tensor, targets: Tensor) -> None:
        """Add a batch: probabilities (N, C) and class numbers (N,)."""
        probabilities, targets = _checked(probabilities, targets, classes=self.num_classes)
        super().update(_below_one(probabilities), targets)


class _MeanScore(Metric, ABC):
    """The mean over all examples of a number for each."""

    is_differentiable = True
    higher_is_better = False
    full_state_update = False
    total: Tensor
    examples: Tensor

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("examples", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    @abstractmethod
    def _scores(self, probabilities: Tensor, targets: Tensor) -> Tensor:
        """The number of each example, (N,)."""

    def update(self, probabilities: Tensor, targets: Tensor) -> None:
        """Add a batch: probabilities (N, C) and class numbers (N,)."""
        scores = self._scores(*_checked(probabilities, targets, single=True))
        self.total = self.total + scores.sum()
        self.examples = self.examples + len(scores)

    def compute(self) -> Tensor:
        """The mean."""
        return self.total / self.examples


class NegativeLogLikelihood(_MeanScore):
    """`negative_log_likelihood` of everything since the last reset.

    Args:
        settings: of `torchmetrics.Metric`.

    Example:
        >>> metric = NegativeLogLikelihood()
        >>> metric(torch.tensor([[0.5, 0.5], [0.25, 0.75]]), torch.tensor([0, 0]))
        tensor(1.0397)
    """

    def _scores(self, probabilities: Tensor, targets: Tensor) -> Tensor:
        return _surprises(probabilities, targets)


class BrierScore(_MeanScore):
    """`brier_score` of everything since the last reset.

    Args:
        settings: of `torchmetrics.Metric`.

    Example:
        >>> metric = BrierScore()
        >>> metric(torch.tensor([[0.5, 0.5], [1.0, 0.0]]), torch.tensor([0, 0]))
        tensor(0.2500)
    """

    def _scores(self, probabilities: Tensor, targets: Tensor) -> Tensor:
        return brier_scores(probabilities, targets)


def _surprises(probabilities: Tensor, targets: Tensor) -> Tensor:
    chosen = probabilities.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return -chosen.clamp(min=torch.finfo(chosen.dtype).tiny).log()


def _below_one(probabilities: Tensor) -> Tensor:
    """Probabilities inside [0, 1).

    torchmetrics applies a softmax to a batch in which rounding has left one number above 1, and counts a
    confidence of exactly 1 in a bin of its own.
    """
    return probabilities.clamp(0.0, 1.0 - torch.finfo(probabilities.dtype).eps)


def _checked(
    probabilities: Tensor, targets: Tensor, *, single: bool = False, classes: int | None = None
) -> tuple[Tensor, Tensor]:
    """Probabilities in at least float32, and targets, once they are what they should be."""
    shape = tuple(probabilities.shape)
    wanted = "(N, C)" if single or classes else "(N, C) or (R, N, C)"
    dims = (2,) if single or classes else (2, 3)
    if len(shape) not in dims or shape[-1] < 2 or (classes is not None and shape[-1] != classes):
        raise ValueError(f"probabilities: expected shape {wanted} with C {classes or 'at least 2'}, got {shape}")
    if not probabilities.is_floating_point():
        raise ValueError(f"probabilities: expected floating-point numbers, got {probabilities.dtype}")
    if tuple(targets.shape) != shape[:-1] or targets.is_floating_point():
        raise ValueError(
            f"targets: expected class numbers of shape {shape[:-1]}, got {targets.dtype} of shape "
            f"{tuple(targets.shape)}"
        )
    probabilities = probabilities.to(torch.promote_types(probabilities.dtype, torch.float32))
    normal = (probabilities.sum(-1) - 1.0).abs() <= _TOLERANCE
    if not bool(normal.all()) or bool((probabilities < -_TOLERANCE).any()):
        raise ValueError(
            "probabilities: expected numbers of at least 0 that sum to 1 along the last dimension; apply "
            ".softmax(-1) to logits, and look for a network that diverged where there are NaN"
        )
    if bool(((targets < 0) | (targets >= shape[-1])).any()):
        raise ValueError(
            f"targets: expected class numbers from 0 to {shape[-1] - 1}, got {int(targets.min())} to "
            f"{int(targets.max())}"
        )
    return probabilities, targets.long()
