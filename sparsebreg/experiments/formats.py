"""Readers of published data files: images as bytes (n, C, H, W), labels as int64 (n,). They raise DataError alone.

IDX (http://yann.lecun.com/exdb/mnist), CIFAR-10 in its Python and binary versions
(https://www.cs.toronto.edu/~kriz/cifar.html), Tiny ImageNet (http://cs231n.stanford.edu/tiny-imagenet-200.zip).
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import pickle
import struct
import tarfile
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
from sparsebreg.experiments.files import atomic

Arrays = tuple[np.ndarray, np.ndarray]

#: Size of each file, unzipped, and its MD5 in each data set: compared at that size alone, since excerpts load too.
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
CIFAR10_FILES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
#: Checksums are compared for files of about the published size: excerpts of a data set load too.
CHECKED_BYTES = {True: 100_000_000, False: 30_000_000}  # archive, one batch

JPEG = (".jpeg", ".jpg")


def _read(path: Path, wanted: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(expected(str(path), wanted, error)) from error


def _check_labels(name: str, images: np.ndarray, labels: np.ndarray, classes: int) -> None:
    if len(images) != len(labels) or not len(images):
        raise DataError(expected(name, f"{len(images)} labels, one per image", len(labels)))
    if (wrong := labels[(labels < 0) | (labels >= classes)]).size:
        raise DataError(expected(name, f"labels from 0 to {classes - 1}", wrong[0]))


def _unzipped(path: Path) -> bytes:
    raw = _read(path, "a readable IDX file")
    try:
        return gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(expected(str(path), "a readable IDX file", error)) from error


def read_idx(path: Path, raw: bytes, dims: int) -> np.ndarray:
    """The array of unsigned bytes in the content of an IDX file.

    Raises:
        DataError: for content that is damaged, truncated, too long, or not IDX of ``dims`` dimensions.
    """
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


def _check_idx(path: Path, raw: bytes, name: str, stem: str) -> None:
    """Raises DataError for a file of the published size that is not the one published for the data set ``name``."""
    size, known = IDX_MD5[stem]
    if len(raw) != size or (md5 := hashlib.md5(raw, usedforsecurity=False).hexdigest()) == known[name]:
        return
    found = next((f"that of {other}" for other, its in known.items() if its == md5), f"md5 {md5}")
    raise DataError(expected(str(path), f"the published file of {name} (md5 {known[name]})", found))


def _idx_path(folder: Path, stem: str) -> Path | None:
    names = (f"{stem}-ubyte", f"{stem}-ubyte.gz", f"{stem}.ubyte", stem)
    return next((folder / name for name in names if os.path.isfile(folder / name)), None)


def _idx_file(folder: Path, name: str, stem: str) -> tuple[Path, np.ndarray]:
    path = _idx_path(folder, stem)
    if path is None:
        raise DataError(expected("data_dir", f"a file {stem}-ubyte or {stem}-ubyte.gz in {folder}", "none"))
    raw = _unzipped(path)
    array = read_idx(path, raw, dims=3 if stem.endswith("idx3") else 1)
    _check_idx(path, raw, name, stem)
    return path, array


def _idx_split(folder: Path, name: str, prefix: str, classes: int) -> Arrays:
    image_file, images = _idx_file(folder, name, f"{prefix}-images-idx3")
    label_file, labels = _idx_file(folder, name, f"{prefix}-labels-idx1")
    if images.shape[1:] != (28, 28):
        raise DataError(expected(str(image_file), "images of 28 x 28", " x ".join(map(str, images.shape[1:]))))
    _check_labels(str(label_file), images, labels, classes)
    return images[:, None], labels.astype(np.int64)


def find_idx(path: Path) -> Path | None:
    """The folder, if one of the four files is in it."""
    return path if any(_idx_path(path, stem) for stem in IDX_MD5) else None


def idx_dataset(folder: Path, name: str) -> tuple[Arrays, Arrays, int]:
    """(training, test, classes) of the four files, gzipped or not, of ``name``: "mnist" or "fashion-mnist"."""
    if not folder.is_dir():
        raise DataError(expected("data_dir", "a folder", folder))
    return _idx_split(folder, name, "train", 10), _idx_split(folder, name, "t10k", 10), 10


class _Arrays(pickle.Unpickler):
    """Loads numpy arrays, bytes and plain containers; a pickle can name nothing else to call."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return np.zeros(0).__reduce__()[0]
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):  # bytes, as Python 3 writes them for Python 2
            return lambda text, encoding: text.encode("latin1")
        raise pickle.UnpicklingError(f"{module}.{name} is not data")


