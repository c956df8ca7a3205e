"""Element-wise operations: on the packed storage, by torch's own kernels."""

from typing import Any

import torch

from sparsebreg.core import memory
from sparsebreg.core.extension import native
from sparsebreg.lanes.layout import FLOATS, pack
from sparsebreg.lanes.tensor import HANDLERS, LaneTensor, handles, wrap

aten = torch.ops.aten


_POINTWISE = [
    "abs", "add", "clamp", "clamp_max", "clamp_min", "div", "elu", "elu_backward", "exp", "gelu", "gelu_backward",
    "hardsigmoid", "hardsigmoid_backward", "hardswish", "hardswish_backward", "hardtanh", "hardtanh_backward",
    "leaky_relu", "leaky_relu_backward", "log_sigmoid_backward", "maximum", "minimum", "mish", "mish_backward", "mul",
    "neg", "pow", "reciprocal", "relu", "rsqrt", "rsub", "sigmoid", "sigmoid_backward", "silu", "silu_backward",
    "softplus", "softplus_backward", "sqrt", "sub", "tanh", "tanh_backward", "threshold", "threshold_backward", "where",
]  # fmt: skip
_COMPARISONS = ["eq", "ge", "gt", "isnan", "isfinite", "le", "lt", "ne"]

_OUT: dict[Any, tuple[Any, str]] = {}


def lane_of(args) -> LaneTensor:
    return next(a for a in args if isinstance(a, LaneTensor))


def operand(x: Any, like: LaneTensor) -> Any:
    """x as an operand beside the packed ``like``; NotImplemented where it does not broadcast into its shape."""
    if isinstance(x, LaneTensor):
        return x.packed if x.shape == like.shape else NotImplemented
    if not isinstance(x, torch.Tensor) or x.dim() == 0:
        return x
    if x.device.type != "cpu" or x.dim() > like.dim():
        return NotImplemented
    if x.shape == like.shape:
        return pack(x.contiguous()) if x.dtype == like.dtype or x.dtype not in FLOATS else NotImplemented
    if x.dim() == like.dim():
        if x.shape[0] != 1:
            return NotImplemented
        x = x[0]
    sizes = like.shape[like.dim() - x.dim() :]
    if x.dim() == like.dim() or any(a not in (1, b) for a, b in zip(x.shape, sizes, strict=True)):
        return NotImplemented
    return x.unsqueeze(-1)


def pointwise(func, args, kwargs):
    like = lane_of(args)
    operands = [operand(a, like) for a in args]
    if any(o is NotImplemented for o in operands) or any(isinstance(v, torch.Tensor) for v in kwargs.values()):
        return NotImplemented
    out = _OUT.get(func)
    if out is not None and all(o.dtype == like.dtype for o in operands if isinstance(o, torch.Tensor) and o.dim()):
        out, name = out
        packed = operands[next(i for i, a in enumerate(args) if a is like)]
        result = memory.empty(tuple(packed.shape), like.dtype)
        out(*operands, **kwargs, **{name: result})
    else:
        result = func(*operands, **kwargs)
    return wrap(result, like.shape[0])


def in_place(func, args, kwargs):
    x = args[0]
    if not isinstance(x, LaneTensor) or x._cell.exposed or kwargs:
        return NotImplemented
    operands = [operand(a, x) for a in args]
    if any(o is NotImplemented for o in operands):
        return NotImplemented
    x._cell.get_writable()
    func(*operands)
    return x


def _register_pointwise() -> None:
    for name in [*_POINTWISE, *_COMPARISONS]:
        packet = getattr(aten, name)
        for overload in packet.overloads():
            func = getattr(packet, overload)
            outs = [a for a in func._schema.arguments if a.is_out]
            if not outs and not func._schema.is_mutable:
                HANDLERS[func] = pointwise
        for overload in packet.overloads():
            out = getattr(packet, overload)
            outs = [a for a in out._schema.arguments if a.is_out]
            # A generated out= form computes a tensor of its own and copies it.
            if len(outs) != 1 or name in _COMPARISONS or torch.Tag.generated in out.tags:
                continue
            inputs = [(a.name, str(a.type)) for a in out._schema.arguments if not a.is_out]
            for f in packet.overloads():
                func = getattr(packet, f)
                if func in HANDLERS and inputs == [(a.name, str(a.type)) for a in func._schema.arguments]:
                    _OUT[func] = out, outs[0].name
    for name in _POINTWISE:
        if (packet := getattr(aten, name + "_", None)) is not None:
            for overload in packet.overloads():
                func = getattr(packet, overload)
                if not any(a.is_out for a in func._schema.arguments):
                    HANDLERS[func] = in_place


_register_pointwise()


@handles(aten.hardswish.default, aten.hardswish_backward.default)
def _hardswish(func, args, kwargs):
    *grad, x = args
    if not all(isinstance(t, LaneTensor) and t.shape == x.shape for t in args):
        return pointwise(func, args, kwargs)
    out, *sources = memory.empty(tuple(x.packed.shape), x.dtype), *(t.packed.numpy() for t in (x, *grad))
    native().hardswish(sources[0], sources[1] if grad else None, out.numpy(), torch.get_num_threads())
    return wrap(out, x.shape[0])
