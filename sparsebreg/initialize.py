"""Sparse starting points."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from sparsebreg.errors import check_real, expected
from sparsebreg.optim.base import REGULARISED

Filter = Callable[[nn.Module, str], bool]


@torch.no_grad()
def sparse_init_(
    model: nn.Module, density: float = 0.05, filter_fn: Filter | None = None, generator: torch.Generator | None = None
) -> nn.Module:
    """Makes the weights of linear and convolution layers sparse, in place, with the layers' output variance kept.

    Every weight is kept with probability ``density``; the kept ones are divided by √density, so that the variance of
    a weight, and with it that of the layer's output, is what the dense initialisation gave it. Biases stay.

    Source: Bungert et al., JMLR 23 (2022), section 4.1.

    Args:
        density: in (0, 1].
        filter_fn: called with (module, qualified name); layers for which it is false keep their weights.
        generator: random source; default: torch's.

    Returns:
        The model.

    Raises:
        TypeError, ValueError: for another density, or a model without such layers. Nothing is changed then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(expected("model", "a torch.nn.Module", type(model).__name__))
    density = check_real("density", density, low=0, strict=True, high=1)
    weights = {
        id(m.weight): m.weight
        for name, m in model.named_modules()
        if isinstance(m, REGULARISED) and (filter_fn is None or filter_fn(m, name))
    }
    if not weights:
        raise ValueError(expected("model", "linear or convolution layers", "a model without any"))
    for w in weights.values():
        keep = torch.rand(w.shape, generator=generator) < density
        w.mul_(keep.to(w.device, w.dtype) / density**0.5)
    return model
