"""CIFAR-10 in its Python and its binary version (https://www.cs.toronto.edu/~kriz/cifar.html)."""

import hashlib
import io
import os
import pickle
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from sparsebreg.core.errors import DataError, expected
from sparsebreg.experiments.data.arrays import Arrays, Splits, check_labels, read_bytes

CIFAR10_MD5 = {
    "cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a",
    "cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530",
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
ARCHIVES = ("cifar-10-python.tar.gz", "cifar-10-binary.tar.gz")
BATCHES = tuple(name for name in CIFAR10_MD5 if name not in ARCHIVES)

#: Only files of at least this size are compared with their MD5, so that excerpts load too: an archive, and one batch.
CHECKED_BYTES = {True: 100_000_000, False: 30_000_000}


class _ArrayUnpickler(pickle.Unpickler):
    """Loads numpy arrays, bytes and plain containers, and refuses whatever else a pickle asks to call."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return np.zeros(0).__reduce__()[0]
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):  # bytes, as Python 3 writes them for Python 2
            return lambda text, encoding: text.encode("latin1")
        raise pickle.UnpicklingError(f"{module}.{name} is not data")


def _parse_pickle(name: str, raw: bytes) -> Arrays:
    wanted = "a dictionary with data (n, 3072) of bytes and n labels"
    try:
        batch = _ArrayUnpickler(io.BytesIO(raw), encoding="bytes").load()
        batch = {k.decode() if isinstance(k, bytes) else k: v for k, v in batch.items()}
        images, labels = batch["data"], np.asarray(batch["labels"], dtype=np.int64)
        found = f"{images.dtype} of shape {images.shape}"
        if images.dtype == np.uint8 and images.ndim == 2 and images.shape[1] == 3072:
            return images.reshape(-1, 3, 32, 32), labels
    except Exception as error:  # a damaged pickle can raise anything
        raise DataError(expected(name, wanted, f"{type(error).__name__}: {error}")) from error
    raise DataError(expected(name, wanted, found))


def _parse_binary(name: str, raw: bytes) -> Arrays:
    if len(raw) % 3073 or not raw:
        raise DataError(expected(name, "records of 3073 bytes", f"{len(raw)} bytes"))
    records = np.frombuffer(raw, np.uint8).reshape(-1, 3073)
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0].astype(np.int64)


def _check_md5(path: Path, raw: bytes) -> None:
    known = CIFAR10_MD5.get(path.name)
    if known is None or len(raw) < CHECKED_BYTES[path.name in ARCHIVES]:
        return
    if (md5 := hashlib.md5(raw, usedforsecurity=False).hexdigest()) != known:
        raise DataError(expected(str(path), f"the published file (md5 {known})", f"md5 {md5}"))


def _unpack(path: Path) -> dict[str, bytes]:
    """The files in an archive by name; nothing is written to disk."""
    wanted = "a readable .tar.gz archive"
    raw = read_bytes(path, wanted)
    _check_md5(path, raw)
    try:
        with tarfile.open(fileobj=io.BytesIO(raw), mode="r:gz") as archive:
            return {Path(m.name).name: archive.extractfile(m).read() for m in archive if m.isfile()}  # type: ignore[union-attr]
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise DataError(expected(str(path), wanted, error)) from error


def find(path: Path) -> Path | None:
    """Where CIFAR-10 is: the path itself if it is a file, else a folder with batches or an archive in that folder."""
    if os.path.isfile(path):
        return path
    for folder in (path, path / "cifar-10-batches-py", path / "cifar-10-batches-bin"):
        if any(os.path.isfile(folder / f"{name}{end}") for name in BATCHES for end in ("", ".bin")):
            return folder
    return next((path / name for name in ARCHIVES if os.path.isfile(path / name)), None)


def read(path: Path) -> Splits:
    """CIFAR-10 from an archive as published, or from the folder that it unpacks to.

    All six batches must be there, with whole records, equally many in each, and labels from 0 to 9. A smaller data set
    of this form passes as an excerpt. Archives and Python batches of about the published size must have the published
    MD5. None is published for binary batches outside of their archive.
    """
    if not path.exists():
        raise DataError(expected("data_dir", "a folder or a .tar.gz archive", path))
    place = find(path)
    if place is None:
        wanted = f"cifar-10-python.tar.gz, cifar-10-binary.tar.gz or their batches in {path}"
        raise DataError(expected("data_dir", wanted, "none"))
    archive = _unpack(place) if place.is_file() else None
    names = {p.name for p in place.iterdir()} if archive is None else set(archive)
    binary = any(f"{name}.bin" in names for name in BATCHES)
    splits: list[Arrays] = []
    for stem in BATCHES:
        file = place / (f"{stem}.bin" if binary else stem)
        if file.name not in names:
            wanted = f"the six batches of CIFAR-10, among them {file.name}"
            raise DataError(expected(str(place), wanted, "none of that name"))
        raw = read_bytes(file, "a readable batch") if archive is None else archive[file.name]
        _check_md5(file, raw)
        images, labels = (_parse_binary if binary else _parse_pickle)(str(file), raw)
        check_labels(str(file), images, labels, 10)
        if splits and len(labels) != len(splits[0][1]):  # a file that was cut between two records
            raise DataError(expected(str(file), f"{len(splits[0][1])} images, as the first batch has", len(labels)))
        splits.append((images, labels))
    *parts, test = splits
    return (np.concatenate([i for i, _ in parts]), np.concatenate([y for _, y in parts])), test, 10
