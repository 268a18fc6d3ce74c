"""The methods that a study compares: a network's preparation, its optimizer and its interventions.

Constructor arguments are the settings that a study file gives. Every number may also be a tensor of shape
(R,), one setting for each replica of a stacked network; that is how a search tries many settings at once.
"""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from clagrange import interventions, optim
from clagrange._checks import Number, check_choice
from clagrange.gaussian import Diagonal, Kronecker, gaussianize, set_sampling
from clagrange.interventions import Detector, Intervention
from clagrange.networks import add_layer_norm, use_crelu
from clagrange.optim import EulerLagrange as EulerLagrangeOptimizer
from clagrange.optim import StackedAdam, StackedMuon, StackedSGD
from clagrange.replicas import generators_from_seeds, replicas_of
from clagrange.study import ivon


@dataclass(frozen=True)
class Method(ABC):
    """One way of training a network on a stream.

    Attributes:
        source: where the method was published.
        samples_weights: whether the network computes with drawn weights in training; its predictions are then
            those of an evaluation, at the mean.
    """

    source: ClassVar[str]
    samples_weights: ClassVar[bool] = False

    def prepare(self, network: nn.Module, seeds: int | Sequence[int]) -> None:  # noqa: B027
        """Change the fresh network in place, such as by making it Gaussian, with the seeds of the replicas."""

    @abstractmethod
    def optimizer(self, network: nn.Module) -> Optimizer:
        """The optimizer of the prepared network."""

    def interventions(self, seeds: int | Sequence[int]) -> list[Intervention]:
        """What else is done to the network, with the seeds of the replicas' random streams."""
        return []

    @property
    def told_of_switches(self) -> bool:
        """Whether the method uses the announcement of task switches."""
        return any(intervention.told_of_switches for intervention in self.interventions(0))


def _sgd(network: nn.Module, lr: Number, l2: Number = 0.0) -> Optimizer:
    stacked = isinstance(lr, Tensor) or isinstance(l2, Tensor)
    kind: Any = StackedSGD if stacked else torch.optim.SGD
    return kind(network.parameters(), lr=lr, weight_decay=l2)  # type: ignore[no-any-return]


def _adam(network: nn.Module, lr: Number, l2: Number = 0.0) -> Optimizer:
    if isinstance(lr, Tensor) or isinstance(l2, Tensor):
        return StackedAdam(network.parameters(), lr=lr, weight_decay=l2)
    return torch.optim.Adam(network.parameters(), lr=lr, weight_decay=l2, foreach=True)


_DETECTORS: dict[str, Any] = {
    "cusum": interventions.CUSUM,
    "page_hinkley": interventions.PageHinkley,
    "predictive_surprise": interventions.PredictiveSurprise,
    "energy_jump": interventions.EnergyJump,
}
_BASES = {"sgd": _sgd, "adam": _adam}


class BasedMethod(Method):
    """A method that stands on SGD or Adam: its settings are the learning rate ``lr`` and the name ``base``."""

    lr: float
    base: str

    def optimizer(self, network: nn.Module) -> Optimizer:
        """The base optimizer."""
        check_choice("base", self.base, _BASES)
        return _BASES[self.base](network, self.lr)


@dataclass(frozen=True)
class SGD(Method):
    """Stochastic gradient descent.

    Args:
        lr: learning rate.
    """

    source = "Robbins and Monro (1951)"
    lr: float = 0.03

    def optimizer(self, network: nn.Module) -> Optimizer:
        """torch's SGD."""
        return _sgd(network, self.lr)


@dataclass(frozen=True)
class Adam(Method):
    """Adam.

    Args:
        lr: learning rate.
    """

    source = "Kingma and Ba (2015)"
    lr: float = 1e-3

    def optimizer(self, network: nn.Module) -> Optimizer:
        """torch's Adam."""
        return _adam(network, self.lr)


@dataclass(frozen=True)
class AdamL2(Method):
    """Adam with coupled L2 regularisation.

    Args:
        lr: learning rate.
        l2: coefficient; l2·w is added to the gradient.
    """

    source = "Kingma and Ba (2015)"
    lr: float = 1e-3
    l2: float = 1e-3

    def optimizer(self, network: nn.Module) -> Optimizer:
        """torch's Adam with weight decay."""
        return _adam(network, self.lr, self.l2)


