"""SGD and Adam, and the controls: normalisation, activations that cannot die, a network without a past."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from torch.optim import Optimizer

from clagrange import interventions
from clagrange.interventions import Intervention
from clagrange.networks import add_layer_norm, use_crelu
from clagrange.replicas import generators_from_seeds
from clagrange.study.methods.base import BasedMethod, Method, adam, sgd


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
        return sgd(network, self.lr)


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
        return adam(network, self.lr)


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
        return adam(network, self.lr, self.l2)


@dataclass(frozen=True)
class AdamInputNormalization(Adam):
    """Adam on inputs normalised by their running mean and variance: the control for input conditioning.

    Args:
        lr: learning rate.
    """

    source = "control"

    def interventions(self, seeds: int | Sequence[int]) -> list[Intervention]:
        """Running normalisation of the inputs."""
        return [interventions.InputNormalization()]


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
class FreshNetwork(Adam):
    """A fresh network for every task, trained by Adam: what a network without a past reaches.

    Args:
        lr: learning rate.
    """

    source = "control"

    def interventions(self, seeds: int | Sequence[int]) -> list[Intervention]:
        """Reset of weights and optimizer at every switch."""
        return [interventions.FullReset(seed=seeds)]
