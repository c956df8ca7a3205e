"""One training run: a method on a model and a data set, resumed where it stopped."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import platform
import shlex
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import sparsebreg as sb
from sparsebreg import flops
from sparsebreg.core.errors import RunError, expected
from sparsebreg.experiments import checkpoint
from sparsebreg.experiments import data as datasets
from sparsebreg.experiments.config import SCHEDULES, Config
from sparsebreg.experiments.files import atomic, locked, prepare_folder, write
from sparsebreg.experiments.methods import METHODS, layer_targets
from sparsebreg.experiments.timing import interleave
from sparsebreg.models import MODELS
from sparsebreg.swap.inspect import iter_masks

#: Phases by their number in steps.npz.
PHASES = ("fine", "coarse")

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


class Run:
    """Model, optimizer, cycle and data of one configuration, and how far the run has come."""

    def __init__(self, config: Config, data: datasets.Dataset, memory_format: str = "contiguous") -> None:
        self.config, self.data, self.memory_format = config, data, memory_format
        torch.manual_seed(config.seed)
        self.format = torch.channels_last if memory_format == "channels_last" else torch.contiguous_format
        self.model: nn.Module = MODELS[config.model](data.shape, classes=data.classes)
        if self.format is torch.channels_last:
            self.model.to(memory_format=self.format)
        self.batches = datasets.Batches(data, config.batch_size, config.seed, bool(config.augment))
        self.steps = config.epochs * len(self.batches)
        self.optimizer, self.cycle = METHODS[config.method].build(self.model, config, self.steps)
        self.lam: Any = None
        if config.target_sparsity is not None and METHODS[config.method].bregman:
            steps = self.cycle if isinstance(self.cycle, sb.Multilevel) else self.optimizer
            targets = layer_targets(self.model, config) if config.per_layer else False
            ramp = round(config.ramp * self.steps)  # type: ignore[operator]
            self.lam = sb.LambdaScheduler(
                steps, config.target_sparsity, targets, ramp="linear" if ramp else None, ramp_steps=ramp
            )
        self.schedule = self._schedule(self.optimizer)
        self.layer_flops = flops.per_layer(self.model, (1, *data.shape))
        self.step_flops = flops.step_flops(self.layer_flops, self.model)
        self.flops_done = self.flops_sgd = self.loss_sum = 0.0
        self.epoch = 0
        self.history: list[dict[str, Any]] = []
        #: Which weights were active at the end of the last epoch, by layer.
        self.active = dict(iter_masks(self.model))
        #: Of every step so far: number in PHASES, seconds, loss.
        self.phases: list[int] = []
        self.seconds: list[float] = []
        self.losses: list[float] = []
        #: Seconds outside of training steps.
        self.aside = {"evaluation": 0.0, "checkpoint": 0.0}
        #: Seconds inside of training steps that went into taking batches and augmentation.
        self.data_seconds = 0.0
        self.peak_mb = 0.0

    def _schedule(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
        factor = SCHEDULES[self.config.schedule]
        rise = max(1.0, self.config.warmup * len(self.batches))  # type: ignore[operator]
        return torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, (step + 1) / rise) * factor(step / self.steps)
        )

    def step(self, x: torch.Tensor, y: torch.Tensor) -> float:
        """One training step; returns the loss."""
        x = x.contiguous(memory_format=self.format)
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(x), y)
        value = loss.item()
        if math.isfinite(value):  # else the weights stay what they were
            loss.backward()
            self.cycle.step()
            if self.lam is not None:
                self.lam.step()
            self.schedule.step()
        return value

    def record(self, phase: str, seconds: float, loss: float, samples: int) -> None:
        """Notes a step that was taken in ``phase``."""
        self.phases.append(PHASES.index(phase))
        self.seconds.append(seconds)
        self.losses.append(loss)
        self.loss_sum += loss * samples
        cost = self.step_flops
        fine = cost.fine if isinstance(self.cycle, sb.Multilevel) else cost.sgd
        self.flops_done += samples * (cost.coarse if phase == "coarse" else fine)
        self.flops_sgd += samples * self.step_flops.sgd
        if phase == "fine":
            self.step_flops = flops.step_flops(self.layer_flops, self.model)

    @torch.no_grad()
    def accuracy(self, split: datasets.Split) -> float:
        """Percentage of correct answers."""
        self.model.eval()
        right = 0
        size = self.config.batch_size  # larger ones would need more memory than training does
        for images, labels in zip(split.images.split(size), split.labels.split(size), strict=True):
            x = self.data.standardise(images).contiguous(memory_format=self.format)
            right += int((self.model(x).argmax(1) == labels).sum())
        self.model.train()
        return 100 * right / len(split)

    def present_lam(self) -> float | None:
        """λ of the regularised weights now: the mean over their groups."""
        values = [g["reg"].lam for g in self.optimizer.param_groups if getattr(g.get("reg"), "lam", None) is not None]
        return statistics.mean(values) if values else None

    def end_epoch(self) -> None:
        """Evaluates, and adds a row to the history."""
        begin = time.perf_counter()
        # With a validation split the test images are not looked at before the end.
        held = self.data.validation
        kind, split = ("validation", held) if held is not None else ("test", self.data.test)
        accuracy = self.accuracy(split)
        self.aside["evaluation"] += time.perf_counter() - begin
        before, self.active = self.active, dict(iter_masks(self.model))
        counts = [(n, int(mask.sum()), mask.numel()) for n, mask in self.active.items()]
        woke = {n: int((mask & ~before[n]).sum()) for n, mask in self.active.items()}
        died = {n: int((before[n] & ~mask).sum()) for n, mask in self.active.items()}
        self.epoch += 1
        self.history.append(
            {
                "epoch": self.epoch,
                "steps": len(self.seconds),
                "train_loss": self.loss_sum / len(self.data.train),
                f"{kind}_accuracy": accuracy,
                "density": sum(a for _, a, _ in counts) / sum(t for _, _, t in counts),
                "lam": self.present_lam(),
                "gap": self.lam.gap if self.lam is not None else None,
                "woke": sum(woke.values()),
                "died": sum(died.values()),
                "train_seconds": sum(self.seconds),
                "evaluation_seconds": self.aside["evaluation"],
                "flops": self.flops_done,
                "flops_fraction_of_sgd": self.flops_done / self.flops_sgd,
                **{f"density.{n}": a / t for n, a, t in counts},
                **{f"woke.{n}": count for n, count in woke.items()},
                **{f"died.{n}": count for n, count in died.items()},
            }
        )
        self.loss_sum = 0.0

    def state_dict(self) -> dict[str, Any]:
        """All that the run needs to go on from here bit by bit; loads with ``torch.load(weights_only=True)``."""
        return {
            "cycle": self.cycle.state_dict(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lam": self.lam.state_dict() if self.lam is not None else None,
            "schedule": self.schedule.state_dict(),
            "batches": self.batches.state_dict(),
            "rng": torch.get_rng_state(),
            "memory_format": self.memory_format,
            "data": data_facts(self.data),
            "epoch": self.epoch,
            "history": self.history,
            "active": {n: torch.from_numpy(np.packbits(mask.numpy())) for n, mask in self.active.items()},
            "phases": torch.tensor(self.phases, dtype=torch.uint8),
            "seconds": torch.tensor(self.seconds, dtype=torch.float64),
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "loss_sum": self.loss_sum,
            "flops": (self.flops_done, self.flops_sgd, self.step_flops.dense, self.step_flops.sparse),
            "aside": self.aside,
            "data_seconds": self.data_seconds,
            "peak_mb": max(self.peak_mb, peak_rss_mb()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Of a run that has taken no step, in the same memory format."""
        self.cycle.load_state_dict(state["cycle"])  # first: it brings the layers into their phase
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.lam is not None:
            self.lam.load_state_dict(state["lam"])
        self.schedule.load_state_dict(state["schedule"])
        self.batches.load_state_dict(state["batches"])
        for name in ("epoch", "history", "loss_sum", "aside", "data_seconds", "peak_mb"):
            setattr(self, name, state[name])
        for name in ("phases", "seconds", "losses"):
            setattr(self, name, state[name].tolist())
        for name, mask in self.active.items():
            bits = np.unpackbits(state["active"][name].numpy(), count=mask.numel())
            self.active[name] = torch.from_numpy(bits).bool().view(mask.shape)
        self.flops_done, self.flops_sgd, dense, sparse = state["flops"]
        self.step_flops = flops.StepFlops(dense, sparse)
        torch.set_rng_state(state["rng"])

    def save(self, folder: Path) -> None:
        """Writes the checkpoint. Raises RunError for weights that are not finite, or no room; the old one stays."""
        begin = time.perf_counter()
        for name, p in self.model.named_parameters():
            if not p.isfinite().all():
                raise RunError(
                    expected(f"weights of '{name}'", "finite numbers", f"others after step {len(self.seconds)}")
                )
        checkpoint.save(folder, self.config, self.state_dict())
        self.aside["checkpoint"] += time.perf_counter() - begin


