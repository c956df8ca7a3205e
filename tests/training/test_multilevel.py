"""The cycle: against masked dense training in plain torch, its limits, its checkpoints, its errors."""

import copy
import io
import itertools
import pickle

import pytest
import torch
from helpers import assert_same, close
from torch import nn
from torch.nn import functional as F

import sparsebreg as sb
from sparsebreg.core.errors import SwapError

ALWAYS = sb.SparsifyConfig(decide="always")
LR, BETA, LAM, DELTA, DECAY = 0.3, 0.9, 0.02, 1.0, 0.001


def make(kind, dtype):
    torch.manual_seed(1)
    if kind == "mlp":
        model, shape = sb.models.mlp((1, 6, 6), hidden=(40, 30)), (1, 6, 6)
    else:
        model, shape = sb.models.convnet((1, 16, 16), channels=6), (1, 16, 16)
    model = sb.sparse_init_(model.to(dtype), density=0.2)
    g = torch.Generator().manual_seed(2)
    batches = [
        (torch.randn(20, *shape, generator=g).to(dtype), torch.randint(0, 10, (20,), generator=g)) for _ in range(5)
    ]
    return model, batches


def build(model, coarse_steps, config=None, momentum=BETA, filter_fn=None):
    optimizer = sb.LinBreg(
        sb.param_groups(model, sb.L1(LAM)), lr=LR, momentum=momentum, delta=DELTA, weight_decay=DECAY
    )
    return optimizer, sb.Multilevel(model, optimizer, coarse_steps, config, filter_fn)


def run(model, optimizer, stepper, batches, steps, start=0):
    for i in range(start, start + steps):
        x, y = batches[i % len(batches)]
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        stepper.step()


class Masked:
    """ML-LinBreg written down plainly: dense tensors, a mask, the formulas."""

    def __init__(self, model, coarse_steps):
        self.model, self.m = model, coarse_steps
        self.left = 0
        self.reg = {n: LAM if p.dim() > 1 else 0.0 for n, p in model.named_parameters()}
        self.v = {n: p.detach() / DELTA + self.reg[n] * p.detach().sign() for n, p in model.named_parameters()}
        self.buffer = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
        self.mask = {}

    @torch.no_grad()
    def step(self):
        coarse = self.left > 0
        for n, p in self.model.named_parameters():
            g = p.grad + DECAY * p
            m = BETA * self.buffer[n] + (1 - BETA) * LR * g
            v = self.v[n] - m
            z = DELTA * v
            theta = z.sign() * (z.abs() - DELTA * self.reg[n]).clamp(min=0)
            if coarse and self.reg[n]:
                keep = self.mask[n]
                m, v, theta = (torch.where(keep, a, b) for a, b in ((m, self.buffer[n]), (v, self.v[n]), (theta, p)))
            self.buffer[n], self.v[n] = m, v
            p.copy_(theta)
        if coarse:
            self.left -= 1
        else:
            self.mask = {n: p != 0 for n, p in self.model.named_parameters()}
            self.left = self.m


def dense_view(model, optimizer):
    """Name to (weight, v, momentum) of every parameter as dense tensors, whatever the phase."""
    view = {}
    for name, p in model.named_parameters():
        state = optimizer.state[p]
        triple = [p.detach(), state["dual"], state["momentum_buffer"]]
        if name.endswith(".values"):
            layer = model.get_submodule(name.removesuffix(".values"))
            aside = state["frozen"]
            triple = [layer.weight] + [
                layer.pattern.scatter(state[k], aside[k].clone()) for k in ("dual", "momentum_buffer")
            ]
            name = name.removesuffix("values") + "weight"
        view[name] = triple
    return view


