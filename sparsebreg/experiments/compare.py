"""Several methods on the same tasks: separate processes that can be stopped and gone on with, one table, one report."""

from __future__ import annotations

import csv
import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tabulate import tabulate

from sparsebreg.errors import RunError, check_choice
from sparsebreg.experiments import checkpoint, plots
from sparsebreg.experiments.config import Config
from sparsebreg.experiments.data import DATASETS
from sparsebreg.experiments.files import prepare_folder, write
from sparsebreg.experiments.methods import METHODS, special
from sparsebreg.experiments.train import PARENT, Stopped
from sparsebreg.models import MODELS

#: A run of a comparison: data, model, method, seed.
Key = tuple[str, str, str, int]


def plan(
    base: Config, methods: Sequence[str], seeds: Sequence[int], models: Sequence[str], data: Sequence[str]
) -> dict[Key, Config]:
    """The resolved configuration of every run, in order; runs live in ``out/<data>-<model>/<method>-seed<k>``.

    Options that only some methods take (``lam``) are left out for the others. With several data sets, each has its
    files in a folder of its name below ``data_dir``.

    Raises:
        TypeError, ValueError: for a wrong option.
    """
    for name, values, known in (("methods", methods, METHODS), ("models", models, MODELS), ("data", data, DATASETS)):
        for value in values:
            check_choice(name, value, known)
    configs = {}
    for task in data:
        folder = str(Path(base.data_dir) / task) if base.data_dir and len(data) > 1 else base.data_dir
        for model in models:
            for seed in seeds:  # methods inside: their times are compared, and a machine's speed drifts
                for method in methods:
                    config = replace(
                        base, **dict.fromkeys(special() - set(METHODS[method].defaults)), data=task,
                        data_dir=folder, model=model, method=method, seed=seed,
                        out=str(Path(base.out) / f"{task}-{model}" / f"{method}-seed{seed}"),
                    )  # fmt: skip
                    configs[task, model, method, seed] = config.resolved()
    return configs


def compare(
    base: Config,
    methods: Sequence[str],
    seeds: Sequence[int],
    models: Sequence[str] | None = None,
    data: Sequence[str] | None = None,
    progress: Callable[..., Any] | None = None,
    restart: bool = False,
) -> list[dict[str, Any]]:
    """Trains every method with every seed on every task, one after another in processes of their own.

    Finished runs are taken as they are and a stopped one goes on, so that the same call goes on with a comparison that
    was killed. Writes comparison.json, curves.png and the report's files.

    Args:
        base: all other options; ``base.out`` is the comparison's folder.
        models, data: default: those of ``base``.
        progress: called as ``tqdm.tqdm``; default: no progress bar.
        restart: begin all runs anew.

    Returns:
        The rows of the table, one per task and method.

    Raises:
        TypeError, ValueError: for a wrong option, before the first run; RunError: if a run fails; Stopped: for SIGINT,
        once the present run is saved.
    """
    from sparsebreg.experiments import report

    configs = plan(base, methods, seeds, models or [base.model], data or [base.data])
    folder = prepare_folder(base.out)
    results = {} if restart else {k: r for k, c in configs.items() if (r := checkpoint.finished(c)) is not None}
    bar = None
    if progress:
        # In epochs; an average over all of them, since methods differ in speed.
        bar = progress(
            total=sum(c.epochs for c in configs.values()), initial=sum(configs[k].epochs for k in results), smoothing=0,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}, about {remaining} left",
        )  # fmt: skip
    for i, (key, config) in enumerate(configs.items(), 1):
        if key not in results:
            if bar is not None:
                bar.set_description(f"run {i} of {len(configs)}: {' '.join(key[:3])} seed {config.seed}")
            results[key] = _run(config, bar, restart)
    if bar is not None:
        bar.close()
    tasks = dict.fromkeys(key[:3] for key in configs)
    rows = [row([results[(*task, seed)] for seed in seeds]) for task in tasks]
    histories = {}
    for task in tasks:
        with open(Path(configs[(*task, seeds[0])].out) / "history.csv", newline="") as file:
            label = task[2] if len({t[:2] for t in tasks}) == 1 else " ".join(task)
            histories[label] = list(csv.DictReader(file))
    plots.curves(folder / "curves.png", histories)
    write(folder / "comparison.json", json.dumps(rows, indent=2) + "\n")
    report.report(folder)
    return rows


def _run(config: Config, bar: Any, restart: bool) -> dict[str, Any]:
    """One run in a process of its own, which says on its standard output how far it is."""
    command = [sys.executable, "-m", "sparsebreg", "train", *config.arguments(), "--progress", "lines"]
    # A session of its own: Ctrl-C reaches this process alone, which passes it on once. Without this process, the run
    # saves its state and stops.
    run = subprocess.Popen(
        command + (["--restart"] if restart else []),
        stdout=subprocess.PIPE, text=True, start_new_session=True, env={**os.environ, PARENT: str(os.getpid())},
    )  # fmt: skip
    stopped = False
    done = None
    while True:
        try:
            for line in run.stdout:  # type: ignore[union-attr]
                words = line.split()
                if bar is not None and len(words) == 3 and words[0] == "progress":
                    part = int(words[1]) / int(words[2])
                    if done is None:  # where the run goes on: not done in this time
                        bar.n += part * config.epochs
                        bar.initial += part * config.epochs
                    else:
                        bar.update(min((part - done) * config.epochs, bar.total - bar.n))
                    done = part
            run.wait()
            break
        except KeyboardInterrupt:
            stopped = True
            run.send_signal(signal.SIGINT)
    if stopped:
        raise Stopped("stopped; the same command goes on from there", signal.SIGINT)
    if run.returncode:
        raise RunError(
            f"{config.method}, seed {config.seed}: the run failed with exit status {run.returncode}; "
            "the same command goes on from its last checkpoint"
        )
    return json.loads((Path(config.out) / "result.json").read_text())


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
