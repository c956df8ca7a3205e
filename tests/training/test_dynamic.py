"""Dynamic sparse training and pruning: against masked dense training in plain torch, step by step."""

import copy
import io
import math

import pytest
import torch
from helpers import close
from torch import nn
from torch.nn import functional as F

import sparsebreg as sb
from sparsebreg.core.errors import SwapError

ALWAYS = sb.SparsifyConfig(decide="always")
MIXED = sb.SparsifyConfig(min_sparsity=0.85)  # some layers stay dense and are masked

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.2),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
}


def make(kind="mlp", dtype=torch.float64):
    torch.manual_seed(1)
    if kind == "mlp":
        model, shape = sb.models.mlp((1, 6, 6), hidden=(40, 30)), (1, 6, 6)
    else:
        model, shape = sb.models.convnet((1, 16, 16), channels=4), (1, 16, 16)
    g = torch.Generator().manual_seed(2)
    batches = [
        (torch.randn(20, *shape, generator=g).to(dtype), torch.randint(0, 10, (20,), generator=g)) for _ in range(5)
    ]
    return model.to(dtype), batches


def run(model, optimizer, method, batches, steps, start=0):
    for i in range(start, start + steps):
        x, y = batches[i % len(batches)]
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        method.step()


def layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d, sb.nn.SparseLayer))}


class Masked:
    """Masks, dense tensors and the rules in words: the twin of the methods."""

    def __init__(self, model, optimizer, masks, rule):
        self.model, self.optimizer, self.rule = model, optimizer, rule
        self.masks = {n: m.clone() for n, m in masks.items()}
        self.n = 0
        self.clean(self.masks)

    @torch.no_grad()
    def clean(self, kept):
        for name, mask in kept.items():
            weight = self.model.get_submodule(name).weight
            weight[~mask] = 0
            for value in self.optimizer.state.get(weight, {}).values():
                if torch.is_tensor(value) and value.shape == weight.shape:
                    value[~mask] = 0

    @torch.no_grad()
    def step(self):
        self.n += 1
        new, moves = self.rule(self)
        if moves:
            for name, mask in self.masks.items():
                self.model.get_submodule(name).weight.grad[~mask] = 0
            self.optimizer.step()
            new, _ = self.rule(self)
        if new is not None:
            self.clean({n: self.masks[n] & m for n, m in new.items()})
            self.masks = new


def top(score, count):
    """The places of the largest scores, by a full sort."""
    order = score.flatten().argsort(descending=True, stable=True)[:count]
    return torch.zeros(score.numel(), dtype=torch.bool).scatter(0, order, True).view(score.shape)


def compare(model, method, twin, steps, batches, optimizer, other, forced=None):
    phases = []
    for i in range(steps):
        phases.append(method.phase)
        run(model, optimizer, method, batches, 1, i)
        if forced:
            forced()
        run(twin.model, other, twin, batches, 1, i)
        for name, layer in layers(model).items():
            close(layer.weight.detach(), twin.model.get_submodule(name).weight.detach())
            assert torch.equal(method.masks[name], twin.masks[name])
            assert not layer.weight.detach()[~method.masks[name]].any()
    return phases


def rigl_rule(every, fraction, stop):
    def rule(twin):
        if twin.n % every or twin.n >= stop:
            return None, True
        new = {}
        for name, mask in twin.masks.items():
            w = twin.model.get_submodule(name).weight
            active = int(mask.sum())
            drop = int(fraction / 2 * (1 + math.cos(math.pi * twin.n / stop)) * active)
            keep = top(w.abs().masked_fill(~mask, -1), active - drop)
            new[name] = keep | top(w.grad.abs().masked_fill(keep, -1), drop)
        return new, False

    return rule


@pytest.mark.parametrize("config", [ALWAYS, MIXED], ids=["all_sparse", "some_stay_dense"])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("kind", ["mlp", "convnet"])
def test_rigl_equals_masked_dense_training(kind, name, config):
    model, batches = make(kind)
    twin = copy.deepcopy(model)
    optimizer, other = OPTIMIZERS[name](model.parameters()), OPTIMIZERS[name](twin.parameters())
    method = sb.RigL(model, optimizer, 0.15, update_every=6, drop_fraction=0.4, stop_after=40, config=config)
    assert bool(method.report.dense) == (config is MIXED)
    start = {n: m.clone() for n, m in method.masks.items()}
    masked = Masked(twin, other, start, rigl_rule(6, 0.4, 40))
    phases = compare(model, method, masked, 45, batches, optimizer, other)
    assert [i + 1 for i, p in enumerate(phases) if p == "fine"] == [6, 12, 18, 24, 30, 36]
    for n, mask in start.items():
        assert int(mask.sum()) == int(method.masks[n].sum())
    assert any(not torch.equal(start[n], method.masks[n]) for n in start)


