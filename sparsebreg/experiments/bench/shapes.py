"""Shapes of real layers, as data: what the benchmark measures."""

from typing import NamedTuple

from torch import nn


class Linear(NamedTuple):
    """A linear layer with bias; its input is (N, in_features)."""

    in_features: int
    out_features: int

    @property
    def weight(self) -> tuple[int, ...]:
        return self.out_features, self.in_features

    def module(self) -> nn.Module:
        return nn.Linear(*self)

    def sizes(self, batch: int) -> tuple[int, ...]:
        return batch, self.in_features

    def positions(self, batch: int) -> int:
        """How often every weight is multiplied in a forward pass."""
        return batch


class Conv2d(NamedTuple):
    """A square convolution without bias; its input is (N, in_channels, size, size)."""

    in_channels: int
    out_channels: int
    kernel: int
    stride: int
    padding: int
    size: int

    @property
    def weight(self) -> tuple[int, ...]:
        return self.out_channels, self.in_channels, self.kernel, self.kernel

    def module(self) -> nn.Module:
        return nn.Conv2d(*self[:5], bias=False)

    def sizes(self, batch: int) -> tuple[int, ...]:
        return batch, self.in_channels, self.size, self.size

    def positions(self, batch: int) -> int:
        """How often every weight is multiplied in a forward pass."""
        return batch * ((self.size + 2 * self.padding - self.kernel) // self.stride + 1) ** 2


class Norm(NamedTuple):
    """Batch norm and ReLU; the input is (N, channels, size, size)."""

    channels: int
    size: int

    def module(self) -> nn.Module:
        return nn.Sequential(nn.BatchNorm2d(self.channels), nn.ReLU())

    def sizes(self, batch: int) -> tuple[int, ...]:
        return batch, self.channels, self.size, self.size


LINEAR = {
    "mlp_784x512": Linear(784, 512),
    "mlp_784x1024": Linear(784, 1024),
    "mlp_1024x1024": Linear(1024, 1024),
    "mlp_4096x4096": Linear(4096, 4096),
    "transformer_768x3072": Linear(768, 3072),
    "transformer_3072x768": Linear(3072, 768),
}

CONV2D = {
    "convnet_64x64_5x5_12": Conv2d(64, 64, 5, 1, 0, 12),
    "resnet18_3x64_3x3_32": Conv2d(3, 64, 3, 1, 1, 32),
    "resnet18_64x64_3x3_32": Conv2d(64, 64, 3, 1, 1, 32),
    "resnet18_128x128_3x3_16": Conv2d(128, 128, 3, 1, 1, 16),
    "resnet18_256x256_3x3_8": Conv2d(256, 256, 3, 1, 1, 8),
    "resnet18_512x512_3x3_4": Conv2d(512, 512, 3, 1, 1, 4),
    "resnet18_64x128_3x3_s2_32": Conv2d(64, 128, 3, 2, 1, 32),
    "resnet18_128x256_3x3_s2_16": Conv2d(128, 256, 3, 2, 1, 16),
    "resnet18_256x512_3x3_s2_8": Conv2d(256, 512, 3, 2, 1, 8),
    "resnet18_64x128_1x1_s2_32": Conv2d(64, 128, 1, 2, 0, 32),
    "resnet18_128x256_1x1_s2_16": Conv2d(128, 256, 1, 2, 0, 16),
    "resnet18_256x512_1x1_s2_8": Conv2d(256, 512, 1, 2, 0, 8),
    "vgg16_64x128_3x3_16": Conv2d(64, 128, 3, 1, 1, 16),
    "vgg16_128x256_3x3_8": Conv2d(128, 256, 3, 1, 1, 8),
    "vgg16_256x512_3x3_4": Conv2d(256, 512, 3, 1, 1, 4),
    "vgg16_512x512_3x3_2": Conv2d(512, 512, 3, 1, 1, 2),
    "wrn28_160x160_3x3_32": Conv2d(160, 160, 3, 1, 1, 32),
    "wrn28_320x320_3x3_16": Conv2d(320, 320, 3, 1, 1, 16),
    "wrn28_640x640_3x3_8": Conv2d(640, 640, 3, 1, 1, 8),
    "wrn28_160x320_3x3_s2_32": Conv2d(160, 320, 3, 2, 1, 32),
    "wrn28_320x640_3x3_s2_16": Conv2d(320, 640, 3, 2, 1, 16),
}

NORM = {
    "norm_64_32": Norm(64, 32),
    "norm_128_16": Norm(128, 16),
    "norm_256_8": Norm(256, 8),
    "norm_512_4": Norm(512, 4),
}

#: Input of the models, without the batch.
NETWORKS = {"mlp": (1, 28, 28), "convnet": (1, 28, 28), "resnet18": (3, 32, 32), "vgg16": (3, 32, 32)}

#: What a suite measures.
SUITES = {"linear": LINEAR, "conv": CONV2D, "norm": NORM, "network": NETWORKS}

#: One of every kind: what is measured unless more is asked for.
REPRESENTATIVE = (
    "mlp_1024x1024", "transformer_768x3072", "convnet_64x64_5x5_12", "resnet18_128x128_3x3_16",
    "resnet18_128x256_3x3_s2_16", "resnet18_128x256_1x1_s2_16", "norm_64_32", "mlp", "resnet18",
)  # fmt: skip
