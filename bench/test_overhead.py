"""What Python and autograd cost around a layer: a chain of layers so small that their arithmetic takes about 1 µs each.

A round runs the chain; microseconds of a layer are in ``extra_info``. What belongs to no layer (the start of the
backward pass) is left out by subtracting a shorter chain.
"""

import time

import numpy as np
import pytest
import torch
from torch import nn

from sparsebreg.nn import SparseConv2d, SparseLinear

LENGTHS = (4, 24)
SHAPES = {"linear": (16, 16), "conv2d": (1, 4, 2, 2)}


def layer(kind, sparse):
    dense = nn.Linear(16, 16) if kind == "linear" else nn.Conv2d(4, 4, 3, padding=1)
    if not sparse:
        return dense
    cls = SparseLinear if kind == "linear" else SparseConv2d
    return cls.from_dense(dense, mask=torch.rand(dense.weight.shape) < 0.05)


@pytest.mark.parametrize("implementation", ["dense", "sparse"])
@pytest.mark.parametrize("kind", SHAPES)
def test_overhead(kind, implementation, benchmark):
    torch.manual_seed(0)
    chains = [nn.Sequential(*(layer(kind, implementation == "sparse") for _ in range(n))) for n in LENGTHS]
    x, grad = (torch.randn(SHAPES[kind]) for _ in range(2))
    x.requires_grad_()
    seconds = []

    def step():
        for chain in chains:
            start = time.perf_counter()
            y = chain(x)
            middle = time.perf_counter()
            y.backward(grad)
            seconds.append((middle - start, time.perf_counter() - middle))
            chain.zero_grad()
            x.grad = None

    benchmark.group = f"overhead {kind}"
    benchmark.pedantic(step, rounds=500, warmup_rounds=50)
    short, long = (np.median(seconds[len(LENGTHS) * 50 + i :: len(LENGTHS)], axis=0) for i in range(2))
    forward, backward = 1e6 * (long - short) / (LENGTHS[1] - LENGTHS[0])
    benchmark.extra_info.update(forward_us=round(forward, 1), backward_us=round(backward, 1))
    print(f"\n{kind} {implementation}: forward {forward:.1f} us, backward {backward:.1f} us a layer")