@pytest.mark.parametrize("config", [ALWAYS, None], ids=["all_sparse", "some_stay_dense"])
@pytest.mark.parametrize("kind", ["mlp", "convnet"])
def test_equals_masked_dense_training(kind, config, engine, dtype):
    """60 steps over several cycles: weights, v and momentum agree after every one."""
    model, batches = make(kind, dtype)
    twin = copy.deepcopy(model)
    optimizer, cycle = build(model, 7, config)
    masked = Masked(twin, 7)
    swapped = 0
    for i in range(60):
        run(model, optimizer, cycle, batches, 1, i)
        run(twin, twin, masked, batches, 1, i)
        swapped += any(isinstance(m, sb.nn.SparseLinear) for m in model.modules())
        assert (cycle.phase == "coarse") == (masked.left > 0)
        view = dense_view(model, optimizer)
        for name, p in twin.named_parameters():
            for ours, theirs in zip(view[name], (p.detach(), masked.v[name], masked.buffer[name]), strict=True):
                close(ours, theirs)
    assert cycle.report is not None
    if config is ALWAYS:
        assert swapped > 40
        assert not cycle.report.dense
    else:
        assert cycle.report.dense  # the point of this case: some layers are frozen as masked dense weights


def test_some_layers_stay_dense_and_frozen():
    model, batches = make("mlp", torch.float64)
    optimizer, cycle = build(model, 10, ALWAYS, filter_fn=lambda m, name: name != "3")
    run(model, optimizer, cycle, batches, 1)
    dense = model[3]
    assert isinstance(dense, nn.Linear)
    zero = dense.weight.detach() == 0
    run(model, optimizer, cycle, batches, 9)
    assert not dense.weight.detach()[zero].any()
    assert dense.weight.detach()[~zero].any()
    assert torch.equal(optimizer.state[dense.weight]["active"], ~zero)
    cycle.thaw()
    assert "active" not in optimizer.state[dense.weight]


@pytest.mark.parametrize("kind", ["mlp", "convnet"])
def test_no_coarse_steps_is_linbreg(kind, backend):
    model, batches = make(kind, torch.float64)
    twin = copy.deepcopy(model)
    optimizer, cycle = build(model, 0)
    plain, _ = build(twin, 0)
    run(model, optimizer, cycle, batches, 25)
    run(twin, plain, plain, batches, 25)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)  # patterns with room may sum in another order
    assert cycle.phase == "fine"
    assert cycle.report is None


def test_without_regularizer_nothing_freezes_and_it_is_sgd():
    model, batches = make("mlp", torch.float64)
    twin = copy.deepcopy(model)
    optimizer = sb.LinBreg(model.parameters(), lr=0.5, momentum=0.9)
    cycle = sb.Multilevel(model, optimizer, 3, ALWAYS)
    sgd = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9)
    run(model, optimizer, cycle, batches, 20)
    run(twin, sgd, sgd, batches, 20)
    assert all(r.reason == "not regularised" for r in cycle.report.layers)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        close(p.detach(), q.detach())


