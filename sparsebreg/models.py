"""Models of the experiments. Inputs are images (N, C, H, W)."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F

from sparsebreg.core.errors import check_int, expected

__all__ = ["convnet", "mlp", "resnet18", "vgg16", "wide_resnet28_10"]


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


def _size(in_shape: Sequence[int], halvings: int) -> tuple[int, int, int]:
    c, high, wide = (check_int("in_shape", s, low=1) for s in in_shape)
    if min(high, wide) < 2**halvings:
        raise ValueError(expected("in_shape", f"images of at least {2**halvings} x {2**halvings}", f"{high} x {wide}"))
    return c, high, wide


def _conv3x3(i: int, o: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(i, o, 3, stride, 1, bias=False)


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, and a shortcut; ReLU behind the sum."""

    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv3x3(i, o, stride), nn.BatchNorm2d(o)
        self.conv2, self.bn2 = _conv3x3(o, o), nn.BatchNorm2d(o)
        self.shortcut = nn.Sequential()
        if stride != 1 or i != o:
            self.shortcut = nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def resnet18(in_shape: Sequence[int] = (3, 32, 32), classes: int = 10, channels: int = 64) -> nn.Sequential:
    """ResNet-18 for small images: a 3x3 stem without pooling; (N, C, H, W) to (N, classes).

    He et al., CVPR 2016, with the stem that is usual on CIFAR. ``channels`` in the first stage, doubled in each of the
    three others. Images of 8 x 8 or more.
    """
    c, _, _ = _size(in_shape, 3)
    layers: list[nn.Module] = [_conv3x3(c, channels), nn.BatchNorm2d(channels), nn.ReLU()]
    wide = channels
    for stage in range(4):
        out = channels << stage
        layers += [_BasicBlock(wide, out, 1 if stage == 0 else 2), _BasicBlock(out, out, 1)]
        wide = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(wide, classes))


def vgg16(in_shape: Sequence[int] = (3, 32, 32), classes: int = 10, channels: int = 64) -> nn.Sequential:
    """VGG-16 with batch norm for small images: 13 convolutions, one linear layer; (N, C, H, W) to (N, classes).

    Simonyan and Zisserman, ICLR 2015, in the form that is usual on CIFAR. Channels grow from ``channels`` to eight
    times that. Images of 16 x 16 or more; the last pooling is left out below 32 x 32.
    """
    c, high, wide = _size(in_shape, 4)
    layers: list[nn.Module] = []
    for stage, depth in enumerate((2, 2, 3, 3, 3)):
        out = channels << min(stage, 3)
        for _ in range(depth):
            layers += [_conv3x3(c, out), nn.BatchNorm2d(out), nn.ReLU()]
            c = out
        if min(high, wide) >= 2 << stage:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, classes))


class _WideBlock(nn.Module):
    """Batch norm and ReLU before each of two 3x3 convolutions, and a shortcut."""

    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(i), _conv3x3(i, o, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(o), _conv3x3(o, o)
        self.shortcut = nn.Conv2d(i, o, 1, stride, bias=False) if stride != 1 or i != o else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(y)
        return self.conv2(F.relu(self.bn2(self.conv1(y)))) + shortcut


def wide_resnet28_10(in_shape: Sequence[int] = (3, 32, 32), classes: int = 10, channels: int = 16) -> nn.Sequential:
    """Wide ResNet of depth 28 and widening factor 10; (N, C, H, W) to (N, classes).

    Zagoruyko and Komodakis, BMVC 2016. ``channels`` in the stem, ten times that in the first of three stages, doubled
    in each of the others. Images of 4 x 4 or more.
    """
    c, _, _ = _size(in_shape, 2)
    layers: list[nn.Module] = [_conv3x3(c, channels)]
    wide = channels
    for stage in range(3):
        out = (10 * channels) << stage
        for block in range(4):
            layers.append(_WideBlock(wide, out, 2 if stage and not block else 1))
            wide = out
    layers += [nn.BatchNorm2d(wide), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(wide, classes)]
    return nn.Sequential(*layers)


#: Models that the command line knows.
MODELS = {"mlp": mlp, "convnet": convnet, "resnet18": resnet18, "vgg16": vgg16, "wide_resnet28_10": wide_resnet28_10}
