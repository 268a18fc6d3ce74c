"""Task streams: ordered, seeded sequences of tasks over real data, one stream a file."""

from clagrange.tasks.base import Task, TaskStream
from clagrange.tasks.permuted_digits import PermutedDigits
from clagrange.tasks.permuted_images import PermutedImages
from clagrange.tasks.permuted_mnist import PermutedMNIST
from clagrange.tasks.random_label_digits import RandomLabelDigits

__all__ = ["PermutedDigits", "PermutedImages", "PermutedMNIST", "RandomLabelDigits", "Task", "TaskStream"]
