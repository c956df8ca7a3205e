"""sparsify_ and densify_: in place, with the optimizer's state, and nothing changed when refused."""

import copy
import pickle

import pytest
import torch
from helpers import close, sparse_weight
from torch import nn

import sparsebreg as sb
from sparsebreg.core.errors import SwapError

ALWAYS = sb.SparsifyConfig(decide="always")


def network(density=0.1, dtype=torch.float32):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2),
        nn.Flatten(), nn.Linear(72, 10),
    ).to(dtype)  # fmt: skip
    for m in model:
        if hasattr(m, "weight") and m.weight.dim() > 1:
            m.weight.data = sparse_weight(m.weight.shape, density, dtype)[0]
    return model


def train(model, optimizer, steps):
    g = torch.Generator().manual_seed(5)
    dtype = next(model.parameters()).dtype
    for _ in range(steps):
        x = torch.randn(4, 3, 8, 8, generator=g).to(dtype)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def snapshot(model, optimizer=None):
    state = copy.deepcopy(model.state_dict())
    return state, copy.deepcopy(optimizer.state_dict()) if optimizer else None, repr(model)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


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


@pytest.mark.parametrize(
    "make",
    [
        lambda m: torch.optim.SGD(m.parameters(), lr=0.001, momentum=0.9),
        lambda m: torch.optim.Adam(m.parameters(), lr=0.01),
        lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, amsgrad=True),
        lambda m: sb.LinBreg(sb.param_groups(m, sb.L1(0.01)), lr=0.01, momentum=0.9),
    ],
    ids=["sgd", "adam", "amsgrad", "linbreg"],
)
@pytest.mark.parametrize("steps_before", [0, 3])
def test_optimizer_state_goes_both_ways(make, steps_before):
    """Training on sparse layers is training on dense layers whose other weights stand still, state included."""
    model = network(0.3, torch.float64)
    optimizer = make(model)
    train(model, optimizer, steps_before)
    for p in model.parameters():  # dense optimizers fill the zeros: prune again
        if p.dim() > 1:
            p.data *= torch.rand_like(p) < 0.3
    state_before = [copy.deepcopy(dict(optimizer.state[p])) for p in model.parameters()]
    masks = [p.detach() != 0 if p.dim() > 1 else torch.ones_like(p, dtype=torch.bool) for p in model.parameters()]
    weights_before = [p.detach().clone() for p in model.parameters()]

    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    sb.sparsify_(model, ALWAYS, optimizer=optimizer)
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}
    train(model, optimizer, 3)
    sb.densify_(model, optimizer=optimizer)

    # The twin: dense steps, put back outside of the mask after every one.
    g = torch.Generator().manual_seed(5)
    for _ in range(3):
        x = torch.randn(4, 3, 8, 8, generator=g).double()
        twin_optimizer.zero_grad()
        twin(x).square().mean().backward()
        twin_optimizer.step()
        for p, mask, old in zip(twin.parameters(), masks, weights_before, strict=True):
            p.data = torch.where(mask, p.data, old)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        close(p.detach(), q.detach())
    for i, (p, mask) in enumerate(zip(model.parameters(), masks, strict=True)):
        state = optimizer.state[p]
        assert "frozen" not in state
        for key, value in twin_optimizer.state[list(twin.parameters())[i]].items():
            if isinstance(value, torch.Tensor) and value.shape == p.shape:
                close(state[key][mask], value[mask])
                if steps_before:
                    assert torch.equal(state[key][~mask], state_before[i][key][~mask])
    train(model, optimizer, 1)


