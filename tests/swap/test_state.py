"""Gradients and the state of the optimizer follow a swap, both ways."""

import copy

import pytest
import torch
from helpers import close
from swapping import ALWAYS, network, same, snapshot, train
from torch import nn

import sparsebreg as sb
from sparsebreg.core.errors import SwapError


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


def test_densify_with_a_strange_optimizer_is_refused():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sb.sparsify_(model, ALWAYS, optimizer=optimizer)
    before = snapshot(model)
    with pytest.raises(SwapError, match=r"holds the parameter '0\.values'"):
        sb.densify_(model, optimizer=torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1))
    assert same(snapshot(model), before)
