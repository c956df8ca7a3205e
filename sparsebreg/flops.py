"""Floating-point operations of a training step, as the literature counts them.

``torch.utils.flop_counter.FlopCounterMode`` counts sparse layers too, forward and backward: a product costs 2 · nnz ·
positions, with as many positions as samples (linear) or output pixels (convolution), whatever the backend.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sparsebreg.core.errors import check_choice, check_int, expected
from sparsebreg.swap.carry_out import dense_copy
from sparsebreg.swap.inspect import iter_weights


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of one forward pass: ``dense`` (f_D) with all weights, ``sparse`` (f_S) with the active ones only.

    A step of SGD costs 3 f_D, a coarse step 3 f_S, a fine step that computes on sparse layers 2 f_S + f_D.
    """

    dense: float
    sparse: float

    @property
    def sgd(self) -> float:
        return 3 * self.dense

    @property
    def coarse(self) -> float:
        return 3 * self.sparse

    @property
    def fine(self) -> float:
        return 2 * self.sparse + self.dense

    def fraction_of_sgd(self, coarse_steps: int) -> float:
        """Cost of a cycle of one fine and ``coarse_steps`` coarse steps, as a fraction of as many SGD steps."""
        return (coarse_steps * self.coarse + self.fine) / ((coarse_steps + 1) * self.sgd)


def per_layer(model: nn.Module, input_shape: Sequence[int]) -> dict[str, float]:
    """Forward FLOPs of every linear and convolution layer with all its weights.

    Args:
        input_shape: of a whole batch, (N, ...).

    Raises:
        ValueError: if the model cannot run on this shape.
    """
    dense = dense_copy(model)
    names = [n for n, _, _ in iter_weights(dense)]
    parameter = next(iter(dense.parameters()), torch.empty(0))
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            dense.eval()(torch.zeros(tuple(input_shape), dtype=parameter.dtype))
    except RuntimeError as error:
        raise ValueError(
            expected("input_shape", "a shape that the model takes", f"{tuple(input_shape)} ({error})")
        ) from error
    root = type(dense).__name__
    counts = counter.get_flop_counts()
    return {n: float(sum(counts.get(f"{root}.{n}", {}).values())) for n in names}


def per_step(model: nn.Module, input_shape: Sequence[int]) -> StepFlops:
    """FLOPs of a forward pass on a batch of ``input_shape`` at the model's present density; see :class:`StepFlops`."""
    layers = per_layer(model, input_shape)
    return step_flops(layers, model)


def step_flops(layers: dict[str, float], model: nn.Module) -> StepFlops:
    """As :func:`per_step`, from counts that :func:`per_layer` returned before."""
    density = {n: active / max(1, total) for n, active, total in iter_weights(model)}
    return StepFlops(sum(layers.values()), sum(f * density[n] for n, f in layers.items()))


class TrainingFlops:
    """FLOPs of a training run so far, from the density at every step, and as a fraction of SGD's.

    Call :meth:`step` for every training step, before it changes the pattern::

        counted = sb.flops.TrainingFlops(model, (1, 1, 28, 28))
        for x, y in loader:
            loss(model(x), y).backward()
            counted.step(ml.phase, samples=len(x))
            ml.step()
        counted.fraction_of_sgd

    Args:
        model: dense or swapped.
        input_shape: of a whole batch, (N, ...); costs are divided by N.

    Attributes:
        total, sgd: FLOPs of the steps so far, and of as many steps of SGD on dense layers.
    """

    def __init__(self, model: nn.Module, input_shape: Sequence[int]) -> None:
        samples = max(1, next(iter(input_shape)))
        self.model = model
        self._layers = {n: f / samples for n, f in per_layer(model, input_shape).items()}
        self._frozen: StepFlops | None = None
        self.total = self.sgd = 0.0

    def step(self, phase: str = "fine", samples: int = 1) -> None:
        """Adds a step.

        Args:
            phase: "coarse": 3 f_S; "fine": 2 f_S + f_D, as of LinBreg, which needs the gradient of all weights;
                "dense": 3 f_D, as of SGD, or of a fine step that is computed on dense layers.
            samples: of the batch.
        """
        check_choice("phase", phase, ("coarse", "fine", "dense"))
        check_int("samples", samples, low=0)
        if phase != "coarse" or self._frozen is None:
            self._frozen = step_flops(self._layers, self.model)
        count = self._frozen
        if phase != "coarse":
            self._frozen = None  # the pattern may change in this step
        cost = {"coarse": count.coarse, "fine": count.fine, "dense": count.sgd}[phase]
        self.total += samples * cost
        self.sgd += samples * count.sgd

    @property
    def fraction_of_sgd(self) -> float:
        """0 before the first step."""
        return self.total / self.sgd if self.sgd else 0.0

    def state_dict(self) -> dict[str, float]:
        return {"total": self.total, "sgd": self.sgd}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.total, self.sgd, self._frozen = float(state["total"]), float(state["sgd"]), None
