"""Packages that only some methods, samplers or executors need and that ``pip install clagrange`` leaves out."""

import importlib
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Extra:
    """An optional extra of clagrange.

    Attributes:
        module: what it is imported by.
        package: what it is called by the package registry.
        note: what to know before it is installed.
    """

    module: str
    package: str
    note: str = ""


EXTRAS = {
    "ivon": Extra("ivon", "ivon-opt", "its licence is GPL-3.0"),
    "optuna": Extra("optuna", "optuna"),
    "ray": Extra("ray", "ray"),
    "second-order": Extra("pytorch_optimizer", "pytorch-optimizer"),
}
"""The extras by the names that pip knows them by."""


def extra_module(name: str) -> Any:
    """The module of an extra.

    Raises:
        ModuleNotFoundError: if it is not installed.
    """
    extra = EXTRAS[name]
    try:
        return importlib.import_module(extra.module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{extra.module}: expected the package {extra.package}, which is not installed; "
            f"pip install 'clagrange[{name}]'{extra.note and f' ({extra.note})'}"
        ) from error
