"""Pooling and interpolation of lane tensors against the same on ordinary tensors."""

import pytest
import torch
from helpers import agree, ordinary
from torch.nn import functional as F

from sparsebreg import lanes

pytestmark = pytest.mark.usefixtures("on_native")

PLANEWISE = {
    "max": lambda x: F.max_pool2d(x, 2),
    "max_overlapping": lambda x: F.max_pool2d(x, 3, 2, 1),
    "max_rectangular": lambda x: F.max_pool2d(x, (2, 3), (1, 2)),
    "max_dilated": lambda x: F.max_pool2d(x, 2, 1, 1, dilation=2),
    "max_ceil": lambda x: F.max_pool2d(x, 2, 2, ceil_mode=True),
    "max_ceil_padded": lambda x: F.max_pool2d(x, 3, 2, 1, ceil_mode=True),
    "max_gaps": lambda x: F.max_pool2d(x, 2, 3),
    "avg": lambda x: F.avg_pool2d(x, 2),
    "avg_padded": lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
    "adaptive_avg": lambda x: F.adaptive_avg_pool2d(x, 2),
    "nearest": lambda x: F.interpolate(x, scale_factor=2),
    "bilinear": lambda x: F.interpolate(x, size=(9, 5), mode="bilinear", align_corners=False),
}


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("n", [1, 16, 21])
@pytest.mark.parametrize("name", PLANEWISE)
def test_planewise(name, n, dtype):
    agree(PLANEWISE[name], n, 5, 7, 6, dtype=dtype, tol=1e-10 if dtype == torch.float64 else 1e-5)


def test_max_pool_indices_are_those_of_torch():
    x = torch.randn(21, 3, 7, 6)
    y, indices = F.max_pool2d(lanes.from_plain(x), 3, 2, 1, return_indices=True)
    want, want_indices = F.max_pool2d(x, 3, 2, 1, return_indices=True)
    assert torch.equal(ordinary(y), want)
    assert torch.equal(indices + 0, want_indices)


@pytest.mark.usefixtures("isa")
def test_max_pool_of_nan_and_of_ties():
    x = torch.zeros(3, 2, 4, 4)
    x[0, 0, 1, 1] = float("nan")
    x[1] = -float("inf")
    y, indices = F.max_pool2d(lanes.from_plain(x), 2, return_indices=True)
    want, want_indices = F.max_pool2d(x, 2, return_indices=True)
    torch.testing.assert_close(ordinary(y), want, equal_nan=True)
    assert torch.equal(indices + 0, want_indices)
