"""One training run: a method on a model and a data set, resumed where it stopped."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import shlex
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

import sparsebreg as sb
from sparsebreg.core.errors import RunError, expected
from sparsebreg.experiments.data import datasets
from sparsebreg.experiments.files import atomic, locked, prepare_folder, write
from sparsebreg.experiments.runs import checkpoint
from sparsebreg.experiments.runs.config import Config
from sparsebreg.experiments.runs.run import PHASES, Run, choose_format, data_facts, peak_rss_mb, warm_up
from sparsebreg.swap.costs import cpu_name

#: Set by a comparison for its runs: the process without which they stop.
PARENT = "SPARSEBREG_PARENT"


class Stopped(KeyboardInterrupt):
    """A run was told to stop, and its state is saved. ``signal`` is the signal's number."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.signal = number


class _Signals:
    """Notes the first SIGINT or SIGTERM, so that a step is finished and saved; the second one acts as usual."""

    def __init__(self) -> None:
        self.caught = 0
        self._before: dict[int, Any] = {}
        self._parent = int(os.environ.get(PARENT, 0))

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, number: int, frame: Any) -> None:
        self.caught = number
        self.__exit__()

    def __exit__(self, *error: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def stop(self) -> int:
        """The number of the signal to stop for; 0: none."""
        if self._parent and os.getppid() != self._parent:
            return signal.SIGTERM
        return self.caught


def train(config: Config, progress: Callable[..., Any] | None = None, restart: bool = False) -> dict[str, Any]:
    """Trains as configured and writes result.json, config.toml, history.csv, steps.npz, checkpoint.pt and curves.png.

    A run that was stopped goes on where it was, with the very same weights at the end; the result of a finished one is
    returned as it is.

    Args:
        progress: called as ``tqdm.tqdm``; default: no progress bar.
        restart: begin anew, whatever is in the folder.

    Returns:
        The content of result.json. ``train_seconds`` counts training steps with all that they need (batches, swaps and
        pattern rebuilds too), not evaluation, checkpoints or the reading of data.

    Raises:
        TypeError, ValueError: for a wrong option; DataError, RunError; all before anything is written. RunError: for a
        loss that is not finite, or a full disk. Stopped: for SIGINT or SIGTERM, once the state is saved.
    """
    config = config.resolved()
    sb.info()  # raises for a backend that cannot be used
    torch.set_num_threads(config.threads)
    if not restart and (result := checkpoint.finished(config)) is not None:
        return result
    data = datasets.load(config.data, config.data_dir, config.validation)
    Run(config, data)  # refuses what cannot be trained
    folder = prepare_folder(config.out)
    # The run of a comparison that was killed needs a moment to notice.
    with locked(folder, 60 if PARENT in os.environ else 0):
        if restart:
            for name in ("result.json", checkpoint.NAME):
                (folder / name).unlink(missing_ok=True)
        saved = checkpoint.load(folder, config)
        if saved and saved["data"] != data_facts(data):
            found = f"{data_facts(data)} (see --restart)"
            raise RunError(expected("data", f"images, classes and shape {saved['data']}, as in that run", found))
        memory_format = saved["memory_format"] if saved else choose_format(config, data)
        warm_up(config, data, memory_format)
        run = Run(config, data, memory_format)
        if saved:
            run.load_state_dict(saved)
        else:
            config.save(folder / "config.toml")
            run.save(folder)  # the memory format was timed: a run that is killed early goes on with the same one
        del saved
        _loop(run, folder, progress)
        return _write(run, folder)


def _loop(run: Run, folder: Path, progress: Callable[..., Any] | None) -> None:
    config = run.config
    bar = None
    if progress:
        bar = progress(total=run.steps, initial=len(run.seconds), desc=f"{config.method} seed {config.seed}")
    saved_at = time.perf_counter()
    with _Signals() as signals:
        while run.epoch < config.epochs:
            batches = run.batches.epoch()
            while True:
                phase = run.cycle.phase
                begin = time.perf_counter()
                batch = next(batches, None)
                if batch is None:
                    break
                run.data_seconds += time.perf_counter() - begin
                loss = run.step(*batch)
                run.record(phase, time.perf_counter() - begin, loss, len(batch[1]))
                if not math.isfinite(loss):
                    where = f"{loss} in epoch {run.epoch + 1}, step {len(run.seconds)}, a {phase} one"
                    kept = f"{folder / checkpoint.NAME} is of before"
                    raise RunError(expected("loss", "a finite number", f"{where} (a smaller lr may help; {kept})"))
                if bar is not None:
                    bar.update()
                if number := signals.stop():
                    run.save(folder)
                    at = f"step {len(run.seconds)} of {run.steps}"
                    raise Stopped(f"stopped after {at}; the same command goes on from there", number)
                if time.perf_counter() - saved_at >= 60 * config.checkpoint_minutes:
                    run.save(folder)
                    saved_at = time.perf_counter()
            run.end_epoch()
            run.save(folder)
            _write_history(run, folder)
            saved_at = time.perf_counter()
            if bar is not None:
                last = run.history[-1]
                accuracy = last.get("validation_accuracy", last.get("test_accuracy"))
                bar.set_postfix_str(f"accuracy {accuracy:.1f} %, density {last['density']:.1%}", refresh=False)
    if bar is not None:
        bar.close()


def _write_history(run: Run, folder: Path) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, run.history[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(run.history)
    write(folder / "history.csv", text.getvalue())


def _write(run: Run, folder: Path) -> dict[str, Any]:
    from sparsebreg.experiments.runs import plots

    config, last = run.config, run.history[-1]
    seconds, coarse = np.array(run.seconds), np.array(run.phases) == PHASES.index("coarse")
    facts = sb.info()
    test = last["test_accuracy"] if "test_accuracy" in last else run.accuracy(run.data.test)
    result = {
        "method": config.method,
        "model": config.model,
        "data": config.data,
        "seed": config.seed,
        "epochs": config.epochs,
        "coarse_steps": config.coarse_steps,
        "lam": last["lam"],
        "test_accuracy": test,
        "validation_accuracy": last.get("validation_accuracy"),
        "train_loss": last["train_loss"],
        "density": last["density"],
        "sparsity": 1 - last["density"],
        "train_seconds": last["train_seconds"],
        "fine_seconds": float(seconds[~coarse].sum()),
        "coarse_seconds": float(seconds[coarse].sum()),
        "data_seconds": run.data_seconds,
        "evaluation_seconds": run.aside["evaluation"],
        "checkpoint_seconds": run.aside["checkpoint"],
        "seconds_per_coarse_step": float(np.median(seconds[coarse])) if coarse.any() else None,
        "seconds_per_fine_step": float(np.median(seconds[~coarse])) if not coarse.all() else None,
        "steps": len(seconds),
        "fine_steps": int((~coarse).sum()),
        "flops_fraction_of_sgd": last["flops_fraction_of_sgd"],
        "backend": facts.backend,
        "isa": facts.isa,
        "threads": facts.threads,
        "peak_rss_mb": max(run.peak_mb, peak_rss_mb()),
        "memory_format": run.memory_format,
        "command": shlex.join(["sparsebreg", "train", *config.arguments()]),
        "config": asdict(config),
        "facts": checkpoint.facts(),
        "info": {**facts.as_dict(), "cpu": cpu_name()},
    }
    _write_history(run, folder)
    with atomic(folder / "steps.npz") as file:
        np.savez_compressed(
            file,
            phase=np.array(run.phases, np.uint8),
            seconds=seconds.astype(np.float32),
            loss=np.array(run.losses, np.float32),
        )
    plots.curves(folder / "curves.png", {result["method"]: run.history})
    # Last: a result.json says that the run is complete.
    write(folder / "result.json", json.dumps(result, indent=2) + "\n")
    return result
