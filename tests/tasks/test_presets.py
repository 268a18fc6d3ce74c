"""The presets of publications, against what the publications ran."""

import json

import pytest
from streams import write_data

from clagrange.cli import main
from clagrange.study.problems import SettingsError
from clagrange.study.settings import STREAMS, load_study
from clagrange.tasks import PermutedDigits, Preset, SlowlyChangingRegression

L2_INIT = {"kind": ("sgd", "adam"), "lr": {"sgd": (0.01, 0.001), "adam": (1e-3, 1e-4)}}
TABLE = {
    # stream, preset: tasks, examples of each, batch, epochs, network, base optimizer
    ("permuted_mnist", "dohare"): (
        800,
        60_000,
        1,
        1,
        {"kind": "mlp", "hidden": [2000, 2000, 2000]},
        {"kind": "sgd", "lr": 0.003},
    ),
    ("permuted_mnist", "upgd"): (
        200,  # 10⁶ examples, a permutation for each 5,000
        5_000,
        1,
        1,
        {"kind": "mlp", "hidden": [300, 150]},
        {"kind": "upgd", "lr": 0.01, "noise": 0.1, "utility_decay": 0.9999, "weight_decay": 0.01},
    ),
    ("permuted_mnist", "l2_init"): (
        500,
        10_000,
        16,
        1,
        {"kind": "mlp", "hidden": [100, 100]},
        L2_INIT,
    ),
    ("label_permuted", "upgd"): (
        400,
        2_500,
        1,
        1,
        {"kind": "mlp", "hidden": [300, 150]},
        {"kind": "upgd", "lr": 0.01, "noise": 0.001, "utility_decay": 0.9, "weight_decay": 0.0},
    ),
    ("random_labels", "l2_init_mnist"): (
        50,
        1_200,
        16,
        400,  # 30,000 steps
        {"kind": "mlp", "hidden": [100, 100]},
        L2_INIT,
    ),
    ("random_labels", "l2_init_cifar10"): (
        50,
        1_200,
        16,
        400,
        {"kind": "mlp", "hidden": [100, 100]},
        L2_INIT,
    ),
    ("continual_image_net", "dohare"): (
        2_000,
        1_200,  # 600 of each of two classes
        100,
        250,
        {"kind": "dohare_convnet"},
        {"kind": "sgd", "lr": 0.01, "momentum": 0.9},
    ),
    ("incremental_cifar", "dohare"): (
        20,
        None,
        90,
        200,
        {"kind": "resnet18", "norm": "batch"},
        {
            "kind": "sgd",
            "lr": 0.1,
            "momentum": 0.9,
            "weight_decay": 5e-4,
            "lr_factor": 0.2,
            "lr_epochs": (60, 120, 160),
        },
    ),
    ("slowly_changing_regression", "dohare"): (
        100,  # 10⁶ examples, a flip every 10⁴
        10_000,
        1,
        1,
        {"kind": "mlp", "hidden": [5]},
        {"kind": ("sgd", "adam"), "lr": (0.01, 0.003, 0.001)},
    ),
    ("five_plus_one_cifar", "l2_init"): (
        30,
        2_500,
        32,
        10,
        {"kind": "mlp", "hidden": [100, 100]},
        L2_INIT,
    ),
}


@pytest.mark.parametrize(("stream", "name"), TABLE)
def test_presets_of_publications(stream: str, name: str) -> None:
    preset = STREAMS[stream].PRESETS[name]
    tasks, examples, batch, epochs, network, optimizer = TABLE[stream, name]
    assert preset.stream["tasks"] == tasks
    assert preset.stream.get("examples") == examples
    assert (preset.stream["batch_size"], preset.stream["epochs"]) == (batch, epochs)
    assert (preset.network, preset.optimizer) == (network, optimizer)


def test_further_numbers_of_publications() -> None:
    imagenet = STREAMS["continual_image_net"].PRESETS["dohare"]
    assert imagenet.stream["test_examples"] == 200
    assert imagenet.at_switch == "output layer set to zero"
    cifar = STREAMS["incremental_cifar"].PRESETS["dohare"]
    assert cifar.stream["tasks"] * cifar.stream["epochs"] == 4_000
    assert cifar.stream["classes_per_task"] == 5
    assert cifar.stream["tasks"] * cifar.stream["classes_per_task"] == 100
    regression = SlowlyChangingRegression.preset("dohare")
    assert (regression.bits, regression.flipping, regression.units, regression.beta) == (20, 15, 100, 0.7)
    assert regression.tasks * regression.examples == 10**6
    labels = STREAMS["random_labels"].PRESETS["l2_init_mnist"].stream
    assert labels["epochs"] * labels["examples"] // labels["batch_size"] == 30_000
    assert labels["source"] == "mnist"
    assert STREAMS["label_permuted"].PRESETS["upgd"].stream["source"] == "emnist"


def test_streams_have_presets_that_a_laptop_finishes() -> None:
    for name, kind in STREAMS.items():
        assert all(isinstance(preset, Preset) for preset in kind.PRESETS.values())
        own = {"rotated_mnist": {"gradual", "abrupt"}, "tabular_drift": {"electricity"}}
        assert own.get(name, {"small"}) <= set(kind.PRESETS)


def test_a_preset_is_a_stream_with_changes() -> None:
    stream = PermutedDigits.preset("small", tasks=3, seed=7)
    assert (stream.tasks, stream.examples, stream.batch_size, stream.seed) == (3, 1600, 4, 7)
    with pytest.raises(ValueError, match=r"preset: expected one of small; got 'smal'; did you mean 'small'"):
        PermutedDigits.preset("smal")
    with pytest.raises(TypeError, match="taks"):
        PermutedDigits.preset("small", taks=3)


def test_list_streams_shows_presets_to_programs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "streams", "--json"]) == 0
    listed = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert set(listed) == set(STREAMS)
    found = listed["incremental_cifar"]["presets"]["dohare"]
    assert found["network"] == {"kind": "resnet18", "norm": "batch"}
    assert found["optimizer"]["lr_epochs"] == [60, 120, 160]
    assert listed["permuted_images"]["parameters"]["file"] == "(required)"


def test_a_study_can_name_a_preset_and_its_network(tmp_path) -> None:
    file = tmp_path / "study.yaml"
    text = "seeds: 1\nstreams: {random_labels: {stream: {preset: small, source: images.npz, pool: 1, tasks: 2, "
    text += "root: FOLDER}, methods: {sgd: {}}}}"
    write_data(tmp_path)
    file.write_text(text.replace("FOLDER", str(tmp_path)).replace("source", "examples: 40, source"))
    study = load_study(file).streams["random_labels"]
    assert study.network == {"kind": "mlp", "hidden": [64, 64]}
    assert (study.settings["tasks"], study.settings["epochs"], study.settings["source"]) == (2, 40, "images.npz")
    with pytest.raises(SettingsError, match=r"preset: expected one of .*; got 'smal'; did you mean 'small'"):
        load_study(file, ["preset=smal"])
