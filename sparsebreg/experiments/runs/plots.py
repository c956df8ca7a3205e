"""Figures of runs: a PNG beside the results, SVG for the report."""

import html
import io
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from sparsebreg.experiments.figures import COLOURS, log_axis, pyplot, save

#: Written where the page's own text colour is meant; no colour of a plot.
_TEXT = "#010203"

#: Shown of a run's steps in its timeline.
TIMELINE_STEPS = 200

#: A network of more layers has a colour bar instead of a name beside every line.
NAMED_LAYERS = 10

#: What time is spent on, and its colour.
PARTS = {
    "fine steps": COLOURS[3], "coarse steps": COLOURS[0], "data": COLOURS[2], "evaluation": COLOURS[1],
    "checkpoints": COLOURS[6],
}  # fmt: skip


def _style(number: int) -> dict[str, Any]:
    """Colour, marker and dashes of a line: where the colours begin again, the others change."""
    again = number // len(COLOURS) % 4
    return {"color": COLOURS[number % len(COLOURS)], "marker": ".sx^"[again], "ls": ("-", "--", ":", "-.")[again]}


def accuracy(row: dict[str, Any]) -> float:
    """The accuracy in a row of history.csv: of the validation split if there is one."""
    return float(row["validation_accuracy"] if "validation_accuracy" in row else row["test_accuracy"])


def curves(path: Path, runs: dict[str, list[dict[str, Any]]]) -> None:
    """Writes a figure of training loss, accuracy and density of one or more runs.

    Args:
        path: the PNG file.
        runs: rows of history.csv by label.
    """
    plt = pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for i, (label, rows) in enumerate(runs.items()):
        style = {**_style(i), "ms": 5, "label": label}
        epochs = [float(r["epoch"]) for r in rows]
        seconds = [float(r["train_seconds"]) for r in rows]
        axes[0].plot(epochs, [float(r["train_loss"]) for r in rows], **style)
        axes[1].plot(seconds, [accuracy(r) for r in rows], **style)
        axes[2].plot(epochs, [100 * float(r["density"]) for r in rows], **style)
    axes[0].set(xlabel="epoch", ylabel="training loss", yscale="log")
    axes[1].set(xlabel="training time (s)", ylabel="accuracy (%)", xlim=(0, None))
    axes[2].set(xlabel="epoch", ylabel="active weights (%)", yscale="log")
    for ax in axes:
        ax.grid(alpha=0.3, which="both")
    for ax in axes[::2]:
        ax.locator_params(axis="x", integer=True)
    axes[0].legend()
    save(figure, path)


@contextmanager
def _svg(name: str, out: list[str]) -> Iterator[Any]:
    """Axes whose drawing is appended to ``out`` as an SVG element that scales with the page and takes its colour."""
    plt = pyplot()
    style = {
        "svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif", "font.size": 9,
        "axes.prop_cycle": plt.cycler(color=COLOURS), "axes.spines.top": False, "axes.spines.right": False,
        "legend.frameon": False, "legend.fontsize": 8,
        **{f"{key}color": _TEXT for key in ("text.", "axes.edge", "axes.label", "xtick.", "ytick.", "grid.")},
    }  # fmt: skip
    with plt.rc_context(style):
        figure, ax = plt.subplots(figsize=(4.6, 3.1), layout="constrained")
        try:
            yield ax
            description = _description(ax)
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        finally:
            plt.close(figure)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(_TEXT, "currentColor")
    # Several drawings share a page, so every id carries the drawing's name.
    text = text.replace('id="', f'id="{name}-').replace('href="#', f'href="#{name}-').replace("url(#", f"url(#{name}-")
    out.append(text.replace("<svg ", f'<svg role="img" aria-label="{html.escape(description)}" ', 1))


def _description(ax: Any) -> str:
    """What a drawing shows, for readers who do not see it."""
    axes = " against ".join(label for label in (ax.get_ylabel(), ax.get_xlabel()) if label)
    names = ", ".join(ax.get_legend_handles_labels()[1])
    return " ".join(f"{axes}: {names}".split())


def _legend(ax: Any) -> None:
    """Above the axes, where it hides nothing; the figure grows with it."""
    handles, texts = ax.get_legend_handles_labels()
    longest = max(map(len, texts))
    columns = 3 if longest < 15 else 2 if longest < 28 else 1
    texts = [textwrap.fill(t, 58) for t in texts]
    ax.figure.legend(handles, texts, loc="outside upper center", ncols=columns)
    _grow(ax, 0.17 * (sum(t.count("\n") + 1 for t in texts) / columns - 2))


def _grow(ax: Any, inches: float) -> None:
    """Makes room in the height of the figure."""
    ax.figure.set_figheight(ax.figure.get_figheight() + max(0.0, inches))


#: Rows of history.csv of every seed, by label.
Histories = dict[str, list[list[dict[str, Any]]]]


def lines(
    name: str, runs: Histories, x: Callable[[dict], float], y: Callable[[dict], float], log: bool = False, **axes: Any
) -> str:
    """A line for every run, in one colour for the runs of a label; ``axes`` go to ``Axes.set``."""
    out: list[str] = []
    with _svg(name, out) as ax:
        for i, (label, seeds) in enumerate(runs.items()):
            for k, rows in enumerate(seeds):
                ax.plot(
                    [x(r) for r in rows], [y(r) for r in rows], **_style(i), lw=1.3, ms=4,
                    label=label if k == 0 else None,
                )  # fmt: skip
        ax.set(**axes)
        if axes["xlabel"] == "epoch":
            ax.locator_params("x", integer=True)
        if log:
            log_axis(ax)
        ax.grid(alpha=0.2)
        _legend(ax)
    return out[0]


