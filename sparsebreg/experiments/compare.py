"""Several methods on the same tasks: separate processes that can be stopped and gone on with, one table, one report."""

from __future__ import annotations

import csv
import importlib
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import IO, Any

import torch
from tabulate import tabulate

import sparsebreg as sb
from sparsebreg.core.errors import RunError, check_choice, check_int, expected
from sparsebreg.experiments import checkpoint, plots
from sparsebreg.experiments.config import Config, words
from sparsebreg.experiments.data import DATASETS, load
from sparsebreg.experiments.files import prepare_folder, write
from sparsebreg.experiments.methods import METHODS, special
from sparsebreg.experiments.train import PARENT, Stopped
from sparsebreg.models import MODELS

#: A run of a comparison: data, model, method, seed.
Key = tuple[str, str, str, int]

#: What a comparison needs at its end, or while it runs: better missed before the first run.
PACKAGES = ("jinja2", "matplotlib", "rich", "tabulate", "tomli_w")


def run_name(key: Key) -> str:
    """As messages call a run."""
    return f"{' '.join(key[:3])} seed {key[3]}"


def by_method(keys: Iterable[Key]) -> dict[tuple[str, str, str], list[Key]]:
    """Runs that differ by their seed alone, by (data, model, method)."""
    groups: dict[tuple[str, str, str], list[Key]] = {}
    for key in keys:
        groups.setdefault(key[:3], []).append(key)
    return groups


def plan(
    base: Config, methods: Sequence[str], seeds: Sequence[int], models: Sequence[str], data: Sequence[str]
) -> dict[Key, Config]:
    """The resolved configuration of every run, in order; runs live in ``out/<data>-<model>/<method>-seed<k>``.

    Options that only some methods take (``lam``) are left out for the others. With several data sets, each has its
    files in a folder of its name below ``data_dir``.

    Raises:
        TypeError, ValueError: for a wrong option, or one that is listed twice.
    """
    for name, values, known in (("methods", methods, METHODS), ("models", models, MODELS), ("data", data, DATASETS)):
        for value in values:
            check_choice(name, value, known)
    seeds = [check_int("seeds", seed, low=0) for seed in seeds]
    for name, values in (("methods", methods), ("models", models), ("data", data), ("seeds", seeds)):
        if len(set(values)) < len(values):
            raise ValueError(expected(name, "every one once", ", ".join(map(str, values))))
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


def options(base: Config, configs: dict[Key, Config]) -> dict[str, Any]:
    """The planned comparison in the words of its command: its lists, and the options that all of its runs share.

    The same comparison is planned from them. Options in which runs differ are those that ``base`` left open.
    """
    lists = zip(("data", "models", "methods", "seeds"), zip(*configs, strict=True), strict=True)
    out: dict[str, Any] = {name: list(dict.fromkeys(values)) for name, values in lists}
    out |= {"out": base.out, "data_dir": base.data_dir}
    own = {"data", "model", "method", "seed", *out}
    for name in (f.name for f in fields(Config) if f.name not in own):
        taken = [c for c in configs.values() if name not in special() or name in METHODS[c.method].defaults]
        values = {getattr(c, name) for c in taken}
        out[name] = values.pop() if len(values) == 1 else None
    return {k: v for k, v in out.items() if v is not None}


def compare(
    base: Config,
    methods: Sequence[str],
    seeds: Sequence[int],
    models: Sequence[str] | None = None,
    data: Sequence[str] | None = None,
    progress: bool = False,
    restart: bool = False,
) -> tuple[list[dict[str, Any]], dict[Key, str]]:
    """Trains every method with every seed on every task, one after another in processes of their own.

    Finished runs are taken as they are and a stopped one goes on, so that the same call goes on with a comparison that
    was killed. A run that fails does not keep the others from running, and is tried again by the same call. Writes
    comparison.toml (the options, and the command), comparison.json, curves.png and the report's files.

    Args:
        base: all other options; ``base.out`` is the comparison's folder.
        models, data: default: those of ``base``.
        progress: show a live table on standard error; a line for every event where that is no terminal.
        restart: begin all runs anew.

    Returns:
        The rows of the table, one per task and method with a finished run, and what each failed run said at its end.

    Raises:
        TypeError, ValueError: for a wrong option, a model that does not fit the data, DataError: for data that cannot
        be loaded, RunError: for a package that is missing or a folder with other runs; all before the first run.
        RunError: for files that cannot be written. Stopped: for SIGINT, once the present run is saved.
    """
    configs = plan(base, methods, seeds, models or [base.model], data or [base.data])
    check_packages()
    sb.info()  # raises for a backend that cannot be used
    try:
        results = {} if restart else {k: r for k, c in configs.items() if (r := checkpoint.finished(c)) is not None}
        check_tasks(c for k, c in configs.items() if k not in results)
        folder = prepare_folder(base.out)
        _save_options(folder / "comparison.toml", options(base, configs))
        failed = _train_all(configs, results, progress, restart)
        return _finish(folder, configs, results), failed
    except KeyboardInterrupt:
        raise Stopped("stopped; the same command goes on from there", signal.SIGINT) from None
    except OSError as error:
        raise RunError(expected("out", "a folder with room for the results", error)) from error


