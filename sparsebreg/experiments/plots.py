"""Figures of runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparsebreg.errors import RunError, expected


def _pyplot():
    try:
        import matplotlib
    except ImportError as error:
        raise RunError(expected("plots", "matplotlib (pip install 'sparsebreg[train]')", error)) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def curves(path: Path, runs: dict[str, list[dict[str, Any]]]) -> None:
    """Writes a figure of training loss, test accuracy and density of one or more runs.

    Args:
        path: the PNG file.
        runs: rows of history.csv by label.
    """
    plt = _pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for label, rows in runs.items():
        epochs = [float(r["epoch"]) for r in rows]
        seconds = [float(r["train_seconds"]) for r in rows]
        axes[0].plot(epochs, [float(r["train_loss"]) for r in rows], marker=".", label=label)
        axes[1].plot(seconds, [float(r["test_accuracy"]) for r in rows], marker=".", label=label)
        axes[2].plot(epochs, [100 * float(r["density"]) for r in rows], marker=".", label=label)
    axes[0].set(xlabel="epoch", ylabel="training loss", yscale="log")
    axes[1].set(xlabel="training time (s)", ylabel="test accuracy (%)", xlim=(0, None))
    axes[2].set(xlabel="epoch", ylabel="active weights (%)", yscale="log")
    for ax in axes:
        ax.grid(alpha=0.3, which="both")
    axes[0].legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)
