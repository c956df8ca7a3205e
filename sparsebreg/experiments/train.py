"""One training run: a method on a model and a data set."""

from __future__ import annotations

import copy
import csv
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import sparsebreg as sb
from sparsebreg import flops
from sparsebreg.convert import iter_weights
from sparsebreg.errors import RunError, check_choice, check_int, check_real, expected
from sparsebreg.experiments import data as datasets
from sparsebreg.models import MODELS

#: Default options of every method.
METHODS: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.05, "momentum": 0.9},
    "linbreg": {"lr": 1.0, "momentum": 0.9, "lam": 0.05, "init_density": 0.02},
    "ml-linbreg": {"lr": 3.0, "momentum": 0.9, "lam": 0.06, "coarse_steps": 29, "init_density": 0.02},
}

#: What a model needs otherwise. Convolutions see larger gradients, so the same step is larger for them.
FOR_MODEL: dict[tuple[str, str], dict[str, Any]] = {
    ("ml-linbreg", "convnet"): {"lr": 1.0, "lam": 0.1, "coarse_steps": 9, "init_density": 0.06},
}

#: Options that only some methods take.
SPECIAL = ("lam", "coarse_steps", "init_density")


@dataclass
class Config:
    """What a run is. None: the method's default (see ``METHODS`` and ``FOR_MODEL``)."""

    data: str = "digits"
    model: str = "mlp"
    method: str = "ml-linbreg"
    out: str = "runs/latest"
    data_dir: str | None = None
    epochs: int = 5
    batch_size: int = 128
    lr: float | None = None
    momentum: float | None = None
    delta: float = 1.0
    weight_decay: float = 0.0
    lam: float | None = None
    coarse_steps: int | None = None
    init_density: float | None = None
    schedule: str = "cosine"
    seed: int = 0
    threads: int | None = None

    def resolved(self) -> Config:
        """A copy with the method's defaults filled in. Raises TypeError or ValueError naming the option."""
        check_choice("data", self.data, datasets.DATASETS)
        check_choice("model", self.model, MODELS)
        check_choice("method", self.method, METHODS)
        check_choice("schedule", self.schedule, SCHEDULES)
        given = {k: v for k, v in asdict(self).items() if v is not None}
        for name in SPECIAL:
            if name in given and name not in METHODS[self.method]:
                raise ValueError(expected(name, f"no value for the method {self.method}", given[name]))
        defaults = {**METHODS[self.method], **FOR_MODEL.get((self.method, self.model), {})}
        c = Config(**{**defaults, **given})
        check_int("epochs", c.epochs, low=1)
        check_int("batch_size", c.batch_size, low=1)
        check_int("seed", c.seed, low=0)
        if c.init_density is not None:
            check_real("init_density", c.init_density, low=0, strict=True, high=1)
        if c.threads is not None:
            check_int("threads", c.threads, low=1)
        return c


#: Learning-rate schedules: the factor at a fraction of the run.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * min(1.0, done))),
}


