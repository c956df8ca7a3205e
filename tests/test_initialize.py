"""Sparse starting points keep the layers' variance."""

import pytest
import torch
from torch import nn

import sparsebreg as sb


@pytest.mark.parametrize("density", [0.05, 0.3, 1.0])
def test_density_and_output_variance(density):
    model = nn.Sequential(nn.Conv2d(16, 64, 3), nn.Flatten(), nn.Linear(64 * 36, 256))
    x = torch.randn(64, 16, 8, 8)
    biases = [m.bias.clone() for m in (model[0], model[2])]
    dense = [model[0](x).var().item(), model[2](torch.randn(64, 2304)).var().item()]
    assert sb.sparse_init_(model, density) is model
    for m in (model[0], model[2]):
        kept = m.weight.count_nonzero().item() / m.weight.numel()
        assert abs(kept - density) < 0.015
    sparse = [model[0](x).var().item(), model[2](torch.randn(64, 2304)).var().item()]
    for a, b in zip(sparse, dense, strict=True):
        assert 0.8 < a / b < 1.25
    for m, bias in zip((model[0], model[2]), biases, strict=True):
        assert torch.equal(m.bias, bias)


def test_filter_generator_and_tied_weights():
    model = nn.Sequential(nn.Linear(50, 50), nn.Linear(50, 50), nn.Linear(50, 50))
    model[2].weight = model[1].weight
    first = model[0].weight.clone()
    spread = model[1].weight.std().item()
    sb.sparse_init_(model, 0.25, lambda m, name: name != "0", torch.Generator().manual_seed(3))
    assert torch.equal(model[0].weight, first)
    assert abs(model[1].weight.std().item() / spread - 1) < 0.1  # scaled once, though two modules hold it
    again = nn.Linear(50, 50)
    sb.sparse_init_(again, 0.25, generator=torch.Generator().manual_seed(3))
    assert torch.equal(again.weight != 0, model[1].weight != 0)


@pytest.mark.parametrize("density", [0.0, -0.1, 1.1, float("nan")])
def test_bad_density_changes_nothing(density):
    layer = nn.Linear(4, 4)
    before = layer.weight.clone()
    with pytest.raises(ValueError, match="density: expected a finite number above 0 and at most 1"):
        sb.sparse_init_(layer, density)
    assert torch.equal(layer.weight, before)


def test_other_errors():
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module"):
        sb.sparse_init_([1.0])
    with pytest.raises(ValueError, match="model: expected linear or convolution layers"):
        sb.sparse_init_(nn.ReLU())
