"""The command line from end to end: one-line errors, interruption, resumption, identical results."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from clagrange import metrics
from clagrange.cli import main
from clagrange.study.results import METRICS

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
STUDY = {
    "seeds": 2,
    "streams": {
        "permuted_digits": {
            "stream": {"tasks": 4, "examples": 80},
            "hidden": [8],
            "methods": {"sgd": {}, "continual_backprop": {}, "euler_lagrange_injection": {}},
        }
    },
}


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(STUDY))
    return str(path)


def rows(folder: Path):
    tables = [pq.read_table(path) for path in sorted((folder / "results").glob("*.parquet"))]
    return [repr(table.to_pydict()) for table in tables]  # as text, where nan equals nan


def test_compare_writes_everything_that_it_promises(config, tmp_path, capsys):
    out = tmp_path / ("a_[long]_name_" * 10)
    assert main(["compare", config, "--out", str(out), "--workers", "1"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].endswith(f" into {out}")  # whole, on one line
    assert said[-1] == f"Report: {out / 'report.html'}"
    assert any("euler_lagrange_injection" in line for line in said)
    names = {path.name for path in out.iterdir()}
    assert names == {
        "config.yaml",
        "results",
        "summary.json",
        "accuracy.png",
        *("plasticity.png", "profile.png", "improvement.png", "cost.png"),
        *("report.html", "report.md", "report.tex"),
        "streams",
        "tensorboard",
    }
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["schema"], summary["status"]) == (1, "complete")
    stream = summary["streams"][0]
    assert (stream["name"], stream["tasks"]) == ("permuted_digits", 4)
    for method in stream["methods"]:
        assert set(method) >= {
            "name",
            "told_of_switches",
            "seeds",
            "online_accuracy",
            "first_tenth",
            "last_tenth",
            "model_steps_per_second",
            "seconds",
            "diverged",
        }
        assert method["seeds"] == [0, 1]
        low, mean, high = (method["online_accuracy"][key] for key in ("low", "mean", "high"))
        assert low <= mean <= high
    table = pq.read_table(out / "results" / "permuted_digits.sgd.parquet").to_pydict()
    assert set(table) == {"stream", "method", "seed", "task", *METRICS}
    assert len(table["task"]) == 8
    assert (
        yaml.safe_load((out / "config.yaml").read_text())["streams"]["permuted_digits"]["stream"]["batch_size"]
        == 4
    )


def test_a_used_folder_is_refused_resumed_or_replaced(config, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert main(["compare", config, "--out", out, "--methods", "sgd", "--workers", "1"]) == 0
    before = rows(Path(out))
    assert main(["compare", config, "--out", out, "--methods", "sgd"]) == 2
    assert "already holds a study" in capsys.readouterr().err
    leftover = Path(out) / ".tensorboard.partial-x1" / "new"  # what a killed process leaves
    leftover.mkdir(parents=True)
    (Path(out) / ".accuracy.png.partial-x2.png").write_text("half")
    (Path(out) / ".mine").write_text("kept")
    assert main(["compare", config, "--out", out, "--methods", "sgd", "--resume"]) == 0
    assert rows(Path(out)) == before
    assert [path.name for path in Path(out).rglob(".*")] == [".mine"]
    assert main(["compare", config, "tasks=1", "--out", out, "--methods", "sgd", "--resume"]) == 0
    assert "stream.tasks is 4 there and 1 here" in capsys.readouterr().err
    assert main(["compare", config, "tasks=1", "--out", out, "--methods", "sgd", "--overwrite"]) == 0
    assert pq.read_table(Path(out) / "results" / "permuted_digits.sgd.parquet").num_rows == 2
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    assert main(["compare", config, "--out", str(tmp_path / "mine"), "--overwrite"]) == 2
    assert (tmp_path / "mine" / "thesis.tex").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "{config}", "--methods", "sdg"], "did you mean 'sgd'?"),
        (["compare", "{config}", "euler_lagrange_injection.temperature=-1"], "temperature: expected a number in"),
        (["compare", "nowhere.yaml"], "No such file"),
        (["compare", "{config}", "--out", "{config}"], "expected a folder, got the file"),
        (["compare", "{config}", "--out", "/dev/null/x"], "cannot be written"),
        (["compare", "{config}", "--workers", "0"], "workers: expected"),
        (["compare", "{config}", "--resume", "--overwrite"], "choose one"),
        (["compare", "{config}", "--overwrite", "--fresh"], "choose one"),
        (["compare", "{config}", "--executor", "threads"], "executor: expected processes or ray, got 'threads'"),
        (["compare", "{config}", "--address", "auto"], "address: expected only with --executor ray"),
        (["compare", "{config}", "--device", "tpu"], "device: expected cpu or cuda, got 'tpu'"),
        (["compare", "{config}", "--ouy", "x"], "unrecognized arguments"),
        (["compare", "{config}", "--out", "x", "seeds=2"], "seeds=2; key=value goes before the options"),
        (["comprae"], "invalid choice"),
        (["figure", "3", "--out", "/dev/null/x"], "cannot be written"),
        (["tune", "demo_search", "--out", "/dev/null/x/found.json"], "cannot be written"),
        (["tune", "demo_search", "--out", "found.json", "--device", "tpu"], "expected cpu or cuda, got 'tpu'"),
        (["report", "nowhere"], "expected the folder of a study"),
        (["list", "method"], "did you mean 'methods'?"),
    ],
)
def test_bad_input_gives_one_line_and_writes_nothing(config, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert main([argument.format(config=config) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("clagrange: ")
    assert error.count("\n") == 1
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_report_again_gives_the_same_summary(config, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["compare", config, "--out", str(out), "--methods", "sgd", "--workers", "1"]) == 0
    before = (out / "summary.json").read_text()
    (out / "report.html").unlink()
    (out / "accuracy.png").unlink()
    capsys.readouterr()
    assert main(["report", str(out), "--markdown"]) == 0
    assert "| **sgd** | no |" in capsys.readouterr().out
    assert (out / "summary.json").read_text() == before
    assert (out / "report.html").exists()
    assert (out / "accuracy.png").exists()


def test_report_of_a_stored_summary_leaves_it_as_it_is(tmp_path, monkeypatch, capsys):
    """By the name of a study in runs/, with the search behind it, and against a method of choice."""
    folder = tmp_path / "runs" / "permuted"
    shutil.copytree(BENCHMARKS / "permuted", folder)
    monkeypatch.chdir(tmp_path)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert main(["report", "permuted"]) == 0
    assert "Highest mean: euler_lagrange_kronecker_injection." in capsys.readouterr().out
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert {path.name for path in folder.iterdir()} == {*before, "report.html", "report.md", "report.tex"}
    assert main(["report", "permuted", "--reference", "adam"]) == 2
    assert "reference: expected results by task" in capsys.readouterr().err
    assert main(["report", "permuted", "--search", "none.json"]) == 2
    assert "search: expected a file that clagrange tune wrote, got none.json" in capsys.readouterr().err


def test_report_against_a_method_of_choice(config, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["compare", config, "--out", str(out), "--workers", "1"]) == 0
    assert main(["report", str(out), "--reference", "sgd"]) == 0
    stream = json.loads((out / "summary.json").read_text())["streams"][0]
    assert stream["comparisons"]["reference"] == "sgd"
    assert [method["name"] for method in stream["comparisons"]["methods"]] == [
        "continual_backprop",
        "euler_lagrange_injection",
    ]
    capsys.readouterr()
    assert main(["report", str(out), "--reference", "sdg"]) == 2
    assert "did you mean 'sgd'?" in capsys.readouterr().err


def test_a_damaged_result_is_named(config, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["compare", config, "--out", str(out), "--methods", "sgd", "--workers", "1"]) == 0
    path = out / "results" / "permuted_digits.sgd.parquet"
    path.write_bytes(b"PAR1")
    assert main(["report", str(out)]) == 2
    assert "permuted_digits.sgd.parquet" in capsys.readouterr().err
    path.unlink()
    assert main(["compare", config, "--out", str(out), "--methods", "sgd", "--resume", "--workers", "1"]) == 0


def test_lists_are_complete_and_readable_by_programs(capsys):
    from clagrange.study.methods import METHODS

    assert main(["list", "methods", "--json"]) == 0

    def no_constant(text):
        raise AssertionError(f"{text} is not JSON")

    listed = json.loads(capsys.readouterr().out, parse_constant=no_constant)
    assert [entry["name"] for entry in listed] == list(METHODS)
    assert all(entry["summary"] and entry["source"] and "lr" in entry["parameters"] for entry in listed)
    assert {entry["name"]: entry["extra"] for entry in listed if "extra" in entry} == {
        "ivon": "ivon",
        "soap": "second-order",
    }
    assert main(["list", "methods"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for entry in listed:
        assert all(f"{name}=" in shown for name in entry["parameters"])
        documented = "".join(kind.__doc__ or "" for kind in METHODS[entry["name"]].__mro__)
        assert set(entry["parameters"]) == set(re.findall(r"^        (\w+): ", documented, re.M)) - {
            "source",
            "samples_weights",
            "extra",
        }
    assert "every=null" in shown
    assert "discount=.inf" in shown
    assert main(["list", "streams"]) == 0
    assert "permuted_mnist" in capsys.readouterr().out
    assert main(["list", "metrics"]) == 0
    assert "effective_rank" in capsys.readouterr().out
    assert main(["list", "metrics", "--json"]) == 0
    listed = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert list(listed) == list(metrics.METRICS)
    assert all(entry["summary"] and entry["unit"] and entry["logged"] for entry in listed.values())
    assert "summary.json" in listed["samples_to_threshold"]["logged"]
    assert "before training on it" in listed["dead_units"]["logged"]


def command(*arguments):
    return [sys.executable, "-m", "clagrange", *arguments]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_keeps_finished_tasks_and_resume_is_identical(config, tmp_path, workers):
    study = ["compare", config, "tasks=40", "examples=800", "--workers", str(workers)]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    subprocess.run(command(*study, "--out", str(whole)), check=True, capture_output=True)
    process = subprocess.Popen(
        command(*study, "--out", str(broken)),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    )
    deadline = time.monotonic() + 120
    while not list(broken.glob("checkpoints/*.pt")) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert error.startswith("clagrange: interrupted; ")
    assert error.count("\n") == 1
    assert "--resume" in error
    assert list(broken.glob("checkpoints/*.pt")) or list(broken.glob("results/*.parquet"))
    assert json.loads((broken / "summary.json").read_text())["status"] == "interrupted"
    subprocess.run(command(*study, "--out", str(broken), "--resume"), check=True, capture_output=True)
    assert rows(broken) == rows(whole)
    assert json.loads((broken / "summary.json").read_text())["status"] == "complete"


@pytest.mark.slow
def test_a_killed_process_loses_at_most_the_task_under_way(config, tmp_path):
    study = ["compare", config, "tasks=12", "examples=400", "--workers", "1"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    subprocess.run(command(*study, "--out", str(whole)), check=True, capture_output=True)
    for attempt in range(4):
        process = subprocess.Popen(
            command(*study, "--out", str(broken), "--resume"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(3.0 + 0.37 * attempt)
        process.kill()
        process.wait()
    subprocess.run(command(*study, "--out", str(broken), "--resume"), check=True, capture_output=True)
    assert rows(broken) == rows(whole)
    assert not list(broken.rglob(".*"))


@pytest.mark.slow
def test_results_do_not_depend_on_the_number_of_workers(config, tmp_path):
    for workers in ("1", "2"):
        out = str(tmp_path / workers)
        subprocess.run(command("compare", config, "--out", out, "--workers", workers), check=True)
    assert rows(tmp_path / "1") == rows(tmp_path / "2")
