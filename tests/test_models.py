"""The models: their shapes, and sizes that they refuse."""

import pytest
import torch

import sparsebreg as sb
from sparsebreg.models import MODELS


@pytest.mark.parametrize(
    ("name", "shape"), [("mlp", (1, 8, 8)), ("mlp", (3, 28, 28)), ("convnet", (1, 28, 28)), ("convnet", (3, 32, 32))]
)
def test_shapes(name, shape):
    assert MODELS[name](shape, classes=7)(torch.zeros(2, *shape)).shape == (2, 7)


def test_convnet_is_the_papers():
    kinds = [type(m).__name__ for m in sb.models.convnet()]
    assert kinds == [
        "Conv2d",
        "MaxPool2d",
        "ReLU",
        "Conv2d",
        "MaxPool2d",
        "ReLU",
        "Flatten",
        "Linear",
        "ReLU",
        "Linear",
    ]


def test_bad_sizes():
    with pytest.raises(ValueError, match="in_shape: expected images of at least 16 x 16, got 8 x 8"):
        sb.models.convnet((1, 8, 8))
    with pytest.raises(ValueError, match="classes: expected an integer of at least 1"):
        sb.models.mlp(classes=0)
