"""Levels inside the frozen pattern: against a plain masked implementation, their order, checkpoints, errors."""

import copy
import io
import itertools

import plain
import pytest
import torch
from helpers import close
from torch import nn
from torch.nn import functional as F

import sparsebreg as sb

ALWAYS = sb.SparsifyConfig(decide="always")
TWO = (sb.Level(3, 5, 0.5), sb.Level(1, 2, 0.3))
RULES = {
    "linbreg": (sb.LinBreg, plain.LinBreg, {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.001}),
    "adabreg": (sb.AdaBreg, plain.AdaBreg, {"lr": 5e-3}),
    "proxsgd": (sb.ProxSGD, plain.ProxSGD, {"lr": 0.1, "momentum": 0.9}),
}


def make(kind="mlp", levels=TWO, config=ALWAYS, rule="linbreg", coarse_steps=12, reg=sb.L1(0.01)):
    torch.manual_seed(1)
    shape = (1, 6, 6) if kind == "mlp" else (1, 16, 16)
    model = sb.models.mlp(shape, hidden=(40, 30)) if kind == "mlp" else sb.models.convnet(shape, channels=4)
    sb.sparse_init_(model.double(), density=0.2)
    g = torch.Generator().manual_seed(2)
    x, y = torch.randn(5, 20, *shape, generator=g).double(), torch.randint(0, 10, (5, 20), generator=g)
    optimizer = RULES[rule][0](sb.param_groups(model, reg), **RULES[rule][2])
    return model, optimizer, sb.Multilevel(model, optimizer, coarse_steps, config, levels=levels), (x, y)


def run(model, optimizer, stepper, data, steps, start=0):
    for i in range(start, start + steps):
        x, y = (t[i % len(t)] for t in data)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        stepper.step()


def weights(model):
    return [m.weight.detach() for m in model.modules() if hasattr(m, "weight")]


@pytest.mark.parametrize("levels", [TWO[:1], TWO, (*TWO, sb.Level(1, 1, 0.01))], ids=["one", "two", "three"])
@pytest.mark.parametrize("config", [ALWAYS, None], ids=["all_sparse", "some_stay_dense"])
@pytest.mark.parametrize(("kind", "rule"), [*(("mlp", r) for r in RULES), ("convnet", "linbreg")])
def test_equals_masked_dense_training(kind, rule, config, levels):
    """Weights after every step, and v and momentum at the end of cycles, are those of dense tensors and masks."""
    model, optimizer, cycle, data = make(kind, levels, config, rule)
    twin = sb.swap.carry_out.dense_copy(model)
    options = RULES[rule][2]
    plainly = plain.Training(
        twin, RULES[rule][1](**options), sb.L1(0.01), 12, [(v.every, v.steps, v.keep) for v in levels]
    )
    seen = set()
    for i in range(40):
        seen.add(cycle.level)
        run(model, optimizer, cycle, data, 1, i)
        run(twin, twin, plainly, data, 1, i)
        for ours, theirs in zip(weights(model), weights(twin), strict=True):
            close(ours, theirs)
        if cycle.phase == "fine":
            for name, p in model.named_parameters():
                for key, value in plainly.state[name].items():
                    if isinstance(value, torch.Tensor):
                        close(optimizer.state[p][key], value)
    assert seen == set(range(2 + len(levels)))


def test_order_of_the_levels():
    model, optimizer, cycle, data = make(coarse_steps=14)
    seen = []
    for i in range(31):
        seen.append(cycle.level)
        run(model, optimizer, cycle, data, 1, i)
    #        on the pattern, one level in and two; a period is 3 + 5 steps, one inside of it 1 + 2
    assert seen[:15] == [0, 1, 1, 1, 2, 3, 3, 2, 3, 1, 1, 1, 2, 3, 3]
    assert seen[15:30] == seen[:15]
    assert seen[30] == 0
    assert [d + 1 for d in plain.depths([(3, 5, 0), (1, 2, 0)], 14)] == seen[1:15]


def test_the_largest_weights_move_and_the_others_come_back():
    model, optimizer, cycle, data = make(levels=[sb.Level(2, 4, 0.25)])
    run(model, optimizer, cycle, data, 3)
    layer = model[1]
    assert cycle.level == 2
    before, dual = layer.values.detach().clone(), optimizer.state[layer.values]["dual"].clone()
    moment = optimizer.state[layer.values]["momentum_buffer"].clone()
    run(model, optimizer, cycle, data, 4, 3)
    moved = layer.values.detach() != before
    assert abs(int(moved.sum()) - len(before) / 4) < 1
    assert before[moved].abs().min() >= before[~moved].abs().max()
    state = optimizer.state[layer.values]
    assert torch.equal(state["dual"] != dual, moved)
    assert torch.equal(state["momentum_buffer"] != moment, moved)
    assert cycle.level == 1
    assert "active" not in state
    run(model, optimizer, cycle, data, 1, 7)
    assert (layer.values.detach() != before)[~moved].any()


@pytest.mark.parametrize("keep", [1.0, 1e-9])
def test_limits_of_keep(keep):
    """All weights: as without levels. Next to none: a single weight of every layer moves."""
    model, optimizer, cycle, data = make(levels=[sb.Level(2, 4, keep)])
    other, *rest, _ = make(levels=())
    run(model, optimizer, cycle, data, 3)
    before = model[1].values.detach().clone()
    run(model, optimizer, cycle, data, 4, 3)
    moved = int((model[1].values != before).sum())
    assert moved == (len(before) if keep == 1 else 1)
    run(other, *rest, data, 7)
    same = [torch.equal(a, b) for a, b in zip(weights(model), weights(other), strict=True)]
    if keep == 1:
        for a, b in zip(weights(model), weights(other), strict=True):
            close(a, b)
    else:
        assert not any(same)


