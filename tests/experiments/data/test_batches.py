"""Batches of a data set, and augmentation."""

import io

import pytest
import torch
from datafiles import dumped, ten

from sparsebreg.experiments.data.batches import Batches, augment


def test_augment_is_a_crop_of_the_padded_image_or_its_mirror():
    images = torch.randint(1, 256, (40, 3, 7, 5), dtype=torch.uint8)
    before = images.clone()
    out = augment(images, torch.Generator().manual_seed(1), pad=2)
    assert torch.equal(images, before)
    assert out.shape == images.shape
    assert out.dtype is torch.uint8
    seen = set()
    for image, result in zip(images, out, strict=True):
        padded = torch.zeros(3, 11, 9, dtype=torch.uint8)
        padded[:, 2:9, 2:7] = image
        found = [
            (dy, dx, mirror)
            for dy in range(5)
            for dx in range(5)
            for mirror in (False, True)
            if torch.equal(padded[:, dy : dy + 7, dx : dx + 5].flip(-1) if mirror else
                           padded[:, dy : dy + 7, dx : dx + 5], result)
        ]  # fmt: skip
        assert len(found) == 1
        seen.add(found[0])
    assert {s[0] for s in seen} == {s[1] for s in seen} == set(range(5))
    assert {s[2] for s in seen} == {False, True}
    again = augment(images, torch.Generator().manual_seed(1), pad=2)
    assert torch.equal(again, out)
    assert not torch.equal(augment(images, torch.Generator().manual_seed(2), pad=2), out)


def test_batches_cover_an_epoch_in_seeded_order():
    def epochs(seed, n=2):
        batches = Batches(ten(), 4, seed)
        return [[y.tolist() for _, y in batches.epoch()] for _ in range(n)]

    first, second = epochs(0)
    assert [len(b) for b in first] == [4, 4, 2]
    assert sorted(i for batch in first for i in batch) == list(range(10))
    assert first != second
    assert epochs(0) == epochs(0) != epochs(1)
    for x, y in Batches(ten(), 4, 0).epoch():
        assert x[:, 0, 3, 3].tolist() == y.tolist()
    assert len(Batches(ten(), 4, 0)) == 3


@pytest.mark.parametrize("done", range(8))
def test_batches_go_on_from_any_place(done):
    def endless(batches):
        while True:
            yield from batches.epoch()

    kept = Batches(ten(), 4, 3, augmented=True)
    stream = endless(kept)
    for _ in range(done):
        next(stream)
    state = torch.load(io.BytesIO(dumped(kept.state_dict())), weights_only=True)
    resumed = Batches(ten(), 4, 99, augmented=True)
    resumed.load_state_dict(state)
    for _, (x, y), (u, v) in zip(range(9), stream, endless(resumed), strict=False):
        assert torch.equal(y, v)
        assert torch.equal(x, u)
