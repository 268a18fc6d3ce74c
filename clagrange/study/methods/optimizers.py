"""Methods that are an optimizer of their own."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from clagrange import optim
from clagrange._checks import Number
from clagrange.gaussian import Diagonal, gaussianize, set_sampling
from clagrange.interventions import Intervention
from clagrange.optim import StackedMuon
from clagrange.replicas import generators_from_seeds, replicas_of
from clagrange.study import ivon
from clagrange.study.extras import extra_module
from clagrange.study.methods.base import Method
from clagrange.study.one_by_one import OneByOne


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
class SOAP(Method):
    """SOAP: Adam along the eigenvectors of Shampoo's matrices, for the weights of a layer; Adam on biases.

    Each replica is an optimizer of its own, of the package pytorch-optimizer. The first step only serves the
    averages. Of the directions in which the first gradient is 0, rounding chooses the axes: runs repeat on one
    machine, but not number by number between a stacked and a single network.

    Args:
        lr: learning rate.
        beta1: decay of the average of the gradients.
        beta2: decay of the averages of squared gradients and of Shampoo's matrices.
        weight_decay: decoupled, in units of the learning rate.
        every: steps from one update of the eigenvectors to the next.
        largest: width up to which a side of a weight is turned.
    """

    source = "Vyas et al. (2024)"
    extra = "second-order"
    lr: float = 3e-3
    beta1: float = 0.95
    beta2: float = 0.95
    weight_decay: float = 0.0
    every: int = 10
    largest: int = 10_000

    def optimizer(self, network: nn.Module) -> Optimizer:
        """The package's optimizer."""
        kind = functools.partial(
            extra_module("second-order").SOAP,
            precondition_frequency=self.every,
            max_precondition_dim=self.largest,
        )
        numbers: dict[str, Any] = {
            "lr": self.lr,
            "betas": (self.beta1, self.beta2),
            "weight_decay": self.weight_decay,
        }
        replicas = replicas_of(network)
        if replicas is not None:
            return OneByOne(network.parameters(), kind, replicas=replicas, **numbers)
        alone: Optimizer = kind(network.parameters(), **numbers)
        return alone


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
class IVON(Method):
    """Improved variational online Newton: a variance for every weight, learnt with drawn weights.

    Each replica is an optimizer of its own.

    Args:
        lr: learning rate.
        ess: effective sample size, the examples that the posterior is of.
        hess_init: the diagonal Hessian to start with.
        beta1: decay of the average of the gradients.
        beta2: decay of the average of the Hessian.
        weight_decay: precision of the prior, divided by ess.
    """

    source = "Shen et al. (2024)"
    extra = "ivon"
    samples_weights = True
    lr: float = 0.1
    ess: float = 1e4
    hess_init: float = 0.5
    beta1: float = 0.9
    beta2: float = 0.9999
    weight_decay: float = 1e-3

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
    set_sampling(network, "batch", generators_from_seeds(seeds, purpose="weights drawn"))


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
