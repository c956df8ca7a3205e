"""Cycles of varying length, warm-up, several fine steps, and thaws that watch the loss."""

import io
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sparsebreg as sb

ALWAYS = sb.SparsifyConfig(decide="always")


def make(coarse_steps, **options):
    torch.manual_seed(1)
    model = sb.sparse_init_(sb.models.mlp((1, 4, 4), hidden=(20,)).double(), 0.3)
    optimizer = sb.LinBreg(sb.param_groups(model, sb.L1(0.02)), lr=0.2, momentum=0.9)
    return model, optimizer, sb.Multilevel(model, optimizer, coarse_steps, ALWAYS, **options)


def run(model, optimizer, cycle, steps, start=0):
    """Phases of the steps, as letters."""
    g = torch.Generator().manual_seed(3)
    x, y = torch.randn(10, 16, 1, 4, 4, generator=g).double(), torch.randint(0, 10, (10, 16), generator=g)
    phases = ""
    for i in range(start, start + steps):
        phases += cycle.phase[0]
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x[i % 10]), y[i % 10])
        loss.backward()
        cycle.step(loss=loss)
    return phases


def test_linear_coarse():
    assert [sb.LinearCoarse(2, 10, 5)(k) for k in range(8)] == [2, 4, 6, 8, 10, 10, 10, 10]
    assert [sb.LinearCoarse(9, 0, 4)(k) for k in range(6)] == [9, 6, 3, 0, 0, 0]
    assert sb.LinearCoarse(3, 7, 1)(0) == 3
    assert sb.LinearCoarse(3, 7, 1)(1) == 7


@pytest.mark.parametrize(
    ("options", "phases"),
    [
        ({"coarse_steps": sb.LinearCoarse(1, 3, 3)}, "fcfccfcccfcccf"),
        ({"coarse_steps": sb.LinearCoarse(3, 0, 4)}, "fcccfccfcfffff"),
        ({"coarse_steps": lambda k: 2 if k % 2 else 0}, "ffccffccffccff"),
        ({"coarse_steps": 2, "fine_steps": 3}, "fffccfffccfffc"),
        ({"coarse_steps": 2, "warmup": 4}, "fffffccfccfccf"),
        ({"coarse_steps": 1, "fine_steps": 2, "warmup": 1}, "fffcffcffcffcf"),
        ({"coarse_steps": 0, "fine_steps": 2, "warmup": 1}, "ffffffffffffff"),
    ],
    ids=["growing", "shrinking", "function", "fine_steps", "warmup", "both", "none"],
)
def test_phases(options, phases):
    model, optimizer, cycle = make(**options)
    assert run(model, optimizer, cycle, 14) == phases


def rule(losses, most, patience, threshold, smoothing):
    """Coarse steps until the thaw: the definition, with the whole history."""
    least, waited = math.inf, 0
    for k in range(1, min(most, len(losses)) + 1):
        weights = [smoothing ** (k - 1 - i) for i in range(k)]
        average = sum(w * x for w, x in zip(weights, losses, strict=False)) / sum(weights)
        if average < (1 - threshold) * least:
            least, waited = average, 0
        else:
            waited += 1
        if waited >= patience:
            return k
    return min(most, len(losses))


@pytest.mark.parametrize("smoothing", [0.0, 0.7])
@pytest.mark.parametrize("losses", [[5, 4, 3, 2, 1] * 2, [1.0] * 9, [3, 2, 2, 2, 1, 1, 1, 1, 1], [2, 1, 3, 0.5, 4, 5]])
def test_plateau(losses, smoothing):
    schedule = sb.PlateauCoarse(8, patience=3, threshold=0.05, smoothing=smoothing)
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    optimizer = sb.LinBreg(model.parameters(), lr=0.0, reg=sb.L1(0.1))
    cycle = sb.Multilevel(model, optimizer, schedule, ALWAYS)
    for _ in range(2):  # a new cycle starts afresh
        cycle.step()
        done = 0
        for loss in losses:
            done += 1
            cycle.step(loss=torch.tensor(float(loss)))
            if cycle.phase == "fine":
                break
        assert done == rule(losses, 8, 3, 0.05, smoothing)
        if cycle.phase == "coarse":
            cycle.thaw()


def test_plateau_takes_the_loss_of_a_closure_or_asks_for_it():
    model, _, cycle = make(sb.PlateauCoarse(50, patience=2, smoothing=0.0))
    cycle.step(lambda: 1.0)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(
        ValueError, match="loss: expected the loss of the step, or a closure, for PlateauCoarse, got None"
    ):
        cycle.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert [cycle.step(lambda: 1.0) for _ in range(3)] == [1.0] * 3
    assert cycle.phase == "fine"


@pytest.mark.parametrize("steps", [2, 4, 7, 12])
@pytest.mark.parametrize(
    "options",
    [
        {"coarse_steps": lambda: sb.LinearCoarse(1, 4, 4)},
        {"coarse_steps": lambda: sb.PlateauCoarse(6, patience=2, smoothing=0.5)},
        {"coarse_steps": lambda: 3, "fine_steps": 2, "warmup": 3},
    ],
    ids=["linear", "plateau", "warmup"],
)
def test_resumed_run_is_bit_identical(options, steps, one_thread):
    coarse, options = options["coarse_steps"], {k: v for k, v in options.items() if k != "coarse_steps"}
    model, optimizer, cycle = make(coarse(), **options)
    run(model, optimizer, cycle, steps)
    buffer = io.BytesIO()
    torch.save([o.state_dict() for o in (cycle, model, optimizer)], buffer)
    buffer.seek(0)
    twin, other, resumed = make(coarse(), **options)
    for o, state in zip((resumed, twin, other), torch.load(buffer, weights_only=True), strict=True):
        o.load_state_dict(state)
    assert run(twin, other, resumed, 15, steps) == run(model, optimizer, cycle, 15, steps)
    assert resumed.cycles == cycle.cycles
    for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("make_one", "error", "message"),
    [
        (lambda: sb.LinearCoarse(-1, 2, 3), ValueError, "start: expected an integer of at least 0"),
        (lambda: sb.LinearCoarse(1, 2, 0), ValueError, "cycles: expected an integer of at least 1"),
        (lambda: sb.PlateauCoarse(patience=0), ValueError, "patience: expected an integer of at least 1"),
        (lambda: sb.PlateauCoarse(smoothing=1), ValueError, "smoothing: expected a number below 1"),
        (lambda: make(lambda k: -1), ValueError, "coarse_steps: expected an integer of at least 0, got -1"),
        (lambda: make(lambda k: 1.5), TypeError, "coarse_steps: expected an integer, got 1.5"),
        (lambda: make(3, fine_steps=0), ValueError, "fine_steps: expected an integer of at least 1"),
        (lambda: make(3, warmup=-1), ValueError, "warmup: expected an integer of at least 0"),
    ],
)
def test_bad_input(make_one, error, message):
    with pytest.raises(error, match=message):
        make_one()
