"""The full gradient of a linear layer's weight, computed when it is wanted.

It is a product, grad_yᵀ x. Whoever moves the weights by it can do so row by row, while a row is in the caches, and the
optimizers of this package do: the gradient is then neither written to memory nor read from there.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from sparsebreg.core import memory
from sparsebreg.core.extension import native

__all__ = ["PendingGrad", "resolve"]

aten = torch.ops.aten


_computing = threading.RLock()  # a finaliser may ask, too


class _Cell:
    """What a pending gradient shares with its aliases: the factors, until the product is made of them."""

    __slots__ = ("dense", "factors")

    def __init__(self, factors: Any, dense: torch.Tensor | None = None) -> None:
        self.factors, self.dense = factors, dense


class PendingGrad(torch.Tensor):
    """A gradient that is computed when an operation asks for it.

    Its factors are copies: what happens to the layer's input afterwards does not reach it. What the input holds where
    grad_y is zero is not looked at: NaN or an infinity there does not make the gradient NaN, as a dense product does.

    Torch's operations and Python's protocols see the numbers. C++ code that takes the data pointer by itself needs
    ``resolve(p.grad)``, and so does an assignment of it to the ``data`` of an ordinary tensor.
    """

    _cell: _Cell

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def of(cls, factors: Any, shape: tuple[int, int], dtype: torch.dtype) -> PendingGrad:
        """A pending gradient over the factors in an extension's ``Gradient``."""
        return cls._of_cell(_Cell(factors), shape, dtype)

    @classmethod
    def _of_cell(cls, cell: _Cell, shape: tuple[int, ...], dtype: torch.dtype) -> PendingGrad:
        grad = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype)
        grad._cell = cell
        return grad

    @property
    def factors(self) -> Any:
        """The factors for the extension; None once the product is computed, since it may have been written to."""
        return self._cell.factors

    @property
    def dense(self) -> torch.Tensor:
        """The gradient as an ordinary tensor; writing to it writes to the gradient."""
        cell = self._cell
        with _computing:
            if cell.dense is None:
                grad = memory.empty(tuple(self.shape), self.dtype)
                native().weight_grad(cell.factors, grad.numpy(), torch.get_num_threads())
                cell.dense, cell.factors = grad, None
        return cell.dense

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:  # as `module.double()` does with gradients
        torch.Tensor.data.__set__(self, value)
        self._cell = _Cell(None, resolve(value).detach())

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

    def __reduce_ex__(self, proto):
        return self.dense.__reduce_ex__(proto)

    def __deepcopy__(self, memo):
        memo[id(self)] = copy = self.dense.clone()
        return copy


# What reaches for the memory goes to that of the computed gradient.
for _name in (
    "numpy", "tolist", "data_ptr", "untyped_storage", "storage", "_typed_storage", "share_memory_", "is_shared",
    "apply_", "map_", "__dlpack__",
):  # fmt: skip
    setattr(PendingGrad, _name, lambda self, *args, _name=_name, **kwargs: getattr(self.dense, _name)(*args, **kwargs))


def resolve(grad: torch.Tensor) -> torch.Tensor:
    """The gradient as an ordinary tensor."""
    return grad.dense if isinstance(grad, PendingGrad) else grad
