"""The Euler-Lagrange rule with variance injection as an Avalanche strategy."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from avalanche.training.plugins.evaluation import default_evaluator
from avalanche.training.templates import SupervisedTemplate
from torch import nn

from clagrange import optim
from clagrange.gaussian import Structure, gaussian_layers, gaussianize
from clagrange.gaussian.conversion import LayerSettings
from clagrange.interventions import VarianceInjection
from clagrange.strategies.heads import layers_of, make_new_layers_gaussian
from clagrange.strategies.plugin import InterventionPlugin


class EulerLagrange(SupervisedTemplate):  # type: ignore[misc]
    """Learn with Gaussian weights along the Euler-Lagrange flow, and inject variance at every switch.

    The network becomes Gaussian where it is not yet (`clagrange.gaussianize`), is trained by
    `clagrange.optim.EulerLagrange`, and `clagrange.interventions.VarianceInjection` acts before every experience
    but the first. Where Avalanche lets a network grow (`IncrementalClassifier`, `MultiHeadClassifier`), the new
    layers become Gaussian: the units of before keep their precision, new ones start at the prior.

    For parameter groups of your own, take Avalanche's ``Naive`` with that optimizer and an `InterventionPlugin`.

    Args:
        model: the network, changed in place; one that has a Gaussian layer already is left as it is.
        lr: fraction of the way to equilibrium covered in one step.
        temperature: T, in units of the loss; about 1 / (examples per experience).
        discount: γ per step; infinite for the overdamped flow.
        variance_rate: r in (0, 1]; None ties it to the mean's rate.
        curvature_decay: β in [0, 1).
        trust_region: bound on a step, in posterior standard deviations.
        deterministic_lr: learning rate of parameters that are not Gaussian.
        loss_reduction: how the criterion averages, "mean", "sum" or "position_mean".
        precision: structure of the precision, a name or one with settings.
        prior_mean: "zero" or "initial".
        prior_variance: of the prior, in units of each layer's initialisation variance 2 / fan_in.
        layers: settings by name, pattern or type of layer, None for what stays deterministic.
        strength: of the injection, in [0, 1]; 0 or None, with ``widen`` 0, for none.
        widen: fraction in [0, 1] by which precisions move to the prior's before the mean is sampled.
        seed: of the injection's random stream.
        criterion: loss function; default: cross-entropy.
        train_mb_size: examples of a training batch.
        train_epochs: passes over each experience.
        eval_mb_size: examples of an evaluation batch; None for ``train_mb_size``.
        device: where the network goes.
        plugins: further Avalanche plugins; they act before the injection.
        evaluator: Avalanche's ``EvaluationPlugin``, a function that makes one, or None for no logging.
        eval_every: how often ``train`` evaluates: -1 never, 0 after each experience, n > 0 every n epochs too.
        base_kwargs: further arguments of Avalanche's ``SupervisedTemplate``.

    Raises:
        ValueError: for a number out of range or a network without a layer that could be Gaussian.
        TypeError: if an optimizer is given.

    Example:
        >>> benchmark = clagrange.tasks.PermutedDigits(tasks=3, batch_size=16).as_benchmark()
        >>> net = clagrange.networks.mlp(64, [64], 10)
        >>> strategy = EulerLagrange(model=net, lr=6e-3, temperature=1e-3, train_mb_size=16)
        >>> results = strategy.train(benchmark.train_stream[0])  # doctest: +ELLIPSIS
        -- >> Start of training phase << --
        ...
        -- >> End of training phase << --
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        lr: float = 1e-3,
        temperature: float = 1e-5,
        discount: float = math.inf,
        variance_rate: float | None = None,
        curvature_decay: float = 0.99,
        trust_region: float = 1.0,
        deterministic_lr: float = 1e-3,
        loss_reduction: str = "mean",
        precision: str | Structure = "diagonal",
        prior_mean: str = "zero",
        prior_variance: float = 1.0,
        layers: LayerSettings | None = None,
        strength: float | None = 0.3,
        widen: float = 0.0,
        seed: int = 0,
        criterion: Callable[..., torch.Tensor] | None = None,
        train_mb_size: int = 1,
        train_epochs: int = 1,
        eval_mb_size: int | None = None,
        device: str | torch.device = "cpu",
        plugins: Sequence[Any] | None = None,
        evaluator: Any = default_evaluator,
        eval_every: int = -1,
        **base_kwargs: Any,
    ) -> None:
        if "optimizer" in base_kwargs:
            raise TypeError(
                "optimizer: expected none, since this strategy makes its own from lr, temperature, ...; for an "
                "optimizer of yours take Avalanche's Naive with an InterventionPlugin"
            )
        injection = VarianceInjection(strength=strength or 0.0, widen=widen, seed=seed)
        settings: dict[str, Any] = {
            "precision": precision,
            "prior_mean": prior_mean,
            "prior_variance": prior_variance,
            "layers": layers,
        }
        if not any(gaussian_layers(model)):
            gaussianize(model, **settings)
        optimizer = optim.EulerLagrange(
            model,
            lr=lr,
            temperature=temperature,
            discount=discount,
            variance_rate=variance_rate,
            curvature_decay=curvature_decay,
            trust_region=trust_region,
            deterministic_lr=deterministic_lr,
            loss_reduction=loss_reduction,
        )
        injects = injection.strength > 0 or injection.widen > 0
        self.interventions = InterventionPlugin(*[injection] * injects)
        super().__init__(
            model=model,
            optimizer=optimizer,
            criterion=nn.CrossEntropyLoss() if criterion is None else criterion,
            train_mb_size=train_mb_size,
            train_epochs=train_epochs,
            eval_mb_size=eval_mb_size,
            device=device,
            plugins=[*(plugins or []), self.interventions],
            evaluator=evaluator,
            eval_every=eval_every,
            **base_kwargs,
        )
        self._gaussian_settings = settings

    def model_adaptation(self, model: nn.Module | None = None) -> nn.Module:
        """Let the network grow, as every Avalanche strategy does, and make what is new in it Gaussian."""
        model = self.model if model is None else model
        before = layers_of(model)
        model = super().model_adaptation(model)
        make_new_layers_gaussian(model, before, self._gaussian_settings)
        return model

    def make_optimizer(self, **kwargs: Any) -> None:
        """Let Avalanche bring the optimizer's parameters up to date, and their names with them."""
        super().make_optimizer(**kwargs)
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        for group in self.optimizer.param_groups:
            group["param_names"] = [names.get(parameter, "") for parameter in group["params"]]
