"""Shared fixtures: every backend, every instruction set, a plain-torch twin of the training loop."""

from __future__ import annotations

import os

import pytest
import torch

import sparsebreg as sb
from sparsebreg import backends
from sparsebreg.core import extension

os.environ["SPARSEBREG_CACHE"] = ""  # what becomes sparse depends on no machine

BACKENDS = [name for name, cause in backends.available().items() if not cause]
ISAS = extension.native().available_isas() if extension.native() else []

#: Every way to compute: (backend, instruction set).
ENGINES = [(b, isa) for b in BACKENDS for isa in (ISAS if b == "native" else [""])]


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(params=BACKENDS)
def backend(request):
    with sb.use_backend(request.param):
        yield request.param


@pytest.fixture(params=ENGINES, ids=["-".join(filter(None, e)) for e in ENGINES])
def engine(request):
    """Computes on one backend and, for native, one instruction set."""
    name, isa = request.param
    before = extension.native().isa() if isa else ""
    if isa:
        extension.native().select_isa(isa)
    with sb.use_backend(name):
        yield request.param
    if isa:
        extension.native().select_isa(before)


@pytest.fixture
def on_native():
    """For what only the native backend does, whichever the tests run on."""
    if extension.native() is None:
        pytest.skip("needs the native extension")
    with sb.use_backend("native"):
        yield


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[torch.float64, torch.float32], ids=["f64", "f32"])
def dtype(request):
    return request.param


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
