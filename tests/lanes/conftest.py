"""The lane layout needs the native backend."""

import pytest

import sparsebreg as sb
from sparsebreg.core import extension


@pytest.fixture(autouse=True)
def native():
    if extension.native() is None:
        pytest.skip("lane tensors need the native extension")
    with sb.use_backend("native"):
        yield
