"""The linear layer over a pattern, y = x Wᵀ + b."""

from typing import Any, NamedTuple

import torch
from torch.compiler import is_compiling

from sparsebreg import backends
from sparsebreg.core import extension, memory
from sparsebreg.core.errors import check_input, expected
from sparsebreg.core.pattern import SparsePattern
from sparsebreg.core.profiling import labelled
from sparsebreg.ops import library, product
from sparsebreg.ops.product import Product


class Linear(NamedTuple):
    """The linear layer as a ``product.Kind``: x (N, in), contiguous, to (N, out)."""

    pattern: SparsePattern
    backend: Any

    name = "linear"

    def options(self):
        return ()

    def output_size(self, x_shape):
        return x_shape[0], self.pattern.rows

    def dense(self, x):
        return x.contiguous()

    def formatted(self, t, like, result=False):
        return t

    def check(self, x, values, bias, weight):
        product.check_parameters(values, bias, weight, self.pattern, 2, "linear")
        check_input("x", x, values.dtype)
        if x.dim() == 0 or x.shape[-1] != self.pattern.shape[1]:
            raise ValueError(expected("x", f"shape (..., {self.pattern.cols})", tuple(x.shape)))

    @labelled("linear")
    def forward(self, x, values, bias):
        return self.backend.linear_forward(self.pattern, library.readable(x, self.backend), values, bias)

    @labelled("linear_backward")
    def backward(self, grad_y, x, values, x_shape, needs):
        grad_y = library.readable(grad_y, self.backend).contiguous()
        return self.backend.linear_backward(self.pattern, grad_y, x, values, needs)

    @labelled("weight_grad")
    def weight_grad(self, grad_y, x, needs):
        grad_y, x = library.plain(grad_y).contiguous(), library.plain(x)
        grad = self.backend.weight_grad(grad_y, x)  # maybe pending: see core/gradient.py
        if grad is None:
            grad = torch.mm(grad_y.t(), x, out=memory.empty((grad_y.shape[1], x.shape[1]), x.dtype))
        return grad, None

    def weight_grad_grads(self, grad_y, x, grad):
        return x @ grad.t(), grad_y @ grad


product.register(
    "linear",
    "",
    lambda pattern, backend, options: Linear(pattern, backend),
    lambda rows, x_shape, options: (rows, x_shape[1]),
    lambda values, y: 2 * values[0] * y[0],
)

# What ``Function.apply`` comes to for ordinary tensors outside of functorch's transforms: all else in it takes as long
# as a small layer's arithmetic.
_apply = super(torch.autograd.Function, Product).apply


def _usual(x: Any, pattern: SparsePattern, values: Any, bias: Any) -> bool:
    """Whether all arguments are valid ordinary tensors and no mode or transform is active, the usual case."""
    if not extension.TENSORS or len(pattern.shape) != 2 or torch._C._len_torch_dispatch_stack():
        return False
    if torch._C._are_functorch_transforms_active():
        return False
    return extension.native().linear_takes(pattern.native_index(), x, values, bias)


def sparse_linear(
    x: torch.Tensor,
    pattern: SparsePattern,
    values: torch.Tensor,
    bias: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """``x Wᵀ + b`` for the matrix W that holds ``values`` at the places of ``pattern``.

    Differentiable, any number of times, in x, values and bias.

    Args:
        x: (..., in_features), float32 or float64, on the CPU; under ``torch.autocast`` any floating dtype.
        pattern: of shape (out_features, in_features).
        values: (nnz,), dtype of x.
        bias: (out_features,), dtype of x.
        weight: the dense weight that ``values`` were gathered from, where all of it needs a gradient: it gets a full
            one, while output and grad_x are computed over the active weights.

    Returns:
        (..., out_features).

    Raises:
        TypeError, ValueError: naming the argument, for a wrong dtype, device, layout or shape.
    """
    if is_compiling():
        x = library.under_autocast(x, values.dtype)
        rows = x.reshape(-1, pattern.shape[1])
        y = torch.ops.sparsebreg.linear(rows, pattern.rowptr, pattern.col, values, bias, weight)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], pattern.shape[0])
    kind = Linear(pattern, backends.current())
    if weight is None and _usual(x, pattern, values, bias):
        return _apply(x, values, bias, None, kind, False)
    x = library.under_autocast(x, getattr(values, "dtype", None))
    kind.check(x, values, bias, weight)
    rows = x.contiguous() if x.dim() == 2 else x.reshape(-1, pattern.cols).contiguous()
    bias, seen = None if bias is None else bias.contiguous(), library.observed(x, values, bias)
    y = Product.apply(rows, values.contiguous(), bias, weight, kind, seen)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], pattern.rows)
