"""What the Bregman optimizers share: options, the dual variable, frozen weights, checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from sparsebreg import regularizers
from sparsebreg.errors import check_real, expected
from sparsebreg.regularizers import NoReg, Regularizer

#: Modules whose weight is regularised by ``param_groups``.
REGULARISED = (nn.Linear, nn.modules.conv._ConvNd)


def param_groups(model: nn.Module, reg: Regularizer) -> list[dict[str, Any]]:
    """Two parameter groups: the weights of linear and convolution layers with ``reg``, all others without.

    Raises:
        TypeError: if ``model`` is not a module or ``reg`` not a regularizer.
        ValueError: if nothing would be regularised.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(expected("model", "a torch.nn.Module", type(model).__name__))
    if not isinstance(reg, Regularizer):
        raise TypeError(expected("reg", "a regularizer such as sparsebreg.L1(0.05)", repr(reg)))
    chosen = {id(m.weight) for m in model.modules() if isinstance(m, REGULARISED) and m.weight is not None}
    parameters = list(model.parameters())
    weights = [p for p in parameters if id(p) in chosen]
    if not weights:
        raise ValueError(expected("model", "linear or convolution layers to regularise", "a model without any"))
    rest = [p for p in parameters if id(p) not in chosen]
    groups: list[dict[str, Any]] = [{"params": weights, "reg": reg}]
    return [*groups, {"params": rest, "reg": NoReg()}] if rest else groups


class BregmanOptimizer(torch.optim.Optimizer):
    """Base class: θ = prox_{δJ}(δ v) with a dual variable v that the subclass moves.

    State of a parameter: ``dual`` (v), what the subclass keeps, and while its pattern is frozen either ``frozen`` (it
    is the ``values`` of a sparse layer: the dense state outside of the pattern, for the thaw) or ``active`` (it stayed
    dense: the mask of the weights that may move).
    """

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        if defaults.get("reg") is None:
            defaults["reg"] = NoReg()
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if isinstance(param_group, dict):
            self._check({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def _check(self, options: dict[str, Any]) -> None:
        """Raises TypeError or ValueError naming the option."""
        check_real("lr", options["lr"], low=0)
        check_real("delta", options["delta"], low=0, strict=True)
        check_real("weight_decay", options["weight_decay"], low=0)
        if not isinstance(options["reg"], Regularizer):
            raise TypeError(expected("reg", "a regularizer such as sparsebreg.L1(0.05)", repr(options["reg"])))

    def _move_dual(self, p: torch.Tensor, grad: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """v ← v − step, in place. ``grad`` may be overwritten where it is not ``p.grad``."""
        raise NotImplementedError

    def _fused(self, p: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> bool:
        """Does the whole update in one native pass, where there is one for this case; says whether it did."""
        return False

    def _start(self, p: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """v⁰ = θ⁰/δ + ∂J(θ⁰)."""
        state["dual"] = p.detach() / group["delta"] + group["reg"].subgradient(p.detach())

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step. ``closure`` reevaluates the model and returns the loss, which is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.grad.is_sparse:
                    raise RuntimeError(expected("grad", "dense gradients", "a sparse one"))
                self._update(p, self.state[p], group)
        return loss

    def _update(self, p: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if "dual" not in state:
            self._start(p, state, group)
        active = state.get("active")
        if active is None and self._fused(p, state, group):
            return
        before = {k: s.clone() for k, s in state.items() if _moves(s, p)} if active is not None else {}
        grad = p.grad
        if group["maximize"]:
            grad = -grad
        if group["weight_decay"]:
            grad = grad.add(p, alpha=group["weight_decay"])
        self._move_dual(p, grad, state, group)
        for key, old in before.items():
            torch.where(active, state[key], old, out=state[key])
        delta = group["delta"]
        dual = state["dual"]
        weight = group["reg"].prox(dual if delta == 1 else dual * delta, delta)
        # In place: the parameter keeps its storage, which views and buckets may share.
        p.copy_(weight if active is None else torch.where(active, weight, p))

    def state_dict(self) -> dict[str, Any]:
        """As torch's; regularizers become plain data, so that ``torch.load(weights_only=True)`` accepts it."""
        state = super().state_dict()
        for group in state["param_groups"]:
            group["reg"] = group["reg"].state_dict()
        return state

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        groups = [
            {**g, "reg": regularizers.from_state_dict(g["reg"]) if isinstance(g["reg"], dict) else g["reg"]}
            for g in state_dict["param_groups"]
        ]
        super().load_state_dict({**state_dict, "param_groups": groups})
        for state in self.state.values():
            if "active" in state:
                state["active"] = state["active"].bool()  # torch casts state to the parameter's dtype


def _moves(value: Any, p: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == p.shape and value.dtype is p.dtype
