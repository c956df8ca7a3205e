"""Several methods on the same task: separate processes, one table, one figure."""

from __future__ import annotations

import csv
import json
import statistics
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from tabulate import tabulate

from sparsebreg.errors import RunError, check_choice
from sparsebreg.experiments import plots
from sparsebreg.experiments.train import METHODS, SPECIAL, Config, prepare_folder


def compare(base: Config, methods: list[str], seeds: list[int], quiet: bool = False) -> list[dict[str, Any]]:
    """Trains every method with every seed, one after another in processes of their own, below ``base.out``.

    Options in ``SPECIAL`` that a method does not take (``lam`` for sgd) are left out for it.

    Returns:
        The rows of the table, one per method.

    Raises:
        TypeError, ValueError: for a wrong option, before the first run; RunError: if a run fails.
    """
    configs = {}
    for method in methods:
        check_choice("methods", method, METHODS)
        for seed in seeds:
            own = {
                name: getattr(base, name) if name in METHODS[method] or name not in SPECIAL else None
                for name in (f.name for f in fields(Config))
            }
            config = replace(Config(**own), method=method, seed=seed, out=str(Path(base.out) / f"{method}-seed{seed}"))
            config.resolved()
            configs[method, seed] = config
    prepare_folder(base.out)
    results = {}
    for key, config in configs.items():
        results[key] = _run(config, quiet)
    rows = [_row(method, [results[method, s] for s in seeds]) for method in methods]
    histories = {}
    for method in methods:
        with open(Path(configs[method, seeds[0]].out) / "history.csv", newline="") as file:
            histories[method] = list(csv.DictReader(file))
    plots.curves(Path(base.out) / "curves.png", histories)
    (Path(base.out) / "comparison.json").write_text(json.dumps(rows, indent=2) + "\n")
    return rows


def _run(config: Config, quiet: bool) -> dict[str, Any]:
    command = [sys.executable, "-m", "sparsebreg", "train", *arguments(config)] + (["--quiet"] if quiet else [])
    done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise RunError(f"{config.method}, seed {config.seed}: the run failed with exit status {done.returncode}")
    return json.loads((Path(config.out) / "result.json").read_text())


def arguments(config: Config) -> list[str]:
    """The command-line arguments of a configuration."""
    words = []
    for name, value in asdict(config).items():
        if value is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return words


def _row(method: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    keys = ("test_accuracy", "sparsity", "train_seconds", "flops_fraction_of_sgd")
    row: dict[str, Any] = {"method": method, "runs": len(results)}
    for key in keys:
        values = [r[key] for r in results]
        row[key] = statistics.mean(values)
        row[f"{key}_std"] = statistics.stdev(values) if len(values) > 1 else 0.0
    for key in ("seconds_per_fine_step", "seconds_per_coarse_step"):
        times = [r[key] for r in results if r[key] is not None]
        row[key] = statistics.mean(times) if times else None
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """The comparison as text; times relative to sgd where it is among the methods."""
    dense = next((r for r in rows if r["method"] == "sgd"), None)

    def spread(row: dict[str, Any], key: str, scale: float, digits: int) -> str:
        text = f"{scale * row[key]:.{digits}f}"
        return text + (f" ± {scale * row[key + '_std']:.{digits}f}" if row["runs"] > 1 else "")

    lines = []
    for row in rows:
        coarse = row["seconds_per_coarse_step"]
        lines.append(
            (
                row["method"],
                spread(row, "test_accuracy", 1, 2),
                spread(row, "sparsity", 100, 1),
                spread(row, "train_seconds", 1, 2),
                f"{row['train_seconds'] / dense['train_seconds']:.2f}" if dense else "-",
                f"{row['flops_fraction_of_sgd']:.2f}",
                f"{1e3 * row['seconds_per_fine_step']:.2f}",
                f"{1e3 * coarse:.2f}" if coarse else "-",
            )
        )
    head = (
        "method", "test accuracy %", "sparsity %", "train s", "of sgd", "FLOPs of sgd", "ms / fine", "ms / coarse",
    )  # fmt: skip
    return tabulate(lines, head, disable_numparse=True, colalign=("left",) + ("right",) * 7)
