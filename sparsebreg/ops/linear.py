"""The linear layer over a pattern, y = x Wᵀ + b: checks, autograd, and operators for what traces, counts or transforms.

``sparse_linear`` is the entry. With ordinary tensors it goes straight to the backend; where a dispatch mode or a
compiler looks on, the same ``autograd.Function`` goes through the operators ``sparsebreg::linear`` and so on.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from sparsebreg import backends
from sparsebreg.core import extension, memory
from sparsebreg.core.errors import check_input, expected
from sparsebreg.core.pattern import SparsePattern
from sparsebreg.core.profiling import labelled
from sparsebreg.ops import library
from sparsebreg.ops.library import Operation, Places


class Linear(Operation):
    """x (N, in), contiguous.

    ``weight``, where it is given, is the dense weight that ``values`` were gathered from: it gets a full gradient, and
    the values none. ``seen``: whether PyTorch has to see the operator (``library.observed``).
    """

    @staticmethod
    def forward(x, values, bias, weight, pattern, backend, seen):
        if seen:
            return library.below_autograd(_linear, x, pattern.rowptr, pattern.col, values, bias, weight)
        return _forward(pattern, x, values, bias, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs, output) -> None:
        x, values, _, _, ctx.pattern, ctx.backend, ctx.seen = inputs
        _, needs_values, _, needs_weight, *_ = ctx.needs_input_grad
        ctx.save_for_backward(library.readable(x, ctx.backend) if needs_values or needs_weight else None, values)

    @staticmethod
    def backward(ctx: Any, grad_y):
        x, values = ctx.saved_tensors
        *needs, needs_weight = ctx.needs_input_grad[:4]
        seen = ctx.seen or library.observed(grad_y)
        if any(needs):
            gradients = LinearBackward.apply if library.traced() else LinearBackward.forward
            grads = gradients(grad_y, x, values, ctx.pattern, needs, ctx.backend, seen)
        else:
            grads = None, None, None
        grad_weight = LinearWeightGrad.of(grad_y, x, ctx.backend, seen) if needs_weight else None
        return *grads, grad_weight, None, None, None


class LinearBackward(Operation):
    """(grad_x, grad_values, grad_bias), None for what ``needs`` does not name. Linear in each of its arguments."""

    @staticmethod
    def forward(grad_y, x, values, pattern, needs, backend, seen):
        if seen:
            places, features = (pattern.rowptr, pattern.col), pattern.shape[1]
            made = library.below_autograd(_linear_backward, grad_y, x, *places, values, features, needs, backend.name)
            return library.or_none(made, needs)
        return _backward(pattern, grad_y, x, values, needs, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs, output) -> None:
        grad_y, x, values, ctx.pattern, ctx.needs, *ctx.rest = inputs
        ctx.save_for_backward(grad_y, x, values)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, of_grad_x, of_grad_values, of_grad_bias):
        grad_y, x, values = ctx.saved_tensors
        pattern, rest = ctx.pattern, ctx.rest
        products = [(of_grad_x, values), (x, of_grad_values if ctx.needs[1] else None)]
        terms = [
            Linear.apply(_rows(a), b.contiguous(), None, None, pattern, *rest)
            for a, b in products
            if a is not None and b is not None
        ]
        bias = None if of_grad_bias is None else of_grad_bias.expand(len(grad_y), -1)
        grad_x = grad_values = None
        if of_grad_values is not None:
            needs = [True, False, False]
            grad_x = LinearBackward.apply(grad_y, None, of_grad_values.contiguous(), pattern, needs, *rest)[0]
        if of_grad_x is not None:
            needs = [False, True, False]
            grad_values = LinearBackward.apply(grad_y, _rows(of_grad_x), values, pattern, needs, *rest)[1]
        return library.added(*terms, bias), grad_x, grad_values, *[None] * 4


class LinearWeightGrad(Operation):
    """The gradient of a dense weight, grad_yᵀ x."""

    @staticmethod
    def of(grad_y, x, backend, seen) -> torch.Tensor:
        """As it is wanted: maybe pending (see ``core/gradient.py``) where nobody traces."""
        if seen or library.traced():
            return LinearWeightGrad.apply(library.plain(grad_y), library.plain(x), backend.name)
        return _weight_grad(library.plain(grad_y).contiguous(), library.plain(x), backend)

    @staticmethod
    def forward(grad_y, x, backend):
        return library.below_autograd(_linear_weight_grad, grad_y, x, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs, output) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, grad):
        grad_y, x = ctx.saved_tensors
        return x @ grad.t(), grad_y @ grad, None


# What both ways compute.


@labelled("linear")
def _forward(pattern, x, values, bias, backend):
    return backend.linear_forward(pattern, library.readable(x, backend), values, bias)


@labelled("linear_backward")
def _backward(pattern, grad_y, x, values, needs, backend):
    return backend.linear_backward(pattern, library.readable(grad_y, backend).contiguous(), x, values, needs)


@labelled("weight_grad")
def _weight_grad(grad_y: torch.Tensor, x: torch.Tensor, backend: backends.Backend) -> torch.Tensor:
    grad = backend.weight_grad(grad_y, x)
    if grad is not None:
        return grad
    return torch.mm(grad_y.t(), x, out=memory.empty((grad_y.shape[1], x.shape[1]), x.dtype))


def _check(x: Any, pattern: SparsePattern, values: Any, bias: Any, weight: Any) -> None:
    library.check_parameters(values, bias, weight, pattern, 2, "linear")
    check_input("x", x, values.dtype)
    if x.dim() == 0 or x.shape[-1] != pattern.shape[1]:
        raise ValueError(expected("x", f"shape (..., {pattern.cols})", tuple(x.shape)))


def _rows(x: torch.Tensor) -> torch.Tensor:
    """(..., features) to (N, features), contiguous."""
    return x.contiguous() if x.dim() == 2 else x.reshape(-1, x.shape[-1]).contiguous()


# The operators. They take x of any number of dimensions, as the entry does.


def _linear_kernel(x, rowptr, col, values, bias=None, weight=None):
    pattern = SparsePattern.of_index(rowptr, col, (len(rowptr) - 1, x.shape[-1]))
    _check(x, pattern, values, bias, weight)
    bias = None if bias is None else bias.contiguous()
    y = _forward(pattern, _rows(x), values.contiguous(), bias, backends.current())
    return y if x.dim() == 2 else y.view(*x.shape[:-1], pattern.rows)


def _linear_autograd(x, rowptr, col, values, bias=None, weight=None):
    places = Places(rowptr, col, (rowptr.shape[0] - 1, x.shape[-1]))
    y = Linear.apply(_rows(x), values, bias, weight, places, backends.current(), True)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])


_linear = library.register(
    "linear(Tensor x, Tensor rowptr, Tensor col, Tensor values, Tensor? bias=None, Tensor? weight=None) -> Tensor",
    _linear_kernel,
    lambda x, rowptr, col, values, bias=None, weight=None: x.new_empty(*x.shape[:-1], rowptr.shape[0] - 1),
    _linear_autograd,
    lambda x, rowptr, col, values, *_, **__: 2 * math.prod(x[:-1]) * values[0],
)


def _linear_backward_kernel(grad_y, x, rowptr, col, values, in_features, needs, backend=""):
    pattern = SparsePattern.of_index(rowptr, col, (len(rowptr) - 1, in_features))
    _check(grad_y.new_empty(0, in_features), pattern, values, None, None)
    check_input("grad_y", grad_y, values.dtype)
    if grad_y.dim() != 2 or grad_y.shape[1] != pattern.rows:
        raise ValueError(expected("grad_y", f"shape (N, {pattern.rows})", tuple(grad_y.shape)))
    if needs[1] and (x is None or x.shape != (len(grad_y), in_features)):
        raise ValueError(expected("x", f"shape ({len(grad_y)}, {in_features})", x if x is None else tuple(x.shape)))
    backend = backends.by_name(backend)
    x = None if x is None else library.readable(x, backend).contiguous()
    return library.or_empty(_backward(pattern, grad_y, x, values.contiguous(), needs, backend), values)


def _linear_backward_fake(grad_y, x, rowptr, col, values, in_features, needs, backend=""):
    rows = rowptr.shape[0] - 1
    made = grad_y.new_empty(grad_y.shape[0], in_features), torch.empty_like(values), grad_y.new_empty(rows)
    return library.or_empty(library.or_none(made, needs), values)


def _linear_backward_autograd(grad_y, x, rowptr, col, values, in_features, needs, backend=""):
    places = Places(rowptr, col, (rowptr.shape[0] - 1, in_features))
    made = LinearBackward.apply(grad_y, x, values, places, needs, backends.by_name(backend), True)
    return library.or_empty(made, values)


_linear_backward = library.register(
    "linear_backward(Tensor grad_y, Tensor? x, Tensor rowptr, Tensor col, Tensor values, SymInt in_features, "
    'bool[] needs, str backend="") -> (Tensor, Tensor, Tensor)',
    _linear_backward_kernel,
    _linear_backward_fake,
    _linear_backward_autograd,
    lambda grad_y, x, rowptr, col, values, cols, needs, *_, **__: 2 * sum(needs[:2]) * grad_y[0] * values[0],
)


def _linear_weight_grad_kernel(grad_y, x, backend=""):
    grad = _weight_grad(library.plain(grad_y).contiguous(), library.plain(x).contiguous(), backends.by_name(backend))
    return getattr(grad, "dense", grad)


_linear_weight_grad = library.register(
    'linear_weight_grad(Tensor grad_y, Tensor x, str backend="") -> Tensor',
    _linear_weight_grad_kernel,
    lambda grad_y, x, backend="": x.new_empty(grad_y.shape[1], x.shape[1]),
    lambda grad_y, x, backend="": LinearWeightGrad.apply(grad_y, x, backend),
    lambda grad_y, x, *_, **__: 2 * grad_y[0] * grad_y[1] * x[1],
)


# The entry.


# What ``Function.apply`` comes to for ordinary tensors outside of functorch's transforms: all else in it takes as long
# as a small layer's arithmetic.
_apply = super(torch.autograd.Function, Linear).apply


def _usual(x: Any, pattern: SparsePattern, values: Any, bias: Any) -> bool:
    """Whether a linear layer's arguments are right, and as most are: then one call is enough to know."""
    # Of what is seen here the dispatch modes; that the tensors are ordinary ones is part of the answer.
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
        x: (..., in_features), float32 or float64, on the CPU.
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
    if torch.compiler.is_compiling():
        return torch.ops.sparsebreg.linear(x, pattern.rowptr, pattern.col, values, bias, weight)
    if weight is None and _usual(x, pattern, values, bias):
        return _apply(x, values, bias, None, pattern, backends.current(), False)
    _check(x, pattern, values, bias, weight)
    bias = None if bias is None else bias.contiguous()
    seen = library.observed(x, values, bias)
    y = Linear.apply(_rows(x), values.contiguous(), bias, weight, pattern, backends.current(), seen)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], pattern.rows)