@dataclass(frozen=True)
class Muon(Method):
    """Muon: gradients of the weights of a layer made nearly orthogonal; AdamW on biases.

    Args:
        lr: learning rate of weights.
        weight_decay: decoupled, in units of the learning rates.
        momentum: decay of the average of the gradients.
        adamw_lr: learning rate of biases.
    """

    source = "Jordan et al. (2024)"
    lr: float = 0.01
    weight_decay: float = 0.1
    momentum: float = 0.95
    adamw_lr: float = 3e-3

    def optimizer(self, network: nn.Module) -> Optimizer:
        """Muon beside AdamW."""
        return StackedMuon(
            network.parameters(),
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            adamw_lr=self.adamw_lr,
            stacked=replicas_of(network) is not None,
        )


@dataclass(frozen=True)
class AdamInputNormalization(Method):
    """Adam on inputs normalised by their running mean and variance: the control for input conditioning.

    Args:
        lr: learning rate.
    """

    source = "control"
    lr: float = 1e-3

    def optimizer(self, network: nn.Module) -> Optimizer:
        """torch's Adam."""
        return _adam(network, self.lr)

    def interventions(self, seeds: int | Sequence[int]) -> list[Intervention]:
        """Running normalisation of the inputs."""
        return [interventions.InputNormalization()]


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


@dataclass(frozen=True)
class LayerNorm(BasedMethod):
    """Layer norm before every ReLU: the control for normalisation inside the network.

    Args:
        lr: learning rate.
        base: "sgd" or "adam".
    """

    source = "Ba, Kiros, Hinton (2016); against loss of plasticity Lyle et al. (2023)"
    lr: float = 0.03
    base: str = "sgd"

    def prepare(self, network: nn.Module, seeds: int | Sequence[int]) -> None:
        """Put the norms in."""
        add_layer_norm(network)


@dataclass(frozen=True)
class Crelu(BasedMethod):
    """Concatenated ReLU: of every unit its positive and its negative part, so that one is always alive.

    Args:
        lr: learning rate.
        base: "sgd" or "adam".
    """

    source = "Abbas et al. (2023)"
    lr: float = 0.03
    base: str = "sgd"

    def prepare(self, network: nn.Module, seeds: int | Sequence[int]) -> None:
        """Put the activations in; weights are drawn afresh from the seeds."""
        use_crelu(network, generators_from_seeds(seeds, next(network.parameters()).device))


@dataclass(frozen=True)
class ContinualBackprop(BasedMethod):
    """Replace the least useful mature hidden units, a few at a time.

    Args:
        lr: learning rate.
        replacement_rate: fraction of the mature units replaced at every step.
        maturity: steps for which a new unit is protected.
        utility: "contribution", "zero_contribution", "adaptable_contribution", "weight", "adaptation" or
            "random".
        base: "sgd" or "adam".
    """

    source = "Dohare et al. (2024)"
    lr: float = 0.03
    replacement_rate: float = 1e-3
    maturity: int = 100
    utility: str = "contribution"
    base: str = "sgd"

    def interventions(self, seeds: int | Sequence[int]) -> list[Intervention]:
        """Generate and test."""
        return [
            interventions.ContinualBackprop(
                self.replacement_rate, maturity=self.maturity, utility=self.utility, seed=seeds
            )
        ]


@dataclass(frozen=True)
class GradedContinualBackprop(BasedMethod):
    """Move every hidden unit a little toward a fresh one, the more the less it learns.

    Args:
        lr: learning rate.
        rate: largest part of the way at each move.
        every: steps from one move to the next.
        base: "sgd" or "adam".
    """

    source = "Continuous continual backpropagation (submitted to ICLR 2026)"
    lr: float = 0.03
    rate: float = 0.015
    every: int = 100
    base: str = "sgd"

    def interventions(self, seeds: int | Sequence[int]) -> list[Intervention]:
        """The graded reset."""
        return [interventions.GradedContinualBackprop(self.rate, every=self.every, seed=seeds)]


