"""What all optimizers share: frozen phases, checkpoints, what torch's training tools expect, options."""

import copy
import io
import pickle

import plain
import pytest
import torch
from helpers import close
from torch import nn
from torch.nn import functional as F

import sparsebreg as sb

ALWAYS = sb.SparsifyConfig(decide="always")

#: (class, its options, the rule written down plainly)
OPTIMIZERS = {
    "linbreg": (sb.LinBreg, {"lr": 0.5, "momentum": 0.9, "delta": 0.8, "weight_decay": 0.01}, plain.LinBreg),
    "adabreg": (sb.AdaBreg, {"lr": 0.02, "eps": 1e-4, "delta": 0.8, "weight_decay": 0.01}, plain.AdaBreg),
    "adabreg_decoupled": (
        sb.AdaBreg,
        {"lr": 0.02, "eps": 1e-4, "weight_decay": 0.01, "decoupled_weight_decay": True},
        plain.AdaBreg,
    ),
    "proxsgd": (sb.ProxSGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}, plain.ProxSGD),
}
each = pytest.mark.parametrize("name", OPTIMIZERS)


def make(reg, dtype=torch.float64):
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5)
    )
    model = sb.sparse_init_(model.to(dtype), density=0.4)
    for p in model.parameters():
        if isinstance(reg, sb.L1NonNegative):
            p.data.abs_()
        if p.dim() > 1:
            p.data[0], p.data[:, 0] = 0, 0  # groups that are zero from the start
    x, y = torch.randn(16, 2, 6, 6, dtype=dtype), torch.randint(0, 5, (16,))
    return model, lambda m: F.cross_entropy(m(x), y)


def build(name, model, reg):
    cls, options, _ = OPTIMIZERS[name]
    return cls(sb.param_groups(model, reg), **options)


def run(model, optimizer, stepper, loss, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model).backward()
        stepper.step()


def dense_view(model, optimizer):
    """Name to (weight, state) of every parameter as dense tensors, whatever the phase."""
    view = {}
    for name, p in model.named_parameters():
        weight, state = p.detach(), dict(optimizer.state[p])
        if name.endswith(".values"):
            layer = model.get_submodule(name.removesuffix(".values"))
            aside = state.pop("frozen", {})
            weight = layer.weight
            for k in aside:
                state[k] = layer.pattern.scatter(state[k], aside[k].clone())
            name = name.removesuffix("values") + "weight"
        state.pop("active", None)
        view[name] = weight, state
    return view


@pytest.mark.parametrize("config", [ALWAYS, sb.SparsifyConfig(min_sparsity=1.0)], ids=["sparse", "masked"])
@pytest.mark.parametrize("reg", plain.REGS, ids=repr)
@pytest.mark.parametrize("name", [n for n in OPTIMIZERS if n != "adabreg_decoupled"])
def test_frozen_phases_equal_masked_dense_ones(name, reg, config):
    """Several cycles, with layers swapped or all kept dense: weights and all state agree after every step."""
    reg = reg if isinstance(reg, sb.NoReg) else reg.with_lam(3 * reg.lam)
    model, loss = make(reg)
    twin = copy.deepcopy(model)
    optimizer = build(name, model, reg)
    cycle = sb.Multilevel(model, optimizer, 5, config)
    _, options, rule = OPTIMIZERS[name]
    plainly = plain.Training(twin, rule(**options), reg, 5)
    frozen = 0
    for _ in range(13):
        run(model, optimizer, cycle, loss, 1)
        run(twin, twin, plainly, loss, 1)
        view = dense_view(model, optimizer)
        for key, p in twin.named_parameters():
            weight, state = view[key]
            close(weight, p.detach())
            for k, value in state.items():
                if isinstance(value, torch.Tensor):
                    close(value, plainly.state[key][k])
                else:
                    assert value == plainly.state[key][k]
            if cycle.phase == "coarse" and p.dim() > 1:
                frozen += int((~plainly.mask[key]).sum())
        assert bool(optimizer.patterns) == (config is ALWAYS and reg.sparse and cycle.phase == "coarse")
    if reg.sparse:
        assert frozen > 0
    else:
        assert not cycle.report.sparse


@pytest.mark.parametrize("config", [ALWAYS, sb.SparsifyConfig(min_sparsity=1.0)], ids=["sparse", "masked"])
@pytest.mark.parametrize("reg", [sb.L1(0.02), sb.GroupL2(0.01)], ids=repr)
@each
def test_memory_format_of_the_weights_does_not_matter(name, reg, config):
    weights = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model, loss = make(reg)
        model.to(memory_format=memory_format)
        optimizer = build(name, model, reg)
        ml = sb.Multilevel(model, optimizer, coarse_steps=3, config=config)
        run(model, optimizer, ml, loss, 14)
        ml.thaw()
        weights.append([p.detach() for p in model.parameters()])
        assert model[0].weight.is_contiguous(memory_format=memory_format)
    for a, b in zip(*weights, strict=True):
        close(b, a)


