"""What callbacks that follow a stream share: which submodule is the network, which task a batch is of."""

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn

from clagrange._checks import check_choice, did_you_mean

SOURCES = ("auto", "batch", "datamodule", "fit", "never")

TaskId = int | str


class TaskCallback(pl.Callback):
    """A callback that knows the network and notices when another task begins.

    Args:
        network: name of the submodule that is the network; "" is the LightningModule itself. Default: the only
            child module that has parameters.
        switch_on: where the task of a batch is read off; another one than before is a switch.
            "batch": the entry ``task`` of a batch that is a mapping, else the third of a sequence: a whole
            number, a string, or a tensor of equal whole numbers. "datamodule": its ``current_task``. "fit":
            every `Trainer.fit` that does not resume from a checkpoint is a new task. "never": no task is known.
            "auto": the first of batch, datamodule and fit that there is.
        name: tells callbacks of the same kind apart in a checkpoint.
    """

    def __init__(self, network: str | None, switch_on: str, name: str | None) -> None:
        check_choice("switch_on", switch_on, SOURCES)
        self.network = network
        self.switch_on = switch_on
        self.name = name
        self.task: TaskId | None = None
        self._fits = 0

    @property
    def state_key(self) -> str:
        """The key of the callback's state in a checkpoint."""
        return type(self).__qualname__ + (f"[{self.name}]" if self.name else "")

    def task_of(self, trainer: pl.Trainer, batch: Any) -> TaskId | None:
        """The task that a batch is of, None where it is not known; override it for batches of another form.

        It is asked about the batch that is trained on next, not about one that was fetched in advance.
        """
        if self.switch_on in ("auto", "batch"):
            task = _task_in(batch)
            if task is not None:
                return task
            if self.switch_on == "batch":
                raise ValueError(
                    f"switch_on: expected batches (inputs, targets, task) or with an entry 'task', got a "
                    f"{type(batch).__name__} without; use another of {', '.join(SOURCES)}, or override task_of"
                )
        if self.switch_on in ("auto", "datamodule"):
            datamodule = getattr(trainer, "datamodule", None)
            task = getattr(datamodule, "current_task", None)
            if task is not None:
                return _plain(task)
            if self.switch_on == "datamodule":
                raise ValueError(
                    f"switch_on: expected a data module with the attribute current_task, got "
                    f"{type(datamodule).__name__}; use another of {', '.join(SOURCES)}, or override task_of"
                )
        return None if self.switch_on == "never" else self._fits

    def task_switched(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called before the first batch of every task but the first; ``self.task`` is still the old one."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count the fits that start afresh."""
        if trainer.ckpt_path is None:
            self._fits += 1

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Compare the task of the batch with the one before."""
        task = self.task_of(trainer, batch)
        if task is not None and task != self.task:
            if self.task is not None:
                self.task_switched(trainer, pl_module)
            self.task = task

    def state_dict(self) -> dict[str, Any]:
        """The current task and the number of fits; loads with ``weights_only=True``."""
        return {"task": self.task, "fits": self._fits}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.task = state_dict["task"]
        self._fits = state_dict["fits"]

    def network_of(self, pl_module: pl.LightningModule) -> nn.Module:
        """The network of a LightningModule.

        Raises:
            ValueError: if ``network`` names none, or is needed because the choice is not clear.
        """
        children = [name for name, child in pl_module.named_children() if any(True for _ in child.parameters())]
        if self.network is None:
            if len(children) != 1:
                raise ValueError(
                    f"network: cannot tell which submodule of {type(pl_module).__name__} is the network, "
                    f"{len(children)} have parameters ({', '.join(children)}); give its name, such as "
                    f"network={children[0] if children else 'net'!r}, or '' for the module itself"
                )
            return pl_module.get_submodule(children[0])
        try:
            return pl_module.get_submodule(self.network)
        except AttributeError:
            raise ValueError(
                f"network: expected the name of a submodule of {type(pl_module).__name__} "
                f"({', '.join(children)}), got {self.network!r}{did_you_mean(self.network, children)}"
            ) from None


def _task_in(batch: Any) -> TaskId | None:
    """The task that a batch carries, None without one."""
    if isinstance(batch, Mapping):
        return _plain(batch.get("task"))
    if isinstance(batch, Sequence) and not isinstance(batch, str) and len(batch) > 2:
        return _plain(batch[2])
    return None


def _plain(task: Any) -> TaskId | None:
    """A task id as a number or string; None where it is not one."""
    if isinstance(task, Tensor):
        if task.is_floating_point() or task.is_complex() or task.numel() == 0:
            return None
        low, high = task.aminmax()
        if low != high:
            raise ValueError(
                f"task: expected batches of one task each, got entries from {int(low)} to {int(high)}; if the "
                f"third part of a batch is no task, set switch_on to 'datamodule', 'fit' or 'never', or override "
                f"task_of"
            )
        return int(low)
    return task if isinstance(task, (int, str)) and not isinstance(task, bool) else None
