"""The machine that this process runs on, and which other processes live there."""

import os
import platform
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import clagrange


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


def environment(device: str | torch.device = "cpu") -> dict[str, Any]:
    """Versions and machine: python, torch, clagrange, platform, processor, cores, threads, device.

    ``cores`` are those that this process may use, ``threads`` those that torch uses.
    """
    where = torch.device(device)
    here = where.type == "cuda" and torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "clagrange": clagrange.__version__,
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": len(cores()),
        "threads": torch.get_num_threads(),
        "device": f"{where} ({torch.cuda.get_device_name(where)})" if here else str(where),
    }


def _processor() -> str:
    """The processor's model name, or what the platform calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name") and ":" in line)
    return next(names, "") or platform.processor() or platform.machine()