@dataclass(frozen=True)
class Redo(BasedMethod):
    """Let hidden units start over that are dormant beside the others of their layer.

    Args:
        lr: learning rate.
        threshold: share of the layer's mean score up to which a unit is dormant.
        every: steps from one check to the next.
        score: "activation" or "gradient".
        base: "sgd" or "adam".
    """

    source = "Sokar et al. (2023); gradient score: Liu et al. (2025)"
    lr: float = 0.03
    threshold: float = 0.025
    every: int = 100
    score: str = "activation"
    base: str = "sgd"

    def interventions(self, seeds: int | Sequence[int]) -> list[Intervention]:
        """The recycling."""
        return [interventions.ReDo(self.threshold, every=self.every, score=self.score, seed=seeds)]


@dataclass(frozen=True)
class SelfNormalizedResets(BasedMethod):
    """Let a hidden unit start over that is silent for longer than its own past makes likely.

    Args:
        lr: learning rate.
        rejection: share of its gaps at which a live unit may be taken for a dead one.
        longest: steps of silence after which every unit starts over.
        base: "sgd" or "adam".
    """

    source = "Farias and Jozefiak (2025)"
    lr: float = 0.03
    rejection: float = 0.01
    longest: int = 1000
    base: str = "sgd"

    def interventions(self, seeds: int | Sequence[int]) -> list[Intervention]:
        """The resets."""
        return [interventions.SelfNormalizedResets(self.rejection, self.longest, seed=seeds)]


@dataclass(frozen=True)
class HeadReset(BasedMethod):
    """Set the output layer to 0 at every switch.

    Args:
        lr: learning rate.
        base: "sgd" or "adam".
    """

    source = "Dohare et al. (2024)"
    lr: float = 0.03
    base: str = "sgd"

    def interventions(self, seeds: int | Sequence[int]) -> list[Intervention]:
        """The reset."""
        return [interventions.HeadReset()]


@dataclass(frozen=True)
class LastLayerReset(BasedMethod):
    """Draw the last layer afresh, at every switch or every few steps.

    Args:
        lr: learning rate.
        every: steps from one reset to the next; null: at every switch.
        forget: whether the optimizer's state of the layer becomes 0 too.
        base: "sgd" or "adam".
    """

    source = "Nikishin et al. (2022), Zhou et al. (2022)"
    lr: float = 0.03
    every: int | None = None
    forget: bool = True
    base: str = "sgd"

    def interventions(self, seeds: int | Sequence[int]) -> list[Intervention]:
        """The reset."""
        return [interventions.LastLayerReset(self.every, self.forget, seed=seeds)]


@dataclass(frozen=True)
class UPGD(Method):
    """Gradient descent with noise, less of both where a weight is of use.

    Args:
        lr: learning rate.
        noise: standard deviation of the perturbation, in units of the gradient.
        decay: of the average of the utility.
        weight_decay: decoupled, in units of the learning rate.
        scope: "global" or "local": where utilities are compared.
        protecting: whether useful weights are held against the gradient, not against the noise alone.
    """

    source = "Elsayed and Mahmood (2024)"
    lr: float = 0.01
    noise: float = 0.1
    decay: float = 0.9999
    weight_decay: float = 0.01
    scope: str = "global"
    protecting: bool = True

    def optimizer(self, network: nn.Module) -> Optimizer:
        """The optimizer."""
        return optim.UPGD(
            network.parameters(),
            lr=self.lr,
            noise=self.noise,
            decay=self.decay,
            weight_decay=self.weight_decay,
            scope=self.scope,
            protecting=self.protecting,
            stacked=replicas_of(network) is not None,
        )

    def interventions(self, seeds: int | Sequence[int]) -> list[Intervention]:
        """The seeds of the optimizer's noise."""
        return [_OptimizerSeed(seeds)]


