"""Loads the native extension, once, and remembers why it could not."""

import importlib
import os
from types import ModuleType

import torch  # before the extension: both must share one OpenMP runtime

_C: ModuleType | None = None
#: Why the extension is not in use; empty where it is.
CAUSE = ""
#: Whether the extension reads tensors as they are; torch before 2.10 has them cross as NumPy arrays.
TENSORS = False

try:
    _C = importlib.import_module("sparsebreg._C")
    _C.isa()  # reads SPARSEBREG_ISA
    TENSORS = _C.accept_tensors(torch.Tensor, torch.nn.Parameter)
except ModuleNotFoundError as error:
    if error.name != "sparsebreg._C":
        raise
    CAUSE = "the extension sparsebreg._C was not built (no C++ compiler when the package was installed?)"
except (ImportError, ValueError) as error:
    _C = None
    CAUSE = f"the extension sparsebreg._C cannot be used: {error}"


def native() -> ModuleType | None:
    """The extension module, or None."""
    return _C


#: Value of an environment variable, or None. ``os.environ`` raises and catches an error where there is none, which
#: takes longer than all else that is asked before a small layer's forward pass; what is put there reaches C, too.
environment = os.environ.get if _C is None else _C.environment
