"""C++/OpenMP kernels through the extension ``sparsebreg._C``; memory is shared, not copied."""

from __future__ import annotations

import torch

from sparsebreg import _extension
from sparsebreg.backends._protocol import Geometry
from sparsebreg.errors import BackendError


def _array(t: torch.Tensor | None):
    return None if t is None else t.detach().numpy()


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
        y = x.new_empty(x.shape[0], pattern.rows)
        self.C.linear_forward(
            pattern.native_index(), x.shape[0], _array(x), False, _array(values), _array(bias), _array(y), False,
            torch.get_num_threads(),
        )  # fmt: skip
        return y

    def linear_backward(self, pattern, grad_y, x, values, needs):
        grad_x = grad_y.new_empty(grad_y.shape[0], pattern.cols) if needs[0] else None
        grad_values = torch.empty_like(values) if needs[1] else None
        grad_bias = grad_y.new_empty(pattern.rows) if needs[2] else None
        self.C.linear_backward(
            pattern.native_index(), grad_y.shape[0], _array(grad_y), False, _array(x), False, _array(values),
            _array(grad_x), _array(grad_values), _array(grad_bias), torch.get_num_threads(),
        )  # fmt: skip
        return grad_x, grad_values, grad_bias

    def conv2d_forward(self, pattern, x, values, bias, geometry):
        y = x.new_empty(x.shape[0], pattern.rows, *geometry.output_size(x.shape[2:], pattern.shape[2:]))
        self.C.conv2d_forward(
            pattern.native_index(), x.shape[0], _geometry(pattern, geometry, x.shape), _array(x), False,
            _array(values), _array(bias), _array(y), False, torch.get_num_threads(),
        )  # fmt: skip
        return y

    def conv2d_backward(self, pattern, grad_y, x, values, geometry, x_shape, needs):
        grad_x = grad_y.new_empty(x_shape) if needs[0] else None
        grad_values = torch.empty_like(values) if needs[1] else None
        grad_bias = grad_y.new_empty(pattern.rows) if needs[2] else None
        self.C.conv2d_backward(
            pattern.native_index(), x_shape[0], _geometry(pattern, geometry, x_shape), _array(grad_y), False,
            _array(x), False, _array(values), _array(grad_x), _array(grad_values), _array(grad_bias),
            torch.get_num_threads(),
        )  # fmt: skip
        return grad_x, grad_values, grad_bias


def load() -> NativeBackend:
    """Raises BackendError where the extension was not built or does not load."""
    if (extension := _extension.native()) is None:
        raise BackendError(_extension.CAUSE)
    return NativeBackend(extension)
