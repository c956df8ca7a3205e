"""Data sets: the IDX files as published, and everything that can be wrong with them."""

import gzip
import struct

import numpy as np
import pytest
import torch

from sparsebreg.errors import DataError
from sparsebreg.experiments import data


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


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_idx(tmp_path, zipped, name):
    d = data.load(name, write(tmp_path, zipped))
    assert d.shape == (1, 28, 28)
    assert (len(d.train), len(d.test), d.classes) == (50, 20, 10)
    assert d.train.images.dtype is torch.float32
    assert abs(d.train.images.mean()) < 1e-5
    assert abs(d.train.images.std() - 1) < 1e-3
    raw = torch.from_numpy(FILES["t10k-images-idx3-ubyte"][3].astype(np.float32))
    mean, std = FILES["train-images-idx3-ubyte"].mean(), FILES["train-images-idx3-ubyte"].std()
    assert torch.allclose(d.test.images[3, 0], (raw - mean) / std, atol=1e-3)
    assert d.test.labels.tolist() == FILES["t10k-labels-idx1-ubyte"].tolist()


def test_digits():
    d = data.load("digits")
    assert d.shape == (1, 8, 8)
    assert len(d.train) + len(d.test) == 1797
    assert d.train.labels.unique().tolist() == list(range(10))


GOOD = idx(FILES["train-images-idx3-ubyte"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"t10k_labels_idx1": None}, "data_dir: expected a file t10k-labels-idx1-ubyte or"),
        ({"train_images_idx3": GOOD[:-5]}, "expected 39200 bytes of data for shape .*, got 39195"),
        ({"train_images_idx3": GOOD + b"x"}, "expected 39200 bytes of data for shape .*, got 39201"),
        ({"train_images_idx3": GOOD[:9]}, "expected a header of 16 bytes, got 9 bytes"),
        ({"train_images_idx3": b""}, "expected an IDX file"),
        ({"train_images_idx3": b"PK\x03\x04" + GOOD}, "expected an IDX file"),
        ({"train_images_idx3": idx(FILES["train-labels-idx1-ubyte"])}, "in 3 dimensions, got type 0x08 in 1"),
        ({"train_images_idx3": b"\0\0\x0d" + GOOD[3:]}, "got type 0x0d in 3"),
        ({"train_images_idx3": gzip.compress(GOOD)[:-100]}, "expected a readable IDX file"),
        ({"train_images_idx3": idx(np.zeros((50, 32, 32)))}, "expected images of 28 x 28, got 32 x 32"),
        ({"train_labels_idx1": idx(np.arange(49) % 10)}, "expected 50 labels, one per image, got 49"),
        ({"train_labels_idx1": idx(np.arange(50) % 11)}, "expected labels from 0 to 9, got 10"),
    ],
)
def test_damaged_files(tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        data.load("mnist", write(tmp_path, **changes))


def test_missing_folder_and_unknown_name(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SEARCH", {"mnist": (), "fashion-mnist": ()})
    with pytest.raises(DataError, match="data_dir: expected a folder, got"):
        data.load("mnist", tmp_path / "nowhere")
    with pytest.raises(DataError, match="data_dir: expected a folder with the IDX files of mnist, got none given"):
        data.load("mnist")
    with pytest.raises(ValueError, match="data: expected one of digits, .*mnist.*, got 'imagenet21k'"):
        data.load("imagenet21k")


def test_batches_cover_an_epoch_in_seeded_order():
    split = data.Split(torch.arange(10.0).view(10, 1, 1, 1), torch.arange(10))

    def epoch(seed):
        return [y.tolist() for _, y in data.batches(split, 4, torch.Generator().manual_seed(seed))]

    assert [len(b) for b in epoch(0)] == [4, 4, 2]
    assert sorted(i for batch in epoch(0) for i in batch) == list(range(10))
    assert epoch(0) == epoch(0) != epoch(1)
    for x, y in data.batches(split, 4, torch.Generator()):
        assert x.flatten().tolist() == y.tolist()
