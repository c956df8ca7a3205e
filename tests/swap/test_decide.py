"""Sparse or dense: decisions by prediction and by measurement, and what keeps runs the same."""

import copy
import math
import re

import pytest
import torch
from helpers import sparse_weight
from swapping import dear, write_costs
from torch import nn

import sparsebreg as sb
from sparsebreg.core.errors import SwapError
from sparsebreg.swap import costs, decide
from sparsebreg.swap.costs import SHIPPED
from sparsebreg.swap.decide import Decider


def fill(model, density):
    for m in model.modules():
        if isinstance(m, (nn.Linear, nn.Conv2d)):
            m.weight.data *= sparse_weight(m.weight.shape, density)[1]
    return model


def last(model):
    return model.to(memory_format=torch.channels_last)


def test_strided_pointwise_convolution_on_plain_tensors(on_native, one_thread):
    """Alone and between channels_last tensors it stays dense; other formats and neighbours make it worth while."""
    x = torch.randn(32, 40, 32, 32)
    last = x.contiguous(memory_format=torch.channels_last)

    def layer():
        return fill(nn.Conv2d(40, 64, 1, stride=2), 0.18)

    def report(model, x):
        return sb.sparsify_(model, sb.SparsifyConfig(example_input=x)).layers[0]

    alone = report(nn.Sequential(layer()), last)
    sparse, dense = map(float, re.fullmatch(r"(\S+) ms sparse, (\S+) ms dense predicted", alone.reason).groups())
    assert alone.action == "dense"
    assert sparse > dense
    assert report(nn.Sequential(layer()), x).action == "sparse"
    assert report(nn.Sequential(layer(), fill(nn.Conv2d(64, 64, 3), 0.15)), last).action == "sparse"
    few = report(nn.Sequential(layer(), fill(nn.Conv2d(64, 64, 3), 0.15)), last[:8])  # too few to fill the lanes
    assert few.action == "dense"


def test_layers_below_min_sparsity_stay_dense_whatever_is_predicted():
    model = nn.Sequential(fill(nn.Linear(512, 512), 0.15), fill(nn.Linear(512, 512), 0.05))
    reasons = [r.reason for r in sb.sparsify_(model, sb.SparsifyConfig(min_sparsity=0.9)).layers]
    assert re.fullmatch(r"sparsity 8\d\.\d\d% is below 90.00%", reasons[0])
    assert reasons[1] == "sparsity of at least 90.00%"


def test_above_min_sparsity_the_prediction_decides():
    """150 x 120: io makes dense the faster one down to a density that the formula gives."""
    (a, b, _), (dense_a, dense_b, _) = SHIPPED["linear"]["sparse"], SHIPPED["linear"]["dense"]
    density = (dense_a * 18000 + dense_b * 270 - b * 270) / a / 18000
    assert 0.05 < density < 0.2
    for factor, action in ((0.9, "sparse"), (1.1, "dense")):
        mask = torch.zeros(18000, dtype=torch.bool)
        mask[: round(factor * density * 18000)] = True
        model = nn.Sequential(nn.Linear(150, 120))
        model[0].weight.data *= mask.view(120, 150)
        report = sb.sparsify_(model, sb.SparsifyConfig(min_sparsity=0.5)).layers[0]
        assert report.action == action
        if action == "dense":
            assert report.reason.endswith(f"is below {1 - density:.2%}, from where on sparse is predicted faster")


def test_small_convolutions_are_sparse_even_if_predicted_slower(cache):
    write_costs(dear())
    model = nn.Sequential(nn.Conv2d(3, 16, 3), fill(nn.Conv2d(16, 64, 3), 0.01))
    report = sb.sparsify_(model, sb.SparsifyConfig(example_input=torch.randn(32, 3, 8, 8)))
    assert [r.action for r in report.layers] == ["sparse", "dense"]