@pytest.mark.parametrize("decide", ["always", "dense"])
@pytest.mark.parametrize("make", [sb.LinBreg, sb.ProxSGD])
def test_momentum_outside_of_the_pattern_is_forgotten_where_asked(make, decide):
    """Whether its layer becomes a sparse one or stays dense with a mask."""
    model = network(0.3, torch.float64)
    optimizer = make(sb.param_groups(model, sb.L1(0.5)), lr=0.01, momentum=0.9, keep_momentum=False)
    train(model, optimizer, 2)
    before = {n: copy.deepcopy(optimizer.state[p]) for n, p in model.named_parameters()}
    masks = {n: p.detach() != 0 for n, p in model.named_parameters()}
    config = ALWAYS if decide == "always" else sb.SparsifyConfig(min_sparsity=1.0)
    report = sb.sparsify_(model, config, optimizer=optimizer)
    values = [p for n, p in model.named_parameters() if n.endswith(".values")]
    assert len(values) == len(report.sparse) == (3 if decide == "always" else 0)
    for p in values:
        assert "momentum_buffer" not in optimizer.state[p]["frozen"]
    sb.densify_(model, optimizer=optimizer)
    for n, p in model.named_parameters():
        expected = before[n]["momentum_buffer"]
        if p.dim() > 1:
            assert (expected[~masks[n]] != 0).any()
            expected = expected * masks[n]
        assert torch.equal(optimizer.state[p]["momentum_buffer"], expected)
        if make is sb.LinBreg:
            assert torch.equal(optimizer.state[p]["dual"], before[n]["dual"])
    train(model, optimizer, 1)


def test_gradients_follow():
    model = network(0.3)
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    masks = [m.weight.detach() != 0 for m in (model[0], model[3], model[5])]
    grads = [m.weight.grad.clone() for m in (model[0], model[3], model[5])]
    sb.sparsify_(model, ALWAYS)
    for m, mask, grad in zip((model[0], model[3], model[5]), masks, grads, strict=True):
        assert torch.equal(m.values.grad, grad[mask])
    sb.densify_(model)
    for m, mask, grad in zip((model[0], model[3], model[5]), masks, grads, strict=True):
        assert torch.equal(m.weight.grad, grad * mask)


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


def test_report_says_why():
    model = nn.Sequential(
        nn.Linear(8, 8), nn.Linear(8, 8), nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), nn.Conv1d(2, 2, 1),
        nn.Linear(8, 8),
    )  # fmt: skip
    for i in (0, 2, 3, 4):
        model[i].weight.data.zero_()
    model.shared = nn.Linear(8, 8)
    model.shared.weight = model[4].weight
    report = sb.sparsify_(model, filter_fn=lambda m, name: name != "0")
    reasons = {r.name: r.reason for r in report.layers}
    assert reasons == {
        "0": "left out by filter_fn",
        "1": "sparsity 0.00% is below 80.00%",
        "2": "padding_mode 'circular' is not supported",
        "3": "Conv1d has no sparse form",
        "4": "shares its weight with another module",
        "shared": "shares its weight with another module",
    }
    assert not report.sparse
    text = str(report)
    for part in ("layer", "density", "why", "padding_mode 'circular'", "0 of 6 layers sparse"):
        assert part in text


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


class Wrapped(nn.DataParallel):
    def __init__(self, module):
        nn.Module.__init__(self)
        self.module = module


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, o: sb.sparsify_(Wrapped(m)), "model: expected a model that is not wrapped for data parallelism"),
        (lambda m, o: sb.sparsify_(nn.Sequential(Wrapped(m))), "'0' is a Wrapped"),
        (lambda m, o: sb.densify_(m), "model: expected sparse layers, got a model without any"),
        (
            lambda m, o: sb.sparsify_(m, ALWAYS, optimizer=torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1)),
            "optimizer: expected one that holds the parameter '0.weight'",
        ),
        (lambda m, o: sb.sparsify_(3), "model: expected a torch.nn.Module, got int"),
        (lambda m, o: sb.sparsify_(m, optimizer=3), "optimizer: expected a torch.optim.Optimizer, got int"),
        (
            lambda m, o: sb.SparsifyConfig(min_sparsity=1.5),
            "min_sparsity: expected a finite number of at least 0 and at most 1",
        ),
        (lambda m, o: sb.SparsifyConfig(decide="maybe"), "decide: expected one of auto, .*always, got 'maybe'"),
    ],
)
def test_refusals_change_nothing(call, message):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer, 1)
    before = snapshot(model, optimizer)
    with pytest.raises((ValueError, TypeError), match=message):
        call(model, optimizer)
    assert same(snapshot(model, optimizer), before)