def choose_format(config: Config, data: datasets.Dataset) -> str:
    """The memory format of a run.

    Where it is "auto", the faster one for methods that train dense weights, for an honest baseline: their steps are
    timed in both, in turns. Sparse convolutions compute in a layout of their own; what is left gains nothing.
    """
    if config.memory_format != "auto":
        return config.memory_format
    if not METHODS[config.method].dense:
        return "contiguous"
    runs = [Run(config, data, name) for name in ("contiguous", "channels_last")]
    if not any(isinstance(m, nn.Conv2d) for m in runs[0].model.modules()):
        return "contiguous"
    first = data.train.take(torch.arange(min(config.batch_size, len(data.train))))
    x = data.standardise(first.images)
    contiguous, channels_last = np.median(
        interleave([lambda run=run: run.step(x, first.labels) for run in runs], budget=2.0), axis=0
    )
    return "channels_last" if channels_last < contiguous else "contiguous"


def warm_up(config: Config, data: datasets.Dataset, memory_format: str) -> None:
    """Steps that nobody counts: no run pays for first-call costs (Numba compiles, torch picks kernels)."""
    run = Run(config, data, memory_format)
    first = data.train.take(torch.arange(min(config.batch_size, len(data.train))))
    for _ in range(3):
        run.step(data.standardise(first.images), first.labels)


def data_facts(data: datasets.Dataset) -> list[int]:
    """Sizes of a data set that a run must have in common with the one it goes on with."""
    return [len(data.train), len(data.test), data.classes, *data.shape]


def cpu_name() -> str:
    """What the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


def peak_rss_mb() -> float:
    """Largest resident memory of this process so far, in MB."""
    try:
        import resource
    except ImportError:  # not on Windows
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


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
    from sparsebreg.experiments import plots

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
