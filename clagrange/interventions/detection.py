"""Detectors of task switches, for streams that announce none.

All of them watch one number at every step, by default by the same sequential test: with z the number's distance
from its reference in standard deviations,

    g ← max(0, g + min(z, clip) − drift),   alarm and start over where g > threshold,

which is the test of Page (1954): the smallest delay for a given rate of false alarms, if z has a known law that
shifts by 2·drift. They differ in the number and in the reference. For replicas everything has shape (R,).
"""

import copy
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from clagrange._checks import check_count, check_number, check_positive
from clagrange.distributed import mean_over_processes
from clagrange.gaussian import gaussian_blocks, predict
from clagrange.interventions.hooked import Hooked
from clagrange.replicas import generators_from_seeds, replicas_of


class Detector(Hooked):
    """What tells an intervention that the task has switched; give each intervention one of its own.

    Attributes:
        takes_announcements: whether announced switches are acted upon.
        state: numbers and tensors, (R,) or one entry, that a checkpoint keeps.
    """

    takes_announcements: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self.state: dict[str, Any] = {}

    def on_start(self, network: nn.Module, optimizer: Optimizer) -> None:
        """Before training starts, and again whenever it goes on."""
        self.detach()

    def on_loss(self, network: nn.Module, loss: Tensor) -> None:
        """The mean loss of a batch is known: a number, or (R,); several before a step add up, as gradients do."""

    def on_gradient(self, network: nn.Module, optimizer: Optimizer) -> None:
        """The gradients are there; the optimizer has not stepped yet."""

    @abstractmethod
    def on_step(self, network: nn.Module, optimizer: Optimizer) -> Tensor:
        """After a step: true where a switch is noticed, (R,), or one entry for a single network."""

    def state_dict(self) -> dict[str, Any]:
        """Everything gathered so far."""
        return {"state": self.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.state = copy.deepcopy(state["state"])

    def __getstate__(self) -> dict[str, Any]:  # hooks do not pickle
        return {**self.__dict__, "_handles": []}


class KnownBoundary(Detector):
    """The announcement: what an intervention without a detector goes by."""

    takes_announcements = True

    def on_step(self, network: nn.Module, optimizer: Optimizer) -> Tensor:
        """Nothing is noticed that was not announced."""
        return torch.zeros(replicas_of(network) or 1, dtype=torch.bool)


class SequentialDetector(Detector):
    """The sequential test of the module on a signal; a subclass says which.

    Args:
        threshold: of g.
        drift: what z may be above 0 for long, in standard deviations.
        warm_up: steps at the start, and after an alarm, that only serve the reference.
        decay: of the exponential averages that are the reference, in [0, 1]; 1 for the mean and variance of all
            steps since the last alarm.
        clip: of z, so that a single step does not make an alarm.
    """

    def __init__(self, threshold: float, drift: float, warm_up: int, decay: float, clip: float) -> None:
        super().__init__()
        check_positive("threshold", threshold)
        check_number("drift", drift, low=0.0, open_high=True)
        check_count("warm_up", warm_up)
        check_number("decay", decay, low=0.0, high=1.0)
        check_number("clip", clip, low=0.0, open_low=True)
        self.threshold = threshold
        self.drift = drift
        self.warm_up = warm_up
        self.decay = decay
        self.clip = clip

    def on_start(self, network: nn.Module, optimizer: Optimizer) -> None:
        """Begin to count, once."""
        super().on_start(network, optimizer)
        if "count" not in self.state:
            zeros = torch.zeros(replicas_of(network) or 1, dtype=torch.float64)
            self.state.update({name: zeros.clone() for name in ("count", "mean", "square", "sum")})

    def on_loss(self, network: nn.Module, loss: Tensor) -> None:
        """Add the loss to that of the step."""
        value = torch.atleast_1d(loss.detach()).double().cpu()
        expected = self.state["count"].shape
        if value.shape != expected:
            raise ValueError(
                f"loss: expected the mean loss of each of {len(self.state['count'])} networks, got shape "
                f"{tuple(loss.shape)}"
            )
        self.state["loss"] = self.state.get("loss", 0.0) + value

    @torch.no_grad()
    def on_step(self, network: nn.Module, optimizer: Optimizer) -> Tensor:
        """Test the signal of the step against the reference, which then takes it in."""
        signal = self._signal(network, optimizer)
        self.state.pop("loss", None)
        if signal is None:
            return torch.zeros_like(self.state["count"], dtype=torch.bool)
        device = next(network.parameters()).device  # where processes talk to each other
        return self._test(mean_over_processes(signal.double().to(device)).cpu())

    @abstractmethod
    def _signal(self, network: nn.Module, optimizer: Optimizer) -> Tensor | None:
        """The number of this step for each network; None where there is none yet."""

    def _test(self, signal: Tensor) -> Tensor:
        count, mean, square, total = (self.state[name] for name in ("count", "mean", "square", "sum"))
        usable = signal.isfinite()
        signal = torch.where(usable, signal, mean)
        deviation = square.sqrt().clamp(min=1e-12)
        score = torch.where(count >= self.warm_up, (signal - mean) / deviation, 0.0)
        total = torch.where(usable, (total + score.clamp(max=self.clip) - self.drift).clamp(min=0.0), total)
        alarm = total > self.threshold
        weight = torch.maximum(1.0 / (count + 1.0), torch.full_like(count, 1.0 - self.decay))
        weight = torch.where(usable, weight, 0.0)
        shift = signal - mean
        updated = {
            "count": count + usable.double(),
            "mean": mean + weight * shift,
            "square": (1.0 - weight) * (square + weight * shift.square()),
            "sum": total,
        }
        self.state.update({name: torch.where(alarm, 0.0, value) for name, value in updated.items()})
        return alarm


class CUSUM(SequentialDetector):
    """Jumps of the loss, against its exponential averages.

    Args:
        threshold: of g, in standard deviations.
        drift: what z may be above 0 for long.
        warm_up: steps at the start, and after an alarm, that only serve the reference.
        decay: of the averages of the loss and of its square.
        clip: of z.

    Source: Page, "Continuous inspection schemes", Biometrika 41 (1954).

    Example:
        >>> from clagrange.interventions import FullReset
        >>> reset = FullReset(detector=CUSUM(threshold=10))
        >>> reset.told_of_switches
        False
    """

    def __init__(
        self,
        threshold: float = 8.0,
        drift: float = 0.5,
        warm_up: int = 30,
        decay: float = 0.95,
        clip: float = 5.0,
    ) -> None:
        super().__init__(threshold, drift, warm_up, decay, clip)

    def _signal(self, network: nn.Module, optimizer: Optimizer) -> Tensor | None:
        return _loss_of(self)


class PageHinkley(SequentialDetector):
    """Jumps of the loss, against its mean since the last alarm.

    The difference of the cumulative sum of z − drift from its minimum so far is g. In the original form drift and
    threshold are in units of the loss; here of its standard deviation since the last alarm.

    Args:
        threshold: of g, in standard deviations.
        drift: what z may be above 0 for long.
        warm_up: steps at the start, and after an alarm, that only serve the reference.
        clip: of z.

    Source: Page (1954); Hinkley, "Inference about the change-point from cumulative sum tests", Biometrika 58
    (1971).
    """

    def __init__(self, threshold: float = 9.0, drift: float = 0.5, warm_up: int = 30, clip: float = 5.0) -> None:
        super().__init__(threshold, drift, warm_up, 1.0, clip)

    def _signal(self, network: nn.Module, optimizer: Optimizer) -> Tensor | None:
        return _loss_of(self)


def _loss_of(detector: SequentialDetector) -> Tensor:
    if "loss" not in detector.state:
        raise ValueError(
            "loss: expected the loss of this step, got none; tell the intervention with "
            "intervention.loss_known(network, loss) before the step"
        )
    loss: Tensor = detector.state["loss"]
    return loss


class PredictiveSurprise(SequentialDetector):
    """Batches whose loss is larger than a network with Gaussian weights itself expects.

    The weights' uncertainty gives each example a predictive distribution p̄, the softmax averaged over draws of
    the weights. A network that is right about itself expects for it, and for a batch of B of them,

        ℓ = Σ_c p̄_c·(−log p_c),   v = Σ_c p̄_c·(log p_c)² − ℓ²,   surprise = (loss − mean ℓ)/√(mean v/B)

    with p the softmax at the mean weights, by which the loss is measured. An unfamiliar input, on which draws
    disagree, is expected to be costly and surprises less than one of which the network was sure. For
    classification by cross-entropy, the mean over a batch. It costs ``samples`` forward passes a step.

    Args:
        threshold: of g.
        drift: what z may be above 0 for long; the reference is the surprise's own average.
        warm_up: steps at the start, and after an alarm, that only serve the reference.
        decay: of the averages of the surprise and its square.
        clip: of z.
        samples: draws of the weights.
        seed: of the draws; for a stacked network one for each replica, a single number counts up.
    """

    gathers = ("_seen",)

    def __init__(
        self,
        threshold: float = 8.0,
        drift: float = 0.5,
        warm_up: int = 30,
        decay: float = 0.95,
        clip: float = 5.0,
        samples: int = 4,
        seed: int | Sequence[int] = 0,
    ) -> None:
        super().__init__(threshold, drift, warm_up, decay, clip)
        check_count("samples", samples)
        self.samples = samples
        self.seed = seed
        self._seen: list[tuple[Tensor, Tensor]] = []
        self._expected: list[tuple[Tensor, Tensor]] = []
        self._watching = True

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_seen": [], "_expected": []}

    def on_start(self, network: nn.Module, optimizer: Optimizer) -> None:
        """Watch what enters and leaves the network."""
        super().on_start(network, optimizer)
        next(gaussian_blocks(network))  # names what is missing
        if "seeds" not in self.state:
            count = len(self.state["count"])
            seed = self.seed
            self.state["seeds"] = [seed + r for r in range(count)] if isinstance(seed, int) else list(seed)
        self._handles.append(network.register_forward_hook(self._watch))

    def _watch(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._watching and module.training and torch.is_grad_enabled():
            self._seen.append((args[0].detach(), output.detach()))

    def on_gradient(self, network: nn.Module, optimizer: Optimizer) -> None:
        """Ask the network, before it changes, what it expected of the batches."""
        self.state["draws"] = self.state.get("draws", 0) + len(self._seen)
        self._expected = [self._expectation(network, *pair) for pair in self._seen]
        self._seen = []

    def _signal(self, network: nn.Module, optimizer: Optimizer) -> Tensor | None:
        loss, expected = _loss_of(self), self._expected
        self._expected = []
        if not expected:
            return None
        means, variances = (torch.stack(part) for part in zip(*expected, strict=True))
        return (loss - means.mean(0)) / (variances.mean(0) / len(expected)).sqrt().clamp(min=1e-12)

    def _expectation(self, network: nn.Module, inputs: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of the batch's loss, as the network believes: numbers or (R,)."""
        replicas = replicas_of(network)
        # streams made of the batch's number, so that nothing has to be kept of them
        seeds = [seed * 1_000_003 + self.state["draws"] for seed in self.state["seeds"]]
        generator = generators_from_seeds(seeds[0] if replicas is None else seeds, logits.device)
        self._watching = False
        try:
            believed = predict(
                network, inputs, max(2, self.samples), likelihood="classification", generator=generator
            ).mean
        finally:
            self._watching = True
        costs = -logits.to(believed.dtype).log_softmax(-1)
        costs = torch.where(believed == 0, 0.0, costs)  # an impossible class costs nothing, where 0·∞ is NaN
        mean = (believed * costs).sum(-1)
        variance = (believed * costs.square()).sum(-1) - mean.square()
        first = int(replicas is not None)
        examples = mean.flatten(first).shape[-1]
        return (
            torch.atleast_1d(mean.flatten(first).mean(-1)).double().cpu(),
            torch.atleast_1d(variance.flatten(first).mean(-1)).double().cpu() / examples,
        )


class EnergyJump(SequentialDetector):
    """Changes of the loss that the gradients do not explain: the defect of the energy balance.

    The energy of a run, kinetic plus L(θ_k) + ½∇L·(θ_{k+1} − θ_k), changes by the work of its gradients as long
    as the loss is one function. What is left over at step k, with Δ the last displacement,

        L_k − L_{k−1} − ½(∇L_{k−1} + ∇L_k)·Δ,

    is 0 on a quadratic loss and noise between the batches of one task; at a switch it jumps up by what the loss
    does. It is the defect of `clagrange.mechanics.InertiaMeter` with ``law="work"``, for each replica. Weights
    that an intervention moves between two steps are not compared over it. It keeps a copy of the parameters.

    Args:
        threshold: of g.
        drift: what z may be above 0 for long.
        warm_up: steps at the start, and after an alarm, that only serve the reference.
        decay: of the averages of the defect and its square.
        clip: of z, which in a step after the jump is as far below: leave it above the threshold.
    """

    def __init__(
        self,
        threshold: float = 8.0,
        drift: float = 0.5,
        warm_up: int = 30,
        decay: float = 0.98,
        clip: float = float("inf"),
    ) -> None:
        super().__init__(threshold, drift, warm_up, decay, clip)
        self._starts: list[Tensor] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_starts": []}

    @torch.no_grad()
    def on_gradient(self, network: nn.Module, optimizer: Optimizer) -> None:
        """Note the weights, and the work of the gradients along the last displacement."""
        trained = _trained(network)
        self._starts = [parameter.detach().clone() for parameter in trained]
        last = self.state.get("displacement")
        if last is not None and [d.shape for d in last] == [p.shape for p in trained]:
            self.state["work_after"] = self._work(trained, last)

    def _signal(self, network: nn.Module, optimizer: Optimizer) -> Tensor | None:
        loss = _loss_of(self)
        trained, signal = _trained(network), None
        if "work_after" in self.state:
            explained = 0.5 * (self.state["work_before"] + self.state.pop("work_after"))
            signal = loss - self.state["last_loss"] - explained
        displacement = [p.detach() - start for p, start in zip(trained, self._starts, strict=True)]
        self.state["displacement"] = displacement
        self.state["work_before"] = self._work(trained, displacement)
        self.state["last_loss"] = loss
        self._starts = []
        return signal

    def _test(self, signal: Tensor) -> Tensor:
        alarm = super()._test(signal)
        # what an alarm does to the weights is no displacement: the next step has nothing before it
        self.state["last_loss"] = self.state["last_loss"].masked_fill(alarm, float("nan"))
        return alarm

    def _work(self, parameters: list[nn.Parameter], displacement: list[Tensor]) -> Tensor:
        """∇L·Δ of each network."""
        count = len(self.state["count"])
        total = torch.zeros(count, dtype=torch.float64)
        for parameter, moved in zip(parameters, displacement, strict=True):
            if parameter.grad is not None:
                product = parameter.grad.to(moved.dtype) * moved.to(parameter.device)
                total += product.reshape(count, -1).sum(-1).double().cpu()
        return total


def _trained(network: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in network.parameters() if parameter.requires_grad]
