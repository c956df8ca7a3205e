"""Models, and the FLOPs of a step by hand."""

import pytest
import torch
from torch import nn

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


def test_flops_by_hand():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10))
    conv, linear = 2 * 4 * 36 * 2 * 9, 2 * 144 * 10
    count = sb.flops.per_step(model, (5, 2, 8, 8))
    assert count.dense == count.sparse == 5 * (conv + linear)
    with torch.no_grad():
        model[0].weight[1:] = 0
        model[3].weight[:, 36:] = 0
    for swapped in (False, True):
        if swapped:
            sb.sparsify_(model, sb.SparsifyConfig(decide="always"))
        count = sb.flops.per_step(model, (1, 2, 8, 8))
        assert count.dense == conv + linear
        assert count.sparse == pytest.approx((conv + linear) / 4)
        assert isinstance(model[0], sb.nn.SparseConv2d) == swapped
    assert model.training
    assert count.coarse == pytest.approx(0.25 * count.sgd)
    assert count.fraction_of_sgd(0) == pytest.approx((2 * 0.25 + 1) / 3)


def test_the_papers_fractions():
    flops = sb.flops.StepFlops(1.0, 0.07)
    assert flops.fraction_of_sgd(0) == pytest.approx(0.38, abs=0.005)
    assert sb.flops.StepFlops(1.0, 0.057).fraction_of_sgd(99) == pytest.approx(0.06, abs=0.005)


def test_wrong_input_shape():
    with pytest.raises(ValueError, match="input_shape: expected a shape that the model takes"):
        sb.flops.per_step(nn.Linear(3, 3), (1, 4))
