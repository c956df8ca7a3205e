"""Sparse modules: from and to dense layers, state_dict, copies."""

import copy
import io
import pickle

import pytest
import torch
from helpers import close, sparse_weight
from torch import nn
from torch.nn.utils import prune

import sparsebreg as sb
from sparsebreg.core.errors import SwapError


def sparse(module, density=0.3):
    with torch.no_grad():
        module.weight.copy_(sparse_weight(module.weight.shape, density, module.weight.dtype)[0])
    return module


LAYERS = {
    "linear": lambda: (nn.Linear(12, 9), (5, 12)),
    "linear_no_bias": lambda: (nn.Linear(12, 9, bias=False), (5, 12)),
    "conv": lambda: (nn.Conv2d(4, 6, 3, padding=1), (2, 4, 8, 8)),
    "conv_options": lambda: (nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 0), (1, 2), groups=2, bias=False), (2, 4, 8, 8)),
    "conv_same": lambda: (nn.Conv2d(4, 6, (3, 5), padding="same", dilation=2), (2, 4, 8, 8)),
    "conv_valid": lambda: (nn.Conv2d(4, 6, 3, padding="valid"), (2, 4, 8, 8)),
}


def pair(name, dtype=torch.float32):
    module, shape = LAYERS[name]()
    dense = sparse(module.to(dtype))
    cls = sb.nn.SparseLinear if isinstance(dense, nn.Linear) else sb.nn.SparseConv2d
    return dense, cls.from_dense(dense), torch.randn(shape, dtype=dtype)


@pytest.mark.parametrize("name", LAYERS)
def test_from_dense_and_back(name, dtype, backend):
    dense, layer, x = pair(name, dtype)
    close(layer(x), dense(x))
    assert layer.bias is dense.bias
    again = layer.to_dense()
    assert type(again) is type(dense)
    assert repr(again) == repr(dense) or "padding" in repr(dense)
    assert torch.equal(again.weight, dense.weight)
    close(again(x), dense(x))


def test_mask_keeps_active_zeros_and_drops_the_rest():
    dense = nn.Linear(4, 3)
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[0, 1] = mask[2, 3] = True
    with torch.no_grad():
        dense.weight[0, 1] = 0
    layer = sb.nn.SparseLinear.from_dense(dense, mask)
    assert layer.pattern.nnz == 2
    assert layer.values.tolist() == [0, dense.weight[2, 3].item()]
    assert torch.equal(layer.weight, dense.weight * mask)


@pytest.mark.parametrize("name", LAYERS)
def test_state_dict_is_the_dense_layers(name):
    dense, layer, x = pair(name)
    state = layer.state_dict()
    assert list(state) == list(dense.state_dict())
    fresh, _ = LAYERS[name]()
    fresh.load_state_dict(state)
    assert torch.equal(fresh.weight, dense.weight)
    with torch.no_grad():
        layer.values.zero_()
        if layer.bias is not None:
            layer.bias.zero_()
    layer.load_state_dict(fresh.state_dict())
    close(layer(x), fresh(x))
    close(layer(x), copy.deepcopy(layer)(x))


def test_state_dict_in_a_model_with_prefix_and_hooks():
    model = nn.Sequential(sparse(nn.Linear(6, 5)), nn.ReLU(), nn.Sequential(sparse(nn.Linear(5, 4))))
    expected = copy.deepcopy(model.state_dict())
    sb.sparsify_(model, sb.SparsifyConfig(decide="always"))
    state = model.state_dict()
    assert list(state) == list(expected)
    for key in expected:
        assert torch.equal(state[key], expected[key])
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    model.load_state_dict(torch.load(buffer, weights_only=True))


def test_load_refuses_other_weights_and_keeps_its_own():
    dense, layer, _ = pair("linear")
    before = copy.deepcopy(layer.state_dict())
    state = dense.state_dict()
    other = dict(state, weight=torch.ones_like(state["weight"]), bias=torch.ones(9))
    with pytest.raises(
        RuntimeError, match="weight: expected zeros outside of the frozen pattern, got .* other weights"
    ):
        layer.load_state_dict(other)
    with pytest.raises(RuntimeError, match=r"weight: expected shape \(9, 12\), got \(2, 2\)"):
        layer.load_state_dict(dict(state, weight=torch.ones(2, 2)))
    with pytest.raises(RuntimeError, match=r"bias: expected shape \(9,\), got \(2,\)"):
        layer.load_state_dict(dict(state, bias=torch.ones(2)))
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict({"bias": state["bias"]})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        layer.load_state_dict(dict(state, scale=torch.ones(1)))
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize("name", ["linear", "conv_options"])
def test_copies(name):
    _, layer, x = pair(name)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
        with torch.no_grad():
            twin.values.zero_()
        assert layer.values.count_nonzero() > 0


def test_repr_tells():
    _, layer, _ = pair("conv_options")
    text = repr(layer)
    for part in ("4, 6", "kernel_size=(3, 2)", "stride=(2, 1)", "dilation=(1, 2)", "groups=2", "bias=False", "nnz="):
        assert part in text
    assert "in_features=12, out_features=9, bias=True, nnz=" in repr(pair("linear")[1])


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), "padding_mode 'reflect' is not supported"),
        (lambda: nn.Conv2d(2, 2, 2, padding="same"), "padding 'same' that differs between the sides"),
        (lambda: nn.Conv2d(2, 2, 3).half(), "weights of dtype torch.float16 are not supported"),
        (lambda: nn.Conv2d(2, 2, 3, device="meta"), "weights on meta are not supported"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 2, 3)), "has no sparse form"),
        (lambda: prune.l1_unstructured(nn.Conv2d(2, 2, 3), "weight", 1), "not a plain parameter"),
    ],
)
def test_unsupported(module, message):
    with pytest.raises(SwapError, match=message):
        sb.nn.SparseConv2d.from_dense(module())


def test_wrong_arguments():
    with pytest.raises(TypeError, match="m: expected a torch.nn.Linear, got Conv2d"):
        sb.nn.SparseLinear.from_dense(nn.Conv2d(1, 1, 1))
    with pytest.raises(ValueError, match=r"mask: expected shape \(3, 4\), got \(4, 3\)"):
        sb.nn.SparseLinear.from_dense(nn.Linear(4, 3), torch.ones(4, 3, dtype=torch.bool))
    with pytest.raises(TypeError, match="mask: expected a boolean tensor"):
        sb.nn.SparseLinear.from_dense(nn.Linear(4, 3), torch.ones(3, 4))


def test_fast_path_of_the_transformer_reads_the_weight():
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    for m in (block.linear1, block.linear2):
        sparse(m)
    x = torch.randn(3, 5, 8)
    with torch.no_grad():
        expected = block(x)
        report = sb.sparsify_(block, sb.SparsifyConfig(min_sparsity=0.5))
        close(block(x), expected)
    assert [r.name for r in report.sparse] == ["linear1", "linear2"]
    assert "has no sparse form" in next(r.reason for r in report.dense if r.name == "self_attn.out_proj")
