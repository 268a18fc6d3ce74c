"""Gaussian layers in networks that grow: what takes their place stays Gaussian."""

from typing import Any

import torch
from torch import nn

from clagrange.gaussian import GaussianLayer, Precision, gaussianize
from clagrange.gaussian.forms import has_weights


def layers_of(network: nn.Module) -> dict[str, nn.Module]:
    """The layers that are Gaussian or could be, by name."""
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, GaussianLayer) or has_weights(module)
    }


def make_new_layers_gaussian(network: nn.Module, before: dict[str, nn.Module], settings: dict[str, Any]) -> None:
    """Make the layers that appeared in a network Gaussian, in place.

    A layer that took the place of a Gaussian one, of the same inputs, gets its structure, prior and random
    streams, and what the precision knows of the units that were there before (the curvature; or the factor of the
    inputs, and the rows and columns of these units in that of the outputs); further units start at the prior. A
    layer in the place of a deterministic one stays deterministic. A layer in a new place becomes Gaussian with
    the settings.

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
        asked = {key: value for key, value in (settings["layers"] or {}).items() if key not in kept}
        gaussianize(network, **{**settings, "layers": {**asked, **kept}})


def _continues(layer: nn.Module, old: GaussianLayer) -> bool:
    """Whether the units of a layer see the same inputs as those of an older one."""
    means = dict(layer.named_parameters(recurse=False))
    return all(name in means and means[name].shape[1:] == mean.shape[1:] for name, mean in old.means())


def _take_over(layer: nn.Module, old: GaussianLayer) -> None:
    """Make a layer Gaussian as an older one was."""
    known = {block.names: block.precision for block in old.blocks()}
    initial = any(precision.prior_at_start for precision in known.values())
    gaussianize(layer, old.structure, prior_mean="initial" if initial else "zero")
    assert isinstance(layer, GaussianLayer)
    for block in layer.blocks():
        if block.names in known:
            _continue(block.precision, known[block.names])
    layer._modules.pop("sampler", None)
    if "sampler" in old._modules:
        layer.sampler = old.sampler


@torch.no_grad()
def _continue(precision: Precision, old: Precision) -> None:
    """Give a fresh precision what an older one knew of the first units, with its prior for the others."""
    precision.prior_precision.copy_(old.origin[1])
    precision.reset()
    if old.consolidated:
        precision.consolidate(precision.prior_mean.expand(precision.shape), 0.0)
    for name, known in old.named_buffers():
        stored = precision.get_buffer(name)
        if known.dim() > stored.dim():  # the factor of more units than Kronecker.widest is diagonal
            known = known.diagonal(dim1=-2, dim2=-1)
        common = tuple(slice(min(sizes)) for sizes in zip(stored.shape, known.shape, strict=True))
        stored[common] = known[common]
