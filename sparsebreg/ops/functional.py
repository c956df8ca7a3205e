"""Differentiable sparse operations: checks, the choice of backend, autograd. No parameters here."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import profiler
from torch.autograd.function import once_differentiable

from sparsebreg import backends
from sparsebreg.backends import Geometry, Layout
from sparsebreg.core import extension, memory
from sparsebreg.core.errors import check_input, expected
from sparsebreg.core.pattern import SparsePattern
from sparsebreg.core.profiling import labelled
from sparsebreg.lanes import LANES, LaneTensor

__all__ = ["Geometry", "sparse_conv2d", "sparse_linear"]

# Sparse products are no torch operations, so they tell torch's FLOP counter what they do; the formula is in flops.py.
_library = torch.library.Library("sparsebreg", "DEF")
_library.define("count_flops(int flops) -> ()")
_library.impl("count_flops", lambda flops: None, "CompositeExplicitAutograd")


def _count(backend: Any, products: int, pattern: SparsePattern, positions: int) -> None:
    """Tells that every active weight was multiplied at so many positions in each of ``products`` products."""
    # Without a mode nobody is counting; the reference is made of dense operations, which are counted as such.
    if torch._C._len_torch_dispatch_stack() and backend.name != "reference":
        torch.ops.sparsebreg.count_flops(2 * products * pattern.nnz * positions)


def _first_order(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates a backward pass that cannot be differentiated itself, as ``once_differentiable`` does, and labels it.

    That one switches gradients off and looks through the arguments at every call; here only where gradients are on.
    """

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        guarded = once_differentiable(labelled(name)(backward))

        @functools.wraps(backward)
        def call(ctx, grad_y):
            plainly = not (torch.is_grad_enabled() or profiler._is_profiler_enabled)
            return (backward if plainly else guarded)(ctx, grad_y)

        return call

    return decorate


def _plain(x: torch.Tensor) -> torch.Tensor:
    return x.plain if isinstance(x, LaneTensor) else x


def _readable(x: torch.Tensor, backend: backends.Backend) -> torch.Tensor:
    """x, unpacked where the backend does not compute on the lane layout."""
    return x if backend.lanes else _plain(x)


# ``weight``, where it is given, is the dense weight that ``values`` were gathered from: it gets a full gradient.


class _Linear(torch.autograd.Function):
    @staticmethod
    @labelled("linear")
    def forward(ctx: Any, x, values, bias, weight, pattern, backend):
        ctx.pattern, ctx.backend = pattern, backend
        x = _readable(x, backend)
        _, needs_values, _, needs_weight, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_values or needs_weight else None, values)
        _count(backend, 1, pattern, x.shape[0])
        return backend.linear_forward(pattern, x, values, bias)

    @staticmethod
    @_first_order("linear_backward")
    def backward(ctx: Any, grad_y):
        x, values = ctx.saved_tensors
        *needs, needs_weight = ctx.needs_input_grad[:4]
        grad_y = _readable(grad_y, ctx.backend).contiguous()
        _count(ctx.backend, needs[0] + needs[1], ctx.pattern, grad_y.shape[0])
        grads = ctx.backend.linear_backward(ctx.pattern, grad_y, x, values, needs)
        grad_weight = _full_linear_gradient(_plain(grad_y), _plain(x), ctx.backend) if needs_weight else None
        return *grads, grad_weight, None, None


