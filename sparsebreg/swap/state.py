"""The optimizer's state at a swap, both ways.

What it keeps per weight is gathered at the active places; the rest is set aside in the state (key ``frozen``) and comes
back unchanged at the thaw (momentum only where the optimizer keeps it).
"""

from typing import Any

import torch
from torch import nn

from sparsebreg.core.errors import SwapError, expected
from sparsebreg.core.pattern import SparsePattern
from sparsebreg.optim.base import BregmanOptimizer

#: Optimizers of torch whose state is no tensor of the weight's shape, or that need the weight as a matrix.
_CANNOT_FOLLOW = {"Adafactor", "LBFGS", "Muon", "SparseAdam"}

FOLLOWING = "SGD, Adam, AdamW, NAdam, RAdam, Adamax, RMSprop, Rprop, Adagrad, Adadelta, ASGD, LinBreg, AdaBreg, ProxSGD"


def check_optimizer(optimizer: Any) -> None:
    """Raises TypeError or SwapError unless the optimizer's state can follow a weight to its active entries."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(expected("optimizer", "a torch.optim.Optimizer", type(optimizer).__name__))
    wanted = f"one with a state for every weight, such as {FOLLOWING}"
    if any(c.__name__ in _CANNOT_FOLLOW for c in type(optimizer).__mro__):
        raise SwapError(expected("optimizer", wanted, type(optimizer).__name__))
    for p, state in optimizer.state.items():
        for key, value in state.items():
            if p.dim() > 1 and isinstance(value, torch.Tensor) and value.dim() and value.shape != p.shape:
                got = f"{type(optimizer).__name__} with '{key}' of shape {tuple(value.shape)} for {tuple(p.shape)}"
                raise SwapError(expected("optimizer", wanted, got))


def held(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Any]]:
    """The group of every parameter that the optimizer holds, by id."""
    return {id(p): g for g in optimizer.param_groups for p in g["params"]}


def _replace_parameter(optimizer: torch.optim.Optimizer, old: nn.Parameter, new: nn.Parameter) -> dict[str, Any] | None:
    """Puts ``new`` where ``old`` stood; returns the state of ``old``, or None where it had none."""
    for group in optimizer.param_groups:
        for i, p in enumerate(group["params"]):
            if p is old:
                group["params"][i] = new
    return optimizer.state.pop(old, None)


def _follows(value: Any, shape: tuple[int, ...]) -> bool:
    return isinstance(value, torch.Tensor) and tuple(value.shape) == shape


def carry_state(
    optimizer: torch.optim.Optimizer, weight: nn.Parameter, values: nn.Parameter, pattern: SparsePattern
) -> None:
    """Moves the state of a weight to its values on the pattern."""
    state = _replace_parameter(optimizer, weight, values)
    if isinstance(optimizer, BregmanOptimizer):
        optimizer.patterns[values] = pattern
    if not state:
        return
    if "frozen" not in state:  # else a checkpoint of this phase was loaded before the swap
        aside = {k: s for k, s in state.items() if _follows(s, pattern.shape)}
        state = {k: pattern.gather(s) if k in aside else s for k, s in state.items()}
        forgotten = forgotten_keys(optimizer, values)
        state["frozen"] = {k: s for k, s in aside.items() if k not in forgotten}
    optimizer.state[values] = state


def forgotten_keys(optimizer: torch.optim.Optimizer | None, p: nn.Parameter) -> tuple[str, ...]:
    """State that is not kept for the weights outside of a frozen pattern, and is zero there after the thaw."""
    group = held(optimizer).get(id(p), {}) if optimizer is not None else {}
    return () if group.get("keep_momentum", True) else ("momentum_buffer",)


def return_state(
    optimizer: torch.optim.Optimizer, values: nn.Parameter, weight: nn.Parameter, pattern: SparsePattern
) -> None:
    """Moves the state of the values back to the weight."""
    state = _replace_parameter(optimizer, values, weight)
    if isinstance(optimizer, BregmanOptimizer):
        optimizer.patterns.pop(values, None)
    if not state:
        return
    aside = state.pop("frozen", {})
    for key, value in state.items():
        if _follows(value, (pattern.nnz,)):
            out = aside[key].contiguous() if key in aside else None
            dense = pattern.scatter(value, out)
            # In the order of the weight in memory, so that both can be gone through together.
            state[key] = dense if weight.is_contiguous() else torch.empty_like(weight).copy_(dense)
    optimizer.state[weight] = state
