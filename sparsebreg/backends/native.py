"""C++/OpenMP kernels through the extension ``sparsebreg._C``; memory is shared, not copied."""

import functools

import numpy as np
import torch

from sparsebreg import lanes
from sparsebreg.backends.protocol import Geometry, Layout
from sparsebreg.core import extension, memory
from sparsebreg.core.errors import BackendError
from sparsebreg.core.gradient import PendingGrad, resolve
from sparsebreg.lanes import LANES, LaneTensor, fusion
from sparsebreg.lanes.tensor import counter_of, hand_on

#: The part of grad_y that may be nonzero for its lists to make the full gradient faster than a dense product does.
MOST_NONZEROS = 0.6

#: From this density on the gradient of all weights of a convolution takes less time than that of the active ones.
LEAST_DENSITY = 0.5

#: How much larger than the gradient its factors may be while they wait.
MOST_ROOM = 2


#: Types of tensors that keep their numbers where torch says.
_ORDINARY = {torch.Tensor, torch.nn.Parameter}


def _layout(t: torch.Tensor) -> Layout:
    if type(t) is LaneTensor:
        return Layout.LANES
    return Layout.PLAIN if t.is_contiguous() else Layout.CHANNELS_LAST


def _memory(t: torch.Tensor | None, layout: Layout = Layout.PLAIN):
    """Converts a tensor to the argument type of the extension; None stays None."""
    if t is None or (type(t) in _ORDINARY and layout is Layout.PLAIN and extension.TENSORS and not t.is_neg()):
        return t
    t = resolve(t)
    if layout is Layout.LANES:
        t = t.packed
    elif t.is_neg():  # torch negates such a tensor when it reads it
        t = t.resolve_neg()
    if layout is Layout.CHANNELS_LAST:
        t = t.permute(0, 2, 3, 1)
    return t if extension.TENSORS else t.detach().numpy()


def _source(x: torch.Tensor | None, layout: Layout):
    """The input of a convolution as the extension's argument, and the pending batch norm in front of it, or None.

    The convolution applies it to what it copies anyway, so that the norm's result need not exist at all.
    """
    waiting = fusion.waiting_norm(x)
    if waiting is None:
        return _memory(x, layout), None
    norm, packed = waiting
    return packed.numpy(), norm


def _gradient(grad: torch.Tensor, layout: Layout):
    """The output gradient as the extension's argument, and the pending batch norm that follows the output, or None."""
    waiting = fusion.waiting_norm_grad(grad)
    return (_memory(grad, layout), None) if waiting is None else waiting


def _result(shape: tuple[int, ...], dtype: torch.dtype, layout: Layout):
    """An uninitialised result tensor, and the same memory as the extension's argument."""
    if layout is Layout.LANES:
        n, *rest = shape
        array = memory.empty_array((lanes.blocks(n), *rest, LANES), dtype)
        return lanes.wrap(torch.from_numpy(array), n), array
    array = memory.empty_array(shape, dtype, layout is Layout.CHANNELS_LAST)
    return torch.from_numpy(array), array if layout is Layout.PLAIN else array.transpose(0, 2, 3, 1)


def _gradients(pattern, dtype: torch.dtype, needs):
    """Uninitialised arrays for grad_values and grad_bias; None for those that are not needed."""
    grad_values = memory.empty_array((pattern.nnz,), dtype) if needs[1] else None
    grad_bias = memory.empty_array((pattern.rows,), dtype) if needs[2] else None
    return grad_values, grad_bias


def _tensor(made) -> torch.Tensor | None:
    """A result of the extension as a tensor; None stays None."""
    return torch.from_numpy(made) if isinstance(made, np.ndarray) else made


@functools.lru_cache(maxsize=1024)
def _geometry(weight: tuple[int, ...], geometry: Geometry, x_shape: tuple[int, ...]) -> tuple[int, ...]:
    """The sizes of a convolution in the extension's order; ``x_shape`` without the batch."""
    pairs = geometry.stride, geometry.padding, geometry.dilation
    return *x_shape, weight[0], *weight[2:], *(n for pair in pairs for n in pair), geometry.groups


