"""Trials side by side: methods whose numbers differ are one method, whose numbers are tensors."""

import dataclasses
import json
from typing import Any

import torch

from clagrange.study.methods import Method

MOST_REPLICAS = 48
"""Trials × seeds of one batched run."""


def batches(settings: list[dict[str, Any]], seeds: int) -> list[list[int]]:
    """Places of trials that can share a run: their words and whole numbers agree, and they are not too many."""
    groups: dict[str, list[int]] = {}
    for index, trial in enumerate(settings):
        words = {key: value for key, value in trial.items() if not isinstance(value, float)}
        groups.setdefault(json.dumps(words, sort_keys=True), []).append(index)
    most = max(1, MOST_REPLICAS // seeds)
    return [group[start : start + most] for group in groups.values() for start in range(0, len(group), most)]


def stacked(methods: list[Method], repeats: int) -> Method:
    """One method whose numbers are tensors: the settings of all, each repeated for every seed.

    Example:
        >>> from clagrange.study.methods import METHODS
        >>> stacked([METHODS["sgd"](lr=0.5), METHODS["sgd"](lr=0.25)], 2).lr
        tensor([0.5000, 0.5000, 0.2500, 0.2500], dtype=torch.float64)
    """
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(methods[0]):
        values = [getattr(method, field.name) for method in methods]
        if any(value != values[0] for value in values):
            changes[field.name] = torch.tensor(values, dtype=torch.float64).repeat_interleave(repeats)
    return dataclasses.replace(methods[0], **changes)


def of_replicas(method: Method, replicas: slice) -> Method:
    """The method of some replicas: of numbers that differ between replicas it has theirs.

    Example:
        >>> from clagrange.study.methods import METHODS
        >>> sgd = METHODS["sgd"](lr=torch.tensor([0.5, 0.25, 0.125]))
        >>> of_replicas(sgd, slice(1, 3)).lr
        tensor([0.2500, 0.1250])
    """
    values = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
    changes: dict[str, Any] = {
        name: value[replicas] for name, value in values.items() if isinstance(value, torch.Tensor) and value.dim()
    }
    return dataclasses.replace(method, **changes)
