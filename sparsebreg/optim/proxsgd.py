"""Proximal stochastic gradient descent."""

from collections.abc import Iterable
from typing import Any

import torch

from sparsebreg.core.extension import native
from sparsebreg.optim.base import BregmanOptimizer, check_momentum, flush, shared, zeros_like
from sparsebreg.optim.regularizers import L1, NoReg, Regularizer


class ProxSGD(BregmanOptimizer):
    """Proximal SGD with momentum, the baseline that has no dual variable.

    For a gradient g of the loss at θ, plus ``weight_decay · θ``::

        m ← β m + g ,   θ ← prox_{τJ}(θ − τ m)

    starting from m = 0: weights that start at zero wake once τ |m| passes the threshold τ λ in a single step. Without a
    regularizer this is ``torch.optim.SGD``; with J and β = 0 it is the proximal gradient method for loss + J.

    Args:
        params: parameters, or groups as made by :func:`sparsebreg.param_groups`.
        lr: the step τ, at least 0.
        momentum: β in [0, 1), as in ``torch.optim.SGD``.
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
        if group["momentum"] and "momentum_buffer" not in state:
            state["momentum_buffer"] = zeros_like(p)

    def _fused(self, p: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> bool:
        C, reg, beta = native(), group["reg"], group["momentum"]
        if C is None or type(reg) not in (L1, NoReg):
            return False
        arrays = shared(p, (p, p.grad, state["momentum_buffer"] if beta else None, state.get("active")))
        if arrays is None:
            return False
        gather = self._gather(p)
        inside = C.proxsgd_step(
            *arrays, group["lr"], beta, getattr(reg, "lam", 0.0), group["weight_decay"], group["maximize"],
            gather, torch.get_num_threads(),
        )  # fmt: skip
        self._moved(p, gather, inside)
        return True

    def _before_prox(
        self, params: list[Any], grads: list[Any], states: list[dict[str, Any]], group: dict[str, Any]
    ) -> tuple[list[torch.Tensor], float]:
        lr, beta = group["lr"], group["momentum"]
        if beta:
            moments = [s["momentum_buffer"] for s in states]
            torch._foreach_mul_(moments, beta)
            torch._foreach_add_(moments, grads)
            flush(moments)
            grads = moments
        return list(torch._foreach_sub(params, grads, alpha=lr)), lr
