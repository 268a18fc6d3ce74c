"""Ranges of settings, and the samplers that choose which of them are tried."""

import importlib.util
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
from scipy.stats import qmc

from clagrange._checks import check_choice, check_count
from clagrange.study.extras import extra_module

Settings = dict[str, Any]
"""Settings of a method by name."""

Plan = Generator[list[Settings], list[float], None]
"""Rounds of settings; it is sent how good each of a round was (more is better, −∞ for a trial that failed)."""


@dataclass(frozen=True)
class Dimension:
    """A setting's range: "log" and "uniform" intervals, or a "choice" of values.

    ``points`` says how many values of an interval a grid has; None leaves it to the grid.
    """

    scale: str
    values: tuple[Any, ...]
    points: int | None = None

    def at(self, share: float) -> Any:
        """The value at a share in [0, 1] of the range, in [0, 1) of a choice.

        Numbers have three digits, but for those within the range that three digits would put at its end or
        beyond: the ends may be no possible values.
        """
        if self.scale == "choice":
            return self.values[int(share * len(self.values))]
        low, high = self.values
        value = low * (high / low) ** share if self.scale == "log" else low + share * (high - low)
        rounded = float(f"{value:.3g}")
        return value if low < value < high and not low < rounded < high else rounded

    def grid(self, points: int) -> list[Any]:
        """So many values at equal distances, both ends included; of a choice all."""
        if self.scale == "choice":
            return list(self.values)
        return [self.at(number / (points - 1)) for number in range(points)]

    def around(self, value: Any) -> "Dimension":
        """The part of the range, a quarter as wide, around a value; a choice keeps the value alone."""
        if self.scale == "choice":
            return Dimension("choice", (value,))
        low, high = self.values
        if self.scale == "log":
            width = (high / low) ** 0.125
            return Dimension("log", (max(low, value / width), min(high, value * width)))
        width = (high - low) / 8.0
        return Dimension("uniform", (max(low, value - width), min(high, value + width)))

    @property
    def written(self) -> dict[str, Any]:
        """As a search file has it."""
        return {self.scale: list(self.values), **({} if self.points is None else {"points": self.points})}


@dataclass(frozen=True)
class Space:
    """Settings to try: some fixed, some with a range."""

    fixed: Settings
    ranges: dict[str, Dimension]

    def at(self, shares: Sequence[float]) -> Settings:
        """The settings at a share of each range."""
        chosen = zip(self.ranges.items(), shares, strict=True)
        return {**self.fixed, **{name: dimension.at(share) for (name, dimension), share in chosen}}

    def around(self, settings: Mapping[str, Any]) -> "Space":
        """A smaller space around settings of this one."""
        return Space(self.fixed, {name: ranges.around(settings[name]) for name, ranges in self.ranges.items()})

    def examples(self, *, ends: bool) -> list[Settings]:
        """The middle of all ranges, and the same with one setting at its extremes, or at another choice.

        Args:
            ends: whether the extremes are the ends themselves, or almost.
        """
        middle = self.at([0.5] * len(self.ranges))
        shares = (0.0, 1.0) if ends else (0.001, 0.999)
        extremes = {
            name: dimension.values if dimension.scale == "choice" else [dimension.at(share) for share in shares]
            for name, dimension in self.ranges.items()
        }
        return [middle, *({**middle, name: value} for name, several in extremes.items() for value in several)]

    @property
    def written(self) -> Settings:
        """As a search file has it."""
        return {**self.fixed, **{name: dimension.written for name, dimension in self.ranges.items()}}


def shares(trials: int, count: int) -> list[int]:
    """Trials shared out evenly between so many spaces.

    Example:
        >>> shares(5, 2)
        [3, 2]
    """
    return [len(range(place, trials, count)) for place in range(count)]


class Sampler(ABC):
    """Chooses the settings that are tried of a method.

    The settings of the first round are spread over the ranges, whatever the sampler.

    Attributes:
        reaches_ends: whether it tries the very ends of a range, which then must be possible values.
    """

    reaches_ends: ClassVar[bool] = True

    @abstractmethod
    def plan(self, spaces: Sequence[Space], trials: int, refinements: int) -> Plan:
        """Rounds of settings, ``trials + refinements`` in all.

        Args:
            spaces: alternatives, between which the trials are shared out evenly.
            trials: how many are spread over the ranges, or chosen from what the trials before them came to.
            refinements: how many lie around the best of these.
        """

    def check(self, space: Space, count: int) -> None:  # noqa: B027 - most search any space
        """Raise unless a space can be searched with so many trials.

        Raises:
            ValueError: if it cannot.
        """

    @property
    def version(self) -> str:
        """Of the package that chooses, where that is part of what the numbers follow from; else empty."""
        return ""

    @property
    def written(self) -> dict[str, Any]:
        """As a search file has it, in full."""
        names = {kind: name for name, kind in SAMPLERS.items()}
        return {"kind": names[type(self)], **asdict(self)}  # type: ignore[call-overload]


