"""MNIST with the pixels permuted anew in every task."""

import torch

from clagrange.tasks.base import Preset, Task, TaskStream, data_folder
from clagrange.tasks.sources import load_images

IMAGES = 60_000
PIXELS = 784


class PermutedMNIST(TaskStream):
    """Each task shows MNIST's first training images with one new permutation of the 784 pixels.

    The defaults are the protocol of Kumar et al. (2023): the first 10,000 images, batches of 16, one pass.

    Args:
        tasks: number of tasks.
        examples: of each task: the first so many of MNIST's 60,000 training images.
        batch_size: examples of a batch.
        epochs: passes over each task.
        root: folder that holds ``MNIST/raw``; default: the environment variable CLAGRANGE_DATA, else ``data``.
        download: fetch the files through torchvision when they are missing.
        seed: of permutations and order.

    Raises:
        FileNotFoundError: when the files are missing; says where they were looked for and how to get them.
    """

    PRESETS = {
        "dohare": Preset(
            source="Dohare et al. (2024), online permuted MNIST",
            stream={"tasks": 800, "examples": 60_000, "batch_size": 1, "epochs": 1},
            network={"kind": "mlp", "hidden": [2000, 2000, 2000]},
            optimizer={"kind": "sgd", "lr": 0.003},
        ),
        "upgd": Preset(
            source="Elsayed and Mahmood (2024), input-permuted MNIST: 10⁶ examples, a permutation for each 5,000",
            stream={"tasks": 200, "examples": 5_000, "batch_size": 1, "epochs": 1},
            network={"kind": "mlp", "hidden": [300, 150]},
            optimizer={"kind": "upgd", "lr": 0.01, "noise": 0.1, "utility_decay": 0.9999, "weight_decay": 0.01},
        ),
        "l2_init": Preset(
            source="Kumar et al. (2023), permuted MNIST",
            stream={"tasks": 500, "examples": 10_000, "batch_size": 16, "epochs": 1},
            network={"kind": "mlp", "hidden": [100, 100]},
            optimizer={"kind": ("sgd", "adam"), "lr": {"sgd": (0.01, 0.001), "adam": (1e-3, 1e-4)}},
        ),
        "small": Preset(
            source="a plasticity study within a few minutes",
            stream={"tasks": 30, "examples": 4_000, "batch_size": 16, "epochs": 1},
            network={"kind": "mlp", "hidden": [100, 100]},
            optimizer={"kind": "adam", "lr": 0.003},
        ),
    }

    input_shape = (PIXELS,)
    classes = 10

    def __init__(
        self,
        tasks: int = 30,
        examples: int = 10_000,
        batch_size: int = 16,
        epochs: int = 1,
        root: str | None = None,
        download: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(tasks, examples, batch_size, epochs, seed)
        if examples > IMAGES:
            raise ValueError(f"examples: expected at most the {IMAGES} images that there are, got {examples}")
        self.root = root
        self.download = download
        load_images("mnist", data_folder(root), download=download)

    def task(self, number: int) -> Task:
        """The images of one task."""
        self._check(number)
        images = load_images("mnist", data_folder(self.root), download=self.download)
        permutation = torch.from_numpy(self.random("pixels", number).permutation(PIXELS))
        first = torch.arange(self.examples)
        return Task(
            images.inputs,
            images.targets[: self.examples],
            rows=first,
            pixels=permutation,
            test=images.test(pixels=permutation),
        )
