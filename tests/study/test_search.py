"""The search: equal trials, other seeds than the study, resumable, and the source of the demo's settings."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from clagrange.cli import main
from clagrange.study import groups
from clagrange.study import search as search_module
from clagrange.study.files import only_writer
from clagrange.study.problems import SettingsError
from clagrange.study.samplers import Dimension
from clagrange.study.search import MethodsFailed, run_search, study_of_winners
from clagrange.study.search_file import load_search
from clagrange.study.settings import load_study, read_yaml
from clagrange.study.store import checksum, code_version

ROOT = Path(__file__).parents[2]
SEARCH = {
    "seeds": [100, 101],
    "trials": 5,
    "refinements": 3,
    "study": {"seeds": 3, "tasks": {"permuted_digits": 2}},
    "streams": {
        "permuted_digits": {
            "stream": {"tasks": 1, "examples": 200, "batch_size": 8},
            "hidden": [8],
            "methods": {
                "sgd": {"lr": {"log": [1e-4, 1.0]}},
                "l2_init": [
                    {"base": "sgd", "lr": {"log": [1e-2, 1.0]}},
                    {"base": "adam", "lr": {"log": [1e-4, 1e-2]}},
                ],
            },
        }
    },
}


def write(path, tree):
    path.write_text(yaml.safe_dump(tree))
    return path


def changed(**settings):
    tree = json.loads(json.dumps(SEARCH))
    tree["streams"]["permuted_digits"]["methods"]["sgd"] = settings
    return tree


def test_a_search_finds_a_better_setting_near_the_best_and_spends_the_same_on_all(tmp_path):
    search = load_search(write(tmp_path / "search.yaml", SEARCH))
    report = run_search(search, tmp_path / "found.json", lambda line: None)
    methods = report["streams"]["permuted_digits"]["methods"]
    assert json.loads((tmp_path / "found.json").read_text()) == report
    for entry in methods.values():
        assert len(entry["trials"]) == 8
        best = max(entry["trials"], key=lambda trial: trial["online_accuracy"])
        assert entry["best"] == best["settings"]
        assert all(len(trial["by_seed"]) == 2 for trial in entry["trials"])
    rates = [trial["settings"]["lr"] for trial in methods["sgd"]["trials"]]
    assert all(1e-4 <= rate <= 1.0 for rate in rates)
    first_best = max(methods["sgd"]["trials"][:5], key=lambda trial: trial["online_accuracy"])["settings"]["lr"]
    assert all(first_best / 3.2 <= rate <= first_best * 3.2 for rate in rates[5:])
    assert methods["sgd"]["best"]["lr"] > 1e-2
    bases = [trial["settings"]["base"] for trial in methods["l2_init"]["trials"][:5]]
    assert bases == ["sgd", "sgd", "sgd", "adam", "adam"]


def test_a_search_goes_on_where_it_stopped(tmp_path):
    target = tmp_path / "found.json"
    search = load_search(write(tmp_path / "search.yaml", SEARCH))
    said: list[str] = []
    whole = run_search(search, target, said.append)
    assert len(said) == 2
    stored = json.loads(target.read_text())
    del stored["streams"]["permuted_digits"]["methods"]["l2_init"]
    target.write_text(json.dumps(stored))
    said.clear()
    again = run_search(search, target, said.append)
    assert len(said) == 1
    for report in (whole, again):
        for entry in report["streams"]["permuted_digits"]["methods"].values():
            del entry["seconds"]
    assert again == whole
    other = load_search(write(tmp_path / "other.yaml", {**SEARCH, "seeds": [7]}))
    with pytest.raises(SettingsError, match="holds a search with other settings"):
        run_search(other, target)


def test_trials_of_large_networks_run_in_groups(tmp_path, monkeypatch):
    search = load_search(write(tmp_path / "search.yaml", SEARCH))
    together = run_search(search, tmp_path / "together.json", lambda line: None)
    monkeypatch.setattr(groups, "TOGETHER_BYTES", 0)
    asked: list[int] = []
    monkeypatch.setattr(groups, "group_size", lambda start_run, replicas: asked.append(replicas) or 3)
    apart = run_search(search, tmp_path / "apart.json", lambda line: None)
    assert 5 * 2 in asked  # the first trials of SGD, each with two seeds
    for name, entry in together["streams"]["permuted_digits"]["methods"].items():
        other = apart["streams"]["permuted_digits"]["methods"][name]
        assert [trial["by_seed"] for trial in entry["trials"]] == [
            pytest.approx(trial["by_seed"], abs=0.01) for trial in other["trials"]
        ]


def test_trials_run_on_the_device_and_say_so(tmp_path, monkeypatch):
    """No GPU is needed: what would go to one is caught."""
    devices = set()
    start = groups.start

    def on_the_host(*arguments, device, **settings):
        devices.add(device)
        return start(*arguments, **settings)

    monkeypatch.setattr("clagrange.study.search.start", on_the_host)
    search, lines = load_search(write(tmp_path / "search.yaml", SEARCH)), []
    report = run_search(search, tmp_path / "found.json", lines.append, device="cuda")
    assert devices == {"cuda"}
    methods = report["streams"]["permuted_digits"]["methods"]
    assert all(entry["origin"]["settings"]["device"] == "cuda" for entry in methods.values())
    lines.clear()
    again = run_search(search, tmp_path / "found.json", lines.append)
    assert devices == {"cuda", "cpu"}
    assert all(any(f"permuted_digits.{name} runs again" in line for line in lines) for name in methods)
    for name, entry in again["streams"]["permuted_digits"]["methods"].items():
        assert "device" not in entry["origin"]["settings"]
        assert entry["trials"] == methods[name]["trials"]


def test_winners_make_a_study_on_other_seeds(tmp_path):
    search = load_search(write(tmp_path / "search.yaml", SEARCH))
    report = run_search(search, tmp_path / "found.json", lambda line: None)
    study = load_study(write(tmp_path / "s.yaml", yaml.safe_load(study_of_winners(search, report))))
    assert study.seeds == (0, 1, 2)
    assert study.streams["permuted_digits"].settings["tasks"] == 2
    best = report["streams"]["permuted_digits"]["methods"]["sgd"]["best"]
    assert study.streams["permuted_digits"].methods["sgd"].lr == best["lr"]
    overlapping = {**SEARCH, "study": {"seeds": [7, 100], "tasks": {"permuted_digits": 1}}}
    with pytest.raises(SettingsError, match=r"others than the tuning seeds, got \[100\]"):
        load_search(write(tmp_path / "overlapping.yaml", overlapping))


def pretend(monkeypatch, stop=None):
    """Replace runs by a formula; gives the settings of the batches; the one numbered ``stop`` is interrupted."""
    batches = []

    def run(kind, trials, streams, network, device):
        if len(batches) == stop:
            raise KeyboardInterrupt
        batches.append([trial["settings"] for trial in trials])
        for trial in trials:
            trial["online_accuracy"] = 1 / (1 + abs(trial["settings"]["lr"] - 0.02))
            trial["by_seed"] = [trial["online_accuracy"]] * len(streams)
        return 1.0

    monkeypatch.setattr("clagrange.study.search._run", run)
    monkeypatch.setattr("clagrange.study.side_by_side.MOST_REPLICAS", 4)
    return batches


@pytest.mark.parametrize("sampler", ["halton", "random", "grid", "optuna"])
def test_a_killed_search_runs_no_batch_twice_and_comes_to_the_same(tmp_path, monkeypatch, sampler):
    if sampler == "optuna":
        pytest.importorskip("optuna")
    tree = {**SEARCH, "sampler": sampler, "refinements": 0 if sampler == "optuna" else 3}
    search = load_search(write(tmp_path / "search.yaml", tree))
    whole = pretend(monkeypatch)
    expected = run_search(search, tmp_path / "whole.json", lambda line: None)
    assert len(whole) >= 6
    for stop in range(len(whole)):
        target = tmp_path / f"{stop}.json"
        begun = pretend(monkeypatch, stop)
        with pytest.raises(KeyboardInterrupt):
            run_search(search, target, lambda line: None)
        rest = pretend(monkeypatch)
        assert run_search(search, target, lambda line: None) == expected
        assert begun + rest == whole
        assert json.loads(target.read_text()) == expected
    assert not list(tmp_path.glob(".*"))


def test_trials_are_kept_with_what_they_follow_from(tmp_path, monkeypatch):
    search = load_search(write(tmp_path / "search.yaml", SEARCH))
    pretend(monkeypatch)
    target = tmp_path / "found.json"
    report = run_search(search, target, lambda line: None)
    origin = report["streams"]["permuted_digits"]["methods"]["sgd"]["origin"]
    assert origin["version"] == code_version()
    assert origin["data"] == checksum(search.streams["permuted_digits"].stream(100))
    assert origin["settings"]["method"] == {"kind": "sgd", "spaces": [{"lr": {"log": [1e-4, 1.0]}}]}
    assert origin["settings"]["sampler"] == {"kind": "halton", "seed": 0}
    said: list[str] = []

    def again(search):
        said.clear()
        batches = pretend(monkeypatch)
        run_search(search, target, said.append)
        return len(batches), said[0] if said else ""

    assert again(search) == (0, "")
    other = load_search(write(tmp_path / "other.yaml", changed(lr={"log": [1e-3, 1.0]})))
    batches, reason = again(other)
    assert batches == 5
    assert "permuted_digits.sgd runs again: method.spaces is " in reason
    monkeypatch.setattr("clagrange.study.search.checksum", lambda stream: "other")
    batches, reason = again(other)
    assert batches == 10
    assert "its data are others" in reason
    monkeypatch.setattr("clagrange.study.search.code_version", lambda: "clagrange 9")
    batches, reason = again(other)
    assert batches == 0
    assert f"warning: trials of {code_version()} are kept (permuted_digits.l2_init" in reason


def test_an_unfinished_method_of_another_version_begins_anew(tmp_path, monkeypatch):
    search, target = load_search(write(tmp_path / "search.yaml", SEARCH)), tmp_path / "found.json"
    pretend(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        run_search(search, target, lambda line: None)
    assert json.loads(target.read_text())["under_way"]["method"] == ["permuted_digits", "l2_init"]
    monkeypatch.setattr("clagrange.study.search.code_version", lambda: "clagrange 9")
    batches, said = pretend(monkeypatch), []
    report = run_search(search, target, said.append)
    assert said[0].startswith("permuted_digits.l2_init begins anew")
    assert sum(map(len, batches)) == 16
    methods = report["streams"]["permuted_digits"]["methods"]
    assert {entry["origin"]["version"] for entry in methods.values()} == {"clagrange 9"}


@pytest.mark.parametrize(
    ("change", "named"),
    [({"trials": 6}, "trials"), ({"refinements": 0}, "refinements"), ({"sampler": "random"}, "sampler")],
)
def test_a_file_of_another_search_is_refused(tmp_path, monkeypatch, change, named):
    pretend(monkeypatch)
    target = tmp_path / "found.json"
    run_search(load_search(write(tmp_path / "search.yaml", SEARCH)), target, lambda line: None)
    before = target.read_bytes()
    other = load_search(write(tmp_path / "other.yaml", {**SEARCH, **change}))
    with pytest.raises(SettingsError, match=rf"holds a search with other settings \({named}\)"):
        run_search(other, target)
    assert target.read_bytes() == before


def test_tune_stores_the_winners_beside_the_trials(tmp_path, monkeypatch, capsys):
    pretend(monkeypatch)
    config, out = write(tmp_path / "search.yaml", SEARCH), tmp_path / "search.json"
    assert main(["tune", str(config), "--out", str(out)]) == 0
    winners = tmp_path / "search_winners.yaml"
    text = winners.read_text()
    assert f"# The winners of {config}: of each method the best of 8 trials\n" in text
    assert code_version() in text
    study = load_study(winners)
    assert not set(study.seeds) & set(SEARCH["seeds"])
    assert list(study.streams["permuted_digits"].methods) == ["l2_init", "sgd"]
    for arguments in (["--out", str(config)], ["--out", str(out), "--study", str(config)]):
        assert main(["tune", str(config), *arguments]) == 2
        assert "expected a file of its own" in capsys.readouterr().err
    assert yaml.safe_load(config.read_text()) == SEARCH


def fail(monkeypatch, kinds):
    """Let the trials of some kinds of methods fail."""
    run = search_module._run

    def failing(kind, trials, **settings):
        if kind in kinds:
            raise RuntimeError(f"no trial\nof {kind}")
        return run(kind, trials, **settings)

    monkeypatch.setattr(search_module, "_run", failing)


def test_a_method_that_fails_is_named_and_the_others_are_tried(tmp_path, monkeypatch):
    search = load_search(write(tmp_path / "search.yaml", SEARCH))
    fail(monkeypatch, {"l2_init"})
    lines: list[str] = []
    with pytest.raises(MethodsFailed, match=r"permuted_digits\.l2_init failed: .*\n.* again to try") as error:
        run_search(search, tmp_path / "found.json", lines.append)
    assert error.value.reasons == {"permuted_digits.l2_init": "RuntimeError: no trial of l2_init"}
    assert lines[0] == "permuted_digits.l2_init failed"
    assert lines[1].startswith("permuted_digits.sgd: ")
    assert list(error.value.report["streams"]["permuted_digits"]["methods"]) == ["sgd"]
    assert json.loads((tmp_path / "found.json").read_text()) == error.value.report
    assert "sgd" in study_of_winners(search, error.value.report)

    monkeypatch.undo()
    lines.clear()
    whole = run_search(search, tmp_path / "found.json", lines.append)
    assert [line.partition(":")[0] for line in lines] == ["permuted_digits.l2_init"]
    assert list(whole["streams"]["permuted_digits"]["methods"]) == ["sgd", "l2_init"]


@pytest.mark.parametrize("failing", [["l2_init"], ["l2_init", "sgd"]])
def test_tune_writes_the_winners_of_the_methods_that_did_not_fail(tmp_path, monkeypatch, capsys, failing):
    fail(monkeypatch, failing)
    config, out = write(tmp_path / "search.yaml", SEARCH), tmp_path / "search.json"
    assert main(["tune", str(config), "--out", str(out)]) == 1
    said = capsys.readouterr().err
    for kind in failing:
        assert f"clagrange: permuted_digits.{kind} failed: RuntimeError: no trial of {kind}\n" in said
    assert "Traceback" not in said
    winners = tmp_path / "search_winners.yaml"
    assert winners.exists() == (failing == ["l2_init"])
    if winners.exists():
        assert load_study(winners).runs() == [("permuted_digits", "sgd")]


def test_trials_of_other_settings_are_no_result_of_a_method_that_fails(tmp_path, monkeypatch):
    run_search(load_search(write(tmp_path / "search.yaml", SEARCH)), tmp_path / "found.json", lambda line: None)
    fail(monkeypatch, {"sgd"})
    search = load_search(write(tmp_path / "other.yaml", changed(lr={"log": [1e-3, 1.0]})))
    with pytest.raises(MethodsFailed) as error:
        run_search(search, tmp_path / "found.json", lambda line: None)
    assert list(error.value.report["streams"]["permuted_digits"]["methods"]) == ["l2_init"]


def test_two_processes_do_not_tune_into_one_file(tmp_path):
    config, out = tmp_path / "search.yaml", tmp_path / "out.json"
    config.write_text(yaml.safe_dump(SEARCH))
    with only_writer(out):
        held = subprocess.run(
            [sys.executable, "-m", "clagrange", "tune", str(config), "--out", str(out)],
            capture_output=True,
            text=True,
        )
    assert held.returncode == 2
    assert "another process is writing" in held.stderr
    assert not list(tmp_path.glob(".*"))


def test_scales():
    assert Dimension("log", (1e-4, 1.0)).at(0.5) == pytest.approx(1e-2)
    assert Dimension("uniform", (0.0, 2.0)).at(0.25) == 0.5
    assert [Dimension("choice", ("a", "b")).at(share) for share in (0.0, 0.49, 0.5, 0.99)] == ["a", "a", "b", "b"]
    for share in (1e-4, 1e-9, 0.99999):  # three digits would be the ends, which may be impossible
        assert 0.0 < Dimension("uniform", (0.0, 0.9999)).at(share) < 0.9999
    assert [Dimension("log", (1e-4, 0.9999)).at(share) for share in (0.0, 1.0)] == [1e-4, 1.0]
    assert Dimension("log", (1e-4, 1.0)).around(1e-4).values == pytest.approx((1e-4, 1e-4 * 10**0.5))


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (changed(lr={"log": [0.1, 0.01]}), "low < high"),
        (changed(lr={"log": [0.0, 0.01]}), "low < high"),
        (changed(lr={"lgo": [0.01, 0.1]}), "did you mean 'log'?"),
        (changed(lrr={"log": [0.01, 0.1]}), "did you mean 'lr'?"),
        (changed(kind=["sgd"]), r"22: .*sgd\.kind: expected one of sgd, adam, .*; got \['sgd'\]"),
        (changed(kind={"choice": ["sgd", "adam"]}), r"sgd\.kind: expected one of sgd, adam, .*; got \{'choice'"),
        (changed(lr=None), r"sgd\.lr: expected a number, got null; leave lr out"),
        (
            {**SEARCH, "streams": {5: SEARCH["streams"]["permuted_digits"]}},
            r"streams\.5: expected a word as a name",
        ),
        ({**SEARCH, "trials": 0}, "trials: expected a whole number of at least 1"),
        ({**SEARCH, "trails": 3}, "did you mean 'trials'?"),
    ],
)
def test_bad_searches_are_named(tmp_path, tree, message):
    with pytest.raises(SettingsError, match=message):
        load_search(write(tmp_path / "search.yaml", tree))


def test_all_mistakes_of_a_search_are_found_at_once_each_with_its_line(tmp_path):
    file = tmp_path / "bad.yaml"
    file.write_text(
        "seeds: [1]\ntrials: 2\nrefinements: 0\nstudy: {seeds: [1, 2], tasks: {digits: 3}}\nstreams:\n"
        "  permuted_digits:\n    methods:\n      sgd: {lr: {log: [1, 0.1]}}\n"
        "      adam:\n        lr: {choice: []}\n"
        "      l2_init:\n        - {base: sgd, lr: {uniform: [1, 1]}}\n        - base: 3\n      adam_l2: []\n"
    )
    with pytest.raises(SettingsError) as error:
        load_search(file)
    where = "streams.permuted_digits.methods"
    assert sorted(str(error.value).splitlines()) == sorted(
        f"{file}:{line}"
        for line in (
            "4: study.tasks.digits: expected permuted_digits; got 'digits'",
            "4: study.seeds: expected others than the tuning seeds, got [1]",
            f"8: {where}.sgd.lr.log: expected [low, high] with 0 < low < high, got [1, 0.1]",
            f"10: {where}.adam.lr.choice: expected a list with at least one entry, got []",
            f"12: {where}.l2_init.0.lr.uniform: expected [low, high] with low < high, got [1, 1]",
            f"13: {where}.l2_init.1.base: expected a word, got 3",
            f"14: {where}.adam_l2: expected settings and ranges, or a list of such entries, got []",
        )
    )


@pytest.mark.parametrize(
    ("name", "stream"), [("permuted_search", "permuted_digits"), ("demo_search", "random_label_digits")]
)
def test_the_demo_shows_the_winners_of_the_stored_searches(name, stream):
    """Every method had the same number of trials, and the demo's settings are the best of them."""
    report = json.loads((ROOT / "benchmarks" / f"{name}.json").read_text())
    search, demo = read_yaml(name), read_yaml("demo")["streams"][stream]
    assert [report[key] for key in ("seeds", "trials", "refinements")] == [
        search[key] for key in ("seeds", "trials", "refinements")
    ]
    assert not set(search["seeds"]) & set(load_study("demo").seeds)
    found = report["streams"][stream]
    of_demo, of_search = ({**body["stream"], "tasks": None} for body in (demo, found))
    assert of_demo == of_search
    assert (demo["hidden"], found["hidden"]) == (found["hidden"], search["streams"][stream]["hidden"])
    assert set(demo["methods"]) <= set(found["methods"]) == set(search["streams"][stream]["methods"])
    for label, settings in demo["methods"].items():
        entry = found["methods"][label]
        assert len(entry["trials"]) == search["trials"] + search["refinements"]
        best = max(entry["trials"], key=lambda trial: trial["online_accuracy"])
        assert settings == entry["best"] == best["settings"]


