"""Sets of labelled images, by name: read once, checked, and held in memory as uint8.

A source is the name of a set in `SETS`, which torchvision reads and fetches on request; an .npz archive; or a
folder with one folder of images for each class.
"""

import functools
import hashlib
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from clagrange._checks import check_count, did_you_mean, one_line
from clagrange.tasks.base import Task
from clagrange.tasks.digits import digits

DIGITS_FOR_TEST = 360
"""Of scikit-learn's 1,797 digits, which have no test set of their own."""

SUMS = {
    "MNIST/raw/train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "MNIST/raw/train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "MNIST/raw/t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "MNIST/raw/t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
"""SHA-256 of the files that torchvision unpacks and does not check again."""


@dataclass(frozen=True, eq=False)
class Images:
    """Labelled images; training and test images are apart.

    Args:
        inputs: of the training images (images, channels, height, width), uint8, or float from 0 to 1.
        targets: their classes, (images,), int64 from 0.
        test_inputs: of the test images; none where the source has no test set.
        test_targets: their classes.
        names: of the classes, where they are known.
    """

    inputs: Tensor
    targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor
    names: tuple[str, ...] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Channels, height and width of an image."""
        return tuple(self.inputs.shape[1:])

    @property
    def classes(self) -> int:
        """Number of classes."""
        return int(self.targets.max()) + 1

    @functools.cached_property
    def of_class(self) -> tuple[Tensor, ...]:
        """Places of the training images of each class, in a fixed order of no meaning."""
        return _by_class(self.targets, self.classes)

    @functools.cached_property
    def test_of_class(self) -> tuple[Tensor, ...]:
        """Places of the test images of each class."""
        return _by_class(self.test_targets, self.classes)

    def test(self, rows: Tensor | None = None, *, targets: Tensor | None = None, **view: Any) -> Task | None:
        """The test images, or some of them, as a task; None where there are none.

        Args:
            rows: which of them; default: all.
            targets: instead of the source's own.
            view: what else `clagrange.tasks.Task` takes.
        """
        if not len(self.test_targets):
            return None
        if targets is None:
            targets = self.test_targets if rows is None else self.test_targets[rows]
        return Task(self.test_inputs, targets, rows=rows, **view)

    @functools.cached_property
    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel over all training images, as inputs from 0 to 1."""
        by_channel = self.inputs.transpose(0, 1).flatten(1)
        if self.inputs.dtype == torch.uint8:
            counts = torch.stack([torch.bincount(channel, minlength=256) for channel in by_channel]).double()
            share, values = counts / counts.sum(1, keepdim=True), torch.arange(256).double() / 255.0
            mean = share @ values
            deviation = (share @ values.square() - mean.square()).clamp(min=0.0).sqrt()
        else:
            mean, deviation = by_channel.double().mean(1), by_channel.double().std(1, correction=0)
        return mean.float(), deviation.float()


def _by_class(targets: Tensor, classes: int) -> tuple[Tensor, ...]:
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(targets)))
    grouped = order[targets[order].argsort(stable=True)]
    return tuple(grouped.split(torch.bincount(targets, minlength=classes).tolist()))


def load_images(source: str, folder: Path, *, download: bool = False, pool: int = 1) -> Images:
    """The images of a source, read once.

    Args:
        source: a name in `SETS`; or an .npz archive with ``x_train`` (images, channels, height, width) of uint8
            and ``y_train`` (images,) of whole numbers from 0, and, where there is a test set, ``x_test`` and
            ``y_test``, and ``names`` of the classes; or a folder of class folders, or with such trees in its
            folders ``train`` and ``val`` (or ``test``). Archive and folder lie in ``folder`` unless their path is
            absolute. MNIST and CIFAR are checked against published checksums, archives and the files of all
            named sets against ``FILE.sha256`` beside them, where there is one.
        folder: where the data are.
        download: fetch a set of `SETS` through torchvision when it is missing.
        pool: side of the squares of pixels that are averaged into one.

    Raises:
        FileNotFoundError: when it is missing; says what was looked for, where, and how to get it.
        ValueError: for an unknown name, or a damaged file, which is named.

    Example:
        >>> load_images("digits", Path()).inputs.shape
        torch.Size([1437, 1, 8, 8])
    """
    check_count("pool", pool)
    if (source, folder) not in _LOADED:
        _LOADED[source, folder] = _load(source, folder, download)
    images = _LOADED[source, folder]
    return images if pool == 1 else _pooled(images, pool)


