"""Pooling and resampling: operations on each image plane by itself."""

import torch

from sparsebreg.core import memory
from sparsebreg.core.extension import native
from sparsebreg.lanes.cells import Cell
from sparsebreg.lanes.layout import LANES, blocks, pack, unpack
from sparsebreg.lanes.pointwise import lane_of
from sparsebreg.lanes.tensor import LaneTensor, alias, handles, wrap

aten = torch.ops.aten


# Operations on each image plane by itself: (blocks * C) images of 16 channels in the channels_last format are the same
# bytes, and torch has fast code for those.

_PLANEWISE = [
    aten.avg_pool2d.default, aten.avg_pool2d_backward.default, aten._adaptive_avg_pool2d.default,
    aten._adaptive_avg_pool2d_backward.default, aten.upsample_nearest2d.default, aten.upsample_bilinear2d.default,
    aten.upsample_nearest2d_backward.default, aten.upsample_bilinear2d_backward.default,
]  # fmt: skip


@handles(*_PLANEWISE)
def _planewise(func, args, kwargs):
    like = lane_of(args)
    n, channels = like.shape[:2]
    planes = blocks(n) * channels

    def convert(x):
        if isinstance(x, torch.Tensor):
            packed = x.packed if isinstance(x, LaneTensor) else pack(x.contiguous())
            return packed.view(planes, *packed.shape[2:]).permute(0, 3, 1, 2)
        if isinstance(x, (list, tuple)) and len(x) == 4:  # sizes of an input
            return [planes, LANES, *x[2:]]
        return x

    if any(isinstance(a, torch.Tensor) and (a.dim() != 4 or a.shape[:2] != like.shape[:2]) for a in args):
        return NotImplemented
    y = func(*map(convert, args), **kwargs).contiguous(memory_format=torch.channels_last)
    return wrap(y.permute(0, 2, 3, 1).view(blocks(n), channels, *y.shape[2:], LANES), n)


def _pair(x, default=None) -> tuple[int, int]:
    if not x:
        return default
    return (x[0], x[0]) if len(x) == 1 else (x[0], x[1])


def _pooled(size: int, k: int, s: int, p: int, d: int, ceil: bool) -> int:
    reach = size + 2 * p - d * (k - 1) - 1
    out = (reach + (s - 1 if ceil else 0)) // s + 1
    return out - 1 if ceil and (out - 1) * s >= size + p else out


def _pool_geometry(x, kernel, stride=(), padding=(0,), dilation=(1,), ceil_mode=False):
    kernel = _pair(kernel)
    stride, padding, dilation = _pair(stride, kernel), _pair(padding), _pair(dilation)
    size = x.shape[2:]
    out = [_pooled(size[i], kernel[i], stride[i], padding[i], dilation[i], ceil_mode) for i in (0, 1)]
    fits = min(out) >= 1 and kernel[0] * kernel[1] <= 256
    fits = fits and all(2 * padding[i] <= kernel[i] and dilation[i] <= size[i] for i in (0, 1))
    return out, [*size, *out, *kernel, *stride, *padding, *dilation] if fits else None


@handles(aten.max_pool2d_with_indices.default)
def _max_pool(func, args, kwargs):
    x = args[0]
    if x.dim() != 4 or x.numel() == 0:
        return NotImplemented
    out, geometry = _pool_geometry(*args, **kwargs)
    if geometry is None:
        return NotImplemented
    n, channels = x.shape[:2]
    planes = blocks(n) * channels
    y = memory.empty((blocks(n), channels, *out, LANES), x.dtype)
    codes = memory.empty(tuple(y.shape), torch.uint8)
    native().max_pool(planes, geometry, x.packed.numpy(), y.numpy(), codes.numpy(), None, None, torch.get_num_threads())
    indices = alias(_Indices(codes, n, geometry), (n, channels, *out), torch.int64)
    return wrap(y, n), indices


class _Indices(Cell):
    """The indices of max pooling as torch defines them, computed from the kernel's byte codes on first use."""

    __slots__ = ("codes", "geometry")

    def __init__(self, codes: torch.Tensor, n: int, geometry: list[int]) -> None:
        super().__init__(codes, n)
        self.codes, self.geometry = codes, geometry

    def get_packed(self) -> torch.Tensor:
        _, wide, oh, ow, _, kw, sh, sw, ph, pw, dh, dw = self.geometry
        code = self.codes.to(torch.int64)
        y = torch.arange(oh).view(oh, 1, 1) * sh - ph + code // kw * dh
        x = torch.arange(ow).view(1, ow, 1) * sw - pw + code % kw * dw
        return y * wide + x

    def get_plain(self) -> torch.Tensor:
        if self.plain is None:
            self.plain = unpack(self.get_packed(), self.n)
        return self.plain


@handles(aten.max_pool2d_with_indices_backward.default)
def _max_pool_backward(func, args, kwargs):
    grad, x, *_, indices = args
    cell = getattr(indices, "_cell", None)
    if not isinstance(cell, _Indices) or cell.exposed:
        return NotImplemented
    n, channels = x.shape[:2]
    grad = grad.packed if isinstance(grad, LaneTensor) else pack(grad.contiguous())
    grad_x = memory.empty((blocks(n), *x.shape[1:], LANES), grad.dtype)
    native().max_pool(
        blocks(n) * channels, cell.geometry, None, None, cell.codes.numpy(), grad.numpy(), grad_x.numpy(),
        torch.get_num_threads(),
    )  # fmt: skip
    return wrap(grad_x, n)
