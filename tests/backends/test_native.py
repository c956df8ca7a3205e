"""The instruction sets of the native backend: which there are, and how one is asked for."""

import os
import subprocess
import sys

import pytest
from helpers import ISAS

from sparsebreg.core import extension


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

    def test_unknown_in_environment_is_an_error(self):
        """Not a reason to compute on another backend; that one may still be asked for by name."""
        code = "import sparsebreg as sb; print(sb.info())"
        env = {**os.environ, "SPARSEBREG_ISA": "sse9"}
        env.pop("SPARSEBREG_BACKEND", None)
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        assert done.returncode != 0
        assert "BackendError" in done.stderr
        assert "got 'sse9'" in done.stderr
        env["SPARSEBREG_BACKEND"] = "reference"
        subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=True)
