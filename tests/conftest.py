"""Shared fixtures: every backend, every instruction set, both dtypes, one or several threads."""

import os

import pytest
import torch

import sparsebreg as sb
from sparsebreg.core import extension

pytest.register_assert_rewrite("helpers", "plain", "swapping")

from helpers import BACKENDS, ENGINES, ISAS  # noqa: E402  after the line above, so that its asserts tell what failed

os.environ["SPARSEBREG_CACHE"] = ""  # what becomes sparse depends on no machine


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


@pytest.fixture(params=ISAS)
def isa(request):
    """Computes on one instruction set wherever native is the backend."""
    before = extension.native().isa()
    extension.native().select_isa(request.param)
    yield request.param
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


@pytest.fixture(params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(params=[torch.float64, torch.float32], ids=["f64", "f32"])
def dtype(request):
    return request.param
