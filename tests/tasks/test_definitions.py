"""Each stream against its definition."""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from streams import CLASSES, IMAGES, SIDE, TEST, TRAIN

from clagrange.tasks import (
    ContinualImageNet,
    FivePlusOneCIFAR,
    IncrementalCIFAR,
    LabelPermuted,
    RandomLabels,
    RotatedMNIST,
    SlowlyChangingRegression,
    SplitClasses,
    TabularDrift,
)
from clagrange.tasks.transforms import crop_and_flip, rotate


def labels_of_images(root: str) -> dict[bytes, int]:
    """The class of every image of the archive, by its bytes."""
    with np.load(Path(root, IMAGES)) as arrays:
        return {
            image.tobytes(): int(label)
            for part in ("train", "test")
            for image, label in zip(arrays[f"x_{part}"], arrays[f"y_{part}"], strict=True)
        }


def true_classes(task: Any, root: str) -> list[int]:
    """The archive's classes of the images that a task shows."""
    known = labels_of_images(root)
    rows = torch.arange(len(task.targets)) if task.rows is None else task.rows
    return [known[task.data[row].numpy().tobytes()] for row in rows]


# ----------------------------------------------------------------------------------------------- labels
def test_label_permuted_renames_the_classes_one_to_one(root: str) -> None:
    stream = LabelPermuted(IMAGES, tasks=4, examples=100, root=root)
    namings = []
    for task in stream:
        for part in (task, task.test):
            pairs = set(zip(true_classes(part, root), part.targets.tolist(), strict=True))
            naming = dict(pairs)
            assert len(pairs) == len(naming) == len(set(naming.values())) == CLASSES
            namings.append(naming)
        assert namings[-1] == namings[-2]  # the test images are named as those for training
    assert all(namings[2 * i] != namings[2 * j] for i in range(4) for j in range(i))
    assert any(namings[0][k] != k for k in range(CLASSES))
    subsets = [frozenset(task.rows.tolist()) for task in stream]
    assert all(len(subset) == 100 for subset in subsets)
    assert len(set(subsets)) == 4


def test_random_labels_keeps_the_images_and_redraws_the_labels(root: str) -> None:
    stream = RandomLabels(IMAGES, tasks=6, examples=200, root=root)
    tasks = list(stream)
    for task in tasks[1:]:
        assert torch.equal(task.inputs, tasks[0].inputs)
        agreement = float((task.targets == tasks[0].targets).float().mean())
        assert abs(agreement - 1 / CLASSES) < 4 * math.sqrt(1 / CLASSES / 200)
        assert task.test is None
    counts = torch.bincount(torch.cat([task.targets for task in tasks]), minlength=CLASSES)
    assert ((counts - 100).abs() < 5 * 10).all()
    assert len(set(tasks[0].rows.tolist())) == 200


# ---------------------------------------------------------------------------------------------- classes
@pytest.mark.parametrize("scenario", ["class", "task"])
def test_split_classes_shares_out_the_classes(root: str, scenario: str) -> None:
    stream = SplitClasses(IMAGES, tasks=4, classes_per_task=3, scenario=scenario, root=root, seed=1)
    assert stream.examples == 3 * TRAIN
    seen: list[int] = []
    for task in stream:
        assert task.targets.tolist() == true_classes(task, root)
        assert task.test.targets.tolist() == true_classes(task.test, root)
        chosen, counts = task.targets.unique(return_counts=True)
        assert counts.tolist() == [TRAIN] * 3
        assert torch.bincount(task.test.targets)[chosen].tolist() == [TEST] * 3
        assert len(task.test.targets) == 3 * TEST
        for part in (task, task.test):
            assert part.classes is None if scenario == "class" else part.classes.tolist() == chosen.tolist()
        seen += chosen.tolist()
    assert sorted(seen) == list(range(CLASSES))
    assert seen != list(range(CLASSES))
    assert stream.multi_head == (scenario == "task")
    assert stream.class_names[3] == "class 3"


def test_split_classes_refuses_what_does_not_fit(root: str) -> None:
    with pytest.raises(ValueError, match=r"tasks: expected at most 4 tasks of 3 of the 12 classes .*, got 5"):
        SplitClasses(IMAGES, tasks=5, classes_per_task=3, root=root)
    with pytest.raises(ValueError, match=r"examples: expected a multiple of the 3 classes .* at most 60, got 40"):
        SplitClasses(IMAGES, tasks=4, classes_per_task=3, examples=40, root=root)
    with pytest.raises(ValueError, match=r"scenario: .*got 'clas'; did you mean 'class'"):
        SplitClasses(IMAGES, scenario="clas", root=root)


