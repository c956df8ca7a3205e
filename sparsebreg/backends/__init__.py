"""The chooser: which backend computes.

Precedence: :func:`use_backend`, then :func:`set_backend`, then the environment variable ``SPARSEBREG_BACKEND``, then
the first that loads of native, numba, reference. A backend asked for by name that cannot load is an error with its
cause; only the automatic choice falls back, and :func:`why` says so.
"""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from sparsebreg.backends.protocol import Backend, Geometry, Layout
from sparsebreg.core.errors import BackendError, check_choice
from sparsebreg.core.extension import environment

__all__ = [
    "NAMES",
    "Backend",
    "Geometry",
    "Layout",
    "available",
    "by_name",
    "current",
    "set_backend",
    "use_backend",
    "why",
]

#: Every backend, in the order of the automatic choice.
NAMES = ("native", "numba", "reference")
_MODULES = {"native": "native", "numba": "numba_", "reference": "reference"}

_loaded: dict[str, Backend | BackendError] = {}
_default: str | None = None
_scoped: ContextVar[str | None] = ContextVar("sparsebreg_backend", default=None)


def _load(name: str) -> Backend | BackendError:
    if name not in _loaded:
        try:
            _loaded[name] = importlib.import_module(f"sparsebreg.backends.{_MODULES[name]}").load()
        except BackendError as error:
            _loaded[name] = error
    return _loaded[name]


def _named(name: str, source: str) -> Backend:
    backend = _load(check_choice(source, name, NAMES))
    if isinstance(backend, BackendError):
        raise BackendError(f"{source}: backend '{name}' cannot be used: {backend}")
    return backend


def _choice() -> tuple[str | None, str]:
    if (name := _scoped.get()) is not None:
        return name, "use_backend"
    if _default is not None:
        return _default, "set_backend"
    return environment("SPARSEBREG_BACKEND") or None, "SPARSEBREG_BACKEND"


def current() -> Backend:
    """The backend that a forward pass started now would run on.

    Raises:
        BackendError: if the one asked for by name cannot load, or the instruction set in ``SPARSEBREG_ISA``.
        ValueError: for an unknown name in ``SPARSEBREG_BACKEND``.
    """
    name, source = _choice()
    if name is not None:
        return _named(name, source)
    for name in NAMES:
        if not isinstance(backend := _load(name), BackendError):
            return backend
        if name == "native" and environment("SPARSEBREG_ISA"):  # asked for by name, too
            raise backend
    raise BackendError("no backend can be used")  # reference needs only torch: unreachable in a sound installation


def by_name(name: str) -> Backend:
    """The backend of this name; an empty one means :func:`current`. Raises BackendError if it cannot load."""
    return _named(name, "backend") if name else current()


def available() -> dict[str, str]:
    """Every backend with why it cannot be used; an empty string where it can."""
    return {n: str(b) if isinstance(b := _load(n), BackendError) else "" for n in NAMES}


def why() -> str:
    """One sentence: why :func:`current` is what it is."""
    name, source = _choice()
    if name is not None:
        return f"asked for by {source}"
    chosen = current().name
    passed = [f"{n}: {cause}" for n, cause in available().items() if cause and NAMES.index(n) < NAMES.index(chosen)]
    return "chosen automatically" + (f"; {'; '.join(passed)}" if passed else "")


def set_backend(name: str | None) -> None:
    """Sets the backend of this process; None goes back to ``SPARSEBREG_BACKEND`` or the automatic choice.

    Raises:
        ValueError: for an unknown name. BackendError: if it cannot load; the setting stays as it was.
    """
    global _default
    if name is not None:
        _named(name, "name")
    _default = name


@contextmanager
def use_backend(name: str) -> Iterator[Backend]:
    """Within the block, forward passes run on this backend, and so do their backward passes whenever they come.

    Raises:
        ValueError: for an unknown name. BackendError: if it cannot load.
    """
    backend = _named(name, "name")
    token = _scoped.set(name)
    try:
        yield backend
    finally:
        _scoped.reset(token)
