"""Regularizers: value, prox and subgradient by brute force, restrictions to a pattern, plain data."""

import math
import pickle

import numpy as np
import pytest
import torch
from helpers import close
from hypothesis import given, settings
from hypothesis import strategies as st
from plain import groups_of
from scipy.optimize import minimize, minimize_scalar

import sparsebreg as sb
from sparsebreg.optim import regularizers

floats = st.floats(-5, 5, allow_nan=False)
SINGLE = [sb.NoReg(), sb.L1(0.0), sb.L1(0.3), sb.L1(2.0), sb.L1NonNegative(0.0), sb.L1NonNegative(0.7)]
OVER = ["rows", "channels", "kernels"]
GROUPED = [
    reg
    for over in OVER
    for reg in (
        sb.GroupL2(0.0, over),
        sb.GroupL2(0.4, over),
        sb.L1GroupL2(0.2, over),
        sb.L1GroupL2(0.3, over, 0.1),
        sb.L1GroupL2(0.0, over, 0.5),
    )
]
LOW_RANK = [sb.NuclearNorm(0.0), sb.NuclearNorm(0.8)]
ALL = SINGLE + GROUPED + LOW_RANK


def f64(values, shape=None):
    t = torch.tensor(values, dtype=torch.float64)
    return t if shape is None else t.view(shape)


def plain_value(reg, w):
    """J(w) with numpy, one group at a time."""
    flat = w.numpy().reshape(-1)
    if isinstance(reg, sb.NuclearNorm):
        return reg.lam * np.linalg.norm(w.numpy().reshape(w.shape[0], -1), "nuc")
    if isinstance(reg, sb.NoReg):
        return 0.0
    if isinstance(reg, sb.L1NonNegative):
        return math.inf if (flat < 0).any() else reg.lam * flat.sum()
    if isinstance(reg, sb.L1):
        return reg.lam * np.abs(flat).sum()
    group = sum(math.sqrt(len(g)) * np.linalg.norm(flat[g]) for g in groups_of(tuple(w.shape), reg.over))
    if isinstance(reg, sb.L1GroupL2):
        return reg.lam * np.abs(flat).sum() + (reg.lam if reg.lam_group is None else reg.lam_group) * group
    return reg.lam * group


@pytest.mark.parametrize("shape", [(3, 4), (3, 2, 2, 1)], ids=["linear", "conv"])
@pytest.mark.parametrize("reg", ALL, ids=repr)
def test_value(reg, shape):
    w = torch.randn(shape, dtype=torch.float64)
    w[0] = 0
    if isinstance(reg, sb.L1NonNegative):
        assert reg.value(w) == math.inf
        w = w.abs()
    assert reg.value(w).item() == pytest.approx(plain_value(reg, w), rel=1e-12)
    assert reg.value(w.float()).dtype is torch.float32


@pytest.mark.parametrize("reg", SINGLE, ids=repr)
@settings(max_examples=20, deadline=None)
@given(w=floats, step=st.floats(0.01, 3))
def test_prox_is_the_argmin(reg, w, step):
    def objective(z):
        return 0.5 * (z - w) ** 2 + step * reg.value(f64([z])).item()

    low = 0 if isinstance(reg, sb.L1NonNegative) else -6
    best = minimize_scalar(objective, bounds=(low, 6), method="bounded", options={"xatol": 1e-10})
    ours = reg.prox(f64([w]), step).item()
    assert objective(ours) <= best.fun + 1e-9
    assert abs(ours - best.x) < 1e-4


def objective_of(reg, w, step):
    return lambda z: 0.5 * ((z - w.numpy().reshape(-1)) ** 2).sum() + step * plain_value(reg, f64(z, w.shape))


@pytest.mark.parametrize("reg", GROUPED, ids=repr)
def test_prox_of_many_weights_is_the_argmin(reg):
    """A search from elsewhere ends where the prox is."""
    w = torch.randn(2, 1, 2, 1, dtype=torch.float64)
    objective = objective_of(reg, w, 0.6)
    best = minimize(objective, w.numpy().reshape(-1), method="COBYLA", options={"rhobeg": 0.3, "tol": 1e-6})
    ours = reg.prox(w, 0.6).numpy().reshape(-1)
    assert objective(ours) <= best.fun + 1e-9
    assert np.abs(ours - best.x).max() < 1e-2


