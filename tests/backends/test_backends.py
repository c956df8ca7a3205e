"""The chooser of a backend: precedence, errors, fallback."""

import pytest
from helpers import BACKENDS

import sparsebreg as sb
from sparsebreg import backends
from sparsebreg.core.errors import BackendError


@pytest.fixture(autouse=True)
def _no_choice(monkeypatch):
    monkeypatch.delenv("SPARSEBREG_BACKEND", raising=False)
    yield
    backends.set_backend(None)


def test_automatic_choice_is_the_first_that_loads():
    assert backends.current().name == BACKENDS[0]
    assert "chosen automatically" in backends.why()


def test_precedence(monkeypatch):
    monkeypatch.setenv("SPARSEBREG_BACKEND", "reference")
    assert backends.current().name == "reference"
    assert backends.why() == "asked for by SPARSEBREG_BACKEND"
    other = BACKENDS[0]
    sb.set_backend(other)
    assert backends.current().name == other
    with sb.use_backend("reference") as used:
        assert used.name == backends.current().name == "reference"
        with sb.use_backend(other):
            assert backends.current().name == other
        assert backends.current().name == "reference"
    assert backends.current().name == other
    sb.set_backend(None)
    assert backends.current().name == "reference"


def test_unknown_names(monkeypatch):
    for call in (sb.set_backend, lambda n: sb.use_backend(n).__enter__()):
        with pytest.raises(ValueError, match="name: expected one of native, numba, reference, got 'cuda'"):
            call("cuda")
    monkeypatch.setenv("SPARSEBREG_BACKEND", "fast")
    with pytest.raises(ValueError, match="SPARSEBREG_BACKEND: expected one of native, numba, reference, got 'fast'"):
        backends.current()


def test_missing_backend_falls_back_only_automatically(monkeypatch):
    lost = BackendError("the extension sparsebreg._C was not built")
    monkeypatch.setattr(backends, "_loaded", {**backends._loaded, "native": lost})
    assert backends.current().name != "native"
    assert "native: the extension sparsebreg._C was not built" in backends.why()
    assert "was not built" in str(sb.info())
    with pytest.raises(BackendError, match="'native' cannot be used: the extension"):
        sb.set_backend("native")
    monkeypatch.setenv("SPARSEBREG_BACKEND", "native")
    with pytest.raises(BackendError, match="SPARSEBREG_BACKEND: backend 'native' cannot be used"):
        backends.current()
