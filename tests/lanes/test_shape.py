"""What changes the shape of a lane tensor, or leaves the layout, against the same on ordinary tensors."""

import pytest
import torch
from helpers import agree, lane
from torch.nn import functional as F

from sparsebreg import lanes

pytestmark = pytest.mark.usefixtures("on_native")

KEPT = {
    "cat": lambda x: torch.cat([x, x * 2], 1),
    "clone": lambda x: x.clone(),
    "flatten": lambda x: x.flatten(1),
    "reshape": lambda x: x.reshape(x.shape[0], -1),
}


@pytest.mark.parametrize("n", [1, 16, 21])
@pytest.mark.parametrize("name", KEPT)
def test_what_stays_in_the_layout(name, n, dtype):
    agree(KEPT[name], n, 5, 3, 4, dtype=dtype, tol=1e-10 if dtype == torch.float64 else 1e-5)


REDUCTIONS = {
    "global_pool": lambda x: F.adaptive_avg_pool2d(x, 1),
    "mean": lambda x: x.mean((2, 3)),
    "mean_keepdim": lambda x: x.mean((-1, -2), keepdim=True),
    "sum_over_all_but_channels": lambda x: x.sum((0, 2, 3)),
    "mean_over_all_but_channels": lambda x: x.mean((0, 2, 3), keepdim=True),
    "sum": lambda x: x.sum(),
    "batch": lambda x: x.mean(0),
    "max": lambda x: x.amax((2, 3)),
    "softmax": lambda x: x.softmax(1),
    "slice": lambda x: x[:, 1:3],
    "to_plain": lanes.to_plain,
    "permute": lambda x: x.permute(0, 2, 3, 1),
    "regrouped": lambda x: x.view(-1, 4),
    "other_dtype": lambda x: x.to(torch.bfloat16).double(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("n", [1, 16, 21])
@pytest.mark.parametrize("name", REDUCTIONS)
def test_what_leaves_the_layout(name, n):
    agree(REDUCTIONS[name], n, 5, 3, 4, packed=False)


def test_dimensions_out_of_range():
    _, t = lane(20, 4, 3, 3)
    for call in (
        lambda: torch.cat([t, t], 4),
        lambda: t.sum(4),
        lambda: t.mean((2, -5)),
        lambda: torch.cat([t, t], -5),
    ):
        with pytest.raises(IndexError, match="out of range"):
            call()
