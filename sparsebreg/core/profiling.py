"""Labels for ``torch.profiler``: what the package does stands in a profile as ``sparsebreg::<operation>``."""

import functools
from collections.abc import Callable
from typing import TypeVar

from torch.autograd import profiler

R = TypeVar("R")


def labelled(name: str) -> Callable[[Callable[..., R]], Callable[..., R]]:
    """Decorates a function: while a profiler runs, its calls are recorded as ``sparsebreg::name``.

    ``torch.profiler.record_function`` alone costs several µs even when nobody records; this check a fraction of one.
    """
    label = f"sparsebreg::{name}"

    def decorate(function: Callable[..., R]) -> Callable[..., R]:
        @functools.wraps(function)
        def call(*args, **kwargs):
            if profiler._is_profiler_enabled:
                with profiler.record_function(label):
                    return function(*args, **kwargs)
            return function(*args, **kwargs)

        return call

    return decorate
