"""Colours and letters that the figures share."""

from typing import Any

RED, BLUE, SAND, GREEN, SKY, WINE = "#CC6677", "#332288", "#C4A93A", "#117733", "#79BFE6", "#882255"
INK = "#333333"
BY_DISCOUNT = (BLUE, GREEN, RED)
"""Colours of three discounts from the smallest up."""


def letter(panel: Any, name: str, title: str) -> None:
    """Put "a  title" above a panel."""
    panel.set_title(f"$\\bf{{{name}}}$  {title}")


def contours(panel: Any, grid: tuple[Any, Any], values: Any, levels: Any) -> None:
    """A landscape in pale colours with thin contour lines, behind everything else."""
    panel.contourf(*grid, values, levels=levels, cmap="Greys", alpha=0.28, extend="both", zorder=0)
    panel.contour(*grid, values, levels=levels, colors="white", linewidths=0.6, zorder=0.5)
