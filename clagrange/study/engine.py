"""One method on one stream: all seeds as replicas of one batched run."""

import functools
import itertools
import math
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clagrange._checks import Number
from clagrange._modes import evaluating
from clagrange.interventions import Intervention
from clagrange.metrics import initial_parameters, measure
from clagrange.metrics.calibration_bins import binned_calibration_error, brier_scores, calibration_bins
from clagrange.metrics.plasticity import hits, plasticity_of_samples
from clagrange.networks import LOSS_GRADIENTS, LOSSES, build
from clagrange.optim.perceptron_sgd import PerceptronSGD, perceptron
from clagrange.optim.stacked import rates_of_plain_sgd
from clagrange.replicas import stack, stepping_in_backward
from clagrange.study.capture import StepReplay, graphs_of
from clagrange.study.clock import Clock
from clagrange.study.files import FileProblem, replacing
from clagrange.study.methods import Method
from clagrange.study.results import AFTER_A_TASK, BEFORE_A_TASK, BY_LAYER, METRICS, MethodResult
from clagrange.tasks import Task, TaskStream

PROBE = 256
"""Examples of a task, drawn at random once for all, on which the network is measured."""

MATRIX_TASKS = 50
"""Number of tasks up to which the accuracy on the test examples of every task is measured after every task."""

TEST = 1_000
"""Test examples of a task, drawn likewise, on which accuracy is measured."""

TOGETHER = 32
"""Batches whose predictions are counted in one go."""

UNTIMED = 5
"""Steps before those of a trial: the first ones compile, capture, and fetch memory."""

CHUNK = 1 << 20
"""How many input values of all replicas are made at once: fewer than a CPU's caches hold."""

GPU_CHUNK = 1 << 27
"""The same on a GPU, half a GiB: to make them costs the host some microseconds for each replica and chunk."""


