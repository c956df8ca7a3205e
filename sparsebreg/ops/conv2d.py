"""The 2-D convolution over a pattern: checks, autograd, and operators for what traces, counts or transforms.

``sparse_conv2d`` is the entry; what is said in ``ops/linear.py`` holds here, too.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from sparsebreg import backends
from sparsebreg.backends import Geometry, Layout
from sparsebreg.core import memory
from sparsebreg.core.errors import check_input, expected
from sparsebreg.core.pattern import SparsePattern
from sparsebreg.core.profiling import labelled
from sparsebreg.lanes import LANES, LaneTensor, pack, wrap
from sparsebreg.ops import library
from sparsebreg.ops.library import Operation, Places


class Conv2d(Operation):
    """x (N, IC, H, W) in the plain or the channels_last format or in lanes; ``weight`` as in ``ops.linear.Linear``.

    ``layout`` is that of y; ``training`` says whether a batch norm that follows will want its statistics; ``seen`` is
    as in ``ops.linear.Linear``.
    """

    @staticmethod
    def forward(x, values, bias, weight, pattern, geometry, layout, training, backend, seen):
        if not seen:
            return _forward(pattern, x, values, bias, geometry, layout, training, backend)
        if layout is Layout.LANES and not isinstance(x, LaneTensor):
            x = wrap(pack(x.contiguous()), len(x))  # the operator returns a lane tensor for one alone
        places, options = (pattern.rowptr, pattern.col), (pattern.shape[2:], *geometry)
        return library.below_autograd(
            _conv2d, x, *places, values, bias, weight, *options, layout is Layout.CHANNELS_LAST
        )

    @staticmethod
    def setup_context(ctx: Any, inputs, output) -> None:
        x, values, _, _, ctx.pattern, ctx.geometry, _, _, ctx.backend, ctx.seen = inputs
        _, needs_values, _, needs_weight, *_ = ctx.needs_input_grad
        ctx.x_shape = x.shape
        ctx.save_for_backward(library.readable(x, ctx.backend) if needs_values or needs_weight else None, values)

    @staticmethod
    def backward(ctx: Any, grad_y):
        x, values = ctx.saved_tensors
        *needs, needs_weight = ctx.needs_input_grad[:4]
        pattern, geometry, backend = ctx.pattern, ctx.geometry, ctx.backend
        grads, grad_weight, grad_bias = (None, None, None), None, None
        seen = ctx.seen or library.observed(grad_y)
        if needs_weight:
            wants = needs[0], needs[2]
            grad_weight, grad_bias = Conv2dWeightGrad.of(grad_y, x, pattern.shape, geometry, wants, backend, seen)
            needs[2] = needs[2] and grad_bias is None
        if any(needs):
            gradients = Conv2dBackward.apply if library.traced() else Conv2dBackward.forward
            grads = gradients(grad_y, x, values, pattern, geometry, ctx.x_shape, needs, backend, seen)
        return *grads[:2], grads[2] if grad_bias is None else grad_bias, grad_weight, *[None] * 6


class Conv2dBackward(Operation):
    """(grad_x, grad_values, grad_bias), None for what ``needs`` does not name. Linear in each of its arguments."""

    @staticmethod
    def forward(grad_y, x, values, pattern, geometry, x_shape, needs, backend, seen):
        if not seen:
            return _backward(pattern, grad_y, x, values, geometry, x_shape, needs, backend)
        places, options = (pattern.rowptr, pattern.col), (pattern.shape[2:], *geometry)
        made = library.below_autograd(
            _conv2d_backward, grad_y, x, *places, values, x_shape, *options, needs, backend.name
        )  # fmt: skip
        return library.or_none(made, needs)

    @staticmethod
    def setup_context(ctx: Any, inputs, output) -> None:
        grad_y, x, values, *ctx.rest, ctx.needs, ctx.backend, ctx.seen = inputs
        ctx.save_for_backward(grad_y, x, values)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, of_grad_x, of_grad_values, of_grad_bias):
        grad_y, x, values = ctx.saved_tensors
        pattern, geometry, _ = ctx.rest
        products = [(of_grad_x, values), (x, of_grad_values if ctx.needs[1] else None)]
        rest = pattern, geometry, Layout.PLAIN, False, ctx.backend, ctx.seen
        more = ctx.backend, ctx.seen
        terms = [
            Conv2d.apply(_dense(a), b.contiguous(), None, None, *rest)
            for a, b in products
            if a is not None and b is not None
        ]
        bias = None if of_grad_bias is None else of_grad_bias.view(1, -1, 1, 1).expand(grad_y.shape)
        grad_x = grad_values = None
        if of_grad_values is not None:
            needs = [True, False, False]
            grad_x = Conv2dBackward.apply(grad_y, None, of_grad_values.contiguous(), *ctx.rest, needs, *more)[0]
        if of_grad_x is not None:
            needs = [False, True, False]
            grad_values = Conv2dBackward.apply(grad_y, _dense(of_grad_x), values, *ctx.rest, needs, *more)[1]
        return library.added(*terms, bias), grad_x, grad_values, *[None] * 6


class Conv2dWeightGrad(Operation):
    """The gradient of a dense weight."""

    @staticmethod
    def of(grad_y, x, shape, geometry, needs, backend, seen) -> tuple[torch.Tensor, torch.Tensor | None]:
        """It and, where that falls off on the way and is wanted, the bias's; ``needs``: see ``Backend``."""
        if seen or library.traced():
            return Conv2dWeightGrad.apply(_dense(grad_y), x, shape, geometry, backend), None
        return _weight_grad(_dense(library.readable(grad_y, backend)), x, shape, geometry, needs, backend)

    @staticmethod
    def forward(grad_y, x, shape, geometry, backend):
        return library.below_autograd(_conv2d_weight_grad, grad_y, x, shape, *geometry, backend.name)

    @staticmethod
    def setup_context(ctx: Any, inputs, output) -> None:
        grad_y, x, _, ctx.geometry, _ = inputs
        ctx.save_for_backward(grad_y, x)

    @staticmethod
    def backward(ctx: Any, grad):
        grad_y, x = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.geometry
        arguments = [0], stride, padding, dilation, False, [0, 0], groups, [True, False, False]
        grad_x = torch.ops.aten.convolution_backward(grad_y, x, grad, *arguments)[0]
        return torch.nn.functional.conv2d(x, grad, None, *ctx.geometry), grad_x, None, None, None