class _Even(Sampler):
    """First settings all over the ranges, then others around the best of them."""

    @abstractmethod
    def points(self, space: Space, count: int, place: int) -> list[Settings]:
        """Settings spread over a space; ``place`` tells spaces of one method apart."""

    def closer(self, space: Space, count: int, place: int) -> list[Settings]:
        """Settings spread over the part of a space that is around the best."""
        return self.points(space, count, place)

    def plan(self, spaces: Sequence[Space], trials: int, refinements: int) -> Plan:
        """Two rounds: all over the ranges, then around the best."""
        counts = shares(trials, len(spaces))
        first = [
            (space, settings)
            for place, (space, count) in enumerate(zip(spaces, counts, strict=True))
            for settings in self.points(space, count, place)
        ]
        goodness = yield [settings for _, settings in first]
        rest = trials + refinements - len(first)
        if rest:
            space, settings = first[goodness.index(max(goodness))]
            more = self.closer(space.around(settings), rest, len(spaces))
            if more:
                yield more


@dataclass(frozen=True)
class Halton(_Even):
    """A scrambled Halton sequence: spread more evenly than independent draws, so that few trials leave no gaps.

    Args:
        seed: another one gives other settings.

    Source: J. H. Halton (1960), Numer. Math. 2, 84; scrambled as by A. B. Owen (2017), arXiv:1706.02808; both in
    `scipy.stats.qmc.Halton`.

    Example:
        >>> space = Space({"base": "sgd"}, {"lr": Dimension("log", (0.01, 1.0))})
        >>> [settings["lr"] for settings in Halton().points(space, 3, place=0)]
        [0.26, 0.026, 0.821]
    """

    reaches_ends = False
    seed: int = 0

    def __post_init__(self) -> None:
        _check_seed(self.seed)

    def points(self, space: Space, count: int, place: int) -> list[Settings]:
        """The first so many of the sequence."""
        sequence = qmc.Halton(max(len(space.ranges), 1), rng=_generator(place, self.seed))
        return [space.at(row[: len(space.ranges)]) for row in sequence.random(count)]


@dataclass(frozen=True)
class Random(_Even):
    """Independent settings, each uniform over its range, or over the logarithm of it: the plain random search.

    Args:
        seed: another one gives other settings.

    Source: J. Bergstra and Y. Bengio (2012), JMLR 13, 281.
    """

    reaches_ends = False
    seed: int = 0

    def __post_init__(self) -> None:
        _check_seed(self.seed)

    def points(self, space: Space, count: int, place: int) -> list[Settings]:
        """So many draws."""
        return [space.at(row) for row in _generator(place, self.seed).random((count, len(space.ranges)))]


