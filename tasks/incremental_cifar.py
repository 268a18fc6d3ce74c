"""CIFAR-100 with new classes from time to time, while the old ones stay."""

import functools

import torch
from torch import Tensor

from clagrange._checks import check_count
from clagrange.tasks.base import Preset, Task
from clagrange.tasks.images import ImageStream
from clagrange.tasks.transforms import Standardization, crop_and_flip


class IncrementalCIFAR(ImageStream):
    """Task n shows the images of the first (n + 1)·classes_per_task classes: nothing is taken away.

    Tasks grow; only the outputs of the classes so far take part. Channels have mean 0 and deviation 1 over the
    training set. Training images are flipped, shifted and turned at random, anew in each epoch
    (`clagrange.tasks.transforms.crop_and_flip`), test images never.

    Args:
        source: name of a set such as "cifar100", an .npz archive, or a folder of class folders; see
            `clagrange.tasks.sources.load_images`.
        tasks: number of tasks.
        classes_per_task: classes that each task adds; which, is drawn at random.
        examples_per_class: training images of each class.
        batch_size: examples of a batch.
        epochs: passes over each task.
        augment: whether training images are changed at random.
        pool: side of the squares of pixels that are averaged into one.
        root: folder of the data; default: the environment variable CLAGRANGE_DATA, else ``data``.
        download: fetch a named set when it is missing.
        seed: of the order of classes and examples, and of augmentation.

    Source: Dohare et al. (2024), class-incremental CIFAR-100.

    Example:
        >>> stream = IncrementalCIFAR("digits", tasks=2, examples_per_class=20, batch_size=10, epochs=1)
        >>> [len(task.targets) for task in stream], stream.task(1).classes
        ([100, 200], tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 9]))
    """

    PRESETS = {
        "dohare": Preset(
            source="Dohare et al. (2024), +5 classes per 200 epochs; 50 of 500 images of a class left out",
            stream={
                "source": "cifar100",
                "tasks": 20,
                "classes_per_task": 5,
                "examples_per_class": 450,
                "batch_size": 90,
                "epochs": 200,
                "augment": True,
            },
            network={"kind": "resnet18", "norm": "batch"},
            optimizer={
                "kind": "sgd",
                "lr": 0.1,
                "momentum": 0.9,
                "weight_decay": 5e-4,
                "lr_factor": 0.2,
                "lr_epochs": (60, 120, 160),
            },
            at_switch="weights of the epoch that was best on validation images reloaded",
        ),
        "small": Preset(
            source="a plasticity study within some minutes, on 16×16 pixels",
            stream={
                "source": "tinyimagenet32_100c.npz",
                "tasks": 8,
                "classes_per_task": 5,
                "examples_per_class": 100,
                "batch_size": 50,
                "epochs": 10,
                "augment": False,
                "pool": 2,
            },
            network={"kind": "mlp", "hidden": [100, 100]},
            optimizer={"kind": "sgd", "lr": 0.03},
        ),
    }

    equally_hard = False

    def __init__(
        self,
        source: str = "cifar100",
        tasks: int = 20,
        classes_per_task: int = 5,
        examples_per_class: int = 450,
        batch_size: int = 90,
        epochs: int = 200,
        augment: bool = True,
        pool: int = 1,
        root: str | None = None,
        download: bool = False,
        seed: int = 0,
    ) -> None:
        check_count("classes_per_task", classes_per_task)
        check_count("examples_per_class", examples_per_class)
        examples = classes_per_task * examples_per_class
        super().__init__(source, tasks, examples, batch_size, epochs, pool, root, download, seed)
        if tasks * classes_per_task > self.classes:
            raise ValueError(
                f"tasks: expected at most {self.classes // classes_per_task} tasks that add {classes_per_task} "
                f"of the {self.classes} classes of {source}, got {tasks}"
            )
        rarest = min(len(places) for places in self.images.of_class)
        if examples_per_class > rarest:
            raise ValueError(
                f"examples_per_class: expected at most the {rarest} training images that {source} has of its "
                f"rarest class, got {examples_per_class}"
            )
        self.classes_per_task = classes_per_task
        self.examples_per_class = examples_per_class
        self.augment = augment
        self.class_names = self.images.names

    def examples_of(self, number: int) -> int:
        """Number of training images of a task: those of all classes so far."""
        return (number + 1) * self.examples

    def task(self, number: int) -> Task:
        """Images of the classes so far."""
        self._check(number)
        images = self.images
        order = torch.from_numpy(self.random("classes").permutation(self.classes))
        seen = order[: (number + 1) * self.classes_per_task]
        rows = torch.cat([images.of_class[label][: self.examples_per_class] for label in seen])
        test_rows = torch.cat([images.test_of_class[label] for label in seen])
        standardize, classes = Standardization(*images.moments), seen.sort().values
        return Task(
            images.inputs,
            images.targets[rows],
            rows=rows,
            transform=standardize,
            augmentation=functools.partial(self._augment, number) if self.augment else None,
            classes=classes,
            test=images.test(test_rows, transform=standardize, classes=classes),
        )

    def _augment(self, number: int, inputs: Tensor, places: Tensor, epoch: int) -> Tensor:
        """Each image changed by its own draws of the epoch, whatever batch it is in."""
        draws = self.random("augmentation", number, epoch).random((self.examples_of(number), 4), dtype="float32")
        return crop_and_flip(inputs, torch.from_numpy(draws).to(inputs.device)[places])
