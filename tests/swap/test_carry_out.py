"""sparsify_ and densify_ work in place: the same objects come back, and what hangs on them goes on."""

import copy
import pickle

import pytest
import torch
from helpers import close, sparse_weight
from swapping import ALWAYS, network, same, snapshot
from torch import nn

import sparsebreg as sb


def test_round_trip_restores_the_very_same_objects():
    model = network()
    modules, parameters, before = list(model), list(model.parameters()), snapshot(model)
    x = torch.randn(2, 3, 8, 8)
    y = model.eval()(x)
    report = sb.sparsify_(model, ALWAYS)
    assert [type(m).__name__ for m in model][::3] == ["SparseConv2d", "SparseConv2d"]
    assert len(report.sparse) == 3
    assert not any(m.training for m in model)
    close(model(x), y)
    sb.densify_(model)
    assert all(a is b for a, b in zip(model, modules, strict=True))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert same(snapshot(model), before)


def test_hooks_and_their_handles_stay_valid():
    model = network()
    calls = []
    handle = model[0].register_forward_hook(lambda *a: calls.append("forward"))
    model[3].register_forward_pre_hook(lambda *a: calls.append("pre"))
    sb.sparsify_(model, ALWAYS)
    model(torch.randn(2, 3, 8, 8))
    assert calls == ["forward", "pre"]
    handle.remove()
    model(torch.randn(2, 3, 8, 8))
    assert calls == ["forward", "pre", "pre"]


def test_channels_last_comes_back(backend):
    model = network().to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 8, 8)
    y = model[3](model[0](x))
    sb.sparsify_(model, ALWAYS)
    assert model[0](x).is_contiguous(memory_format=torch.channels_last)
    close(model[3](model[0](x)), y)
    sb.densify_(model)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert model[3].weight.is_contiguous(memory_format=torch.channels_last)


def test_channels_last_with_one_input_channel():
    """Both formats fit such a weight; only its strides tell torch which one to return."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3)).to(memory_format=torch.channels_last)
    strides = model[0].weight.stride()
    sb.sparsify_(model, ALWAYS)
    assert model(torch.randn(2, 1, 6, 6)).stride()[1] == 1
    sb.densify_(model)
    assert model[0].weight.stride() == strides


def test_module_used_twice_is_swapped_in_both_places():
    layer = nn.Linear(6, 6)
    layer.weight.data = sparse_weight((6, 6), 0.2, torch.float32)[0]
    model = nn.Sequential(layer, nn.ReLU(), layer)
    x = torch.randn(3, 6)
    y = model(x)
    sb.sparsify_(model, sb.SparsifyConfig(min_sparsity=0.5))
    assert model[0] is model[2]
    assert isinstance(model[0], sb.nn.SparseLinear)
    close(model(x), y)
    sb.densify_(model)
    assert model[0] is model[2] is layer


def test_layer_without_nonzeros_survives():
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    model[0].weight.data.zero_()
    model[1].weight.data.zero_()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    assert sb.sparsify_(model, optimizer=optimizer).density == 0
    model(torch.randn(3, 6)).sum().backward()
    optimizer.step()
    assert model[1].bias.grad is not None
    sb.densify_(model, optimizer=optimizer)
    assert model[0].weight.count_nonzero() == 0


def test_dtype_may_change_while_frozen():
    model = network()
    sb.sparsify_(model, ALWAYS)
    model.double()
    sb.densify_(model)
    assert all(p.dtype is torch.float64 for p in model.parameters())
    model(torch.randn(2, 3, 8, 8).double()).sum().backward()


class Listed(nn.Module):
    """Keeps its layers in a plain list, which no swap sees."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(2, 3, 3), nn.Linear(12, 4)
        self.layers = [self.conv, nn.Flatten(), self.linear]

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def _count(*args):
    _count.calls += 1


@pytest.mark.parametrize("use", ["as_it_is", "deepcopy", "pickle"])
def test_old_reference_computes_with_the_sparse_layer(use, backend):
    model, x = Listed().double(), torch.randn(5, 2, 4, 4).double()
    old = model.linear
    with torch.no_grad():
        for m in (model.conv, model.linear):
            m.weight *= torch.rand_like(m.weight) < 0.4
    y, dense = model(x).detach(), old.weight.detach().clone()
    old.register_forward_hook(_count)
    sb.sparsify_(model, ALWAYS)
    if use != "as_it_is":
        model = copy.deepcopy(model) if use == "deepcopy" else pickle.loads(pickle.dumps(model))
        old = model.layers[2]
    _count.calls = 0
    close(model(x), y)
    assert _count.calls == 1
    model(x).sum().backward()
    assert model.linear.values.grad.shape == (model.linear.pattern.nnz,)
    assert isinstance(old, nn.Linear)
    assert torch.equal(old.weight, dense)
    assert torch.equal(old.state_dict()["weight"], dense)
    old.load_state_dict({"weight": 2 * dense, "bias": old.bias.detach()})
    sb.densify_(model)
    assert model.linear is old
    assert type(old) is nn.Linear
    assert torch.equal(old.weight, 2 * dense)
