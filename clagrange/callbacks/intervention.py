"""The Lightning callback that carries interventions, and named forms of it."""

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from clagrange import interventions as methods
from clagrange.callbacks.task_callback import TaskCallback
from clagrange.interventions import Intervention


class InterventionCallback(TaskCallback):
    """Let interventions act in any Lightning training.

    ``on_start`` comes when training starts, also when it resumes and with each new `fit`; ``on_gradient`` when
    the gradients of an optimizer step are complete (also accumulated ones), before Lightning clips them;
    ``on_step`` once after every step of the optimizer; ``on_switch`` before the first batch of every task but
    the first, or after the step in which an intervention's own detector notices one. Optimization may be
    automatic or manual, with one optimizer.

    How a switch is noticed, by default: from the batch when it carries the task, as (inputs, targets, task);
    else from the data module's ``current_task``; else every new `fit` with the same callback is a new task. So
    a Trainer per task, one Trainer whose data module moves on, and one endless loader all work. A new
    experiment takes a new callback. Where the data module says ``hidden_switches``, as a `StreamDataModule` does
    of a stream whose change is gradual, no switch is announced, however it could be noticed.

    The state of the interventions, their random streams and the current task are in checkpoints, which load
    with ``weights_only=True``; training that resumes in the middle of a task goes on as if it had not stopped.
    Hooks stay in the network after training, so that normalised inputs are normalised in evaluation too.

    Args:
        interventions: one or several, in the order in which they act.
        network: name of the submodule that is the network (hooks see its ``forward``); "" is the
            LightningModule itself. Default: the only child module that has parameters.
        switch_on: "auto", "batch", "datamodule", "fit" or "never"; see `TaskCallback`, and override `task_of`
            for anything else.
        name: tells two callbacks with the same interventions apart in a checkpoint.

    Raises:
        TypeError: if one is not an intervention.
        ValueError: at the start of training, if the network cannot be told or there is not one optimizer.

    Example:
        >>> from clagrange.interventions import ShrinkAndPerturb
        >>> callback = InterventionCallback(ShrinkAndPerturb())
        >>> trainer = pl.Trainer(callbacks=[callback])
    """

    def __init__(
        self,
        interventions: Intervention | Sequence[Intervention],
        network: str | None = None,
        switch_on: str = "auto",
        name: str | None = None,
    ) -> None:
        super().__init__(network, switch_on, name)
        self.interventions = [interventions] if isinstance(interventions, Intervention) else list(interventions)
        for intervention in self.interventions:
            if not isinstance(intervention, Intervention):
                raise TypeError(
                    f"interventions: expected instances of clagrange.interventions.Intervention, "
                    f"got {intervention!r}"
                )
        self._started: nn.Module | None = None
        self._handles: list[RemovableHandle] = []
        self._depth = 0

    @property
    def state_key(self) -> str:
        """The key of the callback's state in a checkpoint: its kind, its interventions and ``name``."""
        parts = [type(intervention).__qualname__ for intervention in self.interventions]
        return f"{type(self).__qualname__}[{', '.join([*parts, *([self.name] if self.name else [])])}]"

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the interventions and watch the optimizer's steps."""
        super().on_train_start(trainer, pl_module)
        optimizer = _optimizer(trainer)
        self._start(self.network_of(pl_module), optimizer)
        self._forget_optimizer()
        self._handles = [
            optimizer.register_step_pre_hook(self._step_begins),
            optimizer.register_step_post_hook(self._step_ends),
        ]

    def task_switched(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Hand on the switch, unless nobody is to be told."""
        if getattr(getattr(trainer, "datamodule", None), "hidden_switches", False):
            return
        for intervention in self.interventions:
            intervention.switch_announced(self.network_of(pl_module), _optimizer(trainer))

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Hand on the loss, divided by the accumulated batches as for its gradients."""
        for intervention in self.interventions:
            intervention.loss_known(self.network_of(pl_module), loss)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Hand on the gradients."""
        for intervention in self.interventions:
            intervention.gradient_known(self.network_of(pl_module), optimizer)

    # An optimizer whose step calls that of its base class runs these twice for one step: count the depth.
    def _step_begins(self, *_: Any) -> None:
        self._depth += 1

    def _step_ends(self, optimizer: Optimizer, *_: Any) -> None:
        self._depth -= 1
        if self._depth == 0 and self._started is not None:
            for intervention in self.interventions:
                intervention.step_taken(self._started, optimizer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the optimizer alone again."""
        self._forget_optimizer()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the optimizer alone again."""
        self._forget_optimizer()

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start where evaluation comes before training."""
        self._start_evaluation(pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start where evaluation comes before training."""
        self._start_evaluation(pl_module)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start where evaluation comes before training."""
        self._start_evaluation(pl_module)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start where evaluation comes before training."""
        self._start_evaluation(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The current task and the state of every intervention."""
        states = [intervention.state_dict() for intervention in self.interventions]
        return {**super().state_dict(), "interventions": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        super().load_state_dict(state_dict)
        for intervention, state in zip(self.interventions, state_dict["interventions"], strict=True):
            intervention.load_state_dict(state)

    def _start(self, network: nn.Module, optimizer: Optimizer) -> None:
        for intervention in self.interventions:
            intervention.on_start(network, optimizer)
        self._started = network

    def _start_evaluation(self, pl_module: pl.LightningModule) -> None:
        network = self.network_of(pl_module)
        if network is not self._started:  # a loaded network: no optimizer is there, a start changes none
            self._start(network, torch.optim.SGD(network.parameters(), lr=0.0))

    def _forget_optimizer(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._depth = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_started": None, "_handles": [], "_depth": 0}


class VarianceInjection(InterventionCallback):
    """Make Gaussian weights plastic again at every task switch; `InterventionCallback` with one intervention.

    Args:
        strength: q in [0, 1] of the sampled step of the means toward the prior; see
            `clagrange.inject_variance`.
        widen: fraction in [0, 1] by which precisions move to the prior's before.
        layers: names or shell patterns of the layers; default all.
        seed: of the random stream.
        options: further ones of `clagrange.interventions.VarianceInjection`, as ``{over: 10}``.
        detector: of switches, which then need not be announced.
        network: as in `InterventionCallback`.
        switch_on: as in `InterventionCallback`.
        name: as in `InterventionCallback`.

    Example:
        >>> trainer = pl.Trainer(callbacks=[VarianceInjection(strength=0.3)])

        In a LightningCLI configuration::

            trainer:
              callbacks:
                - class_path: clagrange.callbacks.VarianceInjection
                  init_args: {strength: 0.3}
    """

    def __init__(
        self,
        strength: float = 0.3,
        widen: float = 0.0,
        layers: Sequence[str] | None = None,
        seed: int = 0,
        network: str | None = None,
        switch_on: str = "auto",
        name: str | None = None,
        options: dict[str, Any] | None = None,
        detector: methods.Detector | None = None,
    ) -> None:
        injection = methods.VarianceInjection(strength, widen, layers, seed, **(options or {}), detector=detector)
        super().__init__(injection, network, switch_on, name)


def _optimizer(trainer: pl.Trainer) -> Optimizer:
    if len(trainer.optimizers) != 1:
        raise ValueError(
            f"interventions: expected a LightningModule with one optimizer, got {len(trainer.optimizers)}; let "
            f"configure_optimizers return one, with several parameter groups where settings differ"
        )
    return trainer.optimizers[0]
