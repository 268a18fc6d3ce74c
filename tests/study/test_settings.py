"""Study files: what is read, overridden, refused, and written out again."""

import math
import re

import numpy as np
import pytest
import torch
import yaml

from clagrange.study.problems import SettingsError
from clagrange.study.settings import METHODS, STREAMS, load_study, read_yaml
from clagrange.study.store import Origin

STUDY = {
    "seeds": 2,
    "streams": {
        "digits": {
            "stream": {"kind": "permuted_digits", "tasks": 3, "examples": 80},
            "hidden": [8],
            "methods": {
                "sgd": {"lr": 0.1},
                "strong": {"kind": "euler_lagrange", "lr": "1e-3", "discount": math.inf},
            },
        },
        "random_label_digits": {"stream": {"tasks": 2}, "methods": {"sgd": None}},
    },
}


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(STUDY))
    return file


def test_names_defaults_and_kinds(path):
    study = load_study(path)
    assert study.seeds == (0, 1)
    assert study.runs() == [("digits", "sgd"), ("digits", "strong"), ("random_label_digits", "sgd")]
    assert study.streams["digits"].methods["strong"] == METHODS["euler_lagrange"](lr=1e-3)
    assert study.streams["digits"].stream(7).seed == 7
    assert study.streams["random_label_digits"].network == {"kind": "mlp", "hidden": [64, 64]}


def test_resolved_settings_make_the_same_study(path, tmp_path):
    study = load_study(path)
    again = tmp_path / "resolved.yaml"
    again.write_text(yaml.safe_dump(study.resolved()))
    assert load_study(again) == study


def key(study, stream, method):
    return Origin.of(study, stream, method).key


def test_keys_tell_runs_apart_by_all_that_determines_them(path):
    study = load_study(path)
    assert key(study, "digits", "sgd") == key(load_study(path), "digits", "sgd")
    others = [
        key(study, "digits", "strong"),
        key(load_study(path, ["digits.methods.sgd.lr=0.2"]), "digits", "sgd"),
        key(load_study(path, ["digits.stream.tasks=4"]), "digits", "sgd"),
        key(load_study(path, ["seeds=3"]), "digits", "sgd"),
        key(load_study(path, ["hidden=[9]"]), "digits", "sgd"),
        key(network_study(path, {"kind": "vit", "width": 8, "depth": 1}), "labels", "sgd"),
        key(network_study(path, {"kind": "vit", "width": 8, "depth": 2}), "labels", "sgd"),
    ]
    assert len({key(study, "digits", "sgd"), *others}) == 8


def network_study(path, network):
    tree = {"stream": {"kind": "random_labels", "tasks": 2}, "network": network, "methods": {"sgd": {}}}
    file = path.with_name("network.yaml")
    file.write_text(yaml.safe_dump({"seeds": 1, "streams": {"labels": tree}}))
    return load_study(file)


def test_hidden_is_short_for_an_mlp(path):
    written = yaml.safe_load(path.read_text())
    digits = written["streams"]["digits"]
    digits["network"] = {"kind": "mlp", "hidden": digits.pop("hidden")}
    other = path.with_name("other.yaml")
    other.write_text(yaml.safe_dump(written))
    assert load_study(other) == load_study(path)
    assert load_study(other).resolved()["streams"]["digits"]["hidden"] == [8]


def test_a_network_of_another_kind_is_made_and_written_again(path, tmp_path):
    network = {"kind": "resnet18", "norm": "group", "width": 4}
    study = network_study(path, network)
    layers = study.start("labels", "sgd").network.modules()
    assert sum(isinstance(layer, torch.nn.Conv2d) for layer in layers) == 20
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(study.resolved()))
    assert load_study(again) == study


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ({"kind": "resnet"}, r"yaml:7: streams.labels.network.kind: expected one of .*did you mean 'resnet18'"),
        (
            {"kind": "resnet18", "nrm": "batch"},
            r"yaml:8: streams.labels.network.nrm: .*got 'nrm'; did you mean 'norm'",
        ),
        ({"kind": "mlp", "hidden": 8}, r"yaml:7: streams.labels.network.hidden: expected a list of widths"),
        ({"kind": "dohare_convnet"}, r"labels\.network: input_shape: expected images large enough"),
        ([8, 8], r"streams\.labels\.network: expected a mapping"),
    ],
)
def test_bad_networks_are_named_in_one_line(path, network, message):
    with pytest.raises(SettingsError, match=message) as error:
        network_study(path, network)
    assert "\n" not in str(error.value)


