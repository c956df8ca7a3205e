"""The multilevel cycle: one fine step on all weights, then coarse steps on a frozen pattern.

The only place that changes a pattern during training. Source: Lunk, Scott, Bungert, arXiv 2602.03535, Algorithm 1.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from sparsebreg.core.errors import SwapError, check_choice, check_int, expected
from sparsebreg.core.pattern import SparsePattern
from sparsebreg.core.selection import count_nonzero, largest
from sparsebreg.nn.layer import SparseLayer, adopt, is_frozen, release
from sparsebreg.optim.base import BregmanOptimizer
from sparsebreg.optim.regularizers import L1, L1NonNegative, NoReg
from sparsebreg.swap.carry_out import carry_out, thaw
from sparsebreg.swap.decide import Decider, Filter, SparsifyConfig
from sparsebreg.swap.inspect import sparse_layers
from sparsebreg.swap.plan import Plan, plan_freeze
from sparsebreg.swap.report import SwapReport, report_of
from sparsebreg.training.schedules import Level, PlateauCoarse

PHASES = ("fine", "coarse")

#: In fine steps in a row a layer computes over those weights, too, that a regularizer weaker by a certain part would
#: let be active: a few per cent more, and for some steps no weight wakes outside of them. That part at first, and its
#: bounds.
_SLACK, _LEAST_SLACK, _MOST_SLACK = 0.1, 0.05, 0.4

#: It grows where such a pattern held for fewer steps than the first number, and shrinks where it held for more than the
#: second: to make a pattern takes about as long as a tenth more weights do over so many steps.
_HELD = 8, 24
_CHANGE = 1.25


class Multilevel:
    """Owns the cycle: steps the optimizer, freezes the pattern after a fine step, thaws it after the coarse ones.

    Call :meth:`step` where ``optimizer.step()`` stood. While the pattern is frozen the model's layers are sparse ones,
    and weights, dual variables and momentum outside of the pattern stand still. In the fine phase they are the dense
    ones, which compute output and input gradient over the nonzero weights (and a few that are close to waking) and
    only the weight's gradient in full. In training they use the weights as the optimizer's step left them, or as they
    were written to since; what is written to ``weight.data``, of which torch does not tell, counts from the next step
    on.

    Args:
        model: the model, dense.
        optimizer: a Bregman optimizer that holds all trainable parameters of the model.
        coarse_steps: m, coarse steps per fine step; 0: the optimizer alone. Or a schedule: a function of the number of
            the cycle, such as :class:`sparsebreg.LinearCoarse` or :class:`sparsebreg.PlateauCoarse`.
        config, filter_fn: which layers become sparse; as for :func:`sparsebreg.sparsify_`. The others are frozen all
            the same, as masked dense weights.
        fine_steps: fine steps in a row in every cycle.
        warmup: further fine steps before the first cycle.
        levels: further levels inside the frozen pattern, each inside the one before it. Their steps count among the
            coarse ones. For regularizers that are sums over single weights.

    Attributes:
        phase: "fine" or "coarse": what the next step is.
        coarse_steps: m of the present cycle.
        cycles: cycles begun so far, that is, with their fine steps done.
        coarse_done: coarse steps since the freeze.
        level: of the next step: 0 all weights, 1 the frozen pattern, 2 and on those of ``levels``.
        report: what the latest freeze did, or None; after loading a checkpoint of a coarse phase, what it brought.

    Raises:
        TypeError, ValueError: for a wrong argument; SwapError (a ValueError) for a model that cannot be swapped, or an
        optimizer that does not hold its parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: BregmanOptimizer,
        coarse_steps: int | Callable[[int], int] = 99,
        config: SparsifyConfig | None = None,
        filter_fn: Filter | None = None,
        fine_steps: int = 1,
        warmup: int = 0,
        levels: Sequence[Level] = (),
    ) -> None:
        self.schedule = coarse_steps if callable(coarse_steps) else None
        self.cycles = 0
        self.coarse_steps = self._steps_of_cycle() if self.schedule else check_int("coarse_steps", coarse_steps, low=0)
        self.fine_steps = check_int("fine_steps", fine_steps, low=1)
        self.fine_done = -check_int("warmup", warmup, low=0)
        if not isinstance(optimizer, BregmanOptimizer):
            raise TypeError(expected("optimizer", "a Bregman optimizer such as LinBreg", type(optimizer).__name__))
        self.model, self.optimizer = model, optimizer
        self.config = config or SparsifyConfig()
        self.filter_fn = filter_fn
        self._decider = Decider(self.config)
        self.levels = tuple(levels)
        for level in self.levels:
            if not isinstance(level, Level):
                raise TypeError(expected("levels", "sparsebreg.Level", type(level).__name__))
        for reg in (g["reg"] for g in optimizer.param_groups) if self.levels else ():
            if type(reg) not in (NoReg, L1, L1NonNegative):
                raise ValueError(expected("levels", "regularizers that are sums over single weights", reg))
        able = plan_freeze(model, self._decider, filter_fn, None).able  # raises for a model that cannot be swapped
        held = {id(p) for g in optimizer.param_groups for p in g["params"]}
        if missing := [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in held]:
            raise SwapError(
                expected(
                    "optimizer", "one that holds all trainable parameters of the model", f"one without '{missing[0]}'"
                )
            )
        self._able = [n for n in able if model.get_submodule(n).weight.requires_grad]
        self.phase, self._stepping = "fine", False
        self.coarse_done = 0
        self.report: SwapReport | None = None
        self._dead: set[str] = set()
        self._patterns: dict[str, SparsePattern] = {}
        self._masks: dict[str, Any] = {}
        #: Patterns of the fine phase that need not be widened.
        self._wide: dict[str, SparsePattern] = {}
        #: For how many steps those hold that got room, and how much room.
        self._held: dict[str, int] = {}
        self._slack: dict[str, float] = {}
        #: Of the levels inside the frozen pattern that the present one is in: what may move, by parameter name.
        self._inner: list[dict[str, torch.Tensor]] = []
        self._enter_fine()

    def step(self, closure: Callable[[], Any] | None = None, loss: Any = None) -> Any:
        """One step of the optimizer, and the phase change where one is due. Returns what ``closure`` returned.

        Gradients do not survive a phase change; call ``zero_grad`` before every backward pass as usual.

        Args:
            closure: reevaluates the model and returns the loss.
            loss: that of this step, for schedules that look at it, if there is no closure.
        """
        if self._stepping:  # where somebody put this method in the place of the optimizer's own
            return type(self.optimizer).step(self.optimizer, closure)
        plateau = self.schedule if isinstance(self.schedule, PlateauCoarse) and self.phase == "coarse" else None
        if plateau and closure is None and loss is None:
            raise ValueError(expected("loss", "the loss of the step, or a closure, for PlateauCoarse", None))
        self._stepping = True
        try:
            result = self.optimizer.step(closure)
        finally:
            self._stepping = False
        if self.phase == "fine":
            self.fine_done += 1
            if self.fine_done >= self.fine_steps:
                self._begin()
            if self.phase == "fine":
                self._widen()
        else:
            self.coarse_done += 1
            value = result if loss is None else loss
            stalled = plateau is not None and plateau.stalled(float(torch.as_tensor(value).detach()))
            if stalled or self.coarse_done >= self.coarse_steps:
                self._enter_fine()
            else:
                self._change_level()
        return result

    @property
    def level(self) -> int:
        return 1 + len(self._inner) if self.phase == "coarse" else 0

    def _change_level(self) -> None:
        """Enters or leaves levels inside the frozen pattern, as many coarse steps after the freeze as there were."""
        depth, done = 0, self.coarse_done
        for level in self.levels:
            done %= level.every + level.steps
            if done < level.every:
                break
            done -= level.every
            depth += 1
        if depth > len(self._inner):  # by one: every level begins with steps of its own
            above, keep = self._inner[-1] if self._inner else self._masks, self.levels[depth - 1].keep
            masks = {}
            for name, p in self._movable():
                outer = above.get(name)
                count = p.numel() if outer is None else count_nonzero(outer)
                masks[name] = largest(p.detach().abs(), math.ceil(keep * count), among=outer)
            self._inner.append(masks)
            self._hold()
        elif depth < len(self._inner):
            del self._inner[depth:]
            self._hold()

    def _movable(self) -> list[tuple[str, nn.Parameter]]:
        """Regularised parameters, which have weights that may stand still, by name."""
        held = {id(p) for g in self.optimizer.param_groups if g["reg"].sparse for p in g["params"]}
        return [(n, p) for n, p in self.model.named_parameters() if id(p) in held]

    def _hold(self) -> None:
        """Masks the optimizer so that only the weights of the present level move."""
        masks = self._inner[-1] if self._inner else self._masks
        for name, p in self._movable():
            if name in masks:
                self.optimizer.state[p]["active"] = masks[name]
            elif p in self.optimizer.state:
                self.optimizer.state[p].pop("active", None)

    def _begin(self) -> None:
        """Begins the coarse part of a cycle, if it has any."""
        if self.schedule:
            self.coarse_steps = self._steps_of_cycle()
        self.cycles += 1
        self.fine_done = 0
        if self.coarse_steps:
            self.freeze()

    def _steps_of_cycle(self) -> int:
        return check_int("coarse_steps", self.schedule(self.cycles), low=0)  # type: ignore[misc]

    def freeze(self) -> SwapReport:
        """Freezes the current pattern; the next step is a coarse one. Raises SwapError if it is frozen already.

        The first time that a layer has no active weight left, a warning tells. Training goes on, and the layer's
        weights may wake in the next fine step.
        """
        plan = plan_freeze(self.model, self._decider, self.filter_fn, self.optimizer)
        self._carry_out(plan)
        self.phase, self.coarse_done = "coarse", 0
        dead = [r.name for r in plan.report.layers if math.prod(r.shape) and not r.nnz and r.name not in self._dead]
        if dead:
            self._dead.update(dead)
            warnings.warn(f"no active weights left in {', '.join(dead)}", stacklevel=3)
        return plan.report

    def thaw(self) -> None:
        """Thaws; the next step is a fine one. Call it at the end of training to have the dense model back."""
        self._enter_fine()
        self.optimizer.fine_layers = {}
        for name in self._able:
            release(self.model.get_submodule(name))

    def _enter_fine(self) -> None:
        if self.phase == "coarse":
            if self._inner:
                self._inner = []
                self._hold()
            thaw(self.model, self.optimizer, keep_grads=False)
            for group in self.optimizer.param_groups:
                for p in group["params"]:
                    p.grad = None
        self.optimizer.fine_layers = {}
        for name in self._able:
            layer = adopt(self.model.get_submodule(name))
            layer.begin_fine(self._patterns.get(name), 1 - self._decider.least_sparsity(name, layer))
            self.optimizer.fine_layers[layer.weight] = layer.state
        self.phase, self.coarse_done = "fine", 0
        self._wide, self._held = dict(self._patterns), {}
        self._patterns, self._masks = {}, {}

    def _widen(self) -> None:
        """Widens the patterns that the latest step had to renew, so that they hold for more steps."""
        for name in self._able:
            layer = self.model.get_submodule(name)
            if not (isinstance(layer, SparseLayer) and layer.fine and layer.pattern is not None):
                continue
            fine, weight, pattern = layer.state, layer.weight, layer.pattern
            if pattern is self._wide.get(name) and not fine.outgrown(weight):
                if name in self._held:
                    self._held[name] += 1
                continue
            slack = self._slack.get(name, _SLACK)
            if name in self._held:
                slack *= _CHANGE if self._held[name] < _HELD[0] else 1 / _CHANGE if self._held[name] > _HELD[1] else 1
                self._slack[name] = slack = min(_MOST_SLACK, max(_LEAST_SLACK, slack))
            near = self.optimizer.weaker(weight, slack)
            if near is not None:
                self._held[name] = 0
                fine.pattern = SparsePattern.of_at_most(near[0], fine.most(weight), near[1]) or pattern
            self._wide[name] = fine.pattern

    def _carry_out(self, plan: Plan) -> None:
        carry_out(self.model, plan, self.optimizer, keep_grads=False)
        self._patterns, self._masks, self.report = plan.patterns, plan.masks, plan.report
        self._wide, self._held, self.optimizer.fine_layers = {}, {}, {}
        for name in self._able:
            if name not in plan.patterns:  # too dense for now
                self.model.get_submodule(name).end_fine()

    def state_dict(self) -> dict[str, Any]:
        """Phase, counters and patterns as plain data; loads with ``torch.load(weights_only=True)``.

        Save it beside the model's and the optimizer's.
        """
        fine = self._fine_patterns()
        return {
            "coarse_steps": self.coarse_steps,
            "phase": self.phase,
            "coarse_done": self.coarse_done,
            "fine_done": self.fine_done,
            "cycles": self.cycles,
            "schedule": self.schedule.state_dict() if isinstance(self.schedule, PlateauCoarse) else {},
            "patterns": {n: p.state_dict() for n, p in (self._patterns or fine).items()},
            "wide": [n for n, p in fine.items() if p is self._wide.get(n)],
            "held": dict(self._held),
            "slack": dict(self._slack),
            "masks": dict(self._masks),
            "decisions": self._decider.state_dict(),
            "inner": [dict(masks) for masks in self._inner],
        }

    def _fine_patterns(self) -> dict[str, SparsePattern]:
        """What the layers compute over in the fine phase: kept in checkpoints, since it decides the order of sums."""
        if self.phase != "fine":
            return {}
        layers = {n: self.model.get_submodule(n) for n in self._able}
        patterns = {n: m.pattern if isinstance(m, SparseLayer) else None for n, m in layers.items()}
        return {n: p for n, p in patterns.items() if p is not None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Brings the model into the saved phase, with the saved patterns.

        Load this before the model's and the optimizer's state.

        Raises:
            ValueError: naming what does not fit this model; nothing is changed then.
        """
        phase = check_choice("phase", state["phase"], PHASES)
        coarse_steps = check_int("coarse_steps", state["coarse_steps"], low=0)
        coarse_done = check_int("coarse_done", state["coarse_done"], low=0)
        fine_done, cycles = check_int("fine_done", state["fine_done"]), check_int("cycles", state["cycles"], low=0)
        patterns = {n: SparsePattern.from_state_dict(s) for n, s in state["patterns"].items()}
        masks = dict(state["masks"])
        inner = [{n: m.bool() for n, m in masks.items()} for masks in state["inner"]]
        if len(inner) > len(self.levels):
            raise ValueError(expected("inner", f"at most {len(self.levels)} levels", len(inner)))
        current = sparse_layers(self.model)
        modules = dict(self.model.named_modules())
        for name, pattern in patterns.items():
            module = modules.get(name)
            weight = module.pattern if is_frozen(module) else getattr(module, "weight", None)
            if weight is None or tuple(weight.shape) != pattern.shape:
                wanted = f"shape {tuple(weight.shape)}" if weight is not None else "the name of a layer"
                raise ValueError(expected(f"patterns['{name}']", wanted, pattern.shape))
        parameters = {
            n.removesuffix(".values") + ".weight" if n.endswith(".values") else n: p
            for n, p in self.model.named_parameters()
        }
        for name in masks:
            if name not in parameters:
                raise ValueError(expected("masks", "names of the model's parameters", repr(name)))
        if "decisions" in state:
            self._decider.load_state_dict(state["decisions"])
        for name, mask in ((n, m) for masks_ in inner for n, m in masks_.items()):
            layer = name.removesuffix(".values")
            fits = (patterns[layer].nnz,) if layer in patterns else tuple(getattr(parameters.get(name), "shape", ()))
            if tuple(mask.shape) != fits:
                raise ValueError(expected(f"inner['{name}']", f"shape {fits}", tuple(mask.shape)))
        if current or self._masks:
            self.phase = "coarse"
            self._enter_fine()
        if phase == "coarse":
            masks = {n: m.bool() for n, m in masks.items()}
            self._carry_out(Plan(patterns, masks, report_of(self.model, patterns, masks)))
            if inner:
                self._inner = inner
                self._hold()
        else:
            self._patterns = patterns
            self._enter_fine()
            self._wide = {n: patterns[n] for n in state.get("wide", ()) if n in patterns}
            self._held = dict(state.get("held", {}))
        self._slack = dict(state.get("slack", {}))
        self.phase, self.coarse_done, self.coarse_steps = phase, coarse_done, coarse_steps
        self.fine_done, self.cycles = fine_done, cycles
        if isinstance(self.schedule, PlateauCoarse) and state["schedule"]:
            self.schedule.load_state_dict(state["schedule"])

    def __repr__(self) -> str:
        return f"Multilevel(coarse_steps={self.coarse_steps}, phase={self.phase}, coarse_done={self.coarse_done})"
