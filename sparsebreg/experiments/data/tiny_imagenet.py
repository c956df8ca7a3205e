"""Tiny ImageNet, a folder of JPEG files (http://cs231n.stanford.edu/tiny-imagenet-200.zip)."""

import hashlib
import os
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from sparsebreg.core.errors import DataError, RunError, expected
from sparsebreg.experiments.data.arrays import Splits, read_bytes
from sparsebreg.experiments.files import atomic

JPEG = (".jpeg", ".jpg")

#: Image files and their labels.
Labelled = list[tuple[Path, int]]


def _lines(path: Path) -> list[str]:
    text = read_bytes(path, "a text file of Tiny ImageNet").decode(errors="replace")
    return [line for line in text.splitlines() if line]


def _entries(folder: Path, *endings: str) -> list[Path]:
    """What is in a folder, sorted, without hidden files; only files with these endings if there are some."""
    try:
        found = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    except OSError as error:
        raise DataError(expected(str(folder), "a folder of Tiny ImageNet", error)) from error
    return [p for p in found if p.suffix.lower() in endings] if endings else found


def _check_names(path: Path, names: list[str], folder: Path, found: list[Path]) -> None:
    """Raises DataError unless the list in ``path`` names what was found in a folder, each once."""
    wanted, there = f"the names in {folder}, each once", {p.name for p in found}
    if twice := [name for name, times in Counter(names).items() if times > 1]:
        raise DataError(expected(str(path), wanted, f"{twice[0]!r} more than once"))
    if absent := sorted(set(names) - there):
        raise DataError(expected(str(path), wanted, f"{absent[0]!r}, which is not there"))
    if unnamed := sorted(there - set(names)):
        raise DataError(expected(str(path), wanted, f"no line for {unnamed[0]!r}"))


def _training_files(folder: Path, label: dict[str, int]) -> Labelled:
    train: Labelled = []
    first = 0
    for wnid, i in label.items():
        images = folder / "train" / wnid / "images"
        found = _entries(images, *JPEG)
        first = first or len(found)
        if not found or len(found) != first:  # 500 each in the published files
            raise DataError(expected(str(images), f"{first or 'some'} images, as the first class has", len(found)))
        train += [(p, i) for p in found]
    return train


def _validation_files(folder: Path, label: dict[str, int]) -> Labelled:
    annotations, images = folder / "val" / "val_annotations.txt", folder / "val" / "images"
    rows = [[*line.split("\t"), ""][:2] for line in _lines(annotations)]
    if not rows:
        raise DataError(expected(str(annotations), "a line for every image", "none"))
    for row in rows:
        if row[1] not in label:
            wanted = "lines of a file name and a class of wnids.txt"
            raise DataError(expected(str(annotations), wanted, repr("\t".join(row)[:60])))
    _check_names(annotations, [name for name, _ in rows], images, _entries(images, *JPEG))
    return [(images / name, label[wnid]) for name, wnid in rows]


def _decode(files: list[Path]) -> np.ndarray:
    """JPEG files of one size as uint8 (n, 3, H, W); grey images become RGB."""
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError(expected("data", "Pillow to decode JPEG (pip install 'sparsebreg[train]')", error)) from error

    def read(path: Path) -> np.ndarray:
        try:
            with Image.open(path) as image:
                return np.asarray(image.convert("RGB")).transpose(2, 0, 1)
        except (OSError, ValueError, SyntaxError) as error:
            raise DataError(expected(str(path), "a readable JPEG image", error)) from error

    first = read(files[0])
    out = np.empty((len(files), *first.shape), np.uint8)

    def place(i: int) -> None:
        image = read(files[i])
        if image.shape != first.shape:
            raise DataError(expected(str(files[i]), f"an image of shape {first.shape}", image.shape))
        out[i] = image

    with ThreadPoolExecutor() as pool:
        list(pool.map(place, range(len(files)), chunksize=64))
    return out


def _fingerprint(folder: Path, files: Iterable[Path]) -> str:
    """A hash of names, sizes and times of the files."""
    digest = hashlib.sha256()
    for path in files:
        try:
            facts = path.stat()
        except OSError as error:
            raise DataError(expected(str(path), "a readable JPEG image", error)) from error
        digest.update(f"{path.relative_to(folder)} {facts.st_size} {facts.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _save_cache(path: Path, **arrays: Any) -> None:
    """Writes an .npz file if that is possible. Several processes may do so at the same time."""
    try:
        with tempfile.TemporaryDirectory(prefix=".sparsebreg-", dir=path.parent) as own:
            with atomic(Path(own) / path.name) as file:
                np.savez(file, **arrays)
            (Path(own) / path.name).replace(path)
    except (OSError, RunError):
        pass  # the next run decodes the images again


def find(path: Path) -> Path | None:
    """The unpacked folder: the path itself, or ``tiny-imagenet-200`` in it."""
    return next((f for f in (path, path / "tiny-imagenet-200") if os.path.isfile(f / "wnids.txt")), None)


def read(path: Path) -> Splits:
    """Training and validation split of Tiny ImageNet; the published test images have no labels.

    wnids.txt must name the folders in train, and val_annotations.txt the images in val/images, each once. All classes
    must have equally many training images, and all images one size. No checksum is published.

    Decoded images are kept beside the data, in ``sparsebreg-cache.npz``, if that folder can be written.
    """
    folder = find(path)
    if folder is None:
        raise DataError(expected("data_dir", f"the unpacked tiny-imagenet-200 with wnids.txt in {path}", "none"))
    wnids = [line.strip() for line in _lines(folder / "wnids.txt")]
    if not wnids:
        raise DataError(expected(str(folder / "wnids.txt"), "class names, one a line", "none"))
    _check_names(folder / "wnids.txt", wnids, folder / "train", [p for p in _entries(folder / "train") if p.is_dir()])
    label = {wnid: i for i, wnid in enumerate(wnids)}
    splits = (_training_files(folder, label), _validation_files(folder, label))
    key = _fingerprint(folder, [p for split in splits for p, _ in split])
    cache = folder / "sparsebreg-cache.npz"
    train, val = (np.array([y for _, y in split], np.int64) for split in splits)
    try:
        with np.load(cache, allow_pickle=False) as saved:
            if str(saved["key"]) == key:
                return (saved["train"], train), (saved["val"], val), len(wnids)
    except (OSError, KeyError, ValueError, EOFError, zlib.error, zipfile.BadZipFile):
        pass  # missing or damaged: the images are decoded again
    images = [_decode([p for p, _ in split]) for split in splits]
    _save_cache(cache, key=key, train=images[0], val=images[1])
    return (images[0], train), (images[1], val), len(wnids)
