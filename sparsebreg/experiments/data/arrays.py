"""What the readers of all file formats share. They raise DataError, and nothing else, for files that are not right."""

from pathlib import Path

import numpy as np

from sparsebreg.core.errors import DataError, expected

#: Images (n, C, H, W) as uint8, and labels (n,) as int64.
Arrays = tuple[np.ndarray, np.ndarray]

#: Training split, test split, number of classes.
Splits = tuple[Arrays, Arrays, int]


def read_bytes(path: Path, wanted: str) -> bytes:
    """The content of a file. Raises DataError, which says what was ``wanted``."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(expected(str(path), wanted, error)) from error


def check_labels(name: str, images: np.ndarray, labels: np.ndarray, classes: int) -> None:
    """Raises DataError unless there is one label per image, and each is a class."""
    if len(images) != len(labels) or not len(images):
        raise DataError(expected(name, f"{len(images)} labels, one per image", len(labels)))
    if (wrong := labels[(labels < 0) | (labels >= classes)]).size:
        raise DataError(expected(name, f"labels from 0 to {classes - 1}", wrong[0]))