def test_measurement_changes_nothing():
    model = nn.Sequential(
        fill(nn.Conv2d(4, 20, 3), 0.1), nn.BatchNorm2d(20), nn.Flatten(), fill(nn.Linear(720, 9), 0.1)
    )
    x = torch.randn(16, 4, 8, 8)
    model(x).sum().backward()
    model[1].eval()
    before = copy.deepcopy(model.state_dict()), [p.grad.clone() for p in model.parameters()], torch.get_rng_state()
    calls = []
    model.register_forward_hook(lambda *a: calls.append(a))
    decider = Decider(sb.SparsifyConfig(decide="measure", example_input=x))
    decider.look(model)
    decider.look(model)
    assert len(calls) == 1
    assert {n: i.shape for n, i in decider.inputs.items()} == {"0": (16, 4, 8, 8), "3": (16, 720)}
    for name in ("0", "3"):
        module = model.get_submodule(name)
        faster, reason = decider(name, module, sb.SparsePattern.from_nonzeros(module.weight))
        sparse, dense = map(float, re.fullmatch(r"(\S+) ms sparse, (\S+) ms dense measured", reason).groups())
        assert min(sparse, dense) > 0
        assert sparse <= dense if faster else sparse >= dense
    assert all(torch.equal(a, b) for a, b in zip(before[0].values(), model.state_dict().values(), strict=True))
    assert all(torch.equal(a, p.grad) for a, p in zip(before[1], model.parameters(), strict=True))
    assert torch.equal(torch.get_rng_state(), before[2])
    assert (model.training, model[1].training) == (True, False)
    assert not model[0]._forward_pre_hooks


def _measuring(monkeypatch, sparse, dense):
    asked = []

    def measure(module, pattern, x_shape, *ways):
        asked.append((round(pattern.density, 3), x_shape, ways))
        return sparse, dense

    monkeypatch.setattr(costs, "measure", measure)
    return asked


def _mask(density, shape=(40, 50)):
    return sb.SparsePattern.from_mask((torch.arange(math.prod(shape)) < density * math.prod(shape)).view(shape))


@pytest.mark.parametrize(
    ("times", "densities", "measured"),
    [
        ((1.0, 2.0), [0.1, 0.02, 0.12, 0.13, 0.16], [0.1, 0.13]),  # sparser is faster still
        ((2.0, 1.0), [0.1, 0.19, 0.09, 0.07, 0.06], [0.1, 0.07]),  # denser is slower still
    ],
)
def test_measured_again_only_where_the_answer_may_differ(times, densities, measured, monkeypatch):
    asked = _measuring(monkeypatch, *times)
    layer = nn.Linear(50, 40)
    decider = Decider(sb.SparsifyConfig(decide="measure", example_input=torch.randn(8, 50)))
    decider.look(nn.Sequential(layer))
    for density in densities:
        assert decider("0", layer, _mask(density))[0] == (times[0] < times[1])
    assert [a[0] for a in asked] == measured
    assert asked[0][1:] == ((8, 50), ("sparse", "dense"))
    assert decider("0", layer, _mask(0.3)) == (False, "sparsity 70.00% is below 80.00%")
    assert decider("1", nn.Linear(50, 40), _mask(0.1)) == (False, "the example input does not pass through it")


def test_fine_steps_follow_the_measurement(monkeypatch):
    _measuring(monkeypatch, 1.0, 2.0)
    layer = nn.Linear(50, 40)
    decider = Decider(sb.SparsifyConfig(decide="measure", example_input=torch.randn(8, 50)))
    decider.look(nn.Sequential(layer))
    assert decider.least_sparsity("0", layer) > 1
    decider("0", layer, _mask(0.1))
    assert decider.least_sparsity("0", layer) == pytest.approx(1 - 1.25 * 0.1)


def multilevel(config=None):
    torch.manual_seed(1)
    model = sb.sparse_init_(nn.Sequential(nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 4)), 0.1)
    optimizer = sb.LinBreg(sb.param_groups(model, sb.L1(0.01)), lr=1e-3)
    return model, sb.Multilevel(model, optimizer, 2, config)


def steps(model, ml, n, start=0):
    for i in range(start, start + n):
        ml.optimizer.zero_grad()
        g = torch.Generator().manual_seed(i)
        model(torch.randn(16, 200, generator=g)).square().mean().backward()
        ml.step()


