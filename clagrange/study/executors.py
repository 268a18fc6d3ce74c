"""Where the runs of a study are computed: in this process, or in processes of this machine."""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

import torch

from clagrange.study.engine import Run
from clagrange.study.groups import Groups
from clagrange.study.machine import cores
from clagrange.study.settings import Study
from clagrange.study.store import Folder, Job

PROGRESS_SECONDS = 0.2

Event = tuple[str, Job, Any]
"""What happened to a run: "steps" (taken in all), "tasks" (first, metrics of the tasks since), "said" (a line),
"finished", or "failed" (why)."""


class Executor(Protocol):
    """Runs what it is given; ``workers`` runs at once."""

    workers: int

    def start(self, job: Job) -> None:
        """Begin a run, on a worker that has nothing to do."""

    def watch(self, seconds: float, handle: Callable[[Event], None]) -> None:
        """Hand over what has happened; wait for it so long, unless the runs are done here."""

    def close(self) -> None:
        """End all workers at once."""


# ------------------------------------------------------------------------------------------------ one run
def carry_out(study: Study, folder: Folder, job: Job, send: Callable[[Event], None]) -> None:
    """One run from its checkpoint, or from the start, to its result."""
    with one_thread():
        run, origin = folder.start(study, job, lambda line: send(("said", job, line)))
        for _ in tasks_of(run, job, send):
            run.save(folder.checkpoint(*job), origin.text)
        run.result(*job, origin=origin.written).write(folder.result(*job))
        folder.checkpoint(*job).unlink(missing_ok=True)


def tasks_of(run: Run | Groups, job: Job, send: Callable[[Event], None]) -> Iterator[None]:
    """Train task by task, telling how far it is; a pause after each task, for its checkpoint."""
    steps, said = run.steps_done, time.monotonic()

    def on_step() -> None:
        nonlocal steps, said
        steps += 1
        if time.monotonic() - said > PROGRESS_SECONDS:
            said = time.monotonic()
            send(("steps", job, steps))

    send(("steps", job, steps))
    told = 0
    while run.next_task < run.tasks:
        run.run_task(on_step)
        rows = {name: values[:, told : run.next_task].copy() for name, values in run.metrics.items()}
        send(("tasks", job, (told, rows)))
        told = run.next_task
        send(("steps", job, steps))
        yield


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """How every run computes, so that its numbers do not depend on where it does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # averages that decay toward 0 would slow every operation on them
    _keep_freed_memory()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(False)


def _keep_freed_memory() -> None:
    """Make glibc keep freed memory instead of returning it: page faults take longer than small operations.

    Its threshold for doing so adapts to the largest block (up to 32 MiB) that was freed. No effect elsewhere.
    """
    torch.empty(31 << 20, dtype=torch.uint8)


# ------------------------------------------------------------------------------------------------ executors
class InProcess:
    """One run after the other, in this process."""

    workers = 1

    def __init__(self, study: Study, folder: Folder) -> None:
        self._study, self._folder = study, folder
        self._job: Job | None = None

    def start(self, job: Job) -> None:
        """Take up a run."""
        self._job = job

    def watch(self, seconds: float, handle: Callable[[Event], None]) -> None:
        """Do the run."""
        assert self._job is not None
        job, self._job = self._job, None
        try:
            carry_out(self._study, self._folder, job, handle)
        except Exception:
            handle(("failed", job, traceback.format_exc()))
        else:
            handle(("finished", job, None))

    def close(self) -> None:
        """Nothing is left to end."""


class _Worker:
    """A process, the wire to it, and what it is doing."""

    def __init__(self, study: Study, folder: Folder, core: int | None, gpu: int | None) -> None:
        context = multiprocessing.get_context("spawn")
        self.wire, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, study, folder, core, gpu), daemon=True)
        with _ctrl_c_ignored():
            self.process.start()
        theirs.close()  # so that its end is noticed here
        self.job: Job | None = None


class Processes:
    """Processes of this machine: pinned to cores where they fill all of them, one for each GPU on GPUs.

    A process that dies takes its run with it, which is reported; another takes its place.
    """

    def __init__(self, study: Study, folder: Folder, workers: int) -> None:
        self.workers = workers
        self._study, self._folder = study, folder
        self._crew: list[_Worker | None] = [None] * workers

    def start(self, job: Job) -> None:
        """Give a run to a worker that is free, or to a new one."""
        place = next(i for i, worker in enumerate(self._crew) if worker is None or worker.job is None)
        worker = self._crew[place]
        if worker is None or not worker.process.is_alive():
            cores, gpus = placement(self.workers, self._study.device)
            worker = self._crew[place] = _Worker(self._study, self._folder, cores[place], gpus[place])
        worker.job = job
        with contextlib.suppress(OSError):  # it has died; `watch` finds that out
            worker.wire.send(job)

    def watch(self, seconds: float, handle: Callable[[Event], None]) -> None:
        """Hand over what the workers say, and which have died."""
        busy = {worker.wire: worker for worker in self._crew if worker is not None and worker.job is not None}
        for wire in wait(list(busy), seconds):
            worker = busy[wire]  # type: ignore[index]
            assert worker.job is not None
            job = worker.job
            try:
                event = worker.wire.recv()
            except (EOFError, OSError):
                worker.process.join()
                self._crew[self._crew.index(worker)] = None
                event = ("failed", job, _end_of(worker.process.exitcode or 0))
            if event[0] in ("finished", "failed"):
                worker.job = None
            handle(event)

    def close(self) -> None:
        """End all workers."""
        crew = [worker for worker in self._crew if worker is not None]
        for worker in crew:
            worker.process.terminate()
        for worker in crew:
            worker.process.join()
            worker.wire.close()


def placement(workers: int, device: str) -> tuple[list[int | None], list[int | None]]:
    """Core and GPU of each worker.

    Workers are pinned only where they fill all cores: fewer are left to the system, which knows what else runs.
    """
    own = cores()
    pinned = device == "cpu" and workers >= len(own) and hasattr(os, "sched_setaffinity")
    gpus = torch.cuda.device_count() if device == "cuda" else 0
    return (
        [own[place % len(own)] if pinned else None for place in range(workers)],
        [place % gpus if gpus else None for place in range(workers)],
    )


def _end_of(code: int) -> str:
    """Why a process ended without a word."""
    if code < 0:
        name = signal.Signals(-code).name
        memory = "; if memory was short, take fewer --workers" if name == "SIGKILL" else ""
        return f"its process was ended by {name}{memory}"
    return f"its process ended with exit code {code}"


@contextlib.contextmanager
def _ctrl_c_ignored() -> Iterator[None]:
    """Processes started here ignore Ctrl-C for good: it is the parent's business, which ends its workers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def _work(wire: Connection, study: Study, folder: Folder, core: int | None, gpu: int | None) -> None:
    """A worker: one run after the other, as long as its parent lives."""
    if core is not None:
        os.sched_setaffinity(0, {core})
    if gpu is not None:
        torch.cuda.set_device(gpu)

    def send(event: Event) -> None:
        try:
            wire.send(event)
        except OSError:  # the parent is gone
            os._exit(1)

    while True:
        try:
            job = wire.recv()
        except EOFError:
            return
        try:
            carry_out(study, folder, job, send)
        except Exception:
            send(("failed", job, traceback.format_exc()))
        else:
            send(("finished", job, None))
