"""The store: nothing runs twice, nothing stale is taken for fresh, nothing is lost to damage or to kill -9."""

import contextlib
import json
import multiprocessing
import os
import random
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from stored import assert_same

from clagrange.study import store
from clagrange.study.files import file_name, partial_prefix, remove_leftovers
from clagrange.study.machine import beginning_of, this_host
from clagrange.study.problems import SettingsError
from clagrange.study.results import MethodResult
from clagrange.study.runner import RunsFailed, run_study
from clagrange.study.settings import load_study
from clagrange.study.store import Folder, code_version

SGD, ADAM = ("permuted_digits", "sgd"), ("permuted_digits", "adam")
STUDY = {
    "seeds": 2,
    "streams": {
        "permuted_digits": {
            "stream": {"tasks": 3, "examples": 40},
            "hidden": [6],
            "methods": {"sgd": {"lr": 0.1}, "adam": {}},
        }
    },
}


@pytest.fixture
def study(tmp_path):
    def load(*overrides):
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(STUDY, sort_keys=False))
        return load_study(path, overrides)

    return load


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path / "out")


def prepared_and_run(study, folder, **settings):
    """Results, and what was said."""
    said = []
    folder.prepare(study, say=said.append, **settings)
    return run_study(study, folder, workers=1, say=said.append), said


def begun(study, folder, job, tasks=1):
    """A run that was left after some tasks."""
    run, origin = folder.start(study, job, print)
    for _ in range(tasks):
        run.run_task()
    run.save(folder.checkpoint(*job), origin.text)


def test_nothing_runs_twice_and_a_changed_setting_runs_again(study, folder):
    whole, said = prepared_and_run(study(), folder)
    assert said == []
    written = {path: path.stat().st_mtime_ns for path in (folder.result(*SGD), folder.result(*ADAM))}
    again, said = prepared_and_run(study(), folder, resume=True)
    assert_same(again, whole)
    assert said == []
    changed, said = prepared_and_run(study("sgd.lr=0.2"), folder, resume=True)
    assert len(said) == 1
    assert "permuted_digits.sgd runs again: method.lr is 0.1 there and 0.2 here" in said[0]
    assert changed[0].metrics["loss"][0, -1] != whole[0].metrics["loss"][0, -1]
    assert folder.result(*ADAM).stat().st_mtime_ns == written[folder.result(*ADAM)]
    back, said = prepared_and_run(study(), folder, resume=True)
    assert "is taken from" in said[1]
    assert folder.result(*SGD).stat().st_mtime_ns == written[folder.result(*SGD)]
    assert_same(back, whole)


def test_other_data_run_again(tmp_path, folder, monkeypatch):
    path = tmp_path / "images.yaml"
    stream = {"kind": "permuted_images", "file": "images.npz", "tasks": 2, "examples": 8, "batch_size": 4}
    path.write_text(yaml.safe_dump({"seeds": 1, "streams": {"s": {"stream": stream, "methods": {"sgd": {}}}}}))
    said = []
    for name, shade in (("one", 7), ("other", 8)):
        (tmp_path / name).mkdir()
        images = {"x_train": np.full((8, 1, 4, 4), shade, np.uint8), "y_train": np.arange(8) % 2}
        np.savez(tmp_path / name / "images.npz", **images)
        monkeypatch.setenv("CLAGRANGE_DATA", str(tmp_path / name))
        folder.prepare(load_study(path), resume=True, say=said.append)
        run_study(load_study(path), folder, workers=1)
    assert len(said) == 1
    assert "s.sgd runs again: its data are others (checksum " in said[0]


def test_finished_results_of_another_version_are_kept_and_unfinished_ones_refused(study, folder, monkeypatch):
    whole, _ = prepared_and_run(study(), folder)
    folder.result(*ADAM).unlink()
    begun(study(), folder, ADAM)
    monkeypatch.setattr(store, "code_version", lambda: "clagrange 9")
    with pytest.raises(SettingsError, match=r"unfinished runs of clagrange .*adam.*this is clagrange 9.*--fresh"):
        folder.prepare(study(), resume=True)
    folder.checkpoint(*ADAM).unlink()
    results, said = prepared_and_run(study(), folder, resume=True)
    assert len(said) == 1
    assert said[0].startswith(f"warning: results of {code_version()} are kept (permuted_digits.sgd)")
    assert "clagrange 9" in said[0]
    assert [result.origin["version"] for result in results] == [code_version(), "clagrange 9"]
    results, said = prepared_and_run(study(), folder, fresh=True)
    assert "permuted_digits.sgd runs again: it is of clagrange" in said[0]
    assert [result.origin["version"] for result in results] == ["clagrange 9"] * 2
    assert_same(results, whole)


def test_an_unfinished_run_of_other_settings_begins_anew(study, folder):
    folder.prepare(study())
    begun(study("sgd.lr=0.3"), folder, SGD)
    results, said = prepared_and_run(study(), folder, resume=True)
    assert said == ["permuted_digits.sgd begins anew: method.lr is 0.3 there and 0.1 here"]
    assert_same(results, prepared_and_run(study(), Folder(folder.path.with_name("whole")))[0])


