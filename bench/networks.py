"""Times whole training steps: dense SGD, coarse and fine steps of ML-LinBreg, and a cycle with its swaps.

A step is zero_grad, forward, loss, backward and optimizer. Dense is the better of the plain and the channels_last
memory format. All take turns in one process; figures are medians. Usage: python bench/networks.py [--help]
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from tabulate import tabulate
from torch.nn import functional as F

import sparsebreg as sb

SHAPES = {"mlp": (1, 28, 28), "convnet": (1, 28, 28)}


class Steps:
    """Training steps of one model on one random batch."""

    def __init__(self, name, batch, density=None, coarse_steps=0, memory_format=torch.contiguous_format):
        torch.manual_seed(0)
        shape = SHAPES.get(name, (3, 32, 32))
        self.model = sb.models.MODELS[name](shape).to(memory_format=memory_format)
        self.x = torch.randn(batch, *shape).contiguous(memory_format=memory_format)
        self.y = torch.randint(10, (batch,))
        self.cycle = None
        if density is None:
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)
        else:
            sb.sparse_init_(self.model, density)
            # A small step: the density stays what it is.
            self.optimizer = sb.LinBreg(sb.param_groups(self.model, sb.L1(0.1)), lr=1e-4, momentum=0.9)
            self.cycle = sb.Multilevel(self.model, self.optimizer, coarse_steps)

    def __call__(self):
        begin = time.perf_counter()
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(self.x), self.y).backward()
        (self.cycle or self.optimizer).step()
        return 1e3 * (time.perf_counter() - begin)


def measure(name, batch, density, rounds):
    """Medians in ms: dense, coarse, fine (freeze and thaw included, half each)."""
    plain = Steps(name, batch)
    last = Steps(name, batch, memory_format=torch.channels_last)
    coarse, mixed = Steps(name, batch, density, 10**9), Steps(name, batch, density, 1)
    times = {"plain": [], "channels_last": [], "coarse": [], "pair": []}
    for i in range(rounds + 1):
        found = {"plain": plain(), "channels_last": last(), "coarse": coarse(), "pair": mixed() + mixed()}
        if i:
            for key, ms in found.items():
                times[key].append(ms)
    m = {key: statistics.median(ms) for key, ms in times.items()}
    return min(m["plain"], m["channels_last"]), m["coarse"], m["pair"] - m["coarse"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", default="resnet18", help="comma-separated: " + ", ".join(sb.models.MODELS))
    parser.add_argument("--sparsity", default="0.9,0.95,0.99")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    rows = []
    for name in options.models.split(","):
        for sparsity in map(float, options.sparsity.split(",")):
            dense, coarse, fine = measure(name, options.batch, 1 - sparsity, options.rounds)
            cycles = [(m * coarse + fine) / ((m + 1) * dense) for m in (9, 99)]
            rows.append((name, f"{sparsity:.0%}", dense, coarse, fine, dense / coarse, *cycles))
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {sb.info().isa}, batch {options.batch}")
    print(
        "a fine step with its freeze and thaw; a cycle of m coarse steps and a fine one as a part of dense SGD's time"
    )
    head = ("model", "sparsity", "dense ms", "coarse ms", "fine ms", "dense/coarse", "cycle, m=9", "cycle, m=99")
    print(tabulate(rows, head, floatfmt=("", "", ".0f", ".0f", ".0f", ".2f", ".2f", ".2f"), tablefmt="github"))


if __name__ == "__main__":
    main()
