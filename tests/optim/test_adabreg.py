"""AdaBreg: the formula, its limits, its options."""

import plain
import pytest
import torch
from helpers import close
from torch import nn

import sparsebreg as sb


@pytest.mark.parametrize("reg", plain.REGS, ids=repr)
@pytest.mark.parametrize(("decay", "decoupled", "shape"), [(0.05, False, (4, 3, 2, 1)), (0.05, True, (5, 8))])
def test_formula(reg, decay, decoupled, shape):
    loss, start = plain.least_squares(shape)
    w = nn.Parameter(start)
    # A large eps: with the usual one the first steps divide noise by noise where a gradient is almost zero.
    options = {"lr": 0.01, "betas": (0.8, 0.99), "eps": 1e-4, "delta": 0.8, "weight_decay": decay}
    options["decoupled_weight_decay"] = decoupled
    plain.compare_steps(sb.AdaBreg([w], reg=reg, **options), w, plain.AdaBreg(**options), reg, loss, 200, close)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
def test_without_regularizer_it_is_adam(decay, decoupled, maximize):
    loss, start = plain.least_squares((5, 8))
    w, twin = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    options = {"lr": 0.02, "betas": (0.8, 0.99), "weight_decay": decay, "maximize": maximize}
    ours = sb.AdaBreg([w], decoupled_weight_decay=decoupled, **options)
    theirs = (torch.optim.AdamW if decoupled else torch.optim.Adam)([twin], **options)
    for _ in range(200):
        for p, o in ((w, ours), (twin, theirs)):
            o.zero_grad()
            loss(p).backward()
            o.step()
        close(w.detach(), twin.detach())
    assert not torch.allclose(w, start)


@pytest.mark.parametrize("reg", [sb.NoReg(), sb.L1(0.0), sb.GroupL2(0.0)], ids=repr)
def test_without_eps_and_with_gradients_that_vanish(reg):
    """Squares below the smallest number must not become a zero to divide by."""
    w, twin = nn.Parameter(torch.full((3, 16), 0.5)), nn.Parameter(torch.full((3, 16), 0.5))
    options = {"lr": 0.001, "betas": (0.9, 0.9), "eps": 0.0}
    ours, theirs = sb.AdaBreg([w], reg=reg, **options), torch.optim.Adam([twin], **options)
    for i in range(1100):
        for p, o in ((w, ours), (twin, theirs)):
            p.grad = torch.full_like(p, 1e-3 if i < 5 else 0.0)
            o.step()
        if i < 300:  # later theirs divides one subnormal number by another
            torch.testing.assert_close(w.detach(), twin.detach())
    assert w.isfinite().all()
    w.grad = torch.full_like(w, 1e-20)
    ours.step()
    assert w.isfinite().all()


def test_makes_zeros_and_descends():
    loss, start = plain.least_squares((10, 20))
    w = nn.Parameter(start)
    before = loss(w).item()
    optimizer = sb.AdaBreg([w], lr=0.01, reg=sb.L1(0.3))
    for _ in range(100):
        optimizer.zero_grad()
        loss(w).backward()
        optimizer.step()
    assert loss(w).item() < 0.9 * before
    assert 0.1 < (w == 0).float().mean() < 0.95


def test_bad_options():
    p = nn.Parameter(torch.ones(2))
    for betas in (0.9, (0.9,), "ab c"):
        with pytest.raises(TypeError, match="betas: expected a pair of numbers, got"):
            sb.AdaBreg([p], betas=betas)
    with pytest.raises(ValueError, match=r"betas\[1\]: expected a number below 1, got 1.0"):
        sb.AdaBreg([p], betas=(0.9, 1.0))
    with pytest.raises(ValueError, match=r"betas\[0\]: expected a finite number of at least 0"):
        sb.AdaBreg([{"params": [p], "betas": (-0.1, 0.9)}])
    with pytest.raises(ValueError, match="eps: expected a finite number of at least 0"):
        sb.AdaBreg([p], eps=-1.0)
