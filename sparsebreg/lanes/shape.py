"""Views, copies, reductions and concatenation."""

import torch

from sparsebreg.core import memory
from sparsebreg.lanes.layout import FLOATS, LANES, blocks, pack
from sparsebreg.lanes.pointwise import lane_of, operand
from sparsebreg.lanes.tensor import LaneTensor, alias, handles, wrap

aten = torch.ops.aten


@handles(aten.detach.default, aten.alias.default)
def _detach(func, args, kwargs):
    x = args[0]
    return alias(x._cell, x.shape, x.dtype)


@handles(aten.view.default, aten._unsafe_view.default)
def _view(func, args, kwargs):
    x, sizes = args[0], list(args[1])
    if -1 in sizes:
        known = 1
        for s in sizes:
            known *= s if s != -1 else 1
        sizes[sizes.index(-1)] = x.numel() // known if known else 0
    if len(sizes) < 2 or sizes[0] != x.shape[0] or x.numel() == 0:
        return NotImplemented
    return alias(x._cell, tuple(sizes), x.dtype)


@handles(aten.clone.default)
def _clone(func, args, kwargs):
    x = args[0]
    if kwargs.get("memory_format") not in (None, torch.preserve_format, torch.contiguous_format):
        return NotImplemented
    packed = x.packed
    return wrap(memory.empty(tuple(packed.shape), packed.dtype).copy_(packed), x.shape[0])


@handles(aten._to_copy.default)
def _to_copy(func, args, kwargs):
    x, dtype = args[0], kwargs.get("dtype")
    rest = {k: v for k, v in kwargs.items() if k not in ("dtype", "non_blocking") and v is not None}
    if dtype not in FLOATS or rest not in ({}, {"device": torch.device("cpu")}):
        return NotImplemented
    return wrap(x.packed.to(dtype, copy=True), x.shape[0])


@handles(aten.copy_.default)
def _copy(func, args, kwargs):
    x, src = args[:2]
    if not isinstance(x, LaneTensor) or x._cell.exposed:
        return NotImplemented
    source = operand(src, x)
    if source is NotImplemented:
        return NotImplemented
    x._cell.get_writable().view(x.packed.shape).copy_(source)
    return x


def _over_positions(func, args, kwargs, spatial):
    x = args[0]
    dims = args[1] if len(args) > 1 else None
    if x.dim() < 3 or not dims or kwargs.get("dtype") is not None or any(not -x.dim() <= d < x.dim() for d in dims):
        return NotImplemented
    dims = sorted(d % x.dim() for d in dims)
    inner = list(range(2, x.dim()))
    keep = args[2] if len(args) > 2 else kwargs.get("keepdim", False)
    if dims[-len(inner) :] != inner:
        return NotImplemented
    # (blocks, C, P, 16) to (N, C): what is left is small, and has no padding.
    n, channels = x.shape[:2]
    sums = spatial(x.packed.view(blocks(n), channels, -1, LANES), 2)
    out = sums.permute(0, 2, 1).reshape(-1, channels)[:n].contiguous()
    if rest := dims[: -len(inner)]:
        out = (out.mean if spatial is torch.mean else out.sum)(rest, keepdim=keep)
    return out.view(*out.shape, *(1 for _ in inner)) if keep else out


@handles(aten.mean.dim)
def _mean(func, args, kwargs):
    return _over_positions(func, args, kwargs, torch.mean)


@handles(aten.sum.dim_IntList)
def _sum(func, args, kwargs):
    return _over_positions(func, args, kwargs, torch.sum)


@handles(aten.cat.default)
def _cat(func, args, kwargs):
    tensors, dim = args[0], args[1] if len(args) > 1 else kwargs.get("dim", 0)
    like = lane_of(tensors)
    if not -like.dim() < dim < like.dim() or dim == 0:
        return NotImplemented
    dim %= like.dim()
    parts = []
    for t in tensors:
        if t.dim() != like.dim() or t.shape[0] != like.shape[0] or t.dtype != like.dtype:
            return NotImplemented
        parts.append(t.packed if isinstance(t, LaneTensor) else pack(t.contiguous()))
    sizes = list(parts[0].shape)
    sizes[dim] = sum(p.shape[dim] for p in parts)
    return wrap(torch.cat(parts, dim, out=memory.empty(tuple(sizes), like.dtype)), like.shape[0])
