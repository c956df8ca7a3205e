"""Convolutions: sparse against torch's dense ones in both memory formats."""

import pytest
import torch
from conftest import BATCH
from layers import CONV2D


@pytest.mark.parametrize("layer", CONV2D)
@pytest.mark.parametrize("implementation", ["dense", "channels_last", "sparse"])
def test_conv2d(run, layer, implementation, density):
    ic, oc, kernel, stride, padding, size = CONV2D[layer]
    run(torch.nn.Conv2d(ic, oc, kernel, stride, padding), torch.randn(BATCH, ic, size, size), implementation, density)