_LOADED: dict[tuple[str, Path], Images] = {}
"""What was read, by source and folder."""


def _load(source: str, folder: Path, download: bool) -> Images:
    path = folder / source
    if source in SETS:
        return SETS[source](folder, download)
    if path.suffix == ".npz":
        return read_archive(path)
    if path.is_dir():
        return read_folder(path)
    raise FileNotFoundError(
        f"source: expected one of {', '.join(SETS)}, an .npz archive or a folder of class folders; found no "
        f"folder at {path.resolve()}{did_you_mean(source, SETS)}; give its path, or the folder it is in as root= "
        f"or in the environment variable CLAGRANGE_DATA"
    )


@functools.cache
def _pooled(images: Images, pool: int) -> Images:
    if pool > min(images.shape[1:]):
        raise ValueError(f"pool: expected at most the sides of images {images.shape}, got {pool}")

    def smaller(inputs: Tensor) -> Tensor:
        scale = 255.0 if inputs.dtype == torch.uint8 else 1.0
        return avg_pool2d(inputs.float().div_(scale), pool)

    return Images(
        smaller(images.inputs),
        images.targets,
        smaller(images.test_inputs),
        images.test_targets,
        images.names,
    )


# ----------------------------------------------------------------------------------------------- named sets
def _digits(folder: Path, download: bool) -> Images:
    """scikit-learn's digits, 360 of them, chosen once for all, as test set."""
    inputs, targets = digits()
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(targets)))
    test, train = order[:DIGITS_FOR_TEST], order[DIGITS_FOR_TEST:]
    square = inputs.view(-1, 1, 8, 8)
    return Images(square[train], targets[train], square[test], targets[test], tuple(map(str, range(10))))


def _torchvision(name: str, files: str, **settings: Any) -> Callable[[Path, bool], Images]:
    """What reads one of torchvision's sets, whose files are under a folder of that name."""

    def read(folder: Path, download: bool) -> Images:
        import torchvision.datasets

        where = folder / files
        kind = getattr(torchvision.datasets, name)
        try:
            train = kind(folder, train=True, download=download, **settings)
            _check_sums(folder, where)
            test = kind(folder, train=False, **settings)
        except (RuntimeError, AssertionError, ValueError, OSError) as error:
            if where.is_dir() and any(where.iterdir()):
                raise ValueError(_damaged(name, where, error)) from error
            raise FileNotFoundError(
                f"{name}'s files are not in {where.resolve()}; set download=True, or set CLAGRANGE_DATA (or "
                f"root) to the folder that holds {files}"
            ) from error
        names = tuple(str(label).partition(" - ")[0] for label in train.classes)  # MNIST says "5 - five"
        inputs = [_channels_first(data.data, upright=name == "EMNIST") for data in (train, test)]
        targets = [torch.as_tensor(data.targets).long() for data in (train, test)]
        return Images(inputs[0], targets[0], inputs[1], targets[1], names)

    return read


def _check_sums(folder: Path, where: Path) -> None:
    for file, expected in SUMS.items():
        path = folder / file
        if path.parent == where and hashlib.sha256(path.read_bytes()).hexdigest() != expected:
            raise ValueError(f"SHA-256 of {path.name} is not that of the published file")
    for beside in sorted(where.glob("*.sha256")):
        check_sum_beside(beside.with_suffix(""))


def _damaged(what: str, where: Path, error: Exception) -> str:
    said = one_line(error) or type(error).__name__
    return (
        f"{what}'s files in {where.resolve()} are incomplete, truncated or altered ({said}); remove them and set "
        f"download=True"
    )


def _channels_first(data: Any, *, upright: bool) -> Tensor:
    """torchvision's arrays (images, height, width) or (images, height, width, channels) as ours."""
    inputs = torch.as_tensor(data)
    if inputs.dim() == 4:
        return inputs.permute(0, 3, 1, 2).contiguous()
    return (inputs.mT.contiguous() if upright else inputs)[:, None]