@pytest.mark.parametrize("source", [IMAGES, "digits"])
def test_continual_imagenet_shows_pairs(root: str, source: str) -> None:
    settings = {"examples": 20, "test_examples": 8, "batch_size": 4, "root": root}
    stream = ContinualImageNet(source, tasks=15, **settings)
    half = (CLASSES if source == IMAGES else 10) // 2
    pairs = [stream.pair(number) for number in range(15)]
    for first in (0, half):  # in each round every class once
        assert sorted(label for pair in pairs[first : first + half] for label in pair) == list(range(2 * half))
    assert pairs[:half] != pairs[half : 2 * half]
    for task, pair in zip(stream, pairs, strict=True):
        assert torch.bincount(task.targets).tolist() == [10, 10]
        assert torch.bincount(task.test.targets).tolist() == [4, 4]
        if source == IMAGES:
            assert [pair[target] for target in task.targets.tolist()] == true_classes(task, root)
            assert [pair[target] for target in task.test.targets.tolist()] == true_classes(task.test, root)


def test_continual_imagenet_holds_out_training_images_where_there_is_no_test_set(tmp_path: Path) -> None:
    images = np.arange(60, dtype=np.uint8).reshape(60, 1, 1, 1) * np.ones((1, 1, 4, 4), np.uint8)
    np.savez(tmp_path / "pairs.npz", x_train=images, y_train=np.repeat(np.arange(3), 20))
    settings = {"examples": 28, "test_examples": 12, "batch_size": 4, "root": str(tmp_path)}
    for task in ContinualImageNet("pairs.npz", tasks=4, **settings):
        train, test = ({int(image[0, 0, 0]) for image in part.data[part.rows]} for part in (task, task.test))
        assert (len(train), len(test)) == (28, 12)
        assert not train & test
        for part in (task, task.test):
            labels = [int(image[0, 0, 0]) // 20 for image in part.data[part.rows]]
            assert len(set(zip(labels, part.targets.tolist(), strict=True))) == 2
    with pytest.raises(ValueError, match=r"at most 40 for training and 12 for test.*got 28 and 14"):
        ContinualImageNet("pairs.npz", **{**settings, "test_examples": 14})
    with pytest.raises(ValueError, match="examples: expected an even number"):
        ContinualImageNet("pairs.npz", **{**settings, "examples": 27})


def test_incremental_cifar_adds_classes_and_keeps_the_old(root: str) -> None:
    stream = IncrementalCIFAR(
        IMAGES, tasks=4, classes_per_task=3, examples_per_class=15, batch_size=9, epochs=2, root=root, seed=2
    )
    before: set[int] = set()
    rows_before: set[int] = set()
    for number, task in enumerate(stream):
        assert len(task.targets) == stream.examples_of(number) == 45 * (number + 1)
        assert stream.steps_of(number) == 5 * (number + 1)
        assert task.targets.tolist() == true_classes(task, root)
        assert task.test.targets.tolist() == true_classes(task.test, root)
        classes = set(task.targets.tolist())
        assert before < classes == set(task.classes.tolist()) == set(task.test.classes.tolist())
        assert rows_before < set(task.rows.tolist())
        assert len(task.test.targets) == TEST * 3 * (number + 1)
        before, rows_before = classes, set(task.rows.tolist())
    assert stream.total_steps == 2 * (5 + 10 + 15 + 20)
    assert stream.locate(2 * 5 + 13) == (1, 1, 3)
    assert stream.first_step(2) == 30


def test_incremental_cifar_standardises_by_the_training_set(root: str) -> None:
    settings = {
        "tasks": 1,
        "classes_per_task": CLASSES,
        "examples_per_class": TRAIN,
        "batch_size": 9,
        "root": root,
    }
    inputs = IncrementalCIFAR(IMAGES, **settings).task(0).inputs
    torch.testing.assert_close(inputs.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(inputs.std((0, 2, 3), correction=0), torch.ones(3), rtol=0, atol=1e-5)
    pooled = IncrementalCIFAR(IMAGES, pool=2, **settings).task(0).inputs
    torch.testing.assert_close(pooled.std((0, 2, 3), correction=0), torch.ones(3), rtol=0, atol=1e-5)


def test_incremental_cifar_augments_training_images_anew_in_each_epoch(root: str) -> None:
    settings = {"tasks": 2, "classes_per_task": 2, "examples_per_class": 10, "batch_size": 10, "root": root}
    stream = IncrementalCIFAR(IMAGES, **settings)
    task, rows = stream.task(1), torch.arange(40)
    plain, first, second = (task.batch(rows, epoch)[0] for epoch in (None, 0, 1))
    assert torch.equal(plain, task.inputs)
    for one, other in ((plain, first), (first, second)):
        assert (one != other).flatten(1).any(1).float().mean() > 0.9
    assert torch.equal(stream.task(1).batch(rows.flip(0), 1)[0], second.flip(0))
    still = IncrementalCIFAR(IMAGES, augment=False, **settings).task(1)
    assert torch.equal(still.batch(rows, 0)[0], plain)
    assert torch.equal(task.test.batch(torch.arange(5), 0)[0], task.test.inputs[:5])


def test_five_plus_one_cifar_is_hard_and_easy_by_turns(root: str) -> None:
    stream = FivePlusOneCIFAR(IMAGES, tasks=4, examples=50, batch_size=10, root=root, seed=3)
    assert not stream.equally_hard
    seen: list[int] = []
    for number, task in enumerate(stream):
        assert task.targets.tolist() == true_classes(task, root)
        assert task.test.targets.tolist() == true_classes(task.test, root)
        classes, counts = task.targets.unique(return_counts=True)
        assert counts.tolist() == ([50] if number % 2 else [10] * 5)
        assert task.rows.unique().numel() == (10 if number % 2 else 50)
        assert torch.equal(task.test.targets.unique(), classes)
        seen += classes.tolist()
    assert sorted(seen) == list(range(CLASSES))
    with pytest.raises(ValueError, match="tasks: expected at most 4 tasks of 5 and 1 of the 12 classes"):
        FivePlusOneCIFAR(IMAGES, tasks=5, examples=50, batch_size=10, root=root)
    with pytest.raises(ValueError, match="examples: expected a multiple of 5, at most 100, got 105"):
        FivePlusOneCIFAR(IMAGES, tasks=4, examples=105, batch_size=10, root=root)


# --------------------------------------------------------------------------------------------- rotation
def test_rotation_by_right_angles_is_exact_and_counter_clockwise() -> None:
    images = torch.rand(5, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    for turns in range(4):
        turned = rotate(images, torch.full((5,), 90.0 * turns))
        torch.testing.assert_close(turned, torch.rot90(images, turns, (2, 3)), rtol=0, atol=1e-5)
    wide = torch.rand(1, 1, 4, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rotate(wide, torch.tensor([180.0])), wide.flip(2, 3), rtol=0, atol=1e-5)
    inner = rotate(wide, torch.tensor([90.0]))[0, 0, :, 2:6]  # what stays inside
    torch.testing.assert_close(inner, torch.rot90(wide[0, 0, :, 2:6], 1, (0, 1)), rtol=0, atol=1e-5)


def test_rotated_mnist_turns_training_and_test_images_alike(root: str) -> None:
    from scipy.ndimage import rotate as oracle

    gradual = RotatedMNIST(IMAGES, tasks=8, examples=60, step=12.5, root=root)
    abrupt = RotatedMNIST(IMAGES, tasks=8, examples=60, drift="abrupt", root=root, seed=1)
    assert [gradual.angle(number) for number in range(8)] == [12.5 * number for number in range(8)]
    assert gradual.hidden_switches
    assert not abrupt.hidden_switches
    angles = [abrupt.angle(number) for number in range(8)]
    assert len(set(angles)) == 8
    assert 0 <= min(angles) < 180 < max(angles) < 360
    for stream in (gradual, abrupt):
        for number in (0, 5):
            task = stream.task(number)
            for part in (task, task.test):
                rows = torch.arange(len(part.targets)) if part.rows is None else part.rows
                assert part.targets.tolist() == true_classes(part, root)
                raw = part.data[rows[:3]].numpy() / 255.0
                middle = slice(SIDE // 2 - 1, SIDE // 2 + 1)  # away from the edge, where treatments differ
                expected = oracle(raw, stream.angle(number), axes=(3, 2), reshape=False, order=1)
                ours = part.inputs[:3].numpy()
                np.testing.assert_allclose(ours[:, :, middle, middle], expected[:, :, middle, middle], atol=1e-4)


def test_crop_and_flip() -> None:
    images = torch.rand(3, 2, 12, 12, generator=torch.Generator().manual_seed(0))
    no_shift = 4.5 / 9
    draws = torch.tensor([[0.9, no_shift, no_shift, 0.0], [0.1, no_shift, no_shift, 0.0], [0.9, 0.0, 0.999, 0.0]])
    kept, flipped, shifted = crop_and_flip(images, draws)
    torch.testing.assert_close(kept, images[0], rtol=0, atol=0)
    torch.testing.assert_close(flipped, images[1].flip(-1), rtol=0, atol=0)
    torch.testing.assert_close(shifted[:, 4:, :-4], images[2][:, :-4, 4:], rtol=0, atol=0)
    torch.testing.assert_close(shifted[:, 3, :-4], images[2][:, 1, 4:], rtol=0, atol=0)  # the edge is reflected


# ------------------------------------------------------------------------------------------- regression
def test_slowly_changing_regression_flips_one_slow_bit_at_a_time() -> None:
    stream = SlowlyChangingRegression(tasks=40, examples=600, seed=5)
    slow = []
    for task in stream:
        bits = task.inputs
        assert set(bits.unique().tolist()) == {0.0, 1.0}
        assert (bits[:, :15] == bits[0, :15]).all()
        assert ((bits[:, 15:].mean(0) - 0.5).abs() < 4 * 0.5 / math.sqrt(600)).all()
        slow.append(bits[0, :15])
    changes = [(after != before).nonzero().flatten().tolist() for before, after in itertools.pairwise(slow)]
    assert all(len(change) == 1 for change in changes)
    assert len({change[0] for change in changes}) > 8  # 39 draws from 15


def test_slowly_changing_regression_has_one_target_function_of_threshold_units() -> None:
    stream = SlowlyChangingRegression(tasks=3, examples=50, bits=6, flipping=2, units=30, beta=0.6, seed=1)
    random = stream.random("target")
    weights = random.choice([-1.0, 1.0], size=(30, 7))
    outgoing = random.choice([-1.0, 1.0], size=30)
    for task in stream:
        for bits, target in zip(task.inputs.tolist(), task.targets.tolist(), strict=True):
            total = 0.0
            for w, v in zip(weights, outgoing, strict=True):
                threshold = 7 * 0.6 - sum(entry == -1 for entry in w)
                total += v * (sum(a * b for a, b in zip(w, [*bits, 1.0], strict=True)) > threshold)
            assert target == total
    assert torch.cat([task.targets for task in stream]).std() > 0.5
    with pytest.raises(ValueError, match="flipping: expected a whole number from 1 to the 6 bits, got 7"):
        SlowlyChangingRegression(bits=6, flipping=7)


# ------------------------------------------------------------------------------------------------ tables
def table(folder: Path, **changes: Any) -> Path:
    columns = {
        "load": [1.0, 3.0, None, 100.0, 5.0, 7.0, 9.0, 11.0],
        "day": ["mon", "tue", "mon", None, "wed", "tue", "mon", "thu"],
        "open": [True, False, True, True, False, False, True, True],
        "count": [4, 4, 4, 4, 5, 6, 7, 8],
        "price": [10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0, 80.0],
        "grade": [10, 9, 10, 9, 2, 9, 10, 2],
        **changes,
    }
    path = folder / "table.parquet"
    pq.write_table(pa.table(columns), path)
    return path


def test_tabular_drift_encodes_by_the_first_task_alone(tmp_path: Path) -> None:
    stream = TabularDrift(str(table(tmp_path)), "price", examples=4, batch_size=2)
    assert (stream.tasks, stream.loss, stream.classes, stream.class_names) == (2, "mse", 1, None)
    assert stream.columns == (
        "load",
        "count",
        "grade",
        "day=mon",
        "day=tue",
        "day=other",
        "open=false",
        "open=true",
        "open=other",
    )
    first, second = stream
    known = np.array([1.0, 3.0, 100.0])
    loads = (np.array([1, 3, known.mean(), 100, 5, 7, 9, 11]) - known.mean()) / known.std()
    inputs = torch.cat([first.inputs, second.inputs])
    np.testing.assert_allclose(inputs[:, 0], loads, rtol=1e-6, atol=1e-7)
    assert inputs[:, 1].tolist() == [0, 0, 0, 0, 1, 2, 3, 4]  # a constant so far: only shifted
    assert inputs[:, 3:6].argmax(1).tolist() == [0, 1, 0, 2, 2, 1, 0, 2]
    assert inputs[:, 6:].argmax(1).tolist() == [1, 0, 1, 1, 0, 0, 1, 1]
    assert (inputs[:, 3:6].sum(1) == 1).all()
    prices = (np.arange(10, 90, 10) - 25) / np.std([10, 20, 30, 40])
    np.testing.assert_allclose(torch.cat([first.targets, second.targets]), prices, rtol=1e-6)
    assert stream.hidden_switches
    assert stream.order(1, 0).tolist() == [[0, 1], [2, 3]]


def test_tabular_drift_does_not_look_ahead(tmp_path: Path) -> None:
    """The first task is what it is whatever comes later."""
    streams = []
    for number, load in enumerate((5.0, 5e6)):
        folder = tmp_path / str(number)
        folder.mkdir()
        later = [1.0, 3.0, None, 100.0, load, 7.0, 9.0, 11.0]
        streams.append(TabularDrift(str(table(folder, load=later)), "price", examples=4, batch_size=2))
    assert torch.equal(streams[0].task(0).inputs, streams[1].task(0).inputs)
    assert not torch.equal(streams[0].task(1).inputs, streams[1].task(1).inputs)


def test_tabular_drift_of_classes_and_chosen_columns(tmp_path: Path) -> None:
    path = str(table(tmp_path))
    stream = TabularDrift(path, "grade", numeric=["load"], categorical=["open"], examples=4, batch_size=2)
    assert (stream.loss, stream.class_names) == ("cross_entropy", ("2", "9", "10"))
    assert stream.columns == ("load", "open=false", "open=true", "open=other")
    assert torch.cat([task.targets for task in stream]).tolist() == [2, 1, 2, 1, 0, 1, 2, 0]
    assert TabularDrift(path, "grade", target_kind="number", examples=4, batch_size=2).loss == "mse"
    assert TabularDrift(path, "open", examples=8, batch_size=2).class_names == ("false", "true")


def test_a_csv_and_a_parquet_table_give_the_same_stream(tmp_path: Path) -> None:
    rows = [f"{n / 7:.4f},{'ab'[n % 2]},{n % 5 > 2}" for n in range(40)]
    (tmp_path / "t.csv").write_text("\n".join(["x,kind,late", *rows]))
    columns = {
        "x": [float(f"{n / 7:.4f}") for n in range(40)],
        "kind": [*"ab"] * 20,
        "late": [n % 5 > 2 for n in range(40)],
    }
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    csv, parquet = (
        TabularDrift(f"t.{end}", "late", examples=10, batch_size=5, root=str(tmp_path))
        for end in ("csv", "parquet")
    )
    for one, other in zip(csv, parquet, strict=True):
        assert torch.equal(one.inputs, other.inputs)
        assert torch.equal(one.targets, other.targets)


def test_what_tabular_drift_refuses(tmp_path: Path) -> None:
    path = str(table(tmp_path, when=pa.array([0] * 8, pa.timestamp("s"))))
    few = {"examples": 4, "batch_size": 2}
    with pytest.raises(FileNotFoundError, match=rf"none at {tmp_path}/none.csv; .*CLAGRANGE_DATA"):
        TabularDrift("none.csv", "price", root=str(tmp_path))
    with pytest.raises(ValueError, match=r"target: expected columns .*; got 'prise'; did you mean 'price'"):
        TabularDrift(path, "prise", **few)
    with pytest.raises(ValueError, match=r"column 'when' .*timestamp.*name the columns to use"):
        TabularDrift(path, "price", **few)
    with pytest.raises(ValueError, match=r"numeric: expected numbers in 'day'"):
        TabularDrift(path, "price", numeric=["day"], **few)
    with pytest.raises(ValueError, match="numeric: expected other columns than the target"):
        TabularDrift(path, "price", numeric=["price"], **few)
    with pytest.raises(ValueError, match="tasks: expected at most 2 tasks of 4 of the 8 rows"):
        TabularDrift(path, "price", numeric=["load"], tasks=3, **few)
    with pytest.raises(ValueError, match=r"target: 'load' of .* lacks 1 values"):
        TabularDrift(path, "load", numeric=["price"], **few)
