"""Hare and Tortoise: a slow average that the fast network falls back to."""

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from clagrange._checks import Number, check_count, check_fraction, per_replica
from clagrange.interventions.base import Intervention, trainable


class HareAndTortoise(Intervention):
    """Keep an average of the weights, and set the weights to it every so many steps.

    The network that is trained is the hare h. After each step of the optimizer the tortoise follows,

        t ← decay·t + (1 − decay)·h,

    and after every ``every`` steps h ← t. The running means and variances of batch normalisation are averaged and
    fall back with the weights; the optimizer's state stays, both as in the code that appears to be the authors'
    (where ``every`` counts epochs). The tortoise starts at the first weights and is in ``state["tortoise"]`` by
    the names of parameters and buffers, in float32 at least; `tortoise` gives it for
    `torch.func.functional_call`.

    Args:
        decay: of the average, in [0, 1].
        every: steps from one reset of the hare to the next.

    Source: Lee, Cho, Kim, Kim, Min, Choo, Lyle, "Slow and steady wins the race: maintaining plasticity with hare
    and tortoise networks", ICML 2024.
    """

    def __init__(self, decay: Number = 0.999, every: int = 1000) -> None:
        super().__init__()
        check_fraction("decay", decay)
        check_count("every", every)
        self.decay = decay
        self.every = every
        self.state = {"steps": 0, "tortoise": {}}

    @property
    def tortoise(self) -> dict[str, Tensor]:
        """The average of every parameter and running statistic, by its name."""
        return dict(self.state["tortoise"])

    def on_start(self, network: nn.Module, optimizer: Optimizer) -> None:
        """Put the tortoise beside the hare, once; parameters that come later join at their first start."""
        super().on_start(network, optimizer)
        average = self.state["tortoise"]
        for name, tensor in _followed(network):
            dtype = torch.promote_types(tensor.dtype, torch.float32)
            stored = average.get(name)
            if stored is None or stored.shape != tensor.shape:
                stored = tensor.detach().clone()
            average[name] = stored.to(tensor.device, dtype)

    @torch.no_grad()
    def on_step(self, network: nn.Module, optimizer: Optimizer) -> None:
        """Let the tortoise follow, and the hare fall back when it is time."""
        self.state["steps"] += 1
        back = self.state["steps"] % self.every == 0
        for name, tensor in _followed(network):
            average = self.state["tortoise"][name]
            average.add_((1.0 - per_replica(self.decay, average)) * (tensor - average))
            if back:
                tensor.copy_(average)


def _followed(network: nn.Module) -> list[tuple[str, Tensor]]:
    """What is averaged, by name: trainable parameters, and the statistics of batch normalisation."""
    statistics = [
        (f"{name}.{key}" if name else key, tensor)
        for name, module in network.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        for key, tensor in module.named_buffers(recurse=False)
        if tensor.is_floating_point()
    ]
    return [*trainable(network), *statistics]