def _cifar_pickle(name: str, raw: bytes) -> Arrays:
    wanted = "a dictionary with data (n, 3072) of bytes and n labels"
    try:
        batch = _Arrays(io.BytesIO(raw), encoding="bytes").load()
        batch = {k.decode() if isinstance(k, bytes) else k: v for k, v in batch.items()}
        images, labels = batch["data"], np.asarray(batch["labels"], dtype=np.int64)
        if images.dtype != np.uint8 or images.ndim != 2 or images.shape[1] != 3072:
            raise DataError(expected(name, wanted, f"{images.dtype} of shape {images.shape}"))
    except DataError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise DataError(expected(name, wanted, f"{type(error).__name__}: {error}")) from error
    return images.reshape(-1, 3, 32, 32), labels


def _cifar_binary(name: str, raw: bytes) -> Arrays:
    if len(raw) % 3073 or not raw:
        raise DataError(expected(name, "records of 3073 bytes", f"{len(raw)} bytes"))
    records = np.frombuffer(raw, np.uint8).reshape(-1, 3073)
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0].astype(np.int64)


def _check_md5(name: str, raw: bytes | Path, size: int, archive: bool) -> None:
    stem = Path(name).name
    if stem not in CIFAR10_MD5 or size < CHECKED_BYTES[archive]:
        return
    digest = hashlib.md5(usedforsecurity=False)
    if isinstance(raw, bytes):
        digest.update(raw)
    else:
        with open(raw, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    if digest.hexdigest() != CIFAR10_MD5[stem]:
        raise DataError(expected(name, f"the published file (md5 {CIFAR10_MD5[stem]})", f"md5 {digest.hexdigest()}"))


def _cifar_archive(path: Path) -> dict[str, bytes]:
    """The batches in an archive by name, read without unpacking to disk."""
    try:
        _check_md5(str(path), path, path.stat().st_size, archive=True)
        with tarfile.open(path, "r:gz") as archive:
            return {Path(m.name).name: archive.extractfile(m).read() for m in archive if m.isfile()}  # type: ignore[union-attr]
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise DataError(expected(str(path), "a readable .tar.gz archive", error)) from error


def find_cifar10(path: Path) -> Path | None:
    """The folder of the batches, or else an archive, at a path or in the folder that it is."""
    if os.path.isfile(path):
        return path
    for folder in (path, path / "cifar-10-batches-py", path / "cifar-10-batches-bin"):
        if any(os.path.isfile(folder / f"{name}{end}") for name in CIFAR10_FILES for end in ("", ".bin")):
            return folder
    archives = (path / "cifar-10-python.tar.gz", path / "cifar-10-binary.tar.gz")
    return next((archive for archive in archives if os.path.isfile(archive)), None)


def cifar10(path: Path) -> tuple[Arrays, Arrays, int]:
    """(training, test, classes) of CIFAR-10, from an archive as published or the folder that it unpacks to.

    All six batches must be there, of whole records, equally many in each, with labels from 0 to 9. Archives and Python
    batches of about the published size must have the published MD5; so only there are 10000 images a batch certain:
    smaller ones pass as an excerpt, and for binary batches outside of their archive no MD5 is published.
    """
    if not path.exists():
        raise DataError(expected("data_dir", "a folder or a .tar.gz archive", path))
    place = find_cifar10(path)
    if place is None:
        wanted = f"cifar-10-python.tar.gz, cifar-10-binary.tar.gz or their batches in {path}"
        raise DataError(expected("data_dir", wanted, "none"))
    content = _cifar_archive(place) if place.is_file() else None
    names = set(content) if content is not None else {p.name for p in place.iterdir()}
    binary = any(f"{n}.bin" in names for n in CIFAR10_FILES)
    splits = []
    for stem in CIFAR10_FILES:
        file = f"{stem}.bin" if binary else stem
        name = str(place / file)
        if file not in names:
            raise DataError(
                expected(str(place), f"the six batches of CIFAR-10, among them {file}", "none of that name")
            )
        raw = content[file] if content is not None else _read(place / file, "a readable batch")
        _check_md5(name, raw, len(raw), archive=False)
        images, labels = (_cifar_binary if binary else _cifar_pickle)(name, raw)
        _check_labels(name, images, labels, 10)
        if splits and len(labels) != len(splits[0][1]):
            # Published with 10000 each: a file cut between two records shows here.
            raise DataError(expected(name, f"{len(splits[0][1])} images, as the first batch has", len(labels)))
        splits.append((images, labels))
    *parts, test = splits
    return (np.concatenate([i for i, _ in parts]), np.concatenate([y for _, y in parts])), test, 10


def _lines(path: Path) -> list[str]:
    return [line for line in _read(path, "a text file of Tiny ImageNet").decode(errors="replace").splitlines() if line]


def _inside(folder: Path, *endings: str) -> list[Path]:
    """What is in a folder, without hidden files, in order; only files with these endings where some are given."""
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


def _tiny_files(folder: Path) -> tuple[list[tuple[Path, int]], list[tuple[Path, int]], int]:
    """(file, label) of the training and the validation images, and the number of classes."""
    wnids = [line.strip() for line in _lines(folder / "wnids.txt")]
    if not wnids:
        raise DataError(expected(str(folder / "wnids.txt"), "class names, one a line", "none"))
    classes = [p for p in _inside(folder / "train") if p.is_dir()]
    _check_names(folder / "wnids.txt", wnids, folder / "train", classes)
    label = {wnid: i for i, wnid in enumerate(wnids)}
    train: list[tuple[Path, int]] = []
    first = 0
    for wnid, i in label.items():
        images = folder / "train" / wnid / "images"
        found = _inside(images, *JPEG)
        first = first or len(found)
        if not found or len(found) != first:
            # Published with 500 each.
            raise DataError(expected(str(images), f"{first or 'some'} images, as the first class has", len(found)))
        train += [(p, i) for p in found]
    annotations, images = folder / "val" / "val_annotations.txt", folder / "val" / "images"
    rows = [[*line.split("\t"), ""][:2] for line in _lines(annotations)]
    if not rows:
        raise DataError(expected(str(annotations), "a line for every image", "none"))
    for row in rows:
        if row[1] not in label:
            wanted = "lines of a file name and a class of wnids.txt"
            raise DataError(expected(str(annotations), wanted, repr("\t".join(row)[:60])))
    _check_names(annotations, [name for name, _ in rows], images, _inside(images, *JPEG))
    return train, [(images / name, label[wnid]) for name, wnid in rows], len(wnids)


def _decode(files: list[Path]) -> np.ndarray:
    """JPEG files of one size as bytes (n, 3, H, W); grey ones become RGB."""
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
    digest = hashlib.sha256()
    for path in files:
        try:
            facts = path.stat()
        except OSError as error:
            raise DataError(expected(str(path), "a readable JPEG image", error)) from error
        digest.update(f"{path.relative_to(folder)} {facts.st_size} {facts.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def find_tiny_imagenet(path: Path) -> Path | None:
    """The unpacked folder at a path or in the folder that it is."""
    return next((f for f in (path, path / "tiny-imagenet-200") if os.path.isfile(f / "wnids.txt")), None)


def _save_cache(path: Path, **arrays: Any) -> None:
    """Writes an .npz file where that is possible; several processes may do so at once."""
    try:
        with tempfile.TemporaryDirectory(prefix=".sparsebreg-", dir=path.parent) as own:
            with atomic(Path(own) / path.name) as file:
                np.savez(file, **arrays)
            (Path(own) / path.name).replace(path)
    except (OSError, RunError):
        pass  # only speed is lost


def tiny_imagenet(path: Path) -> tuple[Arrays, Arrays, int]:
    """(training, validation, classes) of Tiny ImageNet from its folder; the published test images have no labels.

    wnids.txt must name the folders in train, and val_annotations.txt the images in val/images, each once; classes must
    have equally many training images, and images one size. No checksum is published.

    Decoded images are kept beside the data, in ``sparsebreg-cache.npz``, where that folder can be written.
    """
    folder = find_tiny_imagenet(path)
    if folder is None:
        raise DataError(expected("data_dir", f"the unpacked tiny-imagenet-200 with wnids.txt in {path}", "none"))
    train, val, classes = _tiny_files(folder)
    key = _fingerprint(folder, [p for p, _ in (*train, *val)])
    cache = folder / "sparsebreg-cache.npz"
    labels = [np.array([y for _, y in split], np.int64) for split in (train, val)]
    try:
        with np.load(cache, allow_pickle=False) as saved:
            if str(saved["key"]) == key:
                return (saved["train"], labels[0]), (saved["val"], labels[1]), classes
    except (OSError, KeyError, ValueError, EOFError, zlib.error, zipfile.BadZipFile):
        pass  # none, or not a whole one: decoded again
    images = [_decode([p for p, _ in split]) for split in (train, val)]
    _save_cache(cache, key=key, train=images[0], val=images[1])
    return (images[0], labels[0]), (images[1], labels[1]), classes
