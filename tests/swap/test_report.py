"""What the report of a swap says: why a layer is sparse or dense, what vanished, what unpacked."""

import copy

import torch
from swapping import ALWAYS
from torch import nn

import sparsebreg as sb


def test_report_says_why():
    model = nn.Sequential(
        nn.Linear(8, 8), nn.Linear(8, 8), nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), nn.Conv1d(2, 2, 1),
        nn.Linear(8, 8),
    )  # fmt: skip
    for i in (0, 2, 3, 4):
        model[i].weight.data.zero_()
    model.shared = nn.Linear(8, 8)
    model.shared.weight = model[4].weight
    report = sb.sparsify_(model, filter_fn=lambda m, name: name != "0")
    reasons = {r.name: r.reason for r in report.layers}
    assert reasons == {
        "0": "left out by filter_fn",
        "1": "sparsity 0.00% is below 80.00%",
        "2": "padding_mode 'circular' is not supported",
        "3": "Conv1d has no sparse form",
        "4": "shares its weight with another module",
        "shared": "shares its weight with another module",
    }
    assert not report.sparse
    text = str(report)
    for part in ("layer", "density", "why", "padding_mode 'circular'", "0 of 6 layers sparse"):
        assert part in text


def test_report_names_what_vanished_and_what_died():
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(3, 3))
    with torch.no_grad():
        model[0].weight[[1, 4]] = 0
        model[0].weight[:, 3] = 0
        model[2].weight[:, :2] = 0
        model[3].weight.zero_()
    report = sb.sparsify_(model, ALWAYS)
    assert [r.remaining for r in report.layers] == [(4, 27), (8, 4), (0, 0), (3, 3)]
    assert [r.name for r in report.dead] == ["3"]
    lines = str(report).splitlines()
    assert "no active weight is left in: 3" in lines
    assert "0: the pattern is 4x27 of 6x36 as a matrix" in lines
    assert "2: the pattern is 8x4 of 8x6 as a matrix" in lines
    assert sum("as a matrix" in line for line in lines) == 2


def test_report_names_operations_that_unpacked(on_native):
    class Odd(nn.Module):
        def forward(self, x):
            return torch.cumsum(x, 1)

    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), Odd(), nn.Conv2d(4, 4, 3))
    x = torch.randn(16, 2, 8, 8)
    earlier = sb.sparsify_(copy.deepcopy(model), ALWAYS)
    report = sb.sparsify_(model, ALWAYS)
    assert report.unpacked == {}
    assert "unpacked" not in str(report)
    with torch.no_grad():
        model(x)
        model(x)
    assert report.unpacked == {"cumsum": 2}
    assert earlier.unpacked == {}, "another model's"
    assert str(report).splitlines()[-1] == "unpacked lane tensors since the swap: cumsum (2 times)"
    sb.densify_(model)
    assert sb.sparsify_(model, ALWAYS).unpacked == {}