class Resumable(ABC):
    """What goes on from a checkpoint between two tasks."""

    device: torch.device

    @abstractmethod
    def state(self, key: str) -> dict[str, Any]:
        """All that a checkpoint between two tasks holds; ``key`` says which settings it belongs to."""

    @abstractmethod
    def load_state(self, checkpoint: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""

    def save(self, path: Path, key: str) -> None:
        """Write a checkpoint between two tasks; ``key`` says which settings it belongs to."""
        with replacing(path) as partial:
            torch.save(self.state(key), partial)

    def load(self, path: Path, key: str) -> None:
        """Go on from a checkpoint.

        Raises:
            FileProblem: if it is damaged, or belongs to other settings.
        """
        checkpoint = read_checkpoint(path, self.device)
        if checkpoint["key"] != key:
            raise FileProblem(
                f"{path}: expected a checkpoint of these settings and this version of clagrange, got another; "
                f"remove it and run again with --resume"
            )
        self.load_state(checkpoint)


class Run(Resumable):
    """A method on a stream, one replica for each seed, one task at a time.

    Replica r sees the stream of seed r, starts from the weights of seed r, and has random streams of its own,
    so that every method meets the same data in the same order from the same start, and each replica's numbers
    are those of a run alone.

    Accuracy and loss are those of each batch before the step on it. Where a method trains with drawn weights
    (`Method.samples_weights`) they are measured at the means, by a forward pass of their own, which as evaluation
    does not count in ``seconds``. Where targets are numbers there is no accuracy: it is NaN. Where tasks say
    which classes take part, the other outputs are left out of loss and accuracy. Predictions are counted, for
    accuracy, calibration error and Brier score, many batches at a time and off the clock.

    Where SGD has neither momentum nor decay, and no intervention asks for gradients, linear layers take their
    step in the backward pass, see `clagrange.replicas.stepping_in_backward`; perceptrons whose activations nobody
    looks at are trained without a graph, see `clagrange.optim.perceptron_sgd`. On a GPU a step of each task is
    captured and replayed, as far as it is the same each time; see `clagrange.study.capture`.

    A replica whose loss is not finite has diverged. It is frozen: its weights go back to the initial ones and
    stay there, its accuracy counts as 0, and of all else it has no number from that task on. The others do not
    notice.

    Args:
        method: the method; its numbers may be tensors of shape (R,).
        streams: one for each replica, of one shape.
        network: settings of `clagrange.networks.build`; or the widths of the hidden layers of an MLP.
        measured: whether to measure more than online accuracy and loss; a search does not.
        sharpness_every: tasks from one measurement of the sharpness to the next, which takes up to some hundred
            passes of 256 examples; default: never.
        sample_plasticity_every: tasks from one measurement of the sample plasticity to the next, which takes two
            further forward passes of every batch of the task, with SGD up to as much time as training; default:
            never.
        dtype: of the network.
        device: where to train.
    """

    def __init__(
        self,
        method: Method,
        streams: Sequence[TaskStream],
        network: Mapping[str, Any] | Sequence[int],
        *,
        measured: bool = True,
        sharpness_every: int | None = None,
        sample_plasticity_every: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.streams = list(streams)
        self.device = torch.device(device)
        first = self.streams[0]
        self.loss = LOSSES[first.loss]
        seeds = [stream.seed for stream in streams]
        settings = network if isinstance(network, Mapping) else {"kind": "mlp", "hidden": network}
        networks = [build(settings, first.input_shape, first.classes, seed=seed) for seed in seeds]
        self.network = stack(networks).to(self.device, dtype)
        method.prepare(self.network, seeds)
        self.samples_weights = method.samples_weights
        self.optimizer = method.optimizer(self.network)
        graphs = graphs_of(self.device)
        self._replay = None if graphs is None else StepReplay(self.network, self.optimizer, graphs)
        self.interventions: list[Intervention] = method.interventions(seeds)
        self._rates_in_backward: dict[Tensor, Number] = {}
        self._perceptron: PerceptronSGD | None = None
        if not any(intervention.needs_gradients for intervention in self.interventions):
            self._rates_in_backward = rates_of_plain_sgd(self.network, self.optimizer)
        self.dtype = dtype
        self.next_task = 0
        self._clock = Clock(self.device)
        self.measured = measured
        self.sharpness_every = sharpness_every
        self.sample_plasticity_every = sample_plasticity_every
        self._elapsed: list[float] = []
        self._follows_samples = False
        self._uncounted: list[tuple[Tensor, Tensor, Tensor]] = []
        self._sums: dict[str, Tensor] = {}
        self._initial = initial_parameters(self.network)
        self._left_out: Tensor | None = None
        self.diverged = torch.zeros(len(seeds), dtype=torch.bool, device=self.device)
        self._any_diverged = False
        self.metrics = {name: np.full((len(seeds), first.tasks), np.nan) for name in METRICS}
        self._matrix: np.ndarray | None = None
        tested = measured and first.loss == "cross_entropy" and first.tasks <= MATRIX_TASKS
        if tested and first.task(0).test is not None:
            self._matrix = np.full((len(seeds), 1 + first.tasks, first.tasks), np.nan)

    def run_task(self, on_step: Callable[[], None] | None = None) -> None:
        """Train on the next task, measuring before, during and after.

        Args:
            on_step: called after each step; weights may still wait for it then, see `PerceptronSGD`.
        """
        number, first = self.next_task, self.streams[0]
        tasks = self._tasks(number)
        if number == 0:
            self._measure_test_accuracies(0)
        self._left_out = self._outputs_left_out(tasks)
        with self._clock.running():
            for intervention in self.interventions:
                if number == 0:
                    intervention.on_start(self.network, self.optimizer)
                elif not first.hidden_switches:
                    intervention.switch_announced(self.network, self.optimizer)
        if self.measured:
            self._measure(tasks, BEFORE_A_TASK)
        self._follows_samples = self.measured and _is_turn(number + 1, self.sample_plasticity_every)
        self._sums, self._uncounted = {}, []
        self._prepare_steps()
        for epoch in range(first.epochs):
            for inputs, targets in self._chunks(tasks, number, epoch):
                self._make_steps(zip(inputs, targets, strict=True), on_step)
                self._mark_diverged(~self._sums["loss"].isfinite())
        if self._replay is not None:
            self._replay.end()
        self._count()
        self._note_counts(first.steps_of(number) * first.epochs * first.batch_size)
        if self.measured:
            self._measure_after(tasks)
        self._elapsed.append(self.seconds)
        self.next_task += 1

    def try_steps(self, steps: int) -> float:
        """Mean seconds of a training step on the first batches of the first task; this run is spoilt by it."""
        batches, targets = next(self._chunks(self._tasks(0), 0, 0))
        for intervention in self.interventions:
            intervention.on_start(self.network, self.optimizer)
        self._prepare_steps()
        several = itertools.cycle(zip(batches, targets, strict=True))
        seconds = []
        for count in (UNTIMED, steps):
            before = self.seconds
            self._make_steps(itertools.islice(several, count))
            seconds.append(self.seconds - before)
        if self._replay is not None:
            self._replay.end()
        return seconds[-1] / steps

    def _measure_after(self, tasks: Sequence[Task]) -> None:
        """Measure what a task has come to."""
        done = self.next_task + 1
        left_out = {"task_accuracy"} if _is_turn(done, self.sharpness_every) else {"task_accuracy", "sharpness"}
        self._measure(tasks, [name for name in (*AFTER_A_TASK, BY_LAYER) if name not in left_out])
        if self.streams[0].loss == "cross_entropy":
            self._note("task_accuracy", self._accuracy([task.test or task for task in tasks], TEST))
        self._measure_test_accuracies(done)

    def _tasks(self, number: int) -> list[Task]:
        """A task of every replica; a search shares streams."""
        made = {id(stream): stream.task(number).to(self.device) for stream in self.streams}
        return [made[id(stream)] for stream in self.streams]

    def _step(self, inputs: Tensor, targets: Tensor) -> None:
        """One training step; what was predicted before it waits to be counted."""
        before = self._logits_at_mean(inputs) if self.samples_weights or self._follows_samples else None
        logits, losses = self._train(inputs, targets)
        if self._any_diverged:
            self._freeze()
        if self._follows_samples and before is not None:
            with self._clock.stopped():
                self._count_gain(before, inputs, targets)
        if self.samples_weights and before is not None:
            logits, losses = before, self.loss(before, targets, reduction="none")
        self._add("loss", losses.sum(1))
        self._uncounted.append((logits, losses, targets))
        if len(self._uncounted) == TOGETHER:
            with self._clock.stopped():
                self._count()

    def _train(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """One step of the optimizer and what interventions do about it: logits and losses before it."""
        if self._replay is None:
            logits, losses = self._passes(inputs, targets)
            self._update(losses)
        else:
            logits, losses = self._replay(self._passes, self._update, inputs, targets)
        for intervention in self.interventions:
            intervention.step_taken(self.network, self.optimizer)
        return logits, losses

    def _passes(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Forward and backward pass, in which plain SGD takes its step: logits and losses before it."""
        if self._perceptron is not None:
            logits = _masked(self._perceptron.outputs(inputs), self._left_out)
            losses, gradient = LOSS_GRADIENTS[self.streams[0].loss](logits, targets)
            self._perceptron.step(gradient.div_(losses.shape[1]))
            return logits, losses
        self.optimizer.zero_grad()
        logits = _masked(self.network(inputs), self._left_out)
        losses = self.loss(logits, targets, reduction="none")
        with stepping_in_backward(self._rates_in_backward):
            losses.backward(torch.full_like(losses, 1.0 / losses.shape[1]))  # of the sum of the mean losses
        return logits.detach(), losses.detach()

    def _update(self, losses: Tensor) -> None:
        """What follows the passes: interventions hear of losses and gradients, the optimizer steps."""
        for intervention in self.interventions:
            intervention.loss_known(self.network, losses.mean(1))
            intervention.gradient_known(self.network, self.optimizer)
        if self._perceptron is None:
            self.optimizer.step()

    def _prepare_steps(self) -> None:
        """Make ready for the steps of the next task."""
        self._perceptron = self._as_perceptron()
        if self._replay is not None:
            first = self.streams[0]
            self._replay.begin(self.interventions, first.steps_of(self.next_task) * first.epochs)

    def _make_steps(
        self, batches: Iterable[tuple[Tensor, Tensor]], on_step: Callable[[], None] | None = None
    ) -> None:
        """Make training steps, on the clock; weights that wait for them are brought up to date in the end."""
        with self._clock.running():
            try:
                for batch, answers in batches:
                    self._step(batch, answers)
                    if on_step is not None:
                        on_step()
            finally:
                if self._perceptron is not None:
                    self._perceptron.settle()

    def _as_perceptron(self) -> PerceptronSGD | None:
        """The network as one that plain SGD trains without a graph; None where that is not all there is to it."""
        layers = perceptron(self.network)
        if layers is None or any(layer.weight not in self._rates_in_backward for layer in layers):
            return None
        if len(self.streams[0].input_shape) > 1 and layers[0] is next(self.network.children()):
            return None
        return PerceptronSGD(layers, self._rates_in_backward, waits=not self.interventions)

    def _mark_diverged(self, bad: Tensor) -> None:
        """Mark replicas as diverged, once for all, and freeze them."""
        if bool((bad & ~self.diverged).any()):
            self._count()
            self.diverged = self.diverged | bad
            self._any_diverged = True
            self._freeze()

    @torch.no_grad()
    def _freeze(self) -> None:
        """Put the weights of the diverged replicas back to the initial ones, which are finite."""
        for name, parameter in self.network.named_parameters():
            parameter[self.diverged] = self._initial[name][self.diverged].to(parameter.dtype)
        if self._perceptron is not None:
            self._perceptron.forget(self.diverged)

    def _outputs_left_out(self, tasks: Sequence[Task]) -> Tensor | None:
        """Which outputs take no part in each replica's task, (R, 1, outputs); None where all take part."""
        if all(task.classes is None for task in tasks):
            return None
        left_out = torch.ones(len(tasks), 1, self.streams[0].classes, dtype=torch.bool, device=self.device)
        for replica, task in zip(left_out, tasks, strict=True):
            replica[0, slice(None) if task.classes is None else task.classes] = False
        return left_out

    def _logits_at_mean(self, inputs: Tensor) -> Tensor:
        """What the network answers in evaluation, off the clock; outputs that take no part are −∞."""
        with self._clock.stopped(), torch.no_grad(), evaluating(self.network):
            answer = self.network if self._perceptron is None else self._perceptron.outputs
            return _masked(answer(inputs), self._left_out)

    def _count(self) -> None:
        """Add what the waiting predictions say of accuracy and calibration."""
        if not self._uncounted:
            return
        logits, losses, targets = (torch.cat(parts, 1) for parts in zip(*self._uncounted, strict=True))
        self._uncounted = []
        if targets.is_floating_point():
            self._add("online_accuracy", torch.full_like(losses[:, 0], torch.nan))
            return
        # a prediction that is not finite is wrong
        right = (logits.argmax(-1) == targets) & losses.isfinite() & ~self.diverged.unsqueeze(1)
        self._add("online_accuracy", right.sum(1))
        if self.measured:
            probabilities = logits.softmax(-1)
            self._add("brier_score", brier_scores(probabilities, targets).sum(-1))
            self._add("calibration_error", calibration_bins(probabilities, targets))

    def _count_gain(self, before: Tensor, inputs: Tensor, targets: Tensor) -> None:
        """Add what a step gained on the examples it was made on."""
        after = self._logits_at_mean(inputs)
        losses = (self.loss(logits, targets, reduction="none") for logits in (before, after))
        self._add("sample_plasticity", plasticity_of_samples(*losses).sum(-1))

    def _add(self, name: str, values: Tensor) -> None:
        wide = values.to(torch.float64)
        self._sums[name] = self._sums[name] + wide if name in self._sums else wide

    def _note_counts(self, examples: int) -> None:
        """Note what was counted over a task of so many examples."""
        for name, sums in self._sums.items():
            error = name == "calibration_error"
            self._note(name, binned_calibration_error(sums) if error else sums / examples)

    def _chunks(self, tasks: Sequence[Task], number: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch, some at once: inputs (steps, R, batch, ...), targets (steps, R, batch).

        The inputs are in memory that the next ones are written to.
        """
        orders = [stream.order(number, epoch) for stream in self.streams]
        first = self.streams[0]
        shape = (first.batch_size, *first.input_shape)
        values = CHUNK if self.device.type == "cpu" else GPU_CHUNK
        steps = max(1, values // (len(tasks) * math.prod(shape)))
        kinds = (task.data.dtype if task.data.is_floating_point() else torch.float32 for task in tasks)
        kind = functools.reduce(torch.promote_types, kinds)
        memory = torch.empty(
            len(tasks), min(steps, len(orders[0])), *shape, dtype=kind, device=tasks[0].data.device
        )
        for start in range(0, len(orders[0]), steps):
            rows = [order[start : start + steps] for order in orders]
            made = memory[:, : len(rows[0])]
            parts = [
                task.batch(order, epoch, out=place)[1]
                for task, order, place in zip(tasks, rows, made, strict=True)
            ]
            targets = torch.stack(parts, 1).to(self.device)
            inputs = made.transpose(0, 1).to(self.device, self.dtype)
            yield inputs, targets.to(self.dtype) if targets.is_floating_point() else targets

    def _measure(self, tasks: Sequence[Task], names: Sequence[str]) -> None:
        """Note measures of the network on examples of a task, off the clock."""
        inputs, targets = self._probe(tasks)
        found = measure(
            self.network,
            inputs,
            targets,
            initial=self._initial,
            names=names,
            losses=lambda outputs, answers: self.loss(
                _masked(outputs, self._left_out), answers, reduction="none"
            ),
        )
        for name, values in found.items():
            self._note(name, values)

    def _measure_test_accuracies(self, row: int) -> None:
        """Fill a row of the matrix: the accuracy on the test examples of every task, with its own outputs."""
        if self._matrix is None:
            return
        for number in range(self.tasks):
            tasks = [task.test for task in self._tasks(number) if task.test is not None]
            self._matrix[:, row, number] = self._accuracy(tasks, TEST).cpu().numpy()

    @torch.no_grad()
    def _accuracy(self, tasks: Sequence[Task], examples: int) -> Tensor:
        """The accuracy of each replica on examples of its task."""
        drawn = [_sample(len(task.targets), examples) for task in tasks]
        counts = torch.tensor([len(rows) for rows in drawn], device=self.device)
        places = torch.arange(max(map(len, drawn)))
        rows = [row[places.clamp(max=len(row) - 1)] for row in drawn]  # the last one stands in for more
        parts = zip(*(task.batch(row) for task, row in zip(tasks, rows, strict=True)), strict=True)
        inputs, targets = map(torch.stack, parts)
        with evaluating(self.network):
            logits = _masked(self.network(inputs.to(self.dtype)), self._outputs_left_out(tasks))
        right = (
            hits(logits, targets) & (places.to(self.device) < counts.unsqueeze(-1)) & ~self.diverged.unsqueeze(-1)
        )
        return right.sum(-1).double() / counts

    def _probe(self, tasks: Sequence[Task]) -> tuple[Tensor, Tensor]:
        """Examples that each replica is trained on in a task: inputs (R, N, ...), targets (R, N)."""
        rows = _sample(len(tasks[0].targets), PROBE)
        parts = zip(*(task.batch(rows) for task in tasks), strict=True)
        inputs, targets = (torch.stack(part).to(self.device) for part in parts)
        return inputs.to(self.dtype), targets.to(self.dtype) if targets.is_floating_point() else targets

    def _note(self, name: str, values: Tensor) -> None:
        if name not in self.metrics:  # of a layer
            self.metrics[name] = np.full((len(self.streams), self.tasks), np.nan)
        if self._any_diverged and name != "online_accuracy":
            values = torch.where(self.diverged, 0.0 if name == "task_accuracy" else torch.nan, values)
        self.metrics[name][:, self.next_task] = values.detach().cpu().double().numpy()

    @property
    def seconds(self) -> float:
        """Seconds of training so far, evaluation left out."""
        return self._clock.seconds

    @property
    def tasks(self) -> int:
        """Number of tasks."""
        return self.streams[0].tasks

    @property
    def steps_done(self) -> int:
        """Optimizer steps of one network over the tasks that are done."""
        return self.streams[0].first_step(self.next_task)

    def state(self, key: str) -> dict[str, Any]:
        """All that a checkpoint between two tasks holds; ``key`` says which settings it belongs to."""
        return {
            "key": key,
            "next_task": self.next_task,
            "seconds": self.seconds,
            "elapsed": self._elapsed,
            "metrics": {name: torch.from_numpy(values) for name, values in self.metrics.items()},
            "matrix": None if self._matrix is None else torch.from_numpy(self._matrix),
            "initial": self._initial,
            "diverged": self.diverged,
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "interventions": [intervention.state_dict() for intervention in self.interventions],
        }

    def load_state(self, checkpoint: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.network.load_state_dict(checkpoint["network"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        for intervention, state in zip(self.interventions, checkpoint["interventions"], strict=True):
            intervention.load_state_dict(state)
            intervention.on_start(self.network, self.optimizer)
        self.next_task = checkpoint["next_task"]
        self._clock.seconds = checkpoint["seconds"]
        self._elapsed = list(checkpoint["elapsed"])
        self.metrics = {name: values.cpu().numpy() for name, values in checkpoint["metrics"].items()}
        self._matrix = None if checkpoint["matrix"] is None else checkpoint["matrix"].cpu().numpy()
        self._initial = checkpoint["initial"]
        self.diverged = checkpoint["diverged"]
        self._any_diverged = bool(self.diverged.any())

    def result(self, stream: str, method: str, origin: dict[str, Any] | None = None) -> MethodResult:
        """The results so far, with what they follow from."""
        return MethodResult(
            stream=stream,
            method=method,
            told_of_switches=not self.streams[0].hidden_switches
            and any(intervention.told_of_switches for intervention in self.interventions),
            seeds=tuple(stream.seed for stream in self.streams),
            metrics={name: values[:, : self.next_task] for name, values in self.metrics.items()},
            diverged=tuple(self.diverged.tolist()),
            steps=self.steps_done,
            seconds=self.seconds,
            matrix=None if self._matrix is None else self._matrix[:, : self.next_task + 1, : self.next_task],
            samples=np.array(
                [self.streams[0].batch_size * self.streams[0].first_step(n + 1) for n in range(self.next_task)]
            ),
            elapsed=np.array(self._elapsed),
            origin=origin,
        )


@functools.cache
def _sample(total: int, wanted: int) -> Tensor:
    """The places of so many examples, the same for every method; all in their order where there are no more.

    Many tasks have their examples class by class, so that the first ones would be of one class.
    """
    if total <= wanted:
        return torch.arange(total)
    return torch.randperm(total, generator=torch.Generator().manual_seed(0))[:wanted]


def _is_turn(done: int, every: int | None) -> bool:
    """Whether a measurement is due with a task, the tasks counted from 1."""
    return every is not None and done % every == 0


def _masked(logits: Tensor, left_out: Tensor | None) -> Tensor:
    """Outputs, those that take no part as −∞."""
    return logits if left_out is None else logits.masked_fill(left_out, -torch.inf)


def read_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """What `Run.save` wrote, checked against its own checksums.

    Raises:
        FileProblem: if it is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                raise ValueError("a checksum is wrong")
        checkpoint: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        checkpoint["key"], checkpoint["next_task"]
    except Exception as error:
        raise FileProblem(
            f"{path}: expected a checkpoint, got a damaged file; remove it and run again with --resume"
        ) from error
    return checkpoint