class Run:
    """Model, optimizer and cycle of one configuration."""

    def __init__(self, config: Config, data: datasets.Dataset) -> None:
        self.config, self.data = config, data
        torch.manual_seed(config.seed)
        self.model: nn.Module = MODELS[config.model](data.shape, classes=data.classes)
        self.format = torch.contiguous_format
        options = {"lr": config.lr, "momentum": config.momentum, "weight_decay": config.weight_decay}
        self.cycle: sb.Multilevel | None = None
        if config.method == "sgd":
            self.optimizer: torch.optim.Optimizer = torch.optim.SGD(self.model.parameters(), **options)
        else:
            sb.sparse_init_(self.model, density=config.init_density)
            groups = sb.param_groups(self.model, sb.L1(config.lam))
            self.optimizer = sb.LinBreg(groups, delta=config.delta, **options)
            if config.method.startswith("ml-"):
                self.cycle = sb.Multilevel(self.model, self.optimizer, coarse_steps=config.coarse_steps)
        self.steps = config.epochs * math.ceil(len(data.train) / config.batch_size)
        self.schedule = self._schedule(self.optimizer)
        self.layer_flops = flops.per_layer(self.model, (1, *data.shape))
        self.flops_done = self.flops_sgd = 0.0

    def _schedule(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
        factor = SCHEDULES[self.config.schedule]
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(step / self.steps))

    def twin(self) -> Run:
        """A copy that can be trained without changing this run."""
        copied = copy.copy(self)
        copied.model, copied.optimizer, copied.cycle = copy.deepcopy((self.model, self.optimizer, self.cycle))
        copied.schedule = self._schedule(copied.optimizer)
        return copied

    def warm_up(self, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Steps of a copy, so that no run pays for first-call costs (Numba compiles, torch picks kernels).

        Models with convolutions also get the memory format in which their steps were faster, for an honest baseline.
        """
        formats = [torch.contiguous_format]
        if any(isinstance(m, nn.Conv2d) for m in self.model.modules()):
            formats.append(torch.channels_last)
        state = torch.get_rng_state()
        seconds = {}
        for memory_format in formats:
            copied = self.twin()
            copied.set_format(memory_format)
            times = []
            for _ in range(7):
                begin = time.perf_counter()
                copied.step(*batch)
                times.append(time.perf_counter() - begin)
            seconds[memory_format] = statistics.median(times[2:])
        self.set_format(min(seconds, key=seconds.get))  # type: ignore[arg-type]
        torch.set_rng_state(state)

    def set_format(self, memory_format: torch.memory_format) -> None:
        self.format = memory_format
        if memory_format is torch.channels_last:
            self.model.to(memory_format=memory_format)

    @property
    def phase(self) -> str:
        return self.cycle.phase if self.cycle else "fine"

    def step(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """One training step; returns the loss."""
        x = x.contiguous(memory_format=self.format)
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(x), y)
        loss.backward()
        (self.cycle or self.optimizer).step()
        self.schedule.step()
        return loss.detach()

    def count_flops(self, phase: str, samples: int, density: flops.StepFlops) -> None:
        """Adds what the step cost."""
        fine = density.fine if self.cycle else density.sgd
        self.flops_done += samples * (density.coarse if phase == "coarse" else fine)
        self.flops_sgd += samples * density.sgd

    @torch.no_grad()
    def accuracy(self, split: datasets.Split) -> float:
        """Percentage of correct answers."""
        self.model.eval()
        right = 0
        for i in range(0, len(split), 1000):
            x = split.images[i : i + 1000].contiguous(memory_format=self.format)
            right += int((self.model(x).argmax(1) == split.labels[i : i + 1000]).sum())
        self.model.train()
        return 100 * right / len(split)

    def density(self) -> float:
        """Active weights of linear and convolution layers as a fraction of all of theirs."""
        counts = list(iter_weights(self.model))
        return sum(a for _, a, _ in counts) / sum(t for _, _, t in counts)


def peak_rss_mb() -> float:
    """Largest resident memory of this process so far, in MB."""
    try:
        import resource
    except ImportError:  # not on Windows
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def prepare_folder(out: str | Path) -> Path:
    """The output folder, made and writable. Raises RunError."""
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise RunError(expected("out", "a folder that can be written", error)) from error
    return folder


def train(config: Config, progress: Callable[..., Any] | None = None) -> dict[str, Any]:
    """Trains as configured and writes result.json, history.csv, checkpoint.pt and curves.png.

    Args:
        progress: called as ``tqdm.tqdm``; default: no progress bar.

    Returns:
        The content of result.json. ``train_seconds`` counts training steps with all that they need (batches, swaps and
        pattern rebuilds too), not evaluation or the reading of data.

    Raises:
        TypeError, ValueError: for a wrong option; DataError, RunError; all before anything is written.
    """
    config = config.resolved()
    data = datasets.load(config.data, config.data_dir)
    if config.threads:
        torch.set_num_threads(config.threads)
    run = Run(config, data)
    folder = prepare_folder(config.out)
    run.warm_up((data.train.images[: config.batch_size], data.train.labels[: config.batch_size]))

    order = torch.Generator().manual_seed(config.seed)
    seconds: dict[str, list[float]] = {"fine": [], "coarse": []}
    history: list[dict[str, Any]] = []
    total, steps = 0.0, 0
    bar = progress(total=run.steps, desc=f"{config.method} seed {config.seed}") if progress else None
    for epoch in range(1, config.epochs + 1):
        losses = torch.zeros(())
        batches = datasets.batches(data.train, config.batch_size, order)
        step_flops = flops.step_flops(run.layer_flops, run.model)
        while True:
            phase = run.phase
            begin = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                break
            loss = run.step(*batch)
            elapsed = time.perf_counter() - begin
            total += elapsed
            steps += 1
            seconds[phase].append(elapsed)
            losses += loss * len(batch[1])
            run.count_flops(phase, len(batch[1]), step_flops)
            if phase == "fine":
                step_flops = flops.step_flops(run.layer_flops, run.model)
            if bar is not None:
                bar.update()
        mean_loss = losses.item() / len(data.train)
        if not math.isfinite(mean_loss):
            raise RunError(expected("loss", "a finite number", f"{mean_loss} in epoch {epoch} (a smaller lr may help)"))
        history.append(
            {
                "epoch": epoch,
                "steps": steps,
                "train_loss": mean_loss,
                "test_accuracy": run.accuracy(data.test),
                "density": run.density(),
                "lam": config.lam,
                "train_seconds": total,
                "flops_fraction_of_sgd": run.flops_done / run.flops_sgd,
            }
        )
        if bar is not None:
            last = history[-1]
            text = f"accuracy {last['test_accuracy']:.1f} %, density {last['density']:.1%}"
            bar.set_postfix_str(text, refresh=False)
    if bar is not None:
        bar.close()
    facts = sb.info()
    median = {k: statistics.median(v) if v else None for k, v in seconds.items()}
    result = {
        "method": config.method,
        "model": config.model,
        "data": config.data,
        "seed": config.seed,
        "epochs": config.epochs,
        "coarse_steps": config.coarse_steps,
        "lam": config.lam,
        "test_accuracy": history[-1]["test_accuracy"],
        "train_loss": history[-1]["train_loss"],
        "density": history[-1]["density"],
        "sparsity": 1 - history[-1]["density"],
        "train_seconds": total,
        "seconds_per_coarse_step": median["coarse"],
        "seconds_per_fine_step": median["fine"],
        "fine_steps": len(seconds["fine"]),
        "flops_fraction_of_sgd": history[-1]["flops_fraction_of_sgd"],
        "backend": facts.backend,
        "isa": facts.isa,
        "threads": facts.threads,
        "peak_rss_mb": peak_rss_mb(),
        "memory_format": str(run.format).removeprefix("torch."),
        "config": asdict(config),
        "info": facts.as_dict(),
    }
    _write(folder, run, result, history)
    return result


def _write(folder: Path, run: Run, result: dict[str, Any], history: list[dict[str, Any]]) -> None:
    from sparsebreg.experiments import plots

    with open(folder / "history.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, history[0].keys())
        writer.writeheader()
        writer.writerows(history)
    checkpoint = {
        "result": result,
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "schedule": {"steps": run.schedule.last_epoch},
        "cycle": run.cycle.state_dict() if run.cycle else None,
    }
    temporary = folder / "checkpoint.pt.part"
    torch.save(checkpoint, temporary)
    temporary.replace(folder / "checkpoint.pt")
    plots.curves(folder / "curves.png", {result["method"]: history})
    # Last: a result.json says that the run is complete.
    (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n")
