"""The two crossings between dense and sparse, as differentiable operators: each is the other's gradient."""

from typing import Any

import torch

from sparsebreg.core.pattern import SparsePattern
from sparsebreg.ops.library import Operation, Places, below_autograd, register


class Crossing(Operation):
    """From dense to sparse (``gather``), or back."""

    @staticmethod
    def forward(t, pattern, gather):
        index = pattern.rowptr, pattern.col
        return below_autograd(_gather, t, *index) if gather else below_autograd(_scatter, t, *index, pattern.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs, output) -> None:
        _, ctx.pattern, ctx.gather = inputs

    @staticmethod
    def backward(ctx: Any, grad):
        return Crossing.apply(grad, ctx.pattern, not ctx.gather), None, None


_gather = register(
    "gather(Tensor dense, Tensor rowptr, Tensor col) -> Tensor",
    lambda dense, rowptr, col: SparsePattern.of_index(rowptr, col, dense.shape).gather(dense),
    lambda dense, rowptr, col: dense.new_empty(col.shape[0]),
    lambda dense, rowptr, col: Crossing.apply(dense, Places(rowptr, col, dense.shape), True),
)
_scatter = register(
    "scatter(Tensor values, Tensor rowptr, Tensor col, SymInt[] shape) -> Tensor",
    lambda values, rowptr, col, shape: SparsePattern.of_index(rowptr, col, shape).scatter(values),
    lambda values, rowptr, col, shape: values.new_empty(shape),
    lambda values, rowptr, col, shape: Crossing.apply(values, Places(rowptr, col, tuple(shape)), False),
)


def gather(dense: torch.Tensor, pattern: SparsePattern) -> torch.Tensor:
    """(nnz,) values of ``dense``, of the pattern's shape, at the active places. Raises ValueError for another shape."""
    return torch.ops.sparsebreg.gather(dense, pattern.rowptr, pattern.col)


def scatter(values: torch.Tensor, pattern: SparsePattern) -> torch.Tensor:
    """The dense tensor with the (nnz,) ``values`` at the active places. Raises ValueError for another shape."""
    return torch.ops.sparsebreg.scatter(values, pattern.rowptr, pattern.col, pattern.shape)
