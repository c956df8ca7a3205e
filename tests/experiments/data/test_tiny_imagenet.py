"""Tiny ImageNet as published, and its cache."""

import errno
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from datafiles import WNIDS
from PIL import Image

from sparsebreg.core.errors import DataError
from sparsebreg.experiments.data import datasets as data
from sparsebreg.experiments.data import tiny_imagenet


@pytest.mark.parametrize("above", [False, True])
def test_tiny_imagenet(tiny, above, monkeypatch):
    d = data.load("tiny-imagenet", tiny.parent if above else tiny)
    assert (d.shape, d.classes, len(d.train), len(d.test)) == ((3, 8, 8), 3, 6, 4)
    assert d.train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert d.test.labels.tolist() == [2, 1, 1, 0]
    assert (d.train.images[2, :, 0, 0].int() - torch.tensor([40, 200, 90])).abs().max() <= 3  # JPEG is lossy
    assert torch.equal(d.train.images[5, 0], d.train.images[5, 2])
    monkeypatch.setattr(tiny_imagenet, "_decode", None)  # from the cache this time
    again = data.load("tiny-imagenet", tiny)
    assert torch.equal(again.train.images, d.train.images)
    assert torch.equal(again.test.images, d.test.images)


def test_cache_of_tiny_imagenet_follows_the_files(tiny):
    cache = tiny / "sparsebreg-cache.npz"
    first = data.load("tiny-imagenet", tiny)
    Image.new("RGB", (8, 8), (250, 250, 250)).save(tiny / "val" / "images" / "val_2.JPEG")
    changed = data.load("tiny-imagenet", tiny)
    assert not torch.equal(first.test.images, changed.test.images)
    for raw in (cache.read_bytes()[:-300], b"PK\x03\x04", b""):
        cache.write_bytes(raw)
        assert torch.equal(data.load("tiny-imagenet", tiny).test.images, changed.test.images)
    assert cache.stat().st_size > 300


def test_cache_of_tiny_imagenet_is_written_whole_or_not_at_all(tiny, monkeypatch):
    path, before = tiny / "sparsebreg-cache.npz", sorted(tiny.iterdir())
    with ThreadPoolExecutor(4) as pool:  # as processes do that begin at once
        list(pool.map(lambda i: tiny_imagenet._save_cache(path, x=np.full(100_000, i)), range(12)))
    with np.load(path) as saved:
        assert len(set(saved["x"].tolist())) == 1
    path.unlink()
    assert sorted(tiny.iterdir()) == before

    def full(file, **arrays):
        file.write(b"a part")
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(np, "savez", full)
    assert len(data.load("tiny-imagenet", tiny).train) == 6
    assert sorted(tiny.iterdir()) == before


def test_damaged_tiny_imagenet(tiny):
    def fails(message):
        with pytest.raises(DataError, match=message):
            data.load("tiny-imagenet", tiny)

    val, image = tiny / "val" / "val_annotations.txt", tiny / "train" / "n01" / "images" / "n01_1.JPEG"
    jpeg, lines = image.read_bytes(), val.read_text()
    image.write_bytes(jpeg[: len(jpeg) // 2])
    fails("n01_1.JPEG: expected a readable JPEG image")
    image.write_bytes(b"")
    fails("n01_1.JPEG: expected a readable JPEG image")
    Image.new("RGB", (9, 8)).save(image)
    fails(r"n01_1.JPEG: expected an image of shape \(3, 8, 8\), got \(3, 8, 9\)")
    image.unlink()
    fails("n01/images: expected 2 images, as the first class has, got 1")
    image.write_bytes(jpeg)
    image.parent.rename(image.parent.with_name("pictures"))
    fails("n01/images: expected a folder of Tiny ImageNet, got .*No such file")
    image.parent.with_name("pictures").rename(image.parent)
    val.write_text(lines + "val_3.JPEG\tn77\n")
    fails("expected lines of a file name and a class of wnids.txt, got 'val_3.JPEG.*n77'")
    val.write_text(lines + "\n")  # an empty line is none
    assert len(data.load("tiny-imagenet", tiny).test) == 4
    val.write_text("")
    fails("val_annotations.txt: expected a line for every image, got none")
    val.unlink()
    fails("val_annotations.txt: expected a text file of Tiny ImageNet")
    val.write_text(lines)
    (tiny / "wnids.txt").write_text("")
    fails("wnids.txt: expected class names, one a line, got none")
    (tiny / "wnids.txt").unlink()
    fails("data_dir: expected the unpacked tiny-imagenet-200 with wnids.txt")


def test_lists_of_tiny_imagenet_name_what_is_there(tiny):
    def fails(message):
        with pytest.raises(DataError, match=message):
            data.load("tiny-imagenet", tiny)

    val, wnids = tiny / "val" / "val_annotations.txt", tiny / "wnids.txt"
    lines = val.read_text()
    names = "val_annotations.txt: expected the names in .*val/images, each once, got "
    val.write_text(lines + "val_9.JPEG\tn02\t0\n")
    fails(names + "'val_9.JPEG', which is not there")
    val.write_text(lines + "../images/val_1.JPEG\tn01\t0\n")
    fails(names + "'../images/val_1.JPEG', which is not there")
    val.write_text(lines + "val_3.JPEG\tn01\t0\n")
    fails(names + "'val_3.JPEG' more than once")
    val.write_text("".join(line for line in lines.splitlines(True) if "val_2" not in line))
    fails(names + "no line for 'val_2.JPEG'")
    (tiny / "val" / "images" / "val_2.JPEG").unlink()
    (tiny / "val" / "images" / "._val_1.JPEG").write_bytes(b"")  # hidden: no image
    assert len(data.load("tiny-imagenet", tiny).test) == 3
    names = "wnids.txt: expected the names in .*train, each once, got "
    for classes, message in (
        (["n02", "n01"], "no line for 'n03'"),
        (["n02", "n01", "n03", "n04"], "'n04', which is not there"),
        (["n02", "n01", "n03", "n02"], "'n02' more than once"),
    ):
        wnids.write_text("\n".join(classes))
        fails(names + message)
    wnids.write_text("\n".join(WNIDS))
    (tiny / "train" / "n03").rename(tiny / "train" / "n04")
    fails(names + "'n03', which is not there")
