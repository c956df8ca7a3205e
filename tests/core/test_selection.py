"""Counting nonzeros and choosing the largest entries."""

import pytest
import torch

from sparsebreg.core import selection


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int8, torch.bool])
def test_count_nonzero(dtype):
    t = torch.tensor([[0.0, -0.0, 2.0], [float("inf"), 1.0, -3.0]]).clamp(-4, 4).to(dtype)
    assert selection.count_nonzero(t) == selection.count_nonzero(t.t()) == 4
    assert selection.count_nonzero(t[:0]) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
def test_kth_largest_and_largest(dtype):
    values = torch.tensor([3, -1, 7, 7, 0, 2]).to(dtype)
    assert [selection.kth_largest(values, k) for k in range(1, 7)] == [7, 7, 3, 2, 0, -1]
    masks = [selection.largest(values.view(2, 3), k).flatten().nonzero().flatten().tolist() for k in range(7)]
    order = [2, 3, 0, 5, 4, 1]  # of equals the first comes first
    assert masks == [sorted(order[:k]) for k in range(7)]
    among = torch.tensor([[True, True, False], [True, False, True]])
    masks = [selection.largest(values.view(2, 3), k, among).flatten().nonzero().flatten().tolist() for k in range(5)]
    order = [3, 0, 5, 1]
    assert masks == [sorted(order[:k]) for k in range(5)]
    assert torch.equal(selection.largest(values.view(2, 3), 6, among), among)
    ties = torch.zeros(5).to(dtype)
    assert [selection.largest(ties, k).tolist() for k in (1, 4)] == [[True] + 4 * [False], 4 * [True] + [False]]
    if dtype.is_floating_point:
        values[1] = float("nan")
        assert selection.kth_largest(values, 1) != selection.kth_largest(values, 1)
        assert selection.kth_largest(values, 2) == 7
