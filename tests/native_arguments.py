"""Small arguments for calls of the extension."""

import numpy as np
import pytest
import torch

from sparsebreg import SparsePattern
from sparsebreg.core import extension

if (C := extension.native()) is None:
    pytest.skip("needs the extension", allow_module_level=True)

LANES = 16


def arrays(dtype=np.float32, **shapes):
    return {name: np.zeros(shape, dtype) for name, shape in shapes.items()}


def pattern(*shape):
    return SparsePattern.from_mask(torch.arange(np.prod(shape)).view(shape) % 3 == 0)


linear, conv = pattern(4, 6), pattern(4, 6, 3, 3)
ix, cx = linear.native_index(), conv.native_index()
GEOMETRY = [6, 5, 7, 4, 3, 3, 1, 1, 1, 1, 1, 1, 1]
POOL = [8, 6, 4, 3, 2, 2, 2, 2, 0, 0, 1, 1]
codes = np.zeros((2, 4, 3, LANES), np.uint8)
