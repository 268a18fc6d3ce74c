"""The monitor of the energy: its numbers against a plain loop, resuming, and that training does not notice it."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_runs import Classifier, euler_lagrange, gaussian_mlp, momentum, plain_mlp, trainer
from parity import DoubleDigits
from torch import nn
from torch.nn import functional as F

from clagrange.callbacks import InertiaMonitor
from clagrange.mechanics import InertiaMeter
from clagrange.tasks import PermutedDigits

import lightning.pytorch as pl  # isort: skip
from lightning.pytorch.loggers import CSVLogger  # isort: skip

STEPS = 6


def stream(tasks: int = 2) -> DoubleDigits:
    return DoubleDigits(tasks=tasks, examples=4 * STEPS, batch_size=4, seed=2)


def rows(folder: Path) -> list[dict[str, float]]:
    with next(folder.rglob("metrics.csv")).open() as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def plain_loop(accumulate: int = 1, **settings: Any) -> list[dict[str, float]]:
    """What a meter reads in a loop without any framework, one entry for each step."""
    network = plain_mlp()
    optimizer = momentum(network)
    meter = InertiaMeter(optimizer, **settings)
    found = []
    for number in range(2):
        task = stream().task(number)
        parts = list(stream().order(number, 0))
        for first in range(0, len(parts), accumulate):
            optimizer.zero_grad()
            for chosen in parts[first : first + accumulate]:
                loss = F.cross_entropy(network(task.inputs[chosen]), task.targets[chosen]) / accumulate
                loss.backward()
                meter.observe(loss)
            optimizer.step()
            found.append(meter.reading.as_dict())
    return found


@pytest.mark.parametrize(("accumulate", "noise"), [(1, False), (1, True), (2, False)])
def test_numbers_equal_those_of_a_plain_loop(accumulate: int, noise: bool, tmp_path: Path) -> None:
    monitor = InertiaMonitor(every_n_steps=4, noise=noise)
    made = trainer(
        tmp_path,
        logger=CSVLogger(tmp_path),
        log_every_n_steps=1,
        callbacks=[monitor],
        accumulate_grad_batches=accumulate,
    )
    made.fit(Classifier(plain_mlp(), momentum), stream().as_datamodule())
    expected = plain_loop(accumulate, noise=noise)
    steps = len(expected)
    ends = [end for end in (4, 8, 12) if end <= steps] + ([steps] if steps % 4 else [])
    logged = {
        int(row["step"]) + 1: {key[8:]: value for key, value in row.items() if key.startswith("inertia/")}
        for row in rows(tmp_path)
        if "inertia/energy" in row
    }
    assert sorted(logged) == ends
    for begin, end in zip([0, *ends], ends, strict=False):
        part = [reading for reading in expected[begin:end] if "change" in reading]
        entry = {name: expected[end - 1][name] for name in ("kinetic", "potential", "energy")}
        for name in ("change", "predicted", "damping", "noise", "defect"):
            entry[name] = sum(reading[name] for reading in part)
        entry["surprise"] = max((reading["surprise"] for reading in part), key=abs)
        assert logged[end] == pytest.approx(entry, rel=1e-6, abs=1e-12)
        if begin:
            assert entry["energy"] - expected[begin - 1]["energy"] == pytest.approx(entry["change"])
    last = {f"inertia/{name}": value for name, value in logged[ends[-1]].items()}
    assert {name: float(made.callback_metrics[name]) for name in last} == pytest.approx(last, rel=1e-5)


def test_manual_optimization(tmp_path: Path) -> None:
    class Manual(Classifier):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    monitor = InertiaMonitor()
    trainer(tmp_path, callbacks=[monitor]).fit(Manual(plain_mlp(), momentum), stream().as_datamodule())
    assert monitor.meter.reading.as_dict() == pytest.approx(plain_loop()[-1])


@pytest.mark.parametrize(
    ("make_network", "make_optimizer"),
    [
        (plain_mlp, momentum),
        (gaussian_mlp, euler_lagrange),
        (plain_mlp, lambda net: torch.optim.Adam(net.parameters())),
    ],
)
def test_training_does_not_notice_it(make_network: Any, make_optimizer: Any, tmp_path: Path) -> None:
    ends = []
    for monitored in (False, True):
        model = Classifier(make_network(), make_optimizer)
        monitor = InertiaMonitor(every_n_steps=1)
        torch.manual_seed(9)
        made = trainer(tmp_path, callbacks=[monitor] if monitored else [])
        made.fit(model, stream().as_datamodule())
        ends.append([*model.state_dict().values(), torch.get_rng_state()])
    for alone, watched in zip(*ends, strict=True):
        assert torch.equal(alone, watched)
    assert all(torch.isfinite(value) for value in made.callback_metrics.values())
    assert {"inertia/energy", "inertia/predicted", "inertia/change", "inertia/defect"} <= set(
        made.callback_metrics
    )
    assert not made.optimizers[0]._optimizer_step_pre_hooks
    assert not made.optimizers[0]._optimizer_step_post_hooks


def test_a_run_that_resumes_reads_what_an_unbroken_one_reads(tmp_path: Path) -> None:
    whole = InertiaMonitor(every_n_steps=5)
    trainer(tmp_path, callbacks=[whole]).fit(Classifier(plain_mlp(), momentum), stream(1).as_datamodule())

    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "at3.ckpt")
                raise KeyboardInterrupt

    broken = trainer(tmp_path, callbacks=[InertiaMonitor(every_n_steps=5), Stop()])
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        broken.fit(Classifier(plain_mlp(), momentum), stream(1).as_datamodule())
    assert torch.load(tmp_path / "at3.ckpt", weights_only=True)["global_step"] == 3

    again = InertiaMonitor(every_n_steps=5)
    made = trainer(tmp_path, callbacks=[again])
    made.fit(Classifier(plain_mlp(), momentum), stream(1).as_datamodule(), ckpt_path=tmp_path / "at3.ckpt")
    assert again.meter.steps == STEPS
    assert again.meter.reading == whole.meter.reading


def test_a_new_fit_begins_a_new_run(tmp_path: Path) -> None:
    monitor = InertiaMonitor()
    model = Classifier(plain_mlp(), momentum)
    for steps in (STEPS, 2 * STEPS):
        trainer(tmp_path, callbacks=[monitor]).fit(model, stream(1).as_datamodule())
        assert monitor.meter.steps == steps
    first = InertiaMonitor()
    trainer(tmp_path, callbacks=[first], max_steps=1).fit(model, stream(1).as_datamodule())
    assert first.meter.reading.change is None


def test_several_optimizers_and_bad_numbers_are_refused(tmp_path: Path) -> None:
    class Two(Classifier):
        def __init__(self) -> None:
            super().__init__(plain_mlp(), momentum)
            self.automatic_optimization = False

        def configure_optimizers(self) -> Any:
            return [momentum(self.net), momentum(nn.Linear(2, 2))]

    with pytest.raises(ValueError, match="trainer: expected a LightningModule with one optimizer, got 2"):
        trainer(tmp_path, callbacks=[InertiaMonitor()]).fit(Two(), stream(1).as_datamodule())
    with pytest.raises(ValueError, match="every_n_steps: expected a number in"):
        InertiaMonitor(every_n_steps=0)
    with pytest.raises(ValueError, match="law: expected one of"):
        InertiaMonitor(law="none")
    assert InertiaMonitor(name="a").state_key == "InertiaMonitor[a]"


def test_the_loss_is_unscaled_under_mixed_precision(tmp_path: Path) -> None:
    """With a gradient scaler `backward` is called on the scaled loss; gradients are unscaled before the step."""
    from lightning.pytorch.plugins.precision import MixedPrecision

    class Watch(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            if monitor.meter.reading is not None:
                losses.append(monitor.meter.reading.loss)

    readings, steps, losses = [], [], []
    for scale in (1.0, 1024.0, 2.0**24):
        plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=scale))
        monitor = InertiaMonitor()
        network = plain_mlp().float()
        made = trainer(tmp_path, callbacks=[monitor, Watch()], plugins=[plugin])
        made.fit(
            Classifier(network, momentum), PermutedDigits(tasks=1, examples=96, batch_size=4).as_datamodule()
        )
        readings.append(monitor.meter.reading.as_dict())
        steps.append(monitor.meter.steps)
    assert max(losses) < 4.0
    assert steps[0] == steps[1] == 24
    assert 0 < steps[2] < 24  # steps whose gradients overflowed were left out, and their losses with them
    assert readings[1] == pytest.approx(readings[0], rel=0.05, abs=0.01)
