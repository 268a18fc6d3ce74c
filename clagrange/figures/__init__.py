"""The paper's figures 1 to 3 and the one its sixth section lacks, drawn from this package, with their numbers."""

from clagrange.figures.write import FIGURES, write_figure

__all__ = ["FIGURES", "write_figure"]
