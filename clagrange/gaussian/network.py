"""What a user does with a network of Gaussian weights: make it, collapse it, inject, look, predict."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from clagrange._checks import Number, check_choice, check_fraction, check_positive, check_replicas, did_you_mean
from clagrange._modes import evaluating
from clagrange.gaussian.layers import GaussianBlock, GaussianConv2d, GaussianLayer, GaussianLinear, owner_of
from clagrange.gaussian.structures import Structure, as_structure
from clagrange.replicas import Generators, StackedConv2d, StackedLinear

Module = TypeVar("Module", bound=nn.Module)

GAUSSIAN_FORMS: dict[type[nn.Module], type[GaussianLayer]] = {
    nn.Linear: GaussianLinear,
    StackedLinear: GaussianLinear,
    nn.Conv2d: GaussianConv2d,
    StackedConv2d: GaussianConv2d,
}
"""The Gaussian form of each layer that has one."""

_DETERMINISTIC_FORMS: dict[tuple[type[GaussianLayer], bool], type[nn.Module]] = {
    (GaussianLinear, False): nn.Linear,
    (GaussianLinear, True): StackedLinear,
    (GaussianConv2d, False): nn.Conv2d,
    (GaussianConv2d, True): StackedConv2d,
}

_SETTINGS = ("precision", "prior_mean", "prior_variance")


def gaussianize(
    module: Module,
    precision: str | Structure = "diagonal",
    prior_mean: str = "zero",
    prior_variance: Number = 1.0,
    *,
    layers: Mapping[str, Mapping[str, Any] | None] | None = None,
    copied: bool = False,
) -> Module:
    """Make the linear and convolution layers of a network Gaussian, at their present weights as means.

    Works in place: the layer objects, their parameters, names, hooks and references stay, only their class
    changes, so that a ``state_dict`` of the deterministic network still loads. Other layers stay as they are.
    Calling it again changes nothing in the layers that are Gaussian already.

    Args:
        module: the network; a single one or a stacked one.
        precision: structure of the precision, "diagonal" or "kronecker", or one with settings such as
            `clagrange.gaussian.Kronecker`.
        prior_mean: "zero", or "initial" for the present weights.
        prior_variance: of the Gaussian prior, in units of each layer's initialisation variance 2 / fan_in; a
            number, or a tensor of shape (R,) for a stacked network. It is also the variance to start with.
        layers: settings by layer name (shell patterns work); a later entry wins. None instead of settings
            leaves those layers deterministic.
        copied: leave ``module`` alone and return a Gaussian copy.

    Returns:
        The network.

    Raises:
        ValueError: for a bad setting, a pattern in ``layers`` that fits no layer, a weight that two layers
            share, or a network without a layer that could be made Gaussian.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> type(gaussianize(net, layers={"2": {"prior_variance": 0.1}})[0]).__name__
        'GaussianLinear'
    """
    defaults = {"precision": precision, "prior_mean": prior_mean, "prior_variance": prior_variance}
    plan = _settings_by_layer(module, defaults, layers or {})
    _refuse_shared_weights(plan)
    if copied:
        module = copy.deepcopy(module)
        plan = {name: (module.get_submodule(name), settings) for name, (_, settings) in plan.items()}
    for layer, settings in plan.values():
        layer.__class__ = GAUSSIAN_FORMS[type(layer)]
        assert isinstance(layer, GaussianLayer)
        layer.become_gaussian(**settings)
    return module


def _settings_by_layer(
    module: nn.Module, defaults: dict[str, Any], layers: Mapping[str, Mapping[str, Any] | None]
) -> dict[str, tuple[nn.Module, dict[str, Any]]]:
    candidates = {name: layer for name, layer in module.named_modules() if type(layer) in GAUSSIAN_FORMS}
    gaussian = [name for name, layer in module.named_modules() if isinstance(layer, GaussianLayer)]
    if not candidates and not gaussian:
        raise ValueError(
            f"module: expected a network with torch.nn.Linear or torch.nn.Conv2d layers, "
            f"got {type(module).__name__} without one"
        )
    names = [*candidates, *gaussian]
    for pattern in layers:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"layers: expected names or patterns of layers ({', '.join(names)}); got {pattern!r}, "
                f"which fits none{did_you_mean(pattern, names)}"
            )
    plan: dict[str, tuple[nn.Module, dict[str, Any]]] = {}
    for name, layer in candidates.items():
        settings: dict[str, Any] | None = dict(defaults)
        for pattern, override in layers.items():
            if not fnmatchcase(name, pattern):
                continue
            for key in override or ():
                check_choice(f"layers[{pattern!r}]", key, _SETTINGS)
            settings = None if override is None else {**(settings or defaults), **override}
        if settings is not None:
            as_structure(settings["precision"])
            check_choice("prior_mean", settings["prior_mean"], ("zero", "initial"))
            check_positive("prior_variance", settings["prior_variance"])
            stacked = isinstance(layer, (StackedLinear, StackedConv2d))
            check_replicas(
                "prior_variance", settings["prior_variance"], layer.weight.shape[0] if stacked else None
            )
            plan[name] = (layer, settings)
    return plan


def _refuse_shared_weights(plan: dict[str, tuple[nn.Module, dict[str, Any]]]) -> None:
    seen: dict[int, str] = {}
    for name, (layer, _) in plan.items():
        for parameter in layer.parameters(recurse=False):
            if id(parameter) in seen or owner_of(parameter) is not None:
                other = seen.get(id(parameter), "a Gaussian layer")
                raise ValueError(
                    f"module: layers {other!r} and {name!r} share a weight, which can have one precision only; "
                    f"leave one deterministic with layers={{{name!r}: None}}"
                )
            seen[id(parameter)] = name


def collapse(module: Module) -> Module:
    """Make every Gaussian layer deterministic at its mean, in place: the inverse of `gaussianize`.

    Example:
        >>> type(collapse(gaussianize(nn.Linear(2, 2)))).__name__
        'Linear'
    """
    for _, layer in gaussian_layers(module):
        form = _DETERMINISTIC_FORMS[type(layer), layer.stacked]
        layer.become_deterministic()
        layer.__class__ = form  # type: ignore[assignment]
    return module


def gaussian_layers(
    module: nn.Module, layers: Sequence[str] | None = None
) -> Iterator[tuple[str, GaussianLayer]]:
    """The Gaussian layers of a network by name, all or those that fit one of the patterns in ``layers``."""
    for name, layer in module.named_modules():
        if isinstance(layer, GaussianLayer) and (
            layers is None or any(fnmatchcase(name, pattern) for pattern in layers)
        ):
            yield name, layer


def gaussian_blocks(
    module: nn.Module, layers: Sequence[str] | None = None
) -> Iterator[tuple[str, GaussianBlock]]:
    """The blocks of Gaussian parameters that share a precision, each with the name of its layer.

    Raises:
        ValueError: if there is none, or a pattern in ``layers`` fits no Gaussian layer.
    """
    known = [name for name, _ in gaussian_layers(module)]
    if not known:
        raise ValueError(
            f"module: expected a network with Gaussian layers, got {type(module).__name__} without one; "
            f"call clagrange.gaussianize(module) first"
        )
    for pattern in layers or ():
        if not any(fnmatchcase(name, pattern) for name in known):
            raise ValueError(
                f"layers: expected names or patterns of Gaussian layers ({', '.join(known)}); got {pattern!r}, "
                f"which fits none{did_you_mean(pattern, known)}"
            )
    for name, layer in gaussian_layers(module, layers):
        for block in layer.blocks():
            yield name, block


@torch.no_grad()
def inject_variance(
    module: nn.Module,
    strength: Number = 0.3,
    widen: Number = 0.0,
    generator: Generators | None = None,
    *,
    layers: Sequence[str] | None = None,
) -> None:
    """Make weights plastic again, each as far as the loss has let go of it; in place.

    First the precision moves the fraction ``widen`` of the way to the prior's, s ← s + widen·(1/σ_p² − s).
    Then the mean takes an Ornstein-Uhlenbeck step toward the prior: with retained information
    i = 1 − (1/σ_p²)/s in [0, 1] and a = 1 − strength·(1 − i),
    μ ← μ_p + a(μ − μ_p) + √(1 − a²)·σ_p·ε. Weights that the loss determines stay, weights that it has let go
    are drawn afresh. ``widen`` alone changes no mean.

    Args:
        module: a network with Gaussian layers.
        strength: q in [0, 1]; a number or a tensor of shape (R,).
        widen: fraction in [0, 1]; a number or a tensor of shape (R,).
        generator: random stream; a sequence of R of them for a stacked network. Default: torch's global one.
        layers: names or shell patterns of the layers to inject into; default all.

    Raises:
        ValueError: if there is no Gaussian layer (or none that ``layers`` names), or a number is out of range.

    Example:
        >>> inject_variance(gaussianize(nn.Linear(4, 2)), strength=1.0, generator=torch.Generator())
    """
    check_fraction("strength", strength)
    check_fraction("widen", widen)
    for _, block in gaussian_blocks(module, layers):
        block.set_mean(block.precision.injected(block.joint_mean(), strength, widen, generator))


def variances(module: nn.Module) -> dict[str, Tensor]:
    """The marginal variance of every Gaussian parameter, by the name of its mean.

    Example:
        >>> sorted(variances(gaussianize(nn.Linear(4, 2))))
        ['bias', 'weight']
    """
    return _by_parameter((name, block, block.precision.variance()) for name, block in gaussian_blocks(module))


def sample_parameters(module: nn.Module, generator: Generators | None = None) -> dict[str, Tensor]:
    """One draw of every Gaussian parameter, by name, for `torch.func.functional_call`."""
    return _by_parameter(
        (name, block, block.precision.sample(block.joint_mean(), generator))
        for name, block in gaussian_blocks(module)
    )


def _by_parameter(joint: Iterable[tuple[str, GaussianBlock, Tensor]]) -> dict[str, Tensor]:
    return {
        f"{name}.{part}" if name else part: value
        for name, block, values in joint
        for part, value in zip(block.names, block.split(values), strict=True)
    }


@torch.no_grad()
def predict(
    module: nn.Module,
    x: Tensor,
    samples: int = 32,
    *,
    transform: Callable[[Tensor], Tensor] | None = None,
    generator: Generators | None = None,
) -> tuple[Tensor, Tensor]:
    """Predictive mean and variance over draws of the weights, in evaluation mode.

    Args:
        module: a network with Gaussian layers; left as it is.
        x: inputs, (B, ...) or (R, B, ...).
        samples: number of draws, at least 2.
        transform: applied to every output before averaging, such as ``torch.nn.Softmax(-1)`` for probabilities.
        generator: random stream; a sequence of R of them for a stacked network.

    Returns:
        Mean and unbiased variance of the (transformed) outputs, each of the outputs' shape.

    Example:
        >>> mean, variance = predict(gaussianize(nn.Linear(4, 2)), torch.zeros(3, 4), samples=8)
        >>> mean.shape, variance.shape
        (torch.Size([3, 2]), torch.Size([3, 2]))
    """
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 2:
        raise ValueError(f"samples: expected a whole number of at least 2, got {samples!r}")
    with evaluating(module):
        mean = squares = torch.zeros(())
        for count in range(1, samples + 1):  # Welford's update: one output in memory, no cancellation
            output = torch.func.functional_call(module, sample_parameters(module, generator), (x,))
            output = transform(output) if transform is not None else output
            deviation = output - mean
            mean = mean + deviation / count
            squares = squares + deviation * (output - mean)
    return mean, squares / (samples - 1)
