"""Data sets in memory, and batches of them in an order that can be saved and gone on with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparsebreg.core.errors import DataError, check_choice, check_int, check_real, expected
from sparsebreg.experiments import formats
from sparsebreg.experiments.formats import Arrays

#: Folders searched where no --data-dir is given: beside the user's work, then where Debian's package puts the files.
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

    def take(self, index: torch.Tensor) -> Split:
        # Eight times faster than images[index] for a batch of 128 x 784 bytes.
        return Split(self.images.index_select(0, index), self.labels.index_select(0, index))


@dataclass(frozen=True)
class Dataset:
    """Training, test and perhaps validation split; ``mean`` and ``std`` (C, 1, 1) are of the training split."""

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
        """uint8 (n, C, H, W) to float32 with the training split's mean 0 and deviation 1 in every channel."""
        return images.float().sub_(self.mean).div_(self.std)


def _statistics(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of every channel, exact, from counts of the 256 values; no float copy of the images."""
    counts = np.zeros((images.shape[1], 256))
    for part in images.split(1000):
        for c, row in enumerate(counts):
            row += np.bincount(part[:, c].reshape(-1).numpy(), minlength=256)
    share = counts / counts.sum(1, keepdims=True)
    mean = share @ np.arange(256)
    std = np.sqrt((share * (np.arange(256) - mean[:, None]) ** 2).sum(1))
    std[std == 0] = 1  # a constant channel
    return tuple(torch.from_numpy(v).float().view(-1, 1, 1) for v in (mean, std))  # type: ignore[return-value]


#: Reads the files at a path: (training, test, number of classes).
Reader = Callable[[Path], tuple[Arrays, Arrays, int]]


def _published(name: str, reader: Reader, find: Callable[[Path], Path | None], files: str) -> Callable[..., Any]:
    """A reader that also takes None: the first place in ``SEARCH`` where ``find`` finds something."""

    def read(path: Path | None) -> tuple[Arrays, Arrays, int]:
        path = path or next((Path(p) for p in SEARCH[name] if find(Path(p))), None)
        if path is None:
            nowhere = f"none given, and no such files in {' or '.join(SEARCH[name])}"
            raise DataError(expected("data_dir", f"a folder with {files}", nowhere))
        return reader(path)

    return read


def _idx(name: str) -> Callable[..., Any]:
    reader = partial(formats.idx_dataset, name=name)
    return _published(name, reader, formats.find_idx, f"the IDX files of {name}")


def _digits(path: Path | None) -> tuple[Arrays, Arrays, int]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(expected("data", "scikit-learn for digits (pip install 'sparsebreg[train]')", error)) from error
    images, labels = load_digits(return_X_y=True)
    images, labels = images.reshape(-1, 1, 8, 8).astype(np.uint8), labels.astype(np.int64)
    # A fixed split: every fifth image for the test.
    test = np.arange(len(labels)) % 5 == 4
    return (images[~test], labels[~test]), (images[test], labels[test]), 10


def _synthetic(path: Path | None) -> tuple[Arrays, Arrays, int]:
    """Ten random 3 x 32 x 32 images, each seen through strong noise 512 times: for timing, and without any file."""
    rng = np.random.default_rng(0)
    classes = rng.integers(64, 192, (10, 3, 32, 32)).astype(np.float32)

    def split(n: int) -> Arrays:
        labels = rng.permutation(np.arange(n) % 10)
        noise = 96 * rng.standard_normal((n, 3, 32, 32), np.float32)
        return (classes[labels] + noise).clip(0, 255).astype(np.uint8), labels.astype(np.int64)

    return split(5120), split(1280), 10


DATASETS: dict[str, Callable[[Path | None], tuple[Arrays, Arrays, int]]] = {
    "digits": _digits,
    "fashion-mnist": _idx("fashion-mnist"),
    "mnist": _idx("mnist"),
    "cifar10": _published("cifar10", formats.cifar10, formats.find_cifar10, "cifar-10-python.tar.gz"),
    "tiny-imagenet": _published(
        "tiny-imagenet", formats.tiny_imagenet, formats.find_tiny_imagenet, "the unpacked tiny-imagenet-200"
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
    read = DATASETS[check_choice("data", name, DATASETS)]
    if check_real("validation", validation, low=0) >= 1:
        raise ValueError(expected("validation", "a fraction below 1", validation))
    *arrays, classes = read(Path(data_dir) if data_dir is not None else None)
    # An array over a file's bytes cannot be written to, and torch has no such tensors.
    train, test = (Split(*(torch.from_numpy(np.require(a, requirements="CW")) for a in split)) for split in arrays)
    held = None
    if validation:
        size = round(validation * len(train))
        if not 0 < size < len(train):
            raise ValueError(expected("validation", f"a fraction that splits {len(train)} images", validation))
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(VALIDATION_SEED))
        held, train = train.take(order[:size]), train.take(order[size:].sort().values)
    return Dataset(name, train, test, classes, *_statistics(train.images), held)


def augment(images: torch.Tensor, generator: torch.Generator, pad: int = 4) -> torch.Tensor:
    """The usual augmentation of small images: a random crop of the zero-padded image, mirrored with probability 1/2.

    Args:
        images: (n, C, H, W), any dtype; unchanged.
        pad: rows and columns of zeros on every side.

    Returns:
        A new tensor of the same shape.
    """
    n, _, high, wide = images.shape
    padded = torch.nn.functional.pad(images, (pad, pad, pad, pad)).numpy()
    dy, dx = torch.randint(2 * pad + 1, (2, n), generator=generator).numpy()
    mirrored = torch.randint(2, (n,), generator=generator).bool().numpy()
    windows = np.lib.stride_tricks.sliding_window_view(padded, (high, wide), axis=(2, 3))
    out = windows[np.arange(n), :, dy, dx]
    out[mirrored] = out[mirrored, :, :, ::-1]
    return torch.from_numpy(out)


class Batches:
    """Batches of a split in seeded random order, epoch after epoch; a last smaller batch is kept.

    The state can be saved between any two batches; the order goes on there after ``load_state_dict``.
    """

    def __init__(self, data: Dataset, batch_size: int, seed: int, augmented: bool = False) -> None:
        self.data, self.batch_size, self.augmented = data, check_int("batch_size", batch_size, low=1), augmented
        self.order = torch.Generator().manual_seed(seed)
        self.noise = torch.Generator().manual_seed(seed + 2**32)
        self.done = 0
        self._start = self.order.get_state()

    def __len__(self) -> int:
        return -(-len(self.data.train) // self.batch_size)

    def epoch(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The batches (x, y) of an epoch that are still to come: standardised images and labels."""
        self._start = self.order.get_state()
        order = torch.randperm(len(self.data.train), generator=self.order)
        for index in order.split(self.batch_size)[self.done :]:
            self.done += 1
            batch = self.data.train.take(index)
            images = augment(batch.images, self.noise) if self.augmented else batch.images
            yield self.data.standardise(images), batch.labels
        self.done = 0

    def state_dict(self) -> dict[str, Any]:
        """Plain data; loads with ``torch.load(weights_only=True)``."""
        start = self._start if self.done else self.order.get_state()
        return {"order": start, "noise": self.noise.get_state(), "done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order.set_state(state["order"])
        self.noise.set_state(state["noise"])
        self.done = state["done"]
        self._start = state["order"]
