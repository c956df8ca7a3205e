"""Batch norm that waits: what follows, a ReLU, a sum or a convolution, takes it over and does both in one pass."""

from __future__ import annotations

import weakref
from typing import Any

import torch

from sparsebreg.core import memory
from sparsebreg.core.extension import native
from sparsebreg.core.profiling import labelled
from sparsebreg.lanes.cells import Cell, Deferred
from sparsebreg.lanes.tensor import LaneTensor


def norm_sizes(x: torch.Tensor) -> tuple[int, int, int]:
    positions = 1
    for s in x.shape[2:]:
        positions *= s
    return x.shape[0], x.shape[1], positions


class Normed(Deferred):
    """ReLU(scale * x + shift + residual), the ReLU and the residual optional; scale and shift per channel.

    ``sources`` are x and, where there is one, the residual, or what it is to be made of by a norm of its own
    (``residual_norm``, scale and shift). ``input`` refers weakly to x, also once ``sources`` are
    gone, as long as neither x nor the result is written to.
    """

    __slots__ = ("input", "mean", "relu", "residual_norm", "scale", "shift", "sizes", "summed")

    def __init__(
        self, sources, sizes: tuple[int, int, int], mean, scale, shift, relu: bool = False, residual_norm=None
    ) -> None:
        super().__init__(*sources)
        self.residual_norm: tuple[torch.Tensor, torch.Tensor] | None = residual_norm
        self.sizes, self.mean, self.scale, self.shift, self.relu = sizes, mean, scale, shift, relu
        self.summed = len(sources) == 2
        self.input = weakref.ref(sources[0])

    def settle(self) -> None:
        super().settle()
        self.input = None

    def get_writable(self) -> torch.Tensor:
        self.input = None
        return super().get_writable()

    def gate(self, x: Cell) -> Any:
        """How kernels know where the ReLU passes a gradient: by (scale, shift) of x itself, else by the result."""
        if not self.summed and self.input is not None and self.input() is x and not x.exposed:
            return self.scale.numpy(), self.shift.numpy()
        return self.get_packed().numpy()

    def _like(self, sources, relu: bool, residual_norm) -> Normed:
        return Normed(sources, self.sizes, self.mean, self.scale, self.shift, relu, residual_norm)

    def factors(self) -> tuple:
        """As the kernels take it."""
        return self.scale.numpy(), self.shift.numpy(), self.relu

    def plus(self, residual: Cell) -> Normed:
        own = None
        if isinstance(residual, Normed) and residual.sizes == self.sizes and not (residual.summed or residual.relu):
            sources = residual.sources  # read first: another thread may be done at any time
            if residual.waiting():
                own, residual = (residual.scale, residual.shift), sources[0]
        return self._like((self.sources[0], residual), False, own)

    def rectified(self) -> Normed:
        return self._like(self.sources, True, self.residual_norm)

    @labelled("norm_relu")
    def compute(self, sources: tuple[Cell, ...]) -> torch.Tensor:
        x, *residual = [c.get_packed() for c in sources]
        y = memory.empty(tuple(x.shape), x.dtype)
        native().norm_apply(
            *self.sizes, x.numpy(), self.scale.numpy(), self.shift.numpy(), residual[0].numpy() if residual else None,
            self.residual_norm and tuple(t.numpy() for t in self.residual_norm), self.relu, y.numpy(),
            torch.get_num_threads(),
        )  # fmt: skip
        return y


class GradSum(Deferred):
    """The sum of two gradients, of the same shape and dtype."""

    __slots__ = ()

    def compute(self, sources: tuple[Cell, ...]) -> torch.Tensor:
        a, b = (c.get_packed() for c in sources)
        return torch.add(a, b.view(a.shape), out=memory.empty(tuple(a.shape), a.dtype))


class ReluGrad(Deferred):
    """The gradient of a ReLU: ``sources`` are the gradient of its result, and the result."""

    __slots__ = ()

    def compute(self, sources: tuple[Cell, ...]) -> torch.Tensor:
        grad, result = (c.get_packed() for c in sources)
        return torch.ops.aten.threshold_backward.grad_input(
            grad, result.view(grad.shape), 0, grad_input=memory.empty(tuple(grad.shape), grad.dtype)
        )


class NormGrad(Deferred):
    """The input gradient of a batch norm: scale * gradient + slope * (x - mean) + shift.

    ``sources`` are the gradient and x. Where the ReLU behind the norm lets the gradient pass: see ``Normed.gate``.
    """

    __slots__ = ("factors", "gate", "sizes")

    def __init__(self, sources, sizes: tuple[int, int, int], gate: Any, *factors: torch.Tensor) -> None:
        super().__init__(*sources)
        self.sizes, self.gate, self.factors = sizes, gate, factors

    def norm(self, x: Cell) -> tuple:
        """As the kernels take it."""
        return x.get_packed().numpy(), self.gate, *(f.numpy() for f in self.factors)

    @labelled("norm_grad")
    def compute(self, sources: tuple[Cell, ...]) -> torch.Tensor:
        grad, x = sources
        out = memory.empty(tuple(x.get_packed().shape), x.get_packed().dtype)
        native().norm_grad(*self.sizes, grad.get_packed().numpy(), self.norm(x), out.numpy(), torch.get_num_threads())
        return out


def make_moments(x: LaneTensor) -> tuple[Any, Any]:
    """Uninitialised arrays for the mean and variance of x's channels, which a kernel fills."""
    x._cell.moments = torch.empty(x.shape[1], dtype=x.dtype), torch.empty(x.shape[1], dtype=x.dtype)
    return tuple(t.numpy() for t in x._cell.moments)


def make_sums(grad: LaneTensor, norm: Normed) -> tuple[Any, Any, Any]:
    """The mean of a norm, and room for the sums that it takes of ``grad``, the gradient of its result."""
    sums = torch.empty_like(norm.mean), torch.empty_like(norm.mean)
    grad._cell.sums = norm, *sums
    return norm.mean.numpy(), *(t.numpy() for t in sums)


def waiting_norm(x: Any) -> tuple[Normed, torch.Tensor] | None:
    """The batch norm, with its ReLU if it has one, that x waits for, and its packed input.

    None where something else is to be added, or where x regroups its channels.
    """
    cell = getattr(x, "_cell", None)
    if not isinstance(cell, Normed) or cell.summed or cell.sizes != norm_sizes(x):
        return None
    sources = cell.sources  # read first: another thread may be done at any time
    return (cell, sources[0].get_packed()) if cell.waiting() else None


def waiting_norm_grad(grad: Any) -> tuple[Any, tuple] | None:
    """The gradient that a batch norm is still to be applied to, to become ``grad``, and the norm as kernels take it."""
    cell = getattr(grad, "_cell", None)
    if not isinstance(cell, NormGrad) or cell.sizes != norm_sizes(grad):
        return None
    sources = cell.sources  # read first: another thread may be done at any time
    return (sources[0].get_packed().numpy(), cell.norm(sources[1])) if cell.waiting() else None
