"""What many tests share: networks, regression data, and the table of optimizers with their bad inputs."""

import importlib.util
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import clagrange
from clagrange.dynamics import Belief
from clagrange.gaussian import Diagonal, Kronecker, Precision, Structure, gaussian_blocks, set_sampling
from clagrange.networks import initialize
from clagrange.optim import (
    BGD,
    MESU,
    UPGD,
    Ballistic,
    BeliefAdam,
    Drift,
    EulerLagrange,
    GeometricMean,
    NaturalGradient,
    OptimalMomentum,
    StackedAdam,
    StackedMuon,
    StackedSGD,
)
from clagrange.replicas import generators_from_seeds

R = 3
"""Replicas of the stacked tests."""


# ------------------------------------------------------------------------------------------------ networks
def mlp(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """5-6-4-3 with ReLU."""
    net = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)).to(dtype)
    initialize(net, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        net[0].bias.fill_(0.1)  # alive at the start
    return net


def convnet(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Two convolutions, flatten, two linear layers, for inputs (B, 2, 6, 6)."""
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 3, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(12, 5),
        nn.ReLU(),
        nn.Linear(5, 3),
    ).to(dtype)
    initialize(net, torch.Generator().manual_seed(seed))
    return net


def normed(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """A network with a normalisation layer, whose parameters never become Gaussian."""
    net = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 3)).to(dtype)
    initialize(net, torch.Generator().manual_seed(seed))
    return net


def batch(step: int = 0, size: int = 8, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Inputs (size, 5) and classes of a batch."""
    generator = torch.Generator().manual_seed(1000 + step)
    inputs = torch.randn(size, 5, generator=generator, dtype=torch.float64).to(dtype)
    return inputs, torch.randint(3, (size,), generator=generator)


def images(step: int = 0, size: int = 8, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Inputs (size, 2, 6, 6) and classes of a batch."""
    generator = torch.Generator().manual_seed(2000 + step)
    inputs = torch.randn(size, 2, 6, 6, generator=generator, dtype=torch.float64).to(dtype)
    return inputs, torch.randint(3, (size,), generator=generator)


def backward(net: nn.Module, optimizer: Optimizer, inputs: Tensor, targets: Tensor) -> Tensor:
    """Zero the gradients, then gradients of the mean cross-entropy (summed over replicas)."""
    optimizer.zero_grad()
    loss = clagrange.networks.cross_entropy(net(inputs), targets)
    loss.backward()
    return loss.detach()


def train(net: nn.Module, optimizer: Optimizer, steps: range, size: int = 8) -> None:
    """Ordinary training steps on the batches of these numbers."""
    for step in steps:
        backward(net, optimizer, *batch(step, size, next(net.parameters()).dtype))
        optimizer.step()


def gaussian_parameters(net: nn.Module) -> Iterator[tuple[str, nn.Parameter, Precision]]:
    """Name, mean and precision of the Gaussian parameters of a network with a precision for each."""
    for layer_name, block in gaussian_blocks(net):
        (name,), (mean,) = block.names, block.means
        yield f"{layer_name}.{name}" if layer_name else name, mean, block.precision


def still(net: nn.Module) -> Optimizer:
    """An optimizer that changes nothing."""
    return torch.optim.SGD(net.parameters(), lr=0.0)


def step_with(
    net: nn.Module,
    optimizer: Optimizer,
    method: clagrange.interventions.Intervention,
    inputs: Tensor,
    targets: Tensor,
) -> None:
    """One training step and what an intervention does after it."""
    backward(net, optimizer, inputs, targets)
    optimizer.step()
    method.on_step(net, optimizer)


def assert_same_tensors(actual: Any, expected: Any, **tolerance: float) -> None:
    """Two state dicts (nested, or of tensors) agree."""
    if isinstance(expected, Mapping):
        assert set(actual) == set(expected)
        for name, value in expected.items():
            assert_same_tensors(actual[name], value, **tolerance)
    elif expected is None or isinstance(expected, str):
        assert actual == expected
    else:
        torch.testing.assert_close(actual, expected, **(tolerance or {"rtol": 0, "atol": 0}))


def tensors_of(net: nn.Module) -> dict[str, Tensor]:
    """Copies of the tensors in a network's state."""
    return {name: value.clone() for name, value in net.state_dict().items() if isinstance(value, Tensor)}


def study_methods() -> list[Any]:
    """The name of every method of a study; skipped where it needs a package that is not installed."""
    from clagrange.study.methods import METHODS

    return [pytest.param(name, marks=skip_without(kind.extra)) for name, kind in METHODS.items()]


def skip_without(extra: str | None) -> Any:
    """The marks of a test that needs an optional extra of clagrange, if any."""
    from clagrange.study.extras import EXTRAS

    if extra is None:
        return ()
    needed = EXTRAS[extra]
    absent = importlib.util.find_spec(needed.module) is None
    return pytest.mark.skipif(absent, reason=f"{needed.package} is not installed")


# ---------------------------------------------------------------------------------------------- optimizers
@dataclass(frozen=True)
class OptimizerCase:
    """An optimizer with settings under which a small problem converges, and what it must refuse."""

    name: str
    form: type[Optimizer]
    settings: dict[str, Any]
    stacked_settings: dict[str, Any]
    """The same settings as tensors of shape (R,)."""
    bad: list[tuple[dict[str, Any], type[Exception], str]]
    """Arguments, exception and what its message says."""
    gaussian: bool = False
    precision: Structure = Diagonal()  # noqa: RUF009 - it cannot change
    torch_form: Callable[..., Optimizer] | None = None
    options: list[dict[str, Any]] = field(default_factory=list)
    """Further settings, each to be run through the whole battery."""
    whole: bool = False
    """Whether it takes the network itself, not its parameters."""
    coupled: bool = False
    """Whether the step of a parameter depends on the others that the optimizer has."""

    def network(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
        """A network of the kind that the optimizer wants."""
        net = mlp(seed, dtype)
        if self.gaussian:
            self.make_gaussian(net, seed)
        return net

    def make_gaussian(self, net: nn.Module, seeds: int | list[int] = 0, **settings: Any) -> None:
        """Gaussian layers of the kind that the optimizer wants, with random streams of their own."""
        clagrange.gaussianize(net, precision=self.precision, **settings)
        set_sampling(net, self.precision.sampling, generators_from_seeds(seeds))

    @property
    def draws(self) -> bool:
        """Whether it trains on drawn weights."""
        return self.precision.sampling != "mean"

    def make(self, net: nn.Module | Any, **settings: Any) -> Optimizer:
        """The optimizer, its settings replaced where given."""
        params = net.parameters() if isinstance(net, nn.Module) and not self.whole else net
        return self.form(params, **{**self.settings, **settings})


def tensor(*numbers: float) -> Tensor:
    """A hyper-parameter with one number for each replica."""
    return torch.tensor(numbers, dtype=torch.float64)


EULER_LAGRANGE = OptimizerCase(
    "EulerLagrange",
    EulerLagrange,
    settings={"lr": 0.02, "temperature": 1e-3},
    stacked_settings={
        "lr": tensor(0.02, 0.005, 0.01),
        "temperature": tensor(1e-3, 1e-2, 3e-3),
        "trust_region": tensor(1.0, 0.5, math.inf),
        "curvature_decay": tensor(0.9, 0.99, 0.0),
        "discount": tensor(0.3, math.inf, 20.0),
        "deterministic_lr": tensor(1e-3, 0.0, 1e-2),
    },
    bad=[
        ({"lr": -1.0}, ValueError, r"lr: expected a number in \(0, inf\), got -1"),
        ({"lr": "fast"}, TypeError, r"lr: expected a number .* got 'fast'"),
        ({"lr": True}, TypeError, r"lr: expected a number"),
        ({"lr": torch.ones(2, 2)}, ValueError, r"lr: .*shape \(2, 2\)"),
        ({"lr": torch.tensor([0.1, -0.1])}, ValueError, r"lr: .*got -0\.1"),
        ({"temperature": -1e-3}, ValueError, r"temperature: .*got -0\.001; .* usual"),
        ({"temperature": 0.0}, ValueError, r"temperature: "),
        ({"temperature": math.nan}, ValueError, r"temperature: .*got nan"),
        ({"temperature": math.inf}, ValueError, r"temperature: .*got inf"),
        ({"discount": 0.0}, ValueError, r"discount: "),
        ({"variance_rate": 0.0}, ValueError, r"variance_rate: expected a number in \(0, 1\], got 0"),
        ({"variance_rate": 1.5}, ValueError, r"variance_rate: "),
        ({"curvature_decay": 1.0}, ValueError, r"curvature_decay: expected a number in \[0, 1\), got 1"),
        ({"trust_region": 0.0}, ValueError, r"trust_region: "),
        ({"motion": True}, ValueError, r"motion: expected a finite discount .*got discount inf"),
        ({"motion": 1}, TypeError, r"motion: expected True or False, got 1"),
        ({"curvature_decay": Belief(0.0, 0.1, 1.0)}, ValueError, r"curvature_decay: .*finite discount"),
        (
            {"curvature_decay": {"decay": 1.0}},
            ValueError,
            r"curvature_decay: expected the numbers decay, process",
        ),
        ({"deterministic_lr": -0.1}, ValueError, r"deterministic_lr: "),
        ({"loss_reduction": "avg"}, ValueError, r"loss_reduction: expected one of mean, sum, position_mean"),
        ({"loss_reduction": "means"}, ValueError, r"did you mean 'mean'"),
    ],
    gaussian=True,
    options=[
        {"foreach": False},
        {"discount": 0.2, "variance_rate": 0.05, "trust_region": 0.5},
        {"trust_region": math.inf, "curvature_decay": 0.9},
        {"discount": 0.5, "motion": True, "curvature_decay": Belief(0.01, 0.1, 1.0)},
        {"discount": 2.0, "motion": True, "foreach": False},
    ],
)

EULER_LAGRANGE_KRONECKER = replace(
    EULER_LAGRANGE,
    name="EulerLagrange-kronecker",
    precision=Kronecker(refresh_every=3),
    stacked_settings={
        "lr": tensor(0.02, 0.005, 0.01),
        "temperature": tensor(1e-2, 1e-1, 3e-2),
        "trust_region": tensor(1.0, 0.5, math.inf),
        "prior_pull": tensor(1.0, 0.0, 0.3),
        "discount": tensor(0.3, math.inf, 20.0),
        "deterministic_lr": tensor(1e-3, 0.0, 1e-2),
    },
    bad=[
        ({"prior_pull": 1.5}, ValueError, r"prior_pull: expected a number in \[0, 1\], got 1\.5"),
        ({"trust_region": -1.0}, ValueError, r"trust_region: "),
    ],
    options=[
        {"discount": 0.2, "variance_rate": 0.05, "trust_region": 0.5},
        {"trust_region": math.inf, "prior_pull": 0.0},
    ],
)

EULER_LAGRANGE_EXACT = replace(
    EULER_LAGRANGE_KRONECKER,
    name="EulerLagrange-kronecker-exact",
    precision=Kronecker(damping="exact", observe_every=2, refresh_every=1),
    bad=[],
    options=[{"discount": 0.2, "variance_rate": 0.05, "trust_region": 0.5}, {"prior_pull": 0.0}],
)

STACKED_SGD = OptimizerCase(
    "StackedSGD",
    StackedSGD,
    settings={"lr": 0.1},
    stacked_settings={
        "lr": tensor(0.1, 0.03, 0.0),
        "momentum": tensor(0.9, 0.0, 0.5),
        "weight_decay": tensor(0.0, 1e-2, 1e-3),
    },
    bad=[
        ({"lr": -1.0}, ValueError, r"lr: expected a number in \[0, inf\), got -1"),
        ({"momentum": 1.1}, ValueError, r"momentum: "),
        ({"weight_decay": -1e-3}, ValueError, r"weight_decay: "),
        ({"lr": None}, TypeError, r"lr: expected a number .* got None"),
    ],
    torch_form=torch.optim.SGD,
    options=[{"momentum": 0.8, "weight_decay": 1e-4}],
)

STACKED_ADAM = OptimizerCase(
    "StackedAdam",
    StackedAdam,
    settings={"lr": 0.03},
    stacked_settings={
        "lr": tensor(1e-2, 1e-3, 3e-2),
        "betas": (tensor(0.9, 0.0, 0.5), tensor(0.999, 0.9, 0.99)),
        "eps": tensor(1e-8, 1e-4, 1e-2),
        "weight_decay": tensor(0.0, 1e-2, 1e-3),
    },
    bad=[
        ({"lr": -1.0}, ValueError, r"lr: expected a number in \[0, inf\), got -1"),
        ({"betas": (0.9, 1.0)}, ValueError, r"betas\[1\]: expected a number in \[0, 1\), got 1"),
        ({"eps": -1e-8}, ValueError, r"eps: "),
        ({"weight_decay": math.nan}, ValueError, r"weight_decay: .*got nan"),
    ],
    torch_form=torch.optim.Adam,
    options=[{"betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 1e-4}],
)


def muon_beside_adamw(params: Iterable[nn.Parameter], **settings: Any) -> Optimizer:
    """torch's Muon for matrices and its AdamW for the rest, as one optimizer."""
    found = list(params)
    decay = {"weight_decay": settings.get("weight_decay", 0.1)}
    muon = {name: settings[name] for name in ("lr", "momentum") if name in settings}
    return Both(
        torch.optim.Muon([p for p in found if p.dim() == 2], **decay, **muon),
        torch.optim.AdamW([p for p in found if p.dim() != 2], lr=settings.get("adamw_lr", 1e-3), **decay),
    )


class Both:
    """Two optimizers that step together."""

    def __init__(self, *optimizers: Optimizer) -> None:
        self.optimizers = optimizers

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()


STACKED_MUON = OptimizerCase(
    "StackedMuon",
    StackedMuon,
    settings={"lr": 0.02},
    stacked_settings={
        "lr": tensor(0.02, 0.05, 0.0),
        "momentum": tensor(0.95, 0.0, 0.5),
        "weight_decay": tensor(0.1, 0.0, 0.5),
        "adamw_lr": tensor(1e-3, 1e-2, 0.0),
    },
    bad=[
        ({"lr": -1.0}, ValueError, r"lr: expected a number in \[0, inf\), got -1"),
        ({"momentum": 1.1}, ValueError, r"momentum: "),
        ({"weight_decay": math.nan}, ValueError, r"weight_decay: .*got nan"),
        ({"adamw_lr": "fast"}, TypeError, r"adamw_lr: expected a number .* got 'fast'"),
        ({"stacked": "yes"}, ValueError, r"stacked: expected one of None, True, False"),
    ],
    torch_form=muon_beside_adamw,
    options=[{"momentum": 0.8, "weight_decay": 0.0, "adamw_lr": 1e-2}],
)

UPGD_CASE = OptimizerCase(
    "UPGD",
    UPGD,
    settings={"lr": 0.1, "noise": 0.01, "decay": 0.9},
    stacked_settings={
        "lr": tensor(0.1, 0.03, 0.0),
        "noise": tensor(0.0, 0.1, 0.01),
        "decay": tensor(0.9, 0.0, 0.999),
        "weight_decay": tensor(0.0, 1e-2, 1e-3),
        "seed": [4, 0, 9],
    },
    bad=[
        ({"lr": -1.0}, ValueError, r"lr: expected a number in \[0, inf\), got -1"),
        ({"noise": -1.0}, ValueError, r"noise: "),
        ({"decay": 1.0}, ValueError, r"decay: expected a number in \[0, 1\), got 1"),
        ({"weight_decay": "some"}, TypeError, r"weight_decay: expected a number"),
        ({"scope": "locale"}, ValueError, r"scope: .*did you mean 'local'"),
        ({"protecting": None}, ValueError, r"protecting: expected one of True, False"),
    ],
    options=[{"scope": "local", "weight_decay": 1e-3}, {"protecting": False}],
    coupled=True,
)

MOMENTS = {"gradient_belief": Belief(0.01, 0.4, 1.0), "square_belief": Belief.averaging(0.99, 1.0)}

BALLISTIC = OptimizerCase(
    "Ballistic",
    Ballistic,
    settings={"lr": 0.01},
    stacked_settings={
        "lr": tensor(0.01, 0.003, 0.0),
        "curvature_decay": tensor(0.9, 0.999, 0.0),
        "eps": tensor(1e-8, 1e-3, 1e-2),
        "examples": tensor(1.0, 8.0, 4.0),
    },
    bad=[
        ({"lr": -1.0}, ValueError, r"lr: expected a number in \[0, inf\), got -1"),
        ({"eps": -1e-8}, ValueError, r"eps: "),
        ({"curvature_decay": 1.5}, ValueError, r"curvature_decay: expected a number in \[0, 1\], got 1.5"),
        ({"curvature_decay": "long"}, TypeError, r"curvature_decay: expected a number"),
        ({"examples": 0}, ValueError, r"examples: "),
    ],
    options=[{"bias_correction": False}, {"curvature_decay": Belief(0.0, 0.1, 1.0), "examples": 8}],
)

OPTIMAL_MOMENTUM = OptimizerCase(
    "OptimalMomentum",
    OptimalMomentum,
    settings={"lr": 0.1},
    stacked_settings={
        "lr": tensor(0.1, 0.03, 0.2),
        "discount": tensor(math.inf, 1.0, 0.1),
        "horizon": tensor(1.0, 3.0, 0.5),
        "curvature_decay": tensor(0.99, 0.9, 0.5),
        "examples": tensor(8.0, 1.0, 4.0),
    },
    bad=[
        ({"lr": 0.0}, ValueError, r"lr: expected a number in \(0, inf\), got 0"),
        ({"discount": 0.0}, ValueError, r"discount: "),
        ({"horizon": -1.0}, ValueError, r"horizon: "),
        ({"curvature_decay": -0.1}, ValueError, r"curvature_decay: "),
        ({"curvature_decay": Belief(0.0, 0.1, 1.0)}, ValueError, r"curvature_decay: expected a finite discount"),
        (
            {"curvature_decay": {"decay": 0.1}},
            ValueError,
            r"curvature_decay: expected the numbers decay, process",
        ),
    ],
    options=[
        {"discount": 0.5, "curvature_decay": Belief(0.01, 0.1, 1.0), "examples": 8},
        {"horizon": 3.0, "discount": 5.0, "examples": 8},
    ],
)

NATURAL_GRADIENT = OptimizerCase(
    "NaturalGradient",
    NaturalGradient,
    settings={"lr": 0.02, "damping": 1.0},
    stacked_settings={
        "lr": tensor(0.02, 0.003, 0.05),
        "metric_decay": tensor(0.9, 0.99, 0.0),
        "damping": tensor(0.1, 1.0, 0.01),
        "examples": tensor(8.0, 1.0, 4.0),
    },
    bad=[
        ({"lr": -1.0}, ValueError, r"lr: expected a number in \[0, inf\), got -1"),
        ({"metric_decay": 1.1}, ValueError, r"metric_decay: expected a number in \[0, 1\], got 1.1"),
        ({"damping": 0.0}, ValueError, r"damping: expected a number in \(0, inf\), got 0"),
        ({"structure": "dense"}, ValueError, r"structure: expected one of diagonal, kronecker"),
        ({"structure": "kronecker"}, TypeError, r"params: expected the network itself for structure='kronecker'"),
    ],
    options=[{"metric_decay": 0.9, "damping": 0.3}],
)

GEOMETRIC_MEAN = OptimizerCase(
    "GeometricMean",
    GeometricMean,
    settings={"lr": 0.01, "damping": 0.1},
    stacked_settings={
        "lr": tensor(0.01, 0.003, 0.05),
        "metric_decay": tensor(0.99, 0.9, 0.5),
        "curvature_decay": tensor(0.9, 0.99, 0.0),
        "damping": tensor(0.1, 1.0, 0.01),
        "examples": tensor(8.0, 1.0, 4.0),
    },
    bad=[
        ({"lr": -1.0}, ValueError, r"lr: expected a number in \[0, inf\), got -1"),
        ({"metric_decay": 1.1}, ValueError, r"metric_decay: "),
        ({"curvature_decay": -1.0}, ValueError, r"curvature_decay: "),
        ({"damping": -0.1}, ValueError, r"damping: "),
        ({"structure": "kroneker"}, ValueError, r"did you mean 'kronecker'"),
    ],
    options=[{"metric_decay": 0.999, "curvature_decay": 0.9}],
)

BELIEF_ADAM = OptimizerCase(
    "BeliefAdam",
    BeliefAdam,
    settings={"lr": 0.03},
    stacked_settings={
        "lr": tensor(1e-2, 1e-3, 3e-2),
        "gradient_belief": tensor(0.9, 0.0, 0.5),
        "square_belief": tensor(0.999, 0.9, 0.99),
        "eps": tensor(1e-8, 1e-4, 1e-2),
        "discount": tensor(1.0, 2.0, 0.5),
    },
    bad=[
        ({"lr": -1.0}, ValueError, r"lr: expected a number in \[0, inf\), got -1"),
        ({"gradient_belief": 1.0}, ValueError, r"gradient_belief: expected a number in \[0, 1\), got 1"),
        ({"discount": math.inf}, ValueError, r"discount: .*got inf"),
        ({"observation": "moment"}, ValueError, r"did you mean 'moments'"),
        ({"observation": "gaussian"}, TypeError, r"gradient_belief: expected a Belief, got 0.9"),
        ({"eps": math.nan}, ValueError, r"eps: .*got nan"),
    ],
    options=[MOMENTS, {"observation": "gaussian", "eps": 1e-2, **MOMENTS}],
)

DRIFT = OptimizerCase(
    "Drift",
    Drift,
    settings={"lr": 0.1, "examples": 8},
    stacked_settings={
        "lr": tensor(0.1, 0.03, 0.2),
        "weight_decay": tensor(0.0, 0.01, 0.1),
        "rotation": tensor(0.0, 0.1, -0.05),
        "discount": tensor(math.inf, 1.0, 0.1),
        "curvature_decay": tensor(0.99, 0.9, 0.5),
    },
    bad=[
        ({"lr": 0.0}, ValueError, r"lr: "),
        ({"weight_decay": -0.1}, ValueError, r"weight_decay: "),
        ({"rotation": math.nan}, ValueError, r"rotation: .*got nan"),
        ({"discount": 0.0}, ValueError, r"discount: .*the objective is infinite with a drift"),
    ],
    options=[
        {"weight_decay": 1e-4, "rotation": 1e-4},
        {"discount": 0.5, "weight_decay": 1e-4, "rotation": -1e-4, "curvature_decay": Belief(0.0, 0.1, 1.0)},
    ],
)

DRAWS = Diagonal("sampled", sampling="batch")

MESU_CASE = OptimizerCase(
    "MESU",
    MESU,
    settings={"lr": 0.1, "memory": 1e3},
    stacked_settings={
        "lr": tensor(0.1, 0.3, 0.01),
        "memory": tensor(1e3, 1e2, math.inf),
        "trust_region": tensor(0.1, 0.5, 0.02),
        "deterministic_lr": tensor(1e-3, 0.0, 1e-2),
    },
    bad=[
        ({"lr": 0.0}, ValueError, r"lr: expected a number in \(0, inf\), got 0"),
        ({"memory": -1.0}, ValueError, r"memory: "),
        ({"trust_region": 1.0}, ValueError, r"trust_region: expected a number in \(0, 1\), got 1"),
        ({"samples": 0}, ValueError, r"samples: expected a whole number of at least 1, got 0"),
        ({"samples": 2.0}, TypeError, r"samples: expected a whole number of at least 1, got 2\.0"),
        ({"deterministic_lr": -0.1}, ValueError, r"deterministic_lr: "),
        ({"loss_reduction": "means"}, ValueError, r"did you mean 'mean'"),
    ],
    gaussian=True,
    precision=DRAWS,
    options=[{"memory": math.inf, "trust_region": 0.9}],
)

BGD_CASE = OptimizerCase(
    "BGD",
    BGD,
    settings={"lr": 0.1, "trust_region": 0.1},
    stacked_settings={
        "lr": tensor(0.1, 1.0, 0.01),
        "trust_region": tensor(0.1, 0.02, 0.5),
        "deterministic_lr": tensor(1e-3, 0.0, 1e-2),
    },
    bad=[
        ({"lr": -1.0}, ValueError, r"lr: expected a number in \(0, inf\), got -1"),
        ({"trust_region": 0.0}, ValueError, r"trust_region: expected a number in \(0, inf\], got 0"),
        ({"samples": True}, TypeError, r"samples: expected a whole number of at least 1, got True"),
        ({"loss_reduction": "avg"}, ValueError, r"loss_reduction: expected one of mean, sum, position_mean"),
    ],
    gaussian=True,
    precision=DRAWS,
)

OPTIMIZERS = [
    EULER_LAGRANGE,
    EULER_LAGRANGE_KRONECKER,
    EULER_LAGRANGE_EXACT,
    MESU_CASE,
    BGD_CASE,
    STACKED_SGD,
    STACKED_ADAM,
    STACKED_MUON,
    UPGD_CASE,
    BALLISTIC,
    OPTIMAL_MOMENTUM,
    NATURAL_GRADIENT,
    GEOMETRIC_MEAN,
    BELIEF_ADAM,
    DRIFT,
]

FISHER_FACTORS = [
    replace(
        case,
        name=f"{case.name}-kronecker",
        settings={"lr": 0.02, "damping": 0.1, "structure": "kronecker"},
        options=options,
        whole=True,
    )
    for case, options in ((NATURAL_GRADIENT, []), (GEOMETRIC_MEAN, [{"metric_decay": 0.9}]))
]
"""Those that see Kronecker factors through hooks on a network, so that they cannot do with parts of one."""


def variants(cases: list[OptimizerCase]) -> pytest.MarkDecorator:
    """Rows of the table, each as it is and with each of its options."""
    rows = [
        pytest.param(case, options, id=f"{case.name}{number or ''}")
        for case in cases
        for number, options in enumerate([{}, *case.options])
    ]
    return pytest.mark.parametrize(("case", "options"), rows)
