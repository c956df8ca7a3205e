"""What tests share: every way to compute, sparse weights, and how close results have to be."""

from __future__ import annotations

import torch

from sparsebreg import backends
from sparsebreg.core import extension

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
