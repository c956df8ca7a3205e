"""What tests of several folders share: the ways to compute, and comparisons of results."""

import random

import torch

import sparsebreg as sb
from sparsebreg import backends
from sparsebreg.core import extension
from sparsebreg.lanes import LaneTensor, from_plain

BACKENDS = [name for name, cause in backends.available().items() if not cause]
ISAS = extension.native().available_isas() if extension.native() else []

#: Every way to compute: (backend, instruction set).
ENGINES = [(b, isa) for b in BACKENDS for isa in (ISAS if b == "native" else [""])]


def sparse_weight(shape, density, dtype=torch.float64):
    """(weight with zeros outside of the mask, mask)."""
    mask = torch.rand(shape) < density
    return torch.randn(shape, dtype=dtype) * mask, mask


def close(actual, expected, dtype=None, scale=None):
    """Largest error is small beside the largest entry: 1e-10 in float64, 1e-4 in float32."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    limit = 1e-10 if actual.dtype is torch.float64 else 1e-4
    if expected.numel():
        size = expected.abs().max().item() if scale is None else scale
        error = (actual - expected).abs().max().item()
        assert error <= limit * max(size, 1.0), f"error {error:.3g} at size {size:.3g}"


def assert_same(a, b):
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for k in a:
            assert_same(a[k], b[k])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


def compare_products(x, weight, mask, bias, dense, sparse):
    """Output and all gradients of sparse(x, values, bias) against dense(x, weight, bias)."""
    pattern = sb.SparsePattern.from_mask(mask)
    ours = [t.clone().requires_grad_() for t in (x, weight[mask], bias)]
    theirs = [t.clone().requires_grad_() for t in (x, weight, bias)]
    y, expected = sparse(ours[0], pattern, ours[1], ours[2]), dense(*theirs)
    close(y, expected)
    grad = torch.randn_like(expected)
    y.backward(grad)
    expected.backward(grad)
    close(ours[0].grad, theirs[0].grad)
    close(ours[1].grad, theirs[1].grad[mask], scale=theirs[1].grad.abs().max().item() if mask.numel() else 1)
    close(ours[2].grad, theirs[2].grad)


def ordinary(x):
    return x.detach().plain if isinstance(x, LaneTensor) else x.detach()


def agree(f, *shape, dtype=torch.float64, packed=True, tol=1e-10):
    """f of a lane tensor is f of the ordinary one, and so are the gradients; returns the former."""
    x = torch.randn(shape, dtype=dtype)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, z = f(a), f(from_plain(b))
    assert isinstance(z, LaneTensor) == packed
    torch.testing.assert_close(ordinary(z), y.detach(), rtol=tol, atol=tol)
    w = torch.randn_like(y)
    y.backward(w)
    z.backward(w)
    torch.testing.assert_close(b.grad, a.grad, rtol=tol, atol=tol)
    return z


class Clock:
    """Time that only a test moves."""

    def __init__(self, seed=0):
        self.now, self.slow, self.random = 0.0, 1.0, random.Random(seed)

    def __call__(self):
        self.now += 1e-9
        return self.now

    def spend(self, seconds):
        """With noise of up to 5 %."""
        self.now += seconds * self.random.uniform(0.95, 1.05)


def lane(*shape):
    """A random tensor, and the same on the lane layout."""
    x = torch.randn(shape)
    return x, from_plain(x)
