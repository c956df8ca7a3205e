"""The lane layout, and the tensor that carries it through a model.

A batch of N samples lies in blocks of 16, lanes innermost: ``[ceil(N / 16)][...][16]``. The sparse convolutions compute
in it. A :class:`LaneTensor` looks like the (N, C, H, W) tensor that it stands for; what PyTorch does with it runs on
the packed storage where an operation is known here, and on an unpacked copy where it is not: always the same result.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from sparsebreg import _extension, memory
from sparsebreg._extension import native
from sparsebreg.errors import BackendError, check_input, expected
from sparsebreg.profiling import labelled

__all__ = ["LANES", "LaneTensor", "from_plain", "to_plain", "unpacked"]

LANES = 16

_FLOATS = (torch.float32, torch.float64)

aten = torch.ops.aten

_unpacked: Counter[str] = Counter()


def unpacked() -> dict[str, int]:
    """How often operations that are not known on the lane layout unpacked a tensor in this process, by name."""
    return dict(_unpacked)


def blocks(n: int) -> int:
    return -(-n // LANES)


@labelled("pack")
def pack(plain: torch.Tensor) -> torch.Tensor:
    """(N, ...) contiguous to (ceil(N / 16), ..., 16); the padding lanes are zero."""
    n, rest = plain.shape[0], tuple(plain.shape[1:])
    if plain.dtype not in _FLOATS:  # masks and indices
        filled = torch.zeros((blocks(n) * LANES, *rest), dtype=plain.dtype)
        filled[:n] = plain
        return filled.view(-1, LANES, *rest).movedim(1, -1).contiguous()
    packed = memory.empty((blocks(n), *rest, LANES), plain.dtype)
    if plain.numel():
        native().repack(True, n, 1, plain[0].numel(), plain.detach().numpy(), packed.numpy(), torch.get_num_threads())
    return packed


@labelled("unpack")
def unpack(packed: torch.Tensor, n: int) -> torch.Tensor:
    """The other way: (ceil(n / 16), ..., 16) to (n, ...)."""
    rest = tuple(packed.shape[1:-1])
    if packed.dtype not in _FLOATS:
        return packed.movedim(-1, 1).reshape(-1, *rest)[:n].contiguous()
    plain = memory.empty((n, *rest), packed.dtype)
    if plain.numel():
        native().repack(False, n, 1, plain[0].numel(), packed.numpy(), plain.numpy(), torch.get_num_threads())
    return plain


class _Cell:
    """The storage that a lane tensor shares with its aliases.

    ``packed`` holds the data and ``plain`` at most a copy, until something takes a view with plain strides or writes in
    place through an unknown operation: from then on ``plain`` is the data (``exposed``). ``moments`` are mean and
    biased variance of the channels, where whoever computed the data took them along; ``sums`` those that a batch norm
    takes of the gradient of its result, and which result that is.
    """

    __slots__ = ("__weakref__", "exposed", "moments", "n", "packed", "plain", "readers", "sums")

    def __init__(self, packed: torch.Tensor | None, n: int) -> None:
        self.packed: torch.Tensor | None = packed
        self.moments: tuple[torch.Tensor, torch.Tensor] | None = None
        self.sums: tuple[_Normed, torch.Tensor, torch.Tensor] | None = None
        self.plain: torch.Tensor | None = None
        self.exposed = False
        self.n = n
        self.readers: weakref.WeakSet[_Cell] | None = None

    def get_packed(self) -> torch.Tensor:
        if self.packed is None:  # exposed: others may write to plain at any time, so nothing is kept
            return pack(self.plain)
        return self.packed

    def get_plain(self) -> torch.Tensor:
        if self.plain is None:
            self.plain = unpack(self.packed, self.n)
        return self.plain

    def expose(self) -> torch.Tensor:
        plain = self.get_plain()
        self._settle()
        self.packed, self.exposed = None, True
        return plain

    def get_writable(self) -> torch.Tensor:
        """The packed storage, to be written to."""
        packed = self.get_packed()
        self._settle()
        self.plain = None
        return packed

    def _settle(self) -> None:
        """Before the storage is written to: who meant to read it later reads it now."""
        self.moments = self.sums = None
        for reader in list(self.readers or ()):
            reader.settle()
        self.readers = None


class _Deferred(_Cell):
    """Storage that is computed when it is first wanted: what follows may take the work over and do more in one pass.

    ``sources`` are the cells it is computed from; they have it computed before they are written to.
    """

    __slots__ = ("sources",)

    def __init__(self, *sources: _Cell) -> None:
        super().__init__(None, sources[0].n)
        self.sources = sources
        for cell in sources:
            if cell.readers is None:
                cell.readers = weakref.WeakSet()
            cell.readers.add(self)

    def waiting(self) -> bool:
        return self.packed is None and not self.exposed

    def compute(self, sources: tuple[_Cell, ...]) -> torch.Tensor:
        raise NotImplementedError

    def get_packed(self) -> torch.Tensor:
        sources = self.sources  # read first: another thread may be done at any time
        if self.waiting():
            self.finish(self.compute(sources))
        return super().get_packed()

    def finish(self, packed: torch.Tensor) -> None:
        """Takes the result, from whoever computed it."""
        self.packed, self.sources = packed, ()

    def settle(self) -> None:
        self.get_packed()

    def get_plain(self) -> torch.Tensor:
        if self.waiting():
            self.get_packed()
        return super().get_plain()


class _Normed(_Deferred):
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

    def gate(self, x: _Cell) -> Any:
        """What tells the gradient of x where the ReLU lets it pass; reading it off x saves reading the result."""
        if not self.summed and self.input is not None and self.input() is x and not x.exposed:
            return self.scale.numpy(), self.shift.numpy()
        return self.get_packed().numpy()

    def _like(self, sources, relu: bool, residual_norm) -> _Normed:
        return _Normed(sources, self.sizes, self.mean, self.scale, self.shift, relu, residual_norm)

    def factors(self) -> tuple:
        """As the kernels take it."""
        return self.scale.numpy(), self.shift.numpy(), self.relu

    def plus(self, residual: _Cell) -> _Normed:
        own = None
        if isinstance(residual, _Normed) and residual.sizes == self.sizes and not (residual.summed or residual.relu):
            sources = residual.sources  # read first: another thread may be done at any time
            if residual.waiting():
                own, residual = (residual.scale, residual.shift), sources[0]
        return self._like((self.sources[0], residual), False, own)

    def rectified(self) -> _Normed:
        return self._like(self.sources, True, self.residual_norm)

    @labelled("norm_relu")
    def compute(self, sources: tuple[_Cell, ...]) -> torch.Tensor:
        x, *residual = [c.get_packed() for c in sources]
        y = memory.empty(tuple(x.shape), x.dtype)
        native().norm_apply(
            *self.sizes, x.numpy(), self.scale.numpy(), self.shift.numpy(), residual[0].numpy() if residual else None,
            self.residual_norm and tuple(t.numpy() for t in self.residual_norm), self.relu, y.numpy(),
            torch.get_num_threads(),
        )  # fmt: skip
        return y


class _Sum(_Deferred):
    """The sum of two gradients, of the same shape and dtype."""

    __slots__ = ()

    def compute(self, sources: tuple[_Cell, ...]) -> torch.Tensor:
        a, b = (c.get_packed() for c in sources)
        return torch.add(a, b.view(a.shape), out=memory.empty(tuple(a.shape), a.dtype))


class _Masked(_Deferred):
    """The gradient of a ReLU: ``sources`` are the gradient of its result, and the result."""

    __slots__ = ()

    def compute(self, sources: tuple[_Cell, ...]) -> torch.Tensor:
        grad, result = (c.get_packed() for c in sources)
        return torch.ops.aten.threshold_backward.grad_input(
            grad, result.view(grad.shape), 0, grad_input=memory.empty(tuple(grad.shape), grad.dtype)
        )


class _NormGrad(_Deferred):
    """What a batch norm makes of the gradient of its result: scale * gradient + slope * (x - mean) + shift.

    ``sources`` are the gradient and x. Where the ReLU behind the norm lets the gradient pass: see ``_Normed.gate``.
    """

    __slots__ = ("factors", "gate", "sizes")

    def __init__(self, sources, sizes: tuple[int, int, int], gate: Any, *factors: torch.Tensor) -> None:
        super().__init__(*sources)
        self.sizes, self.gate, self.factors = sizes, gate, factors

    def norm(self, x: _Cell) -> tuple:
        """As the kernels take it."""
        return x.get_packed().numpy(), self.gate, *(f.numpy() for f in self.factors)

    @labelled("norm_grad")
    def compute(self, sources: tuple[_Cell, ...]) -> torch.Tensor:
        grad, x = sources
        out = memory.empty(tuple(x.get_packed().shape), x.get_packed().dtype)
        native().norm_grad(*self.sizes, grad.get_packed().numpy(), self.norm(x), out.numpy(), torch.get_num_threads())
        return out


class LaneTensor(torch.Tensor):
    """A tensor of shape (N, ...) whose storage is the lane layout. Made by the layers, not by hand.

    Views other than those that keep N in front unpack it for good; saving and ``numpy()`` give the plain tensor.
    """

    _cell: _Cell

    # Everything is done below autograd, so that gradients, hooks and checkpointing are torch's own.
    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def packed(self) -> torch.Tensor:
        """(ceil(N / 16), ..., 16); not to be written to."""
        return self._cell.get_packed().view(blocks(self._cell.n), *self.shape[1:], LANES)

    @property
    def plain(self) -> torch.Tensor:
        """The same numbers as an ordinary tensor, outside of autograd; not to be written to."""
        return self._cell.get_plain().view(self.shape)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        handler = _HANDLERS.get(func)
        if handler is not None:
            result = handler(func, args, kwargs)
            if result is not NotImplemented:
                return result
        return _on_plain(func, args, kwargs)

    def __repr__(self, *, tensor_contents=None) -> str:
        return f"LaneTensor({self.plain!r})"

    def numpy(self, *, force: bool = False):
        return (self.detach() if force else self)._as_plain().numpy()

    def tolist(self):
        return self.plain.tolist()

    def _as_plain(self) -> torch.Tensor:
        if self.requires_grad:
            raise RuntimeError("Can't call numpy() on Tensor that requires grad. Use tensor.detach().numpy() instead.")
        return self._cell.expose().view(self.shape)

    def __reduce_ex__(self, proto):
        if self.requires_grad and not self.is_leaf:
            return self.plain.requires_grad_().__reduce_ex__(proto)
        return self.plain.requires_grad_(self.requires_grad).__reduce_ex__(proto)

    def __deepcopy__(self, memo):
        if not self.is_leaf:
            raise RuntimeError("only tensors created explicitly by the user support deepcopy; detach() it first")
        copy = wrap(self.packed.clone(), self._cell.n).requires_grad_(self.requires_grad)
        memo[id(self)] = copy
        return copy


def wrap(packed: torch.Tensor, n: int) -> LaneTensor:
    """The lane tensor of n samples over (ceil(n / 16), ..., 16)."""
    return _alias(_Cell(packed, n), (n, *packed.shape[1:-1]), packed.dtype)


def make_moments(x: LaneTensor) -> tuple[Any, Any]:
    """Room for the moments of x, for a kernel to fill."""
    x._cell.moments = torch.empty(x.shape[1], dtype=x.dtype), torch.empty(x.shape[1], dtype=x.dtype)
    return tuple(t.numpy() for t in x._cell.moments)


def make_sums(grad: LaneTensor, norm: _Normed) -> tuple[Any, Any, Any]:
    """The mean of a norm, and room for the sums that it takes of ``grad``, the gradient of its result."""
    sums = torch.empty_like(norm.mean), torch.empty_like(norm.mean)
    grad._cell.sums = norm, *sums
    return norm.mean.numpy(), *(t.numpy() for t in sums)


class _FromPlain(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return wrap(pack(x.contiguous()), x.shape[0])

    @staticmethod
    def backward(ctx, grad):
        # A real conversion: an ordinary tensor's gradient is one, too.
        return grad._cell.expose().view(grad.shape) if isinstance(grad, LaneTensor) else grad


def from_plain(x: torch.Tensor) -> LaneTensor:
    """x (N, ...) in the lane layout; differentiable.

    Raises:
        TypeError, ValueError: if x is not a float32 or float64 tensor of two dimensions or more on the CPU.
        BackendError: without the native extension.
    """
    if not isinstance(x, torch.Tensor) or x.dtype not in _FLOATS:
        raise TypeError(expected("x", "a float32 or float64 tensor", getattr(x, "dtype", type(x).__name__)))
    check_input("x", x, x.dtype)
    if x.dim() < 2:
        raise ValueError(expected("x", "two dimensions or more", x.dim()))
    if native() is None:
        raise BackendError(_extension.CAUSE)
    return x if isinstance(x, LaneTensor) else _FromPlain.apply(x)


def to_plain(x: torch.Tensor) -> torch.Tensor:
    """The same tensor with ordinary storage, for code that asks for a data pointer; differentiable."""
    return x.as_strided(x.shape, x.stride()) if isinstance(x, LaneTensor) else x


def _alias(cell: _Cell, shape: tuple[int, ...], dtype: torch.dtype) -> LaneTensor:
    t = torch.Tensor._make_wrapper_subclass(LaneTensor, shape, dtype=dtype)
    t._cell = cell
    return t


# Operations that are not known: on plain tensors. What the operation aliases or writes to is exposed, so that views of
# a lane tensor and writes through them stay what they are in torch.

_LIKE = {
    aten.empty_like.default, aten.zeros_like.default, aten.ones_like.default, aten.full_like.default,
    aten.rand_like.default, aten.randn_like.default, aten.new_empty.default, aten.new_zeros.default,
    aten.new_ones.default, aten.new_full.default, aten.new_empty_strided.default,
}  # fmt: skip

#: Unpacking here is what was to be expected: layers that stay dense, and what leaves the network.
_EXPECTED = {
    aten.convolution.default, aten.convolution_backward.default, aten.addmm.default, aten.mm.default, aten.t.default,
    aten.view.default, aten._unsafe_view.default, aten.copy_.default, aten.clone.default, aten._to_copy.default,
    aten._local_scalar_dense.default, aten.equal.default,
}  # fmt: skip

_ROLES: dict[Any, tuple[set[str | int], set[str | int]]] = {}


def _roles(func) -> tuple[set[str | int], set[str | int]]:
    """Positions and names of arguments that are (aliased or written, written)."""
    if func not in _ROLES:
        shared: set[str | int] = set()
        written: set[str | int] = set()
        for i, a in enumerate(func._schema.arguments):
            if a.alias_info is not None:
                shared |= {i, a.name}
                if a.alias_info.is_write:
                    written |= {i, a.name}
        _ROLES[func] = shared, written
    return _ROLES[func]


def _on_plain(func, args, kwargs):
    if func in _LIKE:
        x = args[0]
        return func(torch.empty((), dtype=x.dtype).expand(x.shape), *args[1:], **kwargs)
    if func not in _EXPECTED:
        _unpacked[func._schema.name.removeprefix("aten::")] += 1
    shared, written = _roles(func)
    originals: dict[int, LaneTensor] = {}

    def plain(key, x):
        if isinstance(x, LaneTensor):
            if key in shared:
                p = x._cell.expose().view(x.shape)
                if key in written:
                    originals[id(p)] = x
                return p
            return x.plain
        if isinstance(x, (list, tuple)):
            return type(x)(plain(key, e) for e in x) if not hasattr(x, "_fields") else x
        return x

    args = [plain(i, a) for i, a in enumerate(args)]
    kwargs = {k: plain(k, a) for k, a in kwargs.items()}
    result = func(*args, **kwargs)
    if not originals:
        return result
    # In-place and out= forms return what they were given.
    if isinstance(result, torch.Tensor):
        return originals.get(id(result), result)
    if isinstance(result, (list, tuple)):
        return type(result)(originals.get(id(r), r) for r in result)
    return result


_HANDLERS: dict[Any, Callable[..., Any]] = {}


def _handles(*funcs):
    def register(handler):
        for f in funcs:
            _HANDLERS[f] = handler
        return handler

    return register


# Element-wise operations.

_POINTWISE = [
    "abs", "add", "clamp", "clamp_max", "clamp_min", "div", "elu", "elu_backward", "exp", "gelu", "gelu_backward",
    "hardsigmoid", "hardsigmoid_backward", "hardswish", "hardswish_backward", "hardtanh", "hardtanh_backward",
    "leaky_relu", "leaky_relu_backward", "log_sigmoid_backward", "maximum", "minimum", "mish", "mish_backward", "mul",
    "neg", "pow", "reciprocal", "relu", "rsqrt", "rsub", "sigmoid", "sigmoid_backward", "silu", "silu_backward",
    "softplus", "softplus_backward", "sqrt", "sub", "tanh", "tanh_backward", "threshold", "threshold_backward", "where",
]  # fmt: skip
_COMPARISONS = ["eq", "ge", "gt", "isnan", "isfinite", "le", "lt", "ne"]

_OUT: dict[Any, tuple[Any, str]] = {}


def _lane(args) -> LaneTensor:
    return next(a for a in args if isinstance(a, LaneTensor))


def _operand(x: Any, like: LaneTensor) -> Any:
    """x as an operand beside the packed ``like``; NotImplemented where it does not broadcast into its shape."""
    if isinstance(x, LaneTensor):
        return x.packed if x.shape == like.shape else NotImplemented
    if not isinstance(x, torch.Tensor) or x.dim() == 0:
        return x
    if x.device.type != "cpu" or x.dim() > like.dim():
        return NotImplemented
    if x.shape == like.shape:
        return pack(x.contiguous()) if x.dtype == like.dtype or x.dtype not in _FLOATS else NotImplemented
    if x.dim() == like.dim():
        if x.shape[0] != 1:
            return NotImplemented
        x = x[0]
    sizes = like.shape[like.dim() - x.dim() :]
    if x.dim() == like.dim() or any(a not in (1, b) for a, b in zip(x.shape, sizes, strict=True)):
        return NotImplemented
    return x.unsqueeze(-1)


def _pointwise(func, args, kwargs):
    like = _lane(args)
    operands = [_operand(a, like) for a in args]
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


def _in_place(func, args, kwargs):
    x = args[0]
    if not isinstance(x, LaneTensor) or x._cell.exposed or kwargs:
        return NotImplemented
    operands = [_operand(a, x) for a in args]
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
                _HANDLERS[func] = _pointwise
        for overload in packet.overloads():
            out = getattr(packet, overload)
            outs = [a for a in out._schema.arguments if a.is_out]
            # A generated out= form computes a tensor of its own and copies it.
            if len(outs) != 1 or name in _COMPARISONS or torch.Tag.generated in out.tags:
                continue
            inputs = [(a.name, str(a.type)) for a in out._schema.arguments if not a.is_out]
            for f in packet.overloads():
                func = getattr(packet, f)
                if func in _HANDLERS and inputs == [(a.name, str(a.type)) for a in func._schema.arguments]:
                    _OUT[func] = out, outs[0].name
    for name in _POINTWISE:
        if (packet := getattr(aten, name + "_", None)) is not None:
            for overload in packet.overloads():
                func = getattr(packet, overload)
                if not any(a.is_out for a in func._schema.arguments):
                    _HANDLERS[func] = _in_place


_register_pointwise()


def waiting_norm(x: Any) -> tuple[_Normed, torch.Tensor] | None:
    """The batch norm, with its ReLU if it has one, that x waits for, and its packed input.

    None where something else is to be added, or where x regroups its channels.
    """
    cell = getattr(x, "_cell", None)
    if not isinstance(cell, _Normed) or cell.summed or cell.sizes != _norm_sizes(x):
        return None
    sources = cell.sources  # read first: another thread may be done at any time
    return (cell, sources[0].get_packed()) if cell.waiting() else None


def waiting_norm_grad(grad: Any) -> tuple[Any, tuple] | None:
    """The gradient that a batch norm is still to be applied to, to become ``grad``, and the norm as kernels take it."""
    cell = getattr(grad, "_cell", None)
    if not isinstance(cell, _NormGrad) or cell.sizes != _norm_sizes(grad):
        return None
    sources = cell.sources  # read first: another thread may be done at any time
    return (sources[0].get_packed().numpy(), cell.norm(sources[1])) if cell.waiting() else None


def _normed(x: Any) -> _Normed | None:
    """The batch norm that x waits for, as long as nothing but a sum and a ReLU can have followed."""
    cell = getattr(x, "_cell", None)
    return cell if isinstance(cell, _Normed) and cell.waiting() and not cell.relu else None


@_handles(aten.relu.default)
def _relu(func, args, kwargs):
    x = args[0]
    if (normed := _normed(x)) is not None:
        return _alias(normed.rectified(), x.shape, x.dtype)
    packed = x.packed
    return wrap(torch.clamp_min(packed, 0, out=memory.empty(tuple(packed.shape), x.dtype)), x.shape[0])


@_handles(aten.relu_.default)
def _relu_in_place(func, args, kwargs):
    x = args[0]
    if (normed := _normed(x)) is None or normed.readers:
        return _in_place(func, args, kwargs)
    normed.relu = True
    return x


@_handles(aten.add.Tensor)
def _add(func, args, kwargs):
    x, y = args
    if not kwargs and isinstance(x, LaneTensor) and isinstance(y, LaneTensor) and x.shape == y.shape:
        for a, b in ((x, y), (y, x)):
            if (normed := _normed(a)) is not None and not normed.summed and a.dtype == b.dtype and not b._cell.exposed:
                return _alias(normed.plus(b._cell), a.shape, a.dtype)
        # Gradients of a tensor that was used twice: a batch norm before it adds the last two as it reads them.
        backward = torch._C._current_graph_task_id() != -1
        if backward and x.dtype == y.dtype and not (x._cell.exposed or y._cell.exposed):
            for cell in (x._cell, y._cell):
                if isinstance(cell, _Sum):
                    cell.get_packed()
            return _alias(_Sum(x._cell, y._cell), x.shape, x.dtype)
    return _pointwise(func, args, kwargs)


@_handles(aten.threshold_backward.default)
def _threshold_backward(func, args, kwargs):
    grad, result, threshold = args
    if threshold != 0 or type(grad) is not type(result) or grad.shape != result.shape:
        return _pointwise(func, args, kwargs)
    if not isinstance(result._cell, _Normed) or grad._cell.exposed or result._cell.exposed:
        return _pointwise(func, args, kwargs)
    return _alias(_Masked(grad._cell, result._cell), grad.shape, grad.dtype)


# Views, copies and reductions.


@_handles(aten.detach.default, aten.alias.default)
def _detach(func, args, kwargs):
    x = args[0]
    return _alias(x._cell, x.shape, x.dtype)


@_handles(aten.view.default, aten._unsafe_view.default)
def _view(func, args, kwargs):
    x, sizes = args[0], list(args[1])
    if -1 in sizes:
        known = 1
        for s in sizes:
            known *= s if s != -1 else 1
        sizes[sizes.index(-1)] = x.numel() // known if known else 0
    if len(sizes) < 2 or sizes[0] != x.shape[0] or x.numel() == 0:
        return NotImplemented
    return _alias(x._cell, tuple(sizes), x.dtype)


@_handles(aten.clone.default)
def _clone(func, args, kwargs):
    x = args[0]
    if kwargs.get("memory_format") not in (None, torch.preserve_format, torch.contiguous_format):
        return NotImplemented
    packed = x.packed
    return wrap(memory.empty(tuple(packed.shape), packed.dtype).copy_(packed), x.shape[0])


@_handles(aten._to_copy.default)
def _to_copy(func, args, kwargs):
    x, dtype = args[0], kwargs.get("dtype")
    rest = {k: v for k, v in kwargs.items() if k not in ("dtype", "non_blocking") and v is not None}
    if dtype not in _FLOATS or rest not in ({}, {"device": torch.device("cpu")}):
        return NotImplemented
    return wrap(x.packed.to(dtype, copy=True), x.shape[0])


@_handles(aten.copy_.default)
def _copy(func, args, kwargs):
    x, src = args[:2]
    if not isinstance(x, LaneTensor) or x._cell.exposed:
        return NotImplemented
    operand = _operand(src, x)
    if operand is NotImplemented:
        return NotImplemented
    x._cell.get_writable().view(x.packed.shape).copy_(operand)
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


@_handles(aten.mean.dim)
def _mean(func, args, kwargs):
    return _over_positions(func, args, kwargs, torch.mean)


@_handles(aten.sum.dim_IntList)
def _sum(func, args, kwargs):
    return _over_positions(func, args, kwargs, torch.sum)


@_handles(aten.cat.default)
def _cat(func, args, kwargs):
    tensors, dim = args[0], args[1] if len(args) > 1 else kwargs.get("dim", 0)
    like = _lane(tensors)
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


# Operations on each image plane by itself: (blocks * C) images of 16 channels in the channels_last format are the same
# bytes, and torch has fast code for those.

_PLANEWISE = [
    aten.avg_pool2d.default, aten.avg_pool2d_backward.default, aten._adaptive_avg_pool2d.default,
    aten._adaptive_avg_pool2d_backward.default, aten.upsample_nearest2d.default, aten.upsample_bilinear2d.default,
    aten.upsample_nearest2d_backward.default, aten.upsample_bilinear2d_backward.default,
]  # fmt: skip


@_handles(*_PLANEWISE)
def _planewise(func, args, kwargs):
    like = _lane(args)
    n, channels = like.shape[:2]
    planes = blocks(n) * channels

    def convert(x):
        if isinstance(x, torch.Tensor):
            packed = x.packed if isinstance(x, LaneTensor) else pack(x.contiguous())
            return packed.view(planes, *packed.shape[2:]).permute(0, 3, 1, 2)
        if isinstance(x, (list, tuple)) and len(x) == 4:  # sizes of an input
            return [planes, LANES, *x[2:]]
        return x

    if any(isinstance(a, torch.Tensor) and (a.dim() != 4 or a.shape[:2] != like.shape[:2]) for a in args):
        return NotImplemented
    y = func(*map(convert, args), **kwargs).contiguous(memory_format=torch.channels_last)
    return wrap(y.permute(0, 2, 3, 1).view(blocks(n), channels, *y.shape[2:], LANES), n)


def _pair(x, default=None) -> tuple[int, int]:
    if not x:
        return default
    return (x[0], x[0]) if len(x) == 1 else (x[0], x[1])


def _pooled(size: int, k: int, s: int, p: int, d: int, ceil: bool) -> int:
    reach = size + 2 * p - d * (k - 1) - 1
    out = (reach + (s - 1 if ceil else 0)) // s + 1
    return out - 1 if ceil and (out - 1) * s >= size + p else out


def _pool_geometry(x, kernel, stride=(), padding=(0,), dilation=(1,), ceil_mode=False):
    kernel = _pair(kernel)
    stride, padding, dilation = _pair(stride, kernel), _pair(padding), _pair(dilation)
    size = x.shape[2:]
    out = [_pooled(size[i], kernel[i], stride[i], padding[i], dilation[i], ceil_mode) for i in (0, 1)]
    fits = min(out) >= 1 and kernel[0] * kernel[1] <= 256
    fits = fits and all(2 * padding[i] <= kernel[i] and dilation[i] <= size[i] for i in (0, 1))
    return out, [*size, *out, *kernel, *stride, *padding, *dilation] if fits else None


@_handles(aten.max_pool2d_with_indices.default)
def _max_pool(func, args, kwargs):
    x = args[0]
    if x.dim() != 4 or x.numel() == 0:
        return NotImplemented
    out, geometry = _pool_geometry(*args, **kwargs)
    if geometry is None:
        return NotImplemented
    n, channels = x.shape[:2]
    planes = blocks(n) * channels
    y = memory.empty((blocks(n), channels, *out, LANES), x.dtype)
    codes = memory.empty(tuple(y.shape), torch.uint8)
    native().max_pool(planes, geometry, x.packed.numpy(), y.numpy(), codes.numpy(), None, None, torch.get_num_threads())
    indices = _alias(_Indices(codes, n, geometry), (n, channels, *out), torch.int64)
    return wrap(y, n), indices


class _Indices(_Cell):
    """Positions in the image plane, as torch gives them, made from the winners' codes when somebody looks."""

    __slots__ = ("codes", "geometry")

    def __init__(self, codes: torch.Tensor, n: int, geometry: list[int]) -> None:
        super().__init__(codes, n)
        self.codes, self.geometry = codes, geometry

    def get_packed(self) -> torch.Tensor:
        _, wide, oh, ow, _, kw, sh, sw, ph, pw, dh, dw = self.geometry
        code = self.codes.to(torch.int64)
        y = torch.arange(oh).view(oh, 1, 1) * sh - ph + code // kw * dh
        x = torch.arange(ow).view(1, ow, 1) * sw - pw + code % kw * dw
        return y * wide + x

    def get_plain(self) -> torch.Tensor:
        if self.plain is None:
            self.plain = unpack(self.get_packed(), self.n)
        return self.plain