class _Conv2d(torch.autograd.Function):
    @staticmethod
    @labelled("conv2d")
    def forward(ctx: Any, x, values, bias, weight, pattern, geometry, layout, training, backend):
        ctx.pattern, ctx.geometry, ctx.backend, ctx.x_shape = pattern, geometry, backend, x.shape
        x = _readable(x, backend)
        _, needs_values, _, needs_weight, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_values or needs_weight else None, values)
        y = backend.conv2d_forward(pattern, x, values, bias, geometry, layout, training)
        _count(backend, 1, pattern, math.prod((len(y), *y.shape[2:])))
        return y

    @staticmethod
    @_first_order("conv2d_backward")
    def backward(ctx: Any, grad_y):
        x, values = ctx.saved_tensors
        *needs, needs_weight = ctx.needs_input_grad[:4]
        pattern, geometry = ctx.pattern, ctx.geometry
        grad_y = _dense_format(_readable(grad_y, ctx.backend))
        _count(ctx.backend, needs[0] + needs[1], pattern, math.prod((len(grad_y), *grad_y.shape[2:])))
        if not needs_weight:
            return *ctx.backend.conv2d_backward(pattern, grad_y, x, values, geometry, ctx.x_shape, needs), *[None] * 6
        grad_weight, grad_bias = _full_gradient(grad_y, x, pattern.shape, geometry, (needs[0], needs[2]), ctx.backend)
        needs = needs[0], needs[1], needs[2] and grad_bias is None
        grads = (None, None, None)
        if any(needs):
            grads = ctx.backend.conv2d_backward(pattern, grad_y, x, values, geometry, ctx.x_shape, needs)
        return *grads[:2], grads[2] if grad_bias is None else grad_bias, grad_weight, *[None] * 5


@labelled("weight_grad")
def _full_linear_gradient(grad_y: torch.Tensor, x: torch.Tensor, backend: backends.Backend) -> torch.Tensor:
    """The gradient of a linear layer's dense weight."""
    grad = backend.weight_grad(grad_y, x)
    if grad is None:
        return torch.mm(grad_y.t(), x, out=memory.empty((grad_y.shape[1], x.shape[1]), x.dtype))
    if torch._C._len_torch_dispatch_stack():
        torch.ops.sparsebreg.count_flops(2 * len(x) * grad.numel())
    return grad


@labelled("weight_grad")
def _full_gradient(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    shape: tuple[int, ...],
    geometry: Geometry,
    needs: tuple[bool, bool],
    backend: backends.Backend,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The gradient of a convolution's dense weight of that shape, and that of the bias if it falls off on the way."""
    found = backend.conv2d_weight_grad(grad_y, x, shape, geometry, needs)
    if found is not None:
        if torch._C._len_torch_dispatch_stack():
            torch.ops.sparsebreg.count_flops(2 * found[0].numel() * math.prod((len(grad_y), *grad_y.shape[2:])))
        return found
    grad_y, x = _plain(grad_y), _plain(x)
    stride, padding, dilation, groups = geometry
    if geometry.is_product(shape[2:], grad_y):
        # oneDNN writes out of bounds for strided 1x1 kernels in the channels_last format (torch 2.13, 8 channels).
        x = x[:, :, :: stride[0], :: stride[1]].permute(0, 2, 3, 1).reshape(-1, shape[1])
        grad_y = grad_y.permute(0, 2, 3, 1).reshape(-1, shape[0])
        return torch.mm(grad_y.t(), x, out=memory.empty(shape[:2], x.dtype)).view(shape), None
    weight = x.new_empty(1).expand(shape)  # only its sizes count
    _, grad, _ = torch.ops.aten.convolution_backward(
        grad_y, x, weight, None, stride, padding, dilation, False, (0, 0), groups, (False, True, False)
    )
    return grad if grad.is_contiguous() else memory.empty(shape, grad.dtype).copy_(grad), None


def _dense_format(x: torch.Tensor) -> torch.Tensor:
    """x itself where it is contiguous in the plain or the channels_last format, else a plain copy."""
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous()


def _check_parameters(
    values: torch.Tensor, bias: torch.Tensor | None, weight: torch.Tensor | None, pattern: SparsePattern
) -> None:
    if not isinstance(values, torch.Tensor) or values.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            expected("values", "a float32 or float64 tensor", getattr(values, "dtype", type(values).__name__))
        )
    check_input("values", values, values.dtype)
    if values.shape != pattern.col.shape:
        raise ValueError(expected("values", f"shape ({pattern.nnz},)", tuple(values.shape)))
    if bias is not None:
        check_input("bias", bias, values.dtype)
        if bias.shape != (pattern.rows,):
            raise ValueError(expected("bias", f"shape ({pattern.rows},)", tuple(bias.shape)))
    if weight is not None:
        check_input("weight", weight, values.dtype)
        if tuple(weight.shape) != pattern.shape:
            raise ValueError(expected("weight", f"shape {pattern.shape}", tuple(weight.shape)))


