"""Memory of activations, gradients and indices: large arrays come from a pool of huge-page blocks.

A block goes back to the pool when the last tensor over it dies, and the next step finds it there, already mapped. The
pool belongs to the native extension; without it, NumPy's allocator serves.
"""

import os

import numpy as np
import torch

from sparsebreg.core.errors import check_int
from sparsebreg.core.extension import native

__all__ = ["empty", "held", "release", "set_limit"]

_DTYPES = {torch.float32: np.dtype("f4"), torch.float64: np.dtype("f8"), torch.uint8: np.dtype("u1")}


def empty_array(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool = False) -> np.ndarray:
    """An uninitialised array, from the pool where it is large; ``channels_last``: as torch's memory format."""
    if _limit and (C := native()) is not None:
        return C.pool_empty(shape, _DTYPES[dtype], channels_last)
    if channels_last:
        n, c, h, w = shape
        return np.empty((n, h, w, c), _DTYPES[dtype]).transpose(0, 3, 1, 2)
    return np.empty(shape, _DTYPES[dtype])  # asks for huge pages where it is large


def empty(
    shape: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format = torch.contiguous_format
) -> torch.Tensor:
    """As ``torch.empty``, from the pool where it is large."""
    if dtype not in _DTYPES or 0 in shape:  # NumPy gives an empty array other strides
        return torch.empty(shape, dtype=dtype, memory_format=memory_format)
    return torch.from_numpy(empty_array(shape, dtype, memory_format is torch.channels_last))


def held() -> int:
    """Bytes that the pool holds and nobody uses."""
    return C.pool_held() if (C := native()) is not None else 0


def release() -> int:
    """Gives what the pool holds back to the system; returns how many bytes that were."""
    return C.pool_release() if (C := native()) is not None else 0


def set_limit(size: int) -> None:
    """How many unused bytes the pool may hold; 0 switches it off. Default 2 GiB, or ``SPARSEBREG_POOL_MB``.

    Raises:
        TypeError, ValueError: if ``size`` is not an integer of at least 0.
    """
    global _limit
    _limit = check_int("size", size, low=0)
    if (C := native()) is not None:
        C.pool_limit(_limit)


_limit = 2 << 30
if (_text := os.environ.get("SPARSEBREG_POOL_MB")) is not None:
    if not _text.isdigit():
        raise ValueError(f"SPARSEBREG_POOL_MB: expected a whole number of megabytes, got {_text!r}")
    set_limit(int(_text) << 20)
