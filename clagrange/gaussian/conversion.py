"""`gaussianize` and `collapse`: a network's layers become Gaussian, and deterministic again."""

import copy
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from clagrange._checks import Number, check_choice, check_positive, check_replicas, did_you_mean
from clagrange.gaussian.forms import GAUSSIAN_FORMS, by_default, deterministic_form, has_weights, obstacle
from clagrange.gaussian.kronecker import KroneckerPrecision
from clagrange.gaussian.layers import GaussianLayer, owner_of
from clagrange.gaussian.network import gaussian_layers
from clagrange.gaussian.structures import Diagonal, Structure, as_structure
from clagrange.replicas import STACKED_FORMS

Module = TypeVar("Module", bound=nn.Module)

LayerSettings = Mapping[str | type[nn.Module], Mapping[str, Any] | None]
"""Settings of `gaussianize` by layer: by name, shell pattern of names, or type; None for deterministic."""

_SETTINGS = ("precision", "prior_mean", "prior_variance")


@dataclass
class _Plan:
    """What is to become of a layer: its settings, and which of its parameters other layers use too.

    Attributes:
        layer: as it is.
        settings: arguments of `GaussianLayer.become_gaussian`.
        shared: names of the parameters that other layers use too.
        tied: those among them whose precision another layer has.
    """

    layer: nn.Module
    settings: dict[str, Any]
    shared: set[str]
    tied: set[str]


def gaussianize(
    module: Module,
    precision: str | Structure = "diagonal",
    prior_mean: str = "zero",
    prior_variance: Number = 1.0,
    *,
    layers: LayerSettings | None = None,
    copied: bool = False,
) -> Module:
    """Make the layers of a network Gaussian, at their present weights as means.

    Works in place: the layer objects, their parameters, names, hooks and references stay, only their class
    changes, so that a ``state_dict`` of the deterministic network still loads. Calling it again changes nothing
    in the layers that are Gaussian already.

    Gaussian become torch's layers with weights: linear layers, convolutions and transposed ones, embeddings,
    multi-head attention (and with it the layers of a transformer), and recurrent cells. The scales and shifts of
    normalisations (layer, root-mean-square, group and batch norm) become so where an entry of ``layers`` asks
    for them: their type, or a name or pattern that fits nothing else. Layers with weights that cannot be Gaussian
    are refused with the reason, unless ``layers`` leaves them deterministic. Other layers stay as they are.

    All but attention take the first dimension of their inputs for the examples of the batch (the second one of a
    stacked network), which they count. So the layers of a transformer need ``batch_first=True``, and a sequence
    belongs behind the batch wherever else a network takes one.

    A weight that several layers share has one precision, that of the first of them. It is diagonal, with the
    squared gradient as curvature, since a Kronecker product or single examples tell of the use by one layer only.

    Of frozen parameters (``requires_grad`` False) neither mean nor precision moves. A weight and its bias of
    which only one is frozen get separate Kronecker precisions, so freeze before; where a pair has one already, it
    goes on learning, and the part that moves takes steps as long as if the other could move along.

    Args:
        module: the network; a single one or a stacked one.
        precision: structure of the precision, "diagonal" or "kronecker", or one with settings such as
            `clagrange.gaussian.Kronecker`.
        prior_mean: "zero", or "initial" for the present weights.
        prior_variance: of the Gaussian prior, in units of each layer's initialisation variance 2 / fan_in (1 for
            embeddings and normalisations, which have no fan-in); a number, or a tensor of shape (R,) for a
            stacked network. It is also the variance to start with.
        layers: settings by layer; the keys are names, shell patterns of names, or module types, and a later
            entry wins. None instead of settings leaves those layers deterministic.
        copied: leave ``module`` alone and return a Gaussian copy.

    Returns:
        The network.

    Raises:
        ValueError: for a bad setting, an entry of ``layers`` that fits no layer, a layer that cannot be Gaussian,
            or a network without a layer that could.

    Warns:
        UserWarning: where the structure that was asked for is diagonal in whole, for a shared weight, or in part,
            for a side that is wider than ``Kronecker.widest``.

    Example:
        >>> net = nn.Sequential(nn.Embedding(50, 8), nn.LayerNorm(8), nn.Linear(8, 2))
        >>> net = gaussianize(net, layers={nn.Embedding: None, nn.LayerNorm: {"prior_variance": 0.01}})
        >>> [type(layer).__name__ for layer in net]
        ['Embedding', 'GaussianLayerNorm', 'GaussianLinear']
    """
    defaults = {"precision": precision, "prior_mean": prior_mean, "prior_variance": prior_variance}
    plan = _plan(module, defaults, layers or {})
    if copied:
        module = copy.deepcopy(module)
        for name, entry in plan.items():
            entry.layer = module.get_submodule(name)
    for name, entry in plan.items():
        layer, wanted = entry.layer, as_structure(entry.settings["precision"])
        if entry.shared and wanted != Diagonal():
            warnings.warn(
                f"layer {name!r}: its {' and '.join(sorted(entry.shared))} is shared with another layer, so that "
                f"its precision is diagonal instead of {wanted}",
                stacklevel=2,
            )
            entry.settings["precision"] = Diagonal()
        layer.__class__ = GAUSSIAN_FORMS[type(layer)]
        assert isinstance(layer, GaussianLayer)
        layer.become_gaussian(**entry.settings, shared=entry.shared, tied=entry.tied)
        for tied in entry.tied:
            owner = owner_of(layer.get_parameter(tied))
            assert owner is not None
            owner[0].shared |= {owner[1]}
        for side in _sides_too_wide(layer):
            warnings.warn(
                f"layer {name!r}: its {side}, more than Kronecker's widest, so that only the diagonal of that "
                f"factor is kept",
                stacklevel=2,
            )
    return module


