"""What a layer costs, sparse and dense: predicted from constants of the machine, or measured.

A forward and backward pass takes ``(a · weights + b · io) · positions / threads + c`` ns. ``weights`` counts the active
ones where the layer is sparse; ``io`` the numbers read and written at a position: a sample of a linear layer, an output
pixel of a convolution. The package brings a, b, c of one machine; :func:`calibrate` measures this one.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tabulate import tabulate
from torch import nn

from sparsebreg import backends, lanes
from sparsebreg._version import __version__
from sparsebreg.core.errors import expected
from sparsebreg.core.pattern import SparsePattern
from sparsebreg.nn.conv2d import geometry_of
from sparsebreg.nn.layer import KINDS, plain_class

__all__ = ["Calibration", "calibrate"]

#: a, b, c by kind of layer, then by how it is computed; float32.
Costs = dict[str, dict[str, tuple[float, float, float]]]

#: Measured with AVX-512 (2 processors, torch 2.13): within 10 to 25 % (rms) of linear layers from 784 x 512 to
#: 4096 x 4096 and of convolutions from 64 to 512 channels, batch 128, at 10 to 1 % density. Pointwise ones are a
#: compromise: torch maps and unmaps tensors of many MB at every step, so that a number costs up to twice as much at
#: batch 128 as at 32.
SHIPPED: Costs = {
    "linear": {"dense": (0.047, 0.9, 58e3), "sparse": (0.130, 2.35, 95e3)},
    "conv": {
        "dense": (0.0300, 5.50, 150e3),
        "channels_last": (0.0320, 2.80, 150e3),
        "sparse": (0.083, 2.10, 150e3),
        "lanes": (0.077, 1.35, 150e3),
    },
    "pointwise": {
        "dense": (0.0300, 5.7, 150e3),
        "channels_last": (0.0450, 1.3, 150e3),
        "sparse": (0.115, 1.65, 150e3),
        "lanes": (0.105, 1.1, 150e3),
    },
}

#: Ways to compute over the active weights only, on ordinary tensors and on those of a neighbouring sparse convolution.
SPARSE = ("sparse", "lanes")

#: From this size on a layer's time is that of its weights and numbers at any batch size, not that of its calls.
LARGE = 1 << 14


class Load(NamedTuple):
    """The work of a layer: weights and numbers moved per position, and the number of positions.

    ``scale`` is its dtype's size beside float32. ``positions`` is None where the input's shape is not known; sparse
    kernels compute ``padded`` ones, whole blocks of 16 samples.
    """

    kind: str
    weights: int
    io: int
    scale: float
    positions: int | None = None
    padded: int | None = None

    @classmethod
    def of(cls, module: nn.Module, x_shape: Sequence[int] | None = None) -> Load | None:
        """The load of a layer; None for kinds that the cost model does not cover (grouped convolutions, others)."""
        weight = module.weight
        scale = weight.dtype.itemsize / 4
        if isinstance(module, nn.Linear):
            load = cls("linear", weight.numel(), sum(weight.shape), scale)
            samples, pixels = (math.prod(x_shape[:-1]), 1) if x_shape else (0, 0)
        elif isinstance(module, nn.Conv2d) and module.groups == 1:
            kind = "pointwise" if math.prod(module.kernel_size) == 1 else "conv"
            io = module.in_channels * math.prod(module.stride) + module.out_channels
            load = cls(kind, weight.numel(), io, scale)
            samples, pixels = (math.prod(x_shape[:-3]), 0) if x_shape else (0, 0)
            if x_shape:
                pixels = math.prod(geometry_of(module).output_size(tuple(x_shape[-2:]), tuple(module.kernel_size)))
        else:
            return None
        if x_shape is None or not samples * pixels:
            return load
        return load._replace(positions=samples * pixels, padded=lanes.blocks(samples) * lanes.LANES * pixels)

    def milliseconds(self, costs: Costs, how: str, weights: float) -> float:
        """The time of a pass over so many weights; with one thread and one position where these are not known."""
        a, b, c = costs[self.kind][how]
        count = self.padded if how in SPARSE else self.positions
        return 1e-6 * ((a * weights + b * self.io) * self.scale * count / torch.get_num_threads() + c)

    def break_even(self, costs: Costs, sparse: str, dense: str) -> float | None:
        """The density in [0, 1] at which both take as long; None where that depends on an input shape not known."""
        a, b, c = costs[self.kind][sparse]
        if self.positions is not None:
            left = 1e6 * self.milliseconds(costs, dense, self.weights) - c
            per_position = left * torch.get_num_threads() / (self.scale * self.padded)
        elif self.weights >= LARGE:
            dense_a, dense_b, _ = costs[self.kind][dense]
            per_position = dense_a * self.weights + dense_b * self.io
        else:
            return None
        return min(1.0, max(0.0, (per_position - b * self.io) / (a * max(1, self.weights))))


def _step(layer: nn.Module, x: torch.Tensor, how: str) -> Callable[[], None]:
    """A closure that runs a forward and backward pass; it may change ``layer``."""
    if how == "lanes":
        layer.state.lanes, x = True, lanes.from_plain(x)
    elif how == "channels_last":
        layer, x = (t.to(memory_format=torch.channels_last) for t in (layer, x))
    x = x.detach().requires_grad_()
    grad = layer(x).detach()

    def step() -> None:
        x.grad = None
        layer.zero_grad()
        layer(x).backward(grad)

    return step


def _medians(steps: Iterable[Callable[[], None]], rounds: int = 7, seconds: float = 1.0) -> list[float]:
    """Median ms of every step. They take turns, so that a slow spell of the machine hits each of them."""
    steps = list(steps)
    times: list[list[float]] = [[] for _ in steps]
    for step in steps:
        step()
    begin = time.perf_counter()
    # At least three; large layers stop there.
    while len(times[-1]) < 3 or (len(times[-1]) < rounds and time.perf_counter() - begin < seconds):
        for step, found in zip(steps, times, strict=True):
            at = time.perf_counter()
            step()
            found.append(1e3 * (time.perf_counter() - at))
    return [statistics.median(t) for t in times]


def _random(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    with torch.random.fork_rng(devices=[]):  # nobody else's numbers change
        return torch.randn(tuple(shape), dtype=dtype)


def measure(
    module: nn.Module, pattern: SparsePattern, x_shape: Sequence[int], sparse: str, dense: str
) -> tuple[float, float]:
    """Median ms of a forward and backward pass of this layer, (sparse, dense), taking turns after a warm-up.

    Args:
        module: a layer that has a sparse form; neither it nor its gradient is changed.
        pattern: its active weights.
        x_shape: of its input.
        sparse, dense: how each is computed; as in :data:`Costs`.
    """
    layer = KINDS[plain_class(module)].over(module, pattern)
    if module.bias is not None:
        layer.bias = nn.Parameter(module.bias.detach().clone())
    twin, x = layer.to_dense(), _random(x_shape, module.weight.dtype)
    a, b = _medians([_step(layer, x, sparse), _step(twin, x, dense)])
    return a, b


#: What is timed: arguments of the layer and shape of its input; a tiny one shows what a call costs.
_CASES: dict[str, list[tuple[tuple[int, ...], tuple[int, ...]]]] = {
    "linear": [((512, 512), (128, 512)), ((1024, 1024), (128, 1024)), ((2048, 256), (64, 2048)), ((16, 16), (16, 16))],
    "conv": [
        ((64, 64, 3, 1, 1), (32, 64, 12, 12)),
        ((128, 128, 3, 1, 1), (32, 128, 6, 6)),
        ((64, 128, 3, 2, 1), (32, 64, 16, 16)),
        ((4, 4, 3), (16, 4, 4, 4)),
    ],
    "pointwise": [
        ((128, 128, 1), (32, 128, 12, 12)),
        ((64, 128, 1, 2), (32, 64, 24, 24)),
        ((256, 256, 1), (32, 256, 4, 4)),
        ((4, 4, 1), (16, 4, 4, 4)),
    ],
}
_DENSITIES = (0.15, 0.02)


def _fit(rows: list[tuple[float, float, float]], times: list[float]) -> tuple[float, float, float]:
    """a, b, c of at least 0 with the least sum of squared relative errors; a above 0."""
    weighted = np.array(rows) / np.array(times)[:, None]
    used = [0, 1, 2]
    while True:
        found = np.linalg.lstsq(weighted[:, used], np.ones(len(times)), rcond=None)[0]
        negative = [k for k, value in zip(used, found, strict=True) if value < 0 or (k == 0 and value == 0)]
        if not negative or used == [0]:
            a, b, c = (float(found[used.index(k)]) if k in used else 0.0 for k in range(3))
            return max(a, 1e-6), b, c
        used.remove(negative[0] or used[1])  # never a


def _fitted(kind: str) -> dict[str, tuple[float, float, float]]:
    threads = torch.get_num_threads()
    rows: dict[str, list[tuple[float, float, float]]] = {how: [] for how in SHIPPED[kind]}
    times: dict[str, list[float]] = {how: [] for how in SHIPPED[kind]}
    with_lanes = backends.current().lanes
    for arguments, shape in _CASES[kind]:
        module = (nn.Linear if kind == "linear" else nn.Conv2d)(*arguments)
        x, load = _random(shape), Load.of(module, shape)
        found = []  # how, weights, step
        for how in SHIPPED[kind]:
            if how not in SPARSE:
                found.append((how, load.weights, _step(copy.deepcopy(module), x, how)))
            elif how != "lanes" or with_lanes:
                for density in _DENSITIES:
                    layer = KINDS[type(module)].from_dense(module, torch.rand_like(module.weight) < density)
                    found.append((how, layer.pattern.nnz, _step(layer, x, how)))
        for (how, weights, _), ms in zip(found, _medians((s for *_, s in found), 5, 0.15), strict=True):
            count = (load.padded if how in SPARSE else load.positions) / threads
            rows[how].append((weights * count, load.io * count, 1.0))
            times[how].append(1e6 * ms)
    costs = {how: _fit(rows[how], times[how]) for how in rows if rows[how]}
    return costs if len(costs) == len(rows) else {**costs, "lanes": costs["sparse"]}


@dataclass(frozen=True)
class Calibration:
    """What :func:`calibrate` found, and where it is kept (None: nowhere); prints as a table."""

    costs: Costs
    path: Path | None
    seconds: float

    def __str__(self) -> str:
        rows = [(kind, how, *terms) for kind, table in self.costs.items() for how, terms in table.items()]
        head = ("layer", "computed", "ns per weight", "ns per number", "ns per call")
        table = tabulate(rows, head, floatfmt=("", "", ".4f", ".2f", ".0f"))
        return f"{table}\nmeasured in {self.seconds:.1f} s; kept in {self.path or 'no file'}"


def calibrate() -> Calibration:
    """Measures what layers cost on this machine, in a few seconds, and keeps it for ``SparsifyConfig(decide="auto")``.

    It holds for this version of the package and of torch, this backend, instruction set, CPU and number of threads, and
    is kept in ``$SPARSEBREG_CACHE``, else ``$XDG_CACHE_HOME/sparsebreg``, else ``~/.cache/sparsebreg``; an empty
    ``SPARSEBREG_CACHE`` keeps nothing, and so does a folder that cannot be written to. Runs that have begun go on with
    what they began with.
    """
    begin = time.perf_counter()
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        costs = {kind: _fitted(kind) for kind in SHIPPED}
    return Calibration(costs, _write(costs), time.perf_counter() - begin)


# The cache.


def _folder() -> Path | None:
    if (named := os.environ.get("SPARSEBREG_CACHE")) is not None:
        return Path(named) if named else None
    with suppress(RuntimeError):  # no home
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparsebreg"
    return None


@functools.cache
def cpu_name() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _key() -> dict[str, Any]:
    """The conditions under which calibrated constants are valid."""
    backend = backends.current()
    return {
        "version": __version__,
        "torch": str(torch.__version__),
        "backend": backend.name,
        "isa": getattr(backend, "isa", ""),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
    }


def _path(key: dict[str, Any]) -> Path | None:
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    return folder / f"costs-{digest}.json" if (folder := _folder()) else None


def _write(costs: Costs) -> Path | None:
    key = _key()
    if (path := _path(key)) is None:
        return None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as aside:  # whole or not at all
            file = Path(aside) / path.name
            file.write_text(json.dumps({"key": key, "costs": costs}, indent=1))
            file.replace(path)
    except OSError:
        return None
    return path


def checked(costs: Any) -> Costs:
    """Costs that came from a file. Raises KeyError, TypeError or ValueError for anything else."""
    found = {k: {how: tuple(map(float, costs[k][how])) for how in table} for k, table in SHIPPED.items()}
    for terms in (t for table in found.values() for t in table.values()):
        if len(terms) != 3 or not all(map(math.isfinite, terms)) or min(terms) < 0 or terms[0] == 0:
            raise ValueError(expected("costs", "three finite numbers of at least 0, the first above 0", terms))
    return found


def current() -> tuple[Costs, str]:
    """The constants that "auto" decides by, and where they are from: the calibration's file, or "shipped"."""
    key = _key()
    if (path := _path(key)) is not None:
        with suppress(OSError, KeyError, TypeError, ValueError):  # missing or damaged: as if there were none
            saved = json.loads(path.read_text())
            if saved["key"] == key:
                return checked(saved["costs"]), str(path)
    return SHIPPED, "shipped"
