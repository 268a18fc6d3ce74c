"""The residual network on which predictive coding's scaling with depth is studied."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from clagrange._checks import check_choice

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "linear": lambda z: z,
}
"""φ by name."""


class ScaledLayer(nn.Module):
    """z ↦ scale·W φ(z), plus z with ``skip``; the entries of W start as N(0, 1).

    Args:
        inputs: length of z.
        outputs: length of the result.
        scale: factor that keeps the result of order 1 (or smaller).
        activation: φ, a key of `ACTIVATIONS`.
        skip: add z.
        generator: random stream of W; default torch's global one.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        scale: float,
        *,
        activation: str = "linear",
        skip: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_choice("activation", activation, ACTIVATIONS)
        self.weight = nn.Parameter(torch.randn(outputs, inputs, generator=generator))
        self.scale = scale
        self.activation = activation
        self.skip = skip

    def forward(self, z: Tensor) -> Tensor:
        """Apply the layer to z of shape (B, inputs)."""
        image = self.scale * nn.functional.linear(ACTIVATIONS[self.activation](z), self.weight)
        return z + image if self.skip else image

    def extra_repr(self) -> str:
        """The settings, for printing."""
        outputs, inputs = self.weight.shape
        return f"{inputs}, {outputs}, scale={self.scale:.4g}, activation={self.activation!r}, skip={self.skip}"


def residual_network(
    inputs: int, width: int, depth: int, outputs: int, *, activation: str = "relu", seed: int = 0
) -> nn.Sequential:
    """z₁ = W₁x/√inputs; z_l = z_(l−1) + W_l φ(z_(l−1))/√(NL); output W_L φ(z_(L−1))/N, all W ~ N(0, 1).

    Adam with learning rate 1e-3·√(N/L) goes with it.

    Args:
        inputs: features; inputs of the network are (B, inputs).
        width: N.
        depth: L ≥ 2, the number of weight matrices.
        outputs: length of the output.
        activation: φ: "relu", "tanh" or "linear".
        seed: of the weights.

    Source: the reference network of PC-ALM, arXiv 2605.31022.

    Example:
        >>> net = residual_network(64, 16, 8, 10)
        >>> len(net), net(torch.zeros(5, 64)).shape
        (8, torch.Size([5, 10]))
    """
    for name, value, least in (
        ("inputs", inputs, 1),
        ("width", width, 1),
        ("depth", depth, 2),
        ("outputs", outputs, 1),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}: expected a whole number of at least {least}, got {value!r}")
    generator = torch.Generator().manual_seed(seed)
    layers = [ScaledLayer(inputs, width, 1 / math.sqrt(inputs), generator=generator)]
    layers += [
        ScaledLayer(
            width, width, 1 / math.sqrt(width * depth), activation=activation, skip=True, generator=generator
        )
        for _ in range(depth - 2)
    ]
    layers.append(ScaledLayer(width, outputs, 1 / width, activation=activation, generator=generator))
    return nn.Sequential(*layers)
