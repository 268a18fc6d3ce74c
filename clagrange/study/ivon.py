"""IVON of the package ivon-opt in a study: an optimizer for any training loop, and the drawing of its weights."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from clagrange._checks import Number, check_fraction, check_nonnegative, check_positive, check_replicas
from clagrange.interventions import Intervention
from clagrange.replicas import Generators, generator_of
from clagrange.study.extras import extra_module
from clagrange.study.one_by_one import of_replica

_NUMBERS = ("lr", "ess", "hess_init", "beta1", "beta2", "weight_decay")


class IVON(Optimizer):
    """The optimizer of the package ``ivon-opt``, one for each replica, behind the interface of any other.

    The package takes plain numbers, one network, and torch's global random stream, and its context manager wants
    to be put around forward and backward. Here `draw` puts weights from the posterior into the network (call it
    before the forward pass, as `IVONSampling` does), and `step` puts the means back and takes the step. Until
    then the network holds the draw: gradients that accumulate are those of one draw. Each replica is an optimizer
    of its own, in a loop: R replicas take R times as long as one.

    Args:
        params: of the network; those that require gradients are Gaussian.
        replicas: R of a stacked network, None for a single one.
        lr: learning rate.
        ess: effective sample size: the posterior is that of so many examples.
        hess_init: the diagonal Hessian to start with; with ``ess`` it sets the first variance.
        beta1: decay of the average of the gradients.
        beta2: decay of the average of the Hessian.
        weight_decay: precision of the prior, divided by ``ess``.

    Every number may be a tensor of shape (R,).

    Raises:
        ModuleNotFoundError: if ``ivon-opt`` is not installed.
        ValueError: if a number is out of range.
        RuntimeError: in ``step``, if no weights were drawn.

    Source: Shen et al. (2024), arXiv 2402.17641. The package (GPL-3.0) is an optional one.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        *,
        replicas: int | None = None,
        lr: Number = 0.1,
        ess: Number = 1e4,
        hess_init: Number = 1.0,
        beta1: Number = 0.9,
        beta2: Number = 0.99999,
        weight_decay: Number = 1e-4,
    ) -> None:
        package = extra_module("ivon")
        numbers = dict(zip(_NUMBERS, (lr, ess, hess_init, beta1, beta2, weight_decay), strict=True))
        for name, check in (
            ("lr", check_nonnegative),
            ("ess", check_positive),
            ("hess_init", check_positive),
            ("beta1", check_fraction),
            ("beta2", check_fraction),
            ("weight_decay", check_nonnegative),
        ):
            check(name, numbers[name])
            check_replicas(name, numbers[name], replicas)
        super().__init__(params, numbers)
        self.replicas = replicas
        self._parameters = [
            parameter for group in self.param_groups for parameter in group["params"] if parameter.requires_grad
        ]
        self._copies = [
            [nn.Parameter(row.clone()) for row in rows]
            for rows in zip(*(self._rows(parameter) for parameter in self._parameters), strict=True)
        ]
        self._optimizers = [
            package.IVON(copies, **{name: of_replica(value, replica) for name, value in numbers.items()})
            for replica, copies in enumerate(self._copies)
        ]
        self._drawn: contextlib.ExitStack | None = None

    @torch.no_grad()
    def draw(self, generators: Generators | None = None) -> None:
        """Put a draw from the posterior into the network, unless one is there since the last step.

        Args:
            generators: the random streams, of the parameters' device; None for torch's global one.
        """
        if self._drawn is not None:
            return
        self._drawn = contextlib.ExitStack()
        for replica, (optimizer, copies) in enumerate(zip(self._optimizers, self._copies, strict=True)):
            rows = [self._rows(parameter)[replica] for parameter in self._parameters]
            for copy, row in zip(copies, rows, strict=True):
                copy.copy_(row)
            with _as_global_stream(generator_of(generators, replica)):
                self._drawn.enter_context(optimizer.sampled_params(train=True))
            for copy, row in zip(copies, rows, strict=True):
                row.copy_(copy)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Put the means back and take one step; a closure is evaluated first and its value returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._drawn is None:
            raise RuntimeError(
                "weights: expected a draw before the forward pass, got none since the last step; call draw(), or "
                "give the network the intervention IVONSampling"
            )
        gradients = [
            torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for parameter in self._parameters
        ]
        for replica, copies in enumerate(self._copies):
            for copy, gradient in zip(copies, gradients, strict=True):
                copy.grad = self._rows(gradient)[replica]
        self._drawn.close()  # the means return to the copies, and the gradients are taken in
        self._drawn = None
        for replica, (optimizer, copies) in enumerate(zip(self._optimizers, self._copies, strict=True)):
            for name in _NUMBERS:
                optimizer.param_groups[0][name] = of_replica(self.param_groups[0][name], replica)
            optimizer.step()
            for copy, parameter in zip(copies, self._parameters, strict=True):
                self._rows(parameter)[replica].copy_(copy)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The numbers, and the state of each replica's optimizer with the step count that the package forgets."""
        replicas = [{**optimizer.state_dict(), "step": optimizer.current_step} for optimizer in self._optimizers]
        return {**super().state_dict(), "replicas": replicas}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        super().load_state_dict(state_dict)
        for optimizer, state in zip(self._optimizers, state_dict["replicas"], strict=True):
            optimizer.load_state_dict(state)
            optimizer.current_step = state["step"]

    def _rows(self, tensor: Tensor) -> list[Tensor]:
        """A tensor of each replica, sharing memory."""
        return [tensor.detach()] if self.replicas is None else list(tensor.detach().unbind(0))


class IVONSampling(Intervention):
    """Draw the weights of `IVON` whenever the network is called in training, once for each step.

    Args:
        seed: of the random streams.
    """

    def on_start(self, network: nn.Module, optimizer: Optimizer) -> None:
        """Hook the network's forward pass."""
        super().on_start(network, optimizer)
        if not isinstance(optimizer, IVON):
            return  # evaluation alone needs no draws

        def draw(network: nn.Module, inputs: Any) -> None:
            if network.training and torch.is_grad_enabled():
                optimizer.draw(self.generators)

        self._handles.append(network.register_forward_pre_hook(draw))


@contextlib.contextmanager
def _as_global_stream(generator: torch.Generator | None) -> Iterator[None]:
    """Let torch's global random stream be that of a generator, which moves on; the global one does not."""
    if generator is None:
        yield
        return
    cuda = generator.device.type == "cuda"
    with torch.random.fork_rng(devices=[generator.device] if cuda else []):
        if cuda:
            torch.cuda.set_rng_state(generator.get_state(), generator.device)
        else:
            torch.set_rng_state(generator.get_state())
        yield
        state = torch.cuda.get_rng_state(generator.device) if cuda else torch.get_rng_state()
        generator.set_state(state)
