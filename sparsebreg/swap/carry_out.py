"""Freezing and thawing: dense layers become sparse ones over their active weights, in place, and back."""

import copy
from collections.abc import Mapping

import torch
from torch import nn

from sparsebreg.core.errors import SwapError, expected
from sparsebreg.core.profiling import labelled
from sparsebreg.nn.layer import adopt, release
from sparsebreg.swap.decide import Decider, Filter, SparsifyConfig
from sparsebreg.swap.inspect import sparse_layers
from sparsebreg.swap.plan import Plan, check_model, plan_freeze
from sparsebreg.swap.report import LayerReport, SwapReport
from sparsebreg.swap.state import carry_state, forgotten_keys, held, return_state


@labelled("freeze")
def carry_out(
    model: nn.Module, plan: Plan, optimizer: torch.optim.Optimizer | None, *, keep_grads: bool = True
) -> None:
    """Swaps as planned. Everything that can fail is made before the first change."""
    found = [(model.get_submodule(name), pattern) for name, pattern in plan.patterns.items()]
    values = [pattern.gather(module.weight) for module, pattern in found]
    for (module, pattern), v in zip(found, values, strict=True):
        weight, layer = module.weight, adopt(module)
        layer.freeze(pattern, v, keep_grads)
        plan.report.counts_for(layer.state)
        if optimizer is not None:
            carry_state(optimizer, weight, layer.values, pattern)
    for name, mask in plan.masks.items():
        p = model.get_parameter(name)
        state = optimizer.state[p]  # type: ignore[union-attr]
        state["active"] = mask
        for key in forgotten_keys(optimizer, p):
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
    check_model(model)
    layers = sparse_layers(model)
    frozen = bool(layers) or (optimizer is not None and any("active" in s for s in optimizer.state.values()))
    if not frozen:
        raise SwapError(expected("model", "sparse layers", "a model without any"))
    if optimizer is not None:
        groups = held(optimizer)
        for name, layer in layers.items():
            if layer.values.requires_grad and id(layer.values) not in groups:
                raise SwapError(
                    expected("optimizer", f"one that holds the parameter '{name}.values'", "one without it")
                )
    report = SwapReport(
        [LayerReport(n, type(m).__name__, m.pattern.shape, m.pattern.nnz, "dense", "thawed") for n, m in layers.items()]
    )
    thaw(model, optimizer)
    return report


@labelled("thaw")
def thaw(model: nn.Module, optimizer: torch.optim.Optimizer | None, *, keep_grads: bool = True) -> None:
    """Thaws all sparse layers; :func:`densify_` without its checks."""
    for layer in dict.fromkeys(sparse_layers(model).values()):
        values, pattern = layer.values, layer.pattern
        weight = layer.thaw(keep_grads)
        release(layer)
        if optimizer is not None:
            return_state(optimizer, values, weight, pattern)
    if optimizer is not None:
        for state in optimizer.state.values():
            state.pop("active", None)


def dense_copy(model: nn.Module) -> nn.Module:
    """A copy of the model in which every layer is a plain dense one."""
    copied = copy.deepcopy(model)
    thaw(copied, None)
    for module in copied.modules():
        release(module)
    return copied