@pytest.mark.parametrize("reg", [sb.L1(0.02), sb.L1GroupL2(0.01)], ids=repr)
@each
def test_freezing_before_the_first_step(name, reg):
    """State that starts while the pattern is frozen is that of the dense weight."""
    model, loss = make(reg)
    twin = copy.deepcopy(model)
    optimizer = build(name, model, reg)
    sb.sparsify_(model, ALWAYS, optimizer=optimizer)
    _, options, rule = OPTIMIZERS[name]
    plainly = plain.Training(twin, rule(**options), reg)
    plainly.mask, plainly.left = {n: p != 0 for n, p in twin.named_parameters()}, 4
    run(model, optimizer, optimizer, loss, 4)
    run(twin, twin, plainly, loss, 4)
    sb.densify_(model, optimizer)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        close(p.detach(), q.detach())
    assert not optimizer.patterns


@pytest.mark.parametrize(
    "reg", [sb.L1(0.02), sb.GroupL2(0.02, "channels"), sb.L1GroupL2(0.01, "kernels"), sb.NuclearNorm(0.05)], ids=repr
)
@pytest.mark.parametrize("how", ["state_dict", "state_dict_optimizer_first", "deepcopy", "pickle"])
@pytest.mark.parametrize("name", [n for n in OPTIMIZERS if n != "adabreg_decoupled"])
def test_resumed_inside_a_frozen_phase(name, how, reg):
    model, loss = make(reg)
    optimizer = build(name, model, reg)
    cycle = sb.Multilevel(model, optimizer, 4, ALWAYS)
    run(model, optimizer, cycle, loss, 8)
    assert cycle.phase == "coarse"
    if how == "deepcopy":
        twin, other, resumed = copy.deepcopy((model, optimizer, cycle))
    elif how == "pickle":
        twin, other, resumed = pickle.loads(pickle.dumps((model, optimizer, cycle)))
    else:
        buffer = io.BytesIO()
        torch.save([o.state_dict() for o in (model, optimizer, cycle)], buffer)
        buffer.seek(0)
        states = torch.load(buffer, weights_only=True)
        twin, _ = make(reg)
        other = OPTIMIZERS[name][0](sb.param_groups(twin, sb.L1(9.0)), lr=9.0)
        resumed = sb.Multilevel(twin, other, 9, ALWAYS)
        objects = list(zip((twin, other, resumed), states, strict=True))
        for o, state in objects if how.endswith("first") else reversed(objects):
            o.load_state_dict(state)
    assert list(other.patterns.values()) == list(optimizer.patterns.values())
    assert bool(other.patterns) == reg.sparse
    run(model, optimizer, cycle, loss, 7)
    run(twin, other, resumed, loss, 7)
    ours, theirs = dense_view(model, optimizer), dense_view(twin, other)
    for key, (weight, state) in ours.items():
        assert torch.equal(theirs[key][0], weight)
        assert theirs[key][1].keys() == state.keys()
        for k, value in state.items():
            assert torch.equal(torch.as_tensor(theirs[key][1][k]), torch.as_tensor(value))


def test_reports_say_what_vanished():
    conv, linear, low = nn.Conv2d(3, 4, 2), nn.Linear(5, 6), nn.Linear(4, 4)
    conv.weight.data[[1, 2]], conv.weight.data[:, 0] = 0, 0
    linear.weight.data[:, 4] = 0
    linear.weight.data[0, 0] = 0
    model = nn.Sequential(conv, linear, low)
    groups = sb.param_groups(model, sb.GroupL2(0.1), {"2": sb.NuclearNorm(0.1)})
    report = sb.sparsify_(model, ALWAYS, optimizer=sb.LinBreg(groups))
    assert [r.empty for r in report.layers] == ["2 of 4 rows, 1 of 3 channels", "1 of 5 channels", ""]
    assert (model[0].pattern.empty_rows, model[0].pattern.empty_channels) == (2, 1)
    assert (model[1].pattern.empty_rows, model[1].pattern.empty_channels) == (0, 1)
    assert report.layers[2].reason == "NuclearNorm makes no zeros"
    assert "2 of 4 rows, 1 of 3 channels" in str(report)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (2, 0, 1, 1), (2, 3)])
def test_empty_patterns(shape):
    pattern = sb.SparsePattern.from_mask(torch.zeros(shape, dtype=torch.bool))
    assert (pattern.empty_rows, pattern.empty_channels) == shape[:2]
    for reg in filter(lambda r: r.sparse, plain.REGS):
        values = reg.restrict(pattern).prox(torch.zeros(0), 1.0)
        assert values.shape == (0,)


