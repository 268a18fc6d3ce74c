"""What looks at a network in training through hooks."""

from abc import ABC
from typing import ClassVar

from torch.utils.hooks import RemovableHandle


class Hooked(ABC):  # noqa: B024 - nothing has to be overridden
    """What may have hooks in a network.

    Attributes:
        gathers: names of the attributes in which hooks leave what is used up once the gradients are there. With
            them a training step can be captured in a CUDA graph, which fills tensors anew at every replay, and
            the attributes are handed out again after it. The hooks themselves must do the same operations on the
            same memory in every step. None where that does not hold, or nobody knows.
    """

    gathers: ClassVar[tuple[str, ...] | None] = None

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []

    @property
    def hooks(self) -> int:
        """The number of hooks in the network."""
        return len(self._handles)

    def detach(self) -> None:
        """Remove the hooks from the network."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
