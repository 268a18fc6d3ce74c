"""The figures: their numbers are the theory's, their files are complete, the command line draws them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from clagrange.cli import main
from clagrange.figures import FIGURES, ballistic_training, write_figure
from clagrange.study.files import FileProblem


def drawn(number: str, folder: Path, monkeypatch: pytest.MonkeyPatch, data: Path | None = None) -> dict:
    monkeypatch.setenv("CLAGRANGE_DATA", str(data or folder / "nothing"))
    paths = write_figure(number, folder)
    assert [path.name for path in paths] == [f"figure{number}.png", f"figure{number}.svg", "numbers.json"]
    assert paths[0].read_bytes().startswith(b"\x89PNG")
    assert paths[0].stat().st_size > 30_000
    assert "</svg>" in paths[1].read_text()[-20:]
    return json.loads(paths[2].read_text())[f"figure{number}"]


def test_figure_1(tmp_path, monkeypatch):
    numbers = drawn("1", tmp_path, monkeypatch)
    assert numbers["action_per_interval"] == pytest.approx(0.16957, abs=1e-4)
    assert numbers["crosses_to_right_well"] is True
    assert numbers["crossing"]["time"] == pytest.approx(0.376, abs=1e-3)
    assert numbers["crossing"]["theta_2"] == pytest.approx(0.330, abs=1e-3)
    assert numbers["action"] == pytest.approx(0.678, abs=5e-4)
    assert numbers["action_to_local_minimum"] == pytest.approx(1.946, abs=5e-4)
    assert numbers["minima"] == pytest.approx([-0.93040, 1.05745], abs=1e-5)
    assert numbers["losses_at_minima"] == pytest.approx([0.48325, -0.51475], abs=1e-5)
    assert numbers["saddle"] == pytest.approx(-0.12705, abs=1e-5)
    assert numbers["gradient_flow_end"] == pytest.approx([-0.9304, 0.0], abs=1e-4)
    kinetic, potential = numbers["kinetic_per_step"], numbers["potential"]
    assert (kinetic["at"], potential["at"]) == (3, 3)
    assert [kinetic["start"], kinetic["max"]] == pytest.approx([0.00886, 0.01020], abs=1e-5)
    assert [potential[key] for key in ("start", "max", "end")] == pytest.approx(
        [1.0121, 1.1711, -0.5146], abs=1e-4
    )


def test_figure_2_without_data(tmp_path, monkeypatch):
    numbers = drawn("2", tmp_path, monkeypatch)
    assert list(numbers["rates"].values()) == pytest.approx([1.0, 0.618034, 0.0990195], abs=5e-7)
    assert list(numbers["rates_by_riccati_equation"].values()) == pytest.approx(
        list(numbers["rates"].values()), rel=1e-9
    )
    assert list(numbers["ratios_at_curvature_4"].values()) == pytest.approx([2.0, 2.527, 3.890], abs=5e-4)
    for data in ("mnist", "cifar10"):
        assert "set CLAGRANGE_DATA" in numbers["training"][data]["skipped"]


def test_figure_3(tmp_path, monkeypatch):
    panels = drawn("3", tmp_path, monkeypatch)["panels"]
    assert panels["a"]["rates"] == pytest.approx([2.0, 2.0])
    assert panels["b"]["rates"] == pytest.approx([14.142, 2.0], abs=5e-4)
    assert panels["c"]["rates"] == pytest.approx([2.0, 2.0])
    assert panels["c"]["rotation"] == pytest.approx(10.0)
    assert panels["d"]["rates"] == pytest.approx([10.198, 10.198], abs=5e-4)
    for name in "ab":
        assert panels[name]["end"] == pytest.approx([0.0, -0.5], abs=1e-9)
    for name in "cd":
        for source in ("end", "closed_form_end"):
            assert panels[name][source] == pytest.approx([0.0, -0.01923], abs=1e-5)
        assert panels[name]["closed_form_against_riccati"] < 1e-9


@pytest.mark.slow
def test_figure_6(tmp_path, monkeypatch):
    numbers = drawn("6", tmp_path, monkeypatch)
    peaks = {
        (float(discount), row["shift"]): row
        for discount, rows in numbers["max_log_deviation"].items()
        for row in rows
    }
    known = {(0, 1): 0.0401, (0, 2): 0.144, (0, 5): 0.568, (1, 1): 0.0266, (10, 1): 0.00120}
    for key, value in known.items():
        assert peaks[key]["exact"] == pytest.approx(value, rel=4e-3)
    for (discount, shift), row in peaks.items():
        # the formula's relative error is of second order in the shift, at most x₀²/25 at γ = 0
        assert abs(row["exact"] / row["second_order"] - 1) < shift**2 / 22, (discount, shift)
    assert numbers["energy_drift_at_discount_0"] < 1e-8
    assert numbers["mesu"]["overdamped_field"] < 1e-6
    assert numbers["mesu"]["exact_extrapolated"] < 1e-6
    expected = {
        "discrete_time_rule_discount_0": 2.0,
        "discrete_time_rule_discount_1": 1.0,
        "optimizer_rule_infinite_discount": 1.0,
    }
    for name, order in expected.items():
        assert numbers["convergence"][name]["orders"][-1] == pytest.approx(order, abs=0.02)
    in_distance = numbers["optimizer_rule_in_the_distance_at_discount_1"]
    assert in_distance["orders"][-1] == pytest.approx(2.0, abs=0.2)
    variance = numbers["variance_after_switch"]
    held, prior = 0.01 / 1.01, 1.0
    for discount in ("0", "1", "10"):
        for source in ("exact_max", "rule_max"):
            assert variance["live"][discount][source] == pytest.approx(held, rel=1e-9)
            assert variance["shifted"][discount][source] > held
            assert 0.7 * prior < variance["dead"][discount][source] <= prior
    assert variance["shifted"]["0"]["exact_max"] > variance["shifted"]["1"]["exact_max"]
    assert variance["shifted"]["1"]["exact_max"] > variance["shifted"]["10"]["exact_max"]


def test_training_runs_are_seeded_and_learn():
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, 10, (512,), generator=generator)
    images = torch.randn(512, 784, generator=generator) * 0.3 + 3 * nn.functional.one_hot(targets, 784)
    images = images.view(-1, 28, 28)
    protocol = ballistic_training.Protocol(
        384,
        12,
        ballistic_training.PROTOCOLS["mnist"].network,
        {"SGD": 0.1, "AdamW": 1e-3, "ballistic": 5e-4},
        0.9,
        "",
    )
    runs = [ballistic_training.train(protocol, images, targets, images[384:], targets[384:]) for _ in range(2)]
    assert runs[0] == runs[1]
    assert runs[0]["images"] == 384
    for rule, found in runs[0]["rules"].items():
        assert found["train_loss"][-1] < 0.97 * found["train_loss"][0], rule
    assert "no bias correction" in runs[0]["ballistic"]


def test_cifar_from_one_file(tmp_path):
    generator = np.random.default_rng(0)
    arrays = {
        "x_train": generator.integers(0, 256, (6, 3, 32, 32), dtype=np.uint8),
        "y_train": np.arange(6),
        "x_test": generator.integers(0, 256, (2, 3, 32, 32), dtype=np.uint8),
        "y_test": np.arange(2),
    }
    np.savez(tmp_path / "cifar10_10k.npz", **arrays)
    images, targets, test_images, _ = ballistic_training._cifar10(tmp_path)
    assert (images.shape, test_images.shape) == ((6, 3, 16, 16), (2, 3, 16, 16))
    assert targets.tolist() == list(range(6))
    block = arrays["x_train"][2, 1, 4:6, 8:10].astype(float).mean() / 127.5 - 1
    assert float(images[2, 1, 2, 4]) == pytest.approx(block, rel=1e-5)
    assert ballistic_training.PROTOCOLS["cifar10"].network()(images).shape == (6, 10)


def test_command_line(tmp_path, capsys, monkeypatch):
    out = tmp_path / "figures"
    assert main(["figure", "3", "--out", str(out)]) == 0
    assert "figure3.svg" in capsys.readouterr().out.replace("\n", "")
    monkeypatch.setenv("CLAGRANGE_DATA", str(tmp_path))
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    assert main(["figure", "2", "--out", str(out)]) == 0
    assert set(json.loads((out / "numbers.json").read_text())) == {"figure2", "figure3"}
    assert main(["figure", "3", "--out", str(out)]) == 0
    for name in ("figure3.png", "figure3.svg"):
        assert (out / name).read_bytes() == first[name], f"{name} is not reproducible"
    capsys.readouterr()

    assert main(["figure", "4", "--out", str(out)]) == 2
    assert capsys.readouterr().err == "clagrange: figure: expected one of 1, 2, 3, 6; got '4'\n"
    (out / "numbers.json").write_text("half a fi")
    assert main(["figure", "3", "--out", str(out)]) == 2
    assert "expected JSON" in capsys.readouterr().err


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="figure: expected one of 1, 2, 3, 6"):
        write_figure("7", tmp_path)
    (tmp_path / "numbers.json").write_text("[]")
    with pytest.raises(FileProblem, match="expected a JSON object, got list"):
        write_figure("1", tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileProblem, match="expected a folder"):
        write_figure("1", tmp_path / "file")
    assert set(FIGURES) == {"1", "2", "3", "6"}
