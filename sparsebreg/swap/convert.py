"""Freezing and thawing: dense layers become sparse ones over their active weights, in place, and back.

The optimizer's state follows: what it keeps per weight is gathered at the active places; the rest is set aside in the
state (key ``frozen``) and comes back unchanged at the thaw (momentum only where the optimizer keeps it).
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

from sparsebreg.core.errors import SwapError, expected
from sparsebreg.core.pattern import SparsePattern, count_nonzero
from sparsebreg.core.profiling import labelled
from sparsebreg.nn import SparseLayer, kind, sparse_form, to_plain, to_swapped, unsupported
from sparsebreg.optim.base import REGULARISED, BregmanOptimizer
from sparsebreg.optim.regularizers import NoReg
from sparsebreg.swap.decide import Decider, Filter, SparsifyConfig


@dataclass(frozen=True)
class LayerReport:
    """What was done with one layer.

    ``action`` is "sparse" or "dense"; ``reason`` says why. Output rows and input channels without any active weight are
    counted in ``empty_rows`` and ``empty_channels``.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    nnz: int
    action: str
    reason: str
    empty_rows: int = 0
    empty_channels: int = 0

    @property
    def density(self) -> float:
        return self.nnz / max(1, math.prod(self.shape))

    @property
    def empty(self) -> str:
        """What vanished as a whole; an empty string where nothing did."""
        pairs = (("rows", self.empty_rows, self.shape[:1]), ("channels", self.empty_channels, self.shape[1:2]))
        return ", ".join(f"{n} of {of[0]} {what}" for what, n, of in pairs if n)

    @property
    def remaining(self) -> tuple[int, int]:
        """Rows and columns of the weight as a matrix, without its empty rows and channels."""
        rows, channels, *kernel = self.shape
        return rows - self.empty_rows, (channels - self.empty_channels) * math.prod(kernel)


@dataclass(frozen=True)
class SwapReport:
    """What a swap did, layer by layer; prints as a table.

    Below it stand layers that have no active weight left, matrices that have become smaller, and operations that
    unpacked lane tensors since the swap: print the report after a training step to see what a model should avoid.
    """

    layers: list[LayerReport] = field(default_factory=list)
    _unpacked: Counter[str] = field(default_factory=Counter, repr=False, compare=False)

    @property
    def sparse(self) -> list[LayerReport]:
        return [r for r in self.layers if r.action == "sparse"]

    @property
    def dense(self) -> list[LayerReport]:
        return [r for r in self.layers if r.action == "dense"]

    @property
    def dead(self) -> list[LayerReport]:
        """Layers without any active weight."""
        return [r for r in self.layers if r.shape and not r.nnz]

    @property
    def unpacked(self) -> dict[str, int]:
        """Operations that unpacked one of this model's lane tensors since the swap, by name, with how often they did."""
        return dict(self._unpacked)

    @property
    def density(self) -> float:
        """Active weights of all listed layers as a fraction of all their weights."""
        return sum(r.nnz for r in self.layers) / max(1, sum(math.prod(r.shape) for r in self.layers))

    def __str__(self) -> str:
        rows = [
            (r.name, r.kind, "x".join(map(str, r.shape)), f"{r.density:.2%}", r.empty, r.action, r.reason)
            for r in self.layers
        ]
        table = tabulate(rows, ("layer", "kind", "shape", "density", "empty", "now", "why"), disable_numparse=True)
        lines = [table, f"{len(self.sparse)} of {len(self.layers)} layers sparse, density {self.density:.2%}"]
        if self.dead:
            lines.append(f"no active weight is left in: {', '.join(r.name for r in self.dead)}")
        for r in self.layers:
            if r.nnz and r.empty:
                (rows, cols), whole = r.remaining, (r.shape[0], math.prod(r.shape[1:]))
                lines.append(f"{r.name}: the pattern is {rows}x{cols} of {whole[0]}x{whole[1]} as a matrix")
        if self.unpacked:
            found = ", ".join(f"{name} ({n} times)" for name, n in self.unpacked.items())
            lines.append(f"unpacked lane tensors since the swap: {found}")
        return "\n".join(lines)