class _OptimizerSeed(Intervention):
    """Give an optimizer that draws numbers the seeds of the replicas at its start."""

    def on_start(self, network: nn.Module, optimizer: Optimizer) -> None:
        super().on_start(network, optimizer)
        assert isinstance(optimizer, optim.UPGD)
        optimizer.seed(self.seed)


@dataclass(frozen=True)
class FreshNetwork(Method):
    """A fresh network for every task, trained by Adam: what a network without a past reaches.

    Args:
        lr: learning rate.
    """

    source = "control"
    lr: float = 1e-3

    def optimizer(self, network: nn.Module) -> Optimizer:
        """torch's Adam."""
        return _adam(network, self.lr)

    def interventions(self, seeds: int | Sequence[int]) -> list[Intervention]:
        """Reset of weights and optimizer at every switch."""
        return [interventions.FullReset(seed=seeds)]


@dataclass(frozen=True)
class IVON(Method):
    """Improved variational online Newton: a variance for every weight, learnt with drawn weights.

    Needs the package ivon-opt: ``pip install 'clagrange[ivon]'``. Each replica is an optimizer of its own.

    Args:
        lr: learning rate.
        ess: effective sample size, the examples that the posterior is of.
        hess_init: the diagonal Hessian to start with.
        beta1: decay of the average of the gradients.
        beta2: decay of the average of the Hessian.
        weight_decay: precision of the prior, divided by ess.
    """

    source = "Shen et al. (2024)"
    samples_weights = True
    lr: float = 0.1
    ess: float = 1e4
    hess_init: float = 0.5
    beta1: float = 0.9
    beta2: float = 0.9999
    weight_decay: float = 1e-3

    def __post_init__(self) -> None:
        """Say at once where the package is missing."""
        ivon.installed_package()

    def optimizer(self, network: nn.Module) -> Optimizer:
        """The package's optimizer."""
        return ivon.IVON(
            network.parameters(),
            replicas=replicas_of(network),
            lr=self.lr,
            ess=self.ess,
            hess_init=self.hess_init,
            beta1=self.beta1,
            beta2=self.beta2,
            weight_decay=self.weight_decay,
        )

    def interventions(self, seeds: int | Sequence[int]) -> list[Intervention]:
        """The drawing of the weights."""
        return [ivon.IVONSampling(seeds)]


def _draw_weights(network: nn.Module, prior_variance: Number, seeds: int | Sequence[int]) -> None:
    """Make a network Gaussian, with a draw of its weights for every batch."""
    gaussianize(network, Diagonal("sampled", sampling="batch"), prior_variance=prior_variance)
    set_sampling(network, "batch", generators_from_seeds(seeds))


@dataclass(frozen=True)
class MESU(Method):
    """Metaplasticity from synaptic uncertainty: drawn weights, and a memory of so many examples.

    Args:
        lr: scale of the steps of mean and width.
        memory: examples after which the past is forgotten.
        prior_variance: of the weights, in units of the initialisation variance.
        trust_region: bound on the steps of mean and width, in posterior standard deviations.
    """

    source = "Bonnet et al. (2025)"
    samples_weights = True
    lr: float = 10.0
    memory: float = 1e5
    prior_variance: float = 0.1
    trust_region: float = 0.3

    def prepare(self, network: nn.Module, seeds: int | Sequence[int]) -> None:
        """Make the network Gaussian."""
        _draw_weights(network, self.prior_variance, seeds)

    def optimizer(self, network: nn.Module) -> Optimizer:
        """The MESU optimizer."""
        return optim.MESU(network, lr=self.lr, memory=self.memory, trust_region=self.trust_region)


@dataclass(frozen=True)
class BGD(Method):
    """Bayesian gradient descent: drawn weights, whose posterior is the prior of the next batch.

    Args:
        lr: scale of the step of the mean.
        prior_variance: the first variance, in units of the initialisation variance.
        trust_region: bound on the steps of mean and width, in posterior standard deviations; as published: none.
    """

    source = "Zeno et al. (2018)"
    samples_weights = True
    lr: float = 10.0
    prior_variance: float = 0.1
    trust_region: float = 0.3

    def prepare(self, network: nn.Module, seeds: int | Sequence[int]) -> None:
        """Make the network Gaussian."""
        _draw_weights(network, self.prior_variance, seeds)

    def optimizer(self, network: nn.Module) -> Optimizer:
        """The BGD optimizer."""
        return optim.BGD(network, lr=self.lr, trust_region=self.trust_region)


