"""What a freeze will do, decided before anything is changed."""

import gc
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from sparsebreg.core.errors import SwapError, expected
from sparsebreg.core.pattern import SparsePattern
from sparsebreg.core.profiling import labelled
from sparsebreg.core.selection import count_nonzero
from sparsebreg.nn.layer import plain_class, unsupported
from sparsebreg.optim.base import BregmanOptimizer
from sparsebreg.optim.groups import dense_layers
from sparsebreg.optim.regularizers import NoReg
from sparsebreg.swap.decide import Decider, Filter
from sparsebreg.swap.inspect import sparse_layers
from sparsebreg.swap.report import LayerReport, SwapReport
from sparsebreg.swap.state import check_optimizer, held


def check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(expected("model", "a torch.nn.Module", type(model).__name__))
    parallel = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule")
    for name, module in model.named_modules():
        if any(c.__name__ in parallel for c in type(module).__mro__):
            where = f"'{name}' is a {type(module).__name__}" if name else f"a {type(module).__name__}"
            raise SwapError(expected("model", "a model that is not wrapped for data parallelism", where))
    if (wrapper := _wrapper_of(model)) is not None:
        wanted = "a model that is wrapped after its swap (sparsify_(model); model = DistributedDataParallel(model))"
        got = f"one that is inside of a {wrapper} already, which goes on reducing the old parameters"
        raise SwapError(expected("model", wanted, got))


def _wrapper_of(model: nn.Module) -> str | None:
    """The wrapper for data parallelism that holds the model or a part of it, where processes work together."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    parts = set(map(id, model.modules()))
    for found in gc.get_objects():  # a wrapper is known to nobody else
        wraps = any(c is nn.parallel.DistributedDataParallel for c in type(found).__mro__)
        if wraps and any(id(m) in parts for m in found.modules()):
            return type(found).__name__
    return None


@dataclass
class Plan:
    """What a freeze will do: patterns of the layers to swap and masks of the weights that stay dense, by name."""

    patterns: dict[str, SparsePattern]
    masks: dict[str, torch.Tensor]
    report: SwapReport
    able: list[str] = field(default_factory=list)  # layers that would be swapped if they were sparse enough


def _check_masks(model: nn.Module, masks: Mapping[str, torch.Tensor]) -> None:
    layers = dict(dense_layers(model))
    for name, mask in masks.items():
        if name not in layers:
            raise ValueError(expected("masks", "names of linear and convolution layers", repr(name)))
        weight = layers[name].weight
        if not isinstance(mask, torch.Tensor) or mask.dtype is not torch.bool:
            got = getattr(mask, "dtype", type(mask).__name__)
            raise TypeError(expected(f"masks['{name}']", "a boolean tensor", got))
        if mask.shape != weight.shape:
            raise ValueError(expected(f"masks['{name}']", f"shape {tuple(weight.shape)}", tuple(mask.shape)))
        if outside := count_nonzero(torch.where(mask, 0, weight.detach())):
            raise ValueError(expected(f"masks['{name}']", "zero weights outside of it", f"{outside} others"))


def _other_weights(model: nn.Module) -> list[LayerReport]:
    """Weights of two dimensions or more outside of linear and convolution layers: they stay dense."""
    listed = {id(m.weight) for _, m in dense_layers(model)}
    found = []
    for name, p in model.named_parameters():
        if not nn.parameter.is_lazy(p) and p.dim() > 1 and id(p) not in listed:
            kind = type(model.get_submodule(name.rpartition(".")[0])).__name__
            nnz = count_nonzero(p) if p.device.type == "cpu" else p.numel()
            found.append(LayerReport(name, kind, tuple(p.shape), nnz, "dense", f"{kind} has no sparse form"))
    return found


@labelled("plan")
def plan_freeze(
    model: nn.Module,
    decider: Decider,
    filter_fn: Filter | None,
    optimizer: torch.optim.Optimizer | None,
    masks: Mapping[str, torch.Tensor] | None = None,
) -> Plan:
    """Decides, and changes nothing. Raises SwapError where a swap is not possible."""
    check_model(model)
    masks = masks or {}
    _check_masks(model, masks)
    if sparse_layers(model):
        raise SwapError(
            expected("model", "dense layers only", "a model that already has sparse layers (densify_ first)")
        )
    if optimizer is not None:
        check_optimizer(optimizer)
    decider.look(model)
    groups = held(optimizer) if optimizer is not None else {}
    bregman = isinstance(optimizer, BregmanOptimizer)
    users = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    plan = Plan({}, {}, SwapReport())
    taken = set()
    for name, module in dense_layers(model):
        weight, kind = module.weight, plain_class(module).__name__
        if nn.parameter.is_lazy(weight):
            plan.report.layers.append(LayerReport(name, kind, (), 0, "dense", "not initialised yet"))
            continue
        reason = unsupported(module)
        pattern = None
        if weight.device.type == "cpu":
            pattern = SparsePattern.from_mask(masks[name]) if name in masks else SparsePattern.from_nonzeros(weight)
        group = groups.get(id(weight))
        if not reason and filter_fn is not None and not filter_fn(module, name):
            reason = "left out by filter_fn"
        if not reason and users[id(weight)] > 1:
            reason = "shares its weight with another module"
        if not reason and bregman and group is not None and not group["reg"].sparse:
            reg = type(group["reg"])
            if reg is NoReg and decider.at_any_density(module):
                pattern = SparsePattern.from_mask(torch.ones_like(weight, dtype=torch.bool))  # zeros may move
            else:
                reason = "not regularised" if reg is NoReg else f"{reg.__name__} makes no zeros"
        action = "dense"
        if not reason:
            plan.able.append(name)
            faster, reason = decider(name, module, pattern)
            action = "sparse" if faster else "dense"
        if action == "sparse":
            if optimizer is not None and group is None and weight.requires_grad:
                raise SwapError(
                    expected("optimizer", f"one that holds the parameter '{name}.weight'", "one without it")
                )
            plan.patterns[name] = pattern
            taken.add(id(weight))
        nnz = pattern.nnz if pattern is not None else weight.numel()
        empty = (pattern.empty_rows, pattern.empty_channels) if pattern is not None else ()
        plan.report.layers.append(LayerReport(name, kind, tuple(weight.shape), nnz, action, reason, *empty))
    plan.report.others.extend(_other_weights(model))
    if bregman:
        for name, p in model.named_parameters():
            group = groups.get(id(p))
            if group is not None and group["reg"].sparse and id(p) not in taken:
                layer, _, what = name.rpartition(".")
                mask = masks.get(layer) if what == "weight" else None
                plan.masks[name] = p.detach() != 0 if mask is None else mask.clone()
    return plan
