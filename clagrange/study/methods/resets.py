"""Methods that let hidden units or the last layer start over."""

from collections.abc import Sequence
from dataclasses import dataclass

from clagrange import interventions
from clagrange.interventions import Intervention
from clagrange.study.methods.base import BasedMethod


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
    """Move the weights of every hidden unit a little toward fresh ones, the more the less it learns.

    Args:
        lr: learning rate.
        rate: largest part of the way at each move.
        every: steps from one move to the next.
        base: "sgd" or "adam".
    """

    source = "McCutcheon, Chatzaroulas, Fallah (2025), continuous continual backpropagation"
    lr: float = 0.03
    rate: float = 0.012
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