@_handles(aten.max_pool2d_with_indices_backward.default)
def _max_pool_backward(func, args, kwargs):
    grad, x, *_, indices = args
    cell = getattr(indices, "_cell", None)
    if not isinstance(cell, _Indices) or cell.exposed:
        return NotImplemented
    n, channels = x.shape[:2]
    grad = grad.packed if isinstance(grad, LaneTensor) else pack(grad.contiguous())
    grad_x = memory.empty((blocks(n), *x.shape[1:], LANES), grad.dtype)
    native().max_pool(
        blocks(n) * channels, cell.geometry, None, None, cell.codes.numpy(), grad.numpy(), grad_x.numpy(),
        torch.get_num_threads(),
    )  # fmt: skip
    return wrap(grad_x, n)


# Batch norm.


def _numpy(t: torch.Tensor | None):
    return None if t is None else t.numpy()


def _norm_sizes(x: torch.Tensor) -> tuple[int, int, int]:
    positions = 1
    for s in x.shape[2:]:
        positions *= s
    return x.shape[0], x.shape[1], positions


@_handles(aten.native_batch_norm.default)
@labelled("batch_norm")
def _batch_norm(func, args, kwargs):
    x, weight, bias, running_mean, running_var, training, momentum, eps = args
    others = [t for t in (weight, bias, running_mean, running_var) if t is not None]
    if x.numel() == 0 or any(t.dtype != x.dtype or not t.is_contiguous() for t in others):
        return NotImplemented
    n, channels, positions = sizes = _norm_sizes(x)
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
    return _alias(_Normed((_source(x, packed),), sizes, mean, scale, shift), x.shape, x.dtype), *saved