def test_twice_is_refused():
    model = network()
    sb.sparsify_(model, ALWAYS)
    before = snapshot(model)
    with pytest.raises(SwapError, match="dense layers only, got a model that already has sparse layers"):
        sb.sparsify_(model, ALWAYS)
    assert same(snapshot(model), before)


def test_densify_with_a_strange_optimizer_is_refused():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sb.sparsify_(model, ALWAYS, optimizer=optimizer)
    before = snapshot(model)
    with pytest.raises(SwapError, match=r"holds the parameter '0\.values'"):
        sb.densify_(model, optimizer=torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1))
    assert same(snapshot(model), before)


def test_lazy_half_and_meta_layers_are_left_alone():
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4).half(), nn.Linear(4, 4, device="meta"))
    reasons = [r.reason for r in sb.sparsify_(model, ALWAYS).layers]
    assert reasons[0] == "not initialised yet"
    assert reasons[1:] == ["weights of dtype torch.float16 are not supported", "weights on meta are not supported"]


def test_dtype_may_change_while_frozen():
    model = network()
    sb.sparsify_(model, ALWAYS)
    model.double()
    sb.densify_(model)
    assert all(p.dtype is torch.float64 for p in model.parameters())
    model(torch.randn(2, 3, 8, 8).double()).sum().backward()


def test_a_lone_layer():
    layer = nn.Linear(4, 4)
    layer.weight.data.zero_()
    report = sb.sparsify_(layer)
    assert [r.action for r in report.layers] == ["sparse"]
    assert torch.equal(layer(torch.ones(1, 4))[0], layer.bias)
    sb.densify_(layer)
    assert type(layer) is nn.Linear


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


def test_module_with_a_forward_of_its_own_is_left_alone():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].forward = lambda x: 2 * x
    assert sb.sparsify_(model, ALWAYS).layers[0].reason == "its forward was replaced"
    assert torch.equal(model(torch.ones(1, 4)), torch.full((1, 4), 2.0))


def test_report_names_what_vanished_and_what_died():
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(3, 3))
    with torch.no_grad():
        model[0].weight[[1, 4]] = 0
        model[0].weight[:, 3] = 0
        model[2].weight[:, :2] = 0
        model[3].weight.zero_()
    report = sb.sparsify_(model, ALWAYS)
    assert [r.remaining for r in report.layers] == [(4, 27), (8, 4), (0, 0), (3, 3)]
    assert [r.name for r in report.dead] == ["3"]
    lines = str(report).splitlines()
    assert "no active weight is left in: 3" in lines
    assert "0: the pattern is 4x27 of 6x36 as a matrix" in lines
    assert "2: the pattern is 8x4 of 8x6 as a matrix" in lines
    assert sum("as a matrix" in line for line in lines) == 2


def test_report_names_operations_that_unpacked(on_native):
    class Odd(nn.Module):
        def forward(self, x):
            return torch.cumsum(x, 1)

    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), Odd(), nn.Conv2d(4, 4, 3))
    x = torch.randn(16, 2, 8, 8)
    earlier = sb.sparsify_(copy.deepcopy(model), ALWAYS)
    report = sb.sparsify_(model, ALWAYS)
    assert report.unpacked == {}
    assert "unpacked" not in str(report)
    with torch.no_grad():
        model(x)
        model(x)
    assert report.unpacked == {"cumsum": 2}
    assert earlier.unpacked == {}, "another model's"
    assert str(report).splitlines()[-1] == "unpacked lane tensors since the swap: cumsum (2 times)"
    sb.densify_(model)
    assert sb.sparsify_(model, ALWAYS).unpacked == {}
