"""All runs of a study: shared out, watched, interrupted, gone on with."""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta

import torch

from clagrange.study.engine import read_checkpoint
from clagrange.study.executors import Event, Executor, InProcess, Processes
from clagrange.study.files import FileProblem
from clagrange.study.machine import cores
from clagrange.study.reporting.events import LiveEvents
from clagrange.study.results import MethodResult
from clagrange.study.settings import Study
from clagrange.study.store import Folder, Job, stored_results

WATCH_SECONDS = 0.2
"""How often whoever shows the progress is called."""

OTHERS_SECONDS = 1.0
"""How often to look whether another process has finished or left a run."""


class Interrupted(Exception):  # noqa: N818 - not an error
    """The study was stopped by the user; finished tasks are kept.

    Attributes:
        tasks: number of finished tasks of all runs.
        planned: number of tasks of all runs.
    """

    def __init__(self, tasks: int, planned: int) -> None:
        super().__init__(f"{tasks} of {planned} tasks are finished")
        self.tasks = tasks
        self.planned = planned


class RunsFailed(RuntimeError):  # noqa: N818 - says what happened
    """Some runs failed; the others are finished.

    Attributes:
        reasons: by stream and method, each with its traceback or the end of its process.
    """

    def __init__(self, reasons: dict[Job, str]) -> None:
        said = "\n".join(f"{'.'.join(job)} failed: {reason}" for job, reason in reasons.items())
        super().__init__(f"{said}\nfinished tasks are kept, go on with --resume")
        self.reasons = reasons


@dataclass
class Progress:
    """How far a study is, for whoever shows it.

    Attributes:
        planned: optimizer steps of each run, by stream and method.
        replicas: networks that are trained in each run.
        done: steps taken so far.
        first: steps and time at which a run began or went on here.
        diverged: number of replicas of each run that have diverged.
        failed: runs that failed.
    """

    planned: dict[Job, int]
    replicas: int = 1
    done: dict[Job, int] = field(default_factory=dict)
    first: dict[Job, tuple[int, float]] = field(default_factory=dict)
    diverged: dict[Job, int] = field(default_factory=dict)
    failed: set[Job] = field(default_factory=set)

    @property
    def running(self) -> list[Job]:
        """Runs that have begun here and are not finished."""
        return [job for job in self.first if self.done[job] < self.planned[job] and job not in self.failed]

    def advance(self, job: Job, steps: int) -> None:
        """A run has taken so many steps in all."""
        self.first.setdefault(job, (steps, time.monotonic()))
        self.done[job] = steps

    def rate(self, job: Job) -> float | None:
        """Steps of all replicas of a run per second, measurements included; None before there is a number."""
        if job not in self.first:
            return None
        steps, began = self.first[job]
        seconds = time.monotonic() - began
        return self.replicas * (self.done[job] - steps) / seconds if self.done[job] > steps and seconds else None

    def speed(self, job: Job | None = None) -> str:
        """Rate and time left of a run, or of all, in words; empty before there are any."""
        rate = sum(self.rate(each) or 0.0 for each in (self.running if job is None else [job]))
        if not rate:
            return ""
        jobs = [each for each in self.planned if each not in self.failed] if job is None else [job]
        left = sum(self.planned[each] - self.done.get(each, 0) for each in jobs) * self.replicas / rate
        return f"{rate:,.0f} model-steps/s" + (f", {timedelta(seconds=round(left))} left" if left else "")


