"""Run all checks, as a table for people and as a summary for programs."""

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from clagrange._checks import check_choice
from clagrange.verify.check import CHECKS, Check, Place

DTYPES = {"float64": torch.float64, "float32": torch.float32}


def verify(device: str | torch.device = "cpu", dtype: str = "float64") -> list[Check]:
    """Run all checks; a check that raises an exception has failed.

    Args:
        device: where to compute, such as "cpu" or "cuda".
        dtype: "float64" or "float32"; tolerances follow it.

    Raises:
        ValueError: for another dtype.
        RuntimeError: if torch cannot compute there.

    Example:
        >>> all(check.passed for check in verify())
        True
    """
    check_choice("dtype", dtype, DTYPES)
    place = Place(torch.device(device), DTYPES[dtype])
    place.tensor([0.0])
    results = []
    for part, name, function in CHECKS:
        try:
            with torch.random.fork_rng(devices=[]), torch.enable_grad():
                torch.manual_seed(0)
                expected, found, error, tolerance = function(place)
            results.append(Check(part, name, _text(expected), _text(found), float(error), tolerance))
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            results.append(Check(part, name, "a result", reason, math.inf, 0.0))
    return results


def report(checks: Sequence[Check], console: Console, *, seconds: float, where: str) -> None:
    """Print a table of checks and a last line that says whether all passed."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for title in ("", "expected", "found"):
        table.add_column(title, overflow="fold")
    table.add_column("error", justify="right", no_wrap=True, min_width=8)
    table.add_column("tolerance", justify="right", no_wrap=True, min_width=9)
    table.add_column("", no_wrap=True, min_width=2)
    part = ""
    for check in checks:
        if check.part != part:
            part = check.part
            table.add_row(f"[bold]{part}[/bold]")
        mark = "[green]ok[/green]" if check.passed else "[bold red]FAILED[/bold red]"
        cells = (check.expected, check.found, f"{check.error:.1e}", f"{check.tolerance:.1e}")
        table.add_row(f"  {check.name}", *cells, mark)
    console.print(table)
    failed = sum(not check.passed for check in checks)
    told = f"{failed} of {len(checks)} checks failed" if failed else f"all {len(checks)} checks passed"
    console.print(f"\n{told} on {where} in {seconds:.1f} s", highlight=False)


def run(device: str, dtype: str) -> tuple[list[Check], dict[str, Any]]:
    """`verify`, with what a program wants to know: a JSON-ready summary."""
    begun = time.perf_counter()
    checks = verify(device, dtype)
    return checks, {
        "passed": all(check.passed for check in checks),
        "device": device,
        "dtype": dtype,
        "torch": str(torch.__version__),
        "seconds": round(time.perf_counter() - begun, 2),
        "checks": [
            {
                **vars(check),
                "error": check.error if math.isfinite(check.error) else None,
                "passed": check.passed,
            }
            for check in checks
        ],
    }


def _text(value: Any) -> str:
    return f"{value:.7g}" if isinstance(value, float) else str(value)
