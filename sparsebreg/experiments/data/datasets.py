"""Data sets by name, as tensors in memory."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from sparsebreg.core.errors import DataError, check_choice, check_real, expected
from sparsebreg.experiments.data import cifar10, idx, tiny_imagenet
from sparsebreg.experiments.data.arrays import Arrays, Splits

#: Folders searched if no --data-dir is given: first below the current one, then where Debian's package puts the files.
SEARCH = {
    "mnist": ("data/mnist", "/usr/share/datasets/mnist"),
    "fashion-mnist": ("data/fashion-mnist", "/usr/share/datasets/fashion-mnist"),
    "cifar10": ("data/cifar10", "data"),
    "tiny-imagenet": ("data/tiny-imagenet", "data"),
}

#: Seed of the validation split: the same images for every method and seed.
VALIDATION_SEED = 0


@dataclass(frozen=True)
class Split:
    """Images (n, C, H, W) uint8 and labels (n,) int64."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: torch.Tensor) -> "Split":
        # Eight times faster than images[index] for a batch of 128 x 784 bytes.
        return Split(self.images.index_select(0, index), self.labels.index_select(0, index))


@dataclass(frozen=True)
class Dataset:
    """Training, test and optional validation split; ``mean`` and ``std`` (C, 1, 1) are those of the training split."""

    name: str
    train: Split
    test: Split
    classes: int
    mean: torch.Tensor
    std: torch.Tensor
    validation: Split | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        return tuple(self.train.images.shape[1:])  # type: ignore[return-value]

    def standardise(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (n, C, H, W) as float32; every channel of the training split gets mean 0 and standard deviation 1."""
        return images.float().sub_(self.mean).div_(self.std)


def _statistics(images: torch.Tensor) -> list[torch.Tensor]:
    """Exact mean and standard deviation of every channel, from counts of the 256 values: no float copy is needed."""
    counts = np.zeros((images.shape[1], 256))
    for part in images.split(1000):
        for c, row in enumerate(counts):
            row += np.bincount(part[:, c].reshape(-1).numpy(), minlength=256)
    share = counts / counts.sum(1, keepdims=True)
    mean = share @ np.arange(256)
    std = np.sqrt((share * (np.arange(256) - mean[:, None]) ** 2).sum(1))
    std[std == 0] = 1  # a constant channel
    return [torch.from_numpy(v).float().view(-1, 1, 1) for v in (mean, std)]


#: Reads a data set from the files at a path, or from where it finds them by itself.
Reader = Callable[[Path | None], Splits]


def _published(name: str, read: Callable[[Path], Splits], find: Callable[[Path], Path | None], files: str) -> Reader:
    """A reader that, without a path, takes the first folder in ``SEARCH`` where ``find`` finds the ``files``."""

    def search_and_read(path: Path | None) -> Splits:
        path = path or next((Path(p) for p in SEARCH[name] if find(Path(p))), None)
        if path is None:
            nowhere = f"none given, and no such files in {' or '.join(SEARCH[name])}"
            raise DataError(expected("data_dir", f"a folder with {files}", nowhere))
        return read(path)

    return search_and_read


def _digits(path: Path | None) -> Splits:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(expected("data", "scikit-learn for digits (pip install 'sparsebreg[train]')", error)) from error
    images, labels = load_digits(return_X_y=True)
    images, labels = images.reshape(-1, 1, 8, 8).astype(np.uint8), labels.astype(np.int64)
    # A fixed split: every fifth image for the test.
    test = np.arange(len(labels)) % 5 == 4
    return (images[~test], labels[~test]), (images[test], labels[test]), 10


def _synthetic(path: Path | None) -> Splits:
    """Ten random 3 x 32 x 32 images, each 512 times with strong noise: for timing, without any file."""
    rng = np.random.default_rng(0)
    classes = rng.integers(64, 192, (10, 3, 32, 32)).astype(np.float32)

    def split(n: int) -> Arrays:
        labels = rng.permutation(np.arange(n) % 10)
        noise = 96 * rng.standard_normal((n, 3, 32, 32), np.float32)
        return (classes[labels] + noise).clip(0, 255).astype(np.uint8), labels.astype(np.int64)

    return split(5120), split(1280), 10


DATASETS: dict[str, Reader] = {
    "digits": _digits,
    **{
        name: _published(name, partial(idx.read, name=name), idx.find, f"the IDX files of {name}")
        for name in ("fashion-mnist", "mnist")
    },
    "cifar10": _published("cifar10", cifar10.read, cifar10.find, "cifar-10-python.tar.gz"),
    "tiny-imagenet": _published(
        "tiny-imagenet", tiny_imagenet.read, tiny_imagenet.find, "the unpacked tiny-imagenet-200"
    ),
    "synthetic": _synthetic,
}


def load(name: str, data_dir: str | Path | None = None, validation: float = 0.0) -> Dataset:
    """A data set by name.

    Args:
        name: one of ``DATASETS``.
        data_dir: the folder with its files (cifar10: or the archive); default: the first of ``SEARCH`` that has them.
        validation: fraction of the training images set aside for validation, in [0, 1); the same ones in every run.

    Raises:
        TypeError, ValueError: for an unknown name or a wrong fraction. DataError: for files that are missing, damaged
        or mislabelled.
    """
    reader = DATASETS[check_choice("data", name, DATASETS)]
    if check_real("validation", validation, low=0) >= 1:
        raise ValueError(expected("validation", "a fraction below 1", validation))
    *arrays, classes = reader(Path(data_dir) if data_dir is not None else None)
    # torch has no read-only tensors, and an array over the bytes of a file is read-only: it is copied.
    train, test = (Split(*(torch.from_numpy(np.require(a, requirements="CW")) for a in split)) for split in arrays)
    held = None
    if validation:
        size = round(validation * len(train))
        if not 0 < size < len(train):
            raise ValueError(expected("validation", f"a fraction that splits {len(train)} images", validation))
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(VALIDATION_SEED))
        held, train = train.take(order[:size]), train.take(order[size:].sort().values)
    return Dataset(name, train, test, classes, *_statistics(train.images), held)
