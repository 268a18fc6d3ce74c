"""The abstract intervention: a change of a network outside the gradient step."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from clagrange.gaussian import owner_of
from clagrange.interventions.detection import Detector
from clagrange.interventions.hooked import Hooked
from clagrange.interventions.only_replicas import only_replicas
from clagrange.replicas import Generators, generators_from_seeds, replicas_of

_LARGE = 1 << 16
"""Entries from which those of a mask are looked up, and not the whole tensor worked through."""


class Intervention(Hooked):  # every moment is optional
    """Something that is done to a network at four moments of its training, in any framework.

    A subclass overrides the moments it needs. What must survive a checkpoint goes into ``state`` (tensors,
    numbers, and dicts of them); random numbers come from ``generators``. Both are in ``state_dict``, which
    loads with ``weights_only=True``, before or after `on_start`.

    A framework, or a loop of one's own, tells it by `on_start`, `loss_known`, `gradient_known`, `step_taken` and
    `switch_announced`, which call the moments. With a detector it acts as at a switch after every step in which
    the detector notices one, in the replicas in which it does, and announcements are not heard.

    Args:
        seed: of the random stream; for a stacked network a sequence with one seed for each replica (a single
            number s gives replica r the seed s + r).
        detector: of switches, see `clagrange.interventions.detection`; None goes by the announcement.
    """

    def __init__(self, seed: int | Sequence[int] = 0, detector: Detector | None = None) -> None:
        if detector is not None and not isinstance(detector, Detector):
            raise TypeError(f"detector: expected a clagrange.interventions.Detector or None, got {detector!r}")
        super().__init__()
        self.seed = seed
        self.detector = detector
        self.state: dict[str, Any] = {}
        self.generators: Generators | None = None
        self._generator_states: list[Tensor] | None = None

    @property
    def told_of_switches(self) -> bool:
        """Whether the method uses the announcement of task switches."""
        return self.acts_at_switches and (self.detector is None or self.detector.takes_announcements)

    @property
    def acts_at_switches(self) -> bool:
        """Whether the method does something at a switch, announced or noticed."""
        return type(self).on_switch is not Intervention.on_switch

    @property
    def needs_gradients(self) -> bool:
        """Whether the method, or its detector, looks at the gradients or changes them.

        Where none does, a study lets plain SGD step in the backward pass.
        """
        return type(self).on_gradient is not Intervention.on_gradient or (
            self.detector is not None and type(self.detector).on_gradient is not Detector.on_gradient
        )

    @property
    def replays(self) -> bool:
        """Whether what is done before each step of the optimizer can be replayed from a CUDA graph.

        It can where it is nothing. A subclass that does something may say so too, if that is the same operations
        on the same memory with the same numbers in every step, none of them random.
        """
        moments = ("loss_known", "gradient_known", "on_gradient")
        nothing = all(getattr(type(self), moment) is getattr(Intervention, moment) for moment in moments)
        return nothing and self.detector is None

    def on_start(self, network: nn.Module, optimizer: Optimizer) -> None:
        """Before training starts, and again whenever it goes on (a new `fit`, a resumed run)."""
        self.detach()
        replicas = replicas_of(network)
        if self.generators is None:
            seeds: int | Sequence[int] = self.seed
            if replicas is not None and isinstance(seeds, int):
                seeds = [seeds + replica for replica in range(replicas)]
            if not isinstance(seeds, int) and len(seeds) != replicas:
                raise ValueError(
                    f"seed: expected a number, or one for each of {replicas or 'no'} replicas; got {seeds!r}"
                )
            device = next(network.parameters()).device
            self.generators = generators_from_seeds(seeds, device, purpose=type(self).__name__)
        if self._generator_states is not None:
            for generator, state in zip(self._streams(), self._generator_states, strict=True):
                generator.set_state(state.cpu())
            self._generator_states = None
        if self.detector is not None:
            if not self.acts_at_switches:
                raise ValueError(
                    f"detector: expected None for a {type(self).__name__} that does nothing at a switch, got "
                    f"{type(self.detector).__name__}"
                )
            self.detector.on_start(network, optimizer)

    def loss_known(self, network: nn.Module, loss: Tensor) -> None:
        """Say what the mean loss of a batch is, before the step: a number, or (R,) for a stacked network.

        In a study layers may have taken their step in the backward pass, see `needs_gradients`.
        """
        if self.detector is not None:
            self.detector.on_loss(network, loss)

    def gradient_known(self, network: nn.Module, optimizer: Optimizer) -> None:
        """Say that the gradients are there, before the optimizer steps."""
        self._require_start()
        if self.detector is not None:
            self.detector.on_gradient(network, optimizer)
        self.on_gradient(network, optimizer)

    def step_taken(self, network: nn.Module, optimizer: Optimizer) -> None:
        """Say that the optimizer has stepped."""
        self._require_start()
        noticed = None if self.detector is None else self.detector.on_step(network, optimizer)
        self.on_step(network, optimizer)
        if noticed is not None and bool(noticed.any()):
            with only_replicas(noticed, network, optimizer, self):
                self.on_switch(network, optimizer)

    def switch_announced(self, network: nn.Module, optimizer: Optimizer) -> None:
        """Announce that another task begins; never before the first."""
        self._require_start()
        if self.detector is None or self.detector.takes_announcements:
            self.on_switch(network, optimizer)

    def on_gradient(self, network: nn.Module, optimizer: Optimizer) -> None:
        """After the gradients are there, before the optimizer steps."""

    def on_step(self, network: nn.Module, optimizer: Optimizer) -> None:
        """After each optimizer step."""

    def on_switch(self, network: nn.Module, optimizer: Optimizer) -> None:
        """At the switch to another task; never before the first."""

    def _require_start(self) -> None:
        """Raise where nothing is hooked yet, or no more: copies and what was unpickled have not started."""
        if self.generators is None:
            raise RuntimeError(
                f"{type(self).__name__}: expected on_start(network, optimizer) before training, and again after "
                f"copying or unpickling; it was not called"
            )

    def detach(self) -> None:
        """Remove the hooks from the network."""
        super().detach()
        if self.detector is not None:
            self.detector.detach()

    def state_dict(self) -> dict[str, Any]:
        """Everything that the intervention has gathered, and its random streams."""
        states = [stream.get_state() for stream in self._streams()] or list(self._generator_states or [])
        detected = {} if self.detector is None else {"detector": self.detector.state_dict()}
        return {"state": self.state, "generators": states, **detected}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.state = copy.deepcopy(state["state"])
        if self.detector is not None and "detector" in state:
            self.detector.load_state_dict(state["detector"])
        self._generator_states = list(state["generators"]) or None
        if self._generator_states is not None and self.generators is not None:
            for generator, stored in zip(self._streams(), self._generator_states, strict=True):
                generator.set_state(stored.cpu())
            self._generator_states = None

    def __getstate__(self) -> dict[str, Any]:  # generators and hooks do not pickle
        states = [stream.get_state() for stream in self._streams()] or self._generator_states
        return {**self.__dict__, "generators": None, "_handles": [], "_generator_states": states}

    def _streams(self) -> list[torch.Generator]:
        if self.generators is None:
            return []
        return [self.generators] if isinstance(self.generators, torch.Generator) else list(self.generators)


def trainable(network: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters that training changes."""
    return [(name, parameter) for name, parameter in network.named_parameters() if parameter.requires_grad]


