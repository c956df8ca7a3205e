"""Linear layers: sparse against torch's dense ones."""

import pytest
import torch
from conftest import BATCH
from layers import LINEAR


@pytest.mark.parametrize("layer", LINEAR)
@pytest.mark.parametrize("implementation", ["dense", "sparse"])
def test_linear(run, layer, implementation, density):
    i, o = LINEAR[layer]
    run(torch.nn.Linear(i, o), torch.randn(BATCH, i), implementation, density)
