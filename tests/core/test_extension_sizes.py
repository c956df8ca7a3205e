"""Sizes that the extension refuses: impossible ones, those beyond its integers, those that do not fit together."""

import numpy as np
import pytest
from native_arguments import GEOMETRY, POOL, C, arrays, codes, conv, cx, ix, linear
from numpy.lib.stride_tricks import as_strided

one, none = np.zeros(1, np.float32), np.zeros(0, np.float32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: C.linear_forward(ix, -1, one, 0, one, None, 1), "N: expected at least 0, got -1"),
        (lambda: C.linear_forward(ix, 2**62, none, 0, np.zeros(8, "f4"), None, 1), "x: expected sizes from 0"),
        (lambda: C.linear_forward(ix, 2**63 - 1, none, 1, np.zeros(8, "f4"), None, 1), "x: expected sizes"),
        (lambda: C.linear_forward(ix, 1, one, 2, one, None, 1), "x_layout: expected 0 to 1, got 2"),
        (lambda: C.repack(True, 1, -1, -1, one, np.zeros(16, "f4"), 1), "src: expected sizes from 0 on"),
        (lambda: C.repack(True, 2**32, 2**32, 2, none, none, 1), "src: expected sizes from 0 on"),
        (lambda: C.norm_stats(2**32, 2**30, 2, none, none, none, 1), "x: expected sizes from 0 on"),
        (lambda: C.norm_stats(0, 1, 1, none, one, one, 1), "x: expected at least one sample"),
        (lambda: C.max_pool(2**60, POOL, none, none, codes, None, None, 1), "x: expected sizes from 0 on"),
        (lambda: C.max_pool(-1, POOL, none, none, codes, None, None, 1), "planes: expected at least 0, got -1"),
        (lambda: C.max_pool(1, POOL[:11], none, none, codes, None, None, 1), "geometry: expected 12 numbers, got 11"),
        (lambda: C.max_pool(1, POOL, none, None, codes, None, None, 1), "x: expected x and y, or grad_y and grad_x"),
        (lambda: C.Index(-1, 3, np.zeros(0, "i4"), np.zeros(0, "i4")), "shape: expected sizes from 0"),
        (lambda: C.Index(1, 2**31, np.zeros(2, "i4"), np.zeros(0, "i4")), "shape: expected sizes from 0"),
        (lambda: C.Index(1, 3, np.zeros(3, "i4"), np.zeros(0, "i4")), "rowptr: expected 2 elements"),
        (lambda: ix.transposed(0), "threads: expected at least 1, got 0"),
        (lambda: ix.empty(1, 0), "threads: expected at least 1, got 0"),
        (lambda: ix.empty(4, 1), "kernel: expected a divisor of 6, got 4"),
        (lambda: ix.empty(0, 1), "kernel: expected a divisor of 6, got 0"),
        (lambda: C.Index.beyond(np.zeros(4, "f4"), 0, 4, 1), "dense: expected two dimensions, got 1"),
        (lambda: C.Index.beyond(np.zeros((2**31, 0), "f4"), 0, 0, 1), "dense: expected sizes from 0"),
        (lambda: C.Index.beyond(np.zeros((4, 4), "f4").T[:2], 0, 9, 1), "dense: expected a C-contiguous array"),
        (lambda: C.Index.beyond(np.zeros((4, 4), "f4"), 0, -1, 1), "most: expected at least 0, got -1"),
        (lambda: C.Index.beyond(np.zeros((4, 4), "f4"), -1, 9, 1), "bound: expected at least 0, got -1"),
    ],
)  # fmt: skip
def test_sizes(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, 0, "geometry: expected sizes, strides and dilations of at least 1, got 0"),
        (6, 0, "geometry: expected sizes, strides"),
        (8, -1, "geometry: expected sizes, strides"),
        (12, 4, "geometry: expected channels divisible by groups"),
        (1, 0, "x: expected an image at least as large as the kernel"),
        (8, 2**31 - 1, "geometry: expected a padded image of at most 2147483647"),
        (4, 1, "geometry: expected channels and kernel size of the pattern's shape"),
        (2, 2**24, "x: expected a band of rows of less than"),
    ],
)  # fmt: skip
def test_conv2d_geometry(place, value, message):
    geometry = [*GEOMETRY]
    geometry[place] = value
    if place == 1:
        geometry[8] = 0
    with pytest.raises(ValueError, match=message):
        C.conv2d_forward(cx, 2, geometry, none, 0, None, np.zeros(conv.nnz, np.float32), None, none, 0, None, 1)


@pytest.mark.parametrize(
    ("place", "value"),
    [(0, 0), (2, 5), (4, 0), (6, 0), (8, 2), (8, -1), (10, 9), (4, 300)],
    ids=["no_rows", "window_beyond_image", "no_taps", "no_stride", "padding", "padding_below_0", "dilation", "taps"],
)  # fmt: skip
def test_max_pool_geometry(place, value):
    geometry = [*POOL]
    geometry[place] = value
    with pytest.raises(ValueError, match="geometry: expected"):
        C.max_pool(2, geometry, none, none, codes, None, None, 1)


def test_more_nonzeros_than_int32():
    many = as_strided(np.zeros(1, np.int32), (2**31,), (0,))
    with pytest.raises(ValueError, match="col: expected at most 2147483647 nonzeros, got 2147483648"):
        C.Index(1, 1, np.zeros(2, np.int32), many)


def test_grad_values_need_x():
    a = arrays(grad_y=(5, 4), values=linear.nnz)
    with pytest.raises(ValueError, match="x: expected the input of the layer, for grad_values, got None"):
        C.linear_backward(ix, 5, a["grad_y"], 0, None, 0, a["values"], False, True, False, 1)


def test_impossible_block():
    floats = np.dtype("f4")
    with pytest.raises(MemoryError):
        C.pool_empty((2**58,), floats, False)
    for shape in ((2**62,), (2**40, 2**40), (2**40, 0, 2**40), (-1,)):
        with pytest.raises(ValueError, match="shape: expected sizes from 0 that fit into memory, got"):
            C.pool_empty(shape, floats, False)
    with pytest.raises(ValueError, match="shape: expected four sizes, got 3"):
        C.pool_empty((2, 3, 4), floats, True)
