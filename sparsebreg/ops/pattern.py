"""The two crossings between dense and sparse, as differentiable operators: each is the other's gradient."""

from __future__ import annotations

from typing import Any

import torch

from sparsebreg.core.pattern import SparsePattern
from sparsebreg.ops.library import Operation, Places, below_autograd, register


class Gather(Operation):
    @staticmethod
    def forward(dense, pattern):
        return below_autograd(_gather, dense, pattern.rowptr, pattern.col)

    @staticmethod
    def setup_context(ctx: Any, inputs, output) -> None:
        ctx.pattern = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad):
        return Scatter.apply(grad, ctx.pattern), None


class Scatter(Operation):
    @staticmethod
    def forward(values, pattern):
        return below_autograd(_scatter, values, pattern.rowptr, pattern.col, pattern.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs, output) -> None:
        ctx.pattern = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad):
        return Gather.apply(grad, ctx.pattern), None


_gather = register(
    "gather(Tensor dense, Tensor rowptr, Tensor col) -> Tensor",
    lambda dense, rowptr, col: SparsePattern.of_index(rowptr, col, dense.shape).gather(dense),
    lambda dense, rowptr, col: dense.new_empty(col.shape[0]),
    lambda dense, rowptr, col: Gather.apply(dense, Places(rowptr, col, dense.shape)),
)

_scatter = register(
    "scatter(Tensor values, Tensor rowptr, Tensor col, SymInt[] shape) -> Tensor",
    lambda values, rowptr, col, shape: SparsePattern.of_index(rowptr, col, shape).scatter(values),
    lambda values, rowptr, col, shape: values.new_empty(shape),
    lambda values, rowptr, col, shape: Scatter.apply(values, Places(rowptr, col, tuple(shape))),
)


def gather(dense: torch.Tensor, pattern: SparsePattern) -> torch.Tensor:
    """(nnz,) values of ``dense``, of the pattern's shape, at the active places; differentiable.

    Raises:
        ValueError: for another shape.
    """
    return torch.ops.sparsebreg.gather(dense, pattern.rowptr, pattern.col)


def scatter(values: torch.Tensor, pattern: SparsePattern) -> torch.Tensor:
    """The dense tensor that holds the (nnz,) ``values`` at the active places and zeros elsewhere; differentiable.

    Raises:
        ValueError: for another shape.
    """
    return torch.ops.sparsebreg.scatter(values, pattern.rowptr, pattern.col, pattern.shape)
