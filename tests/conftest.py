"""What every test starts from: one thread, and torch's global random stream at its beginning."""

import pytest
import torch

import clagrange  # noqa: F401 - comes before whatever imports torchvision

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
