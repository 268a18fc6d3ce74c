"""What a study shows: summary, tables, pictures, page and events, from made-up results."""

import base64
import dataclasses
import io
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from rich.console import Console

from clagrange.study.files import FileProblem
from clagrange.study.machine import environment
from clagrange.study.reporting.comparison import best, own_best
from clagrange.study.reporting.events import write_events
from clagrange.study.reporting.findings import comparisons, findings
from clagrange.study.reporting.output import write_output
from clagrange.study.reporting.plots import accuracy_figure, running_mean, spread_apart, write_plots
from clagrange.study.reporting.report import write_report
from clagrange.study.reporting.sensitivity import method_trials
from clagrange.study.reporting.statistics import interval
from clagrange.study.reporting.summary import (
    heading,
    markdown,
    read_summary,
    rows,
    summarize,
    table,
    write_summary,
)
from clagrange.study.results import METRICS, MethodResult
from clagrange.study.settings import load_study
from clagrange.study.store import Folder

ROOT = Path(__file__).parents[2]
TASKS, SEEDS = 20, 4
PICTURES = ("accuracy.png", "plasticity.png", "profile.png", "improvement.png", "cost.png")
PNG = b"\x89PNG\r\n\x1a\n"


def fake(
    method,
    *,
    stream="digits",
    slope=0.0,
    start=0.8,
    told=False,
    gaussian=False,
    diverged=(),
    shape=(SEEDS, TASKS),
):
    """A result with a linear trend; a diverged seed has a NaN loss and chance accuracy in its second half."""
    random = np.random.default_rng([7, *method.encode(), *stream.encode()])
    seeds, tasks = shape
    metrics = {name: random.uniform(0.2, 0.3, shape) for name in METRICS}
    metrics["online_accuracy"] = start + slope * np.linspace(0, 1, tasks) + random.normal(0, 0.002, shape)
    if not gaussian:
        metrics["mean_variance"] = np.full(shape, np.nan)
    flags = tuple(seed in diverged for seed in range(seeds))
    for seed in diverged:
        metrics["loss"][seed, tasks // 2 :] = np.nan
        metrics["weight_magnitude"][seed, tasks // 2 :] = np.inf
        metrics["online_accuracy"][seed, tasks // 2 :] = 0.1
    return MethodResult(stream, method, told, tuple(range(50, 50 + seeds)), metrics, flags, 300, 2.5)


@pytest.fixture(scope="module")
def results():
    return [
        fake("sgd", slope=-0.2),
        fake("adam", start=0.75, diverged=(1,)),
        fake("continual_backprop", start=0.79),
        fake("euler_lagrange", slope=-0.05, start=0.82, gaussian=True),
        fake("euler_lagrange_injection", slope=0.03, start=0.83, gaussian=True, told=True),
        fake("sgd", stream="labels", start=0.5),
    ]


@pytest.fixture(scope="module")
def summary(results):
    planned = {
        "digits": ["sgd", "adam", "l2_init", "continual_backprop", "euler_lagrange", "euler_lagrange_injection"],
        "labels": ["sgd", "adam"],
        "mnist": ["sgd"],
    }
    tasks = {"digits": TASKS, "labels": TASKS, "mnist": 30}
    return summarize(results, status="interrupted", environment=environment(), planned=planned, tasks=tasks)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A folder with the pictures of a small study."""
    folder = tmp_path_factory.mktemp("drawn")
    write_plots(folder, [fake("sgd", shape=(2, 3)), fake("adam", shape=(2, 3))])
    return folder


@pytest.fixture
def undrawn(tmp_path):
    """A folder with a grey dot for each picture, for tests of what is written: drawing takes seconds."""
    for name in PICTURES:
        Image.new("L", (1, 1), 128).save(tmp_path / name)
    return tmp_path


def test_summary_has_the_documented_form(summary, tmp_path):
    path = write_summary(tmp_path, summary)

    def refuse(constant):
        raise AssertionError(f"not JSON: {constant}")

    read = json.loads(path.read_text(), parse_constant=refuse)
    assert read == summary
    assert list(tmp_path.iterdir()) == [path]
    assert set(read) == {"schema", "status", "environment", "streams", "all_streams"}
    assert (read["schema"], read["status"]) == (1, "interrupted")
    assert [(stream["name"], stream["tasks"]) for stream in read["streams"]] == [
        ("digits", TASKS),
        ("labels", TASKS),
        ("mnist", 30),
    ]
    for stream in read["streams"]:
        assert set(stream) == {"name", "tasks", "measure", "equally_hard", "methods", "comparisons"}
        for method in stream["methods"]:
            assert set(method) == {
                *("name", "told_of_switches", "seeds", "online_accuracy", "loss", "first_tenth", "last_tenth"),
                *("change", "model_steps_per_second", "seconds", "diverged", "plasticity_slope"),
                *("by_seed", "interquartile_mean"),
                *("area_under_curve", "samples_to_threshold", "seconds_to_threshold"),
                *("average_accuracy", "forgetting", "backward_transfer", "forward_transfer"),
            }
            assert set(method["online_accuracy"]) == set(method["change"]) == {"mean", "low", "high"}


def test_summary_numbers_match_plain_arithmetic(summary, results):
    by_name = {method["name"]: method for method in summary["streams"][0]["methods"]}
    for result in results[:5]:
        method, accuracy = by_name[result.method], result.metrics["online_accuracy"].tolist()
        means = [sum(row) / TASKS for row in accuracy]
        first, last = [sum(row[:2]) / 2 for row in accuracy], [sum(row[-2:]) / 2 for row in accuracy]
        assert method["online_accuracy"]["mean"] == pytest.approx(sum(means) / SEEDS)
        assert method["online_accuracy"]["low"] == pytest.approx(interval(means).low)
        assert method["online_accuracy"]["high"] == pytest.approx(interval(means).high)
        assert method["first_tenth"] == pytest.approx(sum(first) / SEEDS)
        assert method["last_tenth"] == pytest.approx(sum(last) / SEEDS)
        assert method["change"]["mean"] == pytest.approx((sum(last) - sum(first)) / SEEDS)
        assert method["change"]["low"] == pytest.approx(
            interval([after - before for before, after in zip(first, last, strict=True)]).low
        )
        assert method["by_seed"] == pytest.approx(means)
        assert method["interquartile_mean"]["mean"] == pytest.approx(sum(sorted(means)[1:3]) / 2)
        slopes = [np.polyfit(range(TASKS), row, 1)[0] for row in accuracy]
        assert method["plasticity_slope"]["mean"] == pytest.approx(sum(slopes) / SEEDS)
        assert method["plasticity_slope"]["high"] == pytest.approx(interval(slopes).high)
        assert method["seeds"] == [50, 51, 52, 53]
        assert method["seconds"] == 2.5
        assert method["model_steps_per_second"] == pytest.approx(300 * 4 / 2.5)
        assert method["told_of_switches"] is (result.method == "euler_lagrange_injection")
    assert by_name["adam"]["diverged"] == 1
    assert by_name["sgd"]["diverged"] == 0


def test_summary_keeps_the_order_and_has_null_for_what_is_not_finished(summary):
    names = [method["name"] for method in summary["streams"][0]["methods"]]
    assert names == ["sgd", "adam", "l2_init", "continual_backprop", "euler_lagrange", "euler_lagrange_injection"]
    nothing = {"mean": None, "low": None, "high": None}
    expected = {
        "name": "l2_init",
        "told_of_switches": None,
        "seeds": [],
        "online_accuracy": nothing,
        "loss": nothing,
        "by_seed": [],
        "interquartile_mean": nothing,
        "first_tenth": None,
        "last_tenth": None,
        "change": nothing,
        "model_steps_per_second": None,
        "seconds": None,
        "diverged": None,
        **dict.fromkeys(("plasticity_slope", "area_under_curve"), nothing),
        **dict.fromkeys(("samples_to_threshold", "seconds_to_threshold"), nothing),
        **dict.fromkeys(("average_accuracy", "forgetting", "backward_transfer", "forward_transfer"), nothing),
    }
    assert summary["streams"][0]["methods"][2] == expected


def test_summary_does_not_judge_a_run_with_fewer_tasks_than_planned():
    short = fake("sgd", shape=(2, 5))
    (method,) = summarize([short], status="interrupted", environment={}, tasks={"digits": 6})["streams"][0][
        "methods"
    ]
    assert method["online_accuracy"]["mean"] is None
    assert method["seeds"] == []


def test_summary_of_one_seed_one_task_and_of_numbers_that_are_none(tmp_path):
    single = fake("sgd", shape=(1, 1))
    broken = fake("adam", shape=(2, 1))
    broken.metrics["online_accuracy"][0] = np.nan
    summary = summarize([single, broken], status="complete", environment={})
    assert not any("Euler-Lagrange" in sentence for sentence in findings(summary["streams"][0], [single, broken]))
    planned = {"digits": ["sgd", "adam", "euler_lagrange"]}
    summary = summarize([single, broken], status="interrupted", environment={}, planned=planned)
    first, second, _ = summary["streams"][0]["methods"]
    value = float(single.metrics["online_accuracy"][0, 0])
    assert first["online_accuracy"] == {"mean": value, "low": None, "high": None}
    assert first["change"] == {"mean": 0.0, "low": None, "high": None}
    assert second["online_accuracy"]["mean"] is None
    assert second["first_tenth"] is None
    assert summary["streams"][0]["tasks"] == 1
    write_summary(tmp_path, summary)
    assert all(path.exists() for path in write_plots(tmp_path, [single, broken]))
    page = write_report(tmp_path, summary, [single, broken], "").read_text()
    assert "Without an interval, so nothing is claimed about their change: sgd (+0.0), adam (-)." in page
    assert "No Euler-Lagrange method is finished" in page


def test_summary_refuses_two_results_of_one_method():
    with pytest.raises(ValueError, match="got two of 'sgd' on 'digits'"):
        summarize([fake("sgd"), fake("sgd")], status="complete", environment={})


def test_writing_a_summary_with_nan_leaves_the_old_one(tmp_path):
    path = write_summary(tmp_path, {"schema": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_summary(tmp_path, {"schema": float("nan")})
    assert json.loads(path.read_text()) == {"schema": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_environment_is_plain_json():
    described = environment()
    assert json.loads(json.dumps(described)) == described
    assert set(described) == {
        "python",
        "torch",
        "clagrange",
        "platform",
        "processor",
        "cores",
        "threads",
        "device",
    }
    assert described["device"] == "cpu"
    assert described["processor"]
    assert described["cores"] >= 1


@pytest.mark.parametrize(("terminal", "width"), [(False, 80), (True, 100), (True, 80)])
def test_table_is_readable(summary, terminal, width):
    file = io.StringIO()
    console = Console(
        file=file, width=width, force_terminal=terminal, color_system="standard" if terminal else None
    )
    table(summary, console)
    assert console.width == width
    plain = re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue())
    assert max(map(len, plain.splitlines())) <= (width if terminal else 100)
    for method in summary["streams"][0]["methods"]:
        for key in ("online_accuracy", "change"):
            of = method[key]
            if of["mean"] is not None:
                sign = "+" if key == "change" else ""
                low, high = (format(100 * of[end], f"{sign}.1f") for end in ("low", "high"))
                assert f"[{low}, {high}]" in plain
        if width == 100 or not terminal:
            assert any(line.startswith(method["name"] + " ") for line in plain.splitlines())
    assert "Highest mean: euler_lagrange_injection." in plain
    assert "Diverged: adam (1 of 4 seeds)." in plain
    assert "Not finished: l2_init." in plain
    if terminal and width == 100:
        bold = re.findall(r"\x1b\[1m([^\x1b]*)\x1b", file.getvalue())
        assert "euler_lagrange_injection" in bold
        assert not any(name.startswith("continual_backprop") for name in bold)


def test_markdown_has_every_column_and_escapes(results):
    odd = fake("a|b")
    text = markdown(summarize([results[0], odd], status="complete", environment={}))
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {10}
    accuracy = odd.metrics["online_accuracy"].mean(1)
    of = interval(accuracy)
    assert f"| **a\\|b** | no | **{100 * of.mean:.1f} [{100 * of.low:.1f}, {100 * of.high:.1f}]** |" in text
    assert text.startswith("**digits: 20 tasks, 4 seeds**")


def test_running_mean_looks_back_only_and_keeps_gaps():
    random = np.random.default_rng(0)
    curves = random.normal(size=(2, 9))
    curves[1, 4] = np.inf
    smooth = running_mean(curves, 3)
    for seed in range(2):
        for task in range(9):
            window = curves[seed, max(0, task - 2) : task + 1]
            expected = sum(window) / len(window) if np.isfinite(window).all() else np.nan
            np.testing.assert_allclose(smooth[seed, task], expected)


def test_labels_are_spread_in_order_and_stay_inside():
    places = sorted(np.random.default_rng(1).uniform(0.9, 1.0, 12))
    moved = spread_apart(places, gap=0.06)
    assert np.diff(moved).min() >= 0.06 - 1e-12
    assert moved[0] >= 0
    assert moved[-1] <= 1
    assert spread_apart([0.1, 0.5, 0.9], gap=0.06) == [0.1, 0.5, 0.9]
    below = spread_apart([0.0, *places], gap=0.06)
    assert below == [0.0, *moved]
    assert spread_apart([], gap=0.06) == []


@pytest.mark.parametrize("methods", [6, 12])
def test_a_line_far_from_all_others_is_cut_off_and_says_so(methods):
    several = [fake(f"method{index}") for index in range(methods)]
    for index, result in enumerate(several):
        result.metrics["online_accuracy"][:] = 0.1 if index == 3 else 0.8 + 0.01 * index
    panel = accuracy_figure(several).axes[0]
    low, high = panel.get_ylim()
    labels = {text.get_text() for text in panel.texts}
    assert 80 + methods - 1 < high < 100
    if methods < 8:  # one of so few is no exception
        assert low < 10
        assert "method3  10.0" in labels
    else:
        assert 75 < low < 80
        assert "↓ method3  10.0" in labels
        assert all(text.xy[1] >= low for text in panel.texts)


def test_plots_are_pictures_and_leave_no_global_state(tmp_path):
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    few = [fake("sgd", shape=(2, 3)), fake("adam", stream="labels", shape=(2, 3))]
    paths = write_plots(tmp_path, few)
    assert paths == [tmp_path / name for name in (*PICTURES, "streams/digits.png", "streams/labels.png")]
    assert all(path.read_bytes().startswith(PNG) for path in paths)
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(paths)
    assert dict(mpl.rcParams) == before
    assert write_plots(tmp_path, []) == []


def test_pictures_of_earlier_results_are_removed(tmp_path):
    (tmp_path / "streams").mkdir()
    earlier = [tmp_path / name for name in (*PICTURES, "streams/digits.png", "streams/gone.png")]
    others = [tmp_path / "mine.png", tmp_path / "streams" / "notes.txt"]
    for path in (*earlier, *others):
        path.write_bytes(b"of other settings")
    written = write_plots(tmp_path, [fake("sgd", shape=(2, 3))])
    assert sorted(path for path in earlier if path.exists()) == sorted(written)
    assert not any(path.read_bytes() == b"of other settings" for path in written)
    write_plots(tmp_path, [])
    assert not any(path.exists() for path in earlier)
    assert all(path.exists() for path in others)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_environment_of_a_study_is_that_of_its_runs(tmp_path, monkeypatch, device):
    """No GPU is needed: one is pretended."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: f"a fast {device}")
    file = tmp_path / "study.yaml"
    file.write_text("seeds: 2\nstreams: {permuted_digits: {stream: {tasks: 3}, methods: {sgd: {}}}}")
    folder = Folder(tmp_path / "out")
    folder.prepare(load_study(file))
    settings = {} if device == "cpu" else {"device": device}
    result = fake("sgd", stream="permuted_digits", shape=(2, 3))
    result = dataclasses.replace(result, origin={"settings": settings, "data": "", "version": ""})
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        write_output(folder, status="complete", results=[result])
    finally:
        torch.set_num_threads(threads)
    described = json.loads((folder.path / "summary.json").read_text())["environment"]
    assert described["device"] == {"cpu": "cpu", "cuda": "cuda (a fast cuda)"}[device]
    assert described["threads"] == 1


def test_a_device_that_is_not_here_is_named_all_the_same(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert environment("cuda")["device"] == "cuda"


class Page(HTMLParser):
    """Refuses a page whose tags are not balanced, and gathers what a reader would need besides it."""

    def __init__(self, source):
        super().__init__()
        self.open, self.references, self.text, self.meta, self.scrolling = [], [], [], {}, []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.references += [value for key, value in attrs if key in ("src", "href")]
        if tag == "meta" and "name" in attributes:
            self.meta[attributes["name"]] = attributes["content"]
        if tag in ("table", "img"):
            self.scrolling.append(("div", "scroll") in self.open)
        if tag not in ("meta", "img", "wbr"):
            self.open.append((tag, attributes.get("class")))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        self.text.append(data)


def test_report_is_one_well_formed_page_without_references(summary, results, drawn, tmp_path):
    shutil.copytree(drawn, tmp_path, dirs_exist_ok=True)
    path = write_report(tmp_path, summary, results, "methods:\n  evil: </pre><script>alert('x')</script>\n")
    source = path.read_text()
    page = Page(source)
    assert len(page.references) == len(PICTURES)
    assert all(reference.startswith("data:image/png;base64,") for reference in page.references)
    embedded = [base64.b64decode(reference.partition(",")[2]) for reference in page.references]
    assert embedded == [(tmp_path / name).read_bytes() for name in PICTURES]
    assert page.meta["viewport"] == "width=device-width, initial-scale=1"
    assert len(page.scrolling) > len(PICTURES)
    assert all(page.scrolling)  # wide tables and pictures scroll by themselves
    assert "http" not in re.sub(r"base64,[A-Za-z0-9+/=]*", "", source)
    assert "<script" not in source
    text = "".join(page.text)
    assert "evil: </pre><script>alert('x')</script>" in text
    assert "The study is not complete." in text
    names = {"report.html", "report.md", "report.tex", "streams", *PICTURES}
    assert {item.name for item in tmp_path.iterdir()} == names


def test_report_says_the_numbers_of_the_summary(summary, results, undrawn):
    write_report(undrawn, summary, results, "seeds: 4\n")
    stream = summary["streams"][0]
    (adam,) = (method for method in stream["methods"] if method["name"] == "adam")
    (against,) = (method for method in stream["comparisons"]["methods"] if method["name"] == "adam")
    low, high = (format(100 * adam["interquartile_mean"][key], ".1f") for key in ("low", "high"))
    middle = f"{100 * adam['interquartile_mean']['mean']:.1f} [{low}, {high}]"
    slope = f"{100 * adam['plasticity_slope']['mean']:+.3f} ["
    difference = f"{100 * against['difference']['mean']:+.1f} ["
    assert against["p"] == 2 / 2**SEEDS
    for text in (
        "".join(Page((undrawn / "report.html").read_text()).text),
        (undrawn / "report.md").read_text(),
    ):
        assert middle in text
        assert slope in text
        assert difference in text
        assert "On digits, euler_lagrange_injection has the highest online accuracy of 5 methods, 84" in text
        assert "4 pairs of runs allow no p below .12, and no corrected p below .50 with 4 comparisons." in text
        assert (
            "no difference can count as significant at 0.05 here, however large it is; that takes 8 pairs" in text
        )
        assert "seeds: 4" in text
        assert summary["environment"]["torch"] in text
    markdown_text = (undrawn / "report.md").read_text()
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", markdown_text)
    assert pictures == list(PICTURES)


def test_report_in_latex_is_balanced_and_escaped(results, undrawn):
    odd = [dataclasses.replace(result, method=result.method + "%&$#") for result in results[:3]]
    write_report(undrawn, summarize(odd, status="complete", environment={}), odd, "")
    text = (undrawn / "report.tex").read_text()
    assert r"\textbf{continual\_backprop\%\&\$\#} & " in text
    assert len(re.findall(r"\\begin\{table\}", text)) == 2
    plain = re.sub(r"\\[\\&%$#_{}]", "", text)  # without what is escaped
    assert plain.count("{") == plain.count("}")
    assert plain.count("$") % 2 == 0
    for environment_name in ("table", "tabular"):
        assert plain.count(rf"\begin{{{environment_name}}}") == plain.count(rf"\end{{{environment_name}}}")
    for body in re.findall(r"\\begin\{tabular\}\{(l r*|lr*)\}(.*?)\\end\{tabular\}", text, flags=re.S):
        lines = [line for line in body[1].splitlines() if line.endswith("\\\\")]
        assert len(lines) >= 3
        assert {len(re.findall(r"(?<!\\)&", line)) for line in lines} == {len(body[0]) - 1}
    assert re.search(r"\$-\$\d", text)


def test_report_of_an_old_summary_alone(results, tmp_path):
    """Summaries of the first version know no seeds' scores; nothing is compared, nothing is drawn."""
    summary = summarize(results[:5], status="complete", environment={"torch": "2"})
    for stream in summary["streams"]:
        del stream["comparisons"], stream["measure"]
        for method in stream["methods"]:
            for key in ("by_seed", "interquartile_mean", "plasticity_slope", "average_accuracy", "loss"):
                del method[key]
    del summary["all_streams"]
    page = Page(write_report(tmp_path, summary, [], "").read_text())
    text = "".join(page.text)
    assert page.references == []
    assert "The results by task are not stored here" in text
    assert "Lose plasticity" in text
    assert "is alone" not in text
    assert "interquartile mean" not in text.partition("How to read this")[0]
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "report.md", "report.tex"}


@pytest.mark.parametrize("name", ["demo", "permuted", "streams", "untuned"])
def test_report_of_the_stored_summaries(name, tmp_path):
    stored = ROOT / "benchmarks" / name
    summary = read_summary(stored)
    text = "".join(Page(write_report(tmp_path, summary, [], "").read_text()).text)
    for stream in summary["streams"]:
        assert heading(stream) in text
        for row in rows(stream):
            assert row[2] in text
    (tmp_path / "summary.json").write_text('{"schema": 2, "streams": [], "environment": {}}')
    with pytest.raises(FileProblem, match="it is from a later version"):
        read_summary(tmp_path)
    (tmp_path / "summary.json").write_text("[]")
    with pytest.raises(FileProblem, match="damaged or foreign"):
        read_summary(tmp_path)


def test_report_shows_the_searches_of_its_streams(results, undrawn):
    trials = [{"settings": {"lr": lr}, "online_accuracy": score} for lr, score in ((0.1, 0.8), (1.0, 0.5))]
    searches = {
        "digits": [method_trials("sgd", trials, first_round=2)],
        "elsewhere": [method_trials("adam", trials, first_round=2)],
    }
    path = write_report(undrawn, summarize(results, status="complete", environment={}), results, "", searches)
    page = Page(path.read_text())
    text = "".join(page.text)
    assert "Sensitivity to settings: digits" in text
    assert "elsewhere" not in text
    assert "1 of 2" in text
    assert "0.1 to 1" in text
    assert (undrawn / "sensitivity" / "digits.png").read_bytes().startswith(PNG)
    assert len(page.references) == len(PICTURES) + 1


def test_report_of_several_streams_judges_them_together(undrawn):
    pair = [
        fake(method, stream=stream, start=start)
        for stream in ("a", "b")
        for method, start in (("sgd", 0.5), ("euler_lagrange", 0.9))
    ]
    summary = summarize(pair, status="complete", environment={})
    text = write_report(undrawn, summary, pair, "").with_suffix(".md").read_text()
    assert "## All streams together" in text
    assert "8 pairs of runs allow no p below .008, and no corrected p below .008 with 1 comparisons." in text
    assert "by seed and stream" in text


@pytest.mark.slow
def test_report_can_be_shown_by_a_browser(summary, results, tmp_path):
    browser = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
    if browser is None:
        pytest.skip("no chromium or google-chrome in PATH")
    path, picture = write_report(tmp_path, summary, results, "seeds: 4\n"), tmp_path / "page.png"
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=390,3000"]
    subprocess.run([*command, f"--screenshot={picture}", path.as_uri()], check=True, timeout=120)
    with Image.open(picture) as shown:
        assert shown.size == (390, 3000)
        assert np.asarray(shown.convert("L")).std() > 10


def test_report_escapes_names(undrawn):
    odd = [fake("euler_lagrange<b>", stream="<i>digits"), fake("a&b", stream="<i>digits")]
    summary = summarize(odd, status="<u>", environment={"<s>": "<em>"})
    source = write_report(undrawn, summary, odd, "").read_text()
    for tag in ("<b>", "<i>", "<u>", "<s>", "<em>"):
        assert tag not in source
    assert "a&amp;b" in source


def test_report_of_a_study_without_results(tmp_path):
    summary = summarize([], status="interrupted", environment={}, planned={"digits": ["sgd"]})
    source = write_report(tmp_path, summary, [], "").read_text()
    assert "No method is finished." in source
    assert "<img" not in source


def test_findings_come_from_the_numbers(summary, results):
    stream = summary["streams"][0]
    assert own_best(stream) == "euler_lagrange_injection"
    differences = comparisons(stream, results)
    assert list(differences) == ["sgd", "adam", "continual_backprop", "euler_lagrange"]
    own = results[4].metrics["online_accuracy"].mean(1)
    other = results[2].metrics["online_accuracy"].mean(1)
    assert differences["continual_backprop"].mean == pytest.approx((own - other).mean())
    text = findings(stream, results)
    losing = next(sentence for sentence in text if sentence.startswith("Lose plasticity"))
    assert re.search(r"sgd \(-1[89]\.", losing)
    assert "euler_lagrange (-" in losing
    assert "continual_backprop" not in losing
    assert "euler_lagrange_injection" not in losing
    above = next(sentence for sentence in text if sentence.startswith("euler_lagrange_injection is above"))
    assert "continual_backprop (+" in above
    assert any(sentence.startswith("Diverged: adam (1 of 4 seeds)") for sentence in text)
    assert "Not finished, so not judged: l2_init." in text


def test_findings_turn_round_with_the_numbers():
    turned = [fake("sgd", slope=0.2), fake("continual_backprop", start=0.95), fake("euler_lagrange", slope=-0.1)]
    stream = summarize(turned, status="complete", environment={})["streams"][0]
    text = " ".join(findings(stream, turned))
    assert "points) lies below 0: euler_lagrange (-" in text
    assert re.search(r"Become better; the interval of the change lies above 0: sgd \(\+\d", text)
    assert re.search(r"euler_lagrange is below sgd \(-[\d.]+\), continual_backprop \(-", text)
    assert "is above" not in text


def test_findings_claim_nothing_that_the_seeds_cannot_tell():
    alike = [fake("euler_lagrange"), fake("adam")]
    for result, sign in zip(alike, (1, -1), strict=True):
        slopes = np.array([0.1, -0.1, 0.1, -0.1])[:, None] * sign
        result.metrics["online_accuracy"][:] = 0.5 + slopes * np.linspace(0, 1, TASKS)
    stream = summarize(alike, status="complete", environment={})["streams"][0]
    text = " ".join(findings(stream, alike))
    assert "No method shows a loss of plasticity" in text
    assert "euler_lagrange cannot be told apart, with these seeds, from adam" in text
    one = [fake("euler_lagrange", slope=-0.5, shape=(1, TASKS)), fake("adam", shape=(1, TASKS))]
    text = " ".join(findings(summarize(one, status="complete", environment={})["streams"][0], one))
    assert "Lose plasticity" not in text
    assert "No method shows" not in text
    assert "nothing is claimed about their change: euler_lagrange (-" in text
    assert "euler_lagrange is not judged against them: adam (-" in text


def test_summary_says_when_a_threshold_is_reached():
    rising = fake("sgd", shape=(2, 4))
    rising.metrics["online_accuracy"] = np.array([[0.1, 0.5, 0.7, 0.6], [0.2, 0.3, 0.3, 0.8]])
    timed = dataclasses.replace(
        rising, samples=np.array([10, 20, 30, 40]), elapsed=np.array([1.0, 2.0, 3.0, 5.0])
    )
    for threshold, samples, seconds in ((0.5, 30.0, 3.5), (0.75, None, None)):
        summary = summarize([timed], status="complete", environment={}, thresholds={"digits": threshold})
        method = summary["streams"][0]["methods"][0]
        assert method["samples_to_threshold"]["mean"] == samples
        assert method["seconds_to_threshold"]["mean"] == seconds
    areas = [(0.5 * 0.1 + 0.5 + 0.7 + 0.5 * 0.6) / 3, (0.5 * 0.2 + 0.3 + 0.3 + 0.5 * 0.8) / 3]
    assert method["area_under_curve"]["mean"] == pytest.approx(np.mean(areas))
    assert method["plasticity_slope"]["mean"] == pytest.approx(np.mean([0.17, 0.18]))
    untold = summarize([timed], status="complete", environment={})["streams"][0]["methods"][0]
    assert untold["samples_to_threshold"]["mean"] is None
    numbers = by_loss("sgd", 0.0)
    numbers.metrics["loss"] = 1.0 - np.tile(np.linspace(0.1, 0.9, TASKS), (SEEDS, 1))
    timed = dataclasses.replace(numbers, samples=np.arange(1, TASKS + 1))
    summary = summarize([timed], status="complete", environment={}, thresholds={"numbers": 0.5})
    reached = summary["streams"][0]["methods"][0]["samples_to_threshold"]["mean"]
    assert reached == 1 + np.argmax(numbers.metrics["loss"][0] <= 0.5)


def test_where_tasks_are_not_equally_hard_nobody_loses_plasticity():
    results = [fake("sgd", slope=-0.2), fake("adam", slope=0.2)]
    summary = summarize(results, status="complete", environment={}, equally_hard={"digits": False})
    worse, better, why = findings(summary["streams"][0], results)
    assert worse.startswith("Become worse; the interval of the change lies below 0: sgd (-")
    assert better.startswith("Become better")
    assert "not equally hard" in why


def by_loss(method, slope, **settings):
    """A result on a stream of numbers: no accuracy, and a loss with a linear trend."""
    result = fake(method, stream="numbers", **settings)
    random = np.random.default_rng(1)
    result.metrics["online_accuracy"][:] = np.nan
    result.metrics["loss"] = 0.5 + slope * np.linspace(0, 1, TASKS) + random.normal(0, 0.002, (SEEDS, TASKS))
    return result


def test_where_targets_are_numbers_less_loss_is_better(undrawn):
    results = [by_loss("sgd", 0.2), by_loss("adam", 0.3), by_loss("euler_lagrange", -0.1)]
    summary = summarize(results, status="complete", environment={})
    stream = summary["streams"][0]
    assert stream["measure"] == "loss"
    sgd = stream["methods"][0]
    assert sgd["online_accuracy"] == {"mean": None, "low": None, "high": None}
    assert sgd["loss"]["mean"] == pytest.approx(results[0].metrics["loss"].mean())
    assert sgd["change"]["mean"] == pytest.approx(0.2, rel=0.1)
    assert best(stream) == "euler_lagrange"
    lose, gain, own = findings(stream, results)
    assert lose.startswith("Lose plasticity")
    assert "above 0: sgd (+0.1" in lose
    assert "adam (+0.2" in lose
    assert gain.startswith("Become better; the interval of the change lies below 0: euler_lagrange (-0.0")
    assert own.startswith("euler_lagrange is below sgd (-0.1")
    assert "in online loss, paired by seed" in own
    assert "| online loss |" in markdown(summary)
    assert "| **euler_lagrange** | no | **0.45 [" in markdown(summary)
    console = Console(file=io.StringIO(), width=120)
    table(summary, console)
    assert "Lowest mean: euler_lagrange." in console.file.getvalue()
    assert "online" in accuracy_figure(results).axes[0].get_ylabel()
    assert "online loss" in accuracy_figure(results).axes[0].get_ylabel()
    assert "online loss" in write_report(undrawn, summary, results, "").read_text()


def test_what_is_forgotten_has_a_table_and_survives_its_file(undrawn):
    result = fake("sgd", shape=(2, 3))
    matrix = np.array([[[0.1] * 3, [1.0, 0.2, 0.1], [0.6, 0.8, 0.3], [0.4, 0.6, 0.9]]] * 2)
    result = dataclasses.replace(result, matrix=matrix)
    result.write(undrawn / "result.parquet")
    again = MethodResult.read(undrawn / "result.parquet")
    np.testing.assert_array_equal(again.matrix, matrix)
    for name in METRICS:
        np.testing.assert_array_equal(again.metrics[name], result.metrics[name])
    summary = summarize([again], status="complete", environment={})
    method = summary["streams"][0]["methods"][0]
    assert method["average_accuracy"]["mean"] == pytest.approx((0.4 + 0.6 + 0.9) / 3)
    assert method["forgetting"]["mean"] == pytest.approx((0.6 + 0.2) / 2)
    assert method["backward_transfer"]["mean"] == pytest.approx((-0.6 - 0.2) / 2)
    assert method["forward_transfer"]["mean"] == pytest.approx((0.1 + 0.2) / 2)
    row = "| sgd | 63.3 [63.3, 63.3] | +40.0 [+40.0, +40.0] | -40.0 [-40.0, -40.0] | +15.0 [+15.0, +15.0] |"
    assert row in markdown(summary)
    console = Console(file=io.StringIO(), width=120)
    table(summary, console)
    assert "63.3 [63.3, 63.3]" in console.file.getvalue()
    page = write_report(undrawn, summary, [again], "").read_text()
    assert "63.3 [63.3, 63.3]" in page


def test_a_flipped_bit_in_a_result_is_noticed_or_changes_nothing(tmp_path):
    path, result = tmp_path / "result.parquet", fake("sgd", shape=(2, 3))
    result.write(path)
    whole, noticed = path.read_bytes(), 0
    for place in range(0, len(whole), max(1, len(whole) // 150)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            again = MethodResult.read(path)
        except FileProblem:
            noticed += 1
        else:
            assert (again.seconds, again.seeds, again.told_of_switches) == (
                result.seconds,
                result.seeds,
                result.told_of_switches,
            )
            for name in METRICS:
                np.testing.assert_array_equal(again.metrics[name], result.metrics[name])
    assert noticed > 40


def test_results_of_a_version_that_measured_less_are_read(tmp_path):
    result = fake("sgd")
    result.write(tmp_path / "result.parquet")
    whole = pq.read_table(tmp_path / "result.parquet")
    about = json.loads(whole.schema.metadata[b"clagrange"])
    del about["checksum"]
    whole = whole.replace_schema_metadata({"clagrange": json.dumps(about)})
    pq.write_table(whole.drop_columns(["dormant_units"]), tmp_path / "result.parquet")
    read = MethodResult.read(tmp_path / "result.parquet")
    assert np.isnan(read.metrics["dormant_units"]).all()
    np.testing.assert_array_equal(read.metrics["loss"], result.metrics["loss"])
    pq.write_table(whole.drop_columns(["loss"]), tmp_path / "result.parquet")
    with pytest.raises(FileProblem, match="damaged or foreign file"):
        MethodResult.read(tmp_path / "result.parquet")


def test_methods_on_other_seeds_are_not_paired():
    pair = [fake("euler_lagrange"), fake("adam", shape=(SEEDS - 1, TASKS))]
    stream = summarize(pair, status="complete", environment={})["streams"][0]
    assert comparisons(stream, pair) == {"adam": None}


def test_events_hold_means_and_intervals_and_replace_the_old(results, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "tensorboard"
    write_events(folder, [fake("old/../name")])
    assert [path.name for path in (folder / "digits").iterdir()] == ["old_.._name"]
    write_events(folder, results)
    assert list(tmp_path.iterdir()) == [folder]
    assert sorted(str(path.relative_to(folder)) for path in folder.glob("*/*")) == sorted(
        f"{result.stream}/{result.method}" for result in results
    )
    for result in results[1], results[4]:
        events = EventAccumulator(str(folder / result.stream / result.method)).Reload()
        tags = set(events.Tags()["scalars"])
        absent = set() if result.method == "euler_lagrange_injection" else {"mean_variance"}
        assert tags == (set(METRICS) | {"online_accuracy_low", "online_accuracy_high"}) - absent
        read = events.Scalars("online_accuracy")
        assert [event.step for event in read] == list(range(TASKS))
        np.testing.assert_allclose(
            [event.value for event in read], result.metrics["online_accuracy"].mean(0), rtol=1e-6
        )
        loss = events.Scalars("loss")
        assert len(loss) == (TASKS // 2 if any(result.diverged) else TASKS)


def test_importing_the_parts_loads_neither_matplotlib_nor_tensorboard():
    modules = ", ".join(
        f"clagrange.study.reporting.{name}"
        for name in ("comparison_plots", "events", "plots", "report", "sensitivity", "statistics", "summary")
    )
    heavy = ("matplotlib", "tensorboard", "scipy.stats")
    code = f"import sys, {modules}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
