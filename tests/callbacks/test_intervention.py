"""The callback that carries interventions: its moments, how it notices switches, parity, resuming."""

import copy
import pickle
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_runs import Classifier, Recorder, euler_lagrange, gaussian_mlp, momentum, plain_mlp, trainer
from parity import DoubleDigits, plain_loop
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import clagrange
from clagrange import interventions
from clagrange.callbacks import InterventionCallback, PlasticityMonitor, StreamDataModule, VarianceInjection

import lightning.pytorch as pl  # isort: skip
from lightning.pytorch.cli import LightningCLI  # isort: skip

STEP = ["gradient", "step"]


def stream(tasks: int = 2, steps: int = 3) -> DoubleDigits:
    return DoubleDigits(tasks=tasks, examples=4 * steps, batch_size=4)


def fit(model: pl.LightningModule, data: Any, callback: pl.Callback, folder: Path, **settings: Any) -> pl.Trainer:
    made = trainer(folder, callbacks=[callback], **settings)
    made.fit(model, data)
    return made


# ------------------------------------------------------------------------------------------------- moments
def test_moments_stand_around_every_step(tmp_path: Path) -> None:
    recorder = Recorder()
    model = Classifier(plain_mlp(), momentum)
    data = stream().as_datamodule()
    made = fit(model, data, InterventionCallback(recorder), tmp_path, reload_dataloaders_every_n_epochs=1)
    assert recorder.events == ["start", *3 * STEP, "switch", *3 * STEP]
    assert {id(optimizer) for optimizer in recorder.optimizers} == {id(made.optimizers[0])}
    changed = [not torch.equal(a, b) for a, b in zip(recorder.weights, recorder.weights[1:], strict=False)]
    after_a_gradient = [event == "gradient" for event in recorder.events[:-1]]
    assert changed == after_a_gradient  # weights move from "gradient" to "step" and nowhere else


def test_accumulated_batches_are_one_step(tmp_path: Path) -> None:
    recorder = Recorder()
    data = stream(1, steps=8).as_datamodule()
    fit(
        Classifier(plain_mlp(), momentum),
        data,
        InterventionCallback(recorder),
        tmp_path,
        accumulate_grad_batches=3,
    )
    assert recorder.events == ["start", *3 * STEP]  # after 3, 6 and the last of 8 batches


def test_manual_optimization(tmp_path: Path) -> None:
    class Manual(Classifier):
        def __init__(self) -> None:
            super().__init__(plain_mlp(), momentum)
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    recorder = Recorder()
    fit(Manual(), stream().as_datamodule(), InterventionCallback(recorder), tmp_path)
    assert recorder.events == ["start", *3 * STEP, "switch", *3 * STEP]


