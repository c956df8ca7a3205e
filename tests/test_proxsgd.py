"""ProxSGD: the formula, its limits, its options."""

import plain
import pytest
import torch
from conftest import close
from torch import nn

import sparsebreg as sb


@pytest.mark.parametrize("reg", plain.REGS, ids=repr)
@pytest.mark.parametrize(("momentum", "decay", "shape"), [(0.0, 0.0, (4, 3, 2, 1)), (0.9, 0.01, (5, 8))])
def test_formula(reg, momentum, decay, shape):
    loss, start = plain.least_squares(shape)
    w = nn.Parameter(start)
    options = {"lr": 0.05, "momentum": momentum, "weight_decay": decay}
    optimizer = sb.ProxSGD([w], reg=reg, **options)
    plain.compare_steps(optimizer, w, plain.ProxSGD(**options), reg, loss, 200, close)
    assert optimizer.state[w].keys() == ({"momentum_buffer"} if momentum else set())


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("maximize", [False, True])
def test_without_regularizer_it_is_sgd(momentum, decay, maximize):
    loss, start = plain.least_squares((5, 8))
    w, twin = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    options = {"lr": 0.02, "momentum": momentum, "weight_decay": decay, "maximize": maximize}
    ours, theirs = sb.ProxSGD([w], **options), torch.optim.SGD([twin], **options)
    for _ in range(100):
        for p, o in ((w, ours), (twin, theirs)):
            o.zero_grad()
            loss(p).backward()
            o.step()
        close(w.detach(), twin.detach())


def test_ends_at_the_minimiser_of_loss_plus_j():
    """The optimality condition of the lasso: −∇L ∈ ∂J, without a bias on which of the zeros it is."""
    loss, start = plain.least_squares((5, 8))
    w, lam = nn.Parameter(start), 0.05
    optimizer = sb.ProxSGD([w], lr=0.5, reg=sb.L1(lam))
    for _ in range(2000):
        optimizer.zero_grad()
        loss(w).backward()
        optimizer.step()
    (g,) = torch.autograd.grad(loss(w), w)
    zero = w.detach() == 0
    assert 0 < zero.sum() < w.numel()
    assert (g[zero].abs() <= lam + 1e-10).all()
    close(-g[~zero], lam * w.detach()[~zero].sign())


def test_bad_options():
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="momentum: expected a number below 1"):
        sb.ProxSGD([p], momentum=1.0)
    with pytest.raises(ValueError, match="momentum: expected a finite number of at least 0"):
        sb.ProxSGD([{"params": [p], "momentum": -0.1}])
    with pytest.raises(TypeError, match="delta"):
        sb.ProxSGD([p], delta=1.0)