def test_the_stored_trials_are_those_of_the_search():
    report, search = (
        json.loads((ROOT / "benchmarks" / "demo_search.json").read_text()),
        load_search("demo_search"),
    )
    for name, body in report["streams"].items():
        for label, entry in body["methods"].items():
            first = next(search.plan(search.methods[name][label]))
            assert [trial["settings"] for trial in entry["trials"]][: search.trials] == first


def test_methods_without_their_package_are_left_out_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    path = write(tmp_path / "search.yaml", changed(lr=0.1, kind="soap"))
    with pytest.raises(SettingsError, match=r"methods\.sgd: .*pip install 'clagrange\[second-order\]'"):
        load_search(path)
    reasons = []
    search = load_search(path, left_out=reasons.append)
    assert list(search.methods["permuted_digits"]) == ["l2_init"]
    assert len(reasons) == 1
    assert "pytorch-optimizer" in reasons[0]


def test_the_permuted_study_has_the_winners_of_the_stored_searches():
    study = read_yaml("permuted")
    for stream, searches in {
        "permuted_digits": ["permuted_search", "rivals_search"],
        "permuted_mnist": ["permuted_search"],
    }.items():
        found = {}
        for name in searches:
            stored = json.loads((ROOT / "benchmarks" / f"{name}.json").read_text())
            found |= {label: entry["best"] for label, entry in stored["streams"][stream]["methods"].items()}
        assert study["streams"][stream]["methods"] == found
