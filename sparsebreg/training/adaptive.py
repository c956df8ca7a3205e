"""Adaptive λ: a controller that moves the strength of the regularizer until the model has the sparsity asked for."""

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from sparsebreg.core.errors import check_choice, check_int, check_real, expected
from sparsebreg.core.extension import native
from sparsebreg.core.selection import count_nonzero, kth_largest
from sparsebreg.optim.base import BregmanOptimizer, shared
from sparsebreg.optim.groups import dense_layers
from sparsebreg.optim.regularizers import L1
from sparsebreg.training.multilevel import Multilevel

#: How far the target is on its way at a fraction of the ramp.
RAMPS: dict[str, Callable[[float], float]] = {"linear": lambda t: t, "cubic": lambda t: 1 - (1 - t) ** 3}

ON_CHANGE = ("shift", "keep", "rescale")

#: The step in log λ: halved when the gap changes sign, longer again while it does not, within these bounds.
_DECAY, _GROWTH, _LEAST, _MOST = 0.5, 1.2, 0.05, 1.0

#: A step η up to this is not checked against the quantile, which only v at the thaw knows.
_FREE = 0.25

#: λ stays above it, from where no factor could lead back.
_FLOOR = 1e-30

#: Weights that a quantile looks at; more are sampled.
_SAMPLE = 1 << 14


