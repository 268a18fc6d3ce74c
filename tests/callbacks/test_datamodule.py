"""The data module: order of batches, the three ways, resuming in the middle of a task."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning_runs import Classifier, euler_lagrange, gaussian_mlp, momentum, plain_mlp, trainer
from parity import DoubleDigits
from torch import nn

import clagrange
from clagrange.callbacks import InterventionCallback, PlasticityMonitor, StreamDataModule, VarianceInjection
from clagrange.interventions import ContinualBackprop
from clagrange.networks import mlp
from clagrange.tasks import IncrementalCIFAR, PermutedDigits, TaskStream

import lightning.pytorch as pl  # isort: skip
from lightning.pytorch.callbacks import ModelCheckpoint  # isort: skip

TASKS, STEPS = 3, 10


def stream(epochs: int = 1) -> DoubleDigits:
    return DoubleDigits(tasks=TASKS, examples=4 * STEPS // epochs, batch_size=4, epochs=epochs, seed=3)


class Seen(pl.Callback):
    """Keeps what was trained on."""

    def __init__(self) -> None:
        self.inputs: list[torch.Tensor] = []
        self.tasks: list[int] = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.inputs.append(batch[0])
        self.tasks.append(batch[2] if len(batch) == 3 else trainer.datamodule.current_task)


class Save(pl.Callback):
    """A checkpoint after every batch, at the moment at which ModelCheckpoint(every_n_train_steps=1)
    saves."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


