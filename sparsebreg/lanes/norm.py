"""Batch norm, and the ReLU and the sum that may follow it."""

from typing import Any

import torch

from sparsebreg.core import memory
from sparsebreg.core.extension import native
from sparsebreg.core.profiling import labelled
from sparsebreg.lanes.cells import Cell
from sparsebreg.lanes.fusion import GradSum, Normed, NormGrad, ReluGrad, norm_sizes
from sparsebreg.lanes.layout import pack
from sparsebreg.lanes.pointwise import in_place, pointwise
from sparsebreg.lanes.tensor import LaneTensor, alias, handles, wrap

aten = torch.ops.aten


def _normed(x: Any) -> Normed | None:
    """The batch norm that x waits for, as long as nothing but a sum and a ReLU can have followed."""
    cell = getattr(x, "_cell", None)
    return cell if isinstance(cell, Normed) and cell.waiting() and not cell.relu else None


@handles(aten.relu.default)
def _relu(func, args, kwargs):
    x = args[0]
    if (normed := _normed(x)) is not None:
        return alias(normed.rectified(), x.shape, x.dtype)
    packed = x.packed
    return wrap(torch.clamp_min(packed, 0, out=memory.empty(tuple(packed.shape), x.dtype)), x.shape[0])


@handles(aten.relu_.default)
def _relu_in_place(func, args, kwargs):
    x = args[0]
    if (normed := _normed(x)) is None or normed.readers:
        return in_place(func, args, kwargs)
    normed.relu = True
    return x


@handles(aten.add.Tensor)
def _add(func, args, kwargs):
    x, y = args
    if not kwargs and isinstance(x, LaneTensor) and isinstance(y, LaneTensor) and x.shape == y.shape:
        for a, b in ((x, y), (y, x)):
            if (normed := _normed(a)) is not None and not normed.summed and a.dtype == b.dtype and not b._cell.exposed:
                return alias(normed.plus(b._cell), a.shape, a.dtype)
        # Gradients of a tensor that was used twice: a batch norm before it adds the last two as it reads them.
        backward = torch._C._current_graph_task_id() != -1
        if backward and x.dtype == y.dtype and not (x._cell.exposed or y._cell.exposed):
            for cell in (x._cell, y._cell):
                if isinstance(cell, GradSum):
                    cell.get_packed()
            return alias(GradSum(x._cell, y._cell), x.shape, x.dtype)
    return pointwise(func, args, kwargs)


@handles(aten.threshold_backward.default)
def _threshold_backward(func, args, kwargs):
    grad, result, threshold = args
    if threshold != 0 or type(grad) is not type(result) or grad.shape != result.shape:
        return pointwise(func, args, kwargs)
    if not isinstance(result._cell, Normed) or grad._cell.exposed or result._cell.exposed:
        return pointwise(func, args, kwargs)
    return alias(ReluGrad(grad._cell, result._cell), grad.shape, grad.dtype)


def _numpy(t: torch.Tensor | None):
    return None if t is None else t.numpy()


@handles(aten.native_batch_norm.default)
@labelled("batch_norm")
def _batch_norm(func, args, kwargs):
    x, weight, bias, running_mean, running_var, training, momentum, eps = args
    others = [t for t in (weight, bias, running_mean, running_var) if t is not None]
    if x.numel() == 0 or any(t.dtype != x.dtype or not t.is_contiguous() for t in others):
        return NotImplemented
    n, channels, positions = sizes = norm_sizes(x)
    packed, threads = x.packed, torch.get_num_threads()
    if training:
        if x._cell.moments is not None and len(x._cell.moments[0]) == channels:
            mean, var = x._cell.moments
        else:
            mean, var = torch.empty((2, channels), dtype=x.dtype)
            native().norm_stats(*sizes, packed.numpy(), mean.numpy(), var.numpy(), threads)
        invstd = torch.rsqrt(var + eps)
        if running_mean is not None:
            running_mean.lerp_(mean, momentum)
        if running_var is not None:
            count = n * positions
            running_var.lerp_(var * (count / max(1, count - 1)), momentum)
        saved = mean, invstd
    else:
        mean, invstd = running_mean, torch.rsqrt(running_var + eps)
        saved = torch.empty(0), torch.empty(0)
    scale = invstd if weight is None else invstd * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    return alias(Normed((_source(x, packed),), sizes, mean, scale, shift), x.shape, x.dtype), *saved


def _source(x: LaneTensor, packed: torch.Tensor) -> Cell:
    """A cell that holds the present numbers of x for later reading; ``packed`` is its storage."""
    # An exposed x may be written to unseen, and what was packed of it is not kept: a cell that does.
    return Cell(packed, x.shape[0]) if x._cell.exposed else x._cell


@handles(aten.native_batch_norm_backward.default)
@labelled("batch_norm_backward")
def _batch_norm_backward(func, args, kwargs):
    grad_y, x, weight, running_mean, running_var, mean, invstd, training, eps, wanted = args
    if not isinstance(x, LaneTensor):
        return NotImplemented
    n, channels, positions = sizes = norm_sizes(x)
    if not training:
        mean, invstd = running_mean, torch.rsqrt(running_var + eps)
    packed, threads = x.packed, torch.get_num_threads()
    gate = more = passed = None
    if isinstance(grad_y, LaneTensor) and isinstance(masked := grad_y._cell, ReluGrad) and masked.waiting():
        source, result = masked.sources
        gate = result.gate(x._cell)
        if isinstance(source, GradSum) and source.waiting():
            source, more = source.sources
            more = more.get_packed()
        # Where there is another summand, it asks for the masked gradient, too.
        if result.summed or more is not None:
            passed = memory.empty(tuple(packed.shape), x.dtype)
    elif isinstance(grad_y, LaneTensor):
        source = _source(grad_y, grad_y.packed)
    else:
        source = Cell(pack(grad_y.contiguous()), n)
    if more is None and isinstance(gate, tuple) and source.sums is not None and source.sums[0] is result:
        (_, sum_g, sum_gx), source.sums = source.sums, None
    else:
        sum_g, sum_gx = torch.empty((2, channels), dtype=x.dtype)
        native().norm_reduce(
            *sizes, packed.numpy(), source.get_packed().numpy(), _numpy(more), gate, mean.numpy(), sum_g.numpy(),
            sum_gx.numpy(), _numpy(passed), threads,
        )  # fmt: skip
    if passed is not None:
        masked.finish(passed)
        source, gate = masked, None
    grad_x = None
    if wanted[0]:
        scale = invstd if weight is None else invstd * weight
        count = n * positions
        slope = -scale * invstd * invstd * sum_gx / count if training else torch.zeros_like(scale)
        shift = -scale * sum_g / count if training else torch.zeros_like(scale)
        cell = NormGrad((source, _source(x, packed)), sizes, gate, mean, scale, slope, shift)
        # The convolution before computes it as it reads; a gate that may change is not waited for.
        if not (gate is None or isinstance(gate, tuple)):
            cell.get_packed()
        grad_x = alias(cell, x.shape, x.dtype)
    return grad_x, sum_gx * invstd if wanted[1] else None, sum_g if wanted[2] else None
