"""Sources of images: real file formats, written small; what is missing, truncated or altered is named."""

import hashlib
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import clagrange
from clagrange.tasks import ContinualImageNet, LabelPermuted, PermutedMNIST, SplitClasses, TabularDrift, sources
from clagrange.tasks.sources import load_images

import torchvision.datasets  # isort: skip


@pytest.fixture(autouse=True)
def _read_anew() -> None:
    """Tests write several files of one name."""
    sources._LOADED.clear()


# ----------------------------------------------------------------------------------------------------- MNIST
def idx(array: np.ndarray) -> bytes:
    """An array of uint8 in the format of MNIST's files."""
    head = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    return head + array.astype(np.uint8).tobytes()


def write_mnist(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str = "MNIST", prefix: str = "") -> None:
    """30 training and 10 test images as torchvision unpacks them; their checksums instead of the real ones."""
    raw = folder / name / "raw"
    raw.mkdir(parents=True)
    generator = np.random.default_rng(0)
    sums = {}
    for part, count in (("train", 30), ("test" if prefix else "t10k", 10)):
        files = {
            f"{prefix}{part}-images-idx3-ubyte": generator.integers(0, 256, (count, 28, 28)),
            f"{prefix}{part}-labels-idx1-ubyte": np.arange(count) % 10,
        }
        for file, array in files.items():
            (raw / file).write_bytes(idx(array))
            sums[f"{name}/raw/{file}"] = hashlib.sha256(idx(array)).hexdigest()
    monkeypatch.setattr(sources, "SUMS", sums if name == "MNIST" else {})


def test_mnist_files_are_read_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mnist(tmp_path, monkeypatch)
    images = load_images("mnist", tmp_path)
    assert (images.shape, images.classes, images.names) == ((1, 28, 28), 10, tuple("0123456789"))
    expected = np.random.default_rng(0).integers(0, 256, (30, 28, 28))
    assert torch.equal(images.inputs[:, 0], torch.from_numpy(expected).byte())
    assert images.targets.tolist() == [n % 10 for n in range(30)]
    assert images.test_inputs.shape == (10, 1, 28, 28)
    task = PermutedMNIST(tasks=2, examples=20, batch_size=5, root=str(tmp_path)).task(1)
    assert task.test.inputs.shape == (10, 784)
    assert torch.equal(task.data[0], images.inputs[0])


@pytest.mark.parametrize("damage", ["truncated", "altered"])
@pytest.mark.parametrize("part", ["train-images-idx3", "train-labels-idx1", "t10k-images-idx3"])
def test_damaged_mnist_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str, part: str) -> None:
    write_mnist(tmp_path, monkeypatch)
    file = tmp_path / "MNIST" / "raw" / f"{part}-ubyte"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content if damage == "altered" else content[:-5])
    with pytest.raises(ValueError, match=rf"MNIST's files in {tmp_path}/MNIST/raw .*altered .*download=True"):
        PermutedMNIST(examples=20, root=str(tmp_path))


def test_sums_are_those_of_mnist() -> None:
    assert len(sources.SUMS) == 4
    assert sources.SUMS["MNIST/raw/train-images-idx3-ubyte"].startswith("ba891046e6505d7a")


@pytest.mark.parametrize("name", ["FashionMNIST", "KMNIST"])
def test_sets_in_the_format_of_mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    write_mnist(tmp_path, monkeypatch, name)
    source = {"FashionMNIST": "fashion_mnist", "KMNIST": "kmnist"}[name]
    assert load_images(source, tmp_path).inputs.shape == (30, 1, 28, 28)
    file = tmp_path / name / "raw" / "train-images-idx3-ubyte"
    whole = file.read_bytes()
    beside = file.with_name(f"{file.name}.sha256")
    beside.write_text(f"{hashlib.sha256(whole).hexdigest()}  {file.name}\n")
    sources._LOADED.clear()
    load_images(source, tmp_path)
    damaged = rf"{name}'s files in .*{name}/raw are incomplete, truncated or altered"
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    sources._LOADED.clear()
    with pytest.raises(ValueError, match=f"{damaged}.*{file.name}"):
        load_images(source, tmp_path)
    beside.unlink()
    file.write_bytes(whole[:-5])
    with pytest.raises(ValueError, match=damaged):
        load_images(source, tmp_path)


def test_emnist_is_turned_upright(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mnist(tmp_path, monkeypatch, "EMNIST", "emnist-balanced-")
    images = load_images("emnist", tmp_path)
    stored = np.random.default_rng(0).integers(0, 256, (30, 28, 28))
    assert torch.equal(images.inputs[:, 0], torch.from_numpy(stored).byte().mT)
    assert len(images.names) == 47


def test_a_missing_set_says_what_where_and_how(tmp_path: Path) -> None:
    for source, name, files in (
        ("mnist", "MNIST", "MNIST/raw"),
        ("emnist", "EMNIST", "EMNIST/raw"),
        ("cifar10", "CIFAR10", "cifar-10-batches-py"),
        ("cifar100", "CIFAR100", "cifar-100-python"),
    ):
        with pytest.raises(FileNotFoundError) as error:
            load_images(source, tmp_path)
        for part in (f"{name}'s files", f"{tmp_path}/{files}", "download=True", "CLAGRANGE_DATA"):
            assert part in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"expected one of digits, mnist.*did you mean 'cifar10'"):
        load_images("cifar_10", tmp_path)