def run_study(
    study: Study,
    folder: Folder,
    *,
    workers: int | None = None,
    executor: Executor | None = None,
    show: Callable[[Progress], None] = lambda progress: None,
    say: Callable[[str], None] = lambda line: None,
) -> list[MethodResult]:
    """Run what is not finished yet and return all results, in the order of the study.

    Results do not depend on the number of workers, nor on the executor: every run has one thread and its own
    random streams. Several processes may run one study in one folder: each run is taken by one, and a process
    that has nothing left to take waits for the others.

    Args:
        study: what to run.
        folder: a prepared folder.
        workers: number of processes; default one for each core (for each GPU, on GPUs), at most one for each run.
        executor: what runs them; default: this process for one worker, else processes of this machine.
        show: called a few times a second with the progress.
        say: told of what is damaged and begins anew, and of runs that other processes have taken.

    Raises:
        Interrupted: on Ctrl-C.
        RunsFailed: if runs failed; all others are finished by then.
        SettingsError: if another process has begun with other settings in the folder.
    """
    runs = study.runs()
    waiting = [job for job in runs if not folder.result(*job).exists()]
    progress = Progress({job: _steps(study, *job) for job in runs}, len(study.seeds))
    progress.done = {job: progress.planned[job] for job in runs if job not in waiting}
    chosen = executor or _local(study, folder, workers, len(waiting))
    running: set[Job] = set()
    failed: dict[Job, str] = {}
    live = LiveEvents(folder.path / "tensorboard")

    def handle(event: Event) -> None:
        kind, job, payload = event
        if kind == "steps":
            progress.advance(job, payload)
        elif kind == "tasks":
            progress.diverged[job] = live.add(*job, *payload)
        elif kind == "said":
            say(payload)
        else:
            running.discard(job)
            live.close(*job)
            folder.release(job)
            if kind == "finished":
                progress.advance(job, progress.planned[job])
            else:
                failed[job] = payload
                progress.failed.add(job)
        show(progress)

    try:
        looked, told = -OTHERS_SECONDS, False
        while waiting or running:
            if waiting and len(running) < chosen.workers and time.monotonic() - looked >= OTHERS_SECONDS:
                others = _take(study, folder, chosen, waiting, running, progress)
                if others:
                    looked = time.monotonic()
                if others and not running and not told:
                    told = True
                    say(f"waiting for {', '.join(sorted(set(others)))}, which has taken what is left")
            if running:
                chosen.watch(WATCH_SECONDS, handle)
            elif waiting:
                time.sleep(WATCH_SECONDS)
            show(progress)
    except KeyboardInterrupt:
        raise Interrupted(*_finished_tasks(study, folder)) from None
    finally:
        live.close_all()
        chosen.close()
        for job in running:
            folder.release(job)
    folder.tidy()
    if failed:
        raise RunsFailed(failed)
    with folder.alone():
        folder.require(study)
        return stored_results(folder, runs)


def _take(
    study: Study,
    folder: Folder,
    executor: Executor,
    waiting: list[Job],
    running: set[Job],
    progress: Progress,
) -> list[str]:
    """Start what is free, as far as there are workers; which processes have the rest."""
    others = []
    for job in list(waiting):
        if len(running) >= executor.workers:
            return []
        holder = None if folder.result(*job).exists() else folder.take(job, study)
        if holder is not None:
            others.append(holder)
            continue
        waiting.remove(job)
        if folder.result(*job).exists():  # another process has just finished it
            folder.release(job)
            progress.done[job] = progress.planned[job]
        else:
            running.add(job)
            executor.start(job)
    return others


def _local(study: Study, folder: Folder, workers: int | None, jobs: int) -> Executor:
    """This process, or processes of this machine."""
    most = torch.cuda.device_count() if study.device == "cuda" else len(cores())
    wanted = min(workers or most or 1, jobs)
    return InProcess(study, folder) if wanted <= 1 else Processes(study, folder, wanted)


def _steps(study: Study, stream: str, method: str) -> int:
    return study.streams[stream].stream(study.seeds[0]).total_steps


def _finished_tasks(study: Study, folder: Folder) -> tuple[int, int]:
    finished = planned = 0
    for stream, method in study.runs():
        tasks = study.streams[stream].stream(study.seeds[0]).tasks
        planned += tasks
        if folder.result(stream, method).exists():
            finished += tasks
        elif folder.checkpoint(stream, method).exists():
            with contextlib.suppress(FileProblem):
                finished += int(read_checkpoint(folder.checkpoint(stream, method))["next_task"])
    return finished, planned