def test_hidden_and_network_exclude_each_other(path):
    written = yaml.safe_load(path.read_text())
    written["streams"]["digits"]["network"] = {"kind": "mlp"}
    path.write_text(yaml.safe_dump(written))
    with pytest.raises(SettingsError, match="expected hidden or network, got both"):
        load_study(path)


def test_the_folder_of_the_data_is_no_part_of_a_study(tmp_path, monkeypatch):
    file = tmp_path / "images.yaml"
    stream = {"kind": "permuted_images", "file": "images.npz", "tasks": 2, "examples": 8, "batch_size": 4}
    body = {"stream": stream, "methods": {"sgd": {}}}
    file.write_text(yaml.safe_dump({"seeds": 2, "streams": {"images": body}}))
    keys = []
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        images = {"x_train": np.zeros((8, 1, 4, 4), np.uint8), "y_train": np.arange(8) % 2}
        np.savez(tmp_path / folder / "images.npz", **images)
        monkeypatch.setenv("CLAGRANGE_DATA", str(tmp_path / folder))
        study = load_study(file)
        assert study.streams["images"].stream(0).task(1).inputs.shape == (8, 16)
        keys.append(key(study, "images", "sgd"))
    assert keys[0] == keys[1]
    assert str(tmp_path) not in yaml.safe_dump(study.resolved())


def test_an_override_sets_every_path_that_ends_so(path):
    study = load_study(path, ["tasks=1", "sgd.lr=0.5"])
    assert [body.settings["tasks"] for body in study.streams.values()] == [1, 1]
    assert [body.methods["sgd"].lr for body in study.streams.values()] == [0.5, 0.5]


def test_measures_that_are_asked_for_are_written_and_a_threshold_is_no_part_of_the_run(path):
    plain = load_study(path)
    judged = load_study(path, ["digits.threshold=0.8"])
    followed = load_study(path, ["digits.threshold=0.8", "digits.sample_plasticity_every=2"])
    assert followed.resolved()["streams"]["digits"]["threshold"] == 0.8
    assert followed.start("digits", "sgd").sample_plasticity_every == 2
    keys = [Origin.of(study, "digits", "sgd").key for study in (plain, judged, followed)]
    assert keys[0] == keys[1] != keys[2]


def test_an_override_may_set_what_the_file_leaves_to_its_default(path):
    assert load_study(path, ["strong.trust_region=2"]).streams["digits"].methods["strong"].trust_region == 2.0


def test_filters_keep_the_order_of_the_file(path):
    assert load_study(path, methods=["sgd"]).runs() == [("digits", "sgd"), ("random_label_digits", "sgd")]
    assert load_study(path, streams=["digits"], methods=["strong", "sgd"]).runs() == [
        ("digits", "sgd"),
        ("digits", "strong"),
    ]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["strong.temperature=-1"],
            r"override 'strong.temperature=-1': .*strong.temperature: expected a number in \(0, inf\), got -1",
        ),
        (["strong.temperature=hot"], r"digits\.methods\.strong.temperature: expected a number, got 'hot'"),
        (["strong.lrr=1"], r"got 'lrr'; did you mean 'lr'\?"),
        (["taks=1"], r"got 'taks'; did you mean 'tasks'\?"),
        (["tasks"], "override 'tasks': expected key=value"),
        (["digits.stream.tasks=0"], "tasks: expected a whole number of at least 1, got 0"),
        (["examples=2000"], "at most the 1797 digits"),
        (["seeds=0"], "seeds: expected a number of at least 1"),
        (["seeds=[1, 1]"], "seeds: expected .* different seeds"),
        (["hidden=[0]"], "hidden: expected a list of widths"),
        (["digits.stream.seed=3"], "expected no seed"),
        (["digits.stream.kind=permuted_digit"], "did you mean 'permuted_digits'?"),
        (
            ["strong.kind=euler"],
            "override 'strong.kind=euler': streams.digits.methods.strong.kind: expected one of",
        ),
        (["digits.sharpness_every=0"], r"digits\.sharpness_every: expected a number of tasks of at least 1"),
        (
            ["digits.sample_plasticity_every=0.5"],
            r"sample_plasticity_every: expected a number of tasks .*got 0\.5",
        ),
        (["strong.lr=null"], r"methods\.strong\.lr: expected a number, got null; leave lr out for its default"),
        (["digits.stream.preset=[small]"], r"digits\.stream\.preset: expected one of small .*; got \['small'\]"),
        (["digits.threshold=much"], r"digits\.threshold: expected an online accuracy such as 0\.8.*got 'much'"),
        (["strong.lr=.nan"], r"expected a number, got nan|expected a number in"),
    ],
)
def test_bad_settings_are_named_in_one_line(path, overrides, message):
    with pytest.raises(SettingsError, match=message) as error:
        load_study(path, overrides)
    assert "\n" not in str(error.value)


