"""Files that are there whole or not at all, and folders that one process uses at a time."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from filelock import FileLock, Timeout

from sparsebreg.core.errors import RunError, expected


@contextmanager
def atomic(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that takes the place of ``path`` once it is written and synced; until then the old one stays.

    Raises RunError where there is no room, or no right, to write it.
    """
    temporary = path.with_name(f"{path.name}.part")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise RunError(expected(str(path), "room to write it", error)) from error
        raise
    if os.name == "posix":  # the rename itself
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write(path: Path, content: str | bytes) -> None:
    """``path.write_text``, atomically. Raises RunError."""
    with atomic(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def prepare_folder(out: str | Path) -> Path:
    """The output folder, made and writable. Raises RunError."""
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise RunError(expected("out", "a folder that can be written", error)) from error
    return folder


@contextmanager
def locked(folder: Path, seconds: float = 0) -> Iterator[None]:
    """Keeps other runs out of a folder; waits for ``seconds`` where one is in it. Raises RunError."""
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=seconds)
    except Timeout:
        raise RunError(expected("out", "a folder that no other run is writing to", folder)) from None
    try:
        yield
    finally:
        lock.release()
