"""The Lightning callback that logs the energy of a training run."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

from clagrange._checks import check_number
from clagrange.mechanics import InertiaMeter


class InertiaMonitor(pl.Callback):
    """Log kinetic and potential energy, their predicted and actual change, and the defect to every logger.

    A `clagrange.mechanics.InertiaMeter` follows the optimizer; its loss is what `backward` is called on, summed
    over accumulated batches, and unscaled under 16-bit precision. Under ``prefix`` stand

    - ``kinetic``, ``potential``, ``energy`` of the last step;
    - ``change`` of the energy since the last entry, ``predicted``, ``defect`` = change − predicted, with
      ``noise``, the part of the prediction that is gradient noise, and ``damping`` = −2βK dt where friction is
      known;
    - ``surprise``: of the steps since the last entry, the defect that is most standard deviations off its
      running mean. Far from 0 it signals a switch.

    They are logged every so many optimizer steps and at the end of training, under Lightning's own step, and
    are in ``trainer.callback_metrics``. Training is left as it is. A new optimizer, as in every `fit` that does
    not resume, begins a new run of the energy. Optimization may be automatic or manual, with one optimizer.

    Args:
        every_n_steps: optimizer steps from one entry to the next.
        mass: of the weights; for a mapping or metric, give a meter.
        law: "auto", "momentum" or "work", see `InertiaMeter`.
        noise: predict what gradient noise adds, see `InertiaMeter`.
        meter: use this one; then ``mass``, ``law`` and ``noise`` are not.
        prefix: of the names.
        name: tells two monitors apart in a checkpoint.

    Raises:
        ValueError: if a number is out of range; in training, if there is not one optimizer.

    Example:
        >>> trainer = pl.Trainer(callbacks=[InertiaMonitor(every_n_steps=50)])
    """

    def __init__(
        self,
        every_n_steps: int = 10,
        mass: float = 1.0,
        law: str = "auto",
        noise: bool = False,
        meter: InertiaMeter | None = None,
        prefix: str = "inertia/",
        name: str | None = None,
    ) -> None:
        check_number("every_n_steps", every_n_steps, low=1)
        self.every_n_steps = every_n_steps
        self.meter = InertiaMeter(mass=mass, law=law, noise=noise) if meter is None else meter
        self.prefix = prefix
        self.name = name
        self._steps = 0

    @property
    def state_key(self) -> str:
        """The key of the callback's state in a checkpoint."""
        return type(self).__qualname__ + (f"[{self.name}]" if self.name else "")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Follow the optimizer."""
        if len(trainer.optimizers) != 1:
            raise ValueError(
                f"trainer: expected a LightningModule with one optimizer, got {len(trainer.optimizers)}; let "
                f"configure_optimizers return one, with several parameter groups where settings differ"
            )
        self.meter.attach(trainer.optimizers[0])
        self._steps = self.meter.steps

    def on_before_zero_grad(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Forget losses whose gradients are forgotten, as after a step that 16-bit precision left out."""
        self.meter.clear()

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Hand on the loss whose gradients the step will use."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self.meter.observe(loss if scaler is None else loss.detach() / scaler.get_scale())

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log where it is time."""
        if self.meter.steps != self._steps and self.meter.steps // self.every_n_steps > (
            self._steps // self.every_n_steps
        ):
            self._log(trainer)
        self._steps = self.meter.steps

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the last state and leave the optimizer alone."""
        if self.meter.steps % self.every_n_steps:
            self._log(trainer)
        self.meter.detach()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the optimizer alone."""
        self.meter.detach()

    def state_dict(self) -> dict[str, Any]:
        """All that the next reading needs."""
        return self.meter.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.meter.load_state_dict(state_dict)

    def _log(self, trainer: pl.Trainer) -> None:
        metrics = {self.prefix + name: value for name, value in self.meter.collect().items()}
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})
        step = max(trainer.global_step - 1, 0)  # the step under which Lightning logs the last batch
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=step)
