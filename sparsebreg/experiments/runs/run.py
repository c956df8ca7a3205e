"""The state of a training run, and its steps."""

import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import sparsebreg as sb
from sparsebreg import flops
from sparsebreg.core.errors import RunError, expected
from sparsebreg.experiments.data import datasets
from sparsebreg.experiments.data.batches import Batches
from sparsebreg.experiments.runs import checkpoint
from sparsebreg.experiments.runs.config import SCHEDULES, Config
from sparsebreg.experiments.runs.methods import METHODS, layer_targets
from sparsebreg.experiments.timing import interleave
from sparsebreg.models import MODELS
from sparsebreg.swap.inspect import iter_masks

#: Phases by their number in steps.npz.
PHASES = ("fine", "coarse")


class Run:
    """Model, optimizer, cycle and data of one configuration, and how far the run has come."""

    def __init__(self, config: Config, data: datasets.Dataset, memory_format: str = "contiguous") -> None:
        self.config, self.data, self.memory_format = config, data, memory_format
        torch.manual_seed(config.seed)
        self.format = torch.channels_last if memory_format == "channels_last" else torch.contiguous_format
        self.model: nn.Module = MODELS[config.model](data.shape, classes=data.classes)
        if self.format is torch.channels_last:
            self.model.to(memory_format=self.format)
        self.batches = Batches(data, config.batch_size, config.seed, bool(config.augment))
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


def peak_rss_mb() -> float:
    """Largest resident memory of this process so far, in MB."""
    try:
        import resource
    except ImportError:  # not on Windows
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