def test_a_misspelt_method_is_named_with_the_nearest(path):
    with pytest.raises(SettingsError, match=r"methods: .*got 'sdg'; did you mean 'sgd'\?"):
        load_study(path, methods=["sdg"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seeds: [", "is not valid YAML"),
        ("3", "bad.yaml: expected a mapping"),
        ("seeds: 1", "bad.yaml: expected a setting 'streams'"),
        ("seeds: 1\nstreams: {}", "streams: expected a mapping with at least one entry"),
        ("seeds: 1\nstreams: {permuted_digits: {methods: {}}}", "methods: expected a mapping"),
        ("seeds: 1\nstreams: {permuted_digits: {method: {sgd: {}}}}", "did you mean 'methods'?"),
        ("!!python/object/apply:os.getcwd []", "is not valid YAML"),
    ],
)
def test_bad_files_are_refused(tmp_path, text, message):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(SettingsError, match=message):
        load_study(file)


def test_a_missing_file_is_named_with_what_there_is():
    with pytest.raises(SettingsError, match=r"one of .*demo,.*got 'dmo'.*did you mean 'demo'\?"):
        load_study("dmo")


def test_the_packaged_searches_name_every_registered_method_and_the_demo_some_of_them():
    search, rivals, demo = read_yaml("permuted_search"), read_yaml("rivals_search"), load_study("demo")
    digits = [set(body["streams"]["permuted_digits"]["methods"]) for body in (search, rivals)]
    assert set.union(*digits) == set(METHODS)
    assert not set.intersection(*digits)
    for name in ("seeds", "trials", "refinements"):
        assert search[name] == rivals[name]
    assert search["streams"]["permuted_digits"]["stream"] == rivals["streams"]["permuted_digits"]["stream"]
    for study in demo.streams.values():
        assert set(study.methods) < set(METHODS)
    assert {*search["streams"], *demo.streams} <= set(STREAMS)


BAD = """\
# A study with a mistake on almost every line.
seeds: []
streams:
  permuted_digits:
    stream: {task: 3}
    hidden: [8, 0]
    methods:
      sgd: {lr: fast}
      adam: {lr: [0.1]}
      sgdd: {}
      shrink_and_perturb:
        base: adm
      ivon: {}
  permuted_images:
    stream:
      file: nowhere.npz
    methods: {sgd: {}}
  label_permuted:
    method: {sgd: {}}
  tabular_drift:
    stream: {file: 3}
    methods: {sgd: {}}
  slowly_changing_regression:
    sharpness_every: often
    stream: {tasks: 2}
    methods:
      sgd: 3
      adam: {kind: adma}
stream: {}
"""


MISTAKES = {
    2: r"seeds: expected a number of at least 1 or a list of different seeds, got \[\]",
    5: r"streams\.permuted_digits\.stream\.task: expected settings .*; got 'task'; did you mean 'tasks'\?",
    6: r"streams\.permuted_digits\.hidden: expected a list of widths of at least 1, got \[8, 0\]",
    8: r"streams\.permuted_digits\.methods\.sgd\.lr: expected a number, got 'fast'",
    9: r"streams\.permuted_digits\.methods\.adam\.lr: expected a number, got \[0\.1\]",
    10: r"streams\.permuted_digits\.methods\.sgdd\.kind: expected one of sgd, .*; did you mean 'sgd'\?",
    12: r"streams\.permuted_digits\.methods\.shrink_and_perturb\.base: expected one of .*did you mean 'adam'\?",
    13: r"streams\.permuted_digits\.methods\.ivon: .*pip install",
    16: r"streams\.permuted_images\.stream\.file: expected an \.npz archive .*nowhere.npz; give its path",
    18: r"streams\.label_permuted: expected a setting 'methods', got method",
    19: r"streams\.label_permuted\.method: expected .*; got 'method'; did you mean 'methods'\?",
    21: r"streams\.tabular_drift\.stream: expected a setting 'target' of tabular_drift, got file",
    24: r"streams\.slowly_changing_regression\.sharpness_every: expected a number of tasks .*, got 'often'",
    27: r"streams\.slowly_changing_regression\.methods\.sgd: expected settings, got 3",
    28: r"streams\.slowly_changing_regression\.methods\.adam\.kind: .*did you mean 'adam'\?",
    29: r"stream: expected seeds, streams; got 'stream'; did you mean 'streams'\?",
}


def test_all_mistakes_are_found_at_once_each_with_its_line(tmp_path, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError("expected the package ivon-opt; pip install 'clagrange[ivon]'")

    monkeypatch.setattr("clagrange.study.methods.base.extra_module", missing)
    monkeypatch.setenv("CLAGRANGE_DATA", str(tmp_path))
    file = tmp_path / "bad.yaml"
    file.write_text(BAD)
    with pytest.raises(SettingsError) as error:
        load_study(file)
    found = sorted(str(error.value).splitlines(), key=lambda line: int(line.split(":")[1]))
    for line, (number, message) in zip(found, MISTAKES.items(), strict=True):
        assert re.fullmatch(rf"{file}:{number}: {message}.*", line), line


def test_a_name_that_stands_twice_is_an_error(tmp_path):
    file = tmp_path / "twice.yaml"
    methods = "    methods:\n      sgd: {lr: 0.1}\n      adam: {lr: 0.1, lr: 0.2}\n      sgd: {lr: 0.2}\n"
    file.write_text(f"seeds: 1\nstreams:\n  random_labels:\n{methods}  random_labels:\n{methods}")
    with pytest.raises(SettingsError) as error:
        load_study(file)
    where = "streams.random_labels"
    again = "expected each name once in one place, got it again after line"
    assert sorted(str(error.value).splitlines()) == sorted(
        f"{file}:{line}: {key}: {again} {first}; rename or remove one"
        for line, key, first in (
            (8, where, 3),
            (6, f"{where}.methods.adam.lr", 6),
            (7, f"{where}.methods.sgd", 5),
            (11, f"{where}.methods.adam.lr", 11),
            (12, f"{where}.methods.sgd", 10),
        )
    )


def test_aliases_and_merges_are_no_repetition_and_their_copies_are_apart(tmp_path):
    file = tmp_path / "shared.yaml"
    file.write_text(
        "seeds: 1\nstreams:\n"
        "  permuted_digits: &body {stream: {tasks: 1}, methods: &both {sgd: {lr: 0.1}, adam: {}}}\n"
        "  random_label_digits: {stream: {tasks: 1}, methods: *both}\n"
        "  more: {<<: *body, stream: {kind: permuted_digits, tasks: 2}}\n"
    )
    study = load_study(file, ["random_label_digits.methods.sgd.lr=0.5"])
    assert [body.methods["sgd"].lr for body in study.streams.values()] == [0.1, 0.5, 0.1]
    assert study.streams["more"].settings["tasks"] == 2
    file.write_text("seeds: &a [*a]\nstreams: 1")
    with pytest.raises(SettingsError, match=r"shared.yaml:1: .*alias"):
        load_study(file)


def test_names_that_cannot_be_files_are_refused(tmp_path):
    file = tmp_path / "names.yaml"
    methods = {"a/b": {"kind": "sgd"}, "c": {"kind": "sgd"}, "C": {"kind": "sgd"}}
    file.write_text(yaml.safe_dump({"seeds": 1, "streams": {"permuted_digits": {"methods": methods}}}))
    with pytest.raises(SettingsError, match=r"names.yaml:7: .*got 'a/b'\n.*names whose files differ"):
        load_study(file)


def test_the_override_is_named_that_a_bad_value_is_from(path):
    with pytest.raises(SettingsError) as error:
        load_study(path, ["hidden=[8]", "sgd.lr=1", "sgd.lr=hot", "digits.methods={sgd: {lrr: 1, lr: 2}}"])
    assert sorted(line.partition(": expected")[0] for line in str(error.value).splitlines()) == [
        "override 'digits.methods={sgd: {lrr: 1, lr: 2}}': streams.digits.methods.sgd.lrr",
        "override 'sgd.lr=hot': streams.random_label_digits.methods.sgd.lr",
    ]
    with pytest.raises(SettingsError, match=r"override 'sgd=\{a: 1, a: 2\}':1: a: expected each name once"):
        load_study(path, ["sgd={a: 1, a: 2}"])


VIT = {"kind": "vit", "patch": 4, "width": 8, "depth": 1, "heads": 2}


@pytest.mark.parametrize(
    ("body", "method", "message"),
    [
        ({"network": VIT}, "continual_backprop", r"methods\.continual_backprop: .*cannot tell which layer"),
        ({"network": VIT}, "redo", r"methods\.redo: expected a method that can train this network; .* leave"),
        ({"hidden": []}, "redo", r"methods\.redo: .*at least two linear"),
        (
            {"network": {"kind": "resnet18", "width": 2}, "stream": {"batch_size": 1}},
            "sgd",
            r"label_permuted\.network: expected .* in batches of 1; the first failed with: Expected more",
        ),
    ],
)
def test_what_cannot_make_a_step_is_found_before_anything_runs(tmp_path, body, method, message):
    body = {"methods": {"adam" if method == "sgd" else "sgd": {}, method: {}}, **body}
    body["stream"] = {"tasks": 1, "examples": 20, "batch_size": 5, **body.get("stream", {})}
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump({"seeds": 1, "streams": {"label_permuted": body}}))
    with pytest.raises(SettingsError, match=message) as error:
        load_study(file)
    line = file.read_text().splitlines().index("    network:" if method == "sgd" else f"      {method}: {{}}") + 1
    assert str(error.value).startswith(f"{file}:{line}: streams.label_permuted.")
    assert "\n" not in str(error.value)
    if method != "sgd":
        assert load_study(file, methods=["sgd"]).runs() == [("label_permuted", "sgd")]


def test_a_stream_whose_batches_cannot_be_made_is_found_and_bad_numbers_beside_it(tmp_path):
    stream = {"source": "digits", "tasks": 2, "examples_per_class": 20, "batch_size": 10, "pool": 2, "epochs": 1}
    body = {"stream": stream, "hidden": [8], "methods": {"sgd": {}, "shrink_and_perturb": {"shrink": 3.0}}}
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump({"streams": {"incremental_cifar": body}, "seeds": 1}, sort_keys=False))
    with pytest.raises(SettingsError) as error:
        load_study(file)
    first, second = str(error.value).splitlines()
    assert ":3: streams.incremental_cifar.stream: expected a stream whose batches can be made" in first
    assert "augment" in first
    assert "methods.shrink_and_perturb.shrink: expected a number in [0, 1]" in second


