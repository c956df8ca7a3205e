"""Where the time of a training step goes, by the labels that the package and torch leave in a profile."""

import time
from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile

#: Names of operations, by the part of a step that they are; the innermost one that is listed counts.
PARTS: dict[str, tuple[str, ...]] = {
    "sparse products": tuple(
        f"sparsebreg::{n}" for n in ("conv2d", "conv2d_backward", "linear", "linear_backward")
    ),
    "dense products": (
        "aten::convolution", "aten::convolution_backward", "aten::mm", "aten::addmm", "sparsebreg::weight_grad",
    ),
    "norms": (
        *(f"sparsebreg::{n}" for n in ("batch_norm", "batch_norm_backward", "norm_relu", "norm_grad")),
        "aten::native_batch_norm", "aten::native_batch_norm_backward",
    ),
    "conversions": ("sparsebreg::pack", "sparsebreg::unpack"),
    "optimizer": ("Optimizer.step#",),
    "swap": ("sparsebreg::plan", "sparsebreg::freeze", "sparsebreg::thaw"),
}  # fmt: skip

#: Everything else: Python, autograd, small operations, and what the profiler itself costs.
REST = "the rest"


def _part(event: Any) -> str:
    while event is not None:
        for part, names in PARTS.items():
            if event.name.startswith(names):
                return part
        event = event.cpu_parent
    return REST


def breakdown(step: Callable[[], Any], calls: int = 3) -> dict[str, float]:
    """Milliseconds of a call of ``step`` by part, REST included; their sum is the time of a call under the profiler."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        begin = time.perf_counter()
        for _ in range(calls):
            step()
        total = 1e3 * (time.perf_counter() - begin)
    parts = dict.fromkeys((*PARTS, REST), 0.0)
    for event in recorded.events():
        parts[_part(event)] += 1e-3 * event.self_cpu_time_total
    parts[REST] += max(0.0, total - sum(parts.values()))  # between the operations
    return {name: ms / calls for name, ms in parts.items()}