# What both ways compute.


@labelled("conv2d")
def _forward(pattern, x, values, bias, geometry, layout, training, backend):
    return backend.conv2d_forward(pattern, library.readable(x, backend), values, bias, geometry, layout, training)


@labelled("conv2d_backward")
def _backward(pattern, grad_y, x, values, geometry, x_shape, needs, backend):
    grad_y = _dense(library.readable(grad_y, backend))
    return backend.conv2d_backward(pattern, grad_y, x, values, geometry, x_shape, needs)


@labelled("weight_grad")
def _weight_grad(grad_y, x, shape, geometry, needs, backend) -> tuple[torch.Tensor, torch.Tensor | None]:
    found = backend.conv2d_weight_grad(grad_y, x, shape, geometry, needs)
    if found is not None:
        return found
    grad_y, x = library.plain(grad_y), library.plain(x)
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


def _dense(x: torch.Tensor) -> torch.Tensor:
    """x itself where it is contiguous in the plain or the channels_last format, else a plain copy."""
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous()


def _layout(x: torch.Tensor, channels_last: bool, lanes: bool, backend: Any) -> Layout:
    """That of the result for a ``_dense`` x; ``lanes``: a lane tensor where the batch fills it."""
    if backend.lanes and (isinstance(x, LaneTensor) or (lanes and len(x) >= LANES)):
        return Layout.LANES
    return Layout.CHANNELS_LAST if channels_last or not x.is_contiguous() else Layout.PLAIN


def _format(x: torch.Tensor) -> torch.memory_format:
    """The memory format of a ``_dense`` tensor."""
    return torch.contiguous_format if _dense(x).is_contiguous() else torch.channels_last


