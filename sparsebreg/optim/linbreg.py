"""Linearized Bregman iterations."""

from collections.abc import Iterable
from typing import Any

import torch

from sparsebreg.core.extension import native
from sparsebreg.optim.base import BregmanOptimizer, check_momentum, flush, shared, zeros_like
from sparsebreg.optim.regularizers import L1, NoReg, Regularizer


class LinBreg(BregmanOptimizer):
    """Stochastic linearized Bregman iterations, with momentum.

    For a gradient g of the loss at θ, plus ``weight_decay · θ``::

        m ← β m + (1 − β) τ g ,   v ← v − m ,   θ ← prox_{δJ}(δ v)

    starting from v = θ/δ + ∂J(θ) and m = 0. Without a regularizer and with δ = 1 this is ``torch.optim.SGD`` with
    ``lr = (1 − β) τ`` and momentum β.

    Source: Bungert, Roith, Tenbrinck, Burger, JMLR 23 (2022), Algorithms 1 and 2.

    Args:
        params: parameters, or groups as made by :func:`sparsebreg.param_groups`.
        lr: the step τ, at least 0.
        momentum: β in [0, 1).
        delta: the elastic-net parameter δ, above 0.
        weight_decay: at least 0.
        reg: the regularizer J of groups that do not bring their own; default: none.
        maximize: ascend instead.
        keep_momentum: keep the momentum of the weights outside of a frozen pattern for its thaw, where they go on with
            it. Otherwise they start with none, and as many numbers as the layer has weights need not be kept.

    Raises:
        TypeError, ValueError: naming the option; TypeError for parameters that are neither float32 nor float64 (see
        :class:`BregmanOptimizer` for mixed precision).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.1,
        momentum: float = 0.0,
        delta: float = 1.0,
        weight_decay: float = 0.0,
        reg: Regularizer | None = None,
        maximize: bool = False,
        keep_momentum: bool = True,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "delta": delta,
                "weight_decay": weight_decay,
                "reg": reg,
                "maximize": maximize,
                "keep_momentum": keep_momentum,
            },
        )

    def _check(self, options: dict[str, Any]) -> None:
        super()._check(options)
        check_momentum(options)

    def _start(self, p: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        super()._start(p, state, group)
        if group["momentum"] and "momentum_buffer" not in state:
            state["momentum_buffer"] = zeros_like(p)

    def _fused(self, p: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> bool:
        C, reg, beta = native(), group["reg"], group["momentum"]
        if C is None or type(reg) not in (L1, NoReg):
            return False
        arrays = shared(p, (p, p.grad, state["dual"], state["momentum_buffer"] if beta else None, state.get("active")))
        if arrays is None:
            return False
        gather = self._gather(p)
        inside = C.linbreg_step(
            *arrays, group["lr"], beta, group["delta"], getattr(reg, "lam", 0.0), group["weight_decay"],
            group["maximize"], gather, torch.get_num_threads(),
        )  # fmt: skip
        self._moved(p, gather, inside)
        return True

    def _move_dual(
        self, params: list[Any], grads: list[Any], states: list[dict[str, Any]], group: dict[str, Any]
    ) -> None:
        lr, beta = group["lr"], group["momentum"]
        duals = [s["dual"] for s in states]
        if beta == 0:
            torch._foreach_sub_(duals, grads, alpha=lr)
            return
        moments = [s["momentum_buffer"] for s in states]
        torch._foreach_mul_(moments, beta)
        torch._foreach_add_(moments, grads, alpha=(1 - beta) * lr)
        flush(moments)
        torch._foreach_sub_(duals, moments)
