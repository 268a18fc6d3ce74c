"""Methods of the literature as Avalanche strategies: an optimizer and one intervention, or one of their own."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from avalanche.training.templates import SupervisedTemplate
from torch import nn
from torch.optim import Optimizer

from clagrange import interventions, optim
from clagrange.interventions import Intervention
from clagrange.strategies.plugin import InterventionPlugin


class InterventionStrategy(SupervisedTemplate):  # type: ignore[misc]
    """Train with any optimizer and let one intervention act: Avalanche's ``Naive`` with an `InterventionPlugin`.

    A subclass that names an intervention takes its settings beside the other arguments:
    ``class Mine(InterventionStrategy, of=MyIntervention)``.

    Args:
        model: the network.
        optimizer: any torch optimizer of its parameters.
        intervention: what acts; its plugin is in the attribute ``interventions``, with a ``state_dict``.
        plugins: further Avalanche plugins; they act before it.
        base_kwargs: further arguments of Avalanche's ``SupervisedTemplate``, such as ``train_mb_size``,
            ``train_epochs``, ``device`` and ``evaluator``.

    Raises:
        TypeError: for an argument that nothing knows.

    Example:
        >>> net = clagrange.networks.mlp(64, [64], 10)
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        >>> reset = interventions.LastLayerReset()
        >>> strategy = InterventionStrategy(model=net, optimizer=optimizer, intervention=reset, train_mb_size=16)
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        optimizer: Optimizer,
        intervention: Intervention,
        plugins: Sequence[Any] | None = None,
        **base_kwargs: Any,
    ) -> None:
        self.interventions = InterventionPlugin(intervention)
        super().__init__(
            model=model, optimizer=optimizer, plugins=[*(plugins or []), self.interventions], **base_kwargs
        )

    def __init_subclass__(cls, of: type[Intervention] | None = None, **kwargs: Any) -> None:
        """Give a subclass the settings of its intervention as arguments, in the signature Avalanche checks."""
        if of is not None:
            cls.__init__ = _constructor(of)  # type: ignore[method-assign]
        super().__init_subclass__(**kwargs)


def _constructor(kind: type[Intervention]) -> Callable[..., None]:
    """The constructor of a strategy that makes its intervention."""
    settings = inspect.signature(kind).parameters

    def __init__(self: Any, *, model: nn.Module, optimizer: Optimizer, **arguments: Any) -> None:  # noqa: N807
        own = {name: arguments.pop(name) for name in settings if name in arguments}
        InterventionStrategy.__init__(
            self, model=model, optimizer=optimizer, intervention=kind(**own), **arguments
        )

    shown = inspect.signature(__init__)
    *first, rest = shown.parameters.values()
    keywords = [setting.replace(kind=inspect.Parameter.KEYWORD_ONLY) for setting in settings.values()]
    __init__.__signature__ = shown.replace(parameters=[*first, *keywords, rest])  # type: ignore[attr-defined]
    return __init__


class ContinualBackprop(InterventionStrategy, of=interventions.ContinualBackprop):
    """After each step, replace the hidden units that are of least use; not told of switches.

    For settings and source see `clagrange.interventions.ContinualBackprop`, for other arguments
    `InterventionStrategy`.

    Example:
        >>> net = clagrange.networks.mlp(64, [64], 10)
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        >>> strategy = ContinualBackprop(model=net, optimizer=optimizer, replacement_rate=1e-3, train_mb_size=16)
    """


class L2Init(InterventionStrategy, of=interventions.L2Init):
    """L2 regularisation toward the initial weights; not told of switches.

    For settings and source see `clagrange.interventions.L2Init`, for other arguments `InterventionStrategy`.

    Example:
        >>> net = clagrange.networks.mlp(64, [64], 10)
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        >>> strategy = L2Init(model=net, optimizer=optimizer, strength=1e-2, train_mb_size=16)
    """


class ReDo(InterventionStrategy, of=interventions.ReDo):
    """Let hidden units start over that are dormant beside the others of their layer; not told of switches.

    For settings and source see `clagrange.interventions.ReDo`, for other arguments `InterventionStrategy`.

    Example:
        >>> net = clagrange.networks.mlp(64, [64], 10)
        >>> optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
        >>> strategy = ReDo(model=net, optimizer=optimizer, threshold=0.1, every=100, train_mb_size=16)
    """


class SelfNormalizedResets(InterventionStrategy, of=interventions.SelfNormalizedResets):
    """Let a hidden unit start over that is silent for longer than its own past makes likely.

    Not told of switches. For settings and source see `clagrange.interventions.SelfNormalizedResets`, for other
    arguments `InterventionStrategy`.

    Example:
        >>> net = clagrange.networks.mlp(64, [64], 10)
        >>> optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
        >>> strategy = SelfNormalizedResets(model=net, optimizer=optimizer, rejection=0.02, train_mb_size=16)
    """


class ShrinkAndPerturb(InterventionStrategy, of=interventions.ShrinkAndPerturb):
    """Shrink all weights and add noise: at every step, every so many, or at the beginning of an experience.

    For settings and source see `clagrange.interventions.ShrinkAndPerturb`, for other arguments
    `InterventionStrategy`.

    Example:
        >>> net = clagrange.networks.mlp(64, [64], 10)
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        >>> strategy = ShrinkAndPerturb(model=net, optimizer=optimizer, shrink=0.4, every="switch")
    """


class UPGD(SupervisedTemplate):  # type: ignore[misc]
    """Utility-based perturbed gradient descent; not told of switches.

    For what the settings are, and the source, see `clagrange.optim.UPGD`. The `InterventionPlugin` in the
    attribute ``interventions`` carries none; with it a loaded state of the optimizer is gone on with.

    Args:
        model: the network.
        lr: learning rate.
        noise: standard deviation of the perturbation, in units of the gradient.
        decay: of the average of the utility.
        weight_decay: decoupled, in units of the learning rate.
        scope: "global" or "local".
        protecting: whether useful weights are also held against the gradient.
        seed: of the random stream.
        plugins: further Avalanche plugins.
        base_kwargs: further arguments of Avalanche's ``SupervisedTemplate``.

    Raises:
        TypeError: for an argument that nothing knows.
        ValueError: for a number out of range.

    Example:
        >>> net = clagrange.networks.mlp(64, [64], 10)
        >>> strategy = UPGD(model=net, lr=0.01, noise=0.1, weight_decay=0.01, train_mb_size=16)
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        lr: float = 0.01,
        noise: float = 1e-3,
        decay: float = 0.9999,
        weight_decay: float = 0.0,
        scope: str = "global",
        protecting: bool = True,
        seed: int = 0,
        plugins: Sequence[Any] | None = None,
        **base_kwargs: Any,
    ) -> None:
        self.interventions = InterventionPlugin()
        optimizer = optim.UPGD(
            model.parameters(), lr, noise, decay, weight_decay, scope=scope, protecting=protecting, seed=seed
        )
        super().__init__(
            model=model, optimizer=optimizer, plugins=[*(plugins or []), self.interventions], **base_kwargs
        )
