"""The planned order as a sampler for DataLoader, on the features of a network's last layer."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler

from clagrange._checks import check_number, check_positive
from clagrange.mechanics.planning import plan
from clagrange.wiring import hidden_features


class PlannedSampler(Sampler[int]):
    """Draws the examples of a data set in a planned order: the sampler of a `torch.utils.data.DataLoader`.

    Planned is the order for a linear model on the features; for a network they are those of its last hidden
    layer, `last_layer_features`. Given as a function, they are computed anew at each block, with the network as
    it is then (set ``num_workers=0``: workers fetch ahead), and what was learned so far counts under the new
    features. Every pass through the loader plans from the start.

    Args:
        features: (N, p), one row for each example of the data set; or a function without arguments that
            returns them.
        samples: how many examples a pass draws; default all.
        block: examples that are planned together. 1 is greedy; larger ones are improved by ``exchange``, so that
            the trace is least at their ends.
        ridge: as in `plan`.
        moment: as in `plan`.
        exchange: rounds of exchange in each block.

    Raises:
        ValueError: if ``samples`` is more than the pool (found at the first pass where features are a function
            without ``samples``), or another number is out of range.

    Source: S. Guo and B. Schölkopf, "Physics of Learning", arXiv 2509.21049 (least time, A-optimality);
    exchange: V. Fedorov, "Theory of Optimal Experiments" (1972).

    Example:
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> inputs = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
        >>> loader = DataLoader(TensorDataset(inputs), batch_size=2, sampler=PlannedSampler(inputs, samples=2))
        >>> [batch] = next(iter(loader))
        >>> batch
        tensor([[1.0000, 0.1000],
                [0.0000, 1.0000]])
    """

    def __init__(
        self,
        features: Tensor | Callable[[], Tensor],
        samples: int | None = None,
        *,
        block: int = 1,
        ridge: float = 1.0,
        moment: Tensor | None = None,
        exchange: int = 3,
    ) -> None:
        check_number("block", block, low=1)
        check_number("exchange", exchange, low=0)
        check_positive("ridge", ridge)
        self.features = features
        self.block = block
        self.ridge = ridge
        self.moment = moment
        self.exchange = exchange
        pool = len(features) if isinstance(features, Tensor) else len(features())
        self.samples = pool if samples is None else samples
        check_number("samples", self.samples, low=1, high=pool, hint="every example is drawn once in a pass")

    def __len__(self) -> int:
        return self.samples

    def __iter__(self) -> Iterator[int]:
        order: list[int] = []
        static = isinstance(self.features, Tensor)
        size = self.samples if static and self.block == 1 else self.block  # greedy in one go: no new features
        while len(order) < self.samples:
            features = self.features if isinstance(self.features, Tensor) else self.features()
            ahead = plan(
                features,
                min(size, self.samples - len(order)),
                ridge=self.ridge,
                moment=self.moment,
                chosen=torch.tensor(order, dtype=torch.long),
                exchange=0 if self.block == 1 else self.exchange,
            )
            order += ahead
            yield from ahead


@torch.no_grad()
def last_layer_features(network: nn.Module, inputs: Tensor) -> Tensor:
    """What enters the last layer of a network, in evaluation mode, with a constant 1 for its bias: (N, p).

    A network of one layer has the flattened inputs themselves.

    Args:
        network: of linear and convolution layers.
        inputs: the pool, first dimension N.

    Example:
        >>> last_layer_features(clagrange.networks.mlp(4, [6], 2), torch.rand(5, 4)).shape
        torch.Size([5, 7])
    """
    layers = hidden_features(network, inputs)
    found = layers[-1] if layers else inputs.flatten(1)
    return torch.cat([found, torch.ones_like(found[:, :1])], 1)
