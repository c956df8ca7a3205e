"""Batches of a data set, in a random order that can be saved and continued."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from sparsebreg.core.errors import check_int
from sparsebreg.experiments.data.datasets import Dataset


def augment(images: torch.Tensor, generator: torch.Generator, pad: int = 4) -> torch.Tensor:
    """The usual augmentation of small images: a random crop of the zero-padded image, mirrored with probability 1/2.

    Args:
        images: (n, C, H, W), any dtype; unchanged.
        pad: rows and columns of zeros on every side.

    Returns:
        A new tensor of the same shape.
    """
    n, _, high, wide = images.shape
    padded = torch.nn.functional.pad(images, (pad, pad, pad, pad)).numpy()
    dy, dx = torch.randint(2 * pad + 1, (2, n), generator=generator).numpy()
    mirrored = torch.randint(2, (n,), generator=generator).bool().numpy()
    windows = np.lib.stride_tricks.sliding_window_view(padded, (high, wide), axis=(2, 3))
    out = windows[np.arange(n), :, dy, dx]
    out[mirrored] = out[mirrored, :, :, ::-1]
    return torch.from_numpy(out)


class Batches:
    """Batches of the training split in seeded random order, epoch after epoch; the last one may be smaller.

    The state can be saved between any two batches; after ``load_state_dict`` the same batches follow.
    """

    def __init__(self, data: Dataset, batch_size: int, seed: int, augmented: bool = False) -> None:
        self.data, self.batch_size, self.augmented = data, check_int("batch_size", batch_size, low=1), augmented
        self.order = torch.Generator().manual_seed(seed)
        self.noise = torch.Generator().manual_seed(seed + 2**32)
        self.done = 0
        self._start = self.order.get_state()

    def __len__(self) -> int:
        return -(-len(self.data.train) // self.batch_size)

    def epoch(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The batches (x, y) of an epoch that are still to come: standardised images and labels."""
        self._start = self.order.get_state()
        order = torch.randperm(len(self.data.train), generator=self.order)
        for index in order.split(self.batch_size)[self.done :]:
            self.done += 1
            batch = self.data.train.take(index)
            images = augment(batch.images, self.noise) if self.augmented else batch.images
            yield self.data.standardise(images), batch.labels
        self.done = 0

    def state_dict(self) -> dict[str, Any]:
        """Plain data; loads with ``torch.load(weights_only=True)``."""
        start = self._start if self.done else self.order.get_state()
        return {"order": start, "noise": self.noise.get_state(), "done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order.set_state(state["order"])
        self.noise.set_state(state["noise"])
        self.done = state["done"]
        self._start = state["order"]
