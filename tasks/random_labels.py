"""Images whose labels are drawn at random, anew in every task: pure memorisation."""

import torch

from clagrange.tasks.base import Preset, Task
from clagrange.tasks.images import ImageStream


class RandomLabels(ImageStream):
    """Each task gives the same images new labels, uniform over the classes, for many epochs.

    There is nothing to generalise, and so no test.

    Args:
        source: name of a set such as "mnist", an .npz archive, or a folder of class folders; see
            `clagrange.tasks.sources.load_images`.
        tasks: number of tasks.
        examples: number of images; the same in all tasks.
        batch_size: examples of a batch.
        epochs: passes over each task.
        pool: side of the squares of pixels that are averaged into one.
        root: folder of the data; default: the environment variable CLAGRANGE_DATA, else ``data``.
        download: fetch a named set when it is missing.
        seed: of images, labels and order.

    Source: Lyle et al. (2023), Kumar et al. (2023).

    Example:
        >>> stream = RandomLabels(tasks=2)
        >>> bool((stream.task(0).inputs == stream.task(1).inputs).all())
        True
    """

    PRESETS = {
        "l2_init_mnist": Preset(
            source="Kumar et al. (2023), random-label MNIST: 30,000 steps a task",
            stream={"source": "mnist", "tasks": 50, "examples": 1_200, "batch_size": 16, "epochs": 400},
            network={"kind": "mlp", "hidden": [100, 100]},
            optimizer={"kind": ("sgd", "adam"), "lr": {"sgd": (0.01, 0.001), "adam": (1e-3, 1e-4)}},
        ),
        "l2_init_cifar10": Preset(
            source="Kumar et al. (2023), random-label CIFAR-10: 30,000 steps a task",
            stream={"source": "cifar10", "tasks": 50, "examples": 1_200, "batch_size": 16, "epochs": 400},
            network={"kind": "mlp", "hidden": [100, 100]},
            optimizer={"kind": ("sgd", "adam"), "lr": {"sgd": (0.01, 0.001), "adam": (1e-3, 1e-4)}},
        ),
        "small": Preset(
            source="a plasticity study within a few minutes",
            stream={"source": "mnist", "tasks": 10, "examples": 400, "batch_size": 16, "epochs": 40, "pool": 2},
            network={"kind": "mlp", "hidden": [64, 64]},
            optimizer={"kind": "adam", "lr": 0.002},
        ),
    }

    def __init__(
        self,
        source: str = "digits",
        tasks: int = 10,
        examples: int = 400,
        batch_size: int = 16,
        epochs: int = 40,
        pool: int = 1,
        root: str | None = None,
        download: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(source, tasks, examples, batch_size, epochs, pool, root, download, seed)
        self._check_examples()

    def task(self, number: int) -> Task:
        """The images with the labels of one task."""
        self._check(number)
        labels = self.random("labels", number).integers(self.classes, size=self.examples)
        return Task(self.images.inputs, torch.from_numpy(labels), rows=self._subset())
