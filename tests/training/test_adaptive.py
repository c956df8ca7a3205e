"""Adaptive λ: targets are reached, θ follows as promised, runs resume exactly."""

import copy
import io
import math

import pytest
import torch
from helpers import close
from torch import nn
from torch.nn import functional as F

import sparsebreg as sb

ALWAYS = sb.SparsifyConfig(decide="always")


def problem():
    g = torch.Generator().manual_seed(5)
    x = torch.randn(20, 64, 60, generator=g)
    teacher = torch.randn(60, 10, generator=g)
    return x, (x @ teacher).argmax(-1)


def make(kind="linbreg", lam=0.01, coarse_steps=None, reg=sb.L1, dtype=torch.float32, **options):
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(60, 120), nn.ReLU(), nn.Linear(120, 10)).to(dtype)
    sb.sparse_init_(model, 0.05)
    groups = sb.param_groups(model, reg(lam))
    if kind == "linbreg":
        optimizer = sb.LinBreg(groups, lr=0.5, momentum=0.9)
    else:
        optimizer = {"adabreg": sb.AdaBreg, "proxsgd": sb.ProxSGD}[kind](groups, lr=2e-3)
    cycle = optimizer if coarse_steps is None else sb.Multilevel(model, optimizer, coarse_steps, ALWAYS)
    return model, optimizer, cycle, sb.LambdaScheduler(cycle, **options)


def run(model, optimizer, cycle, scheduler, steps, start=0):
    x, y = problem()
    x = x.to(next(model.parameters()).dtype)
    for i in range(start, start + steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x[i % 20]), y[i % 20])
        loss.backward()
        cycle.step()
        scheduler.step()
    return loss.item()


def sparsities(model):
    return [1 - a / t for _, a, t in sb.swap.inspect.iter_weights(model)]


def sparsity(model):
    counts = list(sb.swap.inspect.iter_weights(model))
    return 1 - sum(a for _, a, _ in counts) / sum(t for _, _, t in counts)


@pytest.mark.parametrize("lam", [1.0, 1e-4], ids=["too_large", "too_small"])
@pytest.mark.parametrize(
    ("kind", "coarse_steps", "target"),
    [("linbreg", None, 0.95), ("adabreg", None, 0.8), ("linbreg", 9, 0.8), ("linbreg", 29, 0.9), ("adabreg", 9, 0.9)],
    ids=["linbreg", "adabreg", "ml-linbreg-9", "ml-linbreg-29", "ml-adabreg-9"],
)
def test_reaches_the_target(kind, coarse_steps, target, lam, one_thread):
    """From λ wrong by a factor of 100, in either direction, within one point."""
    model, *rest = make(kind, lam, coarse_steps, target_sparsity=target)
    loss = run(model, *rest, 900)
    assert abs(sparsity(model) - target) < 0.01
    assert rest[-1].sparsity == pytest.approx(sparsity(model), abs=0.01)
    assert loss < 2.1  # it learns meanwhile: ln 10 = 2.3


@pytest.mark.parametrize("coarse_steps", [None, 9])
def test_far_too_many_weights_are_halved_at_once(coarse_steps, one_thread):
    """λ goes to the size of v above which half of the active weights are, far beyond what its gain says."""
    model, optimizer, cycle, scheduler = make("linbreg", 1e-4, coarse_steps, target_sparsity=0.9, every=1, gain=0.05)
    lam, step = scheduler.lam, 0
    while scheduler.lam < 2 * lam:  # at this gain, 14 changes by themselves
        lam = scheduler.lam
        run(model, optimizer, cycle, scheduler, 1, step)
        step += 1
    before = 1 - scheduler.sparsity  # measured before λ moved
    assert before >= 0.2
    assert 1 - sparsity(model) == pytest.approx(before / 2, abs=0.01)
    sizes = torch.cat([optimizer.state[p]["dual"].abs().flatten() for p in optimizer.param_groups[0]["params"]])
    assert (sizes > scheduler.lam).float().mean() == pytest.approx(before / 2, abs=0.01)


