"""Running normalisation of the inputs."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from clagrange._checks import check_positive
from clagrange.distributed import mean_over_processes, process_count, total_over_processes
from clagrange.interventions.base import Intervention
from clagrange.replicas import replicas_of


class InputNormalization(Intervention):
    """Feed the network (x − m)/√(v + ε), with m and v the mean and variance of every feature so far.

    The control that any claim about plasticity has to beat. Statistics of all inputs that the network saw in
    training mode, each example with the same weight, are updated with a batch before it is normalised, in several
    processes with the batches of all; labels play no part. They are kept in float32 at least, and to the gradient
    of the inputs they are constants. In evaluation mode they stay; before there are any, inputs pass unchanged.

    Args:
        eps: ε, in squared units of the inputs.
    """

    gathers = ()

    def __init__(self, eps: float = 1e-4) -> None:
        super().__init__()
        check_positive("eps", eps)
        self.eps = eps
        self._batch_dim = 0

    def on_start(self, network: nn.Module, optimizer: Optimizer) -> None:
        """Hook the network's inputs."""
        super().on_start(network, optimizer)
        self._batch_dim = 0 if replicas_of(network) is None else 1
        self._handles.append(network.register_forward_pre_hook(self._hook))

    def _hook(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self._normalised(args[0], self._batch_dim, module.training), *args[1:])

    def _normalised(self, inputs: Tensor, batch_dim: int, update: bool) -> Tensor:
        wide = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
        if update:
            self._update(wide.detach(), batch_dim)
        if not self.state:
            return inputs
        mean, variance = (self.state[name].to(wide) for name in ("mean", "variance"))
        scale = (variance + self.eps).rsqrt()
        normalised: Tensor = (wide - mean.unsqueeze(batch_dim)) * scale.unsqueeze(batch_dim)
        return normalised.to(inputs.dtype) if inputs.is_floating_point() else normalised

    def _update(self, inputs: Tensor, batch_dim: int) -> None:
        """Take a batch into the statistics, in place."""
        size, batch_mean, batch_variance = _moments(inputs, batch_dim)
        if not size:
            return
        zeros = torch.zeros_like(batch_mean)
        kept = self.state or {"count": 0, "mean": zeros, "variance": zeros.clone()}
        mean, variance = (kept[name].to(inputs) for name in ("mean", "variance"))
        count = torch.as_tensor(kept["count"], device=inputs.device)  # in older states a plain number
        self.state = {"count": count, "mean": mean, "variance": variance}
        count += size
        weight = size / count.double()
        shift = batch_mean - mean
        variance.lerp_(batch_variance, weight.to(variance)).add_(weight * (1.0 - weight) * shift.square())
        mean.add_(weight * shift)


def _moments(inputs: Tensor, batch_dim: int) -> tuple[int, Tensor, Tensor]:
    """Size, mean and variance of a batch, 0 where it is empty; of those of all processes together."""
    size = inputs.shape[batch_dim]
    if size:
        variance, mean = torch.var_mean(inputs, batch_dim, correction=0)
    else:
        variance = mean = inputs.sum(batch_dim)
    (total,) = total_over_processes([size], inputs.device)
    if process_count() == 1 or not total:
        return total, mean, variance
    share = size * process_count() / total
    joint = mean_over_processes(share * mean)
    return total, joint, mean_over_processes(share * (variance + (mean - joint).square()))
