"""Numba kernels, for platforms without a C++ compiler.

The sources are laid out so that a nonzero acts on one long contiguous run: samples innermost, then columns, then rows;
what a run yields between two rows of an image is not read. A linear layer is a convolution over images of one pixel.
"""

import math
import threading

import numpy as np
import torch

from sparsebreg.backends.protocol import FORMATS, Geometry
from sparsebreg.core import memory
from sparsebreg.core.errors import BackendError

LANES = 16

#: Numbers of a run that are computed at a time: their sums stay in the first-level cache.
TILE = 1024


def _compile():
    import numba

    options = {"parallel": True, "fastmath": {"contract", "reassoc"}, "cache": True, "boundscheck": False}

    @numba.njit(**options)
    def pack(x, top, left, dst):
        """x (N, C, H, W) to dst (blocks, C, SH, SW, rows, columns, LANES), shifted down and right; zero elsewhere.

        Row y + top is row (y + top) // SH of phase (y + top) % SH; columns likewise.
        """
        n, channels, high, wide = x.shape
        blocks, _, sh, sw, rows, cols, lanes = dst.shape
        y0, y1 = max(0, -top), min(high, rows * sh - top)
        x0, x1 = max(0, -left), min(wide, cols * sw - left)
        for task in numba.prange(blocks * channels):
            b, c = task // channels, task % channels
            dst[b, c] = 0
            # A row of all lanes at a time, side by side: planes of images lie at distances that caches dislike.
            held = np.zeros((LANES, wide), x.dtype)
            for y in range(y0, y1):
                i, py = (y + top) // sh, (y + top) % sh
                for lane in range(min(lanes, n - b * lanes)):
                    source, to = x[b * lanes + lane, c, y], held[lane]
                    for j in range(wide):
                        to[j] = source[j]
                if sw == 1:
                    row = dst[b, c, py, 0, i]
                    for j in range(x0, x1):
                        for lane in range(LANES):
                            row[j + left, lane] = held[lane, j]
                else:
                    for j in range(x0, x1):
                        row = dst[b, c, py, (j + left) % sw, i, (j + left) // sw]
                        for lane in range(LANES):
                            row[lane] = held[lane, j]

    @numba.njit(**options)
    def unpack(src, y):
        """The other way, without a shift: what lies beyond y (N, C, H, W) is left out."""
        n, channels, high, wide = y.shape
        blocks, _, sh, sw, _, _, lanes = src.shape
        for task in numba.prange(blocks * channels):
            b, c = task // channels, task % channels
            for r in range(high):
                i, py = r // sh, r % sh
                for lane in range(min(lanes, n - b * lanes)):
                    out = y[b * lanes + lane, c, r]
                    if sw == 1:
                        row = src[b, c, py, 0, i]
                        for j in range(wide):
                            out[j] = row[j, lane]
                    else:
                        for j in range(wide):
                            out[j] = src[b, c, py, j % sw, i, j // sw, lane]

    @numba.njit(**options)
    def turn(x, dst):
        """x (rows, columns) to dst (columns, rows or more); what is beyond is zero."""
        rows, cols = x.shape
        for block in numba.prange((cols + LANES - 1) // LANES):
            first = block * LANES
            wide = min(LANES, cols - first)
            # A square at a time, so that both sides are read and written along their rows.
            held = np.empty((LANES, LANES), x.dtype)
            for i in range(0, rows, LANES):
                high = min(LANES, rows - i)
                if high == LANES and wide == LANES:  # constants, which make vectors of the loops
                    for r in range(LANES):
                        for c in range(LANES):
                            held[r, c] = x[i + r, first + c]
                    for c in range(LANES):
                        for r in range(LANES):
                            dst[first + c, i + r] = held[r, c]
                else:
                    for c in range(wide):
                        for r in range(high):
                            dst[first + c, i + r] = x[i + r, first + c]
            dst[first : first + wide, rows:] = 0

    @numba.njit(**options)
    def take(value, order, out):
        for k in numba.prange(len(out)):
            out[k] = value[order[k]]

    @numba.njit(**options)
    def gather(src, offset, value, ptr, bias, length, parts, dst):
        """dst[i, d, j] = bias[d] + sum_k value[k] * src[i, offset[k] + j] for j < length.

        ``parts``: among how many tasks the destinations of a tile are shared.
        """
        images, channels = dst.shape[0], dst.shape[1]
        tiles = (length + TILE - 1) // TILE
        for task in numba.prange(images * tiles * parts):
            part, tile, image = task % parts, task // parts % tiles, task // parts // tiles
            first = tile * TILE
            n = min(TILE, length - first)
            source = src[image, first:]
            for d in range(channels * part // parts, channels * (part + 1) // parts):
                out = dst[image, d, first : first + n]
                out[:] = bias[d]
                k, end = ptr[d], ptr[d + 1]
                # Eight nonzeros a pass: the sums are loaded and stored once for eight multiply-adds.
                while k + 8 <= end:
                    a0, a1, a2, a3 = value[k], value[k + 1], value[k + 2], value[k + 3]
                    a4, a5, a6, a7 = value[k + 4], value[k + 5], value[k + 6], value[k + 7]
                    s0, s1 = source[offset[k] :], source[offset[k + 1] :]
                    s2, s3 = source[offset[k + 2] :], source[offset[k + 3] :]
                    s4, s5 = source[offset[k + 4] :], source[offset[k + 5] :]
                    s6, s7 = source[offset[k + 6] :], source[offset[k + 7] :]
                    for j in range(n):
                        out[j] += (a0 * s0[j] + a1 * s1[j] + a2 * s2[j] + a3 * s3[j]) + (
                            a4 * s4[j] + a5 * s5[j] + a6 * s6[j] + a7 * s7[j]
                        )
                    k += 8
                while k + 2 <= end:
                    a0, a1 = value[k], value[k + 1]
                    s0, s1 = source[offset[k] :], source[offset[k + 1] :]
                    for j in range(n):
                        out[j] += a0 * s0[j] + a1 * s1[j]
                    k += 2
                if k < end:
                    a0 = value[k]
                    s0 = source[offset[k] :]
                    for j in range(n):
                        out[j] += a0 * s0[j]

    @numba.njit(**options)
    def correlate(src, offset, ptr, grad, start, length, parts, grad_values):
        """grad_values[k] = sum_{i, j} grad[i, d, start + j] * src[i, offset[k] + j] over j < length; k in row d."""
        images, channels = grad.shape[0], grad.shape[1]
        tiles = (length + TILE - 1) // TILE
        for part in numba.prange(parts):
            d0, d1 = channels * part // parts, channels * (part + 1) // parts
            grad_values[ptr[d0] : ptr[d1]] = 0
            zero = grad_values.dtype.type(0)
            for step in range(images * tiles):
                image, first = step // tiles, step % tiles * TILE
                n = min(TILE, length - first)
                source = src[image, first:]
                for d in range(d0, d1):
                    g = grad[image, d, start + first : start + first + n]
                    k, end = ptr[d], ptr[d + 1]
                    while k + 4 <= end:
                        s0, s1 = source[offset[k] :], source[offset[k + 1] :]
                        s2, s3 = source[offset[k + 2] :], source[offset[k + 3] :]
                        t0 = t1 = t2 = t3 = zero
                        for j in range(n):
                            t0 += g[j] * s0[j]
                            t1 += g[j] * s1[j]
                            t2 += g[j] * s2[j]
                            t3 += g[j] * s3[j]
                        grad_values[k] += t0
                        grad_values[k + 1] += t1
                        grad_values[k + 2] += t2
                        grad_values[k + 3] += t3
                        k += 4
                    while k < end:
                        s0 = source[offset[k] :]
                        t0 = zero
                        for j in range(n):
                            t0 += g[j] * s0[j]
                        grad_values[k] += t0
                        k += 1

    return numba, pack, unpack, turn, take, gather, correlate


def _pad_to(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _array(x: torch.Tensor) -> np.ndarray:
    return x.detach().resolve_neg().numpy()


def _flat(x: np.ndarray, first: int) -> np.ndarray:
    """Merges the dimensions from ``first`` on into one."""
    return x.reshape(*x.shape[:first], math.prod(x.shape[first:]))


class NumbaBackend:
    name = "numba"
    lanes = False

    def __init__(self) -> None:
        self.numba, self._pack, self._unpack, self._turn, self._take, self._gather, self._correlate = _compile()
        self._kept = threading.local()

    def _use_threads(self) -> None:
        """Sets Numba's thread count to torch's, at the beginning of a pass."""
        # Starting Numba's pool may change the thread count of the OpenMP runtime that torch uses: put it back.
        wanted = torch.get_num_threads()
        self.numba.set_num_threads(max(1, min(wanted, self.numba.config.NUMBA_NUM_THREADS)))
        if torch.get_num_threads() != wanted:
            torch.set_num_threads(wanted)

    def _scratch(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> np.ndarray:
        """Working memory that is reused between calls: page faults on new memory would cost more than the work."""
        size = math.prod(shape)
        kept = self._kept.__dict__.get((name, dtype))
        if kept is None or len(kept) < size:
            kept = self._kept.__dict__[name, dtype] = memory.empty_array((size,), dtype)
        return kept[:size].reshape(shape)

    def _ordered(self, values: torch.Tensor, order) -> np.ndarray:
        out = self._scratch("values", (len(order),), values.dtype)
        self._take(_array(values), order, out)
        return out

    def _turned(self, x: torch.Tensor, name: str) -> np.ndarray:
        """(N, features) to (features, N and some more)."""
        dst = self._scratch(name, (x.shape[1], _pad_to(len(x), LANES)), x.dtype)
        self._turn(_array(x), dst)
        return dst

    def _turned_back(self, x: np.ndarray, n: int, dtype: torch.dtype) -> torch.Tensor:
        y = memory.empty((n, len(x)), dtype)
        self._turn(x[:, :n], y.numpy())
        return y

    def _run_gather(self, src, offset, value, ptr, bias, length, dst):
        """src (images, numbers of an image), dst (images, channels, numbers of a plane); see ``gather``."""
        if dst.size:
            images, channels = dst.shape[:2]
            bias = np.zeros(channels, dst.dtype) if bias is None else _array(bias)
            tasks = images * -(-length // TILE)
            parts = max(1, min(channels, -(-4 * self.numba.get_num_threads() // tasks)))
            self._gather(src, offset, value, ptr, bias, length, parts, dst)

    def _run_correlate(self, src, offset, ptr, grad, start, length, values: torch.Tensor) -> torch.Tensor:
        """The gradients of the values; grad (images, channels, numbers of a plane); see ``correlate``."""
        if not grad.size:
            return torch.zeros_like(values)
        grad_values = memory.empty(values.shape, values.dtype)
        if len(values):
            parts = max(1, min(grad.shape[1], 4 * self.numba.get_num_threads()))
            self._correlate(src, offset, ptr, grad, start, length, parts, grad_values.numpy())
        return grad_values

    def _to_lanes(
        self, x: torch.Tensor, name: str, shift: tuple[int, int], phases: tuple[int, int], size
    ) -> np.ndarray:
        """(N, C, H, W) to (N / 16, C, *phases, *size, 16); see ``pack``."""
        dst = self._scratch(name, (-(-x.shape[0] // LANES), x.shape[1], *phases, *size, LANES), x.dtype)
        if dst.size:
            self._pack(_array(x), *shift, dst)
        return dst

    def _from_lanes(
        self, src: np.ndarray, shape, dtype: torch.dtype, memory_format: torch.memory_format
    ) -> torch.Tensor:
        y = memory.empty(tuple(shape), dtype, memory_format)
        if y.numel():
            self._unpack(src, y.numpy())
        return y

    # Linear: [features][samples], one image of one row.

    def _linear_plan(self, pattern, width: int):
        """Offsets of the nonzeros in x and in grad_y, and the order of the latter."""

        def make():
            rows, cols = pattern.row.numpy(), pattern.col.numpy()
            return cols.astype(np.int64) * width, rows.astype(np.int64) * width, pattern.csc_to_csr.numpy()

        return pattern.cached(("numba linear", width), make)

    def linear_forward(self, pattern, x, values, bias):
        self._use_threads()
        src = self._turned(x, "source")
        width = src.shape[1]
        y = self._scratch("dest", (1, pattern.rows, width), x.dtype)
        offset = self._linear_plan(pattern, width)[0]
        self._run_gather(src.reshape(1, -1), offset, _array(values), pattern.rowptr.numpy(), bias, width, y)
        return self._turned_back(y[0], len(x), x.dtype)

    def linear_backward(self, pattern, grad_y, x, values, needs):
        self._use_threads()
        grad = self._turned(grad_y, "grad")
        width = grad.shape[1]
        offset, back_offset, order = self._linear_plan(pattern, width)
        grad_x = grad_values = None
        if needs[0]:
            g = self._scratch("dest", (1, pattern.cols, width), grad_y.dtype)
            ordered, ptr = self._ordered(values, order), pattern.colptr.numpy()
            self._run_gather(grad.reshape(1, -1), back_offset, ordered, ptr, None, width, g)
            grad_x = self._turned_back(g[0], len(grad_y), grad_y.dtype)
        if needs[1]:
            src, grad = self._turned(x, "source").reshape(1, -1), grad.reshape(1, pattern.rows, width)
            grad_values = self._run_correlate(src, offset, pattern.rowptr.numpy(), grad, 0, width, values)
        return grad_x, grad_values, grad_y.sum(0) if needs[2] else None

    # Conv2d.

    def _forward_plan(self, pattern, geometry: Geometry, x_shape):
        """Offsets of the nonzeros in the lane layout of x, and its rows and columns, which every window fits into."""
        oc, icg, kh, kw = pattern.shape
        (sh, sw), _, (dh, dw), groups = geometry
        oh, ow = geometry.output_size(x_shape[2:], (kh, kw))
        high = (oh - 1) * sh + (kh - 1) * dh + 1
        wide = (ow - 1) * sw + (kw - 1) * dw + 1
        rows, cols = _pad_to(high, sh) // sh, _pad_to(wide, sw) // sw
        c, ky, kx = (
            a.reshape(-1) for a in np.meshgrid(np.arange(icg), np.arange(kh) * dh, np.arange(kw) * dw, indexing="ij")
        )
        table = (((c * sh + ky % sh) * sw + kx % sw) * rows + ky // sh) * cols + kx // sw
        row = np.repeat(np.arange(oc), np.diff(pattern.rowptr.numpy()))
        group = row // max(1, oc // groups) * icg * sh * sw * rows * cols
        offset = (table[pattern.col.numpy()] + group) * LANES
        return offset, (rows, cols), (oh, ow)

    def _plan(self, pattern, geometry, x_shape):
        key = ("numba", geometry, tuple(x_shape[2:]))
        return pattern.cached(key, lambda: self._forward_plan(pattern, geometry, x_shape))

    def weight_grad(self, grad_y, x):
        return None

    def conv2d_weight_grad(self, grad_y, x, shape, geometry, needs):
        return None

    def conv2d_forward(self, pattern, x, values, bias, geometry, layout, training):
        self._use_threads()
        offset, (rows, cols), (oh, ow) = self._plan(pattern, geometry, x.shape)
        src = self._to_lanes(x, "source", geometry.padding, geometry.stride, (rows, cols))
        y = self._scratch("dest", (len(src), pattern.rows, 1, 1, oh, cols, LANES), x.dtype)
        length = ((oh - 1) * cols + ow) * LANES
        self._run_gather(_flat(src, 1), offset, _array(values), pattern.rowptr.numpy(), bias, length, _flat(y, 2))
        return self._from_lanes(y, (len(x), pattern.rows, oh, ow), x.dtype, FORMATS[layout])

    def _backward_plan(self, pattern, geometry: Geometry, x_shape):
        """The nonzeros sorted by (input channel, phase of the destination), and their offsets in grad_y.

        Also the shift, rows and columns that grad_y is packed with, and rows and columns of a phase of grad_x.
        """
        oc, icg, kh, kw = pattern.shape
        (sh, sw), padding, dilation, groups = geometry
        axes = []
        for k, s, p, d in zip((kh, kw), (sh, sw), padding, dilation, strict=True):
            shift = np.arange(k) * d - p
            phase = shift % s
            reach = (phase - shift) // s  # oy = j + reach for destination j*s + phase
            axes.append((phase, reach, int(reach.min())))
        (py, ey, ymin), (px, ex, xmin) = axes
        jh, jw = -(-x_shape[2] // sh), -(-x_shape[3] // sw)
        rows, cols = jh + int(ey.max() - ymin), jw + int(ex.max() - xmin)
        col = pattern.col.numpy()
        c, ky, kx = col // (kh * kw), col // kw % kh, col % kw
        row = np.repeat(np.arange(oc), np.diff(pattern.rowptr.numpy()))
        channel = row // max(1, oc // groups) * icg + c
        key = (channel * sh + py[ky]) * sw + px[kx]
        order = np.argsort(key, kind="stable")
        ptr = np.zeros(icg * groups * sh * sw + 1, dtype=np.int64)
        np.cumsum(np.bincount(key, minlength=len(ptr) - 1), out=ptr[1:])
        offset = (((row * rows + ey[ky] - ymin) * cols + ex[kx] - xmin) * LANES)[order]
        return order, ptr, offset, (-ymin, -xmin), (rows, cols), (jh, jw)

    def conv2d_backward(self, pattern, grad_y, x, values, geometry, x_shape, needs):
        self._use_threads()
        grad_x = grad_values = packed = None
        if needs[0]:
            order, ptr, offset, shift, (rows, cols), (jh, jw) = pattern.cached(
                ("numba back", geometry, tuple(x_shape[2:])), lambda: self._backward_plan(pattern, geometry, x_shape)
            )
            src = self._to_lanes(grad_y, "grad", shift, (1, 1), (rows, cols))
            packed, room, start = src, (rows, cols), (shift[0] * cols + shift[1]) * LANES
            channels, phases = x_shape[1], geometry.stride
            g = self._scratch("dest", (len(src), channels, *phases, jh, cols, LANES), grad_y.dtype)
            length = ((jh - 1) * cols + jw) * LANES
            planes = g.reshape(len(src), channels * math.prod(phases), jh * cols * LANES)
            self._run_gather(_flat(src, 1), offset, self._ordered(values, order), ptr, None, length, planes)
            plain = grad_y.is_contiguous()
            memory_format = torch.contiguous_format if plain else torch.channels_last
            grad_x = self._from_lanes(g, x_shape, grad_y.dtype, memory_format)
        if needs[1]:
            offset, (rows, cols), (oh, ow) = self._plan(pattern, geometry, x_shape)
            src = self._to_lanes(x, "source", geometry.padding, geometry.stride, (rows, cols))
            # Rows as long as those of x, so that a plane is one run; what is between them is zero. Where the output is
            # as large as x, they have been packed like that for grad_x.
            whole = packed is not None and all(0 <= s <= r - o for s, r, o in zip(shift, room, (oh, ow), strict=True))
            if not whole or room[1] != cols:
                packed, start = self._to_lanes(grad_y, "grad", (0, 0), (1, 1), (oh, cols)), 0
            length = ((oh - 1) * cols + ow) * LANES
            grad_values = self._run_correlate(
                _flat(src, 1), offset, pattern.rowptr.numpy(), _flat(packed, 2), start, length, values
            )
        return grad_x, grad_values, grad_y.sum((0, 2, 3)) if needs[2] else None


def load() -> NumbaBackend:
    """The Numba backend. Raises BackendError if Numba is not installed or does not import."""
    try:
        return NumbaBackend()
    except ImportError as error:
        raise BackendError(f"numba does not import: {error}") from error
