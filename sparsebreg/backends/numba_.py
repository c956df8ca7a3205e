"""Numba kernels, for platforms without a C++ compiler.

The sources are laid out so that a nonzero acts on one long contiguous run: samples innermost, then columns. A linear
layer is a convolution over one image of one row. torch does the layout, Numba the arithmetic.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from sparsebreg.backends._protocol import FORMATS, Geometry
from sparsebreg.errors import BackendError

LANES = 16


def _compile():
    import numba

    options = {"parallel": True, "fastmath": {"contract", "reassoc"}, "cache": True, "boundscheck": False}

    @numba.njit(**options)
    def gather(src, offset, value, ptr, bias, rows, src_image, src_row, length, dst):
        """dst[i, d, r, :] = bias[d] + sum_k value[k] * src[i*src_image + offset[k] + r*src_row + :length]."""
        images, channels = dst.shape[0], dst.shape[1]
        for task in numba.prange(images * channels):
            image, d = task // channels, task % channels
            for r in range(rows):
                out = dst[image, d, r]
                base = image * src_image + r * src_row
                out[:] = bias[d]
                k, end = ptr[d], ptr[d + 1]
                # Four nonzeros per pass: the sums are loaded and stored once for four multiply-adds.
                while k + 4 <= end:
                    a, b, c, e = value[k], value[k + 1], value[k + 2], value[k + 3]
                    s = src[base + offset[k] : base + offset[k] + length]
                    t = src[base + offset[k + 1] : base + offset[k + 1] + length]
                    u = src[base + offset[k + 2] : base + offset[k + 2] + length]
                    v = src[base + offset[k + 3] : base + offset[k + 3] + length]
                    for j in range(length):
                        out[j] += a * s[j] + b * t[j] + c * u[j] + e * v[j]
                    k += 4
                while k < end:
                    a = value[k]
                    s = src[base + offset[k] : base + offset[k] + length]
                    for j in range(length):
                        out[j] += a * s[j]
                    k += 1

    @numba.njit(**options)
    def correlate(src, offset, ptr, grad, src_image, src_row, length, grad_values):
        """grad_values[k] = sum_{i, r, j} grad[i, d, r, j] * src[i*src_image + offset[k] + r*src_row + j]."""
        images, channels, rows = grad.shape[0], grad.shape[1], grad.shape[2]
        for d in numba.prange(channels):
            for k in range(ptr[d], ptr[d + 1]):
                grad_values[k] = 0
            for image in range(images):
                for r in range(rows):
                    g = grad[image, d, r]
                    base = image * src_image + r * src_row
                    for k in range(ptr[d], ptr[d + 1]):
                        s = src[base + offset[k] : base + offset[k] + length]
                        total = g[0] * s[0]
                        for j in range(1, length):
                            total += g[j] * s[j]
                        grad_values[k] += total

    return numba, gather, correlate


def _pad_to(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _to_lanes(x: torch.Tensor, pad: tuple[int, int, int, int], phases: tuple[int, int]) -> torch.Tensor:
    """(N, C, H, W) to [N/16][C][SH][SW][rows][columns][16], zero border added, rows and columns sorted by phase.

    ``pad`` is (left, right, top, bottom), as for ``torch.nn.functional.pad``, and may cut.
    """
    n, c = x.shape[:2]
    sh, sw = phases
    high, wide = x.shape[2] + pad[2] + pad[3], x.shape[3] + pad[0] + pad[1]
    high, wide = _pad_to(high, sh) - high, _pad_to(wide, sw) - wide
    x = F.pad(x, (pad[0], pad[1] + wide, pad[2], pad[3] + high, 0, 0, 0, _pad_to(n, LANES) - n))
    x = x.reshape(-1, LANES, c, x.shape[2] // sh, sh, x.shape[3] // sw, sw)
    return x.permute(0, 2, 4, 6, 3, 5, 1).contiguous()


class NumbaBackend:
    name = "numba"
    lanes = False

    def __init__(self) -> None:
        self.numba, self._gather, self._correlate = _compile()

    def _threads(self) -> None:
        # Starting Numba's pool may change the thread count of the OpenMP runtime that torch uses: put it back.
        wanted = torch.get_num_threads()
        self.numba.set_num_threads(max(1, min(wanted, self.numba.config.NUMBA_NUM_THREADS)))
        if torch.get_num_threads() != wanted:
            torch.set_num_threads(wanted)

    def _run_gather(self, src, offset, value, ptr, bias, rows, src_row, length, images, channels):
        """dst (images, channels, rows, length)."""
        dst = src.new_empty(images, channels, rows, length)
        if dst.numel():
            bias = src.new_zeros(channels) if bias is None else bias.detach()
            self._threads()
            self._gather(
                src.view(-1).numpy(), offset, value.detach().numpy(), ptr, bias.numpy(), rows,
                src.numel() // max(1, images), src_row, length, dst.numpy(),
            )  # fmt: skip
        return dst

    def _run_correlate(self, src, offset, ptr, grad, src_row, length, nnz):
        grad_values = src.new_zeros(nnz)
        if grad.numel() and nnz:
            self._threads()
            self._correlate(
                src.view(-1).numpy(), offset, ptr, grad.numpy(), src.numel() // grad.shape[0], src_row, length,
                grad_values.numpy(),
            )  # fmt: skip
        return grad_values

    # Linear: [features][samples], one image of one row.

    def linear_forward(self, pattern, x, values, bias):
        n = x.shape[0]
        src = F.pad(x.t(), (0, _pad_to(n, LANES) - n)).contiguous()
        offset = pattern.col.numpy().astype(np.int64) * src.shape[1]
        y = self._run_gather(src, offset, values, pattern.rowptr.numpy(), bias, 1, 0, src.shape[1], 1, pattern.rows)
        return y.view(pattern.rows, -1)[:, :n].t().contiguous()

    def linear_backward(self, pattern, grad_y, x, values, needs):
        n = grad_y.shape[0]
        pad = (0, _pad_to(n, LANES) - n)
        grad = F.pad(grad_y.t(), pad).contiguous()
        width = grad.shape[1]
        grad_x = grad_values = None
        if needs[0]:
            offset = pattern.row.numpy().astype(np.int64) * width
            ordered = values.detach()[pattern.csc_to_csr.long()]
            g = self._run_gather(grad, offset, ordered, pattern.colptr.numpy(), None, 1, 0, width, 1, pattern.cols)
            grad_x = g.view(pattern.cols, -1)[:, :n].t().contiguous()
        if needs[1]:
            src = F.pad(x.t(), pad).contiguous()
            offset = pattern.col.numpy().astype(np.int64) * width
            grad_values = self._run_correlate(
                src, offset, pattern.rowptr.numpy(), grad.view(1, pattern.rows, 1, width), 0, width, pattern.nnz
            )
        return grad_x, grad_values, grad_y.sum(0) if needs[2] else None

    # Conv2d.

    def _forward_plan(self, pattern, geometry: Geometry, x_shape):
        """Offsets of the nonzeros in the lane layout of x, and the padding that makes every window fit."""
        oc, icg, kh, kw = pattern.shape
        (sh, sw), (ph, pw), (dh, dw), groups = geometry
        oh, ow = geometry.output_size(x_shape[2:], (kh, kw))
        high = (oh - 1) * sh + (kh - 1) * dh + 1
        wide = (ow - 1) * sw + (kw - 1) * dw + 1
        pad = (pw, wide - x_shape[3] - pw, ph, high - x_shape[2] - ph)
        rows, cols = _pad_to(high, sh) // sh, _pad_to(wide, sw) // sw
        c, ky, kx = (
            a.reshape(-1) for a in np.meshgrid(np.arange(icg), np.arange(kh) * dh, np.arange(kw) * dw, indexing="ij")
        )
        table = (((c * sh + ky % sh) * sw + kx % sw) * rows + ky // sh) * cols + kx // sw
        row = np.repeat(np.arange(oc), np.diff(pattern.rowptr.numpy()))
        group = row // max(1, oc // groups) * icg * sh * sw * rows * cols
        offset = (table[pattern.col.numpy()] + group) * LANES
        return offset, pad, cols * LANES, (oh, ow)

    def _plan(self, pattern, geometry, x_shape):
        key = ("numba", geometry, tuple(x_shape[2:]))
        return pattern.cached(key, lambda: self._forward_plan(pattern, geometry, x_shape))

    def conv2d_forward(self, pattern, x, values, bias, geometry, layout, training):
        offset, pad, src_row, (oh, ow) = self._plan(pattern, geometry, x.shape)
        src = _to_lanes(x, pad, geometry.stride)
        y = self._run_gather(
            src, offset, values, pattern.rowptr.numpy(), bias, oh, src_row, ow * LANES, src.shape[0], pattern.rows
        )
        y = y.view(-1, pattern.rows, oh, ow, LANES).permute(0, 4, 1, 2, 3)
        y = y.reshape(-1, pattern.rows, oh, ow)[: x.shape[0]]
        return y.contiguous(memory_format=FORMATS[layout])

    def _backward_plan(self, pattern, geometry: Geometry, x_shape):
        """The nonzeros sorted by (input channel, phase of the destination), and their offsets in grad_y."""
        oc, icg, kh, kw = pattern.shape
        (sh, sw), padding, dilation, groups = geometry
        oh, ow = geometry.output_size(x_shape[2:], (kh, kw))
        axes = []
        for k, s, p, d in zip((kh, kw), (sh, sw), padding, dilation, strict=True):
            shift = np.arange(k) * d - p
            phase = shift % s
            reach = (phase - shift) // s  # oy = j + reach for destination j*s + phase
            axes.append((phase, reach, reach.min()))
        (py, ey, ymin), (px, ex, xmin) = axes
        jh, jw = -(-x_shape[2] // sh), -(-x_shape[3] // sw)
        rows, cols = jh + int(ey.max() - ymin), jw + int(ex.max() - xmin)
        pad = (-int(xmin), cols + int(xmin) - ow, -int(ymin), rows + int(ymin) - oh)
        col = pattern.col.numpy()
        c, ky, kx = col // (kh * kw), col // kw % kh, col % kw
        row = np.repeat(np.arange(oc), np.diff(pattern.rowptr.numpy()))
        channel = row // max(1, oc // groups) * icg + c
        key = (channel * sh + py[ky]) * sw + px[kx]
        order = np.argsort(key, kind="stable")
        ptr = np.zeros(icg * groups * sh * sw + 1, dtype=np.int64)
        np.cumsum(np.bincount(key, minlength=len(ptr) - 1), out=ptr[1:])
        offset = (((row * rows + ey[ky] - ymin) * cols + ex[kx] - xmin) * LANES)[order]
        return torch.from_numpy(order), ptr, offset, pad, cols * LANES, (jh, jw)

    def conv2d_backward(self, pattern, grad_y, x, values, geometry, x_shape, needs):
        n, channels = x_shape[:2]
        grad_x = grad_values = None
        if needs[0]:
            order, ptr, offset, pad, src_row, (jh, jw) = pattern.cached(
                ("numba back", geometry, tuple(x_shape[2:])), lambda: self._backward_plan(pattern, geometry, x_shape)
            )
            src = _to_lanes(grad_y, pad, (1, 1))
            sh, sw = geometry.stride
            g = self._run_gather(
                src,
                offset,
                values.detach()[order],
                ptr,
                None,
                jh,
                src_row,
                jw * LANES,
                src.shape[0],
                channels * sh * sw,
            )
            g = g.view(-1, channels, sh, sw, jh, jw, LANES).permute(0, 6, 1, 4, 2, 5, 3)
            g = g.reshape(-1, channels, jh * sh, jw * sw)
            grad_x = g[:n, :, : x_shape[2], : x_shape[3]].contiguous()
        if needs[1]:
            offset, pad, src_row, (oh, ow) = self._plan(pattern, geometry, x_shape)
            src = _to_lanes(x, pad, geometry.stride)
            grad = _to_lanes(grad_y, (0, 0, 0, 0), (1, 1)).view(src.shape[0], pattern.rows, oh, ow * LANES)
            grad_values = self._run_correlate(
                src, offset, pattern.rowptr.numpy(), grad, src_row, ow * LANES, pattern.nnz
            )
        return grad_x, grad_values, grad_y.sum((0, 2, 3)) if needs[2] else None


def load() -> NumbaBackend:
    """Raises BackendError where Numba is not installed or does not import."""
    try:
        return NumbaBackend()
    except ImportError as error:
        raise BackendError(f"numba does not import: {error}") from error
