"""Element-wise operations on lane tensors."""

import pytest
import torch
from lanetests import agree
from torch.nn import functional as F

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
    "cat": lambda x: torch.cat([x, x * 2], 1),
    "clone": lambda x: x.clone(),
    "flatten": lambda x: x.flatten(1),
    "reshape": lambda x: x.reshape(x.shape[0], -1),
}


@pytest.mark.parametrize("n", [1, 16, 21])
@pytest.mark.parametrize("name", POINTWISE)
def test_pointwise(name, n, dtype):
    agree(POINTWISE[name], n, 5, 3, 4, dtype=dtype, tol=1e-10 if dtype == torch.float64 else 1e-5)