def collapse(module: Module) -> Module:
    """Make every Gaussian layer deterministic at its mean, in place: the inverse of `gaussianize`.

    Example:
        >>> type(collapse(gaussianize(nn.Linear(2, 2)))).__name__
        'Linear'
    """
    for _, layer in list(gaussian_layers(module)):
        form = deterministic_form(layer)
        layer.become_deterministic()
        layer.__class__ = form  # type: ignore[assignment]
    return module


def _sides_too_wide(layer: GaussianLayer) -> Iterator[str]:
    """The sides of Kronecker precisions that are diagonal for their width."""
    for _, names, precision in layer.blocks():
        if isinstance(precision, KroneckerPrecision):
            rows, columns = precision.diagonal_sides
            if rows:
                yield f"{names[0]} has {precision.shape[-2]} outputs"
            if columns and not layer.one_hot:
                yield f"{names[0]} has {precision.shape[-1]} inputs"


def _plan(module: nn.Module, defaults: dict[str, Any], layers: LayerSettings) -> dict[str, _Plan]:
    """The layers that are to become Gaussian, by name."""
    known = {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, GaussianLayer) or has_weights(layer)
    }
    fitting = {key: _fitting(key, known) for key in layers} if known else {}
    plan = {}
    for name, layer in known.items():
        if not isinstance(layer, GaussianLayer):
            asked = [
                key for key, names in fitting.items() if not any(by_default(known[other]) for other in names)
            ]
            overrides = {key: layers[key] for key, names in fitting.items() if name in names}
            settings = _settings(layer, defaults, overrides, asked)
            if settings is not None:
                plan[name] = _Plan(layer, settings, set(), set())
    if not plan and not any(isinstance(layer, GaussianLayer) or by_default(layer) for layer in known.values()):
        raise ValueError(
            f"module: expected a network with torch.nn.Linear or other layers with weights, got "
            f"{type(module).__name__} without one; for normalisations ask by layers={{torch.nn.LayerNorm: {{}}}}"
        )
    for name in list(plan):
        if not _forward_is_called(module, name, plan):
            del plan[name]
    _note_shared_parameters(module, plan)
    for name, entry in plan.items():
        _refuse(module, name, entry)
    return plan


def _fitting(key: str | type[nn.Module], known: Mapping[str, nn.Module]) -> list[str]:
    """Names of the layers that a key of ``layers`` fits."""
    if isinstance(key, str):
        names, shown = [name for name in known if fnmatchcase(name, key)], key
    else:
        names, shown = [name for name, layer in known.items() if isinstance(layer, key)], key.__name__
    if not names:
        raise ValueError(
            f"layers: expected names or patterns of layers ({', '.join(known)}), or their types; got {shown!r}, "
            f"which fits none{did_you_mean(shown, known)}"
        )
    return names


