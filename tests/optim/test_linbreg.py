"""LinBreg: the formula, its limits, its options, its checkpoints."""

import copy
import io
import pickle

import plain
import pytest
import torch
from helpers import close
from torch import nn

import sparsebreg as sb
from sparsebreg.core import extension
from sparsebreg.optim import linbreg


@pytest.fixture(params=["fused", "plain"])
def path(request, monkeypatch):
    """The native pass and the torch operations must do the same."""
    if request.param == "plain":
        monkeypatch.setattr(linbreg, "native", lambda: None)
    elif extension.native() is None:
        pytest.skip("needs the extension")


def problem(dtype=torch.float64, seed=3):
    g = torch.Generator().manual_seed(seed)
    matrix = torch.randn(40, 20, generator=g, dtype=dtype)
    target = torch.randn(40, 5, generator=g, dtype=dtype)
    weight = torch.randn(20, 5, generator=g, dtype=dtype) * (torch.rand(20, 5, generator=g) < 0.3)
    return matrix, target, nn.Parameter(weight)


def loss_of(matrix, target, w):
    return (matrix @ w - target).square().mean()


#: The native pass exists for the first three; all others take the torch operations on either path.
CASES = [("fused", reg) for reg in (sb.NoReg(), sb.L1(0.0), sb.L1(0.02))] + [("plain", reg) for reg in plain.REGS]


@pytest.mark.parametrize(("path", "reg"), CASES, indirect=["path"], ids=repr)
@pytest.mark.parametrize(("momentum", "decay", "shape"), [(0.0, 0.0, (4, 3, 2, 1)), (0.9, 0.01, (5, 8))])
def test_formula(reg, momentum, decay, shape, path):
    loss, start = plain.least_squares(shape)
    w = nn.Parameter(start)
    options = {"lr": 0.1, "momentum": momentum, "delta": 0.8, "weight_decay": decay}
    plain.compare_steps(sb.LinBreg([w], reg=reg, **options), w, plain.LinBreg(**options), reg, loss, 200, close)


@pytest.mark.parametrize("reg", [sb.NoReg(), sb.L1(0.02), sb.GroupL2(0.02)], ids=repr)
@pytest.mark.parametrize("delta", [1.0, 0.5])
def test_formula_of_ascent(reg, delta, path):
    loss, start = plain.least_squares((5, 8))
    w = nn.Parameter(start)
    optimizer = sb.LinBreg([w], lr=0.1, momentum=0.9, delta=delta, reg=reg, maximize=True)
    plain.compare_steps(optimizer, w, plain.LinBreg(0.1, 0.9, delta), reg, loss, 20, close, maximize=True)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_without_regularizer_it_is_sgd(momentum, decay, path):
    matrix, target, w = problem()
    twin = nn.Parameter(w.detach().clone())
    ours = sb.LinBreg([w], lr=0.2, momentum=momentum, weight_decay=decay, reg=sb.NoReg(), delta=1.0)
    sgd = torch.optim.SGD([twin], lr=0.2 * (1 - momentum), momentum=momentum, weight_decay=decay)
    for _ in range(100):
        for p, o in ((w, ours), (twin, sgd)):
            o.zero_grad()
            loss_of(matrix, target, p).backward()
            o.step()
        close(w.detach(), twin.detach())


def test_closure_and_schedulers(path):
    matrix, target, w = problem()
    optimizer = sb.LinBreg([w], lr=0.5, reg=sb.L1(0.01))
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(matrix, target, w)
        loss.backward()
        return loss

    first = optimizer.step(closure)
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.25
    for _ in range(50):
        last = optimizer.step(closure)
    assert last < first


def test_parameter_keeps_its_storage_and_autograd_notices(path):
    matrix, target, w = problem()
    storage, version = w.data_ptr(), w._version
    optimizer = sb.LinBreg([w], lr=0.1, reg=sb.L1(0.01))
    loss_of(matrix, target, w).backward()
    held = w.square().sum()
    optimizer.step()
    assert w.data_ptr() == storage
    assert w._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        held.backward()


def test_active_mask_holds_everything_else_still(path):
    matrix, target, w = problem()
    optimizer = sb.LinBreg([w], lr=0.1, momentum=0.9, reg=sb.L1(0.01))

    def step():
        optimizer.zero_grad()
        loss_of(matrix, target, w).backward()
        optimizer.step()

    step()
    mask = w.detach() != 0
    optimizer.state[w]["active"] = mask
    before = {k: t.clone() for k, t in optimizer.state[w].items()}
    for _ in range(5):
        step()
    assert torch.equal(w.detach()[~mask], torch.zeros_like(w.detach()[~mask]))
    for key in ("dual", "momentum_buffer"):
        assert torch.equal(optimizer.state[w][key][~mask], before[key][~mask])
        assert not torch.equal(optimizer.state[w][key][mask], before[key][mask])


def test_checkpoint_of_a_version_without_an_option():
    p = nn.Parameter(torch.ones(2))
    saved = sb.LinBreg([p], lr=0.5).state_dict()
    del saved["param_groups"][0]["keep_momentum"]
    optimizer = sb.LinBreg([p], keep_momentum=False)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert optimizer.param_groups[0]["keep_momentum"] is False


def test_checkpoints(path):
    matrix, target, w = problem()
    groups = [{"params": [w], "reg": sb.L1(0.02)}]
    optimizer = sb.LinBreg(groups, lr=0.1, momentum=0.9)

    def steps(p, o, n):
        for _ in range(n):
            o.zero_grad()
            loss_of(matrix, target, p).backward()
            o.step()

    steps(w, optimizer, 7)
    buffer = io.BytesIO()
    torch.save({"w": w.detach(), "o": optimizer.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    twin = nn.Parameter(saved["w"].clone())
    other = sb.LinBreg([twin], lr=9.0)
    other.load_state_dict(saved["o"])
    assert other.param_groups[0]["reg"] == sb.L1(0.02)
    copied, pickled = copy.deepcopy((w, optimizer)), pickle.loads(pickle.dumps((w, optimizer)))
    steps(w, optimizer, 5)
    for p, o in ((twin, other), copied, pickled):
        steps(p, o, 5)
        assert torch.equal(p, w)


def test_no_shared_default():
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    first, second = sb.LinBreg([a]), sb.LinBreg([b])
    first.param_groups[0]["reg"] = sb.L1(1.0)
    assert second.param_groups[0]["reg"] == sb.NoReg()


@pytest.mark.parametrize("name", ["lr", "delta", "weight_decay", "momentum"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_bad_options(name, value):
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=f"{name}: expected a finite number"):
        sb.LinBreg([p], **{name: value})
    with pytest.raises(ValueError, match=f"{name}: expected a finite number"):
        sb.LinBreg([{"params": [p], name: value}])


def test_other_bad_options():
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="momentum: expected a number below 1"):
        sb.LinBreg([p], momentum=1.0)
    with pytest.raises(TypeError, match="keep_momentum: expected True or False, got 'no'"):
        sb.LinBreg([p], keep_momentum="no")
    with pytest.raises(ValueError, match="delta: expected a finite number above 0"):
        sb.LinBreg([p], delta=0.0)
    with pytest.raises(TypeError, match="lr: expected a real number, got 'fast'"):
        sb.LinBreg([p], lr="fast")
    with pytest.raises(TypeError, match=r"reg: expected a regularizer such as sparsebreg.L1\(0.05\), got 0.1"):
        sb.LinBreg([p], reg=0.1)