def test_unregularised_first_convolution_computes_as_a_sparse_one(backend):
    """With all of its weights, those that happen to be zero too; the same as if it had stayed dense."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten())
    model.append(nn.Linear(16 * 36, 4)).double()
    sb.sparse_init_(model, 0.1, lambda m, name: name != "0")
    model[0].weight.data[:, :, 1] = 0
    twin = copy.deepcopy(model)
    g = torch.Generator().manual_seed(4)
    batches = [(torch.randn(20, 1, 8, 8, generator=g).double(), torch.randint(0, 4, (20,), generator=g))]
    for net, filter_fn in ((model, None), (twin, lambda m, name: name != "0")):
        optimizer = sb.LinBreg(sb.param_groups(net, sb.L1(LAM), {"0": sb.NoReg()}), lr=LR, momentum=BETA)
        cycle = sb.Multilevel(net, optimizer, 5, filter_fn=filter_fn)
        run(net, optimizer, cycle, batches, 9)
        first = cycle.report.layers[0]
        assert (first.action, first.density) == (("dense" if filter_fn else "sparse"), 1.0)
    assert isinstance(model[0], sb.nn.SparseConv2d)
    assert model[0].weight[:, :, 1].count_nonzero() == 16 * 3
    for name, value in model.state_dict().items():
        close(value, twin.state_dict()[name])


def test_active_weight_may_pass_through_zero_and_stays_active():
    model = nn.Sequential(nn.Linear(2, 1, bias=False))
    model[0].weight.data = torch.tensor([[0.5, 0.0]])
    optimizer = sb.LinBreg(model.parameters(), lr=1.0, reg=sb.L1(0.1))
    cycle = sb.Multilevel(model, optimizer, 50, ALWAYS)

    def step(grad):
        p = next(model.parameters())
        p.grad = torch.full_like(p, grad)
        cycle.step()

    step(0.0)
    seen = []
    for _ in range(12):
        step(0.1)
        seen.append(model[0].values.item())
    assert 0.0 in seen
    assert seen[-1] < 0
    assert model[0].pattern.nnz == 1
    assert model[0].weight.tolist() == [[seen[-1], 0.0]]


def test_phases_and_counts():
    model, batches = make("mlp", torch.float32)
    optimizer, cycle = build(model, 3, ALWAYS)
    phases = []
    for i in range(9):
        phases.append(cycle.phase)
        run(model, optimizer, cycle, batches, 1, i)
    assert phases == ["fine", "coarse", "coarse", "coarse"] * 2 + ["fine"]
    assert len(cycle.report.sparse) == 3


def test_closure_result_comes_back():
    model, batches = make("mlp", torch.float32)
    optimizer, cycle = build(model, 2)
    x, y = batches[0]

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    losses = [cycle.step(closure).item() for _ in range(20)]
    assert losses[-1] < losses[0]


def save_and_load(*objects):
    buffer = io.BytesIO()
    torch.save([o.state_dict() for o in objects], buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("steps", [5, 6, 8], ids=["fine_phase", "just_frozen", "inside_coarse_steps"])
@pytest.mark.parametrize("config", [ALWAYS, None], ids=["all_sparse", "some_stay_dense"])
@pytest.mark.parametrize("kind", ["mlp", "convnet"])
@pytest.mark.parametrize("how", ["state_dict", "state_dict_optimizer_first", "deepcopy", "pickle"])
def test_resumed_run_is_bit_identical(how, kind, config, steps, one_thread, backend):
    model, batches = make(kind, torch.float64)
    optimizer, cycle = build(model, 4, config)
    run(model, optimizer, cycle, batches, steps)
    assert cycle.phase == ("fine" if steps == 5 else "coarse")
    if how == "deepcopy":
        twin, other, resumed = copy.deepcopy((model, optimizer, cycle))
    elif how == "pickle":
        twin, other, resumed = pickle.loads(pickle.dumps((model, optimizer, cycle)))
    else:
        states = save_and_load(model, optimizer, cycle)
        twin, _ = make(kind, torch.float64)
        other, resumed = build(twin, 9, config)
        objects = [(twin, states[0]), (other, states[1]), (resumed, states[2])]
        for o, state in objects if how.endswith("first") else reversed(objects):
            o.load_state_dict(state)
    assert resumed.phase == cycle.phase
    for m, o, c in ((model, optimizer, cycle), (twin, other, resumed)):
        run(m, o, c, batches, 13, steps)
    for a, b in ((model, twin), (optimizer, other), (cycle, resumed)):
        assert_same(a.state_dict(), b.state_dict())


@pytest.mark.parametrize(("coarse_steps", "fine_steps"), [(0, 1), (3, 6)])
@pytest.mark.parametrize("kind", ["mlp", "convnet"])
def test_resumed_between_fine_steps(kind, coarse_steps, fine_steps, one_thread, backend):
    """Patterns that were given room stay what they are, and those that were not get it as without the stop."""

    def build():
        model, batches = make(kind, torch.float64)
        optimizer = sb.LinBreg(sb.param_groups(model, sb.L1(LAM)), lr=0.02, momentum=BETA)
        return model, batches, optimizer, sb.Multilevel(model, optimizer, coarse_steps, ALWAYS, fine_steps=fine_steps)

    model, batches, optimizer, cycle = build()
    wide = set()
    for steps in range(14):
        if steps % 3 == 1:
            model(batches[0][0])  # an evaluation, which may have to make a pattern
        states = save_and_load(model, optimizer, cycle)
        wide.add(len(states[2]["wide"]))
        twin, _, other, resumed = build()
        for o, state in ((resumed, states[2]), (twin, states[0]), (other, states[1])):
            o.load_state_dict(state)
        assert_same(resumed.state_dict(), states[2])
        old = {k: v for k, v in states[2].items() if k != "wide"}  # as saved before there was room
        build()[3].load_state_dict(old)
        run(model, optimizer, cycle, batches, 1, steps)
        run(twin, other, resumed, batches, 1, steps)
        for a, b in ((model, twin), (optimizer, other), (cycle, resumed)):
            assert_same(a.state_dict(), b.state_dict())
    assert len(wide) > 1


@pytest.mark.parametrize(("coarse_steps", "fine_steps"), [(0, 1), (2, 3)])
def test_steps_after_a_thaw_by_hand(coarse_steps, fine_steps, backend):
    model, batches = make("mlp", torch.float64)
    optimizer = sb.LinBreg(sb.param_groups(model, sb.L1(LAM)), lr=LR)
    cycle = sb.Multilevel(model, optimizer, coarse_steps, ALWAYS, fine_steps=fine_steps)
    run(model, optimizer, cycle, batches, 1)
    cycle.thaw()
    before = copy.deepcopy(model)
    run(model, optimizer, cycle, batches, 8, 1)
    assert not torch.equal(model[1].weight, before[1].weight)


class Half(sb.L1):
    """One of the user's own, that takes no other lam."""

    def with_lam(self, lam):
        raise TypeError("fixed")


