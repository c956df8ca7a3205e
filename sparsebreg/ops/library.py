"""What the operators share: their registration with PyTorch, and the patterns that cross as int32 tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import register_flop_formula

from sparsebreg.core.errors import check_input, expected
from sparsebreg.core.gradient import PendingGrad
from sparsebreg.core.pattern import SparsePattern
from sparsebreg.lanes import LaneTensor
from sparsebreg.lanes.tensor import handles

LIBRARY = torch.library.Library("sparsebreg", "DEF")

#: Types of tensors whose memory the kernels read themselves.
_OWN = {torch.Tensor, torch.nn.Parameter, LaneTensor, PendingGrad}


class Places(NamedTuple):
    """A pattern as an operator gets it: its index, and the shape of the dense weight. Nothing is checked yet."""

    rowptr: torch.Tensor
    col: torch.Tensor
    shape: tuple[int, ...]


def pattern_of(places: Places | SparsePattern) -> SparsePattern:
    return places if isinstance(places, SparsePattern) else SparsePattern.of_index(*places)


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
        autograd: calls the ``torch.autograd.Function`` that differentiates it; that one's forward pass comes back to
            the operator below autograd.
        flops: FLOPs of a call, from the shapes of the tensors and the other arguments as they are.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    operator = getattr(torch.ops.sparsebreg, name).default
    LIBRARY.impl(name, kernel, "CPU")
    LIBRARY.impl(name, autograd, "Autograd")
    torch.library.register_fake(f"sparsebreg::{name}", fake, lib=LIBRARY)
    handles(operator)(lambda func, args, kwargs: kernel(*args, **kwargs))
    if flops is not None:
        register_flop_formula(getattr(torch.ops.sparsebreg, name))(flops)
    return operator


def observed(*tensors: torch.Tensor | None) -> bool:
    """Whether PyTorch has to see the operator: a dispatch mode is active, or a tensor has a type of its own.

    Else the kernel is called directly: an operator's way through the dispatcher takes longer than a small layer.
    """
    return torch._C._len_torch_dispatch_stack() > 0 or any(t is not None and type(t) not in _OWN for t in tensors)


def traced() -> bool:
    """Whether a gradient has to be a function of PyTorch's itself: to be differentiated or transformed again."""
    return torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()


def below_autograd(operator: Any, *args: Any) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*args)


def plain(x: torch.Tensor) -> torch.Tensor:
    return x.plain if isinstance(x, LaneTensor) else x


def readable(x: torch.Tensor, backend: Any) -> torch.Tensor:
    """x, unpacked where the backend does not compute on the lane layout."""
    return x if backend.lanes else plain(x)


def or_empty(grads: tuple[torch.Tensor | None, ...], like: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Gradients as an operator returns them: an empty tensor stands for one that is not wanted."""
    return tuple(like.new_empty(0) if g is None else g for g in grads)


def or_none(grads: tuple[torch.Tensor, ...], needs: tuple[bool, ...]) -> tuple[torch.Tensor | None, ...]:
    """The other way."""
    return tuple(g if need else None for g, need in zip(grads, needs, strict=True))


def added(*terms: torch.Tensor | None) -> torch.Tensor | None:
    """The sum of those that are not None; None without any."""
    there = [t for t in terms if t is not None]
    return sum(there[1:], there[0]) if there else None


def check_parameters(
    values: Any, bias: torch.Tensor | None, weight: torch.Tensor | None, pattern: SparsePattern, dims: int, kind: str
) -> None:
    """Raises TypeError or ValueError, naming the argument, unless the parameters of a layer fit its pattern."""
    if not isinstance(values, torch.Tensor) or values.dtype not in (torch.float32, torch.float64):
        got = getattr(values, "dtype", type(values).__name__)
        raise TypeError(expected("values", "a float32 or float64 tensor", got))
    check_input("values", values, values.dtype)
    if values.shape != pattern.col.shape:
        raise ValueError(expected("values", f"shape ({pattern.nnz},)", tuple(values.shape)))
    if bias is not None:
        check_input("bias", bias, values.dtype)
        if bias.shape != (pattern.rows,):
            raise ValueError(expected("bias", f"shape ({pattern.rows},)", tuple(bias.shape)))
    if weight is not None:
        check_input("weight", weight, values.dtype)
        if tuple(weight.shape) != pattern.shape:
            raise ValueError(expected("weight", f"shape {pattern.shape}", tuple(weight.shape)))
    if len(pattern.shape) != dims:
        raise ValueError(expected("pattern", f"the shape of a {kind} weight ({dims} sizes)", pattern.shape))