def test_methods_of_large_networks_are_started_without_a_step(path, monkeypatch):
    monkeypatch.setattr("clagrange.study.settings.TRIED_WEIGHTS", 0)
    monkeypatch.setattr("clagrange.study.engine.Run.run_task", lambda run: pytest.fail("took a step"))
    load_study(path)
    with pytest.raises(SettingsError, match=r"methods\.redo: expected a method that can train this network"):
        load_study(path, ["digits.hidden=[]", "digits.methods={redo: {}}"])


def test_names_that_are_no_words_are_refused(tmp_path):
    file = tmp_path / "names.yaml"
    file.write_text(
        "seeds: 1\nstreams:\n  5: {methods: {sgd: {}}}\n  permuted_digits:\n    methods:\n"
        "      sgd: {}\n      1: {kind: sgd}\n      no: {kind: sgd}\n"
    )
    with pytest.raises(SettingsError) as error:
        load_study(file)
    assert str(error.value).splitlines() == [
        f"{file}:{line}: {where}: expected a word as a name, got {name}, as YAML reads it; put the name in quotes"
        for line, where, name in (
            (3, "streams.5", "5"),
            (7, "streams.permuted_digits.methods.1", "1"),
            (8, "streams.permuted_digits.methods.False", "False"),
        )
    ]
    file.write_text("seeds: 1\nstreams: {permuted_digits: {methods: {'1': {kind: sgd}}}}")
    assert load_study(file).runs() == [("permuted_digits", "1")]
