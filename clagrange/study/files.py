"""Files that are never half-written: written beside their target, then renamed."""

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clagrange.study.machine import lives, this_host

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows, where two processes must not share a folder
    fcntl = None  # type: ignore[assignment]

PARTIAL = "partial-"
"""In the names of files that are being written, and of what a process leaves that is killed while it writes."""


def partial_prefix(target: Path) -> str:
    """How the name begins of what this process writes beside ``target``."""
    return f".{target.name}.{PARTIAL}{os.getpid()}@{file_name(this_host())}-"


def remove_leftovers(folder: Path) -> None:
    """Remove what processes left half-written that are gone; processes of other machines count as living."""
    for leftover in list(folder.rglob(f".*.{PARTIAL}*")):
        writer = re.search(rf"\.{PARTIAL}(\d+)@(.+)-[^-]*$", leftover.name)
        if writer is not None:
            here, pid = writer[2] == file_name(this_host()), int(writer[1])
            if not here or (pid != os.getpid() and lives(pid)):  # this one writes nothing while it asks
                continue
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


class FileProblem(ValueError):  # noqa: N818 - says what it is
    """A file is damaged or foreign, or cannot be written; the message names it and the remedy."""


def require_writable(folder: Path) -> None:
    """Make a folder if it is missing and try to write into it, before long work begins.

    Raises:
        FileProblem: if that is not possible.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise FileProblem(
            f"out: {folder} cannot be written to ({error.strerror}); choose another place"
        ) from error


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A path beside ``target`` to write to; renamed to ``target`` on success, removed on failure.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder, replacing(Path(folder) / "a.txt") as path:
        ...     _ = path.write_text("whole")
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=partial_prefix(target), suffix=target.suffix, dir=target.parent)
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        partial.chmod(0o644)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(lock: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold a lock file, which the holder may remove; it is free again when its process ends, however it does.

    Args:
        lock: the file; it is made, with its folder.
        wait: whether to wait while another process holds it.

    Raises:
        BlockingIOError: if another process holds it and ``wait`` is false.
    """
    while True:
        lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            opened = lock.open("a")
        except FileNotFoundError:  # removed by a process that left
            continue
        with opened:
            if fcntl is not None:
                fcntl.flock(opened, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            try:
                same = os.path.samestat(os.fstat(opened.fileno()), lock.stat())
            except FileNotFoundError:
                same = False
            if same:
                yield
                return


@contextlib.contextmanager
def only_writer(target: Path) -> Iterator[None]:
    """Keep other processes from writing a file in the meantime.

    Raises:
        FileProblem: if one is at it.
    """
    lock = target.with_name(f".{target.name}.lock")
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(locked(lock, wait=False))
        except BlockingIOError as error:
            raise FileProblem(
                f"out: another process is writing {target}; wait until it is done, or choose another file"
            ) from error
        held.callback(lock.unlink, missing_ok=True)
        yield


def file_name(name: str) -> str:
    """The name with everything that a file system could read as more than a name replaced.

    Example:
        >>> file_name("../my stream")
        '_._my_stream'
    """
    return re.sub(r"[^\w.+-]|^\.", "_", name) or "_"


def write_json(target: Path, tree: Any) -> None:
    """Write figures that a person may read, whole or not at all."""
    with replacing(target) as partial:
        partial.write_text(json.dumps(tree, indent=1) + "\n")
