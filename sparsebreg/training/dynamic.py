"""Dynamic sparse training and pruning on frozen patterns: between two changes of the pattern the layers are sparse.

The methods keep a mask per layer and any torch optimizer. Weights outside of the masks are zero, and so is what the
optimizer keeps of them.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from sparsebreg.core.errors import SwapError, check_choice, check_int, check_real, expected
from sparsebreg.core.selection import largest
from sparsebreg.optim.base import BregmanOptimizer
from sparsebreg.optim.groups import dense_layers, is_dense
from sparsebreg.optim.initialize import DISTRIBUTIONS, layer_densities
from sparsebreg.swap.carry_out import carry_out, thaw
from sparsebreg.swap.decide import Decider, Filter, SparsifyConfig
from sparsebreg.swap.plan import plan_freeze
from sparsebreg.swap.report import SwapReport
from sparsebreg.training.multilevel import PHASES

Distribution = str | Mapping[str, float]


class MaskedTraining:
    """What the methods share: masks, the swaps, checkpoints. Not for use by itself.

    Call :meth:`step` where ``optimizer.step()`` stood.

    Attributes:
        phase: what the next step is: "coarse" on sparse layers, "fine" on dense ones.
        masks: the active weights of every layer, by name.
        steps: steps so far.
        report: what the latest freeze did, or None.
    """

    #: Whether the pattern changes by the gradient of all weights, which then takes the place of the optimizer's step.
    dense_gradients = False

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: SparsifyConfig | None,
        filter_fn: Filter | None,
        seed: int,
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer) or isinstance(optimizer, BregmanOptimizer):
            wanted = "an optimizer of torch.optim (Bregman optimizers have Multilevel)"
            raise TypeError(expected("optimizer", wanted, type(optimizer).__name__))
        self.model, self.optimizer = model, optimizer
        self.config = config or SparsifyConfig()
        self.filter_fn = filter_fn
        self.generator = torch.Generator().manual_seed(check_int("seed", seed, low=0))
        self._decider = Decider(self.config)
        plan_freeze(model, self._decider, filter_fn, optimizer)  # raises for a model that cannot be swapped
        weights = [m.weight for _, m in dense_layers(model)]
        if len({id(w) for w in weights}) < len(weights):
            raise SwapError(expected("model", "layers with weights of their own", "one that shares a weight"))
        self.masks: dict[str, torch.Tensor] = {}
        self.phase, self.steps = "fine", 0
        self.report: SwapReport | None = None

    def _started(self, step: int) -> bool:
        """Whether there is a pattern in step number ``step``, counted from 1."""
        return True

    def _due(self, step: int) -> bool:
        """Whether the pattern changes in this step."""
        raise NotImplementedError

    def _change(self, name: str, weight: nn.Parameter, mask: torch.Tensor) -> torch.Tensor:
        """The new mask of a layer."""
        raise NotImplementedError

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the optimizer, or a change of the pattern where one is due. Returns what ``closure`` returned.

        Gradients do not survive a phase change; call ``zero_grad`` before every backward pass as usual.
        """
        number = self.steps + 1
        due = self._due(number)
        if due and self.dense_gradients:
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
        else:
            loss = self._optimize(closure)
        self.steps = number
        if due:
            self._thaw()
            self._update()
        if self._started(number + 1) and not (self.dense_gradients and self._due(number + 1)):
            self._freeze()
        else:
            self._thaw()
        return loss

    def _optimize(self, closure: Callable[[], Any] | None) -> Any:
        """A step of the optimizer that leaves weights outside of the masks alone."""
        # Sparse layers have none; in the others they are held at zero.
        dense = [(m, self.masks[n]) for n, m in self._dense().items()] if self._started(self.steps + 1) else []

        def masked() -> Any:
            loss = closure() if closure is not None else None
            for module, mask in dense:
                if module.weight.grad is not None:
                    module.weight.grad.mul_(mask)
            return loss

        if closure is None:
            masked()
        loss = self.optimizer.step(None if closure is None else masked)
        with torch.no_grad():
            for module, mask in dense:
                module.weight.mul_(mask)
        return loss

    def _dense(self) -> dict[str, nn.Module]:
        modules = dict(self.model.named_modules())
        return {n: modules[n] for n in self.masks if is_dense(modules[n])}

    @torch.no_grad()
    def _update(self) -> None:
        for name, module in self._dense().items():
            old = self.masks[name]
            new = self._change(name, module.weight, old)
            self._restrict(module.weight, old & new)
            self.masks[name] = new
            module.weight.grad = None

    def _restrict(self, weight: nn.Parameter, kept: torch.Tensor) -> None:
        """Zeroes a weight, and what the optimizer keeps of it, outside of ``kept``."""
        with torch.no_grad():
            weight.mul_(kept)
            for value in self.optimizer.state.get(weight, {}).values():
                if isinstance(value, torch.Tensor) and value.shape == weight.shape:
                    value.mul_(kept)

    def _freeze(self) -> None:
        if self.phase == "fine":
            plan = plan_freeze(self.model, self._decider, self.filter_fn, self.optimizer, self.masks)
            carry_out(self.model, plan, self.optimizer, keep_grads=False)
            self.phase, self.report = "coarse", plan.report

    def _thaw(self) -> None:
        if self.phase == "coarse":
            thaw(self.model, self.optimizer, keep_grads=False)
            self.optimizer.zero_grad()
            self.phase = "fine"

    def finish(self) -> None:
        """Gives the dense modules back, with zeros outside of the masks. Call it at the end of training."""
        self._thaw()

    def density(self) -> float:
        """Active weights of all layers with a mask as a fraction of theirs."""
        return sum(int(m.sum()) for m in self.masks.values()) / max(1, sum(m.numel() for m in self.masks.values()))

    def state_dict(self) -> dict[str, Any]:
        """Plain data; loads with ``torch.load(weights_only=True)``. Save it beside the model's and the optimizer's."""
        return {
            "phase": self.phase,
            "steps": self.steps,
            "masks": dict(self.masks),
            "generator": self.generator.get_state(),
            "decisions": self._decider.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Brings the model into the saved phase, with the saved masks. Load it before the model's and the optimizer's.

        Raises:
            ValueError: naming what does not fit this model; nothing is changed then.
        """
        phase = check_choice("phase", state["phase"], PHASES)
        steps = check_int("steps", state["steps"], low=0)
        masks = {n: m.bool() for n, m in state["masks"].items()}
        for name in self.masks.keys() | masks.keys():
            got = tuple(masks[name].shape) if name in masks else None
            wanted = tuple(self.masks[name].shape) if name in self.masks else "no such layer"
            if got != wanted:
                raise ValueError(expected(f"masks['{name}']", f"shape {wanted}", got))
        if "decisions" in state:
            self._decider.load_state_dict(state["decisions"])
        self._thaw()
        self.masks, self.steps = masks, steps
        self.generator.set_state(state["generator"])
        if phase == "coarse":
            with torch.no_grad():  # the weights themselves are loaded later
                for name, module in self._dense().items():
                    module.weight.mul_(masks[name])
            self._freeze()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(density={self.density():.4g}, phase={self.phase}, steps={self.steps})"


class _DropAndGrow(MaskedTraining):
    """RigL and SET: every now and then the smallest weights leave and as many others come."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        density: float | None = 0.05,
        update_every: int = 100,
        drop_fraction: float = 0.3,
        stop_after: int | None = None,
        distribution: Distribution = "erk",
        config: SparsifyConfig | None = None,
        filter_fn: Filter | None = None,
        seed: int = 0,
    ) -> None:
        self.update_every = check_int("update_every", update_every, low=2)
        self.drop_fraction = check_real("drop_fraction", drop_fraction, low=0, high=1)
        self.stop_after = None if stop_after is None else check_int("stop_after", stop_after, low=1)
        super().__init__(model, optimizer, config, filter_fn, seed)
        if density is None:
            layers = {n: m.weight for n, m in dense_layers(model)}
            layers = {n: w for n, w in layers.items() if filter_fn is None or filter_fn(model.get_submodule(n), n)}
            self.masks = {n: w.detach() != 0 for n, w in layers.items()}
        else:
            densities = layer_densities(model, density, distribution, filter_fn)
            self.masks = {n: self._random(model.get_submodule(n).weight, d) for n, d in densities.items()}
        for name, module in self._dense().items():
            self._restrict(module.weight, self.masks[name])
        self._freeze()

    def _random(self, weight: torch.Tensor, density: float) -> torch.Tensor:
        return largest(torch.rand(weight.shape, generator=self.generator), round(density * weight.numel()))

    def _due(self, step: int) -> bool:
        return step % self.update_every == 0 and (self.stop_after is None or step < self.stop_after)

    def fraction(self, step: int) -> float:
        """Of the active weights, how many are dropped at this step: it falls to zero along a cosine."""
        if self.stop_after is None:
            return self.drop_fraction
        return self.drop_fraction / 2 * (1 + math.cos(math.pi * min(step, self.stop_after) / self.stop_after))

    def _growth(self, weight: nn.Parameter) -> torch.Tensor:
        """A score of all weights, of which the largest grow."""
        raise NotImplementedError

    def _change(self, name: str, weight: nn.Parameter, mask: torch.Tensor) -> torch.Tensor:
        active = int(mask.sum())
        drop = int(self.fraction(self.steps) * active)
        kept = largest(weight.abs(), active - drop, among=mask)
        score = self._growth(weight)
        return kept | largest(torch.where(kept, -1, score), drop)