@each
def test_group_settings(name):
    """Every group moves by its own settings."""
    cls, options, rule = OPTIMIZERS[name]
    own = {**options, "lr": options["lr"] / 2, "weight_decay": 0.1}
    loss, start = plain.least_squares((4, 6))
    a, b = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizer = cls([{"params": [a]}, {"params": [b], "reg": sb.GroupL2(0.02), **own}], reg=sb.L1(0.02), **options)
    for _ in range(10):
        optimizer.zero_grad()
        (loss(a) + loss(b)).backward()
        optimizer.step()
    for p, settings, reg in ((a, options, sb.L1(0.02)), (b, own, sb.GroupL2(0.02))):
        twin = nn.Parameter(start.clone())
        model = nn.ParameterDict({"w": twin})
        plainly = plain.Training(model, rule(**settings), reg)
        run(model, model, plainly, lambda m: loss(m["w"]), 10)
        close(p.detach(), twin.detach())


@each
def test_many_parameters_at_once(name, monkeypatch):
    """Updated together or one by one, with some gradients missing: the same."""
    reg = sb.L1GroupL2(0.01)
    results = []
    for batch in (0, 30, 1 << 15):
        monkeypatch.setattr("sparsebreg.optim.base._BATCH", batch)
        model, loss = make(reg)
        optimizer = build(name, model, reg)
        for i in range(6):
            optimizer.zero_grad()
            loss(model).backward()
            if i % 2:
                model[2].bias.grad = model[0].weight.grad = None
            optimizer.step()
        results.append([p.detach() for p in model.parameters()])
    for other in results[1:]:
        for p, q in zip(results[0], other, strict=True):
            assert torch.equal(p, q)