@dataclass(frozen=True)
class Grid(_Even):
    """Every combination of some values of each range: for one or two settings, and for tables by setting.

    An interval has the ``points`` that its range asks for, both ends included, a choice all its values. The other
    intervals have as many as the trials allow, as equal as possible. What a grid leaves of the trials is tried,
    with the refinements, around the best (by `Halton`), so that methods with different grids have the same number
    of trials; where all is choice, there is nothing around the best and it is not used.

    Example:
        >>> intervals = {"lr": Dimension("log", (0.01, 1.0)), "l2": Dimension("uniform", (0.0, 0.1))}
        >>> space = Space({}, {**intervals, "decay": Dimension("choice", (0.9, 0.99))})
        >>> Grid().sizes(space, 12)
        {'lr': 3, 'l2': 2, 'decay': 2}
    """

    def sizes(self, space: Space, most: int) -> dict[str, int]:
        """Number of values of each range, whose product is at most ``most``.

        Raises:
            ValueError: if the smallest grid is larger than that.
        """
        asked = {
            name: len(dimension.values) if dimension.scale == "choice" else dimension.points
            for name, dimension in space.ranges.items()
        }
        sizes = {name: 2 if size is None else size for name, size in asked.items()}
        least = math.prod(sizes.values())
        if least > most:
            shape = " × ".join(f"{name} {size}" for name, size in sizes.items())
            raise ValueError(
                f"expected a grid of at most {most} points, its share of the trials, got {least} ({shape}); "
                f"give it fewer points or ranges, or more trials"
            )
        free = [name for name, size in asked.items() if size is None]
        while True:
            product = math.prod(sizes.values())
            growing = [name for name in free if product // sizes[name] * (sizes[name] + 1) <= most]
            if not growing:
                return sizes
            sizes[min(growing, key=sizes.__getitem__)] += 1

    def check(self, space: Space, count: int) -> None:
        """Raise unless the grid has at most so many points, and these are different.

        Raises:
            ValueError: if not.
        """
        self.points(space, count, 0)

    def points(self, space: Space, count: int, place: int) -> list[Settings]:
        """All combinations, the last range running fastest."""
        values = {name: space.ranges[name].grid(size) for name, size in self.sizes(space, count).items()}
        for name, several in values.items():
            if len(set(map(str, several))) < len(several):
                raise ValueError(f"expected points of {name} that differ in three digits, got {several}")
        return [
            {**space.fixed, **dict(zip(values, chosen, strict=True))}
            for chosen in itertools.product(*values.values())
        ]

    def closer(self, space: Space, count: int, place: int) -> list[Settings]:
        """The first so many of a Halton sequence; none where all is choice."""
        varied = any(dimension.scale != "choice" for dimension in space.ranges.values())
        return Halton().points(space, count, place) if varied else []


OPTUNA: dict[str, Callable[[Any, int, int], Any]] = {
    "tpe": lambda package, seed, first: package.TPESampler(seed=seed, n_startup_trials=first, constant_liar=True),
    "gp": lambda package, seed, first: package.GPSampler(
        seed=seed, n_startup_trials=first, warn_independent_sampling=False
    ),
    "cmaes": lambda package, seed, first: package.CmaEsSampler(
        seed=seed, n_startup_trials=first, warn_independent_sampling=False
    ),
}
"""Optuna's samplers by the names that a search file has for them, from a seed and a number of random trials."""


@dataclass(frozen=True)
class Optuna(Sampler):
    """Optuna's samplers, which choose settings from what the trials before them came to.

    They need the extra ``clagrange[optuna]``. A third of the trials is random, the others come in rounds: the
    settings of a round are asked for, tried side by side as the replicas of a run, and told. Each alternative of
    a method is a study of its own.

    Args:
        algorithm: "tpe" (tree-structured Parzen estimator; any ranges), "gp" (Gaussian process; few trials of few
            numbers) or "cmaes" (evolution strategy; many trials of numbers, choices being random).
        rounds: after the random ones. More rounds learn more from the same trials, and take longer.
        seed: another one gives other settings.

    Source: T. Akiba et al. (2019), KDD, arXiv:1907.10902; TPE: J. Bergstra et al. (2011), NeurIPS; CMA-ES:
    N. Hansen (2016), arXiv:1604.00772.
    """

    algorithm: str = "tpe"
    rounds: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("algorithm", self.algorithm, OPTUNA)
        check_count("rounds", self.rounds)
        _check_seed(self.seed)
        extra_module("optuna")
        if self.algorithm == "cmaes" and importlib.util.find_spec("cmaes") is None:
            raise ModuleNotFoundError(
                "algorithm: expected the package cmaes, which is not installed; pip install 'clagrange[optuna]'"
            )

    @property
    def version(self) -> str:
        """Of Optuna."""
        return f"optuna {extra_module('optuna').__version__}"

    def plan(self, spaces: Sequence[Space], trials: int, refinements: int) -> Plan:
        """A random round, then those that Optuna asks for.

        Raises:
            ValueError: if there are refinements.
        """
        if refinements:
            raise ValueError(
                f"refinements: expected 0, got {refinements}; Optuna looks around what was good by itself"
            )
        optuna = extra_module("optuna")
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        first = math.ceil(trials / 3)
        studies = [
            _Study(
                optuna, space, OPTUNA[self.algorithm](optuna.samplers, _whole(place, self.seed), max(1, count))
            )
            for place, (space, count) in enumerate(zip(spaces, shares(first, len(spaces)), strict=True))
        ]
        done = 0
        for size in [first, *filter(None, shares(trials - first, self.rounds))]:
            turns = [studies[number % len(studies)] for number in range(done, done + size)]
            goodness = yield [study.ask() for study in turns]
            for study, good in zip(turns, goodness, strict=True):
                study.tell(good)
            done += size


class _Study:
    """A study of Optuna over a space, in which every interval is [0, 1] and every choice that of a place."""

    def __init__(self, optuna: Any, space: Space, sampler: Any) -> None:
        self.space = space
        self._study = optuna.create_study(sampler=sampler, direction="maximize")
        self._failed = optuna.trial.TrialState.FAIL
        self._ranges = {
            name: optuna.distributions.CategoricalDistribution(range(len(dimension.values)))
            if dimension.scale == "choice"
            else optuna.distributions.FloatDistribution(0.0, 1.0)
            for name, dimension in space.ranges.items()
        }
        self._asked: list[Any] = []
        self._worst = math.inf

    def ask(self) -> Settings:
        """The next settings."""
        self._asked.append(self._study.ask(self._ranges))
        chosen = self._asked[-1].params
        values = {
            name: dimension.values[chosen[name]] if dimension.scale == "choice" else dimension.at(chosen[name])
            for name, dimension in self.space.ranges.items()
        }
        return {**self.space.fixed, **values}

    def tell(self, good: float) -> None:
        """How good the first were that were asked for and not told; what failed counts as the worst so far."""
        if math.isfinite(good):
            self._worst = min(self._worst, good)
        if math.isfinite(self._worst):
            self._study.tell(self._asked.pop(0), good if math.isfinite(good) else self._worst)
        else:
            self._study.tell(self._asked.pop(0), state=self._failed)


def _check_seed(seed: int) -> None:
    if seed < 0:
        raise ValueError(f"seed: expected a whole number of at least 0, got {seed}")


def _whole(place: int, seed: int) -> int:
    return int(_generator(place, seed).integers(2**31))


def _generator(place: int, seed: int) -> np.random.Generator:
    return np.random.default_rng([place, seed])


SAMPLERS: dict[str, type[Sampler]] = {"halton": Halton, "random": Random, "grid": Grid, "optuna": Optuna}
"""The samplers that a search file can name."""
