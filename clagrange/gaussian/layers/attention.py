"""Multi-head attention with Gaussian projections."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from clagrange._checks import Number
from clagrange.gaussian.layers.base import GaussianLayer
from clagrange.gaussian.layers.linear import GaussianLinear
from clagrange.gaussian.structures import Structure


class GaussianOutProjection(GaussianLinear, NonDynamicallyQuantizableLinear):
    """The output projection of an attention layer, a `GaussianLinear`."""


class GaussianMultiheadAttention(GaussianLayer, nn.MultiheadAttention):
    """Attention whose projections of queries, keys, values and outputs are Gaussian.

    Takes the arguments of `torch.nn.MultiheadAttention`, and ``precision``, ``prior_mean`` and ``prior_variance``
    as `GaussianLinear` does, in units of 2 over the width of what is projected. With a Kronecker precision the
    packed projection of queries, keys and values is one layer of three times as many units; where queries and
    keys differ (cross-attention) its inputs are both. ``bias_k`` and ``bias_v``, if any, stay deterministic.

    Where no gradients are recorded torch's own forward runs at the means, with its fused fast path.

    Shapes: as `torch.nn.MultiheadAttention`.

    Example:
        >>> attention, x = GaussianMultiheadAttention(8, 2, batch_first=True), torch.zeros(3, 5, 8)
        >>> attention(x, x, x)[0].shape
        torch.Size([3, 5, 8])
    """

    pairs = (
        ("in_proj_weight", "in_proj_bias"),  # where all have one width
        ("q_proj_weight", "in_proj_bias"),
        ("k_proj_weight", "in_proj_bias"),
        ("v_proj_weight", "in_proj_bias"),
    )

    def __init__(
        self,
        *args: Any,
        precision: str | Structure = "diagonal",
        prior_mean: str = "zero",
        prior_variance: Number = 1.0,
        **settings: Any,
    ) -> None:
        super().__init__(
            *args, precision=precision, prior_mean=prior_mean, prior_variance=prior_variance, **settings
        )
        self.out_proj.__class__ = GaussianOutProjection
        assert isinstance(self.out_proj, GaussianOutProjection)
        self.out_proj.become_gaussian(precision, prior_mean, prior_variance)

    @property
    def stacked(self) -> bool:
        """Always False: attention has no stacked form."""
        return False

    def initial_variance(self, name: str) -> float:
        """2 / embed_dim, kdim or vdim."""
        width: int = {"k_proj_weight": self.kdim, "v_proj_weight": self.vdim}.get(name, self.embed_dim)
        return 2.0 / width

    def rows(self, name: str, inputs: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs (n, P, in) and gradients (n, P, out) of a projection, as they are."""
        return inputs, gradient

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend, at the means or in training at what is drawn (`set_sampling`); arguments as torch's."""
        if not torch.is_grad_enabled():
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        if is_causal and attn_mask is None:
            raise ValueError("attn_mask: expected the causal mask itself with is_causal=True, got None")
        batched = query.dim() == 3
        if not batched and key_padding_mask is not None:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        q, k, v = (self._heads(part) for part in self._projected(query, key, value))
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = self._mask(None if causal else attn_mask, key_padding_mask, q)
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (
                torch.cat([part, self._heads(bias).expand(len(part), -1, -1, -1)], 2)
                for part, bias in ((k, self.bias_k), (v, self.bias_v))
            )
        if self.add_zero_attn:
            k, v = (F.pad(part, (0, 0, 0, 1)) for part in (k, v))
        if mask is not None:
            mask = F.pad(mask, (0, k.shape[2] - mask.shape[-1]))
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * math.sqrt(1.0 / self.head_dim)) @ k.mT
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            attended = weights @ v
        else:
            attended = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
        output: Tensor = self.out_proj(attended.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            return output[0], None if weights is None else weights[0]
        return output if self.batch_first else output.transpose(0, 1), weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, (N, L, E), projected; those of the same inputs in one product."""
        given = (query, key, value)
        tensors = {id(tensor): self._batch_first(tensor) for tensor in given}
        positions = math.prod(tensors[id(query)].shape[:2])
        if self.in_proj_weight is None:
            names = ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
            runs = [1, 1, 1]
        else:
            names = ["in_proj_weight"] * 3
            runs = [1, 1, 1] if key is not value else [1, 2] if query is not key else [3]
        parts: list[Tensor] = []
        for run in runs:
            first = len(parts)
            units = slice(first * self.embed_dim, (first + run) * self.embed_dim)
            projected = self._project(tensors[id(given[first])], names[first], units, positions)
            parts += projected.chunk(run, -1)
        return tuple(parts)

    def _project(self, inputs: Tensor, name: str, units: slice, positions: int) -> Tensor:
        """The units of a projection."""

        def project(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            packed = name == "in_proj_weight"
            return F.linear(inputs, weight[units] if packed else weight, None if bias is None else bias[units])

        output = self.transform(project, inputs, name)
        self.watch(output, inputs, len(inputs), positions, name, units)
        return output

    def _batch_first(self, tensor: Tensor) -> Tensor:
        if tensor.dim() == 2:
            return tensor.unsqueeze(0)
        return tensor if self.batch_first else tensor.transpose(0, 1)

    def _heads(self, projected: Tensor) -> Tensor:
        """(N, L, E) as (N, heads, L, E / heads)."""
        heads: Tensor = projected.unflatten(-1, (self.num_heads, self.head_dim))
        return heads.transpose(1, 2)

    def _mask(self, attention: Tensor | None, padding: Tensor | None, q: Tensor) -> Tensor | None:
        """What is added to the scores: both masks, that of True being −∞, broadcast to (N, heads, L, S)."""
        masks = []
        if attention is not None:
            masks.append(attention if attention.dim() == 2 else attention.unflatten(0, (-1, self.num_heads)))
        if padding is not None:
            masks.append(padding[:, None, None])
        for index, mask in enumerate(masks):
            if mask.dtype == torch.bool:
                masks[index] = torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, -math.inf)
        return masks[0] + masks[1] if len(masks) == 2 else masks[0] if masks else None
