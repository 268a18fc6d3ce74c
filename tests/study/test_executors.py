"""Executors: the same numbers wherever a run is computed, and a worker that dies takes nobody with it."""

import os
import signal
import time

import pytest
import torch
import yaml
from stored import assert_same

from clagrange.study import runner
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
    monkeypatch.setattr(runner, "cores", lambda: [2, 5])
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
def test_a_machine_of_a_ray_cluster_is_lost_and_the_numbers_are_the_same(study, tmp_path):
    pytest.importorskip("ray", reason="ray, of the extra clagrange[ray], is not installed")
    import ray
    from ray.cluster_utils import Cluster

    from clagrange.study.cluster import OnRay

    expected = in_this_process(study, tmp_path / "whole")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second = cluster.add_node(num_cpus=2)
    said, seen = [], []
    try:
        ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
        folder = Folder(tmp_path / "out")
        folder.prepare(study)
        on_ray = OnRay(study, folder, cluster.address)
        assert on_ray.workers == 3

        def show(progress):
            begun = [job for job in progress.running if progress.done[job] > 0]
            if not seen and len(begun) == 3:
                seen.append(begun)
                cluster.remove_node(second, allow_graceful=False)

        results = run_study(study, folder, executor=on_ray, show=show, say=said.append)
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert len(seen) == 1
    assert len([line for line in said if "its worker was lost" in line]) >= 2
    assert_same(results, expected)
    assert not list(folder.path.glob("checkpoints/*"))
