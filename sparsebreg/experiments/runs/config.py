"""What a training run is: a dataclass, a TOML file, and words on a command line."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from sparsebreg.core.errors import check_choice, check_int, check_real, expected
from sparsebreg.experiments.data.datasets import DATASETS
from sparsebreg.experiments.files import write
from sparsebreg.experiments.runs.methods import FOR_DATA, METHODS, special
from sparsebreg.models import MODELS
from sparsebreg.optim.initialize import DISTRIBUTIONS

#: Learning-rate schedules: the factor at a fraction of the run.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * min(1.0, done))),
    "step": lambda done: 0.1 ** ((done >= 0.5) + (done >= 0.75)),
}

FORMATS = ("auto", "contiguous", "channels_last")

#: Options that do not change what a run computes: a run may be resumed with others.
FREE = ("out", "data_dir", "checkpoint_minutes")


@dataclass
class Config:
    """What a run is. None: the default of the method, model or data set (see ``METHODS`` and ``FOR_DATA``).

    Where nothing else is said ``epochs`` is 5, ``augment`` off, ``weight_decay`` and ``warmup`` (epochs over which the
    learning rate rises) 0, and ``threads`` torch's own number. ``sparse_lr`` is the learning rate of regularised
    weights as a multiple of ``lr``. With ``per_layer`` every layer has a target of its own, distributed as
    ``init_distribution``. ``ramp`` is the part of the run, from 0 to 1, in which the target moves evenly from the
    sparsity of the start. ``keep_momentum`` is that of :class:`sparsebreg.LinBreg`.
    """

    data: str = "digits"
    model: str = "mlp"
    method: str = "ml-linbreg"
    out: str = "runs/latest"
    data_dir: str | None = None
    validation: float = 0.0
    augment: bool | None = None
    epochs: int | None = None
    batch_size: int = 128
    lr: float | None = None
    sparse_lr: float | None = None
    warmup: float | None = None
    momentum: float | None = None
    delta: float = 1.0
    weight_decay: float | None = None
    lam: float | None = None
    target_sparsity: float | None = None
    per_layer: bool | None = None
    ramp: float | None = None
    coarse_steps: int | None = None
    keep_momentum: bool | None = None
    init_density: float | None = None
    init_distribution: str | None = None
    schedule: str = "cosine"
    seed: int = 0
    threads: int | None = None
    memory_format: str = "auto"
    checkpoint_minutes: float = 10.0

    def resolved(self) -> Config:
        """A copy with the defaults filled in. Raises TypeError or ValueError naming the option."""
        check_choice("data", self.data, DATASETS)
        check_choice("model", self.model, MODELS)
        check_choice("method", self.method, METHODS)
        check_choice("schedule", self.schedule, SCHEDULES)
        check_choice("memory_format", self.memory_format, FORMATS)
        method = METHODS[self.method]
        given = {k: v for k, v in asdict(self).items() if v is not None}
        for name in special() - set(method.defaults):
            if name in given:
                raise ValueError(expected(name, f"no value for the method {self.method}", given[name]))
        defaults = {"epochs": 5, "augment": False, "warmup": 0.0, "weight_decay": 0.0}
        defaults["threads"] = torch.get_num_threads()
        if self.target_sparsity is not None:
            target = check_real("target_sparsity", self.target_sparsity, low=0, strict=True)
            if target >= 1:
                raise ValueError(expected("target_sparsity", "a number below 1", self.target_sparsity))
        defaults |= method.options(self.model, self.target_sparsity)
        defaults |= {k: v for k, v in FOR_DATA.get(self.data, {}).items() if k in method.defaults or k not in special()}
        c = Config(**{**defaults, **given})
        for name in ("augment", "per_layer", "keep_momentum"):
            if not isinstance(getattr(c, name), (bool, type(None))):
                raise TypeError(expected(name, "true or false", repr(getattr(c, name))))
        for name in ("out", "data_dir"):
            if not isinstance(getattr(c, name), (str, type(None))):
                raise TypeError(expected(name, "a path", repr(getattr(c, name))))
        for name in ("epochs", "batch_size", "threads"):
            check_int(name, getattr(c, name), low=1)
        for name in ("seed", "coarse_steps"):
            if getattr(c, name) is not None:
                check_int(name, getattr(c, name), low=0)
        for name in ("lr", "sparse_lr", "warmup", "lam", "momentum", "weight_decay", "checkpoint_minutes"):
            if getattr(c, name) is not None:
                check_real(name, getattr(c, name), low=0)
        check_real("delta", c.delta, low=0, strict=True)
        if c.ramp is not None:
            check_real("ramp", c.ramp, low=0, high=1)
            if c.ramp and c.target_sparsity is None:
                raise ValueError(expected("ramp", "no value without a target sparsity", c.ramp))
        if check_real("validation", c.validation, low=0) >= 1:
            raise ValueError(expected("validation", "a fraction below 1", c.validation))
        if c.init_density is not None:
            check_real("init_density", c.init_density, low=0, strict=True, high=1)
        if c.init_distribution is not None:
            check_choice("init_distribution", c.init_distribution, DISTRIBUTIONS)
        return c

    def arguments(self) -> list[str]:
        """The words of ``sparsebreg train`` that give this configuration."""
        return words(asdict(self))

    def same_run(self, other: dict[str, Any]) -> str | None:
        """The first option, spelled out, in which a saved run is another one; None where it is the same."""
        for name, value in asdict(self).items():
            if name not in FREE and other.get(name) != value:
                return expected(name, f"{other.get(name)}, as in that run", value)
        return None

    def save(self, path: Path) -> None:
        """Writes a TOML file that :func:`read_toml` takes; options without a value are left out."""
        import tomli_w

        write(path, tomli_w.dumps({k: v for k, v in asdict(self).items() if v is not None}))


def words(options: dict[str, Any]) -> list[str]:
    """Options as words of a command line; None is left out, a list gets commas."""
    out = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            out.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            out += [f"--{flag}", ",".join(map(str, value)) if isinstance(value, list) else str(value)]
    return out


def read_toml(path: str | Path, more: tuple[str, ...] = ()) -> dict[str, Any]:
    """The options in a TOML file, ``coarse-steps`` or ``coarse_steps`` alike.

    Args:
        more: keys taken besides the names of :class:`Config`.

    Raises:
        ValueError: for a file that cannot be read or an unknown option.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        with open(path, "rb") as file:
            options = {k.replace("-", "_"): v for k, v in tomllib.load(file).items()}
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(expected("config", "a readable TOML file", f"{path}: {error}")) from error
    known = [*(f.name for f in fields(Config)), *more]
    for name in options:
        check_choice(f"config: option in {path}", name, known)
    return options
