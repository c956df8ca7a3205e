"""Adaptive linearized Bregman iterations: the dual variable moves by Adam's step."""

import math
from collections.abc import Iterable
from typing import Any

import torch

from sparsebreg.core.errors import check_real, expected
from sparsebreg.core.extension import native
from sparsebreg.optim.base import BregmanOptimizer, flush, shared, zeros_like
from sparsebreg.optim.regularizers import L1, NoReg, Regularizer


class AdaBreg(BregmanOptimizer):
    """Adaptive linearized Bregman iterations.

    For a gradient g of the loss at θ, plus ``weight_decay · θ``, and k = 1, 2, ...::

        m ← β₁ m + (1 − β₁) g ,   s ← β₂ s + (1 − β₂) g²
        v ← v − τ · m̂ / (√ŝ + ε) ,   m̂ = m / (1 − β₁ᵏ) ,   ŝ = s / (1 − β₂ᵏ)
        θ ← prox_{δJ}(δ v)

    starting from v = θ/δ + ∂J(θ) and m = s = 0. With ``decoupled_weight_decay`` the decay leaves g alone and moves v by
    ``− τ · weight_decay · θ`` instead. Without a regularizer and with δ = 1 this is ``torch.optim.Adam``, or
    ``torch.optim.AdamW`` with the decoupled decay.

    While a pattern is frozen k goes on counting; the moments of the other weights stand still.

    Source: Bungert, Roith, Tenbrinck, Burger, JMLR 23 (2022), Algorithm 3; decoupled decay: Loshchilov, Hutter,
    arXiv 1711.05101.

    Args:
        params: parameters, or groups as made by :func:`sparsebreg.param_groups`.
        lr: the step τ, at least 0.
        betas: (β₁, β₂), each in [0, 1).
        eps: ε, at least 0.
        delta: the elastic-net parameter δ, above 0.
        weight_decay: at least 0.
        decoupled_weight_decay: decay as AdamW does.
        reg: the regularizer J of groups that do not bring their own; default: none.
        maximize: ascend instead.

    Raises:
        TypeError, ValueError: naming the option; TypeError for parameters that are neither float32 nor float64 (see
        :class:`BregmanOptimizer` for mixed precision).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        delta: float = 1.0,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        reg: Regularizer | None = None,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "delta": delta,
                "weight_decay": weight_decay,
                "decoupled_weight_decay": decoupled_weight_decay,
                "reg": reg,
                "maximize": maximize,
            },
        )

    def _check(self, options: dict[str, Any]) -> None:
        super()._check(options)
        check_real("eps", options["eps"], low=0)
        betas = options["betas"]
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise TypeError(expected("betas", "a pair of numbers", repr(betas)))
        for i, beta in enumerate(betas):
            if check_real(f"betas[{i}]", beta, low=0) >= 1:
                raise ValueError(expected(f"betas[{i}]", "a number below 1", beta))

    def _start(self, p: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        super()._start(p, state, group)
        if "step" not in state:
            state["step"] = 0
            state["exp_avg"], state["exp_avg_sq"] = zeros_like(p), zeros_like(p)

    def _fused(self, p: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> bool:
        C, reg = native(), group["reg"]
        if C is None or type(reg) not in (L1, NoReg):
            return False
        moments = state["exp_avg"], state["exp_avg_sq"]
        arrays = shared(p, (p, p.grad, state["dual"], *moments, state.get("active")))
        if arrays is None:
            return False
        state["step"] += 1
        beta1, beta2 = group["betas"]
        gather = self._gather(p)
        inside = C.adabreg_step(
            *arrays, group["lr"], beta1, beta2, group["eps"], 1 - beta1 ** state["step"], 1 - beta2 ** state["step"],
            group["delta"], getattr(reg, "lam", 0.0), group["weight_decay"], group["decoupled_weight_decay"],
            group["maximize"], gather, torch.get_num_threads(),
        )  # fmt: skip
        self._moved(p, gather, inside)
        return True

    def _move_dual(
        self, params: list[Any], grads: list[Any], states: list[dict[str, Any]], group: dict[str, Any]
    ) -> None:
        lr, (beta1, beta2) = group["lr"], group["betas"]
        duals, means, squares = ([s[k] for s in states] for k in ("dual", "exp_avg", "exp_avg_sq"))
        for s in states:
            s["step"] += 1
        if group["weight_decay"] and group["decoupled_weight_decay"]:
            torch._foreach_sub_(duals, params, alpha=lr * group["weight_decay"])
        torch._foreach_lerp_(means, grads, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
        flush(means)
        for s in squares:
            s.clamp_(min=torch.finfo(s.dtype).tiny)  # not to zero, which eps = 0 would divide by
        scale = torch._foreach_sqrt(squares)
        torch._foreach_div_(scale, [math.sqrt(1 - beta2 ** s["step"]) for s in states])
        torch._foreach_add_(scale, group["eps"])
        torch._foreach_addcdiv_(duals, means, scale, [-lr / (1 - beta1 ** s["step"]) for s in states])