@dataclass(frozen=True)
class EulerLagrange(Method):
    """Gaussian weights along the Euler-Lagrange flow, not told of switches.

    Args:
        lr: fraction of the way to equilibrium covered in one step.
        temperature: T = τ/k.
        prior_variance: of the weights, in units of the initialisation variance.
        variance_rate: fraction by which precisions relax in one step; null ties it to lr.
        curvature_decay: of the curvature belief.
        trust_region: bound on a mean's step, in posterior standard deviations.
        discount: γ per step.
    """

    source = "Vastola, Gershman, Rajan (2025), section 6"
    lr: float = 6e-4
    temperature: float = 6e-6
    prior_variance: float = 0.2
    variance_rate: float | None = 5e-3
    curvature_decay: float = 0.99
    trust_region: float = 0.3
    discount: float = math.inf

    def prepare(self, network: nn.Module, seeds: int | Sequence[int]) -> None:
        """Make the network Gaussian."""
        gaussianize(network, prior_variance=self.prior_variance)

    def optimizer(self, network: nn.Module) -> Optimizer:
        """The Euler-Lagrange optimizer."""
        return EulerLagrangeOptimizer(
            network,
            lr=self.lr,
            temperature=self.temperature,
            discount=self.discount,
            variance_rate=self.variance_rate,
            curvature_decay=self.curvature_decay,
            trust_region=self.trust_region,
        )


@dataclass(frozen=True)
class EulerLagrangeInjection(EulerLagrange):
    """Gaussian weights along the Euler-Lagrange flow, with variance injected at every switch.

    Args:
        strength: of the sampled injection, in [0, 1].
        widen: fraction by which precisions move to the prior's at a switch.
        multiply: factor of the variance at a switch.
        draw: "prior" or "posterior", what the mean is drawn from.
        where: "everywhere", "low_curvature" or "low_utility".
        share: of the weights or units, with ``where``.
        over: steps over which the injection is spread.
        equilibrium: steps after which precisions go to the equilibrium of the new curvature; 0: they do not.
        detector: of switches that are not announced: "cusum", "page_hinkley", "predictive_surprise" or
            "energy_jump"; null goes by the announcement.
        threshold: of the detector; null for its default.
    """

    strength: float = 1.0
    widen: float = 0.0
    multiply: float = 1.0
    draw: str = "prior"
    where: str = "everywhere"
    share: float = 0.5
    over: int = 1
    equilibrium: int = 0
    detector: str | None = None
    threshold: float | None = None

    def interventions(self, seeds: int | Sequence[int]) -> list[Intervention]:
        """Variance injection."""
        return [_injection(self, seeds)]


def _injection(
    method: "EulerLagrangeInjection | EulerLagrangeKroneckerInjection", seeds: int | Sequence[int]
) -> Intervention:
    return interventions.VarianceInjection(
        method.strength,
        method.widen,
        seed=seeds,
        multiply=method.multiply,
        draw=method.draw,
        where=method.where,
        share=method.share,
        over=method.over,
        equilibrium=method.equilibrium,
        detector=_detector(method.detector, method.threshold, seeds),
    )


def _detector(name: str | None, threshold: float | None, seeds: int | Sequence[int]) -> Detector | None:
    if name is None:
        return None
    check_choice("detector", name, _DETECTORS)
    settings: dict[str, Any] = {} if threshold is None else {"threshold": threshold}
    if name == "predictive_surprise":
        settings["seed"] = seeds
    detector: Detector = _DETECTORS[name](**settings)
    return detector