def test_torchvision_downloads_only_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(self: Any) -> None:
        asked.append(self.root)
        write_mnist(tmp_path, monkeypatch)

    monkeypatch.setattr(torchvision.datasets.MNIST, "download", download)
    with pytest.raises(FileNotFoundError):
        SplitClasses("mnist", root=str(tmp_path))
    assert not asked
    stream = SplitClasses("mnist", root=str(tmp_path), download=True, batch_size=2)
    assert [Path(folder) for folder in asked] == [tmp_path]
    assert stream.examples == 6


# ----------------------------------------------------------------------------------------------------- CIFAR
def write_cifar(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Pickled batches as torchvision unpacks them, of 20 images each, with their checksums."""
    kind = getattr(torchvision.datasets, name)
    base = folder / kind.base_folder
    base.mkdir()
    label = "labels" if name == "CIFAR10" else "fine_labels"
    classes = 10 if name == "CIFAR10" else 100

    def write(file: str, content: Any) -> str:
        (base / file).write_bytes(pickle.dumps(content))
        return hashlib.md5((base / file).read_bytes()).hexdigest()

    generator = np.random.default_rng(0)
    for listing in ("train_list", "test_list"):
        lines = [
            [
                file,
                write(
                    file,
                    {
                        "data": generator.integers(0, 256, (20, 3072), dtype=np.uint8),
                        label: [n % classes for n in range(20)],
                    },
                ),
            ]
            for file, _ in getattr(kind, listing)
        ]
        monkeypatch.setattr(kind, listing, lines)
    names = [f"thing {k}" for k in range(classes)]
    monkeypatch.setattr(
        kind, "meta", {**kind.meta, "md5": write(kind.meta["filename"], {kind.meta["key"]: names})}
    )


@pytest.mark.parametrize(("source", "name", "batches"), [("cifar10", "CIFAR10", 5), ("cifar100", "CIFAR100", 1)])
def test_cifar_batches_are_read_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, name: str, batches: int
) -> None:
    write_cifar(tmp_path, monkeypatch, name)
    images = load_images(source, tmp_path)
    first = np.random.default_rng(0).integers(0, 256, (20, 3072), dtype=np.uint8).reshape(20, 3, 32, 32)
    assert torch.equal(images.inputs[:20], torch.from_numpy(first))
    assert images.inputs.is_contiguous()
    assert (len(images.targets), len(images.test_targets)) == (20 * batches, 20)
    assert images.names[3] == "thing 3"
    kind = getattr(torchvision.datasets, name)
    file = tmp_path / kind.base_folder / kind.train_list[0][0]
    file.write_bytes(file.read_bytes()[:-1])
    sources._LOADED.clear()
    with pytest.raises(ValueError, match=rf"{name}'s files in .*{kind.base_folder} are incomplete, trunc"):
        load_images(source, tmp_path)


# --------------------------------------------------------------------------------------- archives and folders
def test_archives_are_checked(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (40, 1, 8, 8), dtype=np.uint8)
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "set.npz", x_train=images, y_train=np.arange(40) % 4)
        sources._LOADED.clear()
        loaded = load_images("set.npz", tmp_path)
        assert torch.equal(loaded.inputs, torch.from_numpy(images))
        assert loaded.test() is None
        assert loaded.names is None
        whole = (tmp_path / "set.npz").read_bytes()
        altered = bytearray(whole)
        altered[len(whole) // 2] ^= 1
        for content in (whole[:-100], bytes(altered), b"", b"no archive at all"):
            (tmp_path / "set.npz").write_bytes(content)
            sources._LOADED.clear()
            with pytest.raises(ValueError, match=r"set.npz, which is truncated, altered or no such"):
                load_images("set.npz", tmp_path)


@pytest.mark.parametrize("file", ["set.npz", "table.csv"])
def test_a_checksum_beside_a_file_is_held_against_it(tmp_path: Path, file: str) -> None:
    path = tmp_path / file
    read: dict[str, Callable[[], Any]] = {
        "set.npz": lambda: load_images("set.npz", tmp_path),
        "table.csv": lambda: TabularDrift("table.csv", "y", examples=4, batch_size=2, root=str(tmp_path)),
    }
    if file == "set.npz":
        np.savez(path, x_train=np.zeros((4, 1, 4, 4), np.uint8), y_train=np.arange(4))
    else:
        path.write_text("x,y\n" + "1.0,2.0\n" * 8)
    beside = tmp_path / f"{file}.sha256"
    beside.write_text(f"{'0' * 64}  {file}\n")
    with pytest.raises(ValueError, match=rf"{path} is truncated or altered: .*, not 0+ as in {beside.name}"):
        read[file]()
    beside.write_text(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {file}\n")
    assert read[file]()


def write_tree(folder: Path, parts: dict[str, int], classes: int = 3, side: int = 8) -> None:
    """PNG images in class folders; the first channel is the class, the second the number."""
    for part, count in parts.items():
        for label in range(classes):
            (folder / part / f"kind {label}").mkdir(parents=True)
            for number in range(count):
                pixels = np.full((side, side, 3), 50 * (part == "val"), np.uint8)
                pixels[..., 0], pixels[..., 1] = label, number
                Image.fromarray(pixels).save(folder / part / f"kind {label}" / f"{number:03}.png")


@pytest.mark.parametrize("test", ["val", "test", None])
def test_folders_of_class_folders(tmp_path: Path, test: str | None) -> None:
    tree = tmp_path / "tree"
    write_tree(tree, {"": 6} if test is None else {"train": 6, test: 2})
    images = load_images("tree", tmp_path)
    assert images.inputs.shape == (18, 3, 8, 8)
    assert torch.equal(images.inputs[:, 0, 0, 0].long(), images.targets)
    assert images.targets.tolist() == sorted([*range(3)] * 6)
    assert images.names == ("kind 0", "kind 1", "kind 2")
    assert len(images.test_targets) == (0 if test is None else 6)
    settings = {"examples": 8, "test_examples": 4, "batch_size": 4, "root": str(tmp_path)}
    stream = ContinualImageNet("tree", tasks=3, **settings)
    for number, task in enumerate(stream):
        pair = stream.pair(number)
        for part in (task, task.test):
            assert [pair[target] for target in part.targets.tolist()] == part.data[part.rows][:, 0, 0, 0].tolist()


def test_damaged_images_of_a_folder_are_named(tmp_path: Path) -> None:
    write_tree(tmp_path / "tree", {"": 2}, side=40)
    file = tmp_path / "tree" / "kind 1" / "001.png"
    whole = bytearray(file.read_bytes())
    middle = whole.index(b"IDAT") + 10
    altered = bytes(whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :])
    for content in (bytes(whole[:-30]), altered, b"no image"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{file} is truncated, altered or no image"):
            load_images("tree", tmp_path)
    Image.fromarray(np.zeros((6, 6, 3), np.uint8)).save(file)
    with pytest.raises(ValueError, match=r"images of one size, as .* of \(40, 40\), got \(6, 6\)"):
        load_images("tree", tmp_path)


def test_truncated_tables_are_named(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"x": [1.0] * 20, "y": [2.0] * 20}), path)
    path.write_bytes(path.read_bytes()[:-20])
    (tmp_path / "t.csv").write_text("x,y\n1.0,2.0\n1.0")
    for name in ("t.parquet", "t.csv"):
        with pytest.raises(ValueError, match=rf"{tmp_path}/{name} is truncated, altered or no table"):
            TabularDrift(name, "y", examples=2, batch_size=2, root=str(tmp_path))


# ------------------------------------------------------------------------------------------------ shared data
def test_digits_need_no_files_and_are_split_once(tmp_path: Path) -> None:
    images = load_images("digits", tmp_path)
    assert (len(images.targets), len(images.test_targets)) == (1437, 360)
    rows = torch.cat([images.inputs, images.test_inputs]).flatten(1)
    everything = clagrange.tasks.digits.digits()[0]
    assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, everything.tolist()))


def test_pooled_images_are_means_of_squares(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (10, 3, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "set.npz", x_train=images, y_train=np.arange(10) % 2)
    pooled = load_images("set.npz", tmp_path, pool=4)
    expected = images.reshape(10, 3, 2, 4, 2, 4).mean((3, 5)) / 255.0
    np.testing.assert_allclose(pooled.inputs, expected, rtol=1e-6)
    assert load_images("set.npz", tmp_path, pool=4) is pooled
    with pytest.raises(ValueError, match="pool: expected at most the sides of images"):
        load_images("set.npz", tmp_path, pool=9)


def test_streams_share_one_copy_of_the_data_also_on_another_device(tmp_path: Path) -> None:
    np.savez(tmp_path / "set.npz", x_train=np.zeros((40, 1, 4, 4), np.uint8), y_train=np.arange(40) % 4)
    tasks = [
        LabelPermuted("set.npz", tasks=9, examples=20, batch_size=4, root=str(tmp_path), seed=seed).task(7)
        for seed in range(3)
    ]
    assert len({id(task.data) for task in tasks}) == 1
    assert tasks[0].to("cpu") is tasks[0]
    moved = [task.to("meta") for task in tasks]
    assert {task.data.device.type for task in moved} == {"meta"}
    assert len({id(task.data) for task in moved}) == 1
    assert {moved[0].targets.device.type, moved[0].rows.device.type} == {"meta"}


def test_examples_beyond_the_source_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="examples: expected at most the 1437 training images of digits, got 1438"
    ):
        LabelPermuted("digits", examples=1438)
