"""Networks to swap, what must not change about them, and constants that decide against sparse layers."""

import copy

import torch
from helpers import sparse_weight
from torch import nn

import sparsebreg as sb
from sparsebreg.swap import costs

ALWAYS = sb.SparsifyConfig(decide="always")


def network(density=0.1, dtype=torch.float32):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2),
        nn.Flatten(), nn.Linear(72, 10),
    ).to(dtype)  # fmt: skip
    for m in model:
        if hasattr(m, "weight") and m.weight.dim() > 1:
            m.weight.data = sparse_weight(m.weight.shape, density, dtype)[0]
    return model


def train(model, optimizer, steps):
    g = torch.Generator().manual_seed(5)
    dtype = next(model.parameters()).dtype
    for _ in range(steps):
        x = torch.randn(4, 3, 8, 8, generator=g).to(dtype)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def snapshot(model, optimizer=None):
    state = copy.deepcopy(model.state_dict())
    return state, copy.deepcopy(optimizer.state_dict()) if optimizer else None, repr(model)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def dear(factor=1e6):
    """Constants with which sparse layers are never worth it."""
    return {
        kind: {how: (a * factor if how in costs.SPARSE else a, b, c) for how, (a, b, c) in table.items()}
        for kind, table in costs.SHIPPED.items()
    }


def write_costs(found):
    assert costs._write(found) is not None
