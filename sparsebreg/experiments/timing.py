"""Timing that is fair to all: one process, the same threads, turns."""

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from threadpoolctl import threadpool_limits

#: Seconds.
clock = time.perf_counter

#: Shorter steps are repeated within their turn until it lasts so long, in seconds.
TURN = 2e-3

#: Rows of the square matrices, and floats of the array, whose product and copy give the roofs.
GEMM = 2048
COPY = 1 << 26


def interleave(steps: Sequence[Callable[[], object]], budget: float, *, least: int = 5, most: int = 500) -> np.ndarray:
    """Seconds of every step in rounds A, B, C, A, B, C, ..., so that a slow spell of the machine hits all of them.

    Warmed up, and without garbage collection inside a round.

    Args:
        budget: rounds go on for so many seconds; at least ``least`` of them, at most ``most``.

    Returns:
        (rounds, steps), float64.
    """
    repeats = [1] * len(steps)

    def turn(k: int) -> float:
        begin = clock()
        for _ in range(repeats[k]):
            steps[k]()
        return (clock() - begin) / repeats[k]

    enabled = gc.isenabled()
    gc.collect()
    gc.freeze()  # what is there already need not be gone through between the rounds
    gc.disable()
    try:
        begin = clock()
        seconds = [turn(k) for k in range(len(steps))]
        if clock() - begin < budget / 4:
            seconds = [turn(k) for k in range(len(steps))]
        repeats = [min(100, max(1, math.ceil(TURN / max(s, 1e-9)))) for s in seconds]
        rounds = []
        begin = clock()
        while len(rounds) < least or (clock() - begin < budget and len(rounds) < most):
            rounds.append([turn(k) for k in range(len(steps))])
            gc.collect()
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()
    return np.array(rounds)


def quartiles(values: np.ndarray) -> dict[str, float]:
    """Median and quartiles by name."""
    return dict(zip(("q1", "median", "q3"), np.percentile(values, (25, 50, 75)).tolist(), strict=True))


@contextmanager
def threads(n: int) -> Iterator[None]:
    """torch and every OpenMP runtime that is loaded use n threads."""
    before = torch.get_num_threads()
    with threadpool_limits(n, user_api="openmp"):
        torch.set_num_threads(n)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def roofs(budget: float = 1.0) -> dict[str, float]:
    """What this machine reaches with the present threads: GF/s of a large product, GB/s (read + written) of a copy."""
    a, b, c = torch.rand(3, GEMM, GEMM)
    source, target = torch.rand(COPY), torch.empty(COPY)
    product, copy = interleave([lambda: torch.mm(a, b, out=c), lambda: target.copy_(source)], budget).T
    return {
        "gemm_gflops": 2e-9 * GEMM**3 / float(np.median(product)),
        "copy_gbs": 2e-9 * source.nbytes / float(np.median(copy)),
    }
