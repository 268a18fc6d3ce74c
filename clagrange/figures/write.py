"""Figures by number, and their files: PNG, SVG and numbers.json."""

import importlib
import json
from pathlib import Path
from typing import Any

from clagrange._checks import check_choice
from clagrange.study.files import FileProblem, replacing, require_writable

FIGURES = {
    "1": "double_well",
    "2": "quadratic_loss",
    "3": "metric_and_drift",
    "6": "task_switch",
}
"""The module of each figure, with ``compute() -> (numbers, curves)`` and ``draw(numbers, curves) -> Figure``."""

_DOTS_PER_INCH = 160
_RC = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "svg.hashsalt": "clagrange",
    "svg.fonttype": "none",
}


def write_figure(number: str, folder: Path) -> list[Path]:
    """Write ``figureN.png``, ``figureN.svg`` and the entry ``figureN`` of ``numbers.json`` into a folder.

    ``numbers.json`` keeps the entries of other figures that are there.

    Args:
        number: "1", "2", "3" or "6".
        folder: made when it is missing.

    Returns:
        The three paths.

    Raises:
        ValueError: for another number.
        clagrange.study.files.FileProblem: when ``numbers.json`` is there and is not a JSON object, or the folder
            cannot be written.
    """
    from matplotlib import rc_context

    check_choice("figure", number, FIGURES)
    if folder.exists() and not folder.is_dir():
        raise FileProblem(f"out: expected a folder, got the file {folder}; choose another")
    require_writable(folder)
    stored = folder / "numbers.json"
    try:
        entries = json.loads(stored.read_text()) if stored.exists() else {}
    except ValueError as error:
        raise FileProblem(f"{stored}: expected JSON, got something else ({error}); remove it") from error
    if not isinstance(entries, dict):
        raise FileProblem(f"{stored}: expected a JSON object, got {type(entries).__name__}; remove it")
    module: Any = importlib.import_module(f"clagrange.figures.{FIGURES[number]}")
    numbers, curves = module.compute()
    name = f"figure{number}"
    with rc_context(_RC):
        figure = module.draw(numbers, curves)
        for kind in ("png", "svg"):
            metadata = {"Date": None} if kind == "svg" else None
            with replacing(folder / f"{name}.{kind}") as partial:
                figure.savefig(partial, format=kind, dpi=_DOTS_PER_INCH, facecolor="white", metadata=metadata)
    with replacing(stored) as partial:
        partial.write_text(json.dumps({**entries, name: numbers}, indent=1, ensure_ascii=False) + "\n")
    return [folder / f"{name}.png", folder / f"{name}.svg", stored]
