"""IDX files, the format of MNIST and Fashion-MNIST (http://yann.lecun.com/exdb/mnist)."""

import gzip
import hashlib
import math
import os
import zlib
from pathlib import Path

import numpy as np

from sparsebreg.core.errors import DataError, expected
from sparsebreg.experiments.data.arrays import Arrays, Splits, check_labels

#: Uncompressed size of each file, and its MD5 by data set. Files of another size are not compared: excerpts load too.
IDX_MD5 = {
    "train-images-idx3": (
        47_040_016,
        {"mnist": "6bbc9ace898e44ae57da46a324031adb", "fashion-mnist": "f4a8712d7a061bf5bd6d2ca38dc4d50a"},
    ),
    "train-labels-idx1": (
        60_008,
        {"mnist": "a25bea736e30d166cdddb491f175f624", "fashion-mnist": "9018921c3c673c538a1fc5bad174d6f9"},
    ),
    "t10k-images-idx3": (
        7_840_016,
        {"mnist": "2646ac647ad5339dbf082846283269ea", "fashion-mnist": "8181f5470baa50b63fa0f6fddb340f0a"},
    ),
    "t10k-labels-idx1": (
        10_008,
        {"mnist": "27ae3e4e09519cfbb04c329615203637", "fashion-mnist": "15d484375f8d13e6eb1aabb0c3f46965"},
    ),
}


def parse(path: Path, raw: bytes, dims: int) -> np.ndarray:
    """The array of unsigned bytes in the content of an IDX file.

    Raises:
        DataError: for content that is damaged, truncated, too long, or not IDX of ``dims`` dimensions.
    """
    if len(raw) < 4 or raw[0] or raw[1]:
        raise DataError(expected(str(path), "an IDX file (two zero bytes first)", repr(raw[:4])))
    if raw[2] != 0x08 or raw[3] != dims:
        got = f"type 0x{raw[2]:02x} in {raw[3]} dimensions"
        raise DataError(expected(str(path), f"unsigned bytes in {dims} dimensions", got))
    head = 4 + 4 * dims
    if len(raw) < head:
        raise DataError(expected(str(path), f"a header of {head} bytes", f"{len(raw)} bytes"))
    shape = tuple(np.frombuffer(raw, ">u4", dims, offset=4).tolist())
    size = math.prod(shape)
    if len(raw) - head != size:
        raise DataError(expected(str(path), f"{size} bytes of data for shape {shape}", f"{len(raw) - head}"))
    return np.frombuffer(raw, np.uint8, offset=head).reshape(shape)


def _check_md5(path: Path, raw: bytes, name: str, stem: str) -> None:
    """Raises DataError for a file of the published size that is not the one published for the data set ``name``."""
    size, known = IDX_MD5[stem]
    if len(raw) != size or (md5 := hashlib.md5(raw, usedforsecurity=False).hexdigest()) == known[name]:
        return
    found = next((f"that of {other}" for other, its in known.items() if its == md5), f"md5 {md5}")
    raise DataError(expected(str(path), f"the published file of {name} (md5 {known[name]})", found))


def _find_file(folder: Path, stem: str) -> Path | None:
    names = (f"{stem}-ubyte", f"{stem}-ubyte.gz", f"{stem}.ubyte", stem)
    return next((folder / name for name in names if os.path.isfile(folder / name)), None)


def _read_file(folder: Path, name: str, stem: str) -> tuple[Path, np.ndarray]:
    path = _find_file(folder, stem)
    if path is None:
        raise DataError(expected("data_dir", f"a file {stem}-ubyte or {stem}-ubyte.gz in {folder}", "none"))
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(expected(str(path), "a readable IDX file", error)) from error
    array = parse(path, raw, dims=3 if stem.endswith("idx3") else 1)
    _check_md5(path, raw, name, stem)
    return path, array


def _read_split(folder: Path, name: str, prefix: str) -> Arrays:
    image_file, images = _read_file(folder, name, f"{prefix}-images-idx3")
    label_file, labels = _read_file(folder, name, f"{prefix}-labels-idx1")
    if images.shape[1:] != (28, 28):
        raise DataError(expected(str(image_file), "images of 28 x 28", " x ".join(map(str, images.shape[1:]))))
    check_labels(str(label_file), images, labels, 10)
    return images[:, None], labels.astype(np.int64)


def find(path: Path) -> Path | None:
    """The folder, if at least one of the four files is in it."""
    return path if any(_find_file(path, stem) for stem in IDX_MD5) else None


def read(folder: Path, name: str) -> Splits:
    """The four files of ``name``, "mnist" or "fashion-mnist", each gzipped or not."""
    if not folder.is_dir():
        raise DataError(expected("data_dir", "a folder", folder))
    return _read_split(folder, name, "train"), _read_split(folder, name, "t10k"), 10
