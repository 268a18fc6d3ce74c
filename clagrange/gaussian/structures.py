"""The structures of a precision that `gaussianize` knows, each with its settings."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from clagrange._checks import Number, check_choice, check_count
from clagrange.gaussian.curvature import FactorObserver, Observer
from clagrange.gaussian.kronecker import KroneckerPrecision
from clagrange.gaussian.precision import DiagonalPrecision, Precision


class Structure(ABC):
    """How the precision of a layer is built and what its curvature is read from."""

    joint: bool
    """Whether weight and bias share one precision."""

    @abstractmethod
    def precision(
        self, mean: Tensor, *, prior_mean: str, prior_variance: Number, stacked: bool, one_hot: bool
    ) -> Precision:
        """The precision of a mean at its prior; ``one_hot`` where the inputs of a weight are one-hot."""

    def observer(self, precision: Precision, bias: bool) -> Observer | None:
        """What looks at the backward passes of a pair of weight and bias; None where gradients are enough."""
        return None


@dataclass(frozen=True)
class Diagonal(Structure):
    """A `DiagonalPrecision` for every parameter."""

    joint = False

    def precision(
        self, mean: Tensor, *, prior_mean: str, prior_variance: Number, stacked: bool, one_hot: bool
    ) -> Precision:
        """A diagonal precision."""
        return DiagonalPrecision(mean, prior_mean=prior_mean, prior_variance=prior_variance, stacked=stacked)


@dataclass(frozen=True)
class Kronecker(Structure):
    """A `KroneckerPrecision` for every pair of weight and bias; see there for what the settings mean.

    Args:
        damping: "factored" or "exact".
        observe_every: steps between observations of the factors.
        refresh_every: steps between inversions of the factors.
        widest: of a side wider than this only the diagonal of its factor is kept; a full factor of n inputs takes
            2·n² numbers and n³ operations to invert.

    Example:
        >>> net = clagrange.gaussianize(nn.Linear(8, 4), precision=Kronecker(refresh_every=20))
        >>> type(net.weight_precision).__name__
        'KroneckerPrecision'
    """

    damping: str = "factored"
    observe_every: int = 1
    refresh_every: int = 10
    widest: int = 4096
    joint = True

    def __post_init__(self) -> None:
        """Check the settings."""
        check_choice("damping", self.damping, ("factored", "exact"))
        for name in ("observe_every", "refresh_every", "widest"):
            check_count(name, getattr(self, name))

    def precision(
        self, mean: Tensor, *, prior_mean: str, prior_variance: Number, stacked: bool, one_hot: bool
    ) -> Precision:
        """A matrix-Gaussian precision."""
        rows, columns = mean.shape[-2:]
        return KroneckerPrecision(
            mean,
            prior_mean=prior_mean,
            prior_variance=prior_variance,
            stacked=stacked,
            damping=self.damping,
            observe_every=self.observe_every,
            refresh_every=self.refresh_every,
            diagonal_inputs=one_hot or columns > self.widest,
            diagonal_outputs=rows > self.widest,
        )

    def observer(self, precision: Precision, bias: bool) -> Observer | None:
        """An observer of both factors."""
        assert isinstance(precision, KroneckerPrecision)
        return FactorObserver(precision, bias)


STRUCTURES: dict[str, Structure] = {"diagonal": Diagonal(), "kronecker": Kronecker()}
"""The structures that have a name."""


def as_structure(precision: object) -> Structure:
    """A structure itself, or the one of that name.

    Raises:
        ValueError: for an unknown name.
    """
    if isinstance(precision, Structure):
        return precision
    check_choice("precision", precision, STRUCTURES)
    return STRUCTURES[str(precision)]
