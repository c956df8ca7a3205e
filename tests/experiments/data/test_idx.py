"""IDX files, and everything that can be wrong with them."""

import gzip
import hashlib

import numpy as np
import pytest
import torch
from datafiles import FILES, idx, write

from sparsebreg.core.errors import DataError
from sparsebreg.experiments.data import datasets as data
from sparsebreg.experiments.data import idx as idx_files


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_idx(tmp_path, zipped, name):
    d = data.load(name, write(tmp_path, zipped))
    assert d.shape == (1, 28, 28)
    assert (len(d.train), len(d.test), d.classes) == (50, 20, 10)
    assert d.train.images.dtype is torch.uint8
    standard = d.standardise(d.train.images)
    assert abs(standard.mean()) < 1e-5
    assert abs(standard.std() - 1) < 1e-3
    raw = torch.from_numpy(FILES["t10k-images-idx3-ubyte"][3].astype(np.float32))
    mean, std = FILES["train-images-idx3-ubyte"].mean(), FILES["train-images-idx3-ubyte"].std()
    assert torch.allclose(d.standardise(d.test.images)[3, 0], (raw - mean) / std, atol=1e-3)
    assert d.test.labels.tolist() == FILES["t10k-labels-idx1-ubyte"].tolist()


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


@pytest.fixture
def published(monkeypatch):
    """The files of this test are the published ones of MNIST."""
    known = {name.removesuffix("-ubyte"): idx(array) for name, array in FILES.items()}
    known = {
        stem: (len(raw), {"mnist": hashlib.md5(raw).hexdigest(), "fashion-mnist": "f" * 32})
        for stem, raw in known.items()
    }
    monkeypatch.setattr(idx_files, "IDX_MD5", known)
    return known


@pytest.mark.parametrize("zipped", [False, True])
def test_checksums_of_idx_files(tmp_path, published, zipped, monkeypatch):
    plain, hashed = hashlib.md5, []
    monkeypatch.setattr(hashlib, "md5", lambda raw, **k: hashed.append(len(raw)) or plain(raw, **k))
    data.load("mnist", write(tmp_path, zipped))
    assert hashed == [published[stem][0] for stem in published]  # each once
    wanted = "train-images-idx3-ubyte.*: expected the published file of fashion-mnist .md5 f{32}., got that of mnist"
    with pytest.raises(DataError, match=wanted):
        data.load("fashion-mnist", tmp_path)


@pytest.mark.parametrize("stem", [name.removesuffix("-ubyte") for name in FILES])
def test_changed_idx_files(tmp_path, published, stem):
    raw = idx(FILES[f"{stem}-ubyte"])
    changed = raw[:-1] + bytes([raw[-1] ^ 1])  # a label stays one
    wanted = f"{stem}-ubyte: expected the published file of mnist .md5 {published[stem][1]['mnist']}., got md5 "
    with pytest.raises(DataError, match=wanted):
        data.load("mnist", write(tmp_path, **{stem.replace("-", "_"): changed}))


def test_excerpts_of_idx_files(tmp_path, published):
    changes = {
        f"{split}_{part}": idx(FILES[f"{split}-{part.replace('_', '-')}-ubyte"][:10])
        for split in ("train", "t10k")
        for part in ("images_idx3", "labels_idx1")
    }
    assert len(data.load("fashion-mnist", write(tmp_path, **changes)).train) == 10
