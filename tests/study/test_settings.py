"""Study files: what is read, overridden, refused, and written out again."""

import math

import numpy as np
import pytest
import torch
import yaml

from clagrange.study.settings import METHODS, STREAMS, SettingsError, load_study, read_yaml

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


def test_keys_tell_runs_apart_by_all_that_determines_them(path):
    study = load_study(path)
    assert study.key("digits", "sgd") == load_study(path).key("digits", "sgd")
    others = [
        study.key("digits", "strong"),
        load_study(path, ["digits.methods.sgd.lr=0.2"]).key("digits", "sgd"),
        load_study(path, ["digits.stream.tasks=4"]).key("digits", "sgd"),
        load_study(path, ["seeds=3"]).key("digits", "sgd"),
        load_study(path, ["hidden=[9]"]).key("digits", "sgd"),
        network_study(path, {"kind": "vit", "width": 8, "depth": 1}).key("labels", "sgd"),
        network_study(path, {"kind": "vit", "width": 8, "depth": 2}).key("labels", "sgd"),
    ]
    assert len({study.key("digits", "sgd"), *others}) == 8


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
        ({"kind": "resnet"}, r"labels\.sgd: network.kind: expected one of .*did you mean 'resnet18'"),
        ({"kind": "resnet18", "nrm": "batch"}, r"labels\.sgd: network: .*got 'nrm'; did you mean 'norm'"),
        ({"kind": "mlp", "hidden": 8}, r"labels\.sgd: hidden: expected a list of widths"),
        ({"kind": "dohare_convnet"}, r"labels\.sgd: input_shape: expected images large enough"),
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
        keys.append(study.key("images", "sgd"))
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
    keys = [study.key("digits", "sgd") for study in (plain, judged, followed)]
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
        (["strong.temperature=-1"], r"digits\.strong: temperature: expected a number in \(0, inf\), got -1"),
        (["strong.temperature=hot"], r"digits\.methods\.strong: .*temperature.*float.*hot"),
        (["strong.lrr=1"], r"got 'lrr'; did you mean 'lr'\?"),
        (["taks=1"], r"got 'taks'; did you mean 'tasks'\?"),
        (["tasks"], "expected key=value, got 'tasks'"),
        (["tasks=0"], "tasks: expected a whole number of at least 1, got 0"),
        (["examples=2000"], "at most the 1797 digits"),
        (["seeds=0"], "seeds: expected a number of at least 1"),
        (["seeds=[1, 1]"], "seeds: expected .* different seeds"),
        (["hidden=[0]"], "hidden: expected a list of widths"),
        (["digits.stream.seed=3"], "expected no seed"),
        (["stream.kind=permuted_digit"], "did you mean 'permuted_digits'?"),
        (["strong.kind=euler"], "streams.digits.methods.strong: expected one of"),
        (["digits.sharpness_every=0"], r"digits\.sharpness_every: expected a number of tasks of at least 1"),
        (
            ["digits.sample_plasticity_every=0.5"],
            r"sample_plasticity_every: expected a number of tasks .*got 0\.5",
        ),
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
        ("3", "study: expected a mapping"),
        ("seeds: 1", "study: expected a setting 'streams'"),
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
    with pytest.raises(SettingsError, match=r"one of demo.*got 'dmo'.*did you mean 'demo'\?"):
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
