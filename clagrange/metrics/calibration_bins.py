"""Calibration that is added up in bins, so that a stream of any length takes the same memory."""

import torch
from torch import Tensor

from clagrange._checks import check_count

BINS = 15
"""Equal bins of the confidence."""


def calibration_bins(probabilities: Tensor, targets: Tensor, bins: int = BINS) -> Tensor:
    """Examples, confidence and hits in every bin of the confidence, the largest probability.

    What it gives for batches, or for processes, is added; `binned_calibration_error` reads the sum.

    Args:
        probabilities: of the classes, (N, C) or (R, N, C).
        targets: class numbers, (N,) or (R, N).
        bins: number of equal bins of [0, 1].

    Returns:
        (3, bins) or (R, 3, bins): numbers of examples, sums of confidence, numbers of hits.

    Example:
        >>> calibration_bins(torch.tensor([[0.9, 0.1], [0.3, 0.7]]), torch.tensor([0, 0]), bins=2)
        tensor([[0.0000, 2.0000],
                [0.0000, 1.6000],
                [0.0000, 1.0000]])
    """
    check_count("bins", bins)
    probabilities = probabilities.to(torch.promote_types(probabilities.dtype, torch.float32))
    confidence, predicted = probabilities.max(-1)
    index = (confidence.nan_to_num() * bins).long().clamp(0, bins - 1)
    each = torch.stack([torch.ones_like(confidence), confidence, (predicted == targets).to(confidence)], -2)
    sums = each.new_zeros(*each.shape[:-1], bins)
    return sums.scatter_add_(-1, index.unsqueeze(-2).expand(each.shape), each)


def binned_calibration_error(sums: Tensor) -> Tensor:
    """Σ_b (n_b/n)·|accuracy_b − confidence_b| from what `calibration_bins` added up.

    Args:
        sums: (..., 3, bins).

    Returns:
        Numbers in [0, 1], (...); NaN without examples.

    Source: Naeini et al. (2015), Guo et al. (2017).

    Example:
        >>> sums = calibration_bins(torch.tensor([[0.9, 0.1], [0.3, 0.7]]), torch.tensor([0, 0]))
        >>> binned_calibration_error(sums)
        tensor(0.4000)
    """
    examples, confidence, hits = sums.unbind(-2)
    return (hits - confidence).abs().sum(-1) / examples.sum(-1)


def brier_scores(probabilities: Tensor, targets: Tensor) -> Tensor:
    """Σ_c (p_c − [c = target])² of every example, the shape of targets."""
    probabilities = probabilities.to(torch.promote_types(probabilities.dtype, torch.float32))
    one_hot = torch.nn.functional.one_hot(targets.long(), probabilities.shape[-1])
    return (probabilities - one_hot).square().sum(-1)
