"""Floating-point operations of a training step, as the literature counts them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sparsebreg.convert import dense_copy, iter_weights
from sparsebreg.errors import expected


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
