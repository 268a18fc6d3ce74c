"""CIFAR-100 in tasks that are hard and easy by turns."""

import torch

from clagrange.tasks.base import Preset, Task
from clagrange.tasks.images import ImageStream

HARD, EASY = 5, 1
"""Classes of a hard and of an easy task."""


class FivePlusOneCIFAR(ImageStream):
    """Tasks 0, 2, 4, … show five classes, tasks 1, 3, 5, … a single one; no class is shown twice.

    All outputs take part in every task. All tasks have the same length: an easy task repeats the images of its
    class. A network that is left with an easy task unlearns to tell classes apart.

    Args:
        source: name of a set such as "cifar100", an .npz archive, or a folder of class folders; see
            `clagrange.tasks.sources.load_images`.
        tasks: number of tasks.
        examples: of each task, a multiple of five.
        batch_size: examples of a batch.
        epochs: passes over each task.
        pool: side of the squares of pixels that are averaged into one.
        root: folder of the data; default: the environment variable CLAGRANGE_DATA, else ``data``.
        download: fetch a named set when it is missing.
        seed: of the order of classes and examples.

    Source: Kumar et al. (2023), 5+1 CIFAR.

    Example:
        >>> stream = FivePlusOneCIFAR("digits", tasks=2, examples=100, batch_size=10)
        >>> [len(task.targets.unique()) for task in stream]
        [5, 1]
    """

    PRESETS = {
        "l2_init": Preset(
            source="Kumar et al. (2023), 5+1 CIFAR: 780 steps a task",
            stream={"source": "cifar100", "tasks": 30, "examples": 2_500, "batch_size": 32, "epochs": 10},
            network={"kind": "mlp", "hidden": [100, 100]},
            optimizer={"kind": ("sgd", "adam"), "lr": {"sgd": (0.01, 0.001), "adam": (1e-3, 1e-4)}},
        ),
        "small": Preset(
            source="a plasticity study within a few minutes, on 16×16 pixels",
            stream={
                "source": "tinyimagenet32_100c.npz",
                "tasks": 30,
                "examples": 1_000,
                "batch_size": 20,
                "epochs": 3,
                "pool": 2,
            },
            network={"kind": "mlp", "hidden": [64, 64]},
            optimizer={"kind": "adam", "lr": 0.001},
        ),
    }

    equally_hard = False

    def __init__(
        self,
        source: str = "cifar100",
        tasks: int = 30,
        examples: int = 2_500,
        batch_size: int = 32,
        epochs: int = 10,
        pool: int = 1,
        root: str | None = None,
        download: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(source, tasks, examples, batch_size, epochs, pool, root, download, seed)
        most = 2 * (self.classes // (HARD + EASY)) + (self.classes % (HARD + EASY) >= HARD)
        if tasks > most:
            raise ValueError(
                f"tasks: expected at most {most} tasks of {HARD} and {EASY} of the {self.classes} classes of "
                f"{source}, got {tasks}"
            )
        rarest = min(len(places) for places in self.images.of_class)
        if examples % HARD or examples > HARD * rarest:
            raise ValueError(f"examples: expected a multiple of {HARD}, at most {HARD * rarest}, got {examples}")
        self.class_names = self.images.names

    def task(self, number: int) -> Task:
        """Images of the classes of one task."""
        self._check(number)
        images = self.images
        order = torch.from_numpy(self.random("classes").permutation(self.classes))
        round_, easy = divmod(number, 2)
        first = round_ * (HARD + EASY) + (HARD if easy else 0)
        chosen = order[first : first + (EASY if easy else HARD)]
        each = self.examples // HARD
        rows = torch.cat([images.of_class[label][:each] for label in chosen])
        rows = rows.repeat(self.examples // len(rows))
        test_rows = torch.cat([images.test_of_class[label] for label in chosen])
        return Task(images.inputs, images.targets[rows], rows=rows, test=images.test(test_rows))
