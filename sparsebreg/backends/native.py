"""C++/OpenMP kernels through the extension ``sparsebreg._C``; memory is shared, not copied."""

from __future__ import annotations

import torch

from sparsebreg import _extension, memory
from sparsebreg.backends._protocol import Geometry
from sparsebreg.errors import BackendError

PLAIN, LANES, CHANNELS_LAST = 0, 1, 2


def _array(t: torch.Tensor | None):
    return None if t is None else t.detach().numpy()


def _image(t: torch.Tensor | None, layout: int):
    if t is not None and layout == CHANNELS_LAST:
        t = t.permute(0, 2, 3, 1)
    return _array(t)


def _layout(t: torch.Tensor) -> int:
    return PLAIN if t.is_contiguous() else CHANNELS_LAST


FORMAT = {PLAIN: torch.contiguous_format, CHANNELS_LAST: torch.channels_last}


def _geometry(pattern, geometry: Geometry, x_shape) -> list[int]:
    rows, _, kh, kw = pattern.shape
    _, channels, high, wide = x_shape
    return [
        channels,
        high,
        wide,
        rows,
        kh,
        kw,
        *geometry.stride,
        *geometry.padding,
        *geometry.dilation,
        geometry.groups,
    ]


class NativeBackend:
    name = "native"

    def __init__(self, extension) -> None:
        self.C = extension

    @property
    def isa(self) -> str:
        return self.C.isa()

    def linear_forward(self, pattern, x, values, bias):
        y = memory.empty((x.shape[0], pattern.rows), x.dtype)
        self.C.linear_forward(
            pattern.native_index(), x.shape[0], _array(x), PLAIN, _array(values), _array(bias), _array(y), PLAIN,
            torch.get_num_threads(),
        )  # fmt: skip
        return y

    def linear_backward(self, pattern, grad_y, x, values, needs):
        grad_x = memory.empty((grad_y.shape[0], pattern.cols), grad_y.dtype) if needs[0] else None
        grad_values = torch.empty_like(values) if needs[1] else None
        grad_bias = grad_y.new_empty(pattern.rows) if needs[2] else None
        self.C.linear_backward(
            pattern.native_index(), grad_y.shape[0], _array(grad_y), PLAIN, _array(x), PLAIN, _array(values),
            _array(grad_x), _array(grad_values), _array(grad_bias), torch.get_num_threads(),
        )  # fmt: skip
        return grad_x, grad_values, grad_bias

    def conv2d_forward(self, pattern, x, values, bias, geometry, channels_last):
        layout, y_layout = _layout(x), CHANNELS_LAST if channels_last else PLAIN
        size = geometry.output_size(x.shape[2:], pattern.shape[2:])
        y = memory.empty((x.shape[0], pattern.rows, *size), x.dtype, FORMAT[y_layout])
        self.C.conv2d_forward(
            pattern.native_index(), x.shape[0], _geometry(pattern, geometry, x.shape), _image(x, layout), layout,
            _array(values), _array(bias), _image(y, y_layout), y_layout, torch.get_num_threads(),
        )  # fmt: skip
        return y

    def conv2d_backward(self, pattern, grad_y, x, values, geometry, x_shape, needs):
        layout = _layout(grad_y)
        x_layout = layout if x is None else _layout(x)
        grad_x = memory.empty(tuple(x_shape), grad_y.dtype, FORMAT[x_layout]) if needs[0] else None
        grad_values = torch.empty_like(values) if needs[1] else None
        grad_bias = grad_y.new_empty(pattern.rows) if needs[2] else None
        self.C.conv2d_backward(
            pattern.native_index(), x_shape[0], _geometry(pattern, geometry, x_shape), _image(grad_y, layout), layout,
            _image(x, x_layout), x_layout, _array(values), _image(grad_x, x_layout), _array(grad_values),
            _array(grad_bias), torch.get_num_threads(),
        )  # fmt: skip
        return grad_x, grad_values, grad_bias


def load() -> NativeBackend:
    """Raises BackendError where the extension was not built or does not load."""
    if (extension := _extension.native()) is None:
        raise BackendError(_extension.CAUSE)
    return NativeBackend(extension)
