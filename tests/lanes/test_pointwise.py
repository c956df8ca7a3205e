"""Pointwise operations on lane tensors against the same ones on ordinary tensors."""

import pytest
import torch
from helpers import agree, lane, ordinary
from torch.nn import functional as F

from sparsebreg import lanes

pytestmark = pytest.mark.usefixtures("on_native")

POINTWISE = {
    "relu": F.relu,
    "relu_inplace": lambda x: F.relu_(x * 1),
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "gelu": F.gelu,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "hardswish": F.hardswish,
    "relu6": F.relu6,
    "softplus": F.softplus,
    "mish": F.mish,
    "scalar": lambda x: (2 * x + 1) / 3 - 0.5,
    "scalar_inplace": lambda x: (x * 1).mul_(2).add_(1),
    "residual": lambda x: x + x * 2,
    "residual_inplace": lambda x: (x * 1).add_(x),
    "channel": lambda x: x * torch.linspace(1, 2, x.shape[1], dtype=x.dtype).view(1, -1, 1, 1),
    "channel_without_batch": lambda x: x + torch.linspace(1, 2, x.shape[1], dtype=x.dtype).view(-1, 1, 1),
    "ordinary_tensor": lambda x: x * torch.linspace(0, 1, x.numel(), dtype=x.dtype).view(x.shape),
    "reversed": lambda x: 1 - x,
    "ordinary_mask": lambda x: x * (torch.arange(x.numel()).view(x.shape) % 3 == 0),
    "where": lambda x: torch.where(x > 0, x, x * 0.1),
    "clamp": lambda x: x.clamp(-0.5, 0.5),
}


@pytest.mark.parametrize("n", [1, 16, 21])
@pytest.mark.parametrize("name", POINTWISE)
def test_pointwise(name, n, dtype):
    agree(POINTWISE[name], n, 5, 3, 4, dtype=dtype, tol=1e-10 if dtype == torch.float64 else 1e-5)


def test_mixed_batches_and_shapes():
    x, t = lane(20, 4, 3, 3)
    one, row = torch.randn(1, 4, 3, 3), torch.randn(20, 1, 1, 1)
    torch.testing.assert_close(ordinary(t * one), x * one)
    torch.testing.assert_close(ordinary(t * row), x * row)
    torch.testing.assert_close(ordinary(t + lanes.from_plain(one)), x + one)
    with pytest.raises(RuntimeError, match="size"):
        t + torch.randn(20, 4, 3, 2)
