"""In which mode a network is called: training, evaluation, under torch.func."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; afterwards every module has the mode it had, also after an error."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def under_torch_func() -> bool:
    """Whether a transform of torch.func calls, which is no training step; torch.compile traces under one, too."""
    return torch._C._functorch.peek_interpreter_stack() is not None and not torch.compiler.is_compiling()