def _source(x: LaneTensor, packed: torch.Tensor) -> _Cell:
    """The cell of x, to be read later; ``packed`` is its storage now."""
    # An exposed x may be written to unseen, and what was packed of it is not kept: a cell that does.
    return _Cell(packed, x.shape[0]) if x._cell.exposed else x._cell


@_handles(aten.native_batch_norm_backward.default)
@labelled("batch_norm_backward")
def _batch_norm_backward(func, args, kwargs):
    grad_y, x, weight, running_mean, running_var, mean, invstd, training, eps, wanted = args
    if not isinstance(x, LaneTensor):
        return NotImplemented
    n, channels, positions = sizes = _norm_sizes(x)
    if not training:
        mean, invstd = running_mean, torch.rsqrt(running_var + eps)
    packed, threads = x.packed, torch.get_num_threads()
    gate = more = passed = None
    if isinstance(grad_y, LaneTensor) and isinstance(masked := grad_y._cell, _Masked) and masked.waiting():
        source, result = masked.sources
        gate = result.gate(x._cell)
        if isinstance(source, _Sum) and source.waiting():
            source, more = source.sources
            more = more.get_packed()
        # Where there is another summand, it asks for the masked gradient, too.
        if result.summed or more is not None:
            passed = memory.empty(tuple(packed.shape), x.dtype)
    elif isinstance(grad_y, LaneTensor):
        source = _source(grad_y, grad_y.packed)
    else:
        source = _Cell(pack(grad_y.contiguous()), n)
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
        cell = _NormGrad((source, _source(x, packed)), sizes, gate, mean, scale, slope, shift)
        # The convolution before computes it as it reads; a gate that may change is not waited for.
        if not (gate is None or isinstance(gate, tuple)):
            cell.get_packed()
        grad_x = _alias(cell, x.shape, x.dtype)
    return grad_x, sum_gx * invstd if wanted[1] else None, sum_g if wanted[2] else None
