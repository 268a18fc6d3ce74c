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