@pytest.mark.parametrize("reg", [sb.L1(0.1), sb.GroupL2(0.1)], ids=["native", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@each
def test_state_does_not_decay_into_subnormal_numbers(name, dtype, reg):
    """They make every later step many times slower."""
    tiny = torch.finfo(dtype).tiny
    p = torch.nn.Parameter(torch.zeros(3, 8, dtype=dtype))
    cls, options, _ = OPTIMIZERS[name]
    optimizer = cls([p], reg=reg, **{**options, "weight_decay": 0})
    p.grad = torch.ones_like(p)
    optimizer.step()
    kept = [k for k in ("momentum_buffer", "exp_avg", "exp_avg_sq") if k in optimizer.state[p]]
    assert kept
    for k in kept:
        optimizer.state[p][k][:] = torch.tensor([tiny, -tiny, tiny / 4, 8 * tiny, 0, 1, -1, 0.5], dtype=dtype).abs_()
        if k != "exp_avg_sq":
            optimizer.state[p][k][:, 1] *= -1
    p.grad = torch.zeros_like(p)
    optimizer.step()
    for k in kept:
        state, small = optimizer.state[p][k].abs(), torch.tensor([1, 1, 1, 0, 1, 0, 0, 0], dtype=torch.bool)
        assert (state[:, small] == (tiny if k == "exp_avg_sq" else 0)).all()
        assert (state[:, ~small] > tiny).all()


class TestTorchTools:
    @each
    def test_closure(self, name):
        reg = sb.L1(0.001)
        model, loss = make(reg)
        optimizer = build(name, model, reg)

        def closure():
            optimizer.zero_grad()
            value = loss(model)
            value.backward()
            return value

        losses = [optimizer.step(closure).item() for _ in range(30)]
        assert losses[-1] < losses[0]

    @each
    def test_schedulers(self, name):
        model, loss = make(sb.L1(0.01))
        optimizer = build(name, model, sb.L1(0.01))
        scheduler = torch.optim.lr_scheduler
        first = optimizer.param_groups[0]["lr"]
        warm = scheduler.LinearLR(optimizer, 0.5, total_iters=2)
        schedule = scheduler.SequentialLR(optimizer, [warm, scheduler.CosineAnnealingLR(optimizer, 4)], [2])
        seen = []
        for _ in range(6):
            seen.append(optimizer.param_groups[0]["lr"] / first)
            run(model, optimizer, optimizer, loss, 1)
            schedule.step()
        assert seen == pytest.approx([0.5, 0.75, 1.0, 0.8535533905932737, 0.5, 0.14644660940672627])
        cyclic = scheduler.OneCycleLR(optimizer, 0.1, total_steps=8)
        run(model, optimizer, optimizer, loss, 2)
        cyclic.step()
        group = optimizer.param_groups[0]
        assert group.get("momentum", group.get("betas", [0])[0]) < 0.95

    @each
    def test_no_step_at_lr_zero(self, name):
        loss, start = plain.least_squares((4, 6))
        w = nn.Parameter(start.clone())
        optimizer = OPTIMIZERS[name][0]([w], lr=0.0, reg=sb.L1GroupL2(0.1))
        for _ in range(3):
            loss(w).backward()
            optimizer.step()
        close(w.detach(), start)

    @each
    def test_accumulated_and_clipped_gradients(self, name):
        """Two halves of a batch, clipped, are the whole batch clipped; while the pattern is frozen too."""
        reg = sb.GroupL2(0.01)
        x, y = torch.randn(16, 2, 6, 6, dtype=torch.float64), torch.randint(0, 5, (16,))
        results = []
        for parts in (1, 2):
            model, _ = make(reg)
            optimizer = build(name, model, reg)
            cycle = sb.Multilevel(model, optimizer, 3, ALWAYS)
            for _ in range(6):
                optimizer.zero_grad()
                for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
                    (F.cross_entropy(model(a), b) / parts).backward()
                assert torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05) > 0.05
                cycle.step()
            cycle.thaw()
            results.append([p.detach() for p in model.parameters()])
        for p, q in zip(*results, strict=True):
            close(p, q)

    @each
    def test_grad_scaler(self, name):
        """float32 weights, computed in bfloat16, gradients scaled: a step with an overflow is left out."""
        model, _ = make(None, torch.float32)
        optimizer = build(name, model, sb.L1(0.01))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        x, y = torch.randn(16, 2, 6, 6), torch.randint(0, 5, (16,))
        for broken in (False, True):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                value = F.cross_entropy(model(x), y)
            scaler.scale(value).backward()
            if broken:
                model[0].weight.grad[0, 0] = float("inf")
            before = [p.detach().clone() for p in model.parameters()]
            scaler.step(optimizer)
            scaler.update()
            same = all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
            assert same == broken
            assert all(p.isfinite().all() for p in model.parameters())


class TestBadInput:
    @each
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_dtype(self, name, dtype):
        cls, w = OPTIMIZERS[name][0], nn.Parameter(torch.ones(2, 2))
        message = f"params: expected float32 or float64 parameters .*autocast.*, got {dtype}"
        optimizer = cls([w])
        with pytest.raises(TypeError, match=message):
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, 2, dtype=dtype))]})
        assert len(optimizer.param_groups) == 1
        w.data = w.data.to(dtype)
        w.grad = torch.ones_like(w)
        with pytest.raises(TypeError, match=message):
            optimizer.step()
        cls([nn.Parameter(torch.ones(2, 2, dtype=dtype), requires_grad=False)])

    @each
    @pytest.mark.parametrize("option", ["lr", "weight_decay"])
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
    def test_numbers(self, name, option, value):
        cls, p = OPTIMIZERS[name][0], nn.Parameter(torch.ones(2))
        with pytest.raises(ValueError, match=f"{option}: expected a finite number"):
            cls([p], **{option: value})
        with pytest.raises(ValueError, match=f"{option}: expected a finite number"):
            cls([{"params": [p], option: value}])

    @each
    def test_reg_and_sparse_gradients(self, name):
        cls, p = OPTIMIZERS[name][0], nn.Parameter(torch.ones(2, 2))
        with pytest.raises(TypeError, match=r"reg: expected a regularizer such as sparsebreg.L1\(0.05\), got 0.1"):
            cls([p], reg=0.1)
        p.grad = torch.eye(2).to_sparse()
        with pytest.raises(RuntimeError, match="grad: expected dense gradients, got a sparse one"):
            cls([p]).step()


def test_zero_grad():
    p, q = (nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = sb.LinBreg([{"params": [p]}, {"params": [q]}])
    (p + q).sum().backward()
    optimizer.zero_grad(set_to_none=False)
    assert [g.tolist() for g in (p.grad, q.grad)] == [[0, 0, 0]] * 2
    optimizer.zero_grad()
    assert p.grad is None
    assert q.grad is None
    with torch.profiler.profile() as profile:
        optimizer.zero_grad()
    assert "Optimizer.zero_grad#LinBreg.zero_grad" in {e.key for e in profile.key_averages()}


def test_copies_of_an_optimizer_gather_for_no_layer():
    model = sb.sparse_init_(nn.Sequential(nn.Linear(20, 30)), 0.1)
    optimizer = sb.LinBreg(sb.param_groups(model, sb.L1(0.1)))
    sb.Multilevel(model, optimizer, 0, sb.SparsifyConfig(decide="always"))
    assert list(optimizer.fine_layers) == [model[0].weight]
    assert not copy.deepcopy(optimizer).fine_layers
    assert not pickle.loads(pickle.dumps(optimizer)).fine_layers
