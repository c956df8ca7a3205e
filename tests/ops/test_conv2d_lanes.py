"""Sparse convolutions of lane tensors, and their gradients in every layout, against torch."""

import copy

import pytest
import torch
from helpers import ordinary
from torch import nn
from torch.nn import functional as F

import sparsebreg as sb
from sparsebreg import lanes
from sparsebreg.lanes import LaneTensor
from sparsebreg.ops import Geometry, sparse_conv2d

pytestmark = pytest.mark.usefixtures("on_native")


@pytest.mark.parametrize("n", [16, 21])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "groups"),
    [(1, 1, 0, 1), (1, 2, 0, 1), (1, 2, 1, 1), (1, 2, 0, 2), (3, 1, 1, 1), (3, 2, 0, 2)],
)
def test_full_gradient_of_a_weight(kernel, stride, padding, groups, n):
    geometry = Geometry((stride, stride), (padding, padding), (1, 1), groups)
    weight = torch.randn(16, 8 // groups, kernel, kernel)
    weight = (weight * (torch.rand_like(weight) < 0.3)).requires_grad_()
    pattern = sb.SparsePattern.from_nonzeros(weight)
    x = torch.randn(n, 8, 64, 64)
    y = F.conv2d(x, weight, None, *geometry)
    w = torch.randn_like(y)
    (want,) = torch.autograd.grad(y, weight, w)
    z = sparse_conv2d(lanes.from_plain(x), pattern, pattern.gather(weight), geometry=geometry, weight=weight)
    (got,) = torch.autograd.grad(z, weight, lanes.from_plain(w))
    assert got.stride() == want.stride()
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-2)


FORMATS = {
    "plain": torch.Tensor.contiguous,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "lanes": lanes.from_plain,
}


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("needs_x", [True, False])
@pytest.mark.parametrize("n", [7, 16, 37])
@pytest.mark.parametrize("of_grad", FORMATS)
@pytest.mark.parametrize("of_x", FORMATS)
def test_full_gradients_in_every_layout(of_x, of_grad, n, needs_x):
    weight = torch.randn(9, 5, 3, 2, dtype=torch.float64)
    weight = (weight * (torch.rand_like(weight) < 0.3)).requires_grad_()
    bias = torch.randn(9, dtype=torch.float64, requires_grad=True)
    pattern, geometry = sb.SparsePattern.from_nonzeros(weight), Geometry((1, 2), (1, 0))
    x = torch.randn(n, 5, 6, 11, dtype=torch.float64)
    w = torch.randn(n, 9, 6, 5, dtype=torch.float64)
    grads = []
    for sparse in (False, True):
        a = x.clone().requires_grad_(needs_x)
        if sparse:
            values, last = pattern.gather(weight.detach()), of_x == "channels_last"
            y = sparse_conv2d(FORMATS[of_x](a), pattern, values, bias, geometry, last, of_grad == "lanes", weight)
        else:
            y = F.conv2d(a, weight, bias, *geometry)
        grad = FORMATS[of_grad](w) if sparse and (isinstance(y, LaneTensor) or of_grad != "lanes") else w
        grads.append(torch.autograd.grad(y, [weight, bias, a] if needs_x else [weight, bias], grad))
    torch.testing.assert_close([ordinary(g) for g in grads[1]], list(grads[0]), rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("n", [16, 21])
@pytest.mark.parametrize("density", [0.3, 0.8])
def test_values_of_a_dense_pattern(density, n, monkeypatch):
    """Without grad_x they are part of a full gradient, which takes the norm behind the convolution along."""
    dense = nn.Sequential(nn.Conv2d(3, 20, 3, 2, 1), nn.BatchNorm2d(20), nn.ReLU(), nn.Conv2d(20, 4, 3)).double()
    sb.sparse_init_(dense, density)
    sparse = copy.deepcopy(dense)
    sb.sparsify_(sparse, sb.SparsifyConfig(decide="always"))
    full, kind = [], type(sb.backends.current())
    product = kind.conv2d_weight_grad
    monkeypatch.setattr(kind, "conv2d_weight_grad", lambda self, *a: (full.append(a[2]), product(self, *a))[1])
    x = torch.randn(n, 3, 9, 9, dtype=torch.float64)
    for model in (dense, sparse):
        model(x).square().sum().backward()
    assert full == ([(20, 3, 3, 3)] if density > 0.5 else [])
    for a, b in zip(dense, sparse, strict=True):
        if isinstance(b, sb.nn.SparseConv2d):
            torch.testing.assert_close(b.values.grad, b.pattern.gather(a.weight.grad), rtol=1e-9, atol=1e-9)
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            if p.dim() == 1:
                torch.testing.assert_close(q.grad, p.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(
    ("sizes", "stride", "groups", "density"),
    [((64, 64, 3), 1, 1, 0.2), ((48, 64, 3), 2, 1, 0.3), ((64, 64, 1), 1, 1, 0.5), ((64, 96, 5), 1, 2, 0.1)],
    ids=["chunks", "strided", "pointwise", "groups"],
)
def test_large_convolutions(sizes, stride, groups, density):
    """Large enough for several chunks a sum, several bands an image, and results that are written past the caches."""
    i, o, k = sizes
    dense = nn.Conv2d(i, o, k, stride, k // 2, groups=groups)
    dense.weight.data.mul_(torch.rand_like(dense.weight) < density)
    sparse = sb.nn.SparseConv2d.from_dense(dense)
    x = torch.randn(40, i, 32, 32)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, z = dense(a), sparse(lanes.from_plain(b))
    torch.testing.assert_close(ordinary(z), y.detach(), rtol=1e-4, atol=1e-4)
    w = torch.randn_like(y)
    y.backward(w)
    z.backward(lanes.from_plain(w))
    torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-4)
    want = sparse.pattern.gather(dense.weight.grad)
    torch.testing.assert_close(sparse.values.grad, want, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(sparse.bias.grad, dense.bias.grad, rtol=1e-3, atol=1e-2)