SETS: dict[str, Callable[[Path, bool], Images]] = {
    "digits": _digits,
    "mnist": _torchvision("MNIST", "MNIST/raw"),
    "fashion_mnist": _torchvision("FashionMNIST", "FashionMNIST/raw"),
    "kmnist": _torchvision("KMNIST", "KMNIST/raw"),
    "emnist": _torchvision("EMNIST", "EMNIST/raw", split="balanced"),
    "cifar10": _torchvision("CIFAR10", "cifar-10-batches-py"),
    "cifar100": _torchvision("CIFAR100", "cifar-100-python"),
}
"""The sets that have a name: "digits" are scikit-learn's and need no files, "emnist" has 47 balanced classes."""


# --------------------------------------------------------------------------------------- archives and folders
def read_archive(file: Path) -> Images:
    """The images of an .npz archive, whose own checksums (CRC-32) are checked, and see `check_sum_beside`.

    Raises:
        FileNotFoundError: when the file is missing; says where it was looked for.
        ValueError: when it is damaged or no such archive.
    """
    if not file.is_file():
        raise FileNotFoundError(
            f"file: expected an .npz archive of images, found none at {file.resolve()}; give its path, or its "
            f"folder as root= or in the environment variable CLAGRANGE_DATA"
        )
    check_sum_beside(file)
    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as archive:
            inputs, targets = _images_of(archive, "x_train", "y_train")
            test_inputs, test_targets = inputs[:0], targets[:0]
            if "x_test" in archive:
                test_inputs, test_targets = _images_of(archive, "x_test", "y_test")
            names = tuple(str(name) for name in archive["names"]) if "names" in archive else None
    except (KeyError, ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"file: expected an .npz archive with x_train and y_train, got {file}, which is truncated, altered "
            f"or no such archive ({error})"
        ) from error
    return Images(inputs, targets, test_inputs, test_targets, names)


def check_sum_beside(file: Path) -> None:
    """Check a file against ``FILE.sha256`` beside it, as `sha256sum` writes it, where there is one.

    Raises:
        ValueError: when they disagree.
    """
    beside = file.with_name(f"{file.name}.sha256")
    if beside.is_file():
        expected, found = beside.read_text().split()[0].lower(), hashlib.sha256(file.read_bytes()).hexdigest()
        if found != expected:
            raise ValueError(
                f"file: {file} is truncated or altered: its SHA-256 is {found}, not {expected} as in "
                f"{beside.name}"
            )


def _images_of(archive: Any, images: str, labels: str) -> tuple[Tensor, Tensor]:
    inputs, targets = torch.from_numpy(archive[images]), torch.from_numpy(archive[labels])
    if inputs.dim() != 4 or inputs.dtype != torch.uint8 or len(inputs) != len(targets):
        raise ValueError(
            f"{images} is {tuple(inputs.shape)} of {inputs.dtype} and {labels} has {len(targets)} entries, not "
            f"(images, channels, height, width) of uint8 and as many labels"
        )
    return inputs, targets.long()


def read_folder(folder: Path) -> Images:
    """The images of a tree with one folder for each class, all of one size, as colours.

    Raises:
        FileNotFoundError: when a class has no images.
        ValueError: when a file cannot be read or has another size; it is named.
    """
    from torchvision.datasets import ImageFolder
    from torchvision.transforms.functional import pil_to_tensor

    train = folder / "train" if (folder / "train").is_dir() else folder
    test = next((folder / name for name in ("val", "test") if train != folder and (folder / name).is_dir()), None)
    parts: list[tuple[Tensor, Tensor]] = []
    names: list[str] = []
    for tree in (train, test):
        if tree is None:
            parts.append((parts[0][0][:0], parts[0][1][:0]))
            continue
        found = ImageFolder(str(tree))
        if names and found.classes != names:
            raise ValueError(f"source: expected the same class folders in {train} and {tree}")
        names = found.classes
        images: list[Tensor] = []
        for file, _ in found.samples:
            try:
                images.append(pil_to_tensor(found.loader(file)))
            except (OSError, SyntaxError, ValueError) as error:
                raise ValueError(f"source: {file} is truncated, altered or no image ({error})") from error
            if images[-1].shape != images[0].shape:
                raise ValueError(
                    f"source: expected images of one size, as {found.samples[0][0]} of "
                    f"{tuple(images[0].shape[1:])}, got {tuple(images[-1].shape[1:])} in {file}"
                )
        parts.append((torch.stack(images), torch.tensor(found.targets)))
    return Images(*parts[0], *parts[1], tuple(names))
