"""Figures of a benchmark."""

from pathlib import Path
from typing import Any

import numpy as np

from sparsebreg.experiments.figures import COLOURS, log_axis, pyplot, save


def speedup(path: Path, results: list[dict[str, Any]]) -> bool:
    """Writes a figure of the speed-up over dense against density, a panel for every part and implementation.

    Of several thread counts and batches, the largest count and batch 128 (or the largest) are drawn.

    Args:
        path: the PNG file.
        results: of bench.json.

    Returns:
        Whether there was anything to draw.
    """
    results = [r for r in results if r["density"] is not None and r["part"] != "swap"]
    if not results:
        return False
    threads, batches = max(r["threads"] for r in results), {r["batch"] for r in results}
    batch = 128 if 128 in batches else max(batches)
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for r in results:
        if (r["threads"], r["batch"]) == (threads, batch):
            panel = panels.setdefault(f"{r['suite']}, {r['part']}: {r['implementation']}", {})
            panel.setdefault(r["layer"], []).append((100 * r["density"], r["ratio"]["median"]))
    plt = pyplot()
    columns = min(3, len(panels))
    size = {"figsize": (5 * columns, 3.8 * -(-len(panels) // columns)), "layout": "constrained", "squeeze": False}
    figure, grid = plt.subplots(-(-len(panels) // columns), columns, sharey=True, **size)
    for ax in grid.flat[len(panels) :]:
        ax.remove()
    for ax, (title, layers_) in zip(grid.flat, panels.items(), strict=False):
        shades = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(layers_)))
        for shade, (layer, points) in zip(shades, layers_.items(), strict=True):
            ax.plot(*zip(*sorted(points), strict=True), color=shade, marker=".", label=layer)
        ax.axhline(1, color="black", lw=1, ls="--")
        ax.set(xscale="log", title=title, xlabel="active weights (%)", ylabel="times faster than dense")
        ticks = sorted({100 * r["density"] for r in results})
        ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
        ax.set_xticks([], minor=True)
        log_axis(ax)
        ax.grid(alpha=0.3, which="both")
        ax.legend(fontsize=6)
    figure.suptitle(f"batch {batch}, {threads} threads; dashed: break-even")
    save(figure, path)
    return True


def roofline(path: Path, results: list[dict[str, Any]], roofs: dict[int, dict[str, float]]) -> None:
    """Writes a figure of useful GF/s against arithmetic intensity, under the measured roofs (GEMM and copy).

    Williams, Waterman, Patterson, "Roofline" (CACM 52, 2009).

    Args:
        path: the PNG file.
        results: of bench.json; those without a FLOP count are left out.
        roofs: ``timing.roofs()`` by number of threads.
    """
    plt = pyplot()
    results = [r for r in results if r["intensity"] is not None]
    figure, ax = plt.subplots(figsize=(8, 5), layout="constrained")
    reach = [r["intensity"] for r in results] or [1.0]
    x = np.geomspace(min(0.1, *reach), max(100.0, *reach), 200)
    for i, (threads, roof) in enumerate(roofs.items()):
        label = f"{threads} threads: {roof['gemm_gflops']:.0f} GF/s, {roof['copy_gbs']:.0f} GB/s"
        ax.plot(x, np.minimum(roof["gemm_gflops"], roof["copy_gbs"] * x), color="black", alpha=1 / (i + 1), label=label)
    groups = dict.fromkeys((r["suite"], r["part"], r["implementation"]) for r in results)
    for i, group in enumerate(groups):
        chosen = [r for r in results if (r["suite"], r["part"], r["implementation"]) == group]
        ax.scatter(
            [r["intensity"] for r in chosen], [r["useful_gflops"] for r in chosen], s=14, label=" ".join(group),
            color=COLOURS[i % len(COLOURS)], marker="os^Dv"[i // len(COLOURS) % 5],
        )  # fmt: skip
    ax.set(xscale="log", yscale="log", xlabel="useful FLOPs per byte that has to be moved", ylabel="useful GF/s")
    ax.grid(alpha=0.3, which="both")
    ax.legend(fontsize=7)
    save(figure, path)