@pytest.mark.parametrize("coarse_steps", [None, 9])
def test_per_layer(coarse_steps, one_thread):
    model, optimizer, *rest = make("linbreg", 0.3, coarse_steps, target_sparsity=0.85, per_layer=True)
    run(model, optimizer, *rest, 900)
    assert all(abs(s - 0.85) < 0.02 for s in sparsities(model))
    assert abs(rest[-1].gap) < 0.02
    lams = rest[-1].lam
    assert len(lams) == 2
    assert lams[0] != lams[1]
    assert sum(len(g["params"]) for g in optimizer.param_groups) == 4


def test_targets_by_layer(one_thread):
    model, optimizer, *rest = make("linbreg", 0.3, 9, target_sparsity=0.85, per_layer={"2": 0.7})
    run(model, optimizer, *rest, 900)
    first, last = sparsities(model)
    assert first == pytest.approx(0.85, abs=0.02)
    assert last == pytest.approx(0.7, abs=0.02)


def test_ramp_to_targets_by_layer():
    model, *_, scheduler = make(coarse_steps=3, per_layer={"0": 0.5}, target_sparsity=0.9, ramp="linear", ramp_steps=10)
    start = scheduler.goals()
    for _ in range(5):
        scheduler.step()
    goals = scheduler.goals()
    assert goals == pytest.approx([(s + t) / 2 for s, t in zip(start, (0.5, 0.9), strict=True)])
    sizes = [model[i].weight.numel() for i in (0, 2)]
    assert sizes[0] != sizes[1]
    wanted = sum(g * n for g, n in zip(goals, sizes, strict=True)) / sum(sizes)
    scheduler.sparsity = 0.75
    assert scheduler.gap == pytest.approx(0.75 - wanted)


def test_the_law():
    """Without a bound by a quantile (ProxSGD has no v) λ follows the formula alone."""
    model, optimizer, cycle, scheduler = make("proxsgd", 0.05, target_sparsity=0.9, every=1, gain=0.3)
    lam, gain, last = 0.05, 0.3, 0
    signs = set()
    for i in range(120):
        run(model, optimizer, cycle, scheduler, 1, i)
        gap = (1 - sparsity(model) - 0.1) / 0.1
        if abs(gap) > 0.01:
            sign = math.copysign(1, gap)
            if last:
                gain = min(1.0, max(0.05, gain * (1.2 if sign == last else 0.5)))
            last = sign
            signs.add(sign)
            lam *= math.exp(gain * max(-1, min(1, gap)))
        assert scheduler.lam == pytest.approx(lam, rel=1e-9)
    assert signs == {-1, 1}


@pytest.mark.parametrize("ratio", [0.6, 1.0, 1.5])
@pytest.mark.parametrize("reg", [sb.L1, sb.GroupL2, sb.L1GroupL2], ids=lambda r: r.__name__)
@pytest.mark.parametrize("on_change", ["shift", "keep", "rescale"])
def test_weights_follow(on_change, reg, ratio):
    """θ = prox(δ v) for the new λ, v − θ/δ ∈ ∂J(θ), and what each way promises."""
    lam = 0.1 if reg is sb.L1 else 0.02
    _, optimizer, _, scheduler = make("linbreg", lam, reg=reg, dtype=torch.float64, on_change=on_change)
    group, delta = optimizer.param_groups[0], 0.7
    group["delta"] = delta
    weights = group["params"]
    for p in weights:
        v = torch.randn_like(p) * lam * 3 * torch.rand(len(p), 1)  # groups large and small
        optimizer.state[p]["dual"] = v
        p.data = group["reg"].prox(delta * v, delta)
    before = [(p.detach().clone(), optimizer.state[p]["dual"].clone()) for p in weights]
    scheduler._move([0, 1], ratio)
    new = reg(lam * ratio)
    assert group["reg"] == new
    for p, (theta, v) in zip(weights, before, strict=True):
        dual, moved = optimizer.state[p]["dual"], new.prox(delta * v, delta)
        if on_change == "keep":
            assert torch.equal(dual, v)
            close(p.detach(), moved)
        elif on_change == "rescale":
            assert torch.equal(dual, torch.where((theta == 0) & torch.tensor(ratio < 1), v * ratio, v))
            close(p.detach(), new.prox(delta * dual, delta))
        else:
            close(p.detach(), torch.where(moved != 0, theta, 0))  # nothing jumps but what falls asleep, nothing wakes
            assert not (p.detach() != 0)[theta == 0].any()
            if reg is sb.L1:
                sign, active = theta.sign(), p.detach() != 0
                expected = torch.where(active, v + lam * (ratio - 1) * sign, v.clamp(-lam * ratio, lam * ratio))
                close(dual, expected)
        if on_change != "shift" or ratio <= 1 or reg is sb.L1:
            close(new.prox(delta * dual, delta), p.detach())
    if ratio == 1.5:
        assert any((p.detach() == 0)[theta != 0].any() for p, (theta, _) in zip(weights, before, strict=True))