class RigL(_DropAndGrow):
    """Rigged lottery tickets: weights grow where the gradient of the whole layer is largest.

    Every ``update_every`` steps the gradients of all weights, computed on dense layers (phase "fine"), take the place
    of the optimizer's step: of each layer's active weights the smallest are dropped, and as many of the largest
    gradients among all others grow, those just dropped too, which then keep their value. New weights start at zero,
    and so does their state in the optimizer. The number of active weights of a layer never changes.

    Source: Evci, Gale, Menick, Castro, Elsen, arXiv 1911.11134, Algorithm 1.

    Args:
        model: the model, dense.
        optimizer: any optimizer of ``torch.optim`` that holds the weights; not a Bregman optimizer.
        density: active weights as a fraction of all; the first masks are random, and the weights in them stay as they
            are. None: the present nonzero weights are the masks (after :func:`sparsebreg.sparse_init_`, for one).
        update_every: steps from change to change, at least 2.
        drop_fraction: of the active weights, in [0, 1]; falls along a cosine if there is a ``stop_after``.
        stop_after: step from which the pattern stays; None: it never does.
        distribution: "erk", "uniform", or densities by layer name.
        config, filter_fn: which layers become sparse; as for :func:`sparsebreg.sparsify_`. Layers that ``config``
            leaves dense keep to their mask all the same; those that ``filter_fn`` leaves out have none.
        seed: of the random masks.

    Raises:
        TypeError, ValueError: naming the argument; SwapError (a ValueError) for a model that cannot be swapped.
    """

    dense_gradients = True

    def _growth(self, weight: nn.Parameter) -> torch.Tensor:
        if weight.grad is None:
            raise RuntimeError(expected("step", "gradients of all weights in the phase 'fine'", "none"))
        return weight.grad.abs()


