"""The numba backend keeps its threads to itself."""

import pytest
import torch
from helpers import BACKENDS

import sparsebreg as sb


def test_numba_leaves_torchs_threads_alone():
    if "numba" not in BACKENDS:
        pytest.fail("numba belongs to the test environment")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with sb.use_backend("numba"):
            p = sb.SparsePattern.from_mask(torch.ones(3, 3, dtype=torch.bool))
            sb.nn.functional.sparse_linear(torch.ones(2, 3), p, torch.ones(9))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