def fill_entries(tensor: Tensor, mask: Tensor, value: float) -> None:
    """`Tensor.masked_fill_`, which on a CPU leaves the other entries of a large tensor unread.

    That is where the mask has size 1 along some of its axes, as one of rows or columns.

    Example:
        >>> weight = torch.ones(2, 3)
        >>> fill_entries(weight, torch.tensor([False, True, False]), 0.0)
        >>> weight
        tensor([[1., 0., 1.],
                [1., 0., 1.]])
    """
    mask = mask.reshape([1] * (tensor.dim() - mask.dim()) + list(mask.shape))
    own = [axis for axis, size in enumerate(mask.shape) if size == tensor.shape[axis]]
    across = [axis for axis in range(tensor.dim()) if axis not in own]
    if tensor.device.type != "cpu" or tensor.numel() < _LARGE or not own or not across:
        tensor.masked_fill_(mask, value)
        return
    places = mask.reshape([mask.shape[axis] for axis in own]).nonzero(as_tuple=True)
    tensor.permute(*own, *across)[places] = value


def forget_entries(optimizer: Optimizer, parameter: Tensor, mask: Tensor) -> None:
    """Reset what optimizer and Gaussian layer know of some entries of a parameter.

    The optimizer's tensors of the parameter's shape (momentum, averages of gradients and their squares) become
    0 there, a Gaussian precision returns to its prior, its curvature to 0.

    Args:
        optimizer: any torch optimizer.
        parameter: the parameter.
        mask: true at the entries to forget; broadcasts against the parameter.
    """
    for value in optimizer.state.get(parameter, {}).values():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            fill_entries(value, mask, 0.0)
    forget_precision(parameter, mask)


def forget_precision(parameter: Tensor, mask: Tensor) -> None:
    """Return the Gaussian precision of some entries of a parameter, where it has one, to its prior."""
    owner = owner_of(parameter)
    if owner is not None:
        layer, name = owner
        layer.block_of(name).reset(name, mask)


def forget_all(optimizer: Optimizer, parameter: Tensor, *, state: bool = True) -> None:
    """Reset what optimizer (where ``state`` is true) and Gaussian layer know of a whole parameter."""
    mask = torch.ones_like(parameter, dtype=torch.bool)
    if state:
        forget_entries(optimizer, parameter, mask)
    else:
        forget_precision(parameter, mask)
