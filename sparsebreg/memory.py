"""Memory of activations and gradients: large tensors come from a pool of huge-page blocks.

A block goes back to the pool when the last tensor over it dies, and the next step finds it there, already mapped. The
pool belongs to the native extension; without it, torch's own allocator serves.
"""

from __future__ import annotations

import os

import torch

from sparsebreg._extension import native
from sparsebreg.errors import check_int

__all__ = ["empty", "held", "release", "set_limit"]

#: Smaller tensors come from torch: its allocator reuses those.
SMALL = 128 << 10

_FORMATS = {torch.contiguous_format: (0, 1, 2, 3), torch.channels_last: (0, 2, 3, 1)}


def _strides(shape: tuple[int, ...], memory_format: torch.memory_format) -> tuple[int, ...]:
    order = _FORMATS[memory_format] if len(shape) == 4 else range(len(shape))
    strides, step = [0] * len(shape), 1
    for d in reversed(order):
        strides[d] = step
        step *= max(1, shape[d])
    return tuple(strides)


def empty(
    shape: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format = torch.contiguous_format
) -> torch.Tensor:
    """As ``torch.empty``, from the pool where it is large."""
    size = dtype.itemsize
    for s in shape:
        size *= s
    if size < SMALL or _limit == 0 or (C := native()) is None:
        return torch.empty(shape, dtype=dtype, memory_format=memory_format)
    storage = torch.from_numpy(C.pool_empty(size)).untyped_storage()
    # Not a view of the storage's first tensor: in-place operations on results must stay possible.
    return torch.empty(0, dtype=dtype).set_(storage, 0, shape, _strides(shape, memory_format))


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
