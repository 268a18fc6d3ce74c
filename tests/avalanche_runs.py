"""Small runs that the tests of the Avalanche side share."""

from typing import Any

import torch
from avalanche.benchmarks import CLScenario
from avalanche.evaluation.metrics import accuracy_metrics, loss_metrics
from avalanche.logging import BaseLogger
from avalanche.training import Naive
from avalanche.training.plugins import EvaluationPlugin
from torch import nn

import clagrange as cl
from clagrange.strategies import ContinualBackprop, EulerLagrange


def small_stream(tasks: int = 3) -> cl.tasks.PermutedDigits:
    return cl.tasks.PermutedDigits(tasks=tasks, examples=160, batch_size=16, seed=1)


def small_benchmark(tasks: int = 3) -> CLScenario:
    return small_stream(tasks).as_benchmark()


class Quiet(BaseLogger):
    """A logger that says nothing: without one, Avalanche warns."""


def evaluator(*loggers: BaseLogger) -> EvaluationPlugin:
    return EvaluationPlugin(
        accuracy_metrics(epoch=True, experience=True, stream=True),
        loss_metrics(epoch=True, stream=True),
        loggers=list(loggers) or [Quiet()],
    )


def naive(net: nn.Module, **settings: Any) -> Naive:
    settings = {
        "optimizer": torch.optim.SGD(net.parameters(), lr=0.05),
        "train_mb_size": 16,
        "eval_mb_size": 80,
        "evaluator": EvaluationPlugin(loggers=[Quiet()]),
        **settings,
    }
    return Naive(model=net, **settings)


RATES = {"lr": 0.02, "temperature": 2e-3, "train_mb_size": 16, "eval_mb_size": 80, "eval_every": -1}


def euler_lagrange(net: nn.Module, **settings: Any) -> EulerLagrange:
    return EulerLagrange(model=net, **{**RATES, "evaluator": evaluator(), **settings})


def continual_backprop(net: nn.Module, **settings: Any) -> ContinualBackprop:
    settings = {
        "optimizer": torch.optim.Adam(net.parameters(), lr=2e-3),
        "replacement_rate": 0.02,
        "maturity": 3,
        "train_mb_size": 16,
        "eval_mb_size": 80,
        "evaluator": evaluator(),
        **settings,
    }
    return ContinualBackprop(model=net, **settings)