class LambdaScheduler:
    """Moves λ until the sparsity of linear and convolution layers is the target.

    Call :meth:`step` after every step of the :class:`sparsebreg.Multilevel` or the optimizer. With d the density and
    d* the target's, every change is

        λ ← λ · exp(η · clip((d − d*) / d*, −1, 1)),

    where η is halved each time the gap changes sign and grows by a fifth otherwise, between 0.05 and 1. λ stays while
    the gap is within ``tolerance``. With :class:`sparsebreg.L1`, steps with η above 1/4 go no further than to the
    quantile of the sizes of v at which the density would be the target's. From twice the target's density on λ goes at
    least to the quantile that halves the density: with a λ far too small, more weights wake than the learning rate may
    bear. In a multilevel cycle sparsity is measured after a fine step, on the frozen pattern, and λ moves at the thaw,
    before the next fine step: in between it would not change the pattern.

    A λ far too large on a model that has the target sparsity from the start is not noticed: its pattern just stays. And
    the controller does not keep training stable: where weights that wake make it diverge, take a smaller learning rate.

    When λ moves, the dual variable has to follow, since θ = prox(δ v). ``on_change`` says how:

    - "shift": no weight that stays active moves: v = θ/δ + ∂J(θ) for the new J; for L1, v moves by the change of λ.
      Active weights that the new J would set to zero, the smallest, fall asleep with their v. Inactive v is clipped to
      the new bound (scaled with λ, for group norms): nothing wakes because of the change, but may at the next step.
    - "keep": v stays. All active weights move by the change of λ, and weights wake and fall asleep accordingly.
    - "rescale": as "keep" for active weights; inactive v is scaled with λ, so nothing wakes because of the change.

    Source of the idea: Aloradi, Roith, Habets, Tenbrinck, arXiv 2605.07892. The relative gap, the bound by a quantile
    and "shift" are this package's.

    Args:
        target: the Multilevel, or a Bregman optimizer; not frozen.
        target_sparsity: zeros as a fraction of all weights of linear and convolution layers (with an optimizer alone:
            of all regularised ones), in (0, 1).
        per_layer: every regularised layer has a λ of its own and reaches the target by itself; or one of its own: a
            mapping from names of layers to sparsities in (0, 1), for a Multilevel. Parameter groups are split for this,
            so make the scheduler before those of the learning rate.
        ramp: the target itself moves from the present sparsity, "linear" or "cubic" (Zhu, Gupta, arXiv 1710.01878).
        ramp_steps: calls of ``step`` until the ramp ends.
        on_change: "shift", "keep" or "rescale".
        gain: first η, in (0, 1].
        tolerance: as a fraction of the target's density.
        every: steps from one change of λ to the next, at least; in a multilevel cycle it waits for the thaw.

    Attributes:
        sparsity: as last measured, or None.
        dead: names of regularised layers without active weights, as last measured; a warning tells the first time.

    Raises:
        TypeError, ValueError: naming the argument; ValueError for a target out of reach, since layers without a
        regularizer are too large, and for a λ of 0.
    """

    def __init__(
        self,
        target: Multilevel | BregmanOptimizer,
        target_sparsity: float = 0.95,
        per_layer: bool | Mapping[str, float] = False,
        ramp: str | None = None,
        ramp_steps: int = 0,
        on_change: str = "shift",
        gain: float = 0.5,
        tolerance: float = 0.01,
        every: int = 10,
    ) -> None:
        if not isinstance(target, (Multilevel, BregmanOptimizer)):
            raise TypeError(expected("target", "a Multilevel or a Bregman optimizer", type(target).__name__))
        self.cycle = target if isinstance(target, Multilevel) else None
        self.optimizer: BregmanOptimizer = target.optimizer if isinstance(target, Multilevel) else target
        self.target_sparsity = check_real("target_sparsity", target_sparsity, low=0, strict=True)
        if self.target_sparsity >= 1:
            raise ValueError(expected("target_sparsity", "a number below 1", target_sparsity))
        self.ramp = None if ramp is None else check_choice("ramp", ramp, RAMPS)
        self.ramp_steps = check_int("ramp_steps", ramp_steps, low=0 if ramp is None else 1)
        self.on_change = check_choice("on_change", on_change, ON_CHANGE)
        self.gain = check_real("gain", gain, low=0, strict=True, high=1)
        self.tolerance = check_real("tolerance", tolerance, low=0)
        self.every = check_int("every", every, low=1)
        if self._frozen():
            raise ValueError(expected("target", "a model that is not frozen", "a frozen one"))
        groups = self.optimizer.param_groups
        regularised = [g for g in groups if g["reg"].sparse]
        if not regularised:
            raise ValueError(expected("target", "an optimizer with a sparse regularizer", "one without"))
        for group in regularised:
            if group["reg"].lam == 0:
                raise ValueError(expected("reg", "a lam above 0, from which to start", group["reg"]))
        self._fixed, fixed_size = self._unregularised(regularised)
        sizes = [p.numel() for g in regularised for p in g["params"]]
        bound = sum(sizes) / max(1, sum(sizes) + fixed_size)
        if not per_layer and self.target_sparsity > bound:
            raise ValueError(
                expected("target_sparsity", f"at most {bound:.4g} (the rest is not regularised)", target_sparsity)
            )
        own = self._own_targets(per_layer) if isinstance(per_layer, Mapping) else {}
        self.per_layer = isinstance(per_layer, Mapping) or bool(per_layer)
        if self.per_layer:
            self._split()
        #: Parameters by their place in the optimizer, which the swaps leave alone: (group, position), name, size.
        self._places = [(i, j) for i, g in enumerate(groups) if g["reg"].sparse for j in range(len(g["params"]))]
        names = {id(p): n for n, p in self.cycle.model.named_parameters()} if self.cycle else {}
        params = [groups[i]["params"][j] for i, j in self._places]
        self._names = [
            names.get(id(p), f"group {i}, parameter {j}") for (i, j), p in zip(self._places, params, strict=True)
        ]
        self._sizes = [p.numel() for p in params]
        units = [[k] for k in range(len(params))] if self.per_layer else [list(range(len(params)))]
        self._units = units
        self._targets = [own.get(self._names[unit[0]], self.target_sparsity) for unit in units]
        self._gains, self._signs = [self.gain] * len(units), [0] * len(units)
        self._counted: list[int] | None = None
        self._steps = self._moved = 0
        self._warned: set[str] = set()
        self.dead: list[str] = []
        self.sparsity: float | None = None
        self._from = self._sparsities(self._count())

    @property
    def lam(self) -> float | list[float]:
        """The present λ: that of the first regularised group, or with ``per_layer`` those of all layers."""
        lams = [self.optimizer.param_groups[i]["reg"].lam for i, _ in self._places]
        return lams if self.per_layer else lams[0]

    @property
    def gap(self) -> float | None:
        """The sparsity as last measured minus the target at this point of the ramp, over all layers; None before."""
        if self.sparsity is None:
            return None
        goals = self.goals()
        sizes = self._sizes if self.per_layer else [1]
        return self.sparsity - sum(g * n for g, n in zip(goals, sizes, strict=True)) / max(1, sum(sizes))

    def goals(self) -> list[float]:
        """The target at this point of the ramp: one, or with ``per_layer`` one per layer."""
        if self.ramp is None:
            return list(self._targets)
        done = RAMPS[self.ramp](min(1.0, self._steps / self.ramp_steps))
        return [s + (t - s) * done for s, t in zip(self._from, self._targets, strict=True)]

    @torch.no_grad()
    def step(self) -> None:
        """Measures after a fine step, and moves λ where the next step may change the pattern."""
        self._steps += 1
        if self._frozen():
            if self._counted is None:
                self._counted = self._count()
            return
        counts, self._counted = self._counted, None
        if self._steps - self._moved < self.every:
            return
        self._moved = self._steps
        counts = self._count() if counts is None else counts
        sparsities = self._sparsities(counts)
        self._notice(counts)
        for k, (sparsity, goal) in enumerate(zip(sparsities, self.goals(), strict=True)):
            ratio = self._ratio(k, 1 - sparsity, 1 - goal)
            if ratio != 1:
                self._move(self._units[k], ratio)

    def state_dict(self) -> dict[str, Any]:
        """Plain data; loads with ``torch.load(weights_only=True)``. λ itself is in the optimizer's state."""
        return {
            "gains": list(self._gains),
            "signs": list(self._signs),
            "counted": self._counted,
            "steps": self._steps,
            "moved": self._moved,
            "from": list(self._from),
            "warned": sorted(self._warned),
            "dead": list(self.dead),
            "sparsity": self.sparsity,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads beside the optimizer's state, in any order. Raises ValueError for that of another model."""
        if len(state["gains"]) != len(self._units):
            raise ValueError(expected("gains", f"{len(self._units)} numbers", len(state["gains"])))
        self._gains, self._signs = list(state["gains"]), list(state["signs"])
        self._counted, self._from = state["counted"], list(state["from"])
        self._steps, self._moved = state["steps"], state["moved"]
        self._warned, self.dead, self.sparsity = set(state["warned"]), list(state["dead"]), state["sparsity"]

    def _frozen(self) -> bool:
        if self.cycle is not None:
            return self.cycle.phase == "coarse"
        return any("frozen" in s or "active" in s for s in self.optimizer.state.values())

    def _unregularised(self, regularised: list[dict[str, Any]]) -> tuple[list[nn.Module], int]:
        """Linear and convolution layers of the model whose weight no λ reaches, and their size."""
        if self.cycle is None:
            return [], 0
        reached = {id(p) for g in regularised for p in g["params"]}
        layers = {id(m.weight): m for _, m in dense_layers(self.cycle.model)}
        fixed = [m for i, m in layers.items() if i not in reached]
        return fixed, sum(m.weight.numel() for m in fixed)

    def _own_targets(self, targets: Mapping[str, float]) -> dict[str, float]:
        """Checked, by name of the parameter."""
        if self.cycle is None:
            raise ValueError(expected("per_layer", "True or False for an optimizer alone", "targets by name"))
        reached = {id(p) for g in self.optimizer.param_groups if g["reg"].sparse for p in g["params"]}
        known = [n.rpartition(".")[0] for n, p in self.cycle.model.named_parameters() if id(p) in reached]
        for name, target in targets.items():
            check_choice("per_layer: layer", name, known)
            if check_real(f"per_layer['{name}']", target, low=0, strict=True) >= 1:
                raise ValueError(expected(f"per_layer['{name}']", "a number below 1", target))
        return {f"{name}.weight": float(target) for name, target in targets.items()}

    def _split(self) -> None:
        groups = self.optimizer.param_groups
        if any("initial_lr" in g for g in groups):
            raise ValueError(expected("per_layer", "a scheduler made before those of the learning rate", "one after"))
        groups[:] = [
            {**g, "params": [p]} if alone else g
            for g in groups
            for alone in [g["reg"].sparse]
            for p in (g["params"] if alone else [None])
        ]

    def _count(self) -> list[int]:
        """Active weights of every regularised parameter; of a frozen one, all of its pattern."""
        counts = []
        for i, j in self._places:
            p = self.optimizer.param_groups[i]["params"][j]
            state = self.optimizer.state.get(p, {})
            layer = self.optimizer.fine_layers.get(p)
            kept = None if layer is None else layer.kept(p)  # the nonzeros, or None
            active = state.get("active", p.detach() if kept is None else kept)
            counts.append(p.numel() if p in self.optimizer.patterns else count_nonzero(active))
        return counts

    def _sparsities(self, counts: list[int]) -> list[float]:
        if self.per_layer:
            return [1 - c / max(1, n) for c, n in zip(counts, self._sizes, strict=True)]
        active = sum(counts) + sum(count_nonzero(m.weight) for m in self._fixed)
        return [1 - active / max(1, sum(self._sizes) + sum(m.weight.numel() for m in self._fixed))]

    def _notice(self, counts: list[int]) -> None:
        self.sparsity = 1 - sum(counts) / max(1, sum(self._sizes)) if self.per_layer else self._sparsities(counts)[0]
        self.dead = [n for n, c, size in zip(self._names, counts, self._sizes, strict=True) if size and not c]
        if new := [n for n in self.dead if n not in self._warned]:
            self._warned.update(new)
            if self.cycle is None or self.cycle.report is None:  # else the cycle has told
                warnings.warn(f"no active weights left in {', '.join(new)}", stacklevel=3)

    def _ratio(self, k: int, density: float, goal: float) -> float:
        """What the λ of unit k is multiplied by."""
        gap = (density - goal) / goal
        if abs(gap) <= self.tolerance:
            return 1.0
        sign = 1 if gap > 0 else -1
        if self._signs[k]:
            factor = _GROWTH if sign == self._signs[k] else _DECAY
            self._gains[k] = min(_MOST, max(_LEAST, self._gains[k] * factor))
        self._signs[k] = sign
        gap = max(-1.0, min(1.0, gap))
        ratio = math.exp(self._gains[k] * gap)
        doubled = density >= 2 * goal
        if (self._gains[k] <= _FREE and not doubled) or (bound := self._exact(self._units[k], goal)) is None:
            return ratio
        least = math.exp(min(_FREE, self._gains[k]) * gap)
        if gap < 0:
            return max(ratio, min(least, bound))
        half = self._exact(self._units[k], max(goal, density / 2)) if doubled else None
        return max(min(ratio, max(least, bound)), half or 0.0)

    def _exact(self, unit: list[int], goal: float) -> float | None:
        """The factor of λ that would leave just ``goal`` of the weights active if v stayed; None where unknown."""
        share = _SAMPLE / max(1, sum(self._sizes[k] for k in unit))
        random = torch.Generator().manual_seed(self._steps)
        parts = []
        for k in unit:
            i, j = self._places[k]
            group = self.optimizer.param_groups[i]
            dual = self.optimizer.state.get(group["params"][j], {}).get("dual")
            if dual is None or type(group["reg"]) is not L1:
                return None
            dual = dual.reshape(-1)
            if share < 1:
                dual = dual[torch.randint(len(dual), (math.ceil(share * len(dual)),), generator=random)]
            parts.append(dual.abs() / group["reg"].lam)
        values = torch.cat(parts)
        if not self.per_layer:  # weights without a regularizer take their part of what may be active
            total = sum(self._sizes) + sum(m.weight.numel() for m in self._fixed)
            goal = (goal * total - sum(count_nonzero(m.weight) for m in self._fixed)) / max(1, sum(self._sizes))
        rank = len(values) - int(max(0.0, goal) * len(values))
        return kth_largest(values, len(values) + 1 - min(len(values), max(1, rank))) if len(values) else None

    @torch.no_grad()
    def _move(self, unit: list[int], ratio: float) -> None:
        moved = set()
        for k in unit:
            i, j = self._places[k]
            group = self.optimizer.param_groups[i]
            if i not in moved:
                moved.add(i)
                group["reg"] = group["reg"].with_lam(max(_FLOOR, group["reg"].lam * ratio))
            p = group["params"][j]
            state = self.optimizer.state.get(p, {})
            if "dual" in state:  # else there is no v (ProxSGD), or not yet
                self._follow(p, state["dual"], group, ratio)

    def _follow(self, p: torch.Tensor, dual: torch.Tensor, group: dict[str, Any], ratio: float) -> None:
        """v and θ after the λ of ``group`` was multiplied by ``ratio``."""
        reg, delta = group["reg"], group["delta"]
        C = native() if self.on_change == "shift" and type(reg) is L1 else None
        if C is not None and (arrays := shared(p, (p, dual))) is not None:
            gather = self.optimizer._gather(p)
            inside = C.l1_shift(*arrays, delta, reg.lam, gather, torch.get_num_threads())
            self.optimizer._moved(p, gather, inside)
            return
        if self.on_change == "rescale" and ratio < 1:
            dual.copy_(torch.where(p == 0, dual * ratio, dual))
        weight = reg.prox(dual * delta, delta)
        if self.on_change == "shift":
            # What the prox would wake is held below the bound: clipped, or scaled where groups make that a joint one.
            held = dual - weight / delta if isinstance(reg, L1) else dual * min(1.0, ratio)
            weight = torch.where(weight != 0, p, 0)
            dual.copy_(torch.where(weight != 0, weight / delta + reg.subgradient(weight), held))
        p.copy_(weight)
