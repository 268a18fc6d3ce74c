"""The machine that this process runs on, and which other processes live there."""

import os
import socket
from collections.abc import Sequence
from pathlib import Path


def this_host() -> str:
    """The machine's name."""
    return socket.gethostname()


def cores() -> Sequence[int]:
    """The cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return sorted(affinity(0)) if affinity else range(os.cpu_count() or 1)


def lives(pid: int, began: str | None = None) -> bool:
    """Whether a process lives on this machine; with ``began``, as `beginning_of` gave it, that very one.

    Example:
        >>> lives(os.getpid(), beginning_of(os.getpid()))
        True
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return began is None or beginning_of(pid) == began  # otherwise its number was given to another


def beginning_of(pid: int) -> str | None:
    """When a process began, in ticks since the machine's start; None where nobody can tell."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None