def test_prox_of_the_nuclear_norm_is_the_argmin():
    """‖Z‖_* is the least (‖A‖² + ‖B‖²)/2 with A B = Z: a smooth problem, whose argmin has rank 1 here."""
    w, lam = torch.randn(2, 3, dtype=torch.float64), 2.0

    def factors(z):
        return z[:4].reshape(2, 2), z[4:].reshape(2, 3)

    def objective(z):
        a, b = factors(z)
        return 0.5 * ((a @ b - w.numpy()) ** 2).sum() + 0.6 * lam * 0.5 * (z**2).sum()

    a, b = factors(minimize(objective, np.random.default_rng(0).normal(size=10), options={"gtol": 1e-9}).x)
    ours = sb.NuclearNorm(lam).prox(w, 0.6)
    assert np.abs(ours.numpy() - a @ b).max() < 1e-4
    assert torch.linalg.matrix_rank(ours) == 1


@pytest.mark.parametrize("shape", [(2, 3), (2, 2, 2, 1)], ids=["linear", "conv"])
@pytest.mark.parametrize("reg", GROUPED + LOW_RANK, ids=repr)
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 10**6), step=st.floats(0.05, 2), size=st.floats(-4, 0.5))
def test_objective_grows_away_from_the_prox(reg, shape, seed, step, size):
    """The objective is 1-strongly convex: only at its minimiser p is it at least f(p) + ‖z − p‖²/2 for every z."""
    draw = np.random.default_rng(seed)
    w = torch.from_numpy(draw.normal(size=shape))
    objective = objective_of(reg, w, step)
    ours = reg.prox(w, step).numpy().reshape(-1)
    for away in 10**size * draw.normal(size=(10, w.numel())):
        assert objective(ours + away) >= objective(ours) + 0.5 * (away**2).sum() - 1e-11


@pytest.mark.parametrize("reg", ALL, ids=repr)
@settings(max_examples=20, deadline=None)
@given(a=st.lists(floats, min_size=8, max_size=8), b=st.lists(floats, min_size=8, max_size=8), rank=st.booleans())
def test_subgradient_inequality(reg, a, b, rank):
    a, b = f64(a, (2, 2, 2, 1)), f64(b, (2, 2, 2, 1))
    if rank:
        a[1] = 2 * a[0]  # also at weights of low rank
    if isinstance(reg, sb.L1NonNegative):
        a, b = a.clamp(min=0), b.clamp(min=0)
    assert reg.value(b) >= reg.value(a) + (reg.subgradient(a) * (b - a)).sum() - 1e-7


@pytest.mark.parametrize("reg", ALL, ids=repr)
def test_dual_variable_gives_the_weight_back(reg):
    """θ = prox_{δJ}(δ v) for v = θ/δ + subgradient(θ), zeros included."""
    w = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    w[1], w[:, 2], w[3, 0] = 0, 0, 0
    if isinstance(reg, sb.L1NonNegative):
        w = w.abs()
    for delta in (0.5, 1.0, 3.0):
        close(reg.prox(delta * (w / delta + reg.subgradient(w)), delta), w)


def test_whole_groups_vanish():
    w = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
    close(sb.GroupL2(1.0).prox(w, 1.0), torch.tensor([[3.0, 4.0], [0.0, 0.0]]) * (1 - math.sqrt(2) / 5))
    channels = sb.GroupL2(1.0, "channels").prox(torch.tensor([[3.0, 0.3], [4.0, 0.4]]), 1.0)
    assert not channels[:, 1].any()
    assert channels[:, 0].all()
    low = sb.NuclearNorm(1.0).prox(torch.diag(torch.tensor([3.0, 0.5])), 1.0)
    close(low, torch.diag(torch.tensor([2.0, 0.0])))


def masks(shape):
    """Of this shape: some, without a row, without a channel, one weight, none, all."""
    some = torch.rand(shape) < 0.3
    row, channel = some.clone(), some.clone()
    row[1], channel[:, 1] = False, False
    single = torch.zeros(shape, dtype=torch.bool)
    single.view(-1)[-1] = True
    none, full = torch.zeros(shape, dtype=torch.bool), torch.ones(shape, dtype=torch.bool)
    return some, row, channel, single, none, full


@pytest.mark.parametrize("shape", [(6, 5), (4, 3, 3, 2)], ids=["linear", "conv"])
@pytest.mark.parametrize("reg", SINGLE + GROUPED, ids=repr)
def test_restriction_equals_the_masked_dense_form(reg, shape):
    for mask in masks(shape):
        check_restriction(reg, shape, mask)


