"""The full gradient of a linear layer's weight, computed when it is wanted.

It is a product, grad_yᵀ x. Whoever moves the weights by it can do so row by row, while a row is in the caches, and the
optimizers of this package do: the gradient is then neither written to memory nor read from there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from sparsebreg import memory
from sparsebreg._extension import native

__all__ = ["PendingGrad", "resolve"]

aten = torch.ops.aten


class _Cell:
    """What a pending gradient shares with its aliases: the factors, until the product is made of them."""

    __slots__ = ("dense", "factors")

    def __init__(self, factors: Any) -> None:
        self.factors, self.dense = factors, None


class PendingGrad(torch.Tensor):
    """A gradient that is computed when an operation asks for it; from then on an ordinary tensor in all but its type.

    Its factors are copies: what happens to the layer's input afterwards does not reach it.
    """

    _cell: _Cell

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def of(cls, factors: Any, shape: tuple[int, int], dtype: torch.dtype) -> PendingGrad:
        """The product of the extension's ``Gradient``."""
        return cls._of_cell(_Cell(factors), shape, dtype)

    @classmethod
    def _of_cell(cls, cell: _Cell, shape: tuple[int, ...], dtype: torch.dtype) -> PendingGrad:
        grad = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype)
        grad._cell = cell
        return grad

    @property
    def factors(self) -> Any:
        """As the extension takes them; None once the gradient was computed, for then it may have been written to."""
        return self._cell.factors

    @property
    def dense(self) -> torch.Tensor:
        """The gradient as an ordinary tensor; writing to it writes to the gradient."""
        cell = self._cell
        factors = cell.factors  # read first: another thread may be done at any time
        if cell.dense is None:
            grad = memory.empty(tuple(self.shape), self.dtype)
            native().weight_grad(factors, grad.numpy(), torch.get_num_threads())
            cell.dense, cell.factors = grad, None
        return cell.dense

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is aten.detach.default:  # what autograd keeps in .grad
            return cls._of_cell(args[0]._cell, args[0].shape, args[0].dtype)
        originals: dict[int, PendingGrad] = {}

        def dense(x: PendingGrad) -> torch.Tensor:
            originals[id(x.dense)] = x
            return x.dense

        args, kwargs = tree_map_only(PendingGrad, dense, (args, kwargs or {}))
        # What was written to in place is returned as what it was.
        return tree_map_only(torch.Tensor, lambda t: originals.get(id(t), t), func(*args, **kwargs))

    def __repr__(self, *, tensor_contents=None) -> str:
        return f"PendingGrad({self.dense!r})"

    def numpy(self, *, force: bool = False):
        return self.dense.numpy(force=force)

    def tolist(self):
        return self.dense.tolist()

    def __reduce_ex__(self, proto):
        return self.dense.__reduce_ex__(proto)

    def __deepcopy__(self, memo):
        memo[id(self)] = copy = self.dense.clone()
        return copy


def resolve(grad: torch.Tensor) -> torch.Tensor:
    """The gradient as an ordinary tensor."""
    return grad.dense if isinstance(grad, PendingGrad) else grad
