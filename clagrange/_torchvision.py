"""Let torchvision import beside a torch build that its compiled operators do not fit."""

import importlib.util
from pathlib import Path

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library: torch.library.Library | None = None


def declare_operators() -> bool:
    """Declare the schemas of torchvision's operators where its own extension does not load.

    ``import torchvision`` registers a fake kernel for ``torchvision::nms`` and fails when the operator does
    not exist, which is the case where a CPU build of torch meets a torchvision built for another torch.
    A schema is enough for the import; calling the operator still raises. Nothing happens where torchvision
    is absent or its extension loads, and torchvision itself is not imported.

    Returns:
        True if the schemas were declared here.
    """
    global _library
    if _library is not None or hasattr(torch.ops.torchvision, "nms"):
        return False
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return False
    for extension in Path(spec.origin).parent.glob("_C*.*"):
        try:
            torch.ops.load_library(str(extension))
            return False
        except OSError:
            continue
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        _library.define(schema)
    return True
