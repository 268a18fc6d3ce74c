"""Gaussian layers in networks that grow: what takes their place stays Gaussian."""

from typing import Any

import torch
from torch import nn

from clagrange.gaussian import DiagonalPrecision, GaussianLayer, gaussianize
from clagrange.gaussian.network import GAUSSIAN_FORMS


def layers_of(network: nn.Module) -> dict[str, nn.Module]:
    """The layers that are Gaussian or could be, by name."""
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, GaussianLayer) or type(module) in GAUSSIAN_FORMS
    }


def make_new_layers_gaussian(network: nn.Module, before: dict[str, nn.Module], settings: dict[str, Any]) -> None:
    """Make the layers that appeared in a network Gaussian, in place.

    A layer that took the place of a Gaussian one, of the same inputs, gets its prior, and the precision and
    curvature of the units that were there before; further units start at the prior. A layer in the place of a
    deterministic one stays deterministic. A layer in a new place becomes Gaussian with the settings.

    Args:
        network: the network after it grew.
        before: its layers, as `layers_of` gave them before.
        settings: arguments of `clagrange.gaussianize`.
    """
    kept: dict[str, None] = {}
    fresh = False
    for name, layer in layers_of(network).items():
        if isinstance(layer, GaussianLayer):
            continue
        old = before.get(name)
        if isinstance(old, GaussianLayer) and _continues(layer, old):
            _take_over(layer, old)
        elif old is None or isinstance(old, GaussianLayer):
            fresh = True
        else:
            kept[name] = None
    if fresh:
        gaussianize(network, **{**settings, "layers": {**(settings["layers"] or {}), **kept}})


def _continues(layer: nn.Module, old: GaussianLayer) -> bool:
    """Whether the units of a layer see the same inputs as those of an older one."""
    means = dict(layer.named_parameters(recurse=False))
    return all(name in means and means[name].shape[1:] == mean.shape[1:] for name, mean in old.means())


@torch.no_grad()
def _take_over(layer: nn.Module, old: GaussianLayer) -> None:
    initial = any(_diagonal(old, name).prior_at_start for name, _ in old.means())
    gaussianize(layer, prior_mean="initial" if initial else "zero")
    assert isinstance(layer, GaussianLayer)
    for name, _ in old.means():
        target, source = _diagonal(layer, name), _diagonal(old, name)
        target.prior_precision.copy_(source.prior_precision)
        target.reset()
        for buffer in ("prior_mean", "precision", "curvature"):
            stored, known = getattr(target, buffer), getattr(source, buffer)
            units = min(len(stored), len(known))
            stored[:units] = known[:units]


def _diagonal(layer: GaussianLayer, name: str) -> DiagonalPrecision:
    precision = layer.precision_of(name)
    assert isinstance(precision, DiagonalPrecision)
    return precision
