"""What info() says of the machine and the choices made."""

import torch
from helpers import BACKENDS

import sparsebreg as sb


def test_info(monkeypatch):
    monkeypatch.delenv("SPARSEBREG_BACKEND", raising=False)
    info = sb.info()
    assert info.backend == BACKENDS[0]
    assert info.threads == torch.get_num_threads()
    assert info.as_dict()["torch"] == torch.__version__
    for part in (info.backend, info.isa, "threads", "OpenMP", torch.__version__):
        assert part in str(info)