def layers(name: str, rows: list[dict[str, Any]]) -> str:
    """Density of every layer over the epochs of one run; no active weight is a line of its own, below all others."""
    names = [k.removeprefix("density.") for k in rows[0] if k.startswith("density.")]
    epochs = [float(r["epoch"]) for r in rows]
    values = np.array([[100 * float(r[f"density.{n}"]) for r in rows] for n in names])
    nothing = values[values > 0].min(initial=100) / 2
    gone = [n for n, last in zip(names, values[:, -1], strict=True) if last == 0]
    out: list[str] = []
    with _svg(name, out) as ax:
        shades = pyplot().get_cmap("viridis")(np.linspace(0.25, 0.9, len(names)))
        for label, line, shade in zip(names, np.maximum(values, nothing), shades, strict=True):
            ax.plot(epochs, line, color=shade, lw=1.3, marker=".", ms=4, label=label)
        note = textwrap.fill(f"no active weight at the end: {', '.join(gone)}", 60) if gone else ""
        ax.set(xlabel=f"epoch\n{note}".strip(), ylabel="active weights (%)")
        _grow(ax, 0.17 * note.count("\n"))
        ax.locator_params("x", integer=True)
        log_axis(ax)
        ax.grid(alpha=0.2)
        if len(names) <= NAMED_LAYERS:
            _name_lines(ax, names)
        else:
            _layer_bar(ax, names)
        if (values == 0).any():
            ax.axhline(nothing, color=_TEXT, lw=0.8, ls=":", zorder=1)
            ax.annotate("none", (0, nothing), (3, 2), xycoords=ax.get_yaxis_transform(), textcoords="offset points")
    return out[0]


def _name_lines(ax: Any, names: list[str]) -> None:
    """Names right of the ends of the axes' lines, moved apart where they would lie on each other."""
    ax.set_ylim(ax.get_ylim())  # later changes would move the ends
    ends = np.array([line.get_xydata()[-1] for line in ax.lines])
    heights = (ax.transScale + ax.transLimits).transform(ends)[:, 1]  # 0 to 1 over the axes
    order = np.argsort(heights, kind="stable")
    gaps = 0.07 * np.arange(len(names))
    places = np.maximum.accumulate(heights[order] - gaps) + gaps
    places = np.minimum(places, 1 - gaps[::-1])
    for i, place in zip(order, places, strict=True):
        ax.annotate(
            names[i], ends[i], (1.04, place), textcoords="axes fraction", va="center", fontsize=8,
            arrowprops={"arrowstyle": "-", "color": ax.lines[i].get_color(), "lw": 0.7, "shrinkA": 1, "shrinkB": 2},
        )  # fmt: skip


def _layer_bar(ax: Any, names: list[str]) -> None:
    """A bar of the lines' colours, with the names of the first layer and the last."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap

    # With more colours it would become a bitmap.
    shades = ListedColormap(pyplot().get_cmap("viridis")(np.linspace(0.25, 0.9, 40)))
    bar = ax.figure.colorbar(ScalarMappable(cmap=shades), ax=ax, ticks=[0, 1], aspect=30)
    bar.ax.set_yticklabels([f"{names[0]}\n(first layer)", f"{names[-1]}\n(last layer)"], fontsize=8)
    bar.ax.invert_yaxis()
    bar.solids.set_edgecolor("face")
    bar.outline.set_visible(False)


def timeline(name: str, coarse: np.ndarray, seconds: np.ndarray) -> str:
    """Milliseconds of consecutive steps in the middle of a run, coloured by their phase."""
    begin = max(0, (len(seconds) - TIMELINE_STEPS) // 2)
    steps = np.arange(begin, min(len(seconds), begin + TIMELINE_STEPS))
    out: list[str] = []
    with _svg(name, out) as ax:
        for label, colour, chosen in (
            ("fine step", COLOURS[3], ~coarse[steps]),
            ("coarse step", COLOURS[0], coarse[steps]),
        ):
            ax.vlines(steps[chosen], 0, 1e3 * seconds[steps][chosen], colors=colour, lw=1.2, label=label)
        ax.set(xlabel="step", ylabel="time of the step (ms)", ylim=(0, None))
        ax.grid(alpha=0.2, axis="y")
        _legend(ax)
    return out[0]


def breakdown(name: str, times: dict[str, dict[str, float]]) -> str:
    """Seconds by what they were spent on (see ``PARTS``): a bar for every label."""
    out: list[str] = []
    with _svg(name, out) as ax:
        left = np.zeros(len(times))
        labels = [textwrap.fill(label, 22) for label in times]
        for part, colour in PARTS.items():
            if any(part in t for t in times.values()):
                values = np.array([t.get(part, 0.0) for t in times.values()])
                ax.barh(labels, values, left=left, color=colour, label=part, height=0.6)
                left += values
        ax.invert_yaxis()
        ax.set(xlabel="wall-clock time (s)")
        ax.grid(alpha=0.2, axis="x")
        _grow(ax, 0.16 * len(labels) * (max(label.count("\n") for label in labels) + 1.5) - 2.2)
        _legend(ax)
    return out[0]
