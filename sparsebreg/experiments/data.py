"""Data sets, as tensors in memory.

MNIST and Fashion-MNIST come as four IDX files in a folder, gzipped or not (http://yann.lecun.com/exdb/mnist describes
the format); digits come with scikit-learn.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from sparsebreg.errors import DataError, check_choice, check_int, expected

#: Folders searched where no --data-dir is given: beside the user's work, then where Debian's package puts the files.
SEARCH = {
    "mnist": ("data/mnist", "/usr/share/datasets/mnist"),
    "fashion-mnist": ("data/fashion-mnist", "/usr/share/datasets/fashion-mnist"),
}


@dataclass(frozen=True)
class Split:
    """Images (n, C, H, W) float32 and labels (n,) int64."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Dataset:
    """A training and a test split, standardised with the training split's mean and deviation."""

    name: str
    train: Split
    test: Split
    classes: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        return tuple(self.train.images.shape[1:])  # type: ignore[return-value]


def read_idx(path: Path, dims: int) -> np.ndarray:
    """The array of unsigned bytes in an IDX file, gzipped or not.

    Raises:
        DataError: for a file that is missing, damaged, truncated, too long, or not IDX of ``dims`` dimensions.
    """
    try:
        raw = path.read_bytes()
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(expected(str(path), "a readable IDX file", error)) from error
    if len(raw) < 4 or raw[0] or raw[1]:
        raise DataError(expected(str(path), "an IDX file (two zero bytes first)", repr(raw[:4])))
    if raw[2] != 0x08 or raw[3] != dims:
        raise DataError(
            expected(str(path), f"unsigned bytes in {dims} dimensions", f"type 0x{raw[2]:02x} in {raw[3]} dimensions")
        )
    head = 4 + 4 * dims
    if len(raw) < head:
        raise DataError(expected(str(path), f"a header of {head} bytes", f"{len(raw)} bytes"))
    shape = struct.unpack(f">{dims}I", raw[4:head])
    size = int(np.prod(shape, dtype=np.int64))
    if len(raw) - head != size:
        raise DataError(expected(str(path), f"{size} bytes of data for shape {shape}", f"{len(raw) - head}"))
    return np.frombuffer(raw, dtype=np.uint8, offset=head).reshape(shape)


def _find_idx(folder: Path, stem: str) -> Path:
    for name in (f"{stem}-ubyte", f"{stem}-ubyte.gz", f"{stem}.ubyte", stem):
        if (folder / name).is_file():
            return folder / name
    raise DataError(expected("data_dir", f"a file {stem}-ubyte or {stem}-ubyte.gz in {folder}", "none"))


def _idx_split(folder: Path, prefix: str, classes: int) -> tuple[np.ndarray, np.ndarray]:
    image_file, label_file = _find_idx(folder, f"{prefix}-images-idx3"), _find_idx(folder, f"{prefix}-labels-idx1")
    images, labels = read_idx(image_file, 3), read_idx(label_file, 1)
    if images.shape[1:] != (28, 28):
        raise DataError(expected(str(image_file), "images of 28 x 28", " x ".join(map(str, images.shape[1:]))))
    if len(images) != len(labels) or not len(images):
        raise DataError(expected(str(label_file), f"{len(images)} labels, one per image", len(labels)))
    if labels.max() >= classes:
        raise DataError(expected(str(label_file), f"labels from 0 to {classes - 1}", labels.max()))
    return images, labels


def _standardised(name: str, train, test, classes: int) -> Dataset:
    splits = [
        (torch.from_numpy(i.astype(np.float32)).unsqueeze(1), torch.from_numpy(y.astype(np.int64)))
        for i, y in (train, test)
    ]
    mean, std = splits[0][0].mean(), splits[0][0].std()
    return Dataset(name, *(Split((i - mean) / std, y) for i, y in splits), classes)


def _idx_dataset(name: str) -> Callable[[Path | None], Dataset]:
    def load(folder: Path | None) -> Dataset:
        if folder is None:
            found = [Path(p) for p in SEARCH[name] if Path(p).is_dir()]
            if not found:
                raise DataError(expected("data_dir", f"a folder with the IDX files of {name}", "none given"))
            folder = found[0]
        if not folder.is_dir():
            raise DataError(expected("data_dir", "a folder", folder))
        return _standardised(name, _idx_split(folder, "train", 10), _idx_split(folder, "t10k", 10), 10)

    return load


def _digits(folder: Path | None) -> Dataset:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(expected("data", "scikit-learn for digits (pip install 'sparsebreg[train]')", error)) from error
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8)
    # A fixed split: every fifth image for the test.
    test = np.arange(len(labels)) % 5 == 4
    return _standardised("digits", (images[~test], labels[~test]), (images[test], labels[test]), 10)


DATASETS: dict[str, Callable[[Path | None], Dataset]] = {
    "digits": _digits,
    "fashion-mnist": _idx_dataset("fashion-mnist"),
    "mnist": _idx_dataset("mnist"),
}


def load(name: str, data_dir: str | Path | None = None) -> Dataset:
    """A data set by name.

    Args:
        name: one of ``DATASETS``.
        data_dir: the folder with its files; default: the places in ``SEARCH``.

    Raises:
        ValueError: for an unknown name. DataError: for files that are missing, damaged or mislabelled.
    """
    loader = DATASETS[check_choice("data", name, DATASETS)]
    return loader(Path(data_dir) if data_dir is not None else None)


def batches(split: Split, batch_size: int, generator: torch.Generator) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """One epoch in random order; a last smaller batch is kept."""
    check_int("batch_size", batch_size, low=1)
    for index in torch.randperm(len(split), generator=generator).split(batch_size):
        yield split.images[index], split.labels[index]
