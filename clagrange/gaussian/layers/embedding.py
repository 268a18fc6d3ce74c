"""The embedding with Gaussian weights."""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from clagrange.gaussian.layers.base import GaussianLayer


class GaussianEmbedding(GaussianLayer, nn.Embedding):
    """A table of Gaussian vectors: a linear layer without bias of one-hot inputs.

    Takes the arguments of `torch.nn.Embedding`, and ``precision``, ``prior_mean`` and ``prior_variance`` as
    `GaussianLinear` does. The unit of ``prior_variance`` is 1, the variance with which torch initialises it.
    The Kronecker factor of one-hot inputs is diagonal, the frequencies of the tokens, so that a large vocabulary
    costs no more than its table.

    The vector at ``padding_idx`` is 0 and stays so: it is neither learnt nor drawn (except in an embedding that
    shares its weight with another layer, where it is one like the others). Padding counts as positions.

    Shapes: inputs (B, ...) of whole numbers, outputs (B, ..., embedding_dim).

    Example:
        >>> GaussianEmbedding(100, 8, precision="kronecker")(torch.tensor([[3, 1, 4]])).shape
        torch.Size([1, 3, 8])
    """

    pairs = (("weight", None),)
    one_hot = True

    @property
    def stacked(self) -> bool:
        """Always False: an embedding has no stacked form."""
        return False

    def forward(self, inputs: Tensor) -> Tensor:
        """Look up the means, or in training what is drawn (`set_sampling`)."""
        output = self.transform(self._look_up, inputs)
        self.watch(output, inputs, inputs.shape[0] if inputs.dim() else 1, math.prod(inputs.shape))
        return output

    def _look_up(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        output = F.embedding(inputs, weight, self.padding_idx)
        return self._without_padding(output, inputs)

    def _without_padding(self, vectors: Tensor, inputs: Tensor) -> Tensor:
        if self.padding_idx is None or "weight" in self.shared:
            return vectors
        return vectors.masked_fill(inputs.eq(self.padding_idx).unsqueeze(-1), 0.0)

    def initial_variance(self, name: str) -> float:
        """1, torch's own."""
        return 1.0

    def as_matrix(self, name: str, tensor: Tensor) -> Tensor:
        """(embedding_dim, num_embeddings)."""
        return tensor.mT

    def from_matrix(self, name: str, matrix: Tensor) -> Tensor:
        """The inverse of `as_matrix`."""
        return matrix.mT

    def rows(self, name: str, inputs: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (n, P) in place of one-hot inputs, and gradients (n, P, out), 0 at padding."""
        gradient = self._without_padding(gradient, inputs)
        examples = inputs.shape[0] if inputs.dim() else 1
        return inputs.reshape(examples, -1), gradient.reshape(examples, -1, gradient.shape[-1])

    def settle(self) -> None:
        """Keep the padding at 0."""
        if "weight" not in self.shared:
            self._fill_padding_idx_with_zero()
