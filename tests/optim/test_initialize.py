"""Sparse starting points keep the layers' variance."""

import copy

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


def test_erk_densities():
    """By the definition: proportional to the sum over the product of the sizes, cut at 1, the total kept."""
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 64, 3), nn.Flatten(), nn.Linear(256, 100))
    sizes = {"0": 16 * 3 * 9, "1": 64 * 16 * 9, "3": 25600}
    raw = {"0": (16 + 3 + 3 + 3) / sizes["0"], "1": (64 + 16 + 3 + 3) / sizes["1"], "3": 356 / sizes["3"]}
    for density in (0.001, 0.05, 0.2, 0.5, 0.9, 1.0):
        densities = sb.erk_densities(model, density)
        low, high = 0.0, 1e6  # bisection for the factor
        for _ in range(200):
            middle = (low + high) / 2
            total = sum(min(1, middle * raw[n]) * sizes[n] for n in sizes)
            low, high = (middle, high) if total < density * sum(sizes.values()) else (low, middle)
        for n in sizes:
            assert densities[n] == pytest.approx(min(1, low * raw[n]), rel=1e-6)
        assert sum(densities[n] * sizes[n] for n in sizes) == pytest.approx(density * sum(sizes.values()))
    assert sb.uniform_densities(model, 0.3) == {"0": 0.3, "1": 0.3, "3": 0.3}
    assert list(sb.erk_densities(model, 0.3, lambda m, n: n != "1")) == ["0", "3"]


def test_distributions_of_the_density():
    model = nn.Sequential(nn.Conv2d(8, 32, 3), nn.Flatten(), nn.Linear(800, 100))
    twin = copy.deepcopy(model)
    wanted = sb.erk_densities(model, 0.1)
    assert wanted["0"] > 0.15 > 0.1 > wanted["2"]
    sb.sparse_init_(model, 0.1, distribution="erk")
    for n, d in wanted.items():
        assert model.get_submodule(n).weight.count_nonzero().item() == pytest.approx(
            d * model.get_submodule(n).weight.numel(), rel=0.1
        )
    before = twin[0].weight.clone()
    sb.sparse_init_(twin, distribution={"2": 0.5})
    assert torch.equal(twin[0].weight, before)
    assert twin[2].weight.count_nonzero().item() == pytest.approx(40000, rel=0.05)


def test_whole_kernels():
    model = nn.Sequential(nn.Conv2d(16, 64, 3), nn.Flatten(), nn.Linear(64, 50))
    spread = model[0].weight.square().mean().item()
    sb.sparse_init_(model, 0.25, groups="kernels")
    counts = (model[0].weight != 0).flatten(2).sum(2)
    assert set(counts.unique().tolist()) == {0, 9}
    assert (counts > 0).float().mean().item() == pytest.approx(0.25, abs=0.04)
    assert model[0].weight.square().mean().item() == pytest.approx(spread, rel=0.15)
    assert model[2].weight.count_nonzero().item() == pytest.approx(800, rel=0.2)


@pytest.mark.parametrize("distribution", ["uniform", "erk"])
def test_relu_gain_keeps_the_mean_square_through_the_network(distribution):
    model = nn.Sequential()
    for _ in range(8):
        model.append(nn.Linear(500, 500, bias=False)).append(nn.ReLU())
    x = torch.randn(300, 500)
    torch_default = (model(x).square().mean() / x.square().mean()).item()
    sb.sparse_init_(model, 0.1, distribution=distribution, gain="relu")
    for m in model:
        if isinstance(m, nn.Linear):
            assert m.weight.square().mean().item() == pytest.approx(2 / 500, rel=1e-4)
    assert torch_default < 1e-4
    assert (
        0.5 < (model(x).square().mean() / x.square().mean()).item() < 2
    )  # half of 2 · 1 at each ReLU, times gain² = 2


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"distribution": "erdos"}, ValueError, "distribution: expected one of uniform, erk, got 'erdos'"),
        ({"distribution": {"7": 0.5}}, ValueError, "distribution: expected names among 0, got '7'"),
        ({"distribution": {"0": 0.0}}, ValueError, r"distribution\['0'\]: expected a finite number above 0"),
        ({"groups": "rows"}, ValueError, "groups: expected one of weights, kernels, got 'rows'"),
        ({"gain": -1.0}, ValueError, "gain: expected a finite number above 0"),
        ({"gain": "swish"}, ValueError, "gain: expected a number or a name that torch.nn.init"),
    ],
)
def test_bad_options_change_nothing(options, error, message):
    model = nn.Sequential(nn.Linear(4, 4))
    before = model[0].weight.clone()
    with pytest.raises(error, match=message):
        sb.sparse_init_(model, **options)
    assert torch.equal(model[0].weight, before)
