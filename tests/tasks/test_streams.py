"""Streams: the same for the same seed, any task without those before it, and clear refusals."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from clagrange.tasks import PermutedDigits, PermutedImages, PermutedMNIST, RandomLabelDigits, Task, TaskStream
from clagrange.tasks.digits import digits

SMALL = {"tasks": 5, "examples": 90, "batch_size": 8, "seed": 3}
each = pytest.mark.parametrize("form", [PermutedDigits, RandomLabelDigits], ids=lambda form: form.__name__)


def same(one: Task, other: Task) -> bool:
    return torch.equal(one.inputs, other.inputs) and torch.equal(one.targets, other.targets)


def mnist_root() -> str:
    """The folder that holds MNIST/raw, or a skip."""
    root = os.environ.get("CLAGRANGE_DATA")
    if not root or not Path(root, "MNIST", "raw").is_dir():
        pytest.skip("needs MNIST's files: set CLAGRANGE_DATA to the folder that holds MNIST/raw")
    return root


@each
def test_types_shapes_and_ranges(form: type[TaskStream]) -> None:
    stream = form(**SMALL)
    assert len(stream) == 5
    for task in stream:
        assert task.inputs.shape == (90, *stream.input_shape)
        assert task.inputs.dtype == torch.float32
        assert task.targets.dtype == torch.int64
        assert 0 <= task.inputs.min() < task.inputs.max() == 1
        assert set(task.targets.tolist()) == set(range(stream.classes))


@each
def test_same_seed_same_stream_other_seed_another(form: type[TaskStream]) -> None:
    stream, again, other = form(**SMALL), form(**SMALL), form(**{**SMALL, "seed": 4})
    for number in range(5):
        assert same(stream.task(number), again.task(number))
        assert not same(stream.task(number), other.task(number))
        assert torch.equal(stream.order(number, 0), again.order(number, 0))
        assert not torch.equal(stream.order(number, 0), other.order(number, 0))


@each
def test_tasks_differ(form: type[TaskStream]) -> None:
    tasks = list(form(**SMALL))
    assert not any(same(tasks[i], tasks[j]) for i in range(5) for j in range(i))


@each
def test_random_access_equals_iteration(form: type[TaskStream]) -> None:
    iterated = list(form(**SMALL))
    for number in (4, 0, 2, 4):
        assert same(form(**SMALL).task(number), iterated[number])


@each
def test_a_longer_stream_begins_like_a_shorter_one(form: type[TaskStream]) -> None:
    assert same(form(**SMALL).task(4), form(**{**SMALL, "tasks": 50, "epochs": 7, "batch_size": 3}).task(4))


@each
def test_global_random_streams_play_no_part(form: type[TaskStream]) -> None:
    first = form(**SMALL).task(1)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert same(form(**SMALL).task(1), first)
    assert torch.equal(torch.get_rng_state(), state)


@each
def test_order_shows_every_example_once_in_an_epoch(form: type[TaskStream]) -> None:
    stream = form(**SMALL)
    for number in range(5):
        order = stream.order(number, 0)
        assert order.shape == (stream.steps, 8) == (11, 8)
        assert len(set(order.flatten().tolist())) == 88
        assert 0 <= order.min() <= order.max() < 90
    whole = form(**{**SMALL, "batch_size": 9})
    assert sorted(whole.order(0, 0).flatten().tolist()) == list(range(90))


@each
def test_orders_differ_between_epochs_and_tasks(form: type[TaskStream]) -> None:
    stream = form(**SMALL)
    orders = [stream.order(number, epoch) for number in range(3) for epoch in range(3)]
    assert not any(torch.equal(orders[i], orders[j]) for i in range(9) for j in range(i))


def test_permuted_digits_shows_real_digits_under_one_permutation() -> None:
    """Sorting the pixels undoes any permutation: every example is one of the 1,797 digits, with its label."""
    images, labels = digits()
    assert images.shape == (1797, 64)
    known = {tuple(image.sort().values.tolist()): int(label) for image, label in zip(images, labels, strict=True)}
    stream = PermutedDigits(**SMALL)
    for task in stream:
        found = [known[tuple(image.sort().values.tolist())] for image in task.inputs]
        assert found == task.targets.tolist()
    # one permutation for all examples: each pixel keeps its mean over all digits, in another place
    full = PermutedDigits(tasks=2, examples=1797, batch_size=1)
    for task in full:
        columns = sorted(
            tuple(column) for column in task.inputs[task.inputs.sum(1).argsort(stable=True)].sum(0, True)
        )
        assert columns[0] is not None
        assert torch.equal(task.inputs.sum(0).sort().values, images.sum(0).sort().values)
    assert not torch.equal(full.task(0).inputs.sum(0), full.task(1).inputs.sum(0))


def test_random_label_digits_keeps_the_images_and_redraws_the_labels() -> None:
    tasks = list(RandomLabelDigits(tasks=4, examples=500, batch_size=5))
    for task in tasks[1:]:
        assert torch.equal(task.inputs, tasks[0].inputs)
        agreement = (task.targets == tasks[0].targets).float().mean()
        assert abs(float(agreement) - 0.1) < 4 * (0.09 / 500) ** 0.5
    counts = torch.bincount(torch.cat([task.targets for task in tasks]), minlength=10)
    assert ((counts - 200).abs() < 5 * (2000 * 0.09) ** 0.5).all()


def test_defaults() -> None:
    assert len(PermutedDigits()) == 100
    assert PermutedDigits().steps == 400
    assert RandomLabelDigits().epochs == 40
    assert RandomLabelDigits().steps == 25


@each
@pytest.mark.parametrize("name", ["tasks", "examples", "batch_size", "epochs"])
@pytest.mark.parametrize("bad", [0, -1, 2.0, "4", True, None])
def test_bad_counts_are_named(form: type[TaskStream], name: str, bad: object) -> None:
    with pytest.raises(ValueError, match=rf"{name}: expected a whole number of at least 1, got {bad!r}"):
        form(**{**SMALL, name: bad})


@each
@pytest.mark.parametrize("bad", [-1, 1.5, True, "0"])
def test_bad_seeds_are_named(form: type[TaskStream], bad: object) -> None:
    with pytest.raises(ValueError, match=rf"seed: expected a whole number of at least 0, got {bad!r}"):
        form(**{**SMALL, "seed": bad})


@each
def test_too_many_examples_or_too_large_batches_are_refused(form: type[TaskStream]) -> None:
    with pytest.raises(ValueError, match="examples: expected at most the 1797 digits that there are, got 1798"):
        form(tasks=1, examples=1798)
    with pytest.raises(ValueError, match="batch_size: expected at most the 20 examples of a task, got 21"):
        form(tasks=1, examples=20, batch_size=21)


@each
@pytest.mark.parametrize("number", [5, -1, 99])
def test_tasks_out_of_range_are_refused(form: type[TaskStream], number: int) -> None:
    stream = form(**SMALL)
    with pytest.raises(IndexError, match=rf"number: expected a task from 0 to 4, got {number}"):
        stream.task(number)
    with pytest.raises(IndexError, match="number: expected a task from 0 to 4"):
        stream.order(number, 0)


# ------------------------------------------------------------------------------------------------- MNIST
def test_missing_mnist_says_where_it_was_looked_for_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remedy = r"set download=True, or set CLAGRANGE_DATA"
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path}/here/MNIST/raw; {remedy}"):
        PermutedMNIST(root=str(tmp_path / "here"))
    monkeypatch.setenv("CLAGRANGE_DATA", str(tmp_path / "there"))
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path}/there/MNIST/raw; {remedy}"):
        PermutedMNIST()
    monkeypatch.delenv("CLAGRANGE_DATA")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path}/data/MNIST/raw; {remedy}"):
        PermutedMNIST()


def test_more_images_than_there_are_is_refused_before_the_files_are_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="examples: expected at most the 60000 images that there are, got 60001"):
        PermutedMNIST(examples=60_001, root=str(tmp_path))


def test_permuted_mnist() -> None:
    root = mnist_root()
    stream = PermutedMNIST(tasks=3, examples=200, root=root, seed=1)
    tasks = list(stream)
    assert len(stream) == 3
    assert stream.steps == 12
    for task in tasks:
        assert task.inputs.shape == (200, 784)
        assert task.inputs.dtype == torch.float32
        assert 0 <= task.inputs.min() < task.inputs.max() == 1
        # the same first images in the same order, under one permutation for all of them
        assert torch.equal(task.targets, tasks[0].targets)
        torch.testing.assert_close(task.inputs.sort(1).values, tasks[0].inputs.sort(1).values, rtol=0, atol=0)
        torch.testing.assert_close(task.inputs.mean(0).sort().values, tasks[0].inputs.mean(0).sort().values)
    assert tasks[0].targets[:5].tolist() == [5, 0, 4, 1, 9]
    assert not torch.equal(tasks[0].inputs, tasks[1].inputs)
    assert same(PermutedMNIST(tasks=3, examples=200, root=root, seed=1).task(2), tasks[2])
    assert not same(PermutedMNIST(tasks=3, examples=200, root=root, seed=2).task(2), tasks[2])


# ---------------------------------------------------------------------------------------- images of a file
def archive(folder: Path, **changes: object) -> str:
    generator = np.random.default_rng(0)
    arrays = {
        "x_train": generator.integers(0, 256, (30, 3, 4, 4), dtype=np.uint8),
        "y_train": generator.integers(0, 5, 30),
        **changes,
    }
    np.savez(folder / "images.npz", **{name: array for name, array in arrays.items() if array is not None})
    return "images.npz"


def test_permuted_images_of_an_archive(tmp_path: Path) -> None:
    file = archive(tmp_path)
    stream = PermutedImages(file, tasks=3, examples=20, batch_size=4, pool=2, root=str(tmp_path), seed=1)
    assert (stream.input_shape, stream.classes, stream.steps) == ((12,), 5, 5)
    with np.load(tmp_path / file) as arrays:
        chosen = np.random.default_rng(0).permutation(30)[:20]
        squares = arrays["x_train"][chosen].reshape(20, 3, 2, 2, 2, 2).mean((3, 5)).reshape(20, 12) / 255.0
        targets = arrays["y_train"][chosen]
    tasks = list(stream)
    for task in tasks:
        assert task.targets.tolist() == targets.tolist()
        np.testing.assert_allclose(np.sort(task.inputs, 1), np.sort(squares, 1), rtol=1e-6)
    assert not torch.equal(tasks[0].inputs, tasks[1].inputs)
    again = PermutedImages(file, tasks=3, examples=20, batch_size=4, pool=2, root=str(tmp_path), seed=1)
    assert same(again.task(2), tasks[2])


def test_what_permuted_images_refuses(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"file: .*none at {tmp_path}/none.npz; .*CLAGRANGE_DATA"):
        PermutedImages("none.npz", root=str(tmp_path))
    with pytest.raises(ValueError, match=r"examples: expected at most the 30 images of images\.npz, got 31"):
        PermutedImages(archive(tmp_path), examples=31, root=str(tmp_path))
    for number, changes in enumerate(({"y_train": None}, {"x_train": np.zeros((30, 4, 4), dtype=np.uint8)})):
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.raises(ValueError, match=r"file: expected .*x_train"):
            PermutedImages(archive(folder, **changes), examples=20, root=str(folder))
