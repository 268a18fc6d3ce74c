"""torch.compile where it works; where it does not, a warning says so once, and other code takes its place."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

_failure = ""  # why torch.compile does not work in this process; empty as long as it may


def may_compile() -> bool:
    """Whether torch.compile has not failed in this process."""
    return not _failure


def give_up(error: Exception, instead: str, stacklevel: int) -> None:
    """Remember that torch.compile failed, and warn of what takes its place."""
    global _failure
    _failure = " ".join(f"{type(error).__name__}: {error}".splitlines()[:2]).strip()
    warnings.warn(
        f"{instead} ({_failure}); nothing else is compiled in this process either; install what torch.compile "
        f"needs, on a CPU a C++ compiler",
        RuntimeWarning,
        stacklevel=stacklevel + 1,
    )


def compiling(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """A function as one loop, for any sizes.

    It compiles when it is first called, for every kind of arguments anew.

    Args:
        function: of tensors, without breaks in its graph.
        options: of torch's compiler.
    """
    import torch._dynamo

    compiled = torch.compile(function, fullgraph=True, dynamic=True, options=options)

    @functools.wraps(function)
    def call(*arguments: Any, **choices: Any) -> Any:
        try:
            return compiled(*arguments, **choices)
        except Exception:  # where torch's limit of 8 kinds of arguments is reached; else it fails again
            with torch._dynamo.config.patch(recompile_limit=64):  # at every call it would take half of its time
                return compiled(*arguments, **choices)

    return call