def _usual(x: Any, pattern: SparsePattern, values: Any, bias: Any) -> bool:
    """Whether a linear layer's arguments are right, and as most are: then one call is enough to know."""
    if not extension.TENSORS or len(pattern.shape) != 2 or torch._C._are_functorch_transforms_active():
        return False
    return extension.native().linear_takes(pattern.native_index(), x, values, bias)


# What ``Function.apply`` comes to for ordinary tensors outside of functorch's transforms: all else in it takes as long
# as a small layer's arithmetic.
_apply_linear = super(torch.autograd.Function, _Linear).apply


def sparse_linear(
    x: torch.Tensor,
    pattern: SparsePattern,
    values: torch.Tensor,
    bias: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """``x Wᵀ + b`` for the matrix W that holds ``values`` at the places of ``pattern``.

    Differentiable (once) in x, values and bias.

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
    if weight is None and _usual(x, pattern, values, bias):
        return _apply_linear(x, values, bias, None, pattern, backends.current())
    _check_parameters(values, bias, weight, pattern)
    check_input("x", x, values.dtype)
    if len(pattern.shape) != 2:
        raise ValueError(expected("pattern", "the shape of a linear weight (2 sizes)", pattern.shape))
    if x.dim() == 0 or x.shape[-1] != pattern.shape[1]:
        raise ValueError(expected("x", f"shape (..., {pattern.cols})", tuple(x.shape)))
    flat = x.contiguous() if x.dim() == 2 else x.reshape(-1, pattern.cols).contiguous()
    bias = None if bias is None else bias.contiguous()
    y = _Linear.apply(flat, values.contiguous(), bias, weight, pattern, backends.current())
    return y if x.dim() == 2 else y.view(*x.shape[:-1], pattern.rows)


def sparse_conv2d(
    x: torch.Tensor,
    pattern: SparsePattern,
    values: torch.Tensor,
    bias: torch.Tensor | None = None,
    geometry: Geometry = Geometry(),
    channels_last: bool = False,
    lanes: bool = False,
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """2-D cross-correlation with the weight that holds ``values`` at the places of ``pattern``; zero padding.

    Differentiable (once) in x, values and bias.

    Args:
        x: (N, IC, H, W) or (IC, H, W), float32 or float64, on the CPU.
        pattern: of shape (OC, IC / groups, KH, KW).
        values: (nnz,), dtype of x.
        bias: (OC,), dtype of x.
        geometry: stride, padding, dilation, groups.
        channels_last: return the channels_last memory format even if x is not in it.
        lanes: return a ``LaneTensor`` where that pays: the backend computes in the lane layout, and the batch fills it.
        weight: as for :func:`sparse_linear`.

    Returns:
        (N, OC, OH, OW) or (OC, OH, OW), in the layout of x unless ``channels_last`` or ``lanes``.

    Raises:
        TypeError, ValueError: naming the argument, for a wrong dtype, device, layout or shape.
    """
    _check_parameters(values, bias, weight, pattern)
    check_input("x", x, values.dtype)
    if len(pattern.shape) != 4:
        raise ValueError(expected("pattern", "the shape of a 2-D convolution's weight (4 sizes)", pattern.shape))
    channels = pattern.shape[1] * geometry.groups
    if x.dim() not in (3, 4) or x.shape[-3] != channels:
        raise ValueError(expected("x", f"shape (N, {channels}, H, W)", tuple(x.shape)))
    if min(geometry.output_size(x.shape[-2:], pattern.shape[2:])) < 1:
        raise ValueError(expected("x", f"an image that the kernel {pattern.shape[2:]} fits into", tuple(x.shape)))
    batch = x if x.dim() == 4 else x.unsqueeze(0)
    batch = _dense_format(batch)
    backend = backends.current()
    if backend.lanes and (isinstance(batch, LaneTensor) or (lanes and len(batch) >= LANES)):
        layout = Layout.LANES
    elif channels_last or not batch.is_contiguous():
        layout = Layout.CHANNELS_LAST
    else:
        layout = Layout.PLAIN
    training = torch.is_grad_enabled()  # not known any more inside
    bias = None if bias is None else bias.contiguous()
    y = _Conv2d.apply(batch, values.contiguous(), bias, weight, pattern, geometry, layout, training, backend)
    return y if x.dim() == 4 else y.squeeze(0)
