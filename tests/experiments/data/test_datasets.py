"""Data sets by name."""

from pathlib import Path

import pytest
import torch
from datafiles import write, write_cifar

from sparsebreg.core.errors import DataError
from sparsebreg.experiments.data import datasets as data


def test_digits():
    d = data.load("digits")
    assert d.shape == (1, 8, 8)
    assert len(d.train) + len(d.test) == 1797
    assert d.train.labels.unique().tolist() == list(range(10))


FASHION = Path("/usr/share/datasets/fashion-mnist")


@pytest.mark.skipif(not FASHION.is_dir(), reason="needs Debian's dataset-fashion-mnist")
def test_published_fashion_mnist():
    d = data.load("fashion-mnist", FASHION)
    assert (len(d.train), len(d.test)) == (60000, 10000)
    with pytest.raises(DataError, match="expected the published file of mnist .*, got that of fashion-mnist"):
        data.load("mnist", FASHION)


def test_missing_folder_and_unknown_name(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SEARCH", {"mnist": (), "fashion-mnist": ()})
    with pytest.raises(DataError, match="data_dir: expected a folder, got"):
        data.load("mnist", tmp_path / "nowhere")
    with pytest.raises(DataError, match="data_dir: expected a folder with the IDX files of mnist, got none given"):
        data.load("mnist")
    with pytest.raises(ValueError, match="data: expected one of digits, .*mnist.*, got 'imagenet21k'"):
        data.load("imagenet21k")


def test_search_goes_past_folders_without_the_files(tmp_path, tiny, monkeypatch):
    places = {}
    for name in ("nowhere", "empty", "mnist", "part", "cifar"):
        places[name] = tmp_path / name
        if name != "nowhere":
            places[name].mkdir()
    write(places["mnist"])
    write(places["part"], t10k_labels_idx1=None)
    write_cifar(places["cifar"], "archive", True)
    before = (places["nowhere"], places["empty"])
    search = {
        "mnist": (*before, places["mnist"]),
        "fashion-mnist": (*before, places["part"], places["mnist"]),
        "cifar10": (*before, places["cifar"]),
        "tiny-imagenet": (*before, tiny.parent),
    }
    monkeypatch.setattr(data, "SEARCH", search)
    assert {name: len(data.load(name).train) for name in ("mnist", "cifar10", "tiny-imagenet")} == {
        "mnist": 50,
        "cifar10": 30,
        "tiny-imagenet": 6,
    }
    with pytest.raises(DataError, match="expected a file t10k-labels-idx1-ubyte or .* in .*part, got none"):
        data.load("fashion-mnist")
    monkeypatch.setattr(data, "SEARCH", {name: [str(p) for p in before] for name in search})
    for name in search:
        with pytest.raises(DataError, match="data_dir: expected a folder with .* none given.*nowhere or .*empty"):
            data.load(name)


def test_synthetic_is_the_same_every_time():
    a, b = data.load("synthetic"), data.load("synthetic")
    assert (a.shape, a.classes, len(a.train), len(a.test)) == ((3, 32, 32), 10, 5120, 1280)
    assert torch.equal(a.train.images, b.train.images)
    nearest = torch.stack([a.train.images[a.train.labels == c].float().mean(0) for c in range(10)])
    distance = torch.cdist(a.test.images.flatten(1).float(), nearest.flatten(1))
    assert (distance.argmin(1) == a.test.labels).float().mean() > 0.9  # there is something to learn


def test_validation_split():
    whole, split = data.load("digits"), data.load("digits", validation=0.1)
    assert len(split.validation) == round(0.1 * len(whole.train))
    assert len(split.train) == len(whole.train) - len(split.validation)
    assert torch.equal(split.test.images, whole.test.images)
    assert whole.validation is None

    def bag(*splits):
        return sorted(bytes(i.flatten().tolist()) for s in splits for i in s.images)

    assert bag(split.train, split.validation) == bag(whole.train)
    assert torch.equal(split.validation.images, data.load("digits", validation=0.1).validation.images)
    assert torch.allclose(split.mean, split.train.images.float().mean((0, 2, 3)).view(-1, 1, 1), rtol=1e-5)
    for value, message in ((1.0, "below 1, got 1.0"), (-0.1, "at least 0, got -0.1"), (1e-6, "splits 1438 images")):
        with pytest.raises(ValueError, match=f"validation: expected .*{message}"):
            data.load("digits", validation=value)