def test_a_run_goes_on_with_the_costs_that_it_began_with(cache):
    model, ml = multilevel()
    steps(model, ml, 3)
    state = copy.deepcopy(ml.state_dict()), copy.deepcopy(model.state_dict()), copy.deepcopy(ml.optimizer.state_dict())
    write_costs(dear())
    steps(model, ml, 5, 3)
    assert ml.report.layers[0].action == "sparse"
    other, fresh = multilevel()
    steps(other, fresh, 1)
    assert fresh.report.layers[0].action == "dense"  # a new run decides by the new ones
    resumed, again = multilevel()
    again.load_state_dict(state[0])
    resumed.load_state_dict(state[1])
    again.optimizer.load_state_dict(state[2])
    steps(resumed, again, 5, 3)
    assert again.report.layers[0].action == "sparse"
    ml.thaw()
    again.thaw()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))


def test_decisions_load_with_weights_only_and_damaged_ones_are_refused(tmp_path):
    _, ml = multilevel()
    torch.save(ml.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    del state["decisions"]["costs"]["conv"]
    with pytest.raises(ValueError, match="decisions: expected costs and measurements as saved, got KeyError"):
        multilevel()[1].load_state_dict(state)
    del state["decisions"]  # a checkpoint of before
    multilevel()[1].load_state_dict(state)


def test_report_of_a_loaded_coarse_phase():
    model, ml = multilevel(sb.SparsifyConfig(min_sparsity=0.85))
    model[2].weight.data.fill_(0.5)
    steps(model, ml, 1)
    assert [r.action for r in ml.report.layers] == ["sparse", "dense"]
    _, other = multilevel()
    other.load_state_dict(ml.state_dict())
    for a, b in zip(ml.report.layers, other.report.layers, strict=True):
        assert (a.name, a.kind, a.shape, a.nnz, a.action) == (b.name, b.kind, b.shape, b.nnz, b.action)
        assert b.reason == "as in the checkpoint"


def test_measured_decisions_are_kept_with_a_run(monkeypatch):
    asked = _measuring(monkeypatch, 1.0, 2.0)
    config = sb.SparsifyConfig(decide="measure", example_input=torch.randn(16, 200))
    model, ml = multilevel(config)
    assert len(asked) == 2
    steps(model, ml, 7)
    assert [r.action for r in ml.report.layers] == ["sparse", "sparse"]
    assert len(asked) == 2
    _, other = multilevel(config)
    del asked[:]
    other.load_state_dict(ml.state_dict())
    assert other._decider.measured == ml._decider.measured
    model = nn.Sequential(nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 4))
    method = sb.SET(model, torch.optim.SGD(model.parameters(), 0.1), 0.1, config=config)
    other = copy.deepcopy(method)
    method._decider.measured = {"0": (0.25, 0.5)}
    other.load_state_dict(method.state_dict())
    assert other._decider.measured == {"0": (0.25, 0.5)}


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: sb.SparsifyConfig(decide="measure"),
            ValueError,
            "example_input: expected a batch .*'measure', got None",
        ),
        (
            lambda: sb.SparsifyConfig(example_input=[1]),
            TypeError,
            "example_input: expected a tensor or a tuple .* got list",
        ),
        (
            lambda: sb.SparsifyConfig(decide="guess"),
            ValueError,
            "decide: expected one of auto, measure, always, got 'guess'",
        ),
    ],
)
def test_wrong_options(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_example_input_that_does_not_fit_changes_nothing():
    model = nn.Sequential(fill(nn.Linear(6, 5), 0.1), nn.Dropout()).train()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(SwapError, match="example_input: expected a batch that the model takes, got mat1 and mat2"):
        sb.sparsify_(model, sb.SparsifyConfig(decide="measure", example_input=torch.randn(2, 7)))
    assert type(model[0]) is nn.Linear
    assert model[1].training
    assert not model[0]._forward_pre_hooks
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


def test_example_input_of_several_arguments():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(30, 20), nn.Linear(20, 20)

        def forward(self, x, y):
            return self.second(self.first(x)) + self.second(y)

    found = decide.learn_inputs(Two(), (torch.randn(4, 30), torch.randn(2, 4, 20)))
    assert {n: i.shape for n, i in found.items()} == {"first": (4, 30), "second": (2, 4, 20)}
