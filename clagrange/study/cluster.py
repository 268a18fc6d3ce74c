"""Runs of a study on the machines of a Ray cluster (extra ``clagrange[ray]``)."""

import contextlib
import io
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

from clagrange._checks import one_line
from clagrange.study.engine import read_checkpoint
from clagrange.study.executors import Event, one_thread, tasks_of
from clagrange.study.extras import extra_module
from clagrange.study.files import FileProblem, replacing
from clagrange.study.problems import SettingsError
from clagrange.study.results import MethodResult
from clagrange.study.settings import Study
from clagrange.study.store import Folder, Job, Origin

LOST = 3
"""How often a run may lose its worker without finishing a task before it counts as failed."""


def require_ray() -> None:
    """Raise unless Ray is installed.

    Raises:
        SettingsError: with the remedy.
    """
    try:
        extra_module("ray")
    except ModuleNotFoundError as error:
        raise SettingsError(f"executor: {error}") from error


class OnRay:
    """Workers of a Ray cluster, one core (and one GPU, on GPUs) for each run.

    A worker sends the state of its run after every task; only this process writes into the folder, so that the
    machines need no common file system. They need the same version of clagrange and the same data, which is
    checked. The runs of a worker or a machine that is lost go on elsewhere from their last state.

    Args:
        study: what to run.
        folder: a prepared folder.
        address: of the cluster, as `ray.init` takes it; default: a cluster of this machine alone.
        workers: number of runs at once; default: one for each core, or GPU, of the cluster.

    Raises:
        SettingsError: if Ray is not installed, or there is no cluster at the address.
    """

    def __init__(
        self, study: Study, folder: Folder, address: str | None = None, workers: int | None = None
    ) -> None:
        require_ray()
        import ray

        self._ray: Any = ray
        self._own = not ray.is_initialized()
        if self._own:
            try:
                ray.init(address=address, log_to_driver=False, logging_level="error")
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise SettingsError(
                    f"address: expected a Ray cluster, got {address!r} ({one_line(error)})"
                ) from error
        kind = "GPU" if study.device == "cuda" else "CPU"
        self.workers = workers or max(1, int(ray.cluster_resources().get(kind, 1)))
        self._study, self._folder = study, folder
        gpus = 1 if study.device == "cuda" else 0
        options = {"num_cpus": 1, "num_gpus": gpus, "max_retries": 0, "num_returns": "streaming"}
        self._remote = ray.remote(**options)(_carry_out)
        self._runs: dict[Any, Job] = {}
        self._lost: dict[Job, int] = {}
        self._said: list[Event] = []

    def start(self, job: Job) -> None:
        """Send a run, and its checkpoint where there is one, to the cluster."""
        path, origin = self._folder.checkpoint(*job), Origin.of(self._study, *job)
        checkpoint = None
        if path.exists():
            try:
                read_checkpoint(path)
                checkpoint = path.read_bytes()
            except FileProblem as error:
                self._said.append(("said", job, self._folder.set_aside_checkpoint(job, error)))
        data = os.path.abspath(os.environ.get("CLAGRANGE_DATA", "data"))  # noqa: PTH100 - of a missing folder too
        self._runs[self._remote.remote(self._study, job, origin.text, checkpoint, data)] = job

    def watch(self, seconds: float, handle: Callable[[Event], None]) -> None:
        """Store what the workers have sent; start anew what was lost."""
        for event in self._said:
            handle(event)
        self._said.clear()
        ready, _ = self._ray.wait(list(self._runs), num_returns=1, timeout=seconds)
        for stream in ready:
            job = self._runs[stream]
            try:
                events, checkpoint, result = self._ray.get(next(stream))
            except StopIteration:
                del self._runs[stream]
                handle(("finished", job, None))
            except self._ray.exceptions.RayTaskError as error:
                del self._runs[stream]
                handle(("failed", job, str(error)))
            except self._ray.exceptions.RayError as error:
                del self._runs[stream]
                self._go_on_elsewhere(job, type(error).__name__, handle)
            else:
                self._store(job, checkpoint, result)
                for event in events:
                    handle(event)

    def _store(self, job: Job, checkpoint: bytes | None, result: MethodResult | None) -> None:
        self._lost.pop(job, None)
        if checkpoint is not None:
            with replacing(self._folder.checkpoint(*job)) as partial:
                partial.write_bytes(checkpoint)
        if result is not None:
            result.write(self._folder.result(*job))
            self._folder.checkpoint(*job).unlink(missing_ok=True)

    def _go_on_elsewhere(self, job: Job, reason: str, handle: Callable[[Event], None]) -> None:
        self._lost[job] = self._lost.get(job, 0) + 1
        if self._lost[job] > LOST:
            handle(("failed", job, f"its worker was lost {self._lost[job]} times in the same task ({reason})"))
        else:
            handle(("said", job, f"{'.'.join(job)}: its worker was lost ({reason}); it goes on elsewhere"))
            self.start(job)

    def close(self) -> None:
        """End all runs; leave the cluster, or end it where it was made here."""
        for stream in self._runs:
            with contextlib.suppress(Exception):
                self._ray.cancel(stream, force=True)
        if self._own:
            self._ray.shutdown()


def _carry_out(
    study: Study, job: Job, expected: str, checkpoint: bytes | None, data: str
) -> Iterator[tuple[list[Event], bytes | None, MethodResult | None]]:
    """On a worker: what happened and the state of the run after each task, and its result in the end."""
    os.environ.setdefault("CLAGRANGE_DATA", data)
    origin = Origin.of(study, *job)
    if origin.text != expected:
        raise RuntimeError(
            f"expected the same data and the same version of clagrange and torch on every machine; here are "
            f"checksum {origin.data} and {origin.version}, not those of {expected}"
        )
    events: list[Event] = []
    with one_thread():
        run = study.start(*job)
        if checkpoint is not None:
            run.load_state(torch.load(io.BytesIO(checkpoint), map_location=run.device, weights_only=True))
        for _ in tasks_of(run, job, events.append):
            state = io.BytesIO()
            torch.save(run.state(origin.text), state)
            yield list(events), state.getvalue(), None
            events.clear()
        yield list(events), None, run.result(*job, origin=origin.written)
