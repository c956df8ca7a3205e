"""What the Bregman optimizers share: options, the dual variable, frozen weights, checkpoints."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.autograd import profiler

from sparsebreg.core import extension, memory
from sparsebreg.core.errors import check_real, expected
from sparsebreg.core.gradient import PendingGrad, resolve
from sparsebreg.core.pattern import SparsePattern
from sparsebreg.optim import regularizers
from sparsebreg.optim.groups import check_reg
from sparsebreg.optim.regularizers import L1, NoReg, Regularizer

#: Parameters are updated together up to this many weights: fewer calls, and all that a batch touches fits in the cache.
_BATCH = 1 << 15


class BregmanOptimizer(torch.optim.Optimizer):
    """Base class: θ = prox_{δJ}(δ v) with a dual variable v that the subclass moves.

    State of a parameter: ``dual`` (v), what the subclass keeps, and while its pattern is frozen either ``frozen`` (it
    is the ``values`` of a sparse layer: the dense state that the thaw brings back outside of the pattern) or ``active``
    (it stayed dense: the mask of the weights that may move). Momentum that decays below the smallest normal number
    becomes zero, and second moments stay at it.

    Parameters are float32 or float64. For mixed precision keep them so and compute under ``torch.autocast``, with
    ``torch.amp.GradScaler`` if needed; half-precision parameters are refused, since v moves by far less than their
    resolution.

    Attributes:
        patterns: the pattern of every parameter that is the ``values`` of a sparse layer; kept up to date by the swaps,
            which also restore it when a run is resumed.
        fine_layers: states of the layers in the fine phase (``sparsebreg.nn.layer.Fine``) by their weight, as
            :class:`sparsebreg.Multilevel` sets them: a step hands them the active weights as soon as it has moved them.
    """

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        if defaults.get("reg") is None:
            defaults["reg"] = NoReg()
        self.patterns: dict[torch.Tensor, SparsePattern] = {}
        self.fine_layers: dict[torch.Tensor, Any] = {}
        super().__init__(params, defaults)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "patterns": self.patterns, "fine_layers": {}}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if isinstance(param_group, dict):
            self._check({**self.defaults, **param_group})
        super().add_param_group(param_group)
        try:
            for p in self.param_groups[-1]["params"]:
                if p.requires_grad:
                    _check_dtype(p)
        except TypeError:
            self.param_groups.pop()
            raise

    def _check(self, options: dict[str, Any]) -> None:
        """Raises TypeError or ValueError naming the option."""
        check_real("lr", options["lr"], low=0)
        check_real("weight_decay", options["weight_decay"], low=0)
        if "delta" in self.defaults:
            check_real("delta", options["delta"], low=0, strict=True)
        check_reg(options["reg"])

    def _move_dual(
        self, params: list[Any], grads: list[Any], states: list[dict[str, Any]], group: dict[str, Any]
    ) -> None:
        """v ← v − step for each of the parameters, in place. ``grads`` are not to be written to."""
        raise NotImplementedError

    def _fused(self, p: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> bool:
        """Does the whole update in one native pass, where there is one for this case; says whether it did."""
        return False

    def _gather(self, p: torch.Tensor) -> tuple[Any, Any] | None:
        """The index and the array into which a native step gathers the active weights, or None."""
        pattern = getattr(self.fine_layers.get(p), "pattern", None)
        if pattern is None or not p.is_contiguous():
            return None
        return pattern.native_index(), memory.empty_array((pattern.nnz,), p.dtype)

    def _moved(self, p: torch.Tensor, gather: tuple[Any, Any] | None, inside: bool) -> None:
        """Hands the weights that a native step gathered to the layer, if no nonzero is outside of its pattern."""
        torch.autograd.graph.increment_version(p)  # written behind autograd's back
        if gather is not None:
            self.fine_layers[p].keep(p, torch.from_numpy(gather[1]) if inside else None)

    def _start(self, p: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Creates missing state: v⁰ = θ⁰/δ + ∂J(θ⁰)."""
        if "dual" not in state:
            state["dual"] = zeros_like(p)
            torch.add(p.detach() / group["delta"], self._reg(p, group).subgradient(p.detach()), out=state["dual"])

    def _before_prox(
        self, params: list[Any], grads: list[Any], states: list[dict[str, Any]], group: dict[str, Any]
    ) -> tuple[list[torch.Tensor], float]:
        """Moves the state; returns the points z and the step t for which θ = prox_{tJ}(z)."""
        self._move_dual(params, grads, states, group)
        duals, delta = [s["dual"] for s in states], group["delta"]
        return duals if delta == 1 else list(torch._foreach_mul(duals, delta)), delta

    @torch.no_grad()
    def weaker(self, p: torch.Tensor, slack: float) -> tuple[torch.Tensor, float] | None:
        """Which weights of p would be active if its regularizer's ``lam`` were smaller by the part ``slack``.

        In the next steps hardly any others wake.

        Returns:
            A tensor of the shape of p and a bound: they are those where its magnitude is above the bound. None where
            that cannot be told: for a regularizer that makes no zeros or has no ``lam`` to scale, without a dual
            variable, and for the values of a sparse layer.
        """
        group = next((g for g in self.param_groups if any(p is q for q in g["params"])), None)
        dual = self.state[p].get("dual") if p in self.state else None
        if group is None or dual is None or p in self.patterns or not group["reg"].sparse:
            return None
        if type(group["reg"]) is L1:
            return dual, (1 - slack) * group["reg"].lam
        try:
            reg = group["reg"].with_lam((1 - slack) * group["reg"].lam)
        except (AttributeError, TypeError, ValueError):  # one of the user's own, or only a part of it has a lam
            return None
        delta = group["delta"]
        return reg.prox(dual if delta == 1 else delta * dual, delta), 0.0

    def _reg(self, p: torch.Tensor, group: dict[str, Any]) -> Regularizer:
        pattern = self.patterns.get(p)
        return group["reg"] if pattern is None else group["reg"].restrict(pattern)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step. ``closure`` reevaluates the model and returns the loss, which is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for params in _batches(self._not_fused(group)):
                self._update(params, group)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As ``torch.optim.Optimizer.zero_grad``, with its profiler label only while a profiler runs."""
        if not set_to_none or profiler._is_profiler_enabled:
            super().zero_grad(set_to_none)
            return
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    def _not_fused(self, group: dict[str, Any]) -> Iterator[torch.Tensor]:
        """The parameters with a gradient that are left to :meth:`_update`; the others are done."""
        for p in group["params"]:
            if p.grad is None:
                continue
            if p.grad.is_sparse:
                raise RuntimeError(expected("grad", "dense gradients", "a sparse one"))
            _check_dtype(p)
            state = self.state[p]
            self._start(p, state, group)
            if not self._fused(p, state, group):
                yield p

    def _update(self, params: list[torch.Tensor], group: dict[str, Any]) -> None:
        states = [self.state[p] for p in params]
        held = [
            {k: s.clone() for k, s in state.items() if _moves(s, p)} if "active" in state else {}
            for p, state in zip(params, states, strict=True)
        ]
        grads = [resolve(p.grad) for p in params]
        if group["maximize"]:
            grads = torch._foreach_neg(grads)
        if group["weight_decay"] and not group.get("decoupled_weight_decay"):
            grads = torch._foreach_add(grads, params, alpha=group["weight_decay"])
        points, step = self._before_prox(params, grads, states, group)
        weights = []
        for p, z, state, before in zip(params, points, states, held, strict=True):
            active = state.get("active")
            # J sees the active weights alone: the others count as zero in the norm of their group.
            weight = self._reg(p, group).prox(z if active is None else torch.where(active, z, 0), step)
            weights.append(weight if active is None else torch.where(active, weight, p))
            for key, old in before.items():
                torch.where(active, state[key], old, out=state[key])
        # In place: the parameter keeps its storage, which views and buckets may share.
        torch._foreach_copy_(params, weights)

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
        options = [{k: v for k, v in g.items() if k != "params"} for g in self.param_groups]
        super().load_state_dict({**state_dict, "param_groups": groups})
        for group, own in zip(self.param_groups, options, strict=True):
            for option, value in own.items():
                group.setdefault(option, value)  # what the version that saved it did not have yet
        for state in self.state.values():
            if "active" in state:
                state["active"] = state["active"].bool()  # torch casts state to the parameter's dtype


def check_momentum(options: dict[str, Any]) -> None:
    """Raises TypeError or ValueError naming the option."""
    if check_real("momentum", options["momentum"], low=0) >= 1:
        raise ValueError(expected("momentum", "a number below 1", options["momentum"]))
    if not isinstance(options["keep_momentum"], bool):
        raise TypeError(expected("keep_momentum", "True or False", repr(options["keep_momentum"])))


def _check_dtype(p: torch.Tensor) -> None:
    if p.dtype not in (torch.float32, torch.float64):
        wanted = "float32 or float64 parameters (for mixed precision, compute under torch.autocast)"
        raise TypeError(expected("params", wanted, p.dtype))


def zeros_like(p: torch.Tensor) -> torch.Tensor:
    """As ``torch.zeros_like``, on huge pages where they are many: steps walk through all of them."""
    if not p.is_cpu or not p.is_contiguous():
        return torch.zeros_like(p)
    return memory.empty(tuple(p.shape), p.dtype).zero_()


def flush(tensors: Iterable[torch.Tensor]) -> None:
    """Sets subnormal numbers, and the smallest normal one, to zero, in place: with them CPUs compute many times slower.

    Where gradients stay away, as behind units that died, momentum decays into them within some hundred steps.
    """
    for t in tensors:
        torch.hardshrink(t, torch.finfo(t.dtype).tiny, out=t)


def shared(p: torch.Tensor, tensors: Iterable[torch.Tensor | None]) -> list[Any] | None:
    """Converts tensors of one shape for an element-wise native step: all in the same order in memory.

    None stays None; None for all where native code cannot go through them so. A gradient may be pending.
    """
    found = list(tensors)
    contiguous = True
    for t in found:
        if t is None:
            continue
        if not t.is_cpu or t.dtype not in (p.dtype, torch.bool) or t.is_neg():
            return None
        contiguous = contiguous and t.is_contiguous()
    if not contiguous:
        # channels_last, for one: the same order in memory for all is enough
        dense = torch.ops.aten.is_non_overlapping_and_dense(p)
        if not dense or any(t is not None and t.stride() != p.stride() for t in found):
            return None
        found = [None if t is None else resolve(t).detach().as_strided((t.numel(),), (1,)) for t in found]
    return [_crossing(t) for t in found]


def _crossing(t: torch.Tensor | None) -> Any:
    if type(t) is PendingGrad:
        if (factors := t.factors) is not None:
            return factors
        t = t.dense
    return t if t is None or extension.TENSORS else t.detach().numpy()


def _batches(params: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    batch: list[torch.Tensor] = []
    size = 0
    for p in params:
        if batch and size + p.numel() > _BATCH:
            yield batch
            batch, size = [], 0
        batch.append(p)
        size += p.numel()
    if batch:
        yield batch


def _moves(value: Any, p: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == p.shape and value.dtype is p.dtype