@pytest.mark.parametrize("reg", [sb.L1(0.02), sb.L1NonNegative(0.02)], ids=repr)
def test_the_loss_falls_at_every_step(reg):
    """L(θ⁺) + D_sym/τ + (2 − δτ Lip)/(2δτ) ‖θ⁺ − θ‖² ≤ L(θ) with exact gradients, on every level and between them."""
    g = torch.Generator().manual_seed(5)
    x, target = torch.randn(40, 12, generator=g).double(), torch.randn(40, 6, generator=g).double()
    lip = 2 * torch.linalg.eigvalsh(x.T @ x)[-1].item() / target.numel()
    model = nn.Sequential(nn.Linear(12, 6, bias=False)).double()
    sb.sparse_init_(model, 0.4, generator=g)
    tau = 1 / lip
    optimizer = sb.LinBreg(sb.param_groups(model, reg), lr=tau)
    cycle = sb.Multilevel(model, optimizer, 11, ALWAYS, levels=TWO)
    seen = []
    for i in range(41):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), target)
        loss.backward()
        if i:  # before, there is no v
            state = optimizer.state[next(model.parameters())]
            v = state["dual"].clone()
            if "frozen" in state:
                v = model[0].pattern.scatter(v, state["frozen"]["dual"].clone())
            seen.append((cycle.level, loss.item(), model[0].weight.detach().clone(), v))
        cycle.step()
    for (_, old, theta, v), (_, new, theta_next, v_next) in itertools.pairwise(seen):
        d = theta_next - theta
        d_sym = ((v_next - v - d) * d).sum().item()
        assert d_sym >= -1e-12
        assert old - new - d_sym / tau - (2 - tau * lip) / (2 * tau) * d.square().sum().item() >= -1e-12
        close(plain.prox(reg, v_next, 1.0), theta_next)
    assert {level for level, *_ in seen} == {0, 1, 2, 3}


@pytest.mark.parametrize("how", ["state_dict", "optimizer_first", "deepcopy"])
@pytest.mark.parametrize("config", [ALWAYS, None], ids=["all_sparse", "some_stay_dense"])
@pytest.mark.parametrize("steps", [4, 5, 6, 7, 9, 13])
def test_resumed_run_is_bit_identical(steps, config, how, one_thread):
    model, optimizer, cycle, data = make(config=config)
    run(model, optimizer, cycle, data, steps)
    if how == "deepcopy":
        twin, other, resumed = copy.deepcopy((model, optimizer, cycle))
    else:
        buffer = io.BytesIO()
        torch.save([o.state_dict() for o in (model, optimizer, cycle)], buffer)
        buffer.seek(0)
        states = torch.load(buffer, weights_only=True)
        twin, other, resumed, _ = make(config=config)
        objects = [(other, states[1]), (resumed, states[2]), (twin, states[0])]
        for o, state in objects if how == "optimizer_first" else [objects[i] for i in (1, 2, 0)]:
            o.load_state_dict(state)
    assert resumed.level == cycle.level
    run(model, optimizer, cycle, data, 20, steps)
    run(twin, other, resumed, data, 20, steps)
    for a, b in zip(weights(model), weights(twin), strict=True):
        assert torch.equal(a, b)
    assert cycle.state_dict().keys() == resumed.state_dict().keys()
    assert cycle.level == resumed.level


def test_loading_a_fine_state_leaves_the_levels():
    model, optimizer, cycle, data = make()
    fine = copy.deepcopy([o.state_dict() for o in (cycle, model, optimizer)])
    run(model, optimizer, cycle, data, 6)
    assert cycle.level == 3
    for o, state in zip((cycle, model, optimizer), fine, strict=True):
        o.load_state_dict(state)
    assert cycle.level == 0
    assert not any("active" in s for s in optimizer.state.values())


def test_thaw_from_inside():
    model, optimizer, cycle, data = make()
    run(model, optimizer, cycle, data, 6)
    before = weights(model)
    cycle.thaw()
    assert cycle.level == 0
    assert isinstance(model[1], nn.Linear)
    assert not any("active" in s or "frozen" in s for s in optimizer.state.values())
    for a, b in zip(weights(model), before, strict=True):
        assert torch.equal(a, b)


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ((0, 1), ValueError, "every: expected an integer of at least 1, got 0"),
            ((1, 0), ValueError, "steps: expected an integer of at least 1, got 0"),
            ((1, 1, 0), ValueError, "keep: expected"),
            ((1, 1, 1.5), ValueError, "keep: expected"),
            ((1.5, 1), TypeError, "every: expected an integer"),
        ],
    )
    def test_level(self, options, error, message):
        with pytest.raises(error, match=message):
            sb.Level(*options)

    def test_levels(self):
        with pytest.raises(TypeError, match=r"levels: expected sparsebreg.Level, got float"):
            make(levels=[0.5])
        with pytest.raises(ValueError, match="levels: expected regularizers that are sums over single weights"):
            make(reg=sb.GroupL2(0.02))

    def test_state_of_other_levels(self):
        model, optimizer, cycle, data = make()
        run(model, optimizer, cycle, data, 6)
        state = cycle.state_dict()
        *_, one, _ = make(levels=TWO[:1])
        with pytest.raises(ValueError, match="inner: expected at most 1 levels, got 2"):
            one.load_state_dict(state)
        *_, other, _ = make()
        inner = [{**state["inner"][0], "1.values": torch.ones(3, dtype=torch.bool)}, state["inner"][1]]
        with pytest.raises(ValueError, match=r"inner\['1.values'\]: expected shape \(\d+,\), got \(3,\)"):
            other.load_state_dict({**state, "inner": inner})
        assert other.level == 0
