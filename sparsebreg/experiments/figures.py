"""What all figures share: matplotlib without a window, colours, and how they are written."""

from pathlib import Path
from typing import Any

from sparsebreg.core.errors import RunError, expected
from sparsebreg.experiments.files import atomic

#: Okabe and Ito's colours, which colour-blind readers tell apart, on white and on black.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8C8C8C")


def pyplot() -> Any:
    """matplotlib without a window. Raises RunError where it is missing."""
    try:
        import matplotlib
    except ImportError as error:
        raise RunError(expected("plots", "matplotlib (pip install 'sparsebreg[train]')", error)) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save(figure: Any, path: Path) -> None:
    with atomic(path) as file:
        figure.savefig(file, dpi=130, format="png")
    pyplot().close(figure)


def log_axis(ax: Any) -> None:
    """A logarithmic y axis with plain numbers: 1, 2, 5 of every power of ten, or more where it spans little."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    ax.set_yscale("log")
    low, high = ax.get_ylim()
    if high > 3 * low:
        ax.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    for which in (ax.yaxis.set_major_formatter, ax.yaxis.set_minor_formatter):
        which(FuncFormatter(lambda value, _: f"{value:g}"))
