"""The Lightning callback that logs how plastic a network still is."""

from collections import deque
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from clagrange._checks import check_number
from clagrange.callbacks.task_callback import TaskCallback
from clagrange.metrics import dead_units, effective_rank, mean_variance, weight_magnitude
from clagrange.replicas import replicas_of
from clagrange.wiring import hidden_features


class PlasticityMonitor(TaskCallback):
    """Log measures of plasticity to every logger of the Trainer.

    Batches are (inputs, targets, ...) or mappings with an entry ``targets``, targets whole numbers; the network
    returns class scores. Override `targets_of` for another form. Under ``prefix`` stand

    - ``online_accuracy``: the fraction of the task's examples so far that were classified rightly by the network
      as it was before it learned from their batch (in training mode, as in the training step);
    - ``dead_units`` and ``effective_rank`` of the last hidden layer, on the last ``probe_examples`` examples of
      the task;
    - ``weight_magnitude``: mean |w|;
    - ``mean_variance``: mean variance of Gaussian weights, in units of the prior's;
    - ``task``: the number of the task, where there is one.

    They are logged every so many optimizer steps and at the end of training, the accuracy also at the end of
    every task, under Lightning's own step, and are in ``trainer.callback_metrics``. A network that is a stack
    of replicas is averaged over them; of several processes the first logs its own share. Training is left as it
    is: weights are the same with and without the monitor.

    Args:
        every_n_steps: optimizer steps from one measurement to the next.
        probe_examples: number of examples for the measures of hidden units.
        network: name of the submodule that is the network; "" is the LightningModule itself. Default: the only
            child module that has parameters.
        switch_on: where the task of a batch is read off: "auto", "batch", "datamodule", "fit" or "never"; see
            `InterventionCallback`.
        prefix: of the names.
        name: tells two monitors apart in a checkpoint.

    Raises:
        ValueError: if a number is below 1; in training, if the network or the form of the batches is not clear.

    Example:
        >>> trainer = pl.Trainer(callbacks=[PlasticityMonitor(every_n_steps=50)])
    """

    def __init__(
        self,
        every_n_steps: int = 100,
        probe_examples: int = 256,
        network: str | None = None,
        switch_on: str = "auto",
        prefix: str = "plasticity/",
        name: str | None = None,
    ) -> None:
        super().__init__(network, switch_on, name)
        check_number("every_n_steps", every_n_steps, low=1)
        check_number("probe_examples", probe_examples, low=1)
        self.every_n_steps = every_n_steps
        self.probe_examples = probe_examples
        self.prefix = prefix
        self._correct: Tensor | int = 0
        self._seen = 0
        self._probes: deque[Tensor] = deque()
        self._handles: list[RemovableHandle] = []
        self._inputs: Tensor | None = None
        self._output: Tensor | None = None
        self._steps = 0
        self._logged = -1

    def targets_of(self, batch: Any) -> Tensor:
        """The targets of a batch, (examples,); override it for batches of another form."""
        targets: Tensor = batch["targets"] if isinstance(batch, Mapping) else batch[1]
        return targets

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Watch what enters and leaves the network."""
        super().on_train_start(trainer, pl_module)
        self._detach()
        network = self.network_of(pl_module)
        self._handles = [
            network.register_forward_pre_hook(self._enters, prepend=True),  # before a hook that normalises
            network.register_forward_hook(self._leaves),
        ]
        self._steps = trainer.global_step
        self._logged = -1

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start a new task where the batch is of one."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._inputs = self._output = None

    def task_switched(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the accuracy over the old task and begin to count anew."""
        self._log(trainer, {"online_accuracy": float(self._correct / self._seen)} if self._seen else {})
        self._correct = self._seen = 0
        self._probes.clear()

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch, and measure where it is time."""
        if self._inputs is None or self._output is None:
            raise ValueError(
                f"network: expected training_step to call the {type(self.network_of(pl_module)).__name__} in "
                f"training mode, it did not; name the one that it calls, network='...'"
            )
        targets = self.targets_of(batch)
        if self._output.shape[:-1] != targets.shape or targets.is_floating_point():
            raise ValueError(
                f"batch: expected (inputs, targets) with whole numbers for class scores of shape "
                f"{tuple(self._output.shape)}, got targets of type {targets.dtype} and shape "
                f"{tuple(targets.shape)}; override targets_of"
            )
        self._correct = self._correct + (self._output.argmax(-1) == targets).sum()
        self._seen += targets.numel()
        self._keep(self._inputs, int(replicas_of(self.network_of(pl_module)) is not None))
        self._inputs = self._output = None
        if trainer.global_step != self._steps:
            self._steps = trainer.global_step
            if self._steps % self.every_n_steps == 0:
                self._log(trainer, self.measure(self.network_of(pl_module)))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the last state."""
        self._log(trainer, self.measure(self.network_of(pl_module)))
        self._detach()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the network alone again."""
        self._detach()

    def measure(self, network: nn.Module) -> dict[str, float]:
        """All measures of the present network and task, by name without prefix."""
        found: dict[str, Any] = {"weight_magnitude": weight_magnitude(network)}
        variance = mean_variance(network)
        if variance is not None:
            found["mean_variance"] = variance
        if self._seen:
            found["online_accuracy"] = self._correct / self._seen
        if self._probes:
            stacked = replicas_of(network) is not None
            with isolate_rng():
                features = hidden_features(network, torch.cat(list(self._probes), int(stacked)), stacked=stacked)
            if features:
                found["dead_units"] = dead_units(features[-1])
                found["effective_rank"] = effective_rank(features[-1])
        return {name: float(torch.as_tensor(value).float().mean()) for name, value in found.items()}

    def state_dict(self) -> dict[str, Any]:
        """The current task, its accuracy so far and its last examples."""
        counts = {"correct": int(self._correct), "seen": self._seen, "probes": list(self._probes)}
        return {**super().state_dict(), **counts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        super().load_state_dict(state_dict)
        self._correct, self._seen = state_dict["correct"], state_dict["seen"]
        self._probes = deque(state_dict["probes"])

    def _enters(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if module.training and self._inputs is None and args:
            self._inputs = args[0].detach()

    def _leaves(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if module.training and self._output is None:
            self._output = output.detach()

    def _keep(self, inputs: Tensor, batch_dim: int) -> None:
        self._probes.append(inputs)
        surplus = sum(probe.shape[batch_dim] for probe in self._probes) - self.probe_examples
        while surplus > 0:
            oldest = self._probes.popleft()
            size = oldest.shape[batch_dim]
            if size > surplus:
                self._probes.appendleft(oldest.narrow(batch_dim, surplus, size - surplus).clone())
            surplus -= size

    def _log(self, trainer: pl.Trainer, measures: dict[str, float]) -> None:
        step = max(trainer.global_step - 1, 0)  # the step under which Lightning logs the last batch
        if self._logged == step or not self._seen:
            return
        self._logged = step
        metrics = {self.prefix + name: value for name, value in measures.items()}
        if isinstance(self.task, int):
            metrics[f"{self.prefix}task"] = float(self.task)
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=step)

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._inputs = self._output = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": [], "_inputs": None, "_output": None}
