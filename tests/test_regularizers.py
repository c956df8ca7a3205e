"""Regularizers: value, prox and subgradient by brute force."""

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

import sparsebreg as sb
from sparsebreg import regularizers

floats = st.floats(-5, 5, allow_nan=False)
REGS = [sb.NoReg(), sb.L1(0.0), sb.L1(0.3), sb.L1(2.0)]


@pytest.mark.parametrize("reg", REGS, ids=repr)
@settings(max_examples=40, deadline=None)
@given(w=floats, step=st.floats(0.01, 3))
def test_prox_is_the_argmin(reg, w, step):
    t = torch.tensor([w], dtype=torch.float64)

    def objective(z):
        return 0.5 * (z - w) ** 2 + step * reg.value(torch.tensor([z], dtype=torch.float64)).item()

    best = minimize_scalar(objective, bounds=(-6, 6), method="bounded", options={"xatol": 1e-10})
    ours = reg.prox(t, step).item()
    assert objective(ours) <= best.fun + 1e-9
    assert abs(ours - best.x) < 1e-4


@pytest.mark.parametrize("reg", REGS, ids=repr)
@settings(max_examples=40, deadline=None)
@given(a=st.lists(floats, min_size=4, max_size=4), b=st.lists(floats, min_size=4, max_size=4))
def test_subgradient_inequality(reg, a, b):
    a, b = (torch.tensor(t, dtype=torch.float64) for t in (a, b))
    assert reg.value(b) >= reg.value(a) + (reg.subgradient(a) * (b - a)).sum() - 1e-9


@pytest.mark.parametrize("reg", REGS, ids=repr)
def test_plain_and_immutable(reg):
    assert pickle.loads(pickle.dumps(reg)) == reg
    assert regularizers.from_state_dict(reg.state_dict()) == reg
    with pytest.raises(AttributeError):
        reg.lam = 1.0


def test_with_lam():
    reg = sb.L1(0.3)
    assert reg.with_lam(0.6) == sb.L1(0.6)
    assert reg == sb.L1(0.3)
    with pytest.raises(ValueError, match="lam: expected a finite number of at least 0"):
        reg.with_lam(-1.0)
    with pytest.raises(TypeError, match="reg: expected a regularizer with a lam, got NoReg"):
        sb.NoReg().with_lam(0.1)


@pytest.mark.parametrize("lam", [float("nan"), float("inf"), -0.1])
def test_bad_lam(lam):
    with pytest.raises(ValueError, match="lam: expected a finite number of at least 0, got"):
        sb.L1(lam)


def test_other_errors():
    with pytest.raises(TypeError, match="lam: expected a real number, got 'much'"):
        sb.L1("much")
    with pytest.raises(ValueError, match="reg: expected one of NoReg, L1.*, got 'L7'"):
        regularizers.from_state_dict({"name": "L7"})