def _settings(
    layer: nn.Module, defaults: dict[str, Any], overrides: LayerSettings, asked: Collection[str | type[nn.Module]]
) -> dict[str, Any] | None:
    """The settings of a layer, None if it stays deterministic.

    Args:
        layer: the layer.
        defaults: its settings if no entry fits it.
        overrides: the entries that fit it.
        asked: the keys of those that make a layer Gaussian that is not so by default.
    """
    default = by_default(layer)
    settings = dict(defaults) if default else None
    for key, override in overrides.items():
        for word in override or ():
            check_choice(f"layers[{key!r}]", word, _SETTINGS)
        if override is None:
            settings = None
        elif settings is not None or default or key in asked:
            settings = {**(settings or defaults), **override}
    if settings is not None:
        as_structure(settings["precision"])
        check_choice("prior_mean", settings["prior_mean"], ("zero", "initial"))
        check_positive("prior_variance", settings["prior_variance"])
        stacked = type(layer) in STACKED_FORMS.values()
        replicas = next(layer.parameters(recurse=False)).shape[0] if stacked else None
        check_replicas("prior_variance", settings["prior_variance"], replicas)
    return settings


def _forward_is_called(module: nn.Module, name: str, plan: Mapping[str, _Plan]) -> bool:
    """False for the output projection of deterministic attention, which takes its weights only."""
    parent = name.rpartition(".")[0]
    attention = module.get_submodule(parent)
    projection = isinstance(plan[name].layer, NonDynamicallyQuantizableLinear)
    deterministic = isinstance(attention, nn.MultiheadAttention) and not isinstance(attention, GaussianLayer)
    return not (projection and deterministic) or parent in plan


def _note_shared_parameters(module: nn.Module, plan: Mapping[str, _Plan]) -> None:
    """Find the parameters that several layers use, and who has their precision."""
    users: dict[int, int] = {}
    for layer in module.modules():
        for parameter in layer._parameters.values():
            users[id(parameter)] = users.get(id(parameter), 0) + 1
    taken: set[int] = set()
    for entry in plan.values():
        for name, parameter in entry.layer._parameters.items():
            if parameter is not None and users[id(parameter)] > 1:
                entry.shared.add(name)
                if id(parameter) in taken or _owner_within(module, parameter) is not None:
                    entry.tied.add(name)
                taken.add(id(parameter))


def _owner_within(module: nn.Module, parameter: nn.Parameter) -> tuple[GaussianLayer, str] | None:
    """The Gaussian layer of a network of which a parameter is a mean, and the mean's name."""
    owner = owner_of(parameter)
    return owner if owner is not None and any(layer is owner[0] for layer in module.modules()) else None


def _obstacle_of_place(module: nn.Module, name: str) -> str | None:
    """Why a layer cannot be Gaussian where it is, in a transformer's layer that puts the sequence first."""
    around = module.get_submodule(name.rpartition(".")[0])
    if not isinstance(around, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        return None
    if isinstance(module.get_submodule(name), nn.MultiheadAttention) or around.self_attn.batch_first:
        return None
    return (
        f"it takes the first dimension of its inputs for the examples, which is the sequence in a "
        f"{type(around).__name__} with batch_first=False; build that with batch_first=True and give it the batch "
        f"first"
    )


def _refuse(module: nn.Module, name: str, entry: _Plan) -> None:
    """Raise where a layer cannot be Gaussian."""
    remedy = f"leave it deterministic with layers={{{name!r}: None}}"
    reason = obstacle(entry.layer, entry.shared) or _obstacle_of_place(module, name)
    if reason is not None:
        raise ValueError(
            f"module: layer {name!r} of type {type(entry.layer).__name__} cannot be Gaussian: {reason}, "
            f"or {remedy}"
        )
    for shared in entry.tied:
        owner = _owner_within(module, entry.layer.get_parameter(shared))
        if owner is not None and (owner[0].structure != Diagonal() or "sampler" in owner[0]._modules):
            raise ValueError(
                f"module: layer {name!r} shares its {shared} with a {type(owner[0]).__name__} that has become "
                f"Gaussian for itself; make both Gaussian in one call, or {remedy}"
            )
