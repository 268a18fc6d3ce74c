"""A plain training loop, written out, that every framework's loop has to equal."""

from collections.abc import Sequence

from torch import nn
from torch.nn import functional as F
from torch.optim import Optimizer

from clagrange.interventions import Intervention
from clagrange.tasks import PermutedDigits, Task, TaskStream


class DoubleDigits(PermutedDigits):
    """Permuted digits whose inputs are float64, for a float64 network."""

    def task(self, number: int) -> Task:
        task = super().task(number)
        return Task(task.inputs.double(), task.targets)


def plain_loop(
    network: nn.Module,
    optimizer: Optimizer,
    interventions: Sequence[Intervention],
    stream: TaskStream,
    tasks: int,
) -> None:
    """Train on the first tasks of a stream, one epoch each, and call every moment of the interventions."""
    network.train()
    for intervention in interventions:
        intervention.on_start(network, optimizer)
    for number in range(tasks):
        task = stream.task(number)
        if number:
            for intervention in interventions:
                intervention.on_switch(network, optimizer)
        for batch in stream.order(number, 0):
            optimizer.zero_grad()
            F.cross_entropy(network(task.inputs[batch]), task.targets[batch]).backward()
            for intervention in interventions:
                intervention.on_gradient(network, optimizer)
            optimizer.step()
            for intervention in interventions:
                intervention.on_step(network, optimizer)
