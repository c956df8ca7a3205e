"""Labels in torch.profiler, and nothing of them while no profiler runs."""

import pytest
import torch
from torch import nn
from torch.autograd import profiler
from torch.profiler import ProfilerActivity, profile

import sparsebreg as sb
from sparsebreg import lanes
from sparsebreg.core import extension
from sparsebreg.core.profiling import labelled


def training():
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 3), nn.Flatten(),
        nn.Linear(144, 10),
    )  # fmt: skip
    sb.sparse_init_(model, 0.2)
    optimizer = sb.LinBreg(sb.param_groups(model, sb.L1(0.01)), lr=0.001)
    cycle = sb.Multilevel(model, optimizer, 2, sb.SparsifyConfig(decide="always"))

    def step():
        optimizer.zero_grad()
        model(torch.randn(16, 3, 8, 8)).square().mean().backward()
        cycle.step()

    return step


def test_labels_of_a_cycle(backend):
    step = training()
    with profile(activities=[ProfilerActivity.CPU]) as p:
        for _ in range(4):  # fine, coarse, coarse, fine
            step()
    counts = {e.key: e.count for e in p.key_averages()}
    # The native full gradient of a convolution brings that of the bias: then nothing is left to do for the first layer.
    wanted = {
        "conv2d": 8,
        "conv2d_backward": 6 if backend == "native" else 8,
        "linear": 4,
        "linear_backward": 4,
        "weight_grad": 6,
    }
    wanted |= {"plan": 2, "freeze": 2, "thaw": 1}
    if backend == "native":
        # Between the convolutions the norm and its gradient are never computed for themselves.
        wanted |= {"batch_norm": 4, "batch_norm_backward": 4, "norm_relu": None, "norm_grad": None}
    assert {n: counts.get(f"sparsebreg::{n}") for n in wanted} == wanted
    assert counts["Optimizer.step#LinBreg.step"] == 4


@pytest.mark.skipif(extension.native() is None, reason="lane tensors need the native extension")
def test_labels_of_conversions():
    with profile(activities=[ProfilerActivity.CPU]) as p:
        lanes.unpack(lanes.pack(torch.randn(20, 3)), 20)
    assert {e.key for e in p.key_averages() if "sparsebreg" in e.key} == {"sparsebreg::pack", "sparsebreg::unpack"}


def test_without_a_profiler_nothing_is_entered(monkeypatch):
    entered = []
    monkeypatch.setattr(profiler, "record_function", lambda name: entered.append(name))
    called = labelled("something")(lambda a, b: a - b)
    assert called(5, 3) == 2
    x = torch.randn(16, 5, requires_grad=True)
    pattern = sb.SparsePattern.from_mask(torch.rand(4, 5) < 0.5)
    values = torch.randn(pattern.nnz, requires_grad=True)
    sb.nn.functional.sparse_linear(x, pattern, values).sum().backward()
    assert not entered