class SET(_DropAndGrow):
    """Sparse evolutionary training: as :class:`RigL`, but weights grow at random places.

    No dense gradients are needed: the pattern changes after the optimizer's step, and the phase is always "coarse".

    Source: Mocanu et al., Nature Communications 9, 2383 (2018); with the magnitude criterion and zero start of Evci et
    al., arXiv 1911.11134.
    """

    def _growth(self, weight: nn.Parameter) -> torch.Tensor:
        return torch.rand(weight.shape, generator=self.generator)


class GradualPruning(MaskedTraining):
    """Magnitude pruning along a cubic schedule: from dense at step ``begin`` to ``density`` at step ``end``.

    At step t the sparsity is s · (1 − (1 − (t − begin) / (end − begin))³). Until ``begin`` training is dense (phase
    "fine"); then the smallest weights leave every ``update_every`` steps, after the optimizer's step, for good.

    Source: Zhu, Gupta, arXiv 1710.01878.

    Args:
        model, optimizer, config, filter_fn: as for :class:`RigL`.
        density: in the end, in (0, 1].
        begin, end: steps, counted from 1.
        update_every: steps from change to change; the last one is at ``end``.
        distribution: "global" (the largest weights of all layers), "uniform", "erk", or densities by layer name.

    Raises:
        TypeError, ValueError: naming the argument; SwapError (a ValueError) for a model that cannot be swapped.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        density: float = 0.05,
        begin: int = 1,
        end: int = 1000,
        update_every: int = 100,
        distribution: Distribution = "global",
        config: SparsifyConfig | None = None,
        filter_fn: Filter | None = None,
    ) -> None:
        self.begin = check_int("begin", begin, low=1)
        self.end = check_int("end", end, low=self.begin)
        self.update_every = check_int("update_every", update_every, low=1)
        self.final = check_real("density", density, low=0, strict=True, high=1)
        self.distribution = distribution
        if not isinstance(distribution, Mapping):
            check_choice("distribution", distribution, ["global", *DISTRIBUTIONS])
        super().__init__(model, optimizer, config, filter_fn, seed=0)
        # Raises for densities that do not fit, and says which layers take part.
        self._final = layer_densities(
            model, self.final, "uniform" if distribution == "global" else distribution, filter_fn
        )
        self.masks = {n: torch.ones_like(model.get_submodule(n).weight, dtype=torch.bool) for n in self._final}

    def _started(self, step: int) -> bool:
        return step > self.begin

    def _due(self, step: int) -> bool:
        return step == self.end or (self.begin <= step < self.end and (step - self.begin) % self.update_every == 0)

    def part(self, step: int) -> float:
        """How much of the final sparsity there is at this step."""
        done = 1.0 if self.end == self.begin else (step - self.begin) / (self.end - self.begin)
        return 1 - (1 - min(1.0, max(0.0, done))) ** 3

    def _update(self) -> None:
        if self.distribution == "global":
            scores = [m.weight.detach().abs() for m in self._dense().values()]
            flat, among = (
                torch.cat([t.reshape(-1) for t in ts]) for ts in (scores, [self.masks[n] for n in self._dense()])
            )
            keep = largest(flat, round((1 - self.part(self.steps) * (1 - self.final)) * flat.numel()), among)
            parts = keep.split([s.numel() for s in scores])
            self._next = {n: k.view(s.shape) for n, k, s in zip(self._dense(), parts, scores, strict=True)}
        super()._update()

    def _change(self, name: str, weight: nn.Parameter, mask: torch.Tensor) -> torch.Tensor:
        if self.distribution == "global":
            return self._next[name]
        density = 1 - self.part(self.steps) * (1 - self._final[name])
        return largest(weight.abs(), round(density * weight.numel()), among=mask)


class Prune(GradualPruning):
    """Training, one-shot magnitude pruning after step ``at``, fine-tuning on the fixed pattern.

    Args:
        model, optimizer, distribution, config, filter_fn: as for :class:`GradualPruning`.
        density: after pruning, in (0, 1].
        at: the step after which the model is pruned, counted from 1.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        density: float = 0.05,
        at: int = 1000,
        distribution: Distribution = "global",
        config: SparsifyConfig | None = None,
        filter_fn: Filter | None = None,
    ) -> None:
        at = check_int("at", at, low=1)
        super().__init__(model, optimizer, density, at, at, 1, distribution, config, filter_fn)
