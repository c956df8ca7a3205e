"""The chooser: precedence, errors, fallback, and what info says."""

import os
import subprocess
import sys

import pytest
import torch
from helpers import BACKENDS, ISAS

import sparsebreg as sb
from sparsebreg import backends
from sparsebreg.core import extension
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


def test_info():
    info = sb.info()
    assert info.backend == BACKENDS[0]
    assert info.threads == torch.get_num_threads()
    assert info.as_dict()["torch"] == torch.__version__
    for part in (info.backend, info.isa, "threads", "OpenMP", torch.__version__):
        assert part in str(info)


def test_numba_leaves_torchs_threads_alone():
    if "numba" not in BACKENDS:
        pytest.fail("numba belongs to the test environment")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with sb.use_backend("numba"):
            p = sb.SparsePattern.from_mask(torch.ones(3, 3, dtype=torch.bool))
            sb.nn.functional.sparse_linear(torch.ones(2, 3), p, torch.ones(9))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not ISAS, reason="needs the extension")
class TestIsa:
    def test_serial_is_always_there(self):
        assert ISAS[-1] == "serial"

    def test_unknown(self):
        with pytest.raises(ValueError, match="SPARSEBREG_ISA: expected one of .*serial on this CPU, got 'sse9'"):
            extension.native().select_isa("sse9")

    @pytest.mark.parametrize("isa", ISAS)
    def test_environment(self, isa):
        code = "import sparsebreg as sb; print(sb.info().isa)"
        env = {**os.environ, "SPARSEBREG_ISA": isa, "SPARSEBREG_BACKEND": "native"}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == isa

    def test_unknown_in_environment_is_told(self):
        code = "import sparsebreg as sb; print(sb.info())"
        env = {**os.environ, "SPARSEBREG_ISA": "sse9"}
        env.pop("SPARSEBREG_BACKEND", None)
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        assert "got 'sse9'" in done.stdout