class Inputs(pl.LightningModule):
    """Trains a number on inputs of any shape."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return (self.weight * batch[0]).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def expected(stream: TaskStream) -> tuple[list[torch.Tensor], list[int]]:
    inputs, tasks = [], []
    for number in range(stream.tasks):
        for epoch in range(stream.epochs):
            for chosen in stream.order(number, epoch):
                inputs.append(stream.task(number).inputs[chosen])
                tasks.append(number)
    return inputs, tasks


def run(
    mode: str,
    data: StreamDataModule,
    model: pl.LightningModule,
    callbacks: list[pl.Callback],
    folder: Path,
    *,
    checkpoint: Path | None = None,
    save: bool = False,
    **settings: Any,
) -> None:
    """The whole stream, or what is left of it after a checkpoint."""
    first = 0
    if checkpoint is not None and mode == "task":
        first = torch.load(checkpoint, weights_only=True)["StreamDataModule"]["task"]
    for number in range(first, data.stream.tasks if mode == "task" else first + 1):
        extra = [Save(folder / str(number))] if save else []
        if mode == "task":
            if checkpoint is None or number > first:  # else the checkpoint says which task
                data.start(number)
            settings["max_epochs"] = data.stream.epochs
        elif mode == "reload":
            settings = {
                "max_epochs": data.stream.tasks * data.stream.epochs,
                "reload_dataloaders_every_n_epochs": 1,
                **settings,
            }
        else:
            settings = {"max_epochs": 1, **settings}
        trainer(folder, callbacks=[*callbacks, *extra], **settings).fit(
            model, data, ckpt_path=checkpoint if number == first else None, weights_only=True
        )


@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize("mode", ["task", "reload", "endless"])
def test_every_way_trains_on_the_streams_own_batches(mode: str, epochs: int, tmp_path: Path) -> None:
    seen = Seen()
    run(mode, stream(epochs).as_datamodule(mode=mode), Classifier(plain_mlp(), momentum), [seen], tmp_path)
    inputs, tasks = expected(stream(epochs))
    assert seen.tasks == tasks
    assert torch.equal(torch.stack(seen.inputs), torch.stack(inputs))


def growing() -> IncrementalCIFAR:
    return IncrementalCIFAR(
        "digits", tasks=3, classes_per_task=2, examples_per_class=11, batch_size=4, epochs=2, augment=False
    )


@pytest.mark.parametrize("make", [partial(stream, epochs=2), growing])
def test_one_trainer_can_fit_several_tasks(make: Callable[[], TaskStream], tmp_path: Path) -> None:
    tasks, seen = make(), Seen()
    model, data = Inputs(), tasks.as_datamodule(mode="task")
    made = trainer(tmp_path, callbacks=[seen], max_epochs=0)
    for number in range(tasks.tasks):
        data.start(number)
        for _ in range(tasks.epochs):  # a fit for each epoch
            made.fit_loop.max_epochs += 1
            made.fit(model, data)
    inputs, numbers = expected(tasks)
    assert seen.tasks == numbers
    assert all(torch.equal(one, other) for one, other in zip(seen.inputs, inputs, strict=True))


def test_one_trainer_goes_on_in_the_middle_of_a_task(tmp_path: Path) -> None:
    tasks, seen = growing(), Seen()
    data = tasks.as_datamodule(mode="task")
    made = trainer(tmp_path, callbacks=[], max_epochs=2)
    made.fit(Inputs(), data)
    data.start(1)
    made.fit_loop.max_epochs = 4
    made.callbacks.append(Save(tmp_path))
    made.fit(Inputs(), data)
    first, steps = tasks.first_step(1), tasks.epochs * tasks.steps_of(1)

    data = tasks.as_datamodule(mode="task")
    again = trainer(tmp_path, callbacks=[seen], max_epochs=4)
    again.fit(Inputs(), data, ckpt_path=tmp_path / f"{first + 3}.ckpt", weights_only=True)
    inputs, _ = expected(tasks)
    assert seen.tasks == [1] * (steps - 3)
    assert all(
        torch.equal(one, other) for one, other in zip(seen.inputs, inputs[first + 3 : first + steps], strict=True)
    )


@pytest.mark.parametrize(
    ("mode", "limit", "epochs"), [("reload", 1.0, 3), ("reload", 4, 9), ("endless", 1.0, 1), ("endless", 4, 8)]
)
def test_training_ends_with_the_stream(mode: str, limit: float, epochs: int, tmp_path: Path) -> None:
    seen = Seen()
    made = trainer(tmp_path, callbacks=[seen], limit_train_batches=limit)
    made.fit(Classifier(plain_mlp(), momentum), stream().as_datamodule(mode=mode))
    assert made.current_epoch == epochs < made.max_epochs
    assert torch.equal(torch.stack(seen.inputs), torch.stack(expected(stream())[0]))


METHODS = {
    "variance injection": (gaussian_mlp, euler_lagrange, lambda: [VarianceInjection(strength=0.7, seed=5)]),
    "continual backprop": (
        plain_mlp,
        momentum,
        lambda: [InterventionCallback(ContinualBackprop(replacement_rate=0.1, maturity=3, seed=5))],
    ),
}


def weights(module: nn.Module) -> torch.Tensor:
    values = module.state_dict().values()  # beside tensors, the settings of Kronecker precisions
    return torch.cat([value.flatten() for value in values if isinstance(value, torch.Tensor)])


def experiment(method: str, mode: str, epochs: int) -> tuple[pl.LightningModule, list[pl.Callback], Any]:
    network, optimizer, callbacks = METHODS[method]
    return (
        Classifier(network(), optimizer),
        [*callbacks(), PlasticityMonitor(every_n_steps=7)],
        stream(epochs).as_datamodule(mode=mode),
    )


@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", ["task", "reload", "endless"])
def test_a_run_that_resumes_ends_with_the_same_weights(
    mode: str, method: str, epochs: int, tmp_path: Path
) -> None:
    model, callbacks, data = experiment(method, mode, epochs)
    start = weights(model)
    run(mode, data, model, callbacks, tmp_path, save=True)
    whole = weights(model)
    assert not torch.equal(start, whole)

    # in the middle of the second task, with its last batch, with the first of the last task
    for number, step in ((1, 4), (1, 10), (2, 1)):
        name = f"{number}/{step}.ckpt" if mode == "task" else f"0/{number * STEPS + step}.ckpt"
        resumed, callbacks_again, data = experiment(method, mode, epochs)
        run(mode, data, resumed, callbacks_again, tmp_path / "again", checkpoint=tmp_path / name)
        torch.testing.assert_close(weights(resumed), whole, rtol=1e-8, atol=0.0)
        watched, again = (callback.state_dict() for callback in (callbacks[1], callbacks_again[1]))
        assert watched["meter"]["sums"]["hits"] == again["meter"]["sums"]["hits"]
        for one, two in zip(watched["meter"]["probes"], again["meter"]["probes"], strict=True):
            assert torch.equal(one[0], two[0])
        assert watched["task"] == again["task"] == 2


# the folder has the checkpoints of the first run, the point of the test
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_resume_from_model_checkpoint(tmp_path: Path) -> None:
    def saver() -> ModelCheckpoint:
        return ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=13, save_top_k=-1)

    ends = []
    for checkpoint in (None, tmp_path / "step=13.ckpt"):
        model, callbacks, data = experiment("variance injection", "reload", 1)
        made = trainer(tmp_path, callbacks=[*callbacks, saver()], enable_checkpointing=True)
        made.fit(model, data, ckpt_path=checkpoint, weights_only=True)
        ends.append(weights(model))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-8, atol=0.0)


def large(precision: str) -> nn.Module:
    return clagrange.gaussianize(mlp(64, [512, 512], 10, seed=1).double(), precision=precision)


@pytest.mark.slow
@pytest.mark.parametrize(
    "network",
    [gaussian_mlp, partial(large, "diagonal"), partial(large, "kronecker")],
    ids=["small", "large", "large, Kronecker"],
)
def test_two_processes_learn_what_one_learns(network: Callable[[], nn.Module], tmp_path: Path) -> None:
    ends = []
    for settings in ({}, {"devices": 2, "strategy": "ddp_fork"}):
        model = Classifier(network(), euler_lagrange)
        callbacks = [VarianceInjection(strength=0.5), PlasticityMonitor(every_n_steps=7)]
        data = stream().as_datamodule(mode="reload")
        trainer(tmp_path, callbacks=callbacks, **settings).fit(model, data)
        ends.append(weights(model))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize("mode", ["reload", "endless"])
def test_a_run_stopped_by_max_steps_goes_on_where_it_stopped(mode: str, tmp_path: Path) -> None:
    model, callbacks, data = experiment("variance injection", mode, 1)
    run(mode, data, model, callbacks, tmp_path)

    stopped, callbacks, data = experiment("variance injection", mode, 1)
    first = trainer(tmp_path, callbacks=callbacks, max_steps=14)
    first.fit(stopped, data)
    first.save_checkpoint(tmp_path / "stopped.ckpt")

    resumed, callbacks, data = experiment("variance injection", mode, 1)
    trainer(tmp_path, callbacks=callbacks, max_steps=30).fit(
        resumed, data, ckpt_path=tmp_path / "stopped.ckpt", weights_only=True
    )
    torch.testing.assert_close(weights(resumed), weights(model), rtol=1e-8, atol=0.0)


def test_a_checkpoint_of_another_mode_is_refused(tmp_path: Path) -> None:
    model = Classifier(plain_mlp(), momentum)
    first = trainer(tmp_path, max_steps=3)
    first.fit(model, stream().as_datamodule(mode="reload"))
    first.save_checkpoint(tmp_path / "reload.ckpt")
    with pytest.raises(ValueError, match="mode: expected 'reload', with which the checkpoint was saved"):
        trainer(tmp_path, max_steps=6).fit(
            model, stream().as_datamodule(mode="endless"), ckpt_path=tmp_path / "reload.ckpt", weights_only=True
        )


def test_processes_share_every_batch() -> None:
    batches = []
    for rank in range(2):
        data = stream().as_datamodule()
        counts = SimpleNamespace(total=SimpleNamespace(completed=13))
        data.trainer = SimpleNamespace(  # a stand-in: two real processes take seconds
            global_rank=rank,
            world_size=2,
            fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=counts)),
        )
        assert data.current_task == 1
        batches.append(next(iter(data.train_dataloader()))[0])
    whole = stream().task(1).inputs[stream().order(1, 0)[3]]
    assert torch.equal(batches[0], whole[0::2])
    assert torch.equal(batches[1], whole[1::2])
    data.trainer.world_size = 3
    with pytest.raises(ValueError, match="batch_size: expected a multiple of the 3 processes, got 4"):
        next(iter(data.train_dataloader()))


def test_bad_arguments() -> None:
    with pytest.raises(
        ValueError, match="mode: expected one of task, reload, endless; got 'relaod'; did you mean"
    ):
        StreamDataModule(PermutedDigits(tasks=2), mode="relaod")
    data = clagrange.tasks.PermutedDigits(tasks=2).as_datamodule(mode="task")
    with pytest.raises(IndexError, match="number: expected a task from 0 to 1, got 2"):
        data.start(2)
    with pytest.raises(RuntimeError, match="start: expected a data module with mode='task', got mode='reload'"):
        PermutedDigits(tasks=2).as_datamodule().start(0)
