"""What of a model is sparse: its frozen layers, and the active weights of all layers."""

import math
from collections.abc import Iterator

import torch
from torch import nn

from sparsebreg.core.selection import count_nonzero
from sparsebreg.nn.layer import SparseLayer, is_frozen
from sparsebreg.optim.groups import is_dense


def sparse_layers(model: nn.Module) -> dict[str, SparseLayer]:
    """The sparse layers of a model by qualified name."""
    return {n: m for n, m in model.named_modules() if is_frozen(m)}


def iter_weights(model: nn.Module) -> Iterator[tuple[str, int, int]]:
    """(name, active weights, all weights) of every linear and convolution layer, sparse or dense."""
    for name, module in model.named_modules():
        if is_frozen(module):
            yield name, module.pattern.nnz, math.prod(module.pattern.shape)
        elif is_dense(module):
            yield name, count_nonzero(module.weight), module.weight.numel()


def iter_masks(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, mask of the active weights) of every linear and convolution layer, sparse or dense."""
    for name, module in model.named_modules():
        if is_frozen(module):
            yield name, module.pattern.mask()
        elif is_dense(module):
            yield name, module.weight.detach() != 0
