"""Regularisation of the largest singular value of every layer toward 1."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from clagrange._checks import Number, check_nonnegative, check_positive, per_replica
from clagrange.interventions.base import Intervention, trainable
from clagrange.replicas import randn_like, replicas_of


class SpectralRegularization(Intervention):
    """Add strength·Σ((σᵏ − 1)² + ‖b‖²ᵏ) to the loss, over the layers with weight W and bias b.

    σ is the largest singular value of W. A weight's gradient grows by strength·2(σᵏ − 1)·kσᵏ⁻¹·u vᵀ, with u and v
    the singular vectors of σ, before the optimizer sees it. They follow the weight by one power iteration a step;
    the kernel of a convolution is a matrix of its output channels. The scale of a normalisation layer is a
    diagonal matrix, whose largest entry alone would jump from place to place: there each entry w adds
    strength·(|w|ᵏ − 1)², and the shift is a bias like another.

    Args:
        strength: λ ≥ 0, for the mean loss per example.
        power: k > 0.
        seed: of the random stream, for the vectors to start with.

    Source: Lewandowski, Bortkiewicz, Kumar, György, Schuurmans, Ostaszewski, Machado, "Learning continually by
    spectral regularization", ICLR 2025, where k = 2.
    """

    def __init__(self, strength: Number = 1e-3, power: float = 2.0, seed: int | Sequence[int] = 0) -> None:
        super().__init__(seed)
        check_nonnegative("strength", strength)
        check_positive("power", power)
        self.strength = strength
        self.power = power

    @property
    def replays(self) -> bool:
        """It does."""
        return True

    @torch.no_grad()
    def on_start(self, network: nn.Module, optimizer: Optimizer) -> None:
        """Find the singular vectors to follow, once; weights that come later join at their first start."""
        super().on_start(network, optimizer)
        stacked = replicas_of(network) is not None
        for name, parameter, kind in _regularised(network, stacked):
            if kind == "weight":
                matrix = _matrix(parameter, stacked)
                stored = self.state.get(name)
                if stored is None or stored.shape != matrix.shape[:-1]:
                    vector = randn_like(matrix[..., 0], self.generators)
                    for _ in range(_WARM_UP):
                        vector, _ = _iterate(matrix, vector)
                    stored = vector
                self.state[name] = stored.to(matrix)

    @torch.no_grad()
    def on_gradient(self, network: nn.Module, optimizer: Optimizer) -> None:
        """Add the gradient of the regulariser."""
        stacked = replicas_of(network) is not None
        for name, parameter, kind in _regularised(network, stacked):
            if parameter.grad is None:
                continue
            strength = per_replica(self.strength, parameter)
            if kind == "bias":
                square = parameter.square().sum(list(range(int(stacked), parameter.dim())), keepdim=True)
                # the gradient of (bᵀb)ᵏ is 2k(bᵀb)ᵏ⁻¹b, and 0 at b = 0 whatever the power
                slope = torch.where(square > 0, square.pow(self.power - 1.0), 0.0)
                parameter.grad.add_(strength * (2.0 * self.power) * slope * parameter)
                continue
            if kind == "scale":
                size = parameter.abs()
                # and that of (|w|ᵏ − 1)² is 2(|w|ᵏ − 1)·k|w|ᵏ⁻¹ times the sign
                slope = torch.where(size > 0, size.pow(self.power - 1.0), 0.0) * parameter.sign()
                parameter.grad.add_(strength * (2.0 * self.power) * (size.pow(self.power) - 1.0) * slope)
                continue
            matrix = _matrix(parameter, stacked)
            left, right = _iterate(matrix, self.state[name])
            self.state[name].copy_(left)
            # σ and its gradient are 0 at W = 0
            sigma = torch.einsum("...o,...oi,...i->...", left, matrix, right)[..., None, None]
            slope = torch.where(sigma > 0, sigma ** (self.power - 1.0), 0.0)
            slope = 2.0 * (sigma**self.power - 1.0) * self.power * slope
            pull = slope * left.unsqueeze(-1) * right.unsqueeze(-2)
            parameter.grad.add_(strength * pull.to(parameter.dtype).view_as(parameter))


_WARM_UP = 20
"""Power iterations at the start."""


_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)


def _regularised(network: nn.Module, stacked: bool) -> Iterator[tuple[str, nn.Parameter, str]]:
    """Names, parameters and kinds: weights of at least two dimensions, scales, and the biases beside them."""
    known = dict(trainable(network))
    norms = {name for name, module in network.named_modules() if isinstance(module, _NORMS)}
    for name, parameter in known.items():
        owner, _, own = name.rpartition(".")
        if owner in norms:
            yield name, parameter, "scale" if own == "weight" else "bias"
        elif parameter.dim() - stacked >= 2:
            yield name, parameter, "weight"
            bias = f"{name.removesuffix('weight')}bias"
            if bias in known:
                yield bias, known[bias], "bias"


def _matrix(parameter: Tensor, stacked: bool) -> Tensor:
    """The weight as (out, ...) or (R, out, ...), in float32 at least."""
    return parameter.detach().flatten(1 + stacked).to(torch.promote_types(parameter.dtype, torch.float32))


def _iterate(matrix: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
    """One power iteration: the singular vectors (..., out) and (..., in) from the last left one.

    The left one stays where the matrix is 0, which has none of its own.
    """
    right = nn.functional.normalize(torch.einsum("...oi,...o->...i", matrix, left), dim=-1)
    product = torch.einsum("...oi,...i->...o", matrix, right)
    known = product.any(-1, keepdim=True)
    return torch.where(known, nn.functional.normalize(product, dim=-1), left), right