class _Places:
    """Where every module of a model hangs, and which modules use a parameter."""

    def __init__(self, model: nn.Module) -> None:
        self.parents: dict[int, list[tuple[nn.Module, str]]] = {}
        self.users: dict[int, int] = {}
        for parent in model.modules():
            for name, child in parent._modules.items():
                if child is not None:
                    self.parents.setdefault(id(child), []).append((parent, name))
            for p in parent._parameters.values():
                if p is not None:
                    self.users[id(p)] = self.users.get(id(p), 0) + 1

    def replace(self, old: nn.Module, new: nn.Module) -> None:
        for parent, name in self.parents[id(old)]:
            parent._modules[name] = new
        self.parents[id(new)] = self.parents.pop(id(old))


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(expected("model", "a torch.nn.Module", type(model).__name__))
    parallel = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule")
    for name, module in model.named_modules():
        if any(c.__name__ in parallel for c in type(module).__mro__):
            where = f"'{name}' is a {type(module).__name__}" if name else f"a {type(module).__name__}"
            raise SwapError(expected("model", "a model that is not wrapped for data parallelism", where))


def sparse_layers(model: nn.Module) -> dict[str, SparseLayer]:
    """The sparse layers of a model by qualified name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, SparseLayer)}


def _held(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Any]]:
    """The group of every parameter that the optimizer holds, by id."""
    return {id(p): g for g in optimizer.param_groups for p in g["params"]}


@dataclass
class Plan:
    """What a freeze will do: patterns of the layers to swap and masks of the weights that stay dense, by name."""

    patterns: dict[str, SparsePattern]
    masks: dict[str, torch.Tensor]
    report: SwapReport
    able: list[str] = field(default_factory=list)  # layers that would be swapped if they were sparse enough


def _check_masks(model: nn.Module, masks: Mapping[str, torch.Tensor]) -> None:
    layers = {n: m for n, m in model.named_modules() if isinstance(m, REGULARISED)}
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


@labelled("plan")
def plan_freeze(
    model: nn.Module,
    decider: Decider,
    filter_fn: Filter | None,
    optimizer: torch.optim.Optimizer | None,
    masks: Mapping[str, torch.Tensor] | None = None,
) -> Plan:
    """Decides, and changes nothing. Raises SwapError where a swap is not possible."""
    _check_model(model)
    masks = masks or {}
    _check_masks(model, masks)
    if sparse_layers(model):
        raise SwapError(
            expected("model", "dense layers only", "a model that already has sparse layers (densify_ first)")
        )
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(expected("optimizer", "a torch.optim.Optimizer", type(optimizer).__name__))
    decider.look(model)
    groups = _held(optimizer) if optimizer is not None else {}
    bregman = isinstance(optimizer, BregmanOptimizer)
    places = _Places(model)
    plan = Plan({}, {}, SwapReport())
    taken = set()
    for name, module in model.named_modules():
        if not isinstance(module, REGULARISED):
            continue
        weight = module.weight
        if nn.parameter.is_lazy(weight):
            plan.report.layers.append(LayerReport(name, kind(module), (), 0, "dense", "not initialised yet"))
            continue
        reason = unsupported(module)
        pattern = None
        if weight.device.type == "cpu":
            pattern = SparsePattern.from_mask(masks[name]) if name in masks else SparsePattern.from_nonzeros(weight)
        group = groups.get(id(weight))
        if not reason and module is model:
            reason = "is the model itself and cannot be replaced in place"
        if not reason and filter_fn is not None and not filter_fn(module, name):
            reason = "left out by filter_fn"
        if not reason and places.users.get(id(weight), 0) > 1:
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
        plan.report.layers.append(LayerReport(name, kind(module), tuple(weight.shape), nnz, action, reason, *empty))
    if bregman:
        for name, p in model.named_parameters():
            group = groups.get(id(p))
            if group is not None and group["reg"].sparse and id(p) not in taken:
                layer, _, what = name.rpartition(".")
                mask = masks.get(layer) if what == "weight" else None
                plan.masks[name] = p.detach() != 0 if mask is None else mask.clone()
    return plan


def report_of(model: nn.Module, patterns: Mapping[str, SparsePattern], masks: Mapping[str, torch.Tensor]) -> SwapReport:
    """What a checkpoint brings: patterns of sparse layers and masks of parameters that stay dense, by name."""
    layers = []
    for name, module in model.named_modules():
        if isinstance(module, REGULARISED) and (name in patterns or f"{name}.weight" in masks):
            pattern = patterns.get(name) or SparsePattern.from_mask(masks[f"{name}.weight"])
            action = "sparse" if name in patterns else "dense"
            empty = pattern.empty_rows, pattern.empty_channels
            layers.append(
                LayerReport(name, kind(module), pattern.shape, pattern.nnz, action, "as in the checkpoint", *empty)
            )
    return SwapReport(layers)


@labelled("freeze")
def carry_out(
    model: nn.Module, plan: Plan, optimizer: torch.optim.Optimizer | None, *, keep_grads: bool = True
) -> None:
    """Swaps as planned. Everything that can fail is made before the first change."""
    layers = {name: sparse_form(model.get_submodule(name), pattern) for name, pattern in plan.patterns.items()}
    places = _Places(model)
    for name, layer in layers.items():
        module = model.get_submodule(name)
        weight = module.weight
        to_plain(module)
        to_swapped(module, layer)
        places.replace(module, layer)
        if optimizer is not None:
            _carry_state(optimizer, weight, layer)
        if keep_grads and weight.grad is not None:
            layer.values.grad = layer.pattern.gather(weight.grad)
        weight.grad = None
        weight.data = weight.data.new_empty(0)  # the memory is free until the thaw
    for name, mask in plan.masks.items():
        p = model.get_parameter(name)
        state = optimizer.state[p]  # type: ignore[union-attr]
        state["active"] = mask
        for key in _forgotten(optimizer, p):
            if key in state:
                state[key] *= mask


def sparsify_(
    model: nn.Module,
    config: SparsifyConfig | None = None,
    filter_fn: Filter | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    masks: Mapping[str, torch.Tensor] | None = None,
) -> SwapReport:
    """Freezes the pattern of nonzero weights: layers that are sparse enough become sparse layers, in place.

    Until :func:`densify_`, only the active weights are parameters. With an optimizer, its parameters and their state
    (momentum, dual variable, moments) follow. With one of this package's optimizers, regularised weights that stay
    dense are frozen too: their zeros do not move.

    Args:
        model: any module that is not wrapped for data parallelism.
        config: which layers; default: ``SparsifyConfig()``, which keeps layers dense that are predicted faster so.
        filter_fn: called with (module, qualified name); layers for which it is false stay dense.
        optimizer: the optimizer that trains the model, if there is one.
        masks: boolean, of the weight's shape, by layer name: the pattern of these layers, where active weights may be
            zero. Weights outside of a mask have to be zero.

    Returns:
        A report, layer by layer.

    Raises:
        TypeError, ValueError: for a mask that does not fit.
        SwapError: for a wrapped or already swapped model, an optimizer that does not hold a weight to be swapped, or an
        example input that the model does not take. Nothing is changed then.
    """
    plan = plan_freeze(model, Decider(config or SparsifyConfig()), filter_fn, optimizer, masks)
    carry_out(model, plan, optimizer)
    return plan.report


def densify_(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> SwapReport:
    """Thaws what :func:`sparsify_` froze: the very same dense modules and parameters are back, in place.

    Args:
        optimizer: the one that ``sparsify_`` was given, if any.

    Returns:
        A report, layer by layer.

    Raises:
        SwapError: if nothing is frozen, or the optimizer does not hold the sparse layers' values. Nothing is changed
        then.
    """
    _check_model(model)
    layers = sparse_layers(model)
    frozen = bool(layers) or (optimizer is not None and any("active" in s for s in optimizer.state.values()))
    if not frozen:
        raise SwapError(expected("model", "sparse layers", "a model without any"))
    if optimizer is not None:
        groups = _held(optimizer)
        for name, layer in layers.items():
            if layer.values.requires_grad and id(layer.values) not in groups:
                raise SwapError(
                    expected("optimizer", f"one that holds the parameter '{name}.values'", "one without it")
                )
    thaw(model, optimizer)
    return SwapReport(
        [LayerReport(n, type(m).__name__, m.pattern.shape, m.pattern.nnz, "dense", "thawed") for n, m in layers.items()]
    )


@labelled("thaw")
def thaw(model: nn.Module, optimizer: torch.optim.Optimizer | None, *, keep_grads: bool = True) -> None:
    """densify_ without its checks."""
    places = _Places(model)
    for layer in dict.fromkeys(sparse_layers(model).values()):
        dense = layer.give_back()
        weight = dense.weight
        weight.data = layer.weight
        if layer.channels_last:
            # Not contiguous(): with one input channel that would keep the plain strides, which tell torch otherwise.
            weight.data = weight.data.to(memory_format=torch.channels_last)
        if keep_grads and layer.values.grad is not None:
            weight.grad = layer.pattern.scatter(layer.values.grad)
        weight.requires_grad_(layer.values.requires_grad)
        dense.train(layer.training)
        places.replace(layer, dense)
        if optimizer is not None:
            _return_state(optimizer, layer, weight)
    if optimizer is not None:
        for state in optimizer.state.values():
            state.pop("active", None)


def dense_copy(model: nn.Module) -> nn.Module:
    """A copy of the model in which every layer is a plain dense one."""
    copied = copy.deepcopy(model)
    thaw(copied, None)
    for module in copied.modules():
        to_plain(module)
    return copied


def _replace_parameter(optimizer: torch.optim.Optimizer, old: nn.Parameter, new: nn.Parameter) -> dict[str, Any] | None:
    """Puts ``new`` where ``old`` stood; returns the state of ``old``, or None where it had none."""
    for group in optimizer.param_groups:
        for i, p in enumerate(group["params"]):
            if p is old:
                group["params"][i] = new
    return optimizer.state.pop(old, None)


def _follows(value: Any, shape: tuple[int, ...]) -> bool:
    return isinstance(value, torch.Tensor) and tuple(value.shape) == shape


def _carry_state(optimizer: torch.optim.Optimizer, weight: nn.Parameter, layer: SparseLayer) -> None:
    state = _replace_parameter(optimizer, weight, layer.values)
    if isinstance(optimizer, BregmanOptimizer):
        optimizer.patterns[layer.values] = layer.pattern
    if not state:
        return
    if "frozen" not in state:  # else a checkpoint of this phase was loaded before the swap
        aside = {k: s for k, s in state.items() if _follows(s, layer.pattern.shape)}
        state = {k: layer.pattern.gather(s) if k in aside else s for k, s in state.items()}
        forgotten = _forgotten(optimizer, layer.values)
        state["frozen"] = {k: s for k, s in aside.items() if k not in forgotten}
    optimizer.state[layer.values] = state


def _forgotten(optimizer: torch.optim.Optimizer | None, p: nn.Parameter) -> tuple[str, ...]:
    """State that is not kept for the weights outside of a frozen pattern, and is zero there after the thaw."""
    group = _held(optimizer).get(id(p), {}) if optimizer is not None else {}
    return () if group.get("keep_momentum", True) else ("momentum_buffer",)


def _return_state(optimizer: torch.optim.Optimizer, layer: SparseLayer, weight: nn.Parameter) -> None:
    state = _replace_parameter(optimizer, layer.values, weight)
    if isinstance(optimizer, BregmanOptimizer):
        optimizer.patterns.pop(layer.values, None)
    if not state:
        return
    aside = state.pop("frozen", {})
    pattern = layer.pattern
    for key, value in state.items():
        if _follows(value, (pattern.nnz,)):
            out = aside[key].contiguous() if key in aside else None
            dense = pattern.scatter(value, out)
            # In the order of the weight in memory, so that both can be gone through together.
            state[key] = dense if weight.is_contiguous() else torch.empty_like(weight).copy_(dense)
    optimizer.state[weight] = state


def iter_weights(model: nn.Module) -> Iterator[tuple[str, int, int]]:
    """(name, active weights, all weights) of every linear and convolution layer, sparse or dense."""
    for name, module in model.named_modules():
        if isinstance(module, SparseLayer):
            yield name, module.pattern.nnz, math.prod(module.pattern.shape)
        elif isinstance(module, REGULARISED):
            yield name, count_nonzero(module.weight), module.weight.numel()


def iter_masks(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, mask of the active weights) of every linear and convolution layer, sparse or dense."""
    for name, module in model.named_modules():
        if isinstance(module, SparseLayer):
            yield name, module.pattern.mask()
        elif isinstance(module, REGULARISED):
            yield name, module.weight.detach() != 0