def test_in_the_cycle_lambda_moves_at_the_thaw_only():
    model, optimizer, cycle, scheduler = make("linbreg", 1.0, 4, target_sparsity=0.5, every=1)
    moved, lam = [], scheduler.lam
    for i in range(15):
        run(model, optimizer, cycle, scheduler, 1, i)
        if scheduler.lam != lam:
            moved.append((i, cycle.phase))
            lam = scheduler.lam
    assert moved == [(4, "fine"), (9, "fine"), (14, "fine")]


@pytest.mark.parametrize(("ramp", "shape"), [("linear", lambda t: t), ("cubic", lambda t: 1 - (1 - t) ** 3)])
def test_ramp(ramp, shape):
    model, optimizer, cycle, scheduler = make("linbreg", 0.05, target_sparsity=0.5, ramp=ramp, ramp_steps=8)
    start = sparsity(model)
    for k in range(12):
        assert scheduler.goals() == [pytest.approx(start + (0.5 - start) * shape(min(1, k / 8)))]
        assert scheduler.gap == (None if scheduler.sparsity is None else scheduler.sparsity - scheduler.goals()[0])
        run(model, optimizer, cycle, scheduler, 1, k)


@pytest.mark.parametrize("steps", [11, 24, 33])
@pytest.mark.parametrize("options", [{}, {"per_layer": True}, {"ramp": "cubic", "ramp_steps": 60}], ids=str)
@pytest.mark.parametrize("coarse_steps", [None, 4])
def test_resumed_run_is_bit_identical(coarse_steps, options, steps, one_thread):
    options = {"target_sparsity": 0.8, "every": 3, **options}
    model, *rest = make("adabreg", 0.1, coarse_steps, **options)
    run(model, *rest, steps)
    optimizer, cycle, scheduler = rest
    buffer = io.BytesIO()
    torch.save([o.state_dict() for o in (cycle, model, optimizer, scheduler)], buffer)
    buffer.seek(0)
    states = torch.load(buffer, weights_only=True)
    twin, other, again, resumed = make("adabreg", 0.1, coarse_steps, **options)
    objects = [again, twin, other, resumed] if coarse_steps else [other, twin, other, resumed]
    for o, state in zip(objects, states, strict=True):
        o.load_state_dict(state)
    for objects in ((model, *rest), (twin, other, again, resumed)):
        run(*objects, 40, steps)
    assert scheduler.state_dict() == resumed.state_dict()
    assert scheduler.lam == resumed.lam
    for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_copies():
    model, *rest = make("linbreg", 0.1, 4, target_sparsity=0.8, every=1)
    run(model, *rest, 8)
    twin, *others = copy.deepcopy((model, *rest))
    run(model, *rest, 20, 8)
    run(twin, *others, 20, 8)
    assert rest[-1].lam == others[-1].lam
    assert others[-1].optimizer is others[0]


