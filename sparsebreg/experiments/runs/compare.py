"""Several methods on the same tasks: separate processes that can be stopped and gone on with, one table, one report."""

import csv
import importlib
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, Any

import torch

import sparsebreg as sb
from sparsebreg.core.errors import RunError, expected
from sparsebreg.experiments.data.datasets import load
from sparsebreg.experiments.files import prepare_folder, write
from sparsebreg.experiments.runs import checkpoint, plots
from sparsebreg.experiments.runs.config import Config, words
from sparsebreg.experiments.runs.plan import Key, by_method, options, plan
from sparsebreg.experiments.runs.summary import row
from sparsebreg.experiments.runs.train import PARENT, Stopped
from sparsebreg.models import MODELS

#: What a comparison needs at its end, or while it runs: better missed before the first run.
PACKAGES = ("jinja2", "matplotlib", "rich", "tabulate", "tomli_w")


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

    from sparsebreg.experiments.runs.progress import Progress

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
    from sparsebreg.experiments.runs import report

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
