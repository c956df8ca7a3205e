"""CIFAR-10 as published, and everything that can be wrong with it."""

import pickle

import numpy as np
import pytest
from datafiles import CIFAR, old_pickle, write_cifar

from sparsebreg.core.errors import DataError
from sparsebreg.experiments.data import cifar10
from sparsebreg.experiments.data import datasets as data


@pytest.mark.parametrize("how", ["folder", "folder_above", "archive", "archive_in_folder"])
@pytest.mark.parametrize("binary", [False, True], ids=["python", "binary"])
def test_cifar10(tmp_path, how, binary):
    d = data.load("cifar10", write_cifar(tmp_path, how, binary))
    assert (d.shape, d.classes, len(d.train), len(d.test)) == ((3, 32, 32), 10, 30, 6)
    images = np.concatenate([CIFAR[f"data_batch_{i}"][0] for i in range(1, 6)]).reshape(-1, 3, 32, 32)
    assert np.array_equal(d.train.images.numpy(), images)
    assert d.train.labels.tolist() == [y for i in range(1, 6) for y in CIFAR[f"data_batch_{i}"][1]]
    assert d.test.labels.tolist() == CIFAR["test_batch"][1].tolist()
    channels = images.astype(np.float64).transpose(1, 0, 2, 3).reshape(3, -1)
    assert np.allclose(d.mean.flatten(), channels.mean(1), rtol=1e-5)
    assert np.allclose(d.std.flatten(), channels.std(1), rtol=1e-5)


class Evil:
    def __reduce__(self):
        return print, ("code from a pickle ran",)


@pytest.mark.parametrize(
    ("binary", "changes", "message"),
    [
        (False, {"data_batch_3": None}, "six batches of CIFAR-10, among them data_batch_3, got none"),
        (True, {"test_batch": None}, "six batches of CIFAR-10, among them test_batch.bin, got none"),
        (False, {"data_batch_2": old_pickle(*CIFAR["test_batch"])[:-900]}, "data_batch_2: expected a dictionary with"),
        (False, {"data_batch_2": b""}, "data_batch_2: expected a dictionary with data .* got EOFError"),
        (False, {"data_batch_2": pickle.dumps([1, 2])}, "data_batch_2: expected a dictionary with"),
        (False, {"data_batch_2": pickle.dumps(Evil())}, "builtins.print is not data"),
        (False, {"data_batch_2": old_pickle(np.zeros((6, 3000), np.uint8), np.arange(6))}, "got uint8 of shape"),
        (False, {"data_batch_2": old_pickle(np.zeros((6, 3072), np.uint8), np.arange(5))}, "6 labels, one per image"),
        (False, {"data_batch_2": old_pickle(np.zeros((6, 3072), np.uint8), np.arange(6) + 5)}, "from 0 to 9, got 10"),
        (False, {"data_batch_2": old_pickle(np.zeros((5, 3072), np.uint8), np.arange(5))}, "expected 6 images, as the"),
        (True, {"data_batch_2": bytes(3073 * 6 - 1)}, "expected records of 3073 bytes, got 18437 bytes"),
        (True, {"data_batch_2": bytes(3073 * 5)}, "expected 6 images, as the first batch has, got 5"),
        (True, {"data_batch_2": b"\x0a" * 3073 * 6}, "labels from 0 to 9, got 10"),
    ],
)
def test_damaged_cifar10(tmp_path, binary, changes, message, capsys):
    with pytest.raises(DataError, match=message):
        data.load("cifar10", write_cifar(tmp_path, "folder", binary, **changes))
    assert "ran" not in capsys.readouterr().out


def test_damaged_cifar10_archives(tmp_path, monkeypatch):
    path = write_cifar(tmp_path, "archive", False)
    whole = path.read_bytes()
    for raw in (whole[: len(whole) // 2], b"no archive", b"", whole[:100] + bytes(20) + whole[120:]):
        path.write_bytes(raw)
        with pytest.raises(DataError, match=r"tar.gz: expected a readable .tar.gz archive"):
            data.load("cifar10", path)
    path.write_bytes(whole)
    data.load("cifar10", path)
    monkeypatch.setattr(cifar10, "CHECKED_BYTES", {True: 0, False: 0})  # as large as the published one
    with pytest.raises(DataError, match="published file .md5 c58f30108f718f92721af3b95e74349a., got md5"):
        data.load("cifar10", path)
    with pytest.raises(DataError, match="data_batch_1: expected the published file .md5 c99cafc1"):
        data.load("cifar10", write_cifar(tmp_path / "b", "folder", False))
    with pytest.raises(DataError, match="data_dir: expected a folder or a .tar.gz archive, got"):
        data.load("cifar10", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"data_dir: expected cifar-10-python.tar.gz, .* got none"):
        data.load("cifar10", tmp_path / "empty")
