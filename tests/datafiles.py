"""Small files in the formats in which data sets are published."""

import gzip
import io
import pickle
import struct
import tarfile

import numpy as np
import torch
from PIL import Image

from sparsebreg.experiments.data import datasets as data


def idx(array):
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


FILES = {
    "train-images-idx3-ubyte": np.random.default_rng(0).integers(0, 256, (50, 28, 28)),
    "train-labels-idx1-ubyte": np.arange(50) % 10,
    "t10k-images-idx3-ubyte": np.random.default_rng(1).integers(0, 256, (20, 28, 28)),
    "t10k-labels-idx1-ubyte": np.arange(20) % 10,
}


def write(folder, zipped=False, **changes):
    for name, array in FILES.items():
        raw = changes.get(name.split("-ubyte")[0].replace("-", "_"), idx(array))
        if raw is None:
            continue
        (folder / (name + ".gz" * zipped)).write_bytes(gzip.compress(raw) if zipped else raw)
    return folder


def cifar_batches(n=6):
    rng = np.random.default_rng(2)
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    return {name: (rng.integers(0, 256, (n, 3072), dtype=np.uint8), rng.integers(0, 10, n)) for name in names}


CIFAR = cifar_batches()


def old_pickle(images, labels):
    """A batch as Python 2 with its numpy wrote it: protocol 2, old module names, byte strings."""
    batch = {
        b"batch_label": b"training batch 1 of 5",
        b"labels": labels.tolist(),
        b"data": images,
        b"filenames": [b"x.png"] * len(labels),
    }
    return pickle.dumps(batch, protocol=2).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def cifar_files(binary):
    """The files in the folder of CIFAR-10, among them those that no one reads."""
    names = [f"class {i}" for i in range(10)]
    if binary:
        yield "batches.meta.txt", "\n".join([*names, ""]).encode()
    else:
        yield "batches.meta", pickle.dumps({b"num_cases_per_batch": 6, b"label_names": names}, protocol=2)
    for name, (images, labels) in CIFAR.items():
        if binary:
            yield f"{name}.bin", np.hstack([labels[:, None].astype(np.uint8), images]).tobytes()
        else:
            yield name, old_pickle(images, labels)
    yield "readme.html", b"<html></html>"


def write_cifar(root, how, binary, **changes):
    """Writes CIFAR-10 as an archive or a folder; returns what --data-dir is told."""
    inner = "cifar-10-batches-bin" if binary else "cifar-10-batches-py"
    files = {n: changes.get(n.removesuffix(".bin"), raw) for n, raw in cifar_files(binary)}
    files = {n: raw for n, raw in files.items() if raw is not None}
    if how.startswith("folder"):
        (root / inner).mkdir(parents=True)
        for name, raw in files.items():
            (root / inner / name).write_bytes(raw)
        return root / inner if how == "folder" else root
    path = root / f"cifar-10-{'binary' if binary else 'python'}.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, raw in files.items():
            member = tarfile.TarInfo(f"{inner}/{name}")
            member.size = len(raw)
            archive.addfile(member, io.BytesIO(raw))
    return path if how == "archive" else root


WNIDS = ["n02", "n01", "n03"]


def write_tiny(root, size=8, each=2):
    """Tiny ImageNet as published, of three classes with every second image grey, and four validation images."""
    root = root / "tiny-imagenet-200"
    for split in ("val", "test"):
        (root / split / "images").mkdir(parents=True)
    (root / "wnids.txt").write_text("\n".join(WNIDS) + "\n")
    (root / "words.txt").write_text("".join(f"{wnid}\ta word, another\n" for wnid in ["n00", *WNIDS]))
    Image.new("RGB", (size, size)).save(root / "test" / "images" / "test_0.JPEG")
    for i, wnid in enumerate(WNIDS):
        folder = root / "train" / wnid
        (folder / "images").mkdir(parents=True)
        (folder / f"{wnid}_boxes.txt").write_text("".join(f"{wnid}_{k}.JPEG\t0\t0\t7\t7\n" for k in range(each)))
        for k in range(each):
            image = Image.new("L", (size, size), 40 * i) if k % 2 else Image.new("RGB", (size, size), (40 * i, 200, 90))
            image.save(folder / "images" / f"{wnid}_{k}.JPEG", quality=95)
    rows = []
    for i, wnid in enumerate(["n03", "n01", "n01", "n02"]):
        Image.new("RGB", (size, size), (9 * i, 9, 9)).save(root / "val" / "images" / f"val_{i}.JPEG")
        rows.append(f"val_{i}.JPEG\t{wnid}\t0\t32\t44\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(rows))
    return root


def dumped(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def ten(n=10):
    images = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 1, 8, 8).contiguous()
    split = data.Split(images, torch.arange(n))
    return data.Dataset("ten", split, split, n, torch.zeros(1, 1, 1), torch.ones(1, 1, 1))