def check_packages() -> None:
    """Raises RunError where one of ``PACKAGES`` cannot be imported."""
    for name in PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise RunError(
                expected("compare", f"the package {name} (pip install 'sparsebreg[train]')", error)
            ) from error


def check_tasks(configs: Iterable[Config]) -> None:
    """Loads the data and builds the models once. Raises ValueError or DataError where one of them cannot be."""
    tasks: dict[tuple[str, str | None, float], dict[str, None]] = {}
    for c in configs:
        tasks.setdefault((c.data, c.data_dir, c.validation), {})[c.model] = None
    for (name, folder, validation), models in tasks.items():
        data = load(name, folder, validation)
        for model in models:
            try:
                with torch.device("meta"):  # shapes alone
                    MODELS[model](data.shape, classes=data.classes)
            except ValueError as error:
                raise ValueError(expected("models", f"some for the images of {name}", f"{model} ({error})")) from error


def _save_options(path: Path, chosen: dict[str, Any]) -> None:
    """Writes a TOML file that ``sparsebreg compare --config`` takes, with the whole command besides."""
    import tomli_w

    command = shlex.join(["sparsebreg", "compare", *words(chosen)])
    write(path, tomli_w.dumps({**chosen, "command": command}))


def _train_all(
    configs: dict[Key, Config], results: dict[Key, dict[str, Any]], progress: bool, restart: bool
) -> dict[Key, str]:
    """Adds to ``results`` what is not there yet; returns what failed runs said at their end."""
    from rich.console import Console

    from sparsebreg.experiments.progress import Progress

    failed: dict[Key, str] = {}
    console = Console(stderr=True, quiet=not progress, force_terminal=sys.stderr.isatty())
    with Progress(configs, results, failed, console) as show:
        for key, config in configs.items():
            if key in results:
                continue
            show.begin(key)
            try:
                results[key] = _run(config, restart, show.update)
            except RunError as error:
                failed[key] = str(error)
            show.end()
    return failed


def _finish(folder: Path, configs: dict[Key, Config], results: dict[Key, dict[str, Any]]) -> list[dict[str, Any]]:
    """Writes files about the finished runs; returns the rows of their table."""
    from sparsebreg.experiments import report

    tasks = {task: done for task, keys in by_method(configs).items() if (done := [k for k in keys if k in results])}
    if not tasks:
        return []
    rows = [row([results[k] for k in keys]) for keys in tasks.values()]
    histories = {}
    for task, keys in tasks.items():
        with open(Path(configs[keys[0]].out) / "history.csv", newline="") as file:
            label = task[2] if len({t[:2] for t in tasks}) == 1 else " ".join(task)
            histories[label] = list(csv.DictReader(file))
    plots.curves(folder / "curves.png", histories)
    write(folder / "comparison.json", json.dumps(rows, indent=2) + "\n")
    report.report(folder)
    return rows


def _run(config: Config, restart: bool, progress: Callable[[int, int], None]) -> dict[str, Any]:
    """One run in a process of its own, which says on its standard output how far it is: at which step of how many.

    Raises:
        RunError: with the last line that a failed run wrote on its standard error. KeyboardInterrupt: once the run has
        stopped for it.
    """
    command = [sys.executable, "-m", "sparsebreg", "train", *config.arguments(), "--progress", "lines"]
    # A session of its own: Ctrl-C reaches this process alone, which passes it on once. Without this process, the run
    # saves its state and stops.
    run = subprocess.Popen(
        command + (["--restart"] if restart else []), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        errors="replace", start_new_session=True, env={**os.environ, PARENT: str(os.getpid())},
    )  # fmt: skip
    said: deque[str] = deque(maxlen=1)
    reader = threading.Thread(target=_pass_on, args=(run.stderr, said), daemon=True)
    reader.start()
    stopped = False
    while True:
        try:
            for line in run.stdout:  # type: ignore[union-attr]
                parts = line.split()
                if len(parts) == 3 and parts[0] == "progress":
                    progress(int(parts[1]), int(parts[2]))
            run.wait()
            reader.join()
            break
        except KeyboardInterrupt:
            stopped = True
            run.terminate()  # SIGINT would show a traceback of a run that has not begun to train
    if stopped:
        raise KeyboardInterrupt
    if run.returncode:
        killed = f"killed by signal {-run.returncode}" if run.returncode < 0 else None
        last = said[0] if said else f"exit status {run.returncode}"
        raise RunError(killed or last.removeprefix("sparsebreg: ").removeprefix("error: "))
    return json.loads((Path(config.out) / "result.json").read_text())


def _pass_on(stream: IO[str], last: deque[str]) -> None:
    """Writes what a run writes on its standard error on that of this process; ``last`` gets every line."""
    for line in stream:
        if text := line.rstrip():
            last.append(text)
            print(text, file=sys.stderr, flush=True)


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
