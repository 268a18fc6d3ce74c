"""Methods that act on all weights: decay, noise, averages, drifts and norms."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from clagrange import interventions
from clagrange.interventions import Intervention
from clagrange.networks import add_layer_norm
from clagrange.study.methods.base import BasedMethod


@dataclass(frozen=True)
class ShrinkAndPerturb(BasedMethod):
    """Shrink all weights and add noise, or fresh initial weights: at every step, every so many, or at switches.

    Args:
        lr: learning rate.
        shrink: fraction removed each time.
        noise: standard deviation of normal noise, or factor of fresh initial weights.
        base: "sgd" or "adam".
        every: "step", "switch" or a number of steps.
        perturbation: "normal" or "initial".
    """

    source = "Ash and Adams (2020), D'Oro et al. (2023), Dohare et al. (2024)"
    lr: float = 0.03
    shrink: float = 1e-4
    noise: float = 1e-3
    base: str = "sgd"
    every: str | int = "step"
    perturbation: str = "normal"

    def interventions(self, seeds: int | Sequence[int]) -> list[Intervention]:
        """Shrink and perturb."""
        return [
            interventions.ShrinkAndPerturb(
                self.shrink, self.noise, self.every, seed=seeds, perturbation=self.perturbation
            )
        ]


@dataclass(frozen=True)
class L2Init(BasedMethod):
    """L2 regularisation toward the initial weights.

    Args:
        lr: learning rate.
        strength: λ of λ/2·‖w − w₀‖².
        base: "sgd" or "adam".
        resample: "never", or draw w₀ anew at every "step" or "switch".
    """

    source = "Kumar, Marklund, Van Roy (2023)"
    lr: float = 0.03
    strength: float = 1e-2
    base: str = "sgd"
    resample: str = "never"

    def interventions(self, seeds: int | Sequence[int]) -> list[Intervention]:
        """The regulariser."""
        return [interventions.L2Init(self.strength, self.resample, seeds)]


@dataclass(frozen=True)
class RegenerativeL1(BasedMethod):
    """L1 regularisation toward the initial weights.

    Args:
        lr: learning rate.
        strength: λ of λ·Σ|w − w₀|.
        base: "sgd" or "adam".
        resample: "never", or draw w₀ anew at every "step" or "switch".
    """

    source = "Kumar, Marklund, Van Roy (2023)"
    lr: float = 0.03
    strength: float = 1e-4
    base: str = "sgd"
    resample: str = "never"

    def interventions(self, seeds: int | Sequence[int]) -> list[Intervention]:
        """The regulariser."""
        return [interventions.RegenerativeL1(self.strength, self.resample, seeds)]


@dataclass(frozen=True)
class HareAndTortoise(BasedMethod):
    """Keep a slow average of the weights, and return to it every so many steps.

    Args:
        lr: learning rate.
        decay: of the average.
        every: steps from one return to the next.
        base: "sgd" or "adam".
    """

    source = "Lee et al. (2024)"
    lr: float = 0.03
    decay: float = 0.999
    every: int = 1000
    base: str = "sgd"

    def interventions(self, seeds: int | Sequence[int]) -> list[Intervention]:
        """The average."""
        return [interventions.HareAndTortoise(self.decay, self.every)]


@dataclass(frozen=True)
class SpectralRegularization(BasedMethod):
    """Regularisation of the largest singular value of every layer toward 1.

    Args:
        lr: learning rate.
        strength: λ of λ·(σᵏ − 1)².
        power: k.
        base: "sgd" or "adam".
    """

    source = "Lewandowski et al. (2024)"
    lr: float = 0.03
    strength: float = 1e-3
    power: float = 2.0
    base: str = "sgd"

    def interventions(self, seeds: int | Sequence[int]) -> list[Intervention]:
        """The regulariser."""
        return [interventions.SpectralRegularization(self.strength, self.power, seeds)]


@dataclass(frozen=True)
class NormalizeAndProject(BasedMethod):
    """Layer norm before every ReLU, and weights that keep their initial norm.

    Args:
        lr: learning rate.
        every: steps from one projection to the next.
        base: "sgd" or "adam".
    """

    source = "Lyle et al. (2024)"
    lr: float = 0.03
    every: int = 1
    base: str = "sgd"

    def prepare(self, network: nn.Module, seeds: int | Sequence[int]) -> None:
        """Put the norms in."""
        add_layer_norm(network)

    def interventions(self, seeds: int | Sequence[int]) -> list[Intervention]:
        """The projection."""
        return [interventions.NormalizeAndProject(self.every)]


@dataclass(frozen=True)
class SoftReset(BasedMethod):
    """A drift to the initial weights, as fast as the likelihood of each batch asks for.

    Args:
        lr: learning rate.
        gamma_lr: step size of the drift γ.
        posterior_scale: s, how sure the posterior is of a weight.
        scope: "layer" or "weight": what has a γ of its own.
        origin: "initial" weights, or "zero".
        base: "sgd" or "adam".
    """

    source = "Galashov et al. (2024)"
    lr: float = 0.03
    gamma_lr: float = 0.1
    posterior_scale: float = 0.9
    scope: str = "layer"
    origin: str = "initial"
    base: str = "sgd"

    def interventions(self, seeds: int | Sequence[int]) -> list[Intervention]:
        """The drift."""
        return [interventions.SoftReset(self.gamma_lr, self.posterior_scale, self.scope, self.origin)]
