"""Which layers and models a swap takes, and what it refuses without a change."""

import pytest
import torch
from swapping import ALWAYS, network, same, snapshot, train
from torch import nn

import sparsebreg as sb
from sparsebreg.core.errors import SwapError


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


def test_lazy_half_and_meta_layers_are_left_alone():
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4).half(), nn.Linear(4, 4, device="meta"))
    reasons = [r.reason for r in sb.sparsify_(model, ALWAYS).layers]
    assert reasons[0] == "not initialised yet"
    assert reasons[1:] == ["weights of dtype torch.float16 are not supported", "weights on meta are not supported"]


def test_a_lone_layer():
    layer = nn.Linear(4, 4)
    layer.weight.data.zero_()
    report = sb.sparsify_(layer)
    assert [r.action for r in report.layers] == ["sparse"]
    assert torch.equal(layer(torch.ones(1, 4))[0], layer.bias)
    sb.densify_(layer)
    assert type(layer) is nn.Linear


def test_module_with_a_forward_of_its_own_is_left_alone():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].forward = lambda x: 2 * x
    assert sb.sparsify_(model, ALWAYS).layers[0].reason == "its forward was replaced"
    assert torch.equal(model(torch.ones(1, 4)), torch.full((1, 4), 2.0))


@pytest.mark.parametrize(
    "make",
    [
        lambda ps: torch.optim.LBFGS(ps),
        lambda ps: torch.optim.Adafactor(ps),
        lambda ps: torch.optim.Muon([p for p in ps if p.dim() == 2]),
    ],
    ids=["LBFGS", "Adafactor", "Muon"],
)
def test_optimizers_whose_state_cannot_follow_are_refused(make):
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    optimizer = make(list(model.parameters()))
    before = snapshot(model)
    wanted = "optimizer: expected one with a state for every weight, such as SGD, Adam, .*, got"
    with pytest.raises(SwapError, match=wanted):
        sb.sparsify_(model, ALWAYS, optimizer=optimizer)
    with pytest.raises(SwapError, match=wanted):
        sb.RigL(model, optimizer)
    assert same(snapshot(model), before)


class Factored(torch.optim.SGD):
    """Keeps a number for every row."""

    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            self.state[p]["rows"] = p.grad.sum(-1) if p.dim() > 1 else p.grad
        return super().step(closure)


def test_optimizers_of_others_are_judged_by_their_state():
    model = nn.Sequential(nn.Linear(6, 5))
    optimizer = Factored(model.parameters(), lr=0.1)
    sb.sparsify_(model, ALWAYS, optimizer=optimizer)
    sb.densify_(model, optimizer=optimizer)
    model(torch.randn(2, 6)).sum().backward()
    optimizer.step()
    with pytest.raises(SwapError, match=r"got Factored with 'rows' of shape \(5,\) for \(5, 6\)"):
        sb.sparsify_(model, ALWAYS, optimizer=optimizer)


@pytest.fixture
def process_group(tmp_path):
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_model_that_was_wrapped_before_is_refused(process_group):
    model = nn.Sequential(nn.Linear(6, 5))
    optimizer = sb.LinBreg(sb.param_groups(model, sb.L1(0.1)), lr=0.1)
    cycle = sb.Multilevel(model, optimizer, 2, ALWAYS)
    wrapped = nn.parallel.DistributedDataParallel(model)
    wrapped(torch.randn(2, 6)).sum().backward()
    with pytest.raises(SwapError, match="wrapped after its swap .* inside of a DistributedDataParallel"):
        cycle.step()  # would freeze
    assert not model[0].frozen
    with pytest.raises(SwapError, match="inside of a DistributedDataParallel"):
        sb.sparsify_(model[0], ALWAYS)


def test_a_model_that_is_wrapped_after_its_swap_trains(process_group):
    model = nn.Sequential(nn.Linear(6, 5))
    sb.sparsify_(model, ALWAYS)
    nn.parallel.DistributedDataParallel(model)(torch.randn(2, 6)).sum().backward()
    assert model[0].values.grad is not None


def test_weights_of_other_modules_are_listed():
    model = nn.ModuleDict(
        {"words": nn.Embedding(10, 4), "lstm": nn.LSTM(4, 4), "attention": nn.MultiheadAttention(4, 2)}
    )
    model["head"] = nn.Linear(4, 10)
    report = sb.sparsify_(model, ALWAYS)
    assert [r.name for r in report.sparse] == ["head"]
    names = {"words.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0", "attention.in_proj_weight"}
    assert {r.name for r in report.others} == names
    assert all(r.action == "dense" for r in report.others)
    total = 40 + 64 + 64 + 48 + 40 + 16  # embedding, LSTM, projection, head; out_proj is a layer
    text = str(report)
    assert f"sparse layers hold {40 / total:.1%} of the model's weights" in text
    assert f"lstm.weight_ih_l0 (LSTM, {64 / total:.1%})" in text
