"""Prints how much faster sparse layers are than torch's dense ones, forward and backward together.

Dense is the better of the plain and the channels_last memory format. All take turns in one process, so that a slow
spell of the machine hits each of them; figures are medians. Usage: python bench/table.py [rounds]
"""

from __future__ import annotations

import statistics
import sys
import time

import torch
from layers import CONV2D, LINEAR
from tabulate import tabulate

import sparsebreg as sb

BATCH = 128
DENSITIES = (0.1, 0.05, 0.01)


def step_of(layer, x, grad):
    x = x.detach().requires_grad_()

    def step():
        x.grad = None
        layer.zero_grad()
        layer(x).backward(grad)

    return step


def candidates(dense, x):
    """(name, step) of the dense layer in its formats and of the sparse ones at every density."""
    grad = torch.randn_like(dense(x).detach())
    steps = [("dense", step_of(dense, x, grad))]
    if x.dim() == 4:
        last = torch.channels_last
        twin = torch.nn.Conv2d(
            dense.in_channels, dense.out_channels, dense.kernel_size, dense.stride, dense.padding
        ).to(memory_format=last)
        steps.append(("dense", step_of(twin, x.contiguous(memory_format=last), grad.contiguous(memory_format=last))))
    cls = sb.nn.SparseConv2d if x.dim() == 4 else sb.nn.SparseLinear
    for density in DENSITIES:
        sparse = cls.from_dense(dense, torch.rand_like(dense.weight) < density)
        assert torch.allclose(sparse(x), sparse.to_dense()(x), atol=1e-4)
        steps.append((density, step_of(sparse, x, grad)))
    return steps


def measure(steps, rounds):
    times = [[] for _ in steps]
    for i in range(rounds + 2):
        for (_, step), seconds in zip(steps, times, strict=True):
            begin = time.perf_counter()
            step()
            if i >= 2:
                seconds.append(time.perf_counter() - begin)
    best: dict = {}
    for (name, _), seconds in zip(steps, times, strict=True):
        best[name] = min(best.get(name, float("inf")), 1e3 * statistics.median(seconds))
    return best


def main(rounds: int) -> None:
    torch.manual_seed(0)
    rows = []
    for name, (i, o) in LINEAR.items():
        rows.append((name, measure(candidates(torch.nn.Linear(i, o), torch.randn(BATCH, i)), rounds)))
    for name, (ic, oc, kernel, stride, padding, size) in CONV2D.items():
        dense = torch.nn.Conv2d(ic, oc, kernel, stride, padding)
        rows.append((name, measure(candidates(dense, torch.randn(BATCH, ic, size, size)), rounds)))
    table = [
        (name, f"{best['dense']:.2f}", *(f"{best['dense'] / best[d]:.1f}" for d in DENSITIES)) for name, best in rows
    ]
    head = ("layer", "dense ms", *(f"{1 - d:.0%} sparse" for d in DENSITIES))
    print(tabulate(table, head, tablefmt="github", disable_numparse=True, colalign=("left",) + ("right",) * 4))
    facts = sb.info()
    print(f"\nbatch {BATCH}, float32, {facts.threads} threads, {facts.backend} {facts.isa}, torch {facts.torch}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 11)