class NativeBackend:
    name = "native"
    lanes = True

    def __init__(self, native) -> None:
        self.C = native

    @property
    def isa(self) -> str:
        return self.C.isa()

    def linear_forward(self, pattern, x, values, bias):
        layout = _layout(x)
        return _tensor(
            self.C.linear_forward(
                pattern.native_index(), x.shape[0], _memory(x, layout), layout, _memory(values), _memory(bias),
                torch.get_num_threads(),
            )
        )  # fmt: skip

    def linear_backward(self, pattern, grad_y, x, values, needs):
        n, layout, grad_layout = grad_y.shape[0], Layout.PLAIN if x is None else _layout(x), _layout(grad_y)
        grad_x, grad_values, grad_bias = self.C.linear_backward(
            pattern.native_index(), n, _memory(grad_y, grad_layout), grad_layout, _memory(x, layout), layout,
            _memory(values), *needs, torch.get_num_threads(),
        )  # fmt: skip
        if grad_x is not None and layout is Layout.LANES:
            grad_x = lanes.wrap(_tensor(grad_x), n)
        return _tensor(grad_x), _tensor(grad_values), _tensor(grad_bias)

    def weight_grad(self, grad_y, x):
        n, rows = grad_y.shape
        factors = self.C.Gradient.of(
            n, rows, x.shape[1], _memory(grad_y), _memory(x), MOST_NONZEROS, torch.get_num_threads()
        )
        if factors is None:
            return None
        grad, size = PendingGrad.of(factors, (rows, x.shape[1]), x.dtype), x.element_size()
        room = n * (rows * (4 + size) + x.shape[1] * size)  # about, of many samples
        return grad if room <= MOST_ROOM * grad.numel() * size else grad.dense

    def conv2d_forward(self, pattern, x, values, bias, geometry, layout, training):
        x_layout = _layout(x)
        size = geometry.output_size(x.shape[2:], pattern.shape[2:])
        source, norm = _source(x, x_layout)
        factors = None if norm is None else norm.factors()
        y, into_y = _result((x.shape[0], pattern.rows, *size), x.dtype, layout)
        moments = None
        # A convolution without a bias has a batch norm behind it, as a rule: it gets its statistics along.
        if training and bias is None and layout is Layout.LANES and y.numel():
            moments = fusion.make_moments(y)
        self.C.conv2d_forward(
            pattern.native_index(), x.shape[0], _geometry(pattern.shape, geometry, x.shape[1:]), source, x_layout,
            factors, _memory(values), _memory(bias), into_y, layout, moments, torch.get_num_threads(),
        )  # fmt: skip
        return y

    def conv2d_backward(self, pattern, grad_y, x, values, geometry, x_shape, needs):
        if needs[1] and not needs[0] and pattern.density >= LEAST_DENSITY:
            found = self.conv2d_weight_grad(grad_y, x, pattern.shape, geometry, (False, needs[2]))
            if found is not None:
                return None, pattern.gather(found[0]), found[1]
        layout = _layout(grad_y)
        x_layout = layout if x is None else _layout(x)
        source, norm = _source(x, x_layout)
        factors = None if norm is None else norm.factors()
        grad, grad_norm = _gradient(grad_y, layout)
        grad_x, into_x = _result(tuple(x_shape), grad_y.dtype, x_layout) if needs[0] else (None, None)
        hand_on(counter_of((x, grad_y)), grad_x)
        grad_values, grad_bias = _gradients(pattern, grad_y.dtype, needs)
        sums = None
        if grad_x is not None and norm is not None and norm.relu and grad_x.numel():
            sums = fusion.make_sums(grad_x, norm)
        self.C.conv2d_backward(
            pattern.native_index(), x_shape[0], _geometry(pattern.shape, geometry, x_shape[1:]), grad, layout,
            grad_norm, source, x_layout, factors, sums, _memory(values), into_x, grad_values, grad_bias,
            torch.get_num_threads(),
        )  # fmt: skip
        return grad_x, _tensor(grad_values), _tensor(grad_bias)

    def conv2d_weight_grad(self, grad_y, x, shape, geometry, needs):
        n, layout, grad_layout = grad_y.shape[0], _layout(x), _layout(grad_y)
        if grad_layout is not Layout.LANES and (n < LANES or geometry.is_product(shape[2:], grad_y)):
            return None
        source, norm = _source(x, layout)
        # A gradient that is still to be computed is read once more for grad_x.
        grad, grad_norm = (_memory(grad_y, grad_layout), None) if needs[0] else _gradient(grad_y, grad_layout)
        grad_weight = memory.empty_array(shape, grad_y.dtype)
        grad_bias = memory.empty_array(shape[:1], grad_y.dtype) if needs[1] else None
        self.C.conv2d_weight_grad(
            n, _geometry(shape, geometry, x.shape[1:]), grad, grad_layout, grad_norm, source, layout,
            None if norm is None else norm.factors(), grad_weight, grad_bias, torch.get_num_threads(),
        )  # fmt: skip
        return torch.from_numpy(grad_weight), _tensor(grad_bias)


def load() -> NativeBackend:
    """The native backend. Raises BackendError if the extension was not built or does not load."""
    if (native := extension.native()) is None:
        raise BackendError(extension.CAUSE)
    return NativeBackend(native)