def test_results_without_a_record_are_kept_while_the_settings_of_their_folder_are_the_same(study, folder):
    whole, _ = prepared_and_run(study(), folder)
    for result in whole:
        MethodResult(**{**vars(result), "origin": None}).write(folder.result(result.stream, result.method))
    results, said = prepared_and_run(study(), folder, resume=True)
    assert len(said) == 1
    assert "results of a version that kept no record are kept" in said[0]
    assert results[0].origin is None
    results, said = prepared_and_run(study("sgd.lr=0.2"), folder, resume=True)
    assert "permuted_digits.sgd runs again: method.lr is 0.1 there and 0.2 here" in said[0]
    assert results[0].origin is not None
    assert results[1].origin is None


def end_of_first_column(path):
    column = pq.ParquetFile(path).metadata.row_group(0).column(0)
    return (column.dictionary_page_offset or column.data_page_offset) + column.total_compressed_size


@pytest.mark.parametrize("damage", ["truncated", "altered"])
def test_damaged_parts_are_reported_and_computed_again(study, folder, damage):
    def spoil(path):
        content = bytearray(path.read_bytes())
        if damage == "truncated":
            del content[len(content) // 2 :]
        else:
            content[len(content) // 3 if path.suffix == ".pt" else end_of_first_column(path) - 1] ^= 0x10
        path.write_bytes(content)

    whole, _ = prepared_and_run(study(), folder)
    spoil(folder.result(*SGD))
    folder.result(*ADAM).unlink()
    begun(study(), folder, ADAM, tasks=2)
    spoil(folder.checkpoint(*ADAM))
    results, said = prepared_and_run(study(), folder, resume=True)
    assert len(said) == 2
    assert "permuted_digits.sgd runs again" in said[0]
    assert "sgd.parquet is damaged" in said[0]
    assert "permuted_digits.adam begins anew" in said[1]
    assert "damaged file" in said[1]
    assert len(list(folder.path.rglob("*.damaged"))) == 2
    assert_same(results, whole)


def test_the_version_knows_the_sources_that_numbers_depend_on(tmp_path, monkeypatch):
    package = tmp_path / "clagrange"
    (package / "study" / "reporting").mkdir(parents=True)
    (tmp_path / "pyproject.toml").touch()
    for name in ("__init__.py", "cli.py", "study/engine.py", "study/reporting/report.py"):
        (package / name).write_text("1")
    monkeypatch.setattr("clagrange.__file__", str(package / "__init__.py"))
    versions = []
    for name in ("cli.py", "study/reporting/report.py", "study/engine.py"):
        versions.append(code_version.__wrapped__())
        (package / name).write_text("2")
    versions.append(code_version.__wrapped__())
    assert versions[0] == versions[1] == versions[2] != versions[3]
    (tmp_path / "pyproject.toml").unlink()
    assert "+" not in code_version.__wrapped__().partition(",")[0]


# ------------------------------------------------------------------------------------------------ locks
def test_a_run_is_taken_by_one_living_process(study, folder):
    folder.prepare(study())
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    lock = {"host": this_host(), "pid": process.pid, "started": beginning_of(process.pid)}
    folder.lock(*SGD).parent.mkdir()
    folder.lock(*SGD).write_text(json.dumps(lock))
    assert folder.take(SGD, study()) == f"process {process.pid} on {this_host()}"
    with pytest.raises(SettingsError, match=rf"process {process.pid} on .*with other settings"):
        folder.prepare(study("sgd.lr=0.2"), resume=True)
    with pytest.raises(SettingsError, match="which --overwrite would remove"):
        folder.prepare(study(), overwrite=True)
    folder.prepare(study(), resume=True)
    process.kill()
    process.wait()
    assert folder.take(SGD, study()) is None
    assert folder.take(SGD, study()) is not None  # by this process
    folder.release(SGD)
    folder.lock(*SGD).parent.mkdir(exist_ok=True)
    folder.lock(*SGD).write_text(json.dumps({"host": this_host(), "pid": os.getpid(), "started": "1"}))
    assert folder.take(SGD, study()) is None  # the number belongs to another process now
    folder.lock(*SGD).write_text(json.dumps({**lock, "host": "elsewhere"}))
    assert folder.take(SGD, study()) == f"process {process.pid} on elsewhere"
    folder.release(SGD)
    assert folder.lock(*SGD).exists()
    folder.lock(*SGD).unlink()
    assert folder.take(SGD, study()) is None
    folder.release(SGD)
    assert not (folder.path / "locks").exists()


def test_a_study_that_another_one_has_replaced_does_not_go_on(study, folder):
    folder.prepare(study())
    folder.prepare(study("sgd.lr=0.2"), resume=True)  # nobody is at work yet
    with pytest.raises(SettingsError, match=r"another process has begun with other settings"):
        run_study(study(), folder, workers=1)
    assert not folder.result(*SGD).exists()
    results = run_study(study("sgd.lr=0.2"), folder, workers=1)
    assert results[0].origin["settings"]["method"]["lr"] == 0.2
    assert not (folder.path / "locks").exists()


def test_processes_may_begin_a_study_at_the_same_moment(study, tmp_path):
    same = study()
    together = threading.Barrier(2)

    def begin(folder):
        together.wait()
        folder.prepare(same, resume=True)

    with ThreadPoolExecutor(2) as pool:
        for attempt in range(30):
            list(pool.map(begin, [Folder(tmp_path / str(attempt))] * 2))


def test_overwriting_leaves_nothing_of_what_was_there(study, folder):
    prepared_and_run(study(), folder)
    (folder.path / "report.html").touch()
    (folder.path / "locks").mkdir()
    (folder.path / "locks" / "permuted_digits.sgd.json").write_text("{}")
    folder.prepare(study(), overwrite=True)
    assert [path.name for path in folder.path.iterdir()] == ["config.yaml"]


def test_what_another_living_process_writes_is_left_alone(tmp_path):
    mine = partial_prefix(tmp_path / "a.txt")
    names = {
        "living": mine.replace(f"{os.getpid()}@", f"{os.getppid()}@") + "x1.txt",
        "elsewhere": mine.replace(f"@{file_name(this_host())}", "@elsewhere") + "x2.txt",
        "gone": mine.replace(f"{os.getpid()}@", "4194304@") + "x3.txt",
        "older form": ".a.txt.partial-x4.txt",
    }
    for name in names.values():
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {names["living"], names["elsewhere"]}


def test_a_failed_run_is_reported_and_the_others_go_on(study, folder, monkeypatch):
    start = Folder.start

    def failing(self, study, job, say):
        if job == SGD:
            raise ZeroDivisionError("on purpose")
        return start(self, study, job, say)

    monkeypatch.setattr(Folder, "start", failing)
    folder.prepare(study())
    with pytest.raises(RunsFailed, match=r"permuted_digits\.sgd failed") as error:
        run_study(study(), folder, workers=1)
    assert "on purpose" in error.value.reasons[SGD]
    assert folder.result(*ADAM).exists()
    monkeypatch.undo()
    results, _ = prepared_and_run(study(), folder, resume=True)
    assert [result.method for result in results] == ["sgd", "adam"]


# ------------------------------------------------------------------------------------------------ processes
LONGER = ["tasks=30", "examples=160"]


def _go_on(path, out, together=None):
    """What a process does that is killed, or that begins together with others."""
    study, folder = load_study(path, LONGER), Folder(Path(out))
    if together is not None:
        together.wait(timeout=120)
    folder.prepare(study, resume=True)
    run_study(study, folder, workers=1)


def owners(folder):
    """Which process has taken a run."""
    found = {}
    for lock in folder.path.glob("locks/[!.]*.json"):
        with contextlib.suppress(OSError):
            found[lock.stem] = json.loads(lock.read_text())["pid"]
    return found


@pytest.fixture(scope="module")
def forks():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["clagrange.study.runner", "torch._dynamo", "tensorboard"])
    return context


@pytest.mark.slow
def test_twenty_kills_at_random_moments_leave_the_identical_numbers(study, folder, tmp_path, forks):
    study()
    path, whole = str(tmp_path / "study.yaml"), Folder(tmp_path / "whole")
    reference = load_study(path, LONGER)
    whole.prepare(reference)
    began = time.monotonic()
    expected = run_study(reference, whole, workers=1)
    seconds = time.monotonic() - began
    moments, kills = random.Random(0), 0
    while kills < 20:
        process = forks.Process(target=_go_on, args=(path, str(folder.path)))
        process.start()
        while process.is_alive() and process.pid not in owners(folder).values():
            time.sleep(0.005)
        time.sleep(moments.uniform(0.0, seconds / 20.0))
        if not process.is_alive():
            break
        process.kill()
        process.join()
        kills += 1
    assert kills == 20, "the study was done too soon"
    folder.prepare(reference, resume=True, say=pytest.fail)
    assert_same(run_study(reference, folder, workers=1), expected)
    assert not list(folder.path.rglob(".*"))
    assert not (folder.path / "locks").exists()


@pytest.mark.slow
def test_two_processes_share_the_runs_of_a_folder(study, folder, tmp_path, forks):
    study()
    path = str(tmp_path / "study.yaml")
    reference = load_study(path, LONGER)
    folder.prepare(reference)
    together = forks.Barrier(2)
    processes = [forks.Process(target=_go_on, args=(path, str(folder.path), together)) for _ in range(2)]
    for process in processes:
        process.start()
    seen = {}
    while any(process.is_alive() for process in processes):
        for job, pid in owners(folder).items():
            seen.setdefault(job, set()).add(pid)
        time.sleep(0.005)
    assert [process.exitcode for process in processes] == [0, 0]
    assert [len(pids) for pids in seen.values()] == [1, 1]
    assert len(set.union(*seen.values())) == 2
    whole = Folder(tmp_path / "whole")
    whole.prepare(reference)
    assert_same(run_study(reference, folder, workers=1), run_study(reference, whole, workers=1))
