"""Errors of the package, and the checks that raise them.

Every message names the argument, what was wanted and what came: ``values: expected shape (1024,), got (1000,)``.
"""

import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

import torch


class SparsebregError(Exception):
    """Base class of the errors that only this package raises."""


class BackendError(SparsebregError, RuntimeError):
    """A backend was asked for by name and cannot be used here."""


class SwapError(SparsebregError, ValueError):
    """A model or optimizer cannot be swapped as asked; nothing was changed."""


class DataError(SparsebregError, ValueError):
    """A data file is missing, truncated or not what its name says."""


class RunError(SparsebregError, RuntimeError):
    """A training run cannot start or go on."""


def expected(name: str, wanted: Any, got: Any) -> str:
    """The one form of an error message."""
    return f"{name}: expected {wanted}, got {got}"


def check_real(
    name: str, value: Any, *, low: float | None = None, strict: bool = False, high: float | None = None
) -> float:
    """A finite real number within ``[low, high]`` (``(low, high]`` if strict). Raises TypeError or ValueError."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(expected(name, "a real number", repr(value)))
    value = float(value)
    bound = "" if low is None else f" {'above' if strict else 'of at least'} {low:g}"
    bound += "" if high is None else f" and at most {high:g}"
    out = low is not None and (value <= low if strict else value < low)
    if not math.isfinite(value) or out or (high is not None and value > high):
        raise ValueError(expected(name, f"a finite number{bound}", value))
    return value


def check_int(name: str, value: Any, *, low: int | None = None) -> int:
    """An integer of at least ``low``. Raises TypeError or ValueError."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(expected(name, "an integer", repr(value)))
    value = int(value)
    if low is not None and value < low:
        raise ValueError(expected(name, f"an integer of at least {low}", value))
    return value


def check_choice(name: str, value: Any, known: Iterable[str]) -> str:
    """One of ``known``. Raises ValueError with the list."""
    known = list(known)
    if value not in known:
        raise ValueError(expected(name, f"one of {', '.join(known)}", repr(value)))
    return value


def check_input(name: str, x: Any, dtype: torch.dtype) -> None:
    """A dense strided CPU tensor of this dtype. Raises TypeError or ValueError."""
    if isinstance(x, torch.Tensor) and x.is_cpu and x.dtype is dtype and x.layout is torch.strided:
        return
    if not isinstance(x, torch.Tensor):
        raise TypeError(expected(name, "a tensor", type(x).__name__))
    if x.device.type != "cpu":
        raise ValueError(expected(name, "a tensor on the CPU", f"one on {x.device}"))
    if x.layout is not torch.strided:
        raise ValueError(expected(name, "a dense (strided) tensor", f"layout {x.layout}"))
    if x.dtype is not dtype:
        raise TypeError(expected(name, f"dtype {dtype}", x.dtype))
