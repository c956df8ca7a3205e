"""Batch norms of lane tensors: results, gradients and running statistics against those of ordinary tensors."""

import copy

import pytest
import torch
from helpers import agree, ordinary
from torch import nn
from torch.nn import functional as F

from sparsebreg import lanes
from sparsebreg.lanes import LaneTensor

pytestmark = pytest.mark.usefixtures("on_native")

NORMS = {
    "batch": lambda: nn.BatchNorm2d(5),
    "cumulative": lambda: nn.BatchNorm2d(5, momentum=None),
    "plain": lambda: nn.BatchNorm2d(5, affine=False),
    "untracked": lambda: nn.BatchNorm2d(5, track_running_stats=False),
    "group": lambda: nn.GroupNorm(5, 5),
    "instance": lambda: nn.InstanceNorm2d(5, affine=True),
    "layer": lambda: nn.LayerNorm([5, 3, 4]),
}


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("n", [1, 16, 21])
@pytest.mark.parametrize("name", NORMS)
def test_norms_and_their_running_statistics(name, n, training, dtype):
    a = NORMS[name]().to(dtype).train(training)
    for p in a.parameters():
        nn.init.uniform_(p, 0.5, 2)
    b = copy.deepcopy(a)
    tol = 1e-10 if dtype == torch.float64 else 2e-4
    modules = iter([a, b])
    agree(lambda x: next(modules)(x) * 2 + x, n, 5, 3, 4, dtype=dtype, tol=tol)
    packed = name in ("batch", "cumulative", "plain", "untracked") or (name, n) == ("instance", 1)
    x = torch.randn(n, 5, 3, 4, dtype=dtype)
    y, z = a(x), b(lanes.from_plain(x))
    assert isinstance(z, LaneTensor) == packed
    torch.testing.assert_close(ordinary(z), y.detach(), rtol=tol, atol=tol)
    torch.testing.assert_close(b.state_dict(), a.state_dict(), rtol=tol, atol=tol)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=tol, atol=tol)


@pytest.mark.usefixtures("isa")
def test_running_statistics_do_not_see_the_padding(dtype):
    a = nn.BatchNorm2d(5).to(dtype)
    b = copy.deepcopy(a)
    for n in (21, 3, 16):
        x = torch.randn(n, 5, 3, 4, dtype=dtype) * 3 + 100
        torch.testing.assert_close(ordinary(b(lanes.from_plain(x) + 7)), a(x + 7).detach(), rtol=1e-4, atol=1e-4)
        for name, value in a.state_dict().items():
            torch.testing.assert_close(b.state_dict()[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("isa")
def test_gradcheck():
    norm = nn.BatchNorm2d(2).double()
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64, requires_grad=True)

    def f(x):
        return F.max_pool2d(F.silu(norm(lanes.from_plain(x))), 2).mean((2, 3))

    assert torch.autograd.gradcheck(f, x)