def test_an_optimizer_that_calls_its_base_class_steps_once(tmp_path: Path) -> None:
    class Derived(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    fired = []
    momentum(nn.Linear(1, 1))  # from here on torch runs the hooks in SGD.step too
    derived = Derived(nn.Linear(1, 1).parameters(), lr=0.1)
    derived.register_step_post_hook(lambda *_: fired.append(1))
    derived.step()
    assert len(fired) == 2  # what the callback has to cope with

    recorder = Recorder()
    model = Classifier(plain_mlp(), lambda network: Derived(network.parameters(), lr=0.1))
    fit(model, stream(1).as_datamodule(), InterventionCallback(recorder), tmp_path)
    assert recorder.events == ["start", *3 * STEP]


def test_the_optimizer_is_left_alone_after_training(tmp_path: Path) -> None:
    class Breaks(Recorder):
        def on_switch(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
            raise RuntimeError("broken")

    for recorder in (Recorder(), Breaks()):
        network = plain_mlp()
        optimizer = momentum(network)
        model = Classifier(network, lambda _, optimizer=optimizer: optimizer)
        callback = InterventionCallback(recorder)
        if isinstance(recorder, Breaks):
            with pytest.raises(RuntimeError, match="broken"):
                fit(model, stream().as_datamodule(), callback, tmp_path)
        else:
            fit(model, stream().as_datamodule(), callback, tmp_path)
        seen = len(recorder.events)
        optimizer.step()
        assert len(recorder.events) == seen


def test_normalised_inputs_stay_normalised_where_a_loaded_network_is_only_tested(tmp_path: Path) -> None:
    class Tested(Classifier):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.output = self.net(batch[0])

    model = Tested(plain_mlp(), momentum)
    callback = InterventionCallback(interventions.InputNormalization())
    fit(model, stream().as_datamodule(), callback, tmp_path).save_checkpoint(tmp_path / "end.ckpt")
    inputs = stream().task(0).inputs
    expected = model.net.eval()(inputs)

    loaded = Tested(plain_mlp(), momentum)
    fresh = InterventionCallback(interventions.InputNormalization())
    trainer(tmp_path, callbacks=[fresh]).test(
        loaded, SizedBatches([(inputs,)]), ckpt_path=tmp_path / "end.ckpt", verbose=False, weights_only=True
    )
    torch.testing.assert_close(loaded.output, expected)
    with torch.no_grad():
        assert not torch.allclose(collapsed(loaded.net)(inputs), expected)


def collapsed(network: nn.Module) -> nn.Module:
    """The same weights without hooks."""
    bare = plain_mlp()
    bare.load_state_dict(network.state_dict())
    return bare


# ------------------------------------------------------------------------------------------------ switches
class SizedBatches:
    """Ready batches with a length."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


class Endless:
    """Batches that carry the task, without length: Lightning fetches one in advance."""

    def __init__(self, form: str) -> None:
        self.form = form

    def __iter__(self) -> Iterator[Any]:
        for number in (7, 8, 9):
            task = stream(1).task(0)
            for chosen in stream(1).order(0, 0):
                inputs, targets = task.inputs[chosen], task.targets[chosen]
                if self.form == "number":
                    yield inputs, targets, number
                elif self.form == "tensor":
                    yield inputs, targets, torch.full((4,), number)
                else:
                    yield {"inputs": inputs, "targets": targets, "task": str(number)}


class OfMappings(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if isinstance(batch, dict):
            batch = batch["inputs"], batch["targets"]
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("form", ["number", "tensor", "mapping"])
def test_the_task_comes_from_the_batch_that_is_trained_on(form: str, tmp_path: Path) -> None:
    recorder = Recorder()
    callback = InterventionCallback(recorder)
    fit(OfMappings(plain_mlp(), momentum), Endless(form), callback, tmp_path, max_epochs=1)
    assert recorder.events == ["start", *3 * STEP, "switch", *3 * STEP, "switch", *3 * STEP]
    assert callback.task == ("9" if form == "mapping" else 9)


class DoubleTurns(clagrange.tasks.RotatedMNIST):
    """Turning digits in float64."""

    def task(self, number: int) -> clagrange.tasks.Task:
        task = super().task(number)
        return clagrange.tasks.Task(task.inputs.double().flatten(1), task.targets)


@pytest.mark.parametrize(("drift", "switches"), [("gradual", 0), ("abrupt", 2)])
@pytest.mark.parametrize("mode", ["task", "reload", "endless"])
def test_switches_that_a_stream_hides_are_not_announced(
    mode: str, drift: str, switches: int, tmp_path: Path
) -> None:
    turning = DoubleTurns("digits", tasks=3, examples=12, batch_size=4, drift=drift)
    recorder, monitor = Recorder(), PlasticityMonitor(every_n_steps=1)
    callback, data = InterventionCallback(recorder), turning.as_datamodule(mode=mode)
    model = Classifier(plain_mlp(), momentum)
    for number in range(3 if mode == "task" else 1):
        if mode == "task":
            data.start(number)
        epochs = {"max_epochs": 1} if mode == "task" else {}
        trainer(tmp_path, callbacks=[callback, monitor], **epochs).fit(model, data)
    assert recorder.events.count("step") == 9
    assert recorder.events.count("switch") == switches
    assert (callback.task, monitor.task) == (2, 2)  # who measures knows the task


# no worker processes: the data are four rows in memory
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_without_anything_that_names_tasks_every_fit_is_one(tmp_path: Path) -> None:
    recorder = Recorder()
    callback = InterventionCallback(recorder)
    model = Classifier(plain_mlp(), momentum)
    for number in range(3):
        task = stream(3).task(number)
        loader = DataLoader(TensorDataset(task.inputs, task.targets), batch_size=6)
        fit(model, loader, callback, tmp_path, max_epochs=2)
    assert recorder.events == ["start", *4 * STEP, "start", "switch", *4 * STEP, "start", "switch", *4 * STEP]


def test_a_fit_that_resumes_is_no_new_task(tmp_path: Path) -> None:
    task = stream(1).task(0)
    batches = SizedBatches([(task.inputs[:4], task.targets[:4])] * 3)
    model = Classifier(plain_mlp(), momentum)
    first = fit(model, batches, InterventionCallback(Recorder()), tmp_path, max_epochs=1)
    first.save_checkpoint(tmp_path / "end.ckpt")
    recorder = Recorder()
    callback = InterventionCallback(recorder)
    again = trainer(tmp_path, callbacks=[callback], max_epochs=2)
    again.fit(model, batches, ckpt_path=tmp_path / "end.ckpt", weights_only=True)
    assert recorder.events == ["start", *3 * STEP]
    fit(model, batches, callback, tmp_path, max_epochs=1)
    assert recorder.events[-8:] == ["start", "switch", *3 * STEP]


def test_a_trainer_that_is_used_again(tmp_path: Path) -> None:
    recorder = Recorder()
    data = stream(3).as_datamodule(mode="task")
    made = trainer(tmp_path, callbacks=[InterventionCallback(recorder)], max_epochs=0)
    for number in range(3):
        data.start(number)
        made.fit_loop.max_epochs += 1
        made.fit(Classifier(plain_mlp(), momentum), data)
    assert recorder.events == ["start", *3 * STEP, *2 * ["start", "switch", *3 * STEP]]


@pytest.mark.parametrize(
    ("switch_on", "switches"), [("auto", 2), ("batch", 2), ("datamodule", 1), ("fit", 0), ("never", 0)]
)
def test_where_the_task_is_read_off(switch_on: str, switches: int, tmp_path: Path) -> None:
    class Data(pl.LightningDataModule):
        @property
        def current_task(self) -> str:  # its own idea of tasks: the first half, the second half
            return "early" if self.trainer.global_step < 5 else "late"

        def train_dataloader(self) -> Endless:
            return Endless("number")

    recorder = Recorder()
    callback = InterventionCallback(recorder, switch_on=switch_on)
    fit(Classifier(plain_mlp(), momentum), Data(), callback, tmp_path, max_epochs=1)
    assert recorder.events.count("switch") == switches


def test_a_subclass_says_what_a_task_is(tmp_path: Path) -> None:
    class EveryTwoSteps(InterventionCallback):
        def task_of(self, trainer: pl.Trainer, batch: Any) -> int:
            return trainer.global_step // 2

    recorder = Recorder()
    data = stream(1, steps=5).as_datamodule()
    fit(Classifier(plain_mlp(), momentum), data, EveryTwoSteps(recorder), tmp_path)
    assert recorder.events == ["start", *2 * STEP, "switch", *2 * STEP, "switch", *STEP]


def test_batches_that_do_not_say_one_task(tmp_path: Path) -> None:
    inputs, targets = stream().task(0).inputs[:4], stream().task(0).targets[:4]
    for switch_on, batch, message in (
        (
            "auto",
            (inputs, targets, torch.arange(4)),
            "task: expected batches of one task each, got entries from 0",
        ),
        ("batch", (inputs, targets), "switch_on: expected batches (inputs, targets, task) or with an entry"),
        ("batch", (inputs, targets, torch.ones(4)), "switch_on: expected batches (inputs, targets, task)"),
        ("datamodule", (inputs, targets), "switch_on: expected a data module with the attribute current_task"),
    ):
        callback = InterventionCallback(Recorder(), switch_on=switch_on)
        with pytest.raises(ValueError, match=re.escape(message)):
            fit(Classifier(plain_mlp(), momentum), SizedBatches([batch]), callback, tmp_path, max_epochs=1)


# ----------------------------------------------------------------------------------------------- arguments
def test_which_submodule_is_the_network(tmp_path: Path) -> None:
    class Two(Classifier):
        def __init__(self) -> None:
            super().__init__(plain_mlp(), momentum)
            self.other = nn.Linear(1, 1)
            self.loss = nn.CrossEntropyLoss()  # no parameters: never a candidate

    data = stream().as_datamodule()
    for network, message in (
        (None, "network: cannot tell which submodule of Two is the network, 2 have parameters (net, other)"),
        ("nte", "network: expected the name of a submodule of Two (net, other), got 'nte'; did you mean 'net'?"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            fit(Two(), data, InterventionCallback(Recorder(), network=network), tmp_path)
    model = Two()
    for network, expected in (("net", model.net), ("net.1", model.net[1]), ("", model)):
        assert InterventionCallback([], network=network).network_of(model) is expected
    assert InterventionCallback([]).network_of(Classifier(model.net, momentum)) is model.net


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"interventions: expected instances of .*Intervention, got 3"):
        InterventionCallback([3])
    with pytest.raises(ValueError, match=r"switch_on: expected one of auto, .*; got 'fits'; did you mean 'fit'"):
        InterventionCallback([], switch_on="fits")
    with pytest.raises(ValueError, match="strength: expected a number in"):
        VarianceInjection(strength=2.0)

    class TwoOptimizers(Classifier):
        def configure_optimizers(self) -> Any:
            return [momentum(self.net), momentum(self.net)]

    model = TwoOptimizers(plain_mlp(), momentum)
    model.automatic_optimization = False
    with pytest.raises(ValueError, match="expected a LightningModule with one optimizer, got 2"):
        fit(model, stream().as_datamodule(), InterventionCallback([]), tmp_path)


def test_two_of_a_kind_need_a_name(tmp_path: Path) -> None:
    lower, upper = VarianceInjection(layers=["1"]), VarianceInjection(layers=["3"])
    with pytest.raises(RuntimeError, match="state_key"):
        trainer(tmp_path, callbacks=[lower, upper])
    trainer(tmp_path, callbacks=[lower, VarianceInjection(layers=["3"], name="upper")])
    recorders = InterventionCallback(Recorder()), InterventionCallback(interventions.FullReset())
    assert recorders[0].state_key == "InterventionCallback[Recorder]"
    trainer(tmp_path, callbacks=[*recorders, lower, PlasticityMonitor()])


def test_a_callback_is_copied_and_pickled(tmp_path: Path) -> None:
    callback = VarianceInjection(strength=0.4, seed=2)
    fit(Classifier(gaussian_mlp(), euler_lagrange), stream().as_datamodule(), callback, tmp_path)
    for copied in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert copied.task == 1
        model = Classifier(gaussian_mlp(), euler_lagrange)
        fit(model, stream().as_datamodule(), copied, tmp_path)
        assert torch.equal(
            copied.state_dict()["interventions"][0]["generators"][0], advanced(callback, 2, tmp_path)
        )


def advanced(callback: VarianceInjection, injections: int, folder: Path) -> Tensor:
    """The state of the random stream of a copy of the callback after further injections."""
    intervention = copy.deepcopy(callback.interventions[0])
    network = gaussian_mlp()
    intervention.on_start(network, euler_lagrange(network))
    for _ in range(injections):
        intervention.on_switch(network, euler_lagrange(network))
    return intervention.state_dict()["generators"][0]


# -------------------------------------------------------------------------------------------------- parity
PARITY = {
    "EulerLagrange + VarianceInjection": (
        gaussian_mlp,
        euler_lagrange,
        lambda: [interventions.VarianceInjection(strength=0.5, seed=11)],
    ),
    "SGD + ContinualBackprop": (
        plain_mlp,
        momentum,
        lambda: [interventions.ContinualBackprop(replacement_rate=0.05, maturity=5, seed=11)],
    ),
    "SGD + L2Init + ShrinkAndPerturb": (
        plain_mlp,
        momentum,
        lambda: [interventions.L2Init(0.01), interventions.ShrinkAndPerturb(0.01, 0.01, seed=11)],
    ),
}


@pytest.mark.parametrize("mode", ["reload", "endless"])
@pytest.mark.parametrize("method", PARITY)
def test_lightning_gives_the_weights_of_a_plain_loop(method: str, mode: str, tmp_path: Path) -> None:
    make_network, make_optimizer, make_interventions = PARITY[method]
    tasks = stream(tasks=2, steps=25)
    network = make_network()
    plain_loop(network, make_optimizer(network), make_interventions(), tasks, 2)

    model = Classifier(make_network(), make_optimizer)
    untouched = [parameter.detach().clone() for parameter in model.net.parameters()]
    data = tasks.as_datamodule(mode=mode)
    made = fit(model, data, InterventionCallback(make_interventions()), tmp_path)
    assert made.global_step == 50
    for name, value in network.state_dict().items():
        torch.testing.assert_close(model.net.state_dict()[name], value, rtol=1e-8, atol=1e-14)
    assert all(not torch.equal(a, b) for a, b in zip(untouched, network.parameters(), strict=True))


# --------------------------------------------------------------------------------------------------- usage
def test_ten_lines(tmp_path: Path) -> None:
    class Digits(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = clagrange.gaussianize(clagrange.networks.mlp(64, [32], 10))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return clagrange.optim.EulerLagrange(self.net, lr=6e-3, temperature=1e-4)

    data = clagrange.tasks.PermutedDigits(tasks=2, examples=1600).as_datamodule()
    callbacks = [clagrange.callbacks.VarianceInjection(strength=0.3), clagrange.callbacks.PlasticityMonitor()]
    made = trainer(tmp_path, max_epochs=2, callbacks=callbacks)
    made.fit(Digits(), data)
    assert made.callback_metrics["plasticity/online_accuracy"] > 0.3


# Lightning 2.6 calls an older name of jsonargparse's
@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
def test_lightning_cli_makes_callbacks_and_streams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Digits(Classifier):
        def __init__(self) -> None:
            super().__init__(gaussian_mlp(), euler_lagrange)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step([batch[0].double(), batch[1]], batch_idx)

    config = tmp_path / "config.yaml"
    config.write_text(
        f"""
        seed_everything: false
        trainer:
          accelerator: cpu
          max_epochs: 2
          logger: false
          enable_checkpointing: false
          enable_progress_bar: false
          enable_model_summary: false
          default_root_dir: {tmp_path}
          callbacks:
            - class_path: clagrange.callbacks.VarianceInjection
              init_args: {{strength: 0.2, layers: ["1"], seed: 4}}
            - class_path: clagrange.callbacks.PlasticityMonitor
              init_args: {{every_n_steps: 5}}
            - class_path: clagrange.callbacks.InterventionCallback
              init_args:
                interventions:
                  - class_path: clagrange.interventions.L2Init
                    init_args: {{strength: 0.1}}
        data:
          stream:
            class_path: clagrange.tasks.PermutedDigits
            init_args: {{tasks: 2, examples: 20}}
        """
    )
    monkeypatch.setattr(sys, "argv", ["run", "--config", str(config)])
    cli = LightningCLI(Digits, StreamDataModule, run=False, save_config_callback=None)
    injection, monitor, l2 = (
        next(callback for callback in cli.trainer.callbacks if type(callback) is kind)
        for kind in (VarianceInjection, PlasticityMonitor, InterventionCallback)
    )
    assert (injection.interventions[0].strength, injection.interventions[0].layers) == (0.2, ["1"])
    assert monitor.every_n_steps == 5
    assert l2.interventions[0].strength == 0.1
    cli.trainer.fit(cli.model, cli.datamodule)
    assert injection.task == 1
