"""Executors: the same numbers wherever a run is computed, and a worker that dies takes nobody with it."""

import dataclasses
import os
import signal
import sys
import time
import types

import pytest
import torch
import yaml
from stored import assert_same

from clagrange.study import cluster, executors
from clagrange.study.executors import Processes, placement
from clagrange.study.runner import Progress, RunsFailed, run_study
from clagrange.study.settings import load_study
from clagrange.study.store import Folder

STUDY = {
    "seeds": 2,
    "streams": {
        "permuted_digits": {
            "stream": {"tasks": 30, "examples": 160},
            "hidden": [6],
            "methods": {"sgd": {}, "adam": {}, "l2_init": {}, "shrink_and_perturb": {}},
        }
    },
}


@pytest.fixture
def study(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(STUDY, sort_keys=False))
    return load_study(path)


def in_this_process(study, path):
    folder = Folder(path)
    folder.prepare(study)
    return run_study(study, folder, workers=1)


def test_workers_are_pinned_where_they_fill_all_cores_and_have_a_gpu_each(monkeypatch):
    monkeypatch.setattr(executors, "cores", lambda: [2, 5])
    assert placement(2, "cpu") == ([2, 5], [None, None])
    assert placement(3, "cpu") == ([2, 5, 2], [None] * 3)
    assert placement(1, "cpu") == ([None], [None])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert placement(3, "cuda") == ([None] * 3, [0, 1, 0])


def test_rate_and_time_left_are_those_since_a_run_went_on(monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    job = ("stream", "method")
    progress = Progress({job: 100, ("stream", "other"): 50}, replicas=5)
    assert progress.speed() == ""
    progress.advance(job, 20)
    now = 102.0
    progress.advance(job, 60)
    assert progress.rate(job) == 5 * 40 / 2.0
    assert progress.speed(job) == "100 model-steps/s, 0:00:02 left"
    assert progress.speed() == "100 model-steps/s, 0:00:04 left"
    progress.advance(job, 100)
    assert progress.running == []


def test_after_each_task_all_its_steps_have_been_told(study, tmp_path):
    folder, job, told = Folder(tmp_path / "out"), ("permuted_digits", "sgd"), []
    folder.prepare(study)
    run, _ = folder.start(study, job, pytest.fail)
    pauses = [told[-1][2] for _ in executors.tasks_of(run, job, told.append)]
    steps = study.streams["permuted_digits"].stream(0).total_steps // 30
    assert pauses == [steps * (task + 1) for task in range(30)]
    assert {event[0] for event in told} == {"steps", "tasks"}


class RayError(Exception):
    pass


class RayTaskError(RayError):
    pass


class Ray:
    """What `OnRay` uses of Ray, in this process: each first worker of a run is lost after two tasks."""

    exceptions = types.SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)

    def __init__(self):
        self.given = []

    def is_initialized(self):
        return True

    def cluster_resources(self):
        return {"CPU": 2.0}

    def remote(self, **options):
        assert options["max_retries"] == 0

        def wrap(function):
            def start(study, job, origin, checkpoint, data):
                first = all(job != earlier for earlier, _ in self.given)
                self.given.append((job, checkpoint is None))
                return self.sent(function(study, job, origin, checkpoint, data), 2 if first else None)

            return types.SimpleNamespace(remote=start)

        return wrap

    def sent(self, stream, until):
        for count, message in enumerate(stream):
            yield RayError("lost") if count == until else message

    def wait(self, streams, num_returns, timeout):
        return streams[:num_returns], streams[num_returns:]

    def get(self, message):
        if isinstance(message, Exception):
            raise message
        return message

    def cancel(self, stream, force):
        stream.close()


def test_what_a_lost_worker_of_a_cluster_had_goes_on_from_its_last_task(study, tmp_path, monkeypatch):
    study = dataclasses.replace(study, streams={name: fewer(body) for name, body in study.streams.items()})
    ray, said = Ray(), []
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(cluster, "require_ray", lambda: None)
    folder = Folder(tmp_path / "out")
    folder.prepare(study)
    results = run_study(study, folder, executor=cluster.OnRay(study, folder), say=said.append)
    assert sorted(ray.given) == [(job, fresh) for job in sorted(study.runs()) for fresh in (False, True)]
    assert [line.partition(":")[2] for line in said] == [
        " its worker was lost (RayError); it goes on elsewhere"
    ] * 2
    assert_same(results, in_this_process(study, tmp_path / "whole"))
    assert not (folder.path / "checkpoints").exists()


def fewer(body):
    """The same with four tasks, and two methods."""
    methods = {name: body.methods[name] for name in ("sgd", "adam")}
    return dataclasses.replace(body, settings={**body.settings, "tasks": 4}, methods=methods)


@pytest.mark.slow
def test_a_worker_that_is_killed_is_reported_and_the_others_go_on(study, tmp_path):
    folder = Folder(tmp_path / "out")
    folder.prepare(study)
    processes = Processes(study, folder, 2)
    killed = []

    def show(progress):
        if not killed and progress.done.get(("permuted_digits", "adam"), 0) > 0:
            worker = next(w for w in processes._crew if w is not None and w.job == ("permuted_digits", "adam"))
            os.kill(worker.process.pid, signal.SIGKILL)
            killed.append(worker.process.pid)

    with pytest.raises(
        RunsFailed, match=r"permuted_digits\.adam failed: its process was ended by SIGKILL"
    ) as error:
        run_study(study, folder, executor=processes, show=show)
    assert set(error.value.reasons) == {("permuted_digits", "adam")}
    assert {path.name.split(".")[1] for path in folder.path.glob("results/*")} == {
        "sgd",
        "l2_init",
        "shrink_and_perturb",
    }
    assert not (folder.path / "locks").exists()
    folder.prepare(study, resume=True)
    results = run_study(study, folder, workers=2)
    assert_same(results, in_this_process(study, tmp_path / "whole"))


@pytest.mark.slow
def test_a_machine_of_a_ray_cluster_is_lost_and_the_numbers_are_the_same(study, tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="ray, of the extra clagrange[ray], is not installed")
    import ray
    from ray.cluster_utils import Cluster

    expected = in_this_process(study, tmp_path / "whole")
    lost = tmp_path / "lost"

    def held(*arguments):
        """Each run waits after its first task for the loss of the machine, however fast or slow workers start."""
        for count, message in enumerate(cluster._carry_out(*arguments)):
            yield message
            while count == 0 and not lost.exists():
                time.sleep(0.02)

    monkeypatch.setattr(cluster, "_carry_out", held)
    machines = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second = machines.add_node(num_cpus=2)
    said = []
    try:
        ray.init(address=machines.address, log_to_driver=False, logging_level="error")
        folder = Folder(tmp_path / "out")
        folder.prepare(study)
        on_ray = cluster.OnRay(study, folder, machines.address)
        assert on_ray.workers == 3

        def show(progress):
            begun = [job for job in progress.running if progress.done[job] > 0]
            if not lost.exists() and len(begun) == 3:
                machines.remove_node(second, allow_graceful=False)
                lost.touch()

        results = run_study(study, folder, executor=on_ray, show=show, say=said.append)
    finally:
        ray.shutdown()
        machines.shutdown()
    assert lost.exists()
    assert len([line for line in said if "its worker was lost" in line]) == 2
    assert_same(results, expected)
    assert not list(folder.path.glob("checkpoints/*"))
