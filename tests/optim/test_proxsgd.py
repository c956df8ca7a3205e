"""ProxSGD: the formula, its limits, its options."""

import plain
import pytest
import torch
from helpers import close
from torch import nn

import sparsebreg as sb
from sparsebreg.core import extension
from sparsebreg.optim import proxsgd


@pytest.fixture(params=["fused", "plain"])
def path(request, monkeypatch):
    """The native pass and the torch operations must do the same."""
    if request.param == "plain":
        monkeypatch.setattr(proxsgd, "native", lambda: None)
    elif extension.native() is None:
        pytest.skip("needs the extension")


#: The native pass exists for the first three; all others take the torch operations on either path.
CASES = [("fused", reg) for reg in (sb.NoReg(), sb.L1(0.0), sb.L1(0.02))] + [("plain", reg) for reg in plain.REGS]


@pytest.mark.parametrize(("path", "reg"), CASES, indirect=["path"], ids=repr)
@pytest.mark.parametrize(("momentum", "decay", "shape"), [(0.0, 0.0, (4, 3, 2, 1)), (0.9, 0.01, (5, 8))])
def test_formula(reg, momentum, decay, shape, path):
    loss, start = plain.least_squares(shape)
    w = nn.Parameter(start)
    options = {"lr": 0.05, "momentum": momentum, "weight_decay": decay}
    optimizer = sb.ProxSGD([w], reg=reg, **options)
    plain.compare_steps(optimizer, w, plain.ProxSGD(**options), reg, loss, 200, close)
    assert optimizer.state[w].keys() == ({"momentum_buffer"} if momentum else set())


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("maximize", [False, True])
def test_without_regularizer_it_is_sgd(momentum, decay, maximize, path):
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


def test_active_mask_holds_everything_else_still(path):
    loss, start = plain.least_squares((5, 8))
    w = nn.Parameter(start)
    optimizer = sb.ProxSGD([w], lr=0.05, momentum=0.9, reg=sb.L1(0.02))

    def step():
        optimizer.zero_grad()
        loss(w).backward()
        optimizer.step()

    step()
    mask = torch.arange(w.numel()).view(w.shape) % 3 != 1
    optimizer.state[w]["active"] = mask
    held, moments = w.detach().clone(), optimizer.state[w]["momentum_buffer"].clone()
    version = w._version
    step()
    assert w._version > version
    for now, before in ((w.detach(), held), (optimizer.state[w]["momentum_buffer"], moments)):
        assert torch.equal(now[~mask], before[~mask])
        assert not torch.equal(now[mask], before[mask])


def test_ends_at_the_minimiser_of_loss_plus_j(path):
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
    with pytest.raises(TypeError, match="keep_momentum: expected True or False, got 'no'"):
        sb.ProxSGD([p], keep_momentum="no")
    with pytest.raises(ValueError, match="momentum: expected a finite number of at least 0"):
        sb.ProxSGD([{"params": [p], "momentum": -0.1}])
    with pytest.raises(TypeError, match="delta"):
        sb.ProxSGD([p], delta=1.0)