def _check(x: Any, pattern: SparsePattern, values: Any, bias: Any, weight: Any, geometry: Geometry) -> None:
    library.check_parameters(values, bias, weight, pattern, 4, "2-D convolution's")
    check_input("x", x, values.dtype)
    channels = pattern.shape[1] * geometry.groups
    if x.dim() not in (3, 4) or x.shape[-3] != channels:
        raise ValueError(expected("x", f"shape (N, {channels}, H, W)", tuple(x.shape)))
    if min(geometry.output_size(x.shape[-2:], pattern.shape[2:])) < 1:
        raise ValueError(expected("x", f"an image that the kernel {pattern.shape[2:]} fits into", tuple(x.shape)))


# The operators; x of four dimensions.

_GEOMETRY = "SymInt[] kernel_size, int[] stride, int[] padding, int[] dilation, int groups"


def _geometry(stride, padding, dilation, groups) -> Geometry:
    return Geometry(tuple(stride), tuple(padding), tuple(dilation), groups)


def _places(rowptr, col, channels: int, kernel_size, groups: int) -> Places:
    return Places(rowptr, col, (rowptr.shape[0] - 1, channels // groups, *kernel_size))


def _conv2d_kernel(
    x, rowptr, col, values, bias, weight, kernel_size, stride, padding, dilation, groups, channels_last=False
):
    geometry = _geometry(stride, padding, dilation, groups)
    pattern = library.pattern_of(_places(rowptr, col, x.shape[1], kernel_size, groups))
    _check(x, pattern, values, bias, weight, geometry)
    backend, x, bias = backends.current(), _dense(x), None if bias is None else bias.contiguous()
    layout = _layout(x, channels_last, False, backend)
    return _forward(pattern, x, values.contiguous(), bias, geometry, layout, False, backend)


def _conv2d_fake(x, rowptr, col, values, bias, weight, kernel_size, *options):
    *options, channels_last = options if len(options) == 5 else (*options, False)
    size = _geometry(*options).sizes(x.shape[2:], kernel_size)
    memory_format = torch.channels_last if channels_last else _format(x)
    return torch.empty(
        (x.shape[0], rowptr.shape[0] - 1, *size), dtype=x.dtype, device=x.device, memory_format=memory_format
    )


def _conv2d_autograd(x, rowptr, col, values, bias, weight, kernel_size, *options):
    *options, channels_last = options if len(options) == 5 else (*options, False)
    geometry, x = _geometry(*options), _dense(x)
    places = _places(rowptr, col, x.shape[1], kernel_size, geometry.groups)
    layout = _layout(x, channels_last, False, backends.current())
    return Conv2d.apply(x, values, bias, weight, places, geometry, layout, False, backends.current(), True)


_conv2d = library.register(
    "conv2d(Tensor x, Tensor rowptr, Tensor col, Tensor values, Tensor? bias, Tensor? weight, "
    f"{_GEOMETRY}, bool channels_last=False) -> Tensor",
    _conv2d_kernel,
    _conv2d_fake,
    _conv2d_autograd,
    lambda x, rowptr, col, values, *_, out_shape, **__: 2 * values[0] * math.prod(out_shape) // out_shape[1],
)


def _conv2d_backward_kernel(
    grad_y, x, rowptr, col, values, x_shape, kernel_size, stride, padding, dilation, groups, needs, backend=""
):
    geometry, backend = _geometry(stride, padding, dilation, groups), backends.by_name(backend)
    pattern = library.pattern_of(_places(rowptr, col, x_shape[1], kernel_size, groups))
    _check(grad_y.new_empty(0, *x_shape[1:]), pattern, values, None, None, geometry)
    check_input("grad_y", grad_y, values.dtype)
    size = x_shape[0], pattern.rows, *geometry.output_size(tuple(x_shape[2:]), pattern.shape[2:])
    if grad_y.shape != size:
        raise ValueError(expected("grad_y", f"shape {size}", tuple(grad_y.shape)))
    if needs[1] and (x is None or list(x.shape) != list(x_shape)):
        raise ValueError(expected("x", f"shape {tuple(x_shape)}", x if x is None else tuple(x.shape)))
    x = None if x is None else _dense(library.readable(x, backend))
    grads = _backward(
        pattern, grad_y, x, values.contiguous(), geometry, torch.Size(x_shape), needs, backend
    )  # fmt: skip
    if grads[0] is not None and not isinstance(grads[0], LaneTensor):
        grads = grads[0].contiguous(memory_format=_format(grad_y if x is None else x)), *grads[1:]
    return library.or_empty(grads, values)


def _conv2d_backward_fake(grad_y, x, rowptr, col, values, x_shape, kernel_size, s, p, d, groups, needs, backend=""):
    memory_format = _format(grad_y if x is None else x)
    grad_x = torch.empty(x_shape, dtype=values.dtype, device=values.device, memory_format=memory_format)
    return library.or_empty(
        library.or_none((grad_x, torch.empty_like(values), values.new_empty(rowptr.shape[0] - 1)), needs), values
    )


def _conv2d_backward_autograd(
    grad_y, x, rowptr, col, values, x_shape, kernel_size, stride, padding, dilation, groups, needs, backend=""
):
    rest = _geometry(stride, padding, dilation, groups), tuple(x_shape), needs, backends.by_name(backend), True
    places = _places(rowptr, col, x_shape[1], kernel_size, groups)
    return library.or_empty(Conv2dBackward.apply(grad_y, x, values, places, *rest), values)


_conv2d_backward = library.register(
    "conv2d_backward(Tensor grad_y, Tensor? x, Tensor rowptr, Tensor col, Tensor values, SymInt[] x_shape, "
    f'{_GEOMETRY}, bool[] needs, str backend="") -> (Tensor, Tensor, Tensor)',
    _conv2d_backward_kernel,
    _conv2d_backward_fake,
    _conv2d_backward_autograd,
    lambda grad_y, x, rowptr, col, values, shape, *rest, **_: (
        2 * sum(rest[5][:2]) * values[0] * math.prod(grad_y) // grad_y[1]
    ),
)


def _conv2d_weight_grad_kernel(grad_y, x, shape, stride, padding, dilation, groups, backend=""):
    geometry, backend = _geometry(stride, padding, dilation, groups), backends.by_name(backend)
    grad_y, x = _dense(library.readable(grad_y, backend)), _dense(library.readable(x, backend))
    return _weight_grad(grad_y, x, tuple(shape), geometry, (True, False), backend)[0]


_conv2d_weight_grad = library.register(
    "conv2d_weight_grad(Tensor grad_y, Tensor x, SymInt[] shape, int[] stride, int[] padding, int[] dilation, "
    'int groups, str backend="") -> Tensor',
    _conv2d_weight_grad_kernel,
    lambda grad_y, x, shape, *_: x.new_empty(shape),
    lambda grad_y, x, shape, stride, padding, dilation, groups, backend="": Conv2dWeightGrad.apply(
        grad_y, x, tuple(shape), _geometry(stride, padding, dilation, groups), backends.by_name(backend)
    ),
    lambda grad_y, x, shape, *_, **__: 2 * math.prod(shape) * math.prod(grad_y) // grad_y[1],
)


# The entry.


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

    Differentiable, any number of times, in x, values and bias.

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
    if torch.compiler.is_compiling():  # plain tensors alone: compiled code reads memory itself
        batch = x if x.dim() == 4 else x.unsqueeze(0)
        options = pattern.shape[2:], *geometry, channels_last
        y = torch.ops.sparsebreg.conv2d(batch, pattern.rowptr, pattern.col, values, bias, weight, *options)
        return y if x.dim() == 4 else y.squeeze(0)
    _check(x, pattern, values, bias, weight, geometry)
    batch, backend = _dense(x if x.dim() == 4 else x.unsqueeze(0)), backends.current()
    layout = _layout(batch, channels_last, lanes, backend)
    training = torch.is_grad_enabled()  # not known any more inside
    bias = None if bias is None else bias.contiguous()
    rest = geometry, layout, training, backend, library.observed(x, values, bias)
    y = Conv2d.apply(batch, values.contiguous(), bias, weight, pattern, *rest)
    return y if x.dim() == 4 else y.squeeze(0)
