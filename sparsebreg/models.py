"""Models of the experiments. Inputs are images (N, C, H, W)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from sparsebreg.errors import check_int, expected

__all__ = ["convnet", "mlp"]


def mlp(
    in_shape: Sequence[int] = (1, 28, 28), hidden: Sequence[int] = (1024, 1024), classes: int = 10
) -> nn.Sequential:
    """Fully connected network with ReLU between its layers; (N, *in_shape) to (N, classes)."""
    size = 1
    for s in in_shape:
        size *= check_int("in_shape", s, low=1)
    sizes = [size, *(check_int("hidden", h, low=1) for h in hidden), check_int("classes", classes, low=1)]
    layers: list[nn.Module] = [nn.Flatten()]
    for i, o in pairwise(sizes):
        layers += [nn.Linear(i, o), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def convnet(in_shape: Sequence[int] = (1, 28, 28), classes: int = 10, channels: int = 64) -> nn.Sequential:
    """Two 5x5 convolutions with max pooling and ReLU, then two linear layers; (N, C, H, W) to (N, classes).

    The architecture of Bungert et al., JMLR 23 (2022), section 4.2. Images of 16 x 16 or more.
    """
    c, high, wide = (check_int("in_shape", s, low=1) for s in in_shape)
    if min(high, wide) < 16:
        raise ValueError(expected("in_shape", "images of at least 16 x 16", f"{high} x {wide}"))
    flat = channels * (((high - 4) // 2 - 4) // 2) * (((wide - 4) // 2 - 4) // 2)
    return nn.Sequential(
        nn.Conv2d(c, channels, 5),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 5),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(flat, 128),
        nn.ReLU(),
        nn.Linear(128, classes),
    )


#: Models that the command line knows.
MODELS = {"mlp": mlp, "convnet": convnet}
