"""The clock of a run: training counts, evaluation does not."""

import contextlib
import time
from collections.abc import Iterator

import torch


class Clock:
    """Seconds of the blocks that ran by it, without the blocks within them for which it was stopped.

    Blocks nest; of a block that raises, the seconds count as well. Work that a GPU has still to do belongs to the
    block that ordered it.

    Args:
        device: that does the work.

    Attributes:
        seconds: so far, without a block that is still running.

    Example:
        >>> clock = Clock()
        >>> with clock.running(), clock.stopped():
        ...     time.sleep(0.05)
        >>> clock.seconds < 0.05
        True
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.seconds = 0.0
        self._device = torch.device(device)
        self._since: float | None = None

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Count the seconds of a block."""
        was_running = self._set(True)
        try:
            yield
        finally:
            self._set(was_running)

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Leave the seconds of a block out."""
        was_running = self._set(False)
        try:
            yield
        finally:
            self._set(was_running)

    def _set(self, running: bool) -> bool:
        """Run from now on, or stop; whether it ran until now."""
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        now, since = time.perf_counter(), self._since
        if since is not None:
            self.seconds += now - since
        self._since = now if running else None
        return since is not None
