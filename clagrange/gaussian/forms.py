"""Which layers have a Gaussian form, and why others have none."""

from collections.abc import Collection

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrize import is_parametrized

from clagrange.gaussian.layers import (
    GaussianBatchNorm1d,
    GaussianBatchNorm2d,
    GaussianBatchNorm3d,
    GaussianConv1d,
    GaussianConv2d,
    GaussianConv3d,
    GaussianConvTranspose1d,
    GaussianConvTranspose2d,
    GaussianConvTranspose3d,
    GaussianEmbedding,
    GaussianGroupNorm,
    GaussianGRUCell,
    GaussianLayer,
    GaussianLayerNorm,
    GaussianLinear,
    GaussianLSTMCell,
    GaussianMultiheadAttention,
    GaussianOutProjection,
    GaussianRMSNorm,
    GaussianRNNCell,
)
from clagrange.replicas import STACKED_FORMS

_OF_SINGLE_LAYERS: dict[type[nn.Module], type[GaussianLayer]] = {
    nn.Linear: GaussianLinear,
    nn.Conv1d: GaussianConv1d,
    nn.Conv2d: GaussianConv2d,
    nn.Conv3d: GaussianConv3d,
    nn.ConvTranspose1d: GaussianConvTranspose1d,
    nn.ConvTranspose2d: GaussianConvTranspose2d,
    nn.ConvTranspose3d: GaussianConvTranspose3d,
    nn.Embedding: GaussianEmbedding,
    nn.MultiheadAttention: GaussianMultiheadAttention,
    NonDynamicallyQuantizableLinear: GaussianOutProjection,
    nn.RNNCell: GaussianRNNCell,
    nn.LSTMCell: GaussianLSTMCell,
    nn.GRUCell: GaussianGRUCell,
    nn.LayerNorm: GaussianLayerNorm,
    nn.RMSNorm: GaussianRMSNorm,
    nn.GroupNorm: GaussianGroupNorm,
    nn.BatchNorm1d: GaussianBatchNorm1d,
    nn.BatchNorm2d: GaussianBatchNorm2d,
    nn.BatchNorm3d: GaussianBatchNorm3d,
}

GAUSSIAN_FORMS: dict[type[nn.Module], type[GaussianLayer]] = {
    **_OF_SINGLE_LAYERS,
    **{STACKED_FORMS[single]: form for single, form in _OF_SINGLE_LAYERS.items() if single in STACKED_FORMS},
}
"""The Gaussian form of each layer that has one, single or stacked."""

_SINGLE_LAYERS = {form: single for single, form in _OF_SINGLE_LAYERS.items()}


def deterministic_form(layer: GaussianLayer) -> type[nn.Module]:
    """What a Gaussian layer was, or would be, without its precisions."""
    single = _SINGLE_LAYERS[type(layer)]
    return STACKED_FORMS[single] if layer.stacked else single


def _form(layer: nn.Module) -> type[GaussianLayer] | None:
    """The Gaussian form of what a layer is, or is to become, or was before it was parametrized."""
    kind = type(layer)
    if isinstance(layer, LazyModuleMixin):
        kind = layer.cls_to_become or kind
    elif is_parametrized(layer):
        kind = kind.__mro__[1]
    return GAUSSIAN_FORMS.get(kind)


def has_weights(layer: nn.Module) -> bool:
    """Whether a layer is of a kind that `clagrange.gaussianize` makes Gaussian, or refuses to."""
    known = _form(layer) is not None and any(True for _ in layer.parameters(recurse=False))
    return known or obstacle(layer) is not None


def by_default(layer: nn.Module) -> bool:
    """Whether `clagrange.gaussianize` takes a layer without being asked for it: all but normalisations."""
    form = type(layer) if isinstance(layer, GaussianLayer) else _form(layer)
    return form is None or form.by_default


def obstacle(layer: nn.Module, shared: Collection[str] = ()) -> str | None:
    """Why a layer with weights cannot be Gaussian and what helps, None if it can or has none.

    Args:
        layer: the layer.
        shared: names of its parameters that other layers use too.
    """
    if isinstance(layer, nn.RNNBase):
        cell = {nn.LSTM: "LSTMCell", nn.GRU: "GRUCell"}.get(type(layer), "RNNCell")
        return f"its steps run inside of one operation; unroll a torch.nn.{cell}"
    if isinstance(layer, nn.Bilinear):
        return "it is not linear in its inputs; take a torch.nn.Linear of their products"
    if isinstance(layer, nn.EmbeddingBag):
        return "it sums inside of one operation; sum the outputs of a torch.nn.Embedding"
    form = _form(layer)
    if form is None:
        return None
    if isinstance(layer, LazyModuleMixin):
        return "it has no weights yet; run the network once on a batch first"
    names = {name for pair in form.pairs for name in pair if name is not None}
    if type(layer) not in GAUSSIAN_FORMS or not names <= layer._parameters.keys():
        return (
            "its weights are computed from other parameters; remove that first, for instance by "
            "torch.nn.utils.parametrize.remove_parametrizations"
        )
    return _obstacle_of_embedding(layer, shared) if isinstance(layer, nn.Embedding) else None


def _obstacle_of_embedding(layer: nn.Embedding, shared: Collection[str]) -> str | None:
    for setting, reason in (
        ("sparse", "its gradient does not tell"),
        ("scale_grad_by_freq", "its gradient is not that of the loss"),
        ("max_norm", "its forward pass changes the weights"),
    ):
        if getattr(layer, setting):
            return f"with {setting}={getattr(layer, setting)} {reason}; leave that setting out"
    if layer.padding_idx is not None and "weight" not in shared and layer.weight[layer.padding_idx].any():
        return f"the vector of its padding_idx={layer.padding_idx} is not 0; set it to 0"
    return None
