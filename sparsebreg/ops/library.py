"""The operators' library: how an operation is registered with PyTorch, and when PyTorch has to see it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import is_autocast_enabled
from torch.utils.flop_counter import register_flop_formula

from sparsebreg.core.gradient import PendingGrad
from sparsebreg.core.pattern import SparsePattern
from sparsebreg.lanes import LaneTensor
from sparsebreg.lanes.tensor import handles

LIBRARY = torch.library.Library("sparsebreg", "DEF")

#: Types of tensors whose memory the kernels read themselves.
_OWN = {torch.Tensor, torch.nn.Parameter, LaneTensor, PendingGrad, type(None)}


class Places(NamedTuple):
    """A pattern as an operator gets it: its index, and the shape of the dense weight. Nothing is checked yet."""

    rowptr: torch.Tensor
    col: torch.Tensor
    shape: tuple[int, ...]

    @property
    def rows(self) -> int:
        return self.shape[0]

    def pattern(self) -> SparsePattern:
        return SparsePattern.of_index(*self)


class Operation(torch.autograd.Function):
    """A differentiable operation. ``torch.vmap`` maps it by a loop."""

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        def sample(i: int) -> Any:
            return cls.apply(*(a.select(d, i) if isinstance(d, int) else a for a, d in zip(args, in_dims, strict=True)))

        made = [sample(i) for i in range(info.batch_size)]
        if isinstance(made[0], torch.Tensor):
            return torch.stack(made), 0
        stacked = tuple(None if parts[0] is None else torch.stack(parts) for parts in zip(*made, strict=True))
        return stacked, tuple(None if s is None else 0 for s in stacked)


def register(
    schema: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    autograd: Callable[..., Any],
    flops: Callable[..., int] | None = None,
) -> Any:
    """Registers an operator with PyTorch; returns it.

    Args:
        schema: as for ``torch.library.define``, without the namespace.
        kernel: computes it, for ordinary tensors on the CPU and for lane tensors.
        fake: an empty result of the right shape, dtype and strides, from the same arguments.
        autograd: calls the :class:`Operation` that differentiates it, whose forward pass comes back to the operator by
            :func:`below_autograd`.
        flops: FLOPs of a call, from the shapes of the tensors and the other arguments as they are.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    operator = getattr(torch.ops.sparsebreg, name)
    LIBRARY.impl(name, kernel, "CPU")
    LIBRARY.impl(name, autograd, "Autograd")
    torch.library.register_fake(f"sparsebreg::{name}", fake, lib=LIBRARY)
    handles(operator.default)(lambda func, args, kwargs: kernel(*args, **kwargs))
    if flops is not None:
        register_flop_formula(operator)(flops)
    return operator.default


def observed(*tensors: torch.Tensor | None) -> bool:
    """Whether PyTorch has to see the operator: a dispatch mode is active, or a tensor has a type of its own.

    Else the kernel is called directly: an operator's way through the dispatcher takes longer than a small layer.
    """
    return torch._C._len_torch_dispatch_stack() > 0 or not _OWN.issuperset(map(type, tensors))


def traced() -> bool:
    """Whether gradients must be differentiable operations themselves (create_graph, torch.func)."""
    return torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()


def under_autocast(x: Any, dtype: torch.dtype) -> Any:
    """Casts x to ``dtype`` if autocast is on, as torch does for its own operations."""
    if isinstance(x, torch.Tensor) and x.dtype is not dtype and x.is_floating_point() and is_autocast_enabled("cpu"):
        return x.to(dtype)
    return x


def below_autograd(operator: Any, *args: Any) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*args)


def plain(x: torch.Tensor) -> torch.Tensor:
    return x.plain if isinstance(x, LaneTensor) else x


def readable(x: torch.Tensor, backend: Any) -> torch.Tensor:
    """x, unpacked where the backend does not compute on the lane layout."""
    return x if backend.lanes else plain(x)