def test_a_dropped_weight_that_grows_again_keeps_its_value():
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0, 1.0, 0.0, 0.0]]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    method = sb.RigL(model, optimizer, None, update_every=2, drop_fraction=0.5, config=ALWAYS)

    def step(grad):
        p = model[0].values if method.phase == "coarse" else model[0].weight
        p.grad = torch.tensor(grad)
        method.step()

    step([0.5, 0.5])
    assert method.phase == "fine"
    step([[0.0, 9.0, 1.0, 2.0]])
    assert method.masks["0"].tolist() == [[True, True, False, False]]
    assert model[0].weight.tolist() == [[3.0, 1.0, 0.0, 0.0]]
    assert optimizer.state[model[0].values]["momentum_buffer"].tolist() == [0.5, 0.5]
    step([0.5, 0.5])
    step([[0.0, 1.0, 9.0, 2.0]])
    assert model[0].weight.tolist() == [[3.0, 0.0, 0.0, 0.0]]
    assert model[0].pattern.mask().tolist() == [[True, False, True, False]]  # active, though zero
    assert optimizer.state[model[0].values]["momentum_buffer"][1] == 0


@pytest.mark.parametrize("config", [ALWAYS, MIXED], ids=["all_sparse", "some_stay_dense"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_set_equals_masked_dense_training(name, config):
    """The twin takes the grown places from the method, and checks what is not left to chance."""
    model, batches = make("convnet")
    twin = copy.deepcopy(model)
    optimizer, other = OPTIMIZERS[name](model.parameters()), OPTIMIZERS[name](twin.parameters())
    method = sb.SET(model, optimizer, 0.15, update_every=5, drop_fraction=0.3, distribution="uniform", config=config)
    chosen = {}

    def rule(twin):
        if twin.n % 5:
            return None, True
        if twin.moved == twin.n:
            for n, mask in twin.masks.items():
                w, active = twin.model.get_submodule(n).weight, int(mask.sum())
                keep = top(w.abs().masked_fill(~mask, -1), active - int(0.3 * active))
                assert not (keep & ~chosen[n]).any()  # the large ones stay
                assert int(chosen[n].sum()) == active
            return dict(chosen), True
        twin.moved = twin.n
        return None, True

    masked = Masked(twin, other, method.masks, rule)
    masked.moved = 0
    before = dict(method.masks)
    phases = compare(model, method, masked, 23, batches, optimizer, other, lambda: chosen.update(method.masks))
    assert all(not torch.equal(method.masks[n], m) for n, m in before.items())
    assert set(phases) == {"coarse"}


def test_set_grows_everywhere_alike():
    model = nn.Sequential(nn.Linear(50, 40))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    method = sb.SET(model, optimizer, 0.1, update_every=2, drop_fraction=1.0, config=ALWAYS)
    count = torch.zeros(40, 50)
    for _ in range(400):
        model[0].values.grad = torch.zeros_like(model[0].values)
        method.step()
        count += method.masks["0"]
    assert count.min() > 5
    assert abs(count.mean().item() - 40) < 1e-4
    assert count[:, :25].sum() == pytest.approx(count[:, 25:].sum().item(), rel=0.05)


@pytest.mark.parametrize("distribution", ["global", "uniform", "erk"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradual_pruning_equals_masked_dense_training(name, distribution):
    model, batches = make("mlp")
    twin = copy.deepcopy(model)
    optimizer, other = OPTIMIZERS[name](model.parameters()), OPTIMIZERS[name](twin.parameters())
    method = sb.GradualPruning(model, optimizer, 0.1, 4, 24, 5, distribution)
    final = dict.fromkeys(method.masks, 0.1) if distribution == "uniform" else sb.erk_densities(model, 0.1)

    def rule(twin):
        if twin.n not in (4, 9, 14, 19, 24):
            return None, True
        if twin.moved < twin.n:
            twin.moved = twin.n
            return None, True
        part = 1 - (1 - (twin.n - 4) / 20) ** 3
        scores = {n: twin.model.get_submodule(n).weight.abs().masked_fill(~m, -1) for n, m in twin.masks.items()}
        if distribution == "global":
            flat = torch.cat([s.flatten() for s in scores.values()])
            keep = top(flat, round((1 - 0.9 * part) * len(flat)))
            parts = keep.split([s.numel() for s in scores.values()])
            return {n: k.view(s.shape) for (n, s), k in zip(scores.items(), parts, strict=True)}, True
        return {n: top(s, round((1 - (1 - final[n]) * part) * s.numel())) for n, s in scores.items()}, True

    masked = Masked(twin, other, method.masks, rule)
    masked.moved = 0
    phases = compare(model, method, masked, 30, batches, optimizer, other)
    assert phases == ["fine"] * 4 + ["coarse"] * 26
    assert method.density() == pytest.approx(0.1, abs=1e-3)
    assert len(method.report.sparse) > 0


def test_prune_then_fine_tune():
    model, batches = make("mlp")
    twin = copy.deepcopy(model)
    optimizer, other = (OPTIMIZERS["momentum"](m.parameters()) for m in (model, twin))
    method = sb.Prune(model, optimizer, 0.2, at=7, config=ALWAYS)
    run(model, optimizer, method, batches, 7)
    run(twin, other, other, batches, 7)
    weights = torch.cat([m.weight.detach().abs().flatten() for m in layers(twin).values()])
    bound = weights.kthvalue(len(weights) - round(0.2 * len(weights))).values
    patterns = {}
    for name, layer in layers(model).items():
        dense = twin.get_submodule(name).weight.detach()
        close(layer.weight, dense * (dense.abs() > bound))
        patterns[name] = layer.pattern
    run(model, optimizer, method, batches, 8)
    assert method.phase == "coarse"
    assert all(layer.pattern is patterns[n] for n, layer in layers(model).items())
    method.finish()
    assert all(isinstance(m, (nn.Linear, nn.Conv2d)) for m in layers(model).values())
    assert sum(int(m.weight.count_nonzero()) for m in layers(model).values()) <= round(0.2 * len(weights))


BUILD = {
    "rigl": lambda m, o: sb.RigL(m, o, 0.15, update_every=4, stop_after=30, config=MIXED),
    "set": lambda m, o: sb.SET(m, o, 0.15, update_every=4, config=MIXED),
    "gradual": lambda m, o: sb.GradualPruning(m, o, 0.1, 2, 14, 4, config=MIXED),
    "prune": lambda m, o: sb.Prune(m, o, 0.1, at=5, config=MIXED),
}


@pytest.mark.parametrize("steps", [3, 4, 6])
@pytest.mark.parametrize("kind", BUILD)
@pytest.mark.parametrize("name", ["momentum", "adam"])
def test_resumed_run_is_bit_identical(name, kind, steps, one_thread):
    model, batches = make("mlp")
    optimizer = OPTIMIZERS[name](model.parameters())
    method = BUILD[kind](model, optimizer)
    run(model, optimizer, method, batches, steps)
    buffer = io.BytesIO()
    torch.save([o.state_dict() for o in (method, model, optimizer)], buffer)
    buffer.seek(0)
    states = torch.load(buffer, weights_only=True)
    twin, _ = make("mlp")
    other = OPTIMIZERS[name](twin.parameters())
    resumed = BUILD[kind](twin, other)
    for o, state in zip((resumed, twin, other), states, strict=True):
        o.load_state_dict(state)
    assert resumed.phase == method.phase
    run(model, optimizer, method, batches, 12, steps)
    run(twin, other, resumed, batches, 12, steps)
    for n, p in model.state_dict().items():
        assert torch.equal(p, twin.state_dict()[n])
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        for k, v in optimizer.state[a].items():
            if torch.is_tensor(v):
                assert torch.equal(v, other.state[b][k])
    assert all(torch.equal(m, resumed.masks[n]) for n, m in method.masks.items())


def test_distribution_per_layer():
    model, _ = make("convnet")
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    method = sb.RigL(model, optimizer, 0.1, distribution="erk")
    method.finish()
    for name, density in sb.erk_densities(model, 0.1).items():
        assert int(method.masks[name].sum()) == round(density * method.masks[name].numel())
    model, _ = make("mlp")
    method = sb.SET(model, OPTIMIZERS["sgd"](model.parameters()), 0.5, distribution={"3": 0.25})
    assert list(method.masks) == ["3"]
    assert int(method.masks["3"].sum()) == 300


def test_closure(backend):
    model, batches = make("mlp")
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    method = sb.RigL(model, optimizer, 0.3, update_every=5)
    twin, _ = make("mlp")
    other = OPTIMIZERS["momentum"](twin.parameters())
    plain = sb.RigL(twin, other, 0.3, update_every=5)
    for i in range(12):
        x, y = batches[i % 5]

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        loss = method.step(closure)
        run(twin, other, plain, batches, 1, i)
        assert loss.item() > 0
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        close(a.detach(), b.detach())


def test_learning():
    model, batches = make("mlp")
    optimizer = OPTIMIZERS["adam"](model.parameters())
    method = sb.RigL(model, optimizer, 0.2, update_every=10)
    first = sum(F.cross_entropy(model(x), y).item() for x, y in batches)
    run(model, optimizer, method, batches, 150)
    assert sum(F.cross_entropy(model(x), y).item() for x, y in batches) < 0.2 * first


class TestMasks:
    """``sparsify_`` with masks."""

    def test_active_zeros_stay_active(self):
        model = nn.Sequential(nn.Linear(3, 2))
        mask = torch.tensor([[True, False, True], [False, False, True]])
        with torch.no_grad():
            model[0].weight.copy_(torch.tensor([[1.0, 0, 0], [0, 0, 2]]))
        report = sb.sparsify_(model, ALWAYS, masks={"0": mask})
        assert report.sparse[0].nnz == 3
        assert torch.equal(model[0].pattern.mask(), mask)
        assert model[0].values.tolist() == [1.0, 0.0, 2.0]

    def test_dense_weights_of_bregman_optimizers_keep_to_the_mask(self):
        model = nn.Sequential(nn.Linear(3, 2, bias=False))
        mask = torch.tensor([[True, False, True], [False, False, True]])
        with torch.no_grad():
            model[0].weight.copy_(torch.tensor([[1.0, 0, 0], [0, 0, 2]]))
        optimizer = sb.LinBreg(model.parameters(), lr=1.0, reg=sb.L1(0.1))
        sb.sparsify_(model, filter_fn=lambda m, n: False, optimizer=optimizer, masks={"0": mask})
        model[0].weight.grad = torch.ones(2, 3)
        optimizer.step()
        assert torch.equal(model[0].weight != 0, mask)

    @pytest.mark.parametrize(
        ("masks", "error", "message"),
        [
            ({"1": torch.ones(2, 3, dtype=torch.bool)}, ValueError, "masks: expected names of linear"),
            (
                {"0": torch.ones(3, 2, dtype=torch.bool)},
                ValueError,
                r"masks\['0'\]: expected shape \(2, 3\), got \(3, 2",
            ),
            ({"0": torch.ones(2, 3)}, TypeError, r"masks\['0'\]: expected a boolean tensor, got torch.float32"),
            ({"0": torch.zeros(2, 3, dtype=torch.bool)}, ValueError, r"masks\['0'\]: expected zero weights outside"),
        ],
    )
    def test_bad_masks_change_nothing(self, masks, error, message):
        model = nn.Sequential(nn.Linear(3, 2))
        with pytest.raises(error, match=message):
            sb.sparsify_(model, ALWAYS, masks=masks)
        assert isinstance(model[0], nn.Linear)


class TestBadInput:
    def test_optimizer(self):
        model, _ = make()
        with pytest.raises(TypeError, match=r"optimizer: expected an optimizer of torch.optim .*, got LinBreg"):
            sb.RigL(model, sb.LinBreg(model.parameters()))
        with pytest.raises(SwapError, match="optimizer: expected one that holds the parameter"):
            sb.SET(model, torch.optim.SGD([model[1].bias], lr=1.0), config=ALWAYS)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"density": 0}, "density: expected a finite number above 0"),
            ({"update_every": 1}, "update_every: expected an integer of at least 2"),
            ({"drop_fraction": 1.5}, "drop_fraction: expected"),
            ({"distribution": "er"}, "distribution: expected one of uniform, erk, got 'er'"),
            ({"distribution": {"9": 0.1}}, "distribution: expected names among 1, 3, 5, got '9'"),
        ],
    )
    def test_options(self, options, message):
        model, _ = make()
        with pytest.raises(ValueError, match=message):
            sb.RigL(model, torch.optim.SGD(model.parameters(), lr=1.0), **options)
        assert isinstance(model[1], nn.Linear)

    def test_pruning(self):
        model, _ = make()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        with pytest.raises(ValueError, match="end: expected an integer of at least 5, got 4"):
            sb.GradualPruning(model, optimizer, begin=5, end=4)
        with pytest.raises(ValueError, match="at: expected an integer of at least 1"):
            sb.Prune(model, optimizer, at=0)

    def test_state_of_another_model(self):
        model, _ = make()
        method = sb.SET(model, torch.optim.SGD(model.parameters(), lr=1.0))
        other = sb.models.mlp((1, 6, 6), hidden=(41, 30)).double()
        resumed = sb.SET(other, torch.optim.SGD(other.parameters(), lr=1.0))
        with pytest.raises(ValueError, match=r"masks\['\d'\]: expected shape"):
            resumed.load_state_dict(method.state_dict())

    def test_shared_weights(self):
        model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
        model[1].weight = model[0].weight
        with pytest.raises(SwapError, match="layers with weights of their own"):
            sb.SET(model, torch.optim.SGD(model.parameters(), lr=1.0))
