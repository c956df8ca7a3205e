"""Runs that differ by their seed alone as a row of a table: mean and standard deviation."""

import statistics
from typing import Any

from tabulate import tabulate

#: Options that set how much work a run is: times of runs that differ in them do not compare.
SHARED = ("epochs", "batch_size", "threads", "augment", "validation")


def row(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over the seeds of a method on a task."""
    out: dict[str, Any] = {k: results[0][k] for k in ("data", "model", "method")}
    out["runs"] = len(results)
    out |= {k: results[0]["config"].get(k) for k in SHARED}
    for key in ("test_accuracy", "sparsity", "train_seconds", "flops_fraction_of_sgd", "peak_rss_mb"):
        values = [r[key] for r in results]
        out[key] = statistics.mean(values)
        out[f"{key}_std"] = statistics.stdev(values) if len(values) > 1 else 0.0
    for key in ("seconds_per_fine_step", "seconds_per_coarse_step"):
        times = [r[key] for r in results if r[key] is not None]
        out[key] = statistics.mean(times) if times else None
    return out


HEAD = (
    "method", "runs", "test accuracy %", "sparsity %", "train s", "of sgd", "FLOPs of sgd", "ms / fine", "ms / coarse",
)  # fmt: skip


def cells(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The rows as text under ``HEAD``; times relative to the fastest sgd with the same task and ``SHARED`` options."""

    def baseline(row: dict[str, Any]) -> dict[str, Any] | None:
        keys = ("data", "model", *SHARED)
        dense = [r for r in rows if r["method"] == "sgd" and all(r.get(k) == row.get(k) for k in keys)]
        return min(dense, key=lambda r: r["train_seconds"], default=None)

    def spread(row: dict[str, Any], key: str, scale: float, digits: int) -> str:
        text = f"{scale * row[key]:.{digits}f}"
        return text + (f" ± {scale * row[key + '_std']:.{digits}f}" if row["runs"] > 1 else "")

    def ms(seconds: float | None) -> str:
        return "-" if seconds is None else f"{1e3 * seconds:.2f}"

    lines = []
    for r in rows:
        sgd = baseline(r)
        lines.append(
            (
                r.get("label", r["method"]),
                str(r["runs"]),
                spread(r, "test_accuracy", 1, 2),
                spread(r, "sparsity", 100, 1),
                spread(r, "train_seconds", 1, 2),
                f"{r['train_seconds'] / sgd['train_seconds']:.2f}" if sgd else "-",
                f"{r['flops_fraction_of_sgd']:.2f}",
                ms(r["seconds_per_fine_step"]),
                ms(r["seconds_per_coarse_step"]),
            )
        )
    return lines


def table(rows: list[dict[str, Any]]) -> str:
    """The comparison as text, a table per task."""
    tasks = dict.fromkeys((r["data"], r["model"]) for r in rows)
    texts = []
    for task in tasks:
        lines = cells([r for r in rows if (r["data"], r["model"]) == task])
        text = tabulate(lines, HEAD, disable_numparse=True, colalign=("left",) + ("right",) * (len(HEAD) - 1))
        texts.append(f"{task[0]}, {task[1]}\n{text}" if len(tasks) > 1 else text)
    return "\n\n".join(texts)