@pytest.mark.parametrize("reg", [sb.L1GroupL2(0.0, lam_group=0.01), Half(LAM), sb.L1(0.0)], ids=repr)
def test_fine_steps_with_a_regularizer_that_cannot_be_scaled(reg, backend):
    model, batches = make("mlp", torch.float64)
    optimizer = sb.LinBreg(sb.param_groups(model, reg), lr=LR)
    cycle = sb.Multilevel(model, optimizer, 0, ALWAYS)
    twin = copy.deepcopy(model)
    plain = sb.LinBreg(sb.param_groups(twin, reg), lr=LR)
    run(model, optimizer, cycle, batches, 6)
    run(twin, plain, plain, batches, 6)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        close(p.detach(), q.detach())


def test_fine_steps_after_a_weight_was_replaced(backend):
    model, batches = make("mlp", torch.float64)
    optimizer, cycle = build(model, 0, ALWAYS)
    run(model, optimizer, cycle, batches, 2)
    model[1].weight = nn.Parameter(model[1].weight.detach() + 1)  # not the optimizer's: it stays
    fixed = model[1].weight.detach().clone()
    run(model, optimizer, cycle, batches, 3, 2)
    assert torch.equal(model[1].weight, fixed)
    model[1] = nn.Linear(36, 40, dtype=torch.float64)
    run(model, optimizer, cycle, batches, 3, 5)


def test_loading_into_a_frozen_cycle():
    model, batches = make("mlp", torch.float64)
    optimizer, cycle = build(model, 4, ALWAYS)
    fine = copy.deepcopy((model.state_dict(), optimizer.state_dict(), cycle.state_dict()))
    run(model, optimizer, cycle, batches, 3)
    assert cycle.phase == "coarse"
    for o, s in zip((cycle, model, optimizer), (fine[2], fine[0], fine[1]), strict=True):
        o.load_state_dict(s)
    assert cycle.phase == "fine"
    assert isinstance(model[1], nn.Linear)
    run(model, optimizer, cycle, batches, 3)


def test_state_dict_of_a_frozen_model_fits_the_dense_model():
    model, batches = make("convnet", torch.float64)
    dense, _ = make("convnet", torch.float64)
    optimizer, cycle = build(model, 9, ALWAYS)
    run(model, optimizer, cycle, batches, 3)
    dense.load_state_dict(model.state_dict())
    close(dense(batches[0][0]), model(batches[0][0]))
    model.load_state_dict(dense.state_dict())
    close(dense(batches[0][0]), model(batches[0][0]))