def test_a_dead_layer_is_reported_and_may_come_back(one_thread):
    model, optimizer, cycle, scheduler = make("linbreg", 0.3, target_sparsity=0.8, every=1)
    with torch.no_grad():
        model[2].weight.zero_()
    with pytest.warns(UserWarning, match="no active weights left in group 0, parameter 1"):
        run(model, optimizer, cycle, scheduler, 1)
    assert scheduler.dead == ["group 0, parameter 1"]
    run(model, optimizer, cycle, scheduler, 300, 1)
    assert scheduler.dead == []
    assert model[2].weight.count_nonzero() > 0


def test_names_of_dead_layers_and_one_warning_only(recwarn):
    model, optimizer, cycle, scheduler = make("linbreg", 1e3, 0, target_sparsity=0.8, every=1)
    with torch.no_grad():
        model[2].weight.zero_()
    run(model, optimizer, cycle, scheduler, 3)
    assert scheduler.dead == ["2.weight"]
    assert len([w for w in recwarn if "no active weights" in str(w.message)]) == 1


class TestBadInput:
    @pytest.mark.parametrize("value", [0.0, 1.0, -0.1, 1.5, float("nan")])
    def test_target_sparsity(self, value):
        with pytest.raises(ValueError, match="target_sparsity: expected a"):
            make(target_sparsity=value)

    def test_out_of_reach(self):
        model = nn.Sequential(nn.Linear(30, 40, bias=False), nn.Linear(40, 20, bias=False))
        groups = [{"params": [model[0].weight], "reg": sb.L1(0.1)}, {"params": [model[1].weight]}]
        cycle = sb.Multilevel(model, sb.LinBreg(groups, lr=0.1))
        with pytest.raises(ValueError, match=r"target_sparsity: expected at most 0.6 \(the rest is not regularised\)"):
            sb.LambdaScheduler(cycle, 0.7)
        sb.LambdaScheduler(cycle, 0.59)
        sb.LambdaScheduler(cycle.optimizer, 0.7)  # knows of no other layers

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"ramp": "square", "ramp_steps": 3}, "ramp: expected one of linear, cubic, got 'square'"),
            ({"ramp": "linear"}, "ramp_steps: expected an integer of at least 1, got 0"),
            ({"on_change": "jump"}, "on_change: expected one of shift, keep, rescale, got 'jump'"),
            ({"gain": 0}, "gain: expected a finite number above 0"),
            ({"every": 0}, "every: expected an integer of at least 1"),
            ({"lam": 0.0}, "reg: expected a lam above 0, from which to start"),
        ],
    )
    def test_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            make(**options)

    def test_target(self):
        model, optimizer, *_ = make()
        with pytest.raises(TypeError, match="target: expected a Multilevel or a Bregman optimizer, got Linear"):
            sb.LambdaScheduler(model[0])
        with pytest.raises(
            ValueError, match="target: expected an optimizer with a sparse regularizer, got one without"
        ):
            sb.LambdaScheduler(sb.LinBreg(model.parameters()))
        torch.optim.lr_scheduler.ConstantLR(optimizer)
        with pytest.raises(ValueError, match="per_layer: expected a scheduler made before those of the learning rate"):
            sb.LambdaScheduler(optimizer, per_layer=True)
        with pytest.raises(ValueError, match="per_layer: expected True or False for an optimizer alone"):
            make(per_layer={"0": 0.9})
        with pytest.raises(ValueError, match="per_layer: layer: expected one of 0, 2, got 'third'"):
            make(coarse_steps=3, per_layer={"third": 0.9})
        with pytest.raises(ValueError, match=r"per_layer\['2'\]: expected a number below 1, got 1"):
            make(coarse_steps=3, per_layer={"2": 1})
        model, optimizer, cycle, _ = make(coarse_steps=3)
        cycle.freeze()
        with pytest.raises(ValueError, match="target: expected a model that is not frozen, got a frozen one"):
            sb.LambdaScheduler(cycle)

    def test_state_of_another_model(self):
        *_, scheduler = make(per_layer=True)
        *_, other = make()
        with pytest.raises(ValueError, match="gains: expected 1 numbers, got 2"):
            other.load_state_dict(scheduler.state_dict())
