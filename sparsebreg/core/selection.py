"""Counting nonzero weights, and choosing the largest ones."""

import numpy as np
import torch

from sparsebreg.core.extension import native


def count_nonzero(weight: torch.Tensor) -> int:
    """How many entries are not zero; on the CPU in a fifth of the time of ``torch.count_nonzero``, or less."""
    weight = weight.detach()
    if not weight.is_cpu or weight.dtype not in (torch.float32, torch.float64, torch.bool):
        return int(weight.count_nonzero())
    if (C := native()) is not None and weight.is_contiguous() and weight.dtype is not torch.bool:
        return C.count_nonzeros(weight.numpy(), torch.get_num_threads())
    return int(np.count_nonzero(weight.numpy() != 0))


def kth_largest(values: torch.Tensor, k: int) -> float:
    """The k-th largest of a flat tensor of numbers, k from 1 on; NaN counts as the largest."""
    if values.is_cpu and values.dtype in (torch.float32, torch.float64):
        return float(np.partition(values.numpy(), len(values) - k)[len(values) - k])  # up to ten times faster
    return float(values.kthvalue(len(values) - k + 1).values)


def largest(score: torch.Tensor, count: int, among: torch.Tensor | None = None) -> torch.Tensor:
    """Boolean mask of the ``count`` largest entries; of equal ones the first. ``among``: of those in this mask only."""
    flat = score.detach().reshape(-1)
    places = None if among is None else among.reshape(-1).nonzero()[:, 0]
    pool = flat if places is None else flat[places]
    count = min(count, len(pool))
    if count == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    bound = kth_largest(pool, count)
    chosen = pool >= bound
    if (extra := count_nonzero(chosen) - count) > 0:
        chosen[(pool == bound).nonzero()[-extra:, 0]] = False
    if places is not None:
        chosen, inside = torch.zeros_like(flat, dtype=torch.bool), chosen
        chosen[places[inside]] = True
    return chosen.view(score.shape)