@dataclass(frozen=True)
class EulerLagrangeKronecker(Method):
    """Matrix-Gaussian weights along the Euler-Lagrange flow, not told of switches.

    Args:
        lr: fraction of the way to equilibrium covered in one step.
        temperature: T = τ/k; a quarter to all of one over the examples of a task.
        prior_variance: of the weights, in units of the initialisation variance.
        variance_rate: fraction by which the factors relax in one step; null ties it to lr.
        trust_region: bound on a step of a layer, in posterior standard deviations (root mean square).
        prior_pull: share of the prior's force that acts on the mean.
        discount: γ per step.
        damping: "factored" or "exact".
        observe_every: steps between observations of the factors; null for the layers' default.
        refresh_every: steps between inversions of the factors; null for the layers' default.
    """

    source = "Vastola, Gershman, Rajan (2025), section 6, with the factors of Martens and Grosse (2015)"
    lr: float = 6e-3
    temperature: float = 1e-4
    prior_variance: float = 1.0
    variance_rate: float | None = 1e-2
    trust_region: float = 0.1
    prior_pull: float = 0.1
    discount: float = math.inf
    damping: str = "factored"
    observe_every: int | None = None
    refresh_every: int | None = None

    def prepare(self, network: nn.Module, seeds: int | Sequence[int]) -> None:
        """Make the network Gaussian."""
        structure = Kronecker(
            damping=self.damping, observe_every=self.observe_every, refresh_every=self.refresh_every
        )
        gaussianize(network, precision=structure, prior_variance=self.prior_variance)

    def optimizer(self, network: nn.Module) -> Optimizer:
        """The Euler-Lagrange optimizer."""
        return EulerLagrangeOptimizer(
            network,
            lr=self.lr,
            temperature=self.temperature,
            discount=self.discount,
            variance_rate=self.variance_rate,
            trust_region=self.trust_region,
            prior_pull=self.prior_pull,
        )


@dataclass(frozen=True)
class EulerLagrangeKroneckerInjection(EulerLagrangeKronecker):
    """Matrix-Gaussian weights along the Euler-Lagrange flow, with variance injected at every switch.

    Args:
        strength: of the sampled injection, in [0, 1].
        widen: fraction by which precisions move to the prior's at a switch.
        multiply: factor of the variance at a switch.
        draw: "prior" or "posterior", what the mean is drawn from.
        where: "everywhere", "low_curvature" or "low_utility".
        share: of the weights or units, with ``where``.
        over: steps over which the injection is spread.
        equilibrium: steps after which precisions go to the equilibrium of the new curvature; 0: they do not.
        detector: of switches that are not announced: "cusum", "page_hinkley", "predictive_surprise" or
            "energy_jump"; null goes by the announcement.
        threshold: of the detector; null for its default.
    """

    prior_pull: float = 0.0
    strength: float = 0.3
    widen: float = 0.0
    multiply: float = 1.0
    draw: str = "prior"
    where: str = "everywhere"
    share: float = 0.5
    over: int = 1
    equilibrium: int = 0
    detector: str | None = None
    threshold: float | None = None

    def interventions(self, seeds: int | Sequence[int]) -> list[Intervention]:
        """Variance injection."""
        return [_injection(self, seeds)]


def snake_case(name: str) -> str:
    """The name of a class as study files write it.

    Example:
        >>> snake_case("PermutedMNIST"), snake_case("AdamL2"), snake_case("L2Init")
        ('permuted_mnist', 'adam_l2', 'l2_init')
    """
    return re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=\d)(?=[A-Z])", "_", name).lower()


METHODS: dict[str, type[Method]] = {
    snake_case(method.__name__): method
    for method in (
        SGD,
        Adam,
        AdamL2,
        Muon,
        AdamInputNormalization,
        ShrinkAndPerturb,
        L2Init,
        RegenerativeL1,
        HareAndTortoise,
        SpectralRegularization,
        NormalizeAndProject,
        SoftReset,
        LayerNorm,
        Crelu,
        ContinualBackprop,
        GradedContinualBackprop,
        Redo,
        SelfNormalizedResets,
        HeadReset,
        LastLayerReset,
        UPGD,
        FreshNetwork,
        IVON,
        MESU,
        BGD,
        EulerLagrange,
        EulerLagrangeInjection,
        EulerLagrangeKronecker,
        EulerLagrangeKroneckerInjection,
    )
}
"""The methods that a study file can name."""
