"""What a swap did, layer by layer."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from tabulate import tabulate
from torch import nn

from sparsebreg.core.pattern import SparsePattern
from sparsebreg.nn.layer import Frozen, plain_class
from sparsebreg.optim.groups import dense_layers


@dataclass(frozen=True)
class LayerReport:
    """What was done with one layer.

    ``action`` is "sparse" or "dense"; ``reason`` says why. Output rows and input channels without any active weight are
    counted in ``empty_rows`` and ``empty_channels``.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    nnz: int
    action: str
    reason: str
    empty_rows: int = 0
    empty_channels: int = 0

    @property
    def density(self) -> float:
        return self.nnz / max(1, math.prod(self.shape))

    @property
    def empty(self) -> str:
        """Rows and channels without an active weight, as text."""
        pairs = (("rows", self.empty_rows, self.shape[:1]), ("channels", self.empty_channels, self.shape[1:2]))
        return ", ".join(f"{n} of {of[0]} {what}" for what, n, of in pairs if n)

    @property
    def remaining(self) -> tuple[int, int]:
        """Rows and columns of the weight as a matrix, without its empty rows and channels."""
        rows, channels, *kernel = self.shape
        return rows - self.empty_rows, (channels - self.empty_channels) * math.prod(kernel)


@dataclass(frozen=True)
class SwapReport:
    """What a swap did, layer by layer; prints as a table.

    Below it stand weights of other modules, which stay dense, how many of all weights are in sparse layers now, layers
    that have no active weight left, matrices that have become smaller, and operations that unpacked lane tensors since
    the swap: print the report after a training step to see what a model should avoid.

    Attributes:
        layers: linear and convolution layers.
        others: weights of two dimensions or more that belong to other modules (embeddings, attention, LSTMs), by the
            parameter's name.
    """

    layers: list[LayerReport] = field(default_factory=list)
    others: list[LayerReport] = field(default_factory=list)
    _unpacked: Counter[str] = field(default_factory=Counter, repr=False, compare=False)

    @property
    def sparse(self) -> list[LayerReport]:
        return [r for r in self.layers if r.action == "sparse"]

    @property
    def dense(self) -> list[LayerReport]:
        return [r for r in self.layers if r.action == "dense"]

    @property
    def dead(self) -> list[LayerReport]:
        """Layers without any active weight."""
        return [r for r in self.layers if r.shape and not r.nnz]

    @property
    def unpacked(self) -> dict[str, int]:
        """Operations that unpacked this model's lane tensors since the swap, by name, with how often they did."""
        return dict(self._unpacked)

    def counts_for(self, state: Frozen) -> None:
        """Makes the lane tensors of a layer count their unpackings in this report."""
        state.lanes, state.unpacked = True, self._unpacked

    @property
    def density(self) -> float:
        """Active weights of all listed layers as a fraction of all their weights."""
        return sum(r.nnz for r in self.layers) / max(1, sum(math.prod(r.shape) for r in self.layers))

    def __str__(self) -> str:
        rows = [
            (r.name, r.kind, "x".join(map(str, r.shape)), f"{r.density:.2%}", r.empty, r.action, r.reason)
            for r in self.layers
        ]
        table = tabulate(rows, ("layer", "kind", "shape", "density", "empty", "now", "why"), disable_numparse=True)
        lines = [table, f"{len(self.sparse)} of {len(self.layers)} layers sparse, density {self.density:.2%}"]
        total = max(1, sum(math.prod(r.shape) for r in (*self.layers, *self.others)))
        if self.others:
            shares = ", ".join(f"{r.name} ({r.kind}, {math.prod(r.shape) / total:.1%})" for r in self.others)
            lines.append(f"other weights, which stay dense: {shares}")
        share = sum(math.prod(r.shape) for r in self.sparse) / total
        lines.append(f"sparse layers hold {share:.1%} of the model's weights")
        if self.dead:
            lines.append(f"no active weight is left in: {', '.join(r.name for r in self.dead)}")
        for r in self.layers:
            if r.nnz and r.empty:
                (rows, cols), whole = r.remaining, (r.shape[0], math.prod(r.shape[1:]))
                lines.append(f"{r.name}: the pattern is {rows}x{cols} of {whole[0]}x{whole[1]} as a matrix")
        if self.unpacked:
            found = ", ".join(f"{name} ({n} times)" for name, n in self.unpacked.items())
            lines.append(f"unpacked lane tensors since the swap: {found}")
        return "\n".join(lines)


def report_of(model: nn.Module, patterns: Mapping[str, SparsePattern], masks: Mapping[str, torch.Tensor]) -> SwapReport:
    """The report of a frozen state from a checkpoint: patterns of sparse layers and masks of the others, by name."""
    layers = []
    for name, module in dense_layers(model):
        if name in patterns or f"{name}.weight" in masks:
            pattern = patterns.get(name) or SparsePattern.from_mask(masks[f"{name}.weight"])
            action = "sparse" if name in patterns else "dense"
            empty = pattern.empty_rows, pattern.empty_channels
            kind = plain_class(module).__name__
            reason = "as in the checkpoint"
            layers.append(LayerReport(name, kind, pattern.shape, pattern.nnz, action, reason, *empty))
    return SwapReport(layers)