@pytest.mark.parametrize("scheduled", [False, True], ids=["alone", "with_lambda_scheduler"])
@pytest.mark.parametrize("kind", ["mlp", "convnet"])
def test_a_layer_that_dies_out_is_told_once_and_may_come_back(kind, scheduled, backend, recwarn):
    model, batches = make(kind, torch.float64)
    name = next(n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d)))
    optimizer, cycle = build(model, 2, ALWAYS)
    with torch.no_grad():
        model.get_submodule(name).weight.zero_()
        optimizer.param_groups[0]["reg"] = sb.L1(1e3)
    scheduler = sb.LambdaScheduler(cycle, 0.5, every=1) if scheduled else None
    for i in range(7):
        run(model, optimizer, cycle, batches, 1, i)
        if i == 0:
            layer = model.get_submodule(name)
            assert (layer.pattern.nnz, layer.values.numel()) == (0, 0)
        if scheduler:
            scheduler.step()
    told = [str(w.message) for w in recwarn if "no active weights" in str(w.message)]
    assert told == [f"no active weights left in {name}"]
    assert all(p.isfinite().all() for p in model.parameters())
    optimizer.param_groups[0]["reg"] = sb.L1(1e-4)
    cycle.thaw()
    run(model, optimizer, cycle, batches, 10)
    cycle.thaw()
    assert model.get_submodule(name).weight.count_nonzero() > 0


class TestBadInput:
    @pytest.mark.parametrize(
        ("value", "error", "message"),
        [
            (-1, ValueError, "coarse_steps: expected an integer of at least 0, got -1"),
            (1.5, TypeError, "coarse_steps: expected an integer, got 1.5"),
            (float("nan"), TypeError, "coarse_steps: expected an integer"),
        ],
    )
    def test_coarse_steps(self, value, error, message):
        model, _ = make("mlp", torch.float32)
        with pytest.raises(error, match=message):
            build(model, value)

    def test_optimizer(self):
        model, _ = make("mlp", torch.float32)
        with pytest.raises(TypeError, match="optimizer: expected a Bregman optimizer such as LinBreg, got SGD"):
            sb.Multilevel(model, torch.optim.SGD(model.parameters(), lr=1.0))
        with pytest.raises(SwapError, match="holds all trainable parameters of the model, got one without '1.bias'"):
            sb.Multilevel(model, sb.LinBreg([model[1].weight]))
        for p in model.parameters():
            p.requires_grad_(p is model[1].weight)
        sb.Multilevel(model, sb.LinBreg([model[1].weight]))

    def test_swapped_model(self):
        model, _ = make("mlp", torch.float32)
        optimizer, _ = build(model, 3)
        sb.sparsify_(model, ALWAYS, optimizer=optimizer)
        with pytest.raises(SwapError, match="already has sparse layers"):
            sb.Multilevel(model, optimizer, 3)

    def test_state_of_another_model(self):
        model, batches = make("mlp", torch.float64)
        optimizer, cycle = build(model, 4, ALWAYS)
        run(model, optimizer, cycle, batches, 2)
        other = sb.models.mlp((1, 6, 6), hidden=(41, 30)).double()
        _, resumed = build(other, 4, ALWAYS)
        before = repr(other)
        with pytest.raises(ValueError, match=r"patterns\['1'\]: expected shape \(41, 36\), got \(40, 36\)"):
            resumed.load_state_dict(cycle.state_dict())
        with pytest.raises(ValueError, match="phase: expected one of fine, coarse, got 'warm'"):
            resumed.load_state_dict({**cycle.state_dict(), "phase": "warm"})
        assert repr(other) == before
        assert resumed.phase == "fine"


def test_in_the_place_of_the_optimizers_step():
    """``optimizer.step = cycle.step``, as training loops of others need it."""
    (model, batches), (twin, _) = make("mlp", torch.float64), make("mlp", torch.float64)
    twin.load_state_dict(model.state_dict())
    optimizer, cycle = build(model, 2, ALWAYS)
    other, plain_cycle = build(twin, 2, ALWAYS)
    optimizer.step = cycle.step
    for x, y in itertools.islice(itertools.cycle(batches), 7):
        for m, o, step in ((model, optimizer, optimizer.step), (twin, other, plain_cycle.step)):
            o.zero_grad()
            nn.functional.cross_entropy(m(x), y).backward()
            step()
    assert cycle.phase == plain_cycle.phase
    assert cycle.cycles == plain_cycle.cycles == 3
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        close(p.detach(), q.detach())
