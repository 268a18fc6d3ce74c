"""Labelled images whose labels are permuted anew in every task."""

import torch

from clagrange.tasks.base import Preset, Task
from clagrange.tasks.images import ImageStream


class LabelPermuted(ImageStream):
    """Each task shows a random subset of the images, with one new permutation of the class numbers.

    What the features of earlier tasks know stays right; only their meaning changes.

    Args:
        source: name of a set such as "emnist", an .npz archive, or a folder of class folders; see
            `clagrange.tasks.sources.load_images`.
        tasks: number of tasks.
        examples: of each task.
        batch_size: examples of a batch.
        epochs: passes over each task.
        pool: side of the squares of pixels that are averaged into one.
        root: folder of the data; default: the environment variable CLAGRANGE_DATA, else ``data``.
        download: fetch a named set when it is missing.
        seed: of permutations, subsets and order.

    Source: Elsayed and Mahmood (2024).

    Example:
        >>> stream = LabelPermuted(tasks=2, examples=1000)
        >>> stream.task(1).inputs.shape
        torch.Size([1000, 1, 8, 8])
    """

    PRESETS = {
        "upgd": Preset(
            source="Elsayed and Mahmood (2024), label-permuted EMNIST: 10⁶ examples, new labels every 2,500; the "
            "optimizer is that of their repository's statistics_output_permuted_emnist.py",
            stream={"source": "emnist", "tasks": 400, "examples": 2_500, "batch_size": 1, "epochs": 1},
            network={"kind": "mlp", "hidden": [300, 150]},
            optimizer={"kind": "upgd", "lr": 0.01, "noise": 0.001, "utility_decay": 0.9, "weight_decay": 0.0},
        ),
        "small": Preset(
            source="a plasticity study within a minute",
            stream={"source": "digits", "tasks": 40, "examples": 1_400, "batch_size": 8, "epochs": 1},
            network={"kind": "mlp", "hidden": [64, 64]},
            optimizer={"kind": "adam", "lr": 0.003},
        ),
    }

    def __init__(
        self,
        source: str = "digits",
        tasks: int = 40,
        examples: int = 1_400,
        batch_size: int = 8,
        epochs: int = 1,
        pool: int = 1,
        root: str | None = None,
        download: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(source, tasks, examples, batch_size, epochs, pool, root, download, seed)
        self._check_examples()

    def task(self, number: int) -> Task:
        """Images and permuted labels of one task; the test images have the same permutation."""
        self._check(number)
        images = self.images
        permutation = torch.from_numpy(self.random("labels", number).permutation(self.classes))
        rows = self._subset(number)
        test = images.test(targets=permutation[images.test_targets])
        return Task(images.inputs, permutation[images.targets[rows]], rows=rows, test=test)