def check_restriction(reg, shape, mask):
    pattern = sb.SparsePattern.from_mask(mask)
    w = torch.where(mask, torch.randn(shape, dtype=torch.float64), 0.0)
    if isinstance(reg, sb.L1NonNegative):
        w = w.abs()
    values, on = pattern.gather(w), reg.restrict(pattern)
    close(on.value(values), reg.value(w))
    close(on.prox(values, 0.7), pattern.gather(reg.prox(w, 0.7)))
    close(on.subgradient(values), pattern.gather(reg.subgradient(w)))
    assert on.prox(values.float(), 0.7).dtype is torch.float32
    assert pickle.loads(pickle.dumps(on)) == on
    assert regularizers.from_state_dict(on.state_dict()) == reg
    if hasattr(reg, "lam_group") and reg.lam_group is not None and not reg.lam:
        return
    if hasattr(reg, "lam"):
        assert on.with_lam(0.9) == reg.with_lam(0.9).restrict(pattern)


@pytest.mark.parametrize("reg", ALL, ids=repr)
def test_plain_and_immutable(reg):
    assert pickle.loads(pickle.dumps(reg)) == reg
    assert regularizers.from_state_dict(reg.state_dict()) == reg
    assert all(isinstance(v, (str, float, type(None))) for v in reg.state_dict().values())
    with pytest.raises(AttributeError):
        reg.lam = 1.0


class TestWithLam:
    @pytest.mark.parametrize(
        "reg", [sb.L1(0.3), sb.L1NonNegative(0.3), sb.NuclearNorm(0.3), *(r for r in GROUPED if r.lam)], ids=repr
    )
    def test_scales_the_value(self, reg):
        w = torch.rand(4, 3, dtype=torch.float64)
        other = reg.with_lam(2 * reg.lam)
        assert type(other) is type(reg)
        assert other.lam == 2 * reg.lam
        close(other.value(w), 2 * reg.value(w))

    def test_keeps_the_rest(self):
        assert sb.GroupL2(0.3, "kernels").with_lam(0.6) == sb.GroupL2(0.6, "kernels")
        assert sb.L1GroupL2(0.2, "rows", 0.1).with_lam(0.4) == sb.L1GroupL2(0.4, "rows", 0.2)
        assert sb.L1GroupL2(0.2).with_lam(0.0).with_lam(0.4) == sb.L1GroupL2(0.4)

    def test_errors(self):
        with pytest.raises(ValueError, match="lam: expected a finite number of at least 0"):
            sb.L1(0.3).with_lam(-1.0)
        with pytest.raises(TypeError, match="reg: expected a regularizer with a lam, got NoReg"):
            sb.NoReg().with_lam(0.1)
        with pytest.raises(ValueError, match="reg: expected a lam above 0, or no lam_group of its own"):
            sb.L1GroupL2(0.0, "rows", 0.1).with_lam(0.1)


@pytest.mark.parametrize("make", [sb.L1, sb.L1NonNegative, sb.GroupL2, sb.L1GroupL2, sb.NuclearNorm])
@pytest.mark.parametrize("lam", [float("nan"), float("inf"), -0.1])
def test_bad_lam(make, lam):
    with pytest.raises(ValueError, match="lam: expected a finite number of at least 0, got"):
        make(lam)


def test_other_errors():
    with pytest.raises(TypeError, match="lam: expected a real number, got 'much'"):
        sb.L1("much")
    with pytest.raises(ValueError, match="lam_group: expected a finite number of at least 0, got -1"):
        sb.L1GroupL2(0.1, "rows", -1)
    with pytest.raises(ValueError, match="over: expected one of rows, channels, kernels, got 'all'"):
        sb.GroupL2(0.1, "all")
    with pytest.raises(ValueError, match="reg: expected one of NoReg, L1.*, got 'L7'"):
        regularizers.from_state_dict({"name": "L7"})


@pytest.mark.parametrize("method", ["value", "subgradient", "prox"])
@pytest.mark.parametrize("reg", [*(sb.GroupL2(0.1, o) for o in OVER), sb.L1GroupL2(0.1), sb.NuclearNorm(0.1)], ids=repr)
def test_a_vector_has_no_groups(reg, method):
    with pytest.raises(ValueError, match="w: expected two or more dimensions for .* .see param_groups., got 1"):
        getattr(reg, method)(torch.ones(3), *([1.0] if method == "prox" else []))
