"""The 2-D convolution over a pattern."""

import math
from typing import Any, NamedTuple

import torch

from sparsebreg import backends
from sparsebreg.backends import Geometry, Layout
from sparsebreg.core import memory
from sparsebreg.core.errors import check_input, expected
from sparsebreg.core.pattern import SparsePattern
from sparsebreg.core.profiling import labelled
from sparsebreg.lanes import LANES, LaneTensor, from_plain
from sparsebreg.ops import library, product
from sparsebreg.ops.product import Product


class Conv2d(NamedTuple):
    """The convolution as a ``product.Kind``: x (N, IC, H, W), plain, channels_last or in lanes, to (N, OC, OH, OW).

    ``lanes``: y is to be a lane tensor where the batch fills it. ``training``: a batch norm that follows will want the
    statistics of y.
    """

    pattern: SparsePattern
    backend: Any
    geometry: Geometry
    channels_last: bool = False
    lanes: bool = False
    training: bool = False

    name = "conv2d"

    @classmethod
    def of(cls, pattern, backend, options):
        _, stride, padding, dilation, groups, channels_last = options
        geometry = Geometry(tuple(stride), tuple(padding), tuple(dilation), groups)
        return cls(pattern, backend, geometry, channels_last)

    def options(self):
        return self.pattern.shape[2:], *self.geometry, self.channels_last

    def output_size(self, x_shape):
        return x_shape[0], self.pattern.rows, *self.geometry.sizes(x_shape[2:], self.pattern.shape[2:])

    def dense(self, x):
        """x itself where it is contiguous in the plain or the channels_last format, else a plain copy."""
        if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
            return x
        return x.contiguous()

    def formatted(self, t, like, result=False):
        plain = self.dense(like).is_contiguous() and not (result and self.channels_last)
        if isinstance(t, LaneTensor):
            return t
        return t.contiguous(memory_format=torch.contiguous_format if plain else torch.channels_last)

    def check(self, x, values, bias, weight):
        product.check_parameters(values, bias, weight, self.pattern, 4, "2-D convolution's")
        check_input("x", x, values.dtype)
        channels, kernel = self.pattern.shape[1] * self.geometry.groups, self.pattern.shape[2:]
        if x.dim() not in (3, 4) or x.shape[-3] != channels:
            raise ValueError(expected("x", f"shape (N, {channels}, H, W)", tuple(x.shape)))
        if min(self.geometry.output_size(x.shape[-2:], kernel)) < 1:
            raise ValueError(expected("x", f"an image that the kernel {kernel} fits into", tuple(x.shape)))

    def layout(self, x) -> Layout:
        """The layout of y for a ``dense`` x."""
        if self.backend.lanes and (isinstance(x, LaneTensor) or (self.lanes and len(x) >= LANES)):
            return Layout.LANES
        return Layout.CHANNELS_LAST if self.channels_last or not x.is_contiguous() else Layout.PLAIN

    @labelled("conv2d")
    def forward(self, x, values, bias):
        layout, x = self.layout(x), library.readable(x, self.backend)
        return self.backend.conv2d_forward(self.pattern, x, values, bias, self.geometry, layout, self.training)

    @labelled("conv2d_backward")
    def backward(self, grad_y, x, values, x_shape, needs):
        grad_y = self.dense(library.readable(grad_y, self.backend))
        return self.backend.conv2d_backward(self.pattern, grad_y, x, values, self.geometry, x_shape, needs)

    @labelled("weight_grad")
    def weight_grad(self, grad_y, x, needs):
        grad_y, shape = self.dense(library.readable(grad_y, self.backend)), self.pattern.shape
        found = self.backend.conv2d_weight_grad(grad_y, x, shape, self.geometry, needs)
        if found is not None:
            return found
        grad_y, x = library.plain(grad_y), library.plain(x)
        stride, padding, dilation, groups = self.geometry
        if self.geometry.is_product(shape[2:], grad_y):
            # oneDNN writes out of bounds for strided 1x1 kernels in the channels_last format (torch 2.13, 8 channels).
            x = x[:, :, :: stride[0], :: stride[1]].permute(0, 2, 3, 1).reshape(-1, shape[1])
            grad_y = grad_y.permute(0, 2, 3, 1).reshape(-1, shape[0])
            return torch.mm(grad_y.t(), x, out=memory.empty(shape[:2], x.dtype)).view(shape), None
        weight = x.new_empty(1).expand(shape)  # only its sizes count
        _, grad, _ = torch.ops.aten.convolution_backward(
            grad_y, x, weight, None, stride, padding, dilation, False, (0, 0), groups, (False, True, False)
        )
        return grad if grad.is_contiguous() else memory.empty(shape, grad.dtype).copy_(grad), None

    def weight_grad_grads(self, grad_y, x, grad):
        stride, padding, dilation, groups = self.geometry
        rest = [0], stride, padding, dilation, False, [0, 0], groups, [True, False, False]
        grad_x = torch.ops.aten.convolution_backward(grad_y, x, grad, *rest)[0]
        return torch.nn.functional.conv2d(x, grad, None, *self.geometry), grad_x


def _weight_shape(rows, x_shape, options):
    kernel_size, *_, groups, _ = options
    return rows, x_shape[1] // groups, *kernel_size


product.register(
    "conv2d",
    ", SymInt[] kernel_size, int[] stride, int[] padding, int[] dilation, int groups, bool channels_last",
    Conv2d.of,
    _weight_shape,
    lambda values, y: 2 * values[0] * math.prod(y) // max(1, y[1]),
)


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
        x: (N, IC, H, W) or (IC, H, W), float32 or float64, on the CPU; under ``torch.autocast`` any floating dtype.
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
    x = library.under_autocast(x, getattr(values, "dtype", None))
    if torch.compiler.is_compiling():  # plain tensors alone: compiled code reads memory itself
        batch = x if x.dim() == 4 else x.unsqueeze(0)
        options = pattern.shape[2:], *geometry, channels_last
        y = torch.ops.sparsebreg.conv2d(batch, pattern.rowptr, pattern.col, values, bias, weight, *options)
        return y if x.dim() == 4 else y.squeeze(0)
    # Whether gradients are wanted is not known any more inside.
    kind = Conv2d(pattern, backends.current(), geometry, channels_last, lanes, torch.is_grad_enabled())
    kind.check(x, values, bias, weight)
    batch, seen = kind.dense(x if x.dim() == 4 else x.unsqueeze(0)), library.observed(x, values, bias)
    if seen and kind.layout(batch) is Layout.LANES and not isinstance(batch, LaneTensor):
        batch = from_plain(batch)  # an operator returns a lane tensor for one alone
    bias = None if bias is None else bias.contiguous()
    y = Product.apply(batch, values.contiguous(), bias, weight, kind, seen)
    return y if x.dim() == 4 else y.squeeze(0)
