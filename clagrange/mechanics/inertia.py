"""The meter of a training run's energy: what it was, how it should have changed, how it did."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer
from torch.utils.hooks import RemovableHandle

from clagrange._checks import check_choice, check_fraction, check_nonnegative, check_positive
from clagrange.mechanics.energy import (
    Mass,
    Metric,
    damping_change,
    midstep_potential,
    momentum_change,
    noise_change,
    work_change,
)
from clagrange.mechanics.laws import parameters_of
from clagrange.mechanics.readings import Reading, RunningScore, Sums, group_sums, noting
from clagrange.optim import StackedSGD

LAWS = ("auto", "momentum", "work")


class InertiaMeter:
    """Follow kinetic and potential energy of the training by any torch optimizer.

    One step takes the time √ε, ε the step size; then momentum m is friction β = (1 − m)/√ε, and the energy
    I_k = Σm‖θ_{k+1} − θ_k‖²/(2ε) + L(θ_k) + ½∇L·(θ_{k+1} − θ_k) changes by a law. Tell the meter the loss whose
    gradients a step uses with `observe` before the step (several calls add up, as gradients do), or give
    ``optimizer.step`` a closure that returns it. Training is left as it is.

    The laws, both exact on quadratic losses:

    - "momentum": friction alone, `momentum_change`. For `torch.optim.SGD` with any momentum, dampening, weight
      decay and learning-rate schedule (not Nesterov's form), and for whatever is momentum descent in the metric
      that you give. Jumps and steps that are no momentum descent appear in the defect.
    - "work": `work_change`, for every optimizer; the defect is the change of the loss that the gradients do not
      explain.

    Step size and momentum are read off the optimizer's parameter groups: ``lr`` and ``momentum`` (ε = lr·(1 −
    dampening)), else ``betas`` (m = β₁, ε = lr·(1 − β₁)), else m = 0. Weight decay that is part of the gradient
    counts as a potential ½λ‖θ‖². A stack of replicas is one system, its energies summed; of several processes
    each reads the loss that it observes. What happens to the weights between two steps is no displacement, and
    shows in the defect. It keeps a copy of the parameters between steps (two with noise), three more within one,
    and waits once a step for the device.

    Args:
        optimizer: follow it from now on; or call `attach` later.
        mass: a number; or a mapping from parameters to numbers or tensors of their shape, 1 for others; or a
            metric, a function (parameter, vector) → metric times vector, such as `adam_metric`.
        law: "momentum", "work", or "auto": "momentum" for SGD without Nesterov's form and ``mass`` a number or
            mapping, "work" for all else.
        noise: True to predict what gradient noise adds, ½ε tr(M⁻¹C), with tr C from half the squared
            difference of successive gradients, averaged over steps (it also counts the change of the gradient
            along the path, so it is for small batches); or a number, the known tr(M⁻¹C).
        decay: of the averages behind ``surprise`` and the noise, in [0, 1).

    Raises:
        TypeError: if ``mass`` is of another kind.
        ValueError: for an unknown law, numbers out of range, or noise without a known inverse of the metric.

    Example:
        >>> theta = torch.tensor([2.0, 1.0], dtype=torch.float64, requires_grad=True)
        >>> optimizer = torch.optim.SGD([theta], lr=0.01, momentum=0.9)
        >>> meter = InertiaMeter(optimizer)
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     loss = (theta * theta).sum()
        ...     loss.backward()
        ...     meter.observe(loss)
        ...     optimizer.step()
        >>> reading = meter.reading
        >>> reading.change < 0 and abs(reading.defect) < 1e-12
        True
    """

    def __init__(
        self,
        optimizer: Optimizer | None = None,
        *,
        mass: float | Mapping[Tensor, Mass] | Metric = 1.0,
        law: str = "auto",
        noise: bool | float = False,
        decay: float = 0.98,
    ) -> None:
        check_choice("law", law, LAWS)
        check_fraction("decay", decay)
        if not callable(mass) and not isinstance(mass, Mapping):
            check_positive("mass", mass)
        if not isinstance(noise, bool):
            check_nonnegative("noise", noise)
        if noise is True and callable(mass):
            raise ValueError(
                "noise: expected False or the number tr(M⁻¹C) where mass is a function, got True; the inverse of "
                "the metric is not known"
            )
        self.mass = mass
        self.law = law
        self.noise = noise
        self.decay = decay
        self.optimizer: Optimizer | None = None
        self.reading: Reading | None = None
        """Of the last step."""
        self.steps = 0
        self._score = RunningScore(decay)
        self._window: dict[str, float] = {}
        self._handles: list[RemovableHandle] = []
        self._resumed = False
        self._observed: Tensor | float | None = None
        self._from_closure: Tensor | float | None = None
        self._starts: list[Tensor] | None = None
        self._fresh: list[Tensor] = []
        self._depth = 0
        self._forget()
        if optimizer is not None:
            self.attach(optimizer)

    def _forget(self) -> None:
        """Forget the step before, so that the next one is the first of a run."""
        self._displacements: list[Tensor] | None = None
        self._gradients: list[Tensor] | None = None
        self._sums: list[Sums] = []
        self._energy = 0.0
        self._noise = 0.0
        self._noise_count = 0
        self._observed = None

    def attach(self, optimizer: Optimizer) -> None:
        """Follow this optimizer, from a first step on, or from where a loaded state ended."""
        self.detach()
        if not self._resumed:
            self._forget()
        self._resumed = False
        self.optimizer = optimizer
        self._handles = [
            optimizer.register_step_pre_hook(self._begins),
            optimizer.register_step_post_hook(self._ends),
        ]

    def detach(self) -> None:
        """Leave the optimizer alone."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.optimizer = None
        self._starts, self._depth = None, 0

    def observe(self, loss: Tensor | float) -> None:
        """Add to the loss of the next step; its value is fetched when the step is done."""
        part = loss.detach().clone() if isinstance(loss, Tensor) else loss
        self._observed = part if self._observed is None else self._observed + part

    def clear(self) -> None:
        """Take back what was observed since the last step, as when gradients are set to zero."""
        self._observed = None

    def collect(self) -> dict[str, float]:
        """What a logger wants: the last energies, and since the last call sums of change, prediction, defect.

        ``kinetic``, ``potential`` and ``energy`` are the last step's; ``change``, ``predicted``, ``damping``,
        ``noise`` and ``defect`` are summed over the steps since; ``surprise`` is the one of largest size. What
        is not known is left out.
        """
        if self.reading is None:
            return {}
        found = {name: getattr(self.reading, name) for name in ("kinetic", "potential", "energy")}
        found.update(self._window)
        self._window = {}
        return found

    def _begins(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        self._depth += 1  # an optimizer whose step calls that of its base class comes here twice
        if self._depth > 1:
            return None
        self._starts = [parameter.detach().clone() for _, parameter in parameters_of(optimizer)]
        self._from_closure = None
        if callable(kwargs.get("closure")):
            return args, {**kwargs, "closure": noting(kwargs["closure"], self._note)}
        if len(args) > 1 and callable(args[1]):
            return (args[0], noting(args[1], self._note), *args[2:]), kwargs
        self._note(None)
        return None

    def _note(self, loss: Any) -> None:
        """Keep the gradients before the optimizer changes them, and the loss of a closure."""
        assert self.optimizer is not None
        self._fresh = [
            torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach().clone()
            for _, parameter in parameters_of(self.optimizer)
        ]
        if isinstance(loss, (Tensor, float, int)):
            self._from_closure = loss.detach().clone() if isinstance(loss, Tensor) else float(loss)

    @torch.no_grad()
    def _ends(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._depth -= 1
        if self._depth > 0 or self._starts is None:
            return
        starts, gradients = self._starts, self._fresh
        self._starts, self._fresh = None, []
        loss = self._from_closure if self._observed is None else self._observed
        self._observed = self._from_closure = None
        if loss is None:
            raise ValueError(
                "loss: expected the loss of this step, got none; call meter.observe(loss) before "
                "optimizer.step(), or give it a closure that returns the loss"
            )
        self._read(optimizer, float(loss), starts, gradients)

    def _read(self, optimizer: Optimizer, loss: float, starts: list[Tensor], gradients: list[Tensor]) -> None:
        before, noisy = self._displacements, self._gradients
        if before is not None and [d.shape for d in before] != [s.shape for s in starts]:
            before = noisy = None  # a head has grown: another system
        sums, displacements = group_sums(optimizer, starts, gradients, before, noisy, self._weigh, self._unweigh)
        value = -loss if optimizer.param_groups[0].get("maximize") else loss
        kinetic = sum(group.kinetic for group in sums)
        potential = midstep_potential(value + sum(s.decay for s in sums), sum(s.work for s in sums))
        energy = kinetic + potential
        self.steps += 1
        compared: dict[str, float] = {}
        if before is not None and len(self._sums) == len(sums):
            compared = self._compare(self._law(optimizer), sums, energy - self._energy)
        self.reading = Reading(self.steps, loss, kinetic, potential, energy, **compared)
        self._displacements, self._sums, self._energy = displacements, sums, energy
        self._gradients = gradients if self.noise is True else None

    def _compare(self, law: str, sums: list[Sums], change: float) -> dict[str, float]:
        """Change, prediction and defect of a step that has one before it."""
        noise = self._noise_of(sums)
        predicted = noise
        found = {"change": change, "noise": noise}
        for now, old in zip(sums, self._sums, strict=True):
            if law == "momentum":
                predicted += momentum_change(
                    old.kinetic, now.squared_before, now.overlap, now.step_size, now.momentum, old.step_size
                )
                middle = 0.5 * (old.kinetic + now.kinetic)
                found["damping"] = found.get("damping", 0.0) + damping_change(middle, now.momentum)
            else:
                predicted += work_change(old.kinetic, now.kinetic, now.work, now.work_before)
        found |= {"predicted": predicted, "defect": change - predicted}
        for name, value in found.items():
            self._window[name] = self._window.get(name, 0.0) + value
        surprise = self._score.update(found["defect"])
        self._window["surprise"] = max(self._window.get("surprise", 0.0), surprise, key=abs)
        return {**found, "surprise": surprise}

    def _noise_of(self, sums: list[Sums]) -> float:
        """What gradient noise adds in this step on average."""
        if self.noise is False:
            return 0.0
        if self.noise is not True:
            return noise_change(float(self.noise), sums[0].step_size)
        if self._gradients is not None:
            self._noise_count += 1
            weight = max(1.0 - self.decay, 1.0 / self._noise_count)
            drawn = sum(noise_change(0.5 * group.jump, group.step_size) for group in sums)
            self._noise += weight * (drawn - self._noise)
        return self._noise

    def _law(self, optimizer: Optimizer) -> str:
        if self.law != "auto":
            return self.law
        plain = isinstance(optimizer, (SGD, StackedSGD)) and not callable(self.mass)
        return "momentum" if plain and not any(g.get("nesterov") for g in optimizer.param_groups) else "work"

    def _weigh(self, parameter: Tensor, vector: Tensor) -> Tensor:
        return self.mass(parameter, vector) if callable(self.mass) else self._mass_of(parameter) * vector

    def _unweigh(self, parameter: Tensor, vector: Tensor) -> Tensor:
        return vector / self._mass_of(parameter)

    def _mass_of(self, parameter: Tensor) -> Mass:
        if isinstance(self.mass, Mapping):
            return self.mass.get(parameter, 1.0)
        return self.mass  # type: ignore[return-value]

    def state_dict(self) -> dict[str, Any]:
        """All that the next reading needs; loads with ``weights_only=True``."""
        return {
            "steps": self.steps,
            "energy": self._energy,
            "displacements": self._displacements,
            "gradients": self._gradients,
            "sums": [tuple(group) for group in self._sums],
            "noise": (self._noise, self._noise_count),
            "score": self._score.state_dict(),
            "window": dict(self._window),
            "observed": self._observed,
            "reading": None if self.reading is None else asdict(self.reading),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave; the optimizer attached now, or next, goes on from there."""
        self.steps = state["steps"]
        self._energy = state["energy"]
        self._displacements = state["displacements"]
        self._gradients = state["gradients"]
        self._sums = [Sums(*group) for group in state["sums"]]
        self._noise, self._noise_count = state["noise"]
        self._score.load_state_dict(state["score"])
        self._window = dict(state["window"])
        self._observed = state["observed"]
        self.reading = None if state["reading"] is None else Reading(**state["reading"])
        self._resumed = self.optimizer is None

    def __getstate__(self) -> dict[str, Any]:
        fresh: dict[str, Any] = {"optimizer": None, "_handles": [], "_starts": None, "_fresh": [], "_depth": 0}
        return {**self.__dict__, **fresh, "_resumed": self._resumed or self.optimizer is not None}
