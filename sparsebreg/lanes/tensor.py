"""The tensor that carries the lane layout through a model, and what happens to operations that do not know it."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from sparsebreg.core import extension
from sparsebreg.core.errors import BackendError, check_input, expected
from sparsebreg.core.extension import native
from sparsebreg.lanes.cells import Cell
from sparsebreg.lanes.layout import FLOATS, LANES, blocks, pack, unpack

aten = torch.ops.aten


HANDLERS: dict[Any, Callable[..., Any]] = {}


def handles(*funcs):
    def register(handler):
        for f in funcs:
            HANDLERS[f] = handler
        return handler

    return register


class LaneTensor(torch.Tensor):
    """A tensor of shape (N, ...) whose storage is the lane layout. Made by the layers, not by hand.

    Views other than those that keep N in front unpack it for good; saving and ``numpy()`` give the plain tensor.
    """

    _cell: Cell

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
        handler = HANDLERS.get(func)
        if handler is not None:
            result = handler(func, args, kwargs)
            if result is not NotImplemented:
                return hand_on(counter_of(args), result)
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

    @property
    def data(self) -> torch.Tensor:
        return torch.Tensor.data.__get__(self)

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        plain = value.plain if isinstance(value, LaneTensor) else value.detach()
        torch.Tensor.data.__set__(self, plain)
        self._cell = Cell(None, len(plain))
        self._cell.plain, self._cell.exposed = plain, True

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


def _through_plain(name: str) -> Callable[..., Any]:
    def call(self: LaneTensor, *args: Any, **kwargs: Any) -> Any:
        plain = self._cell.expose().view(self.shape).requires_grad_(self.requires_grad)
        result = getattr(plain, name)(*args, **kwargs)
        return self if result is plain else result

    return call


# A lane tensor has no storage of its own: whoever asks for memory gets that of the plain tensor, which is the data from
# then on.
for _name in (
    "data_ptr", "untyped_storage", "storage", "_typed_storage", "share_memory_", "is_shared", "apply_", "map_",
    "__dlpack__",
):  # fmt: skip
    setattr(LaneTensor, _name, _through_plain(_name))


def hand_on(unpacked: Counter[str] | None, result: Any) -> Any:
    """Makes the lane tensors in ``result`` count their unpackings in ``unpacked``, unless they have a counter."""
    for r in result if isinstance(result, tuple) else (result,):
        if isinstance(r, LaneTensor) and r._cell.unpacked is None:
            r._cell.unpacked = unpacked
    return result


def counter_of(args: Any) -> Counter[str] | None:
    for a in args:
        if isinstance(a, LaneTensor):
            return a._cell.unpacked
        if isinstance(a, (list, tuple)) and (found := counter_of(a)) is not None:
            return found
    return None


def wrap(packed: torch.Tensor, n: int) -> LaneTensor:
    """The lane tensor of n samples over (ceil(n / 16), ..., 16)."""
    return alias(Cell(packed, n), (n, *packed.shape[1:-1]), packed.dtype)


def alias(cell: Cell, shape: tuple[int, ...], dtype: torch.dtype) -> LaneTensor:
    t = torch.Tensor._make_wrapper_subclass(LaneTensor, shape, dtype=dtype)
    t._cell = cell
    return t


class _FromPlain(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return wrap(pack(x.contiguous()), x.shape[0])

    @staticmethod
    def backward(ctx, grad):
        # A real conversion: an ordinary tensor's gradient is one, too. And memory of its own: x.grad may keep it and be
        # added to, while a hook still holds the gradient.
        if not isinstance(grad, LaneTensor):
            return grad
        cell = grad._cell
        return (unpack(cell.get_packed(), cell.n) if cell.plain is None else cell.plain.clone()).view(grad.shape)


def from_plain(x: torch.Tensor) -> LaneTensor:
    """x (N, ...) in the lane layout; differentiable.

    Raises:
        TypeError, ValueError: if x is not a float32 or float64 tensor of two dimensions or more on the CPU.
        BackendError: without the native extension.
    """
    if not isinstance(x, torch.Tensor) or x.dtype not in FLOATS:
        raise TypeError(expected("x", "a float32 or float64 tensor", getattr(x, "dtype", type(x).__name__)))
    check_input("x", x, x.dtype)
    if x.dim() < 2:
        raise ValueError(expected("x", "two dimensions or more", x.dim()))
    if native() is None:
        raise BackendError(extension.CAUSE)
    return x if isinstance(x, LaneTensor) else _FromPlain.apply(x)


def to_plain(x: torch.Tensor) -> torch.Tensor:
    """The same tensor with ordinary storage, for code that asks for a data pointer; differentiable."""
    return x.as_strided(x.shape, x.stride()) if isinstance(x, LaneTensor) else x


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

#: These give a tensor another storage.
_REFUSED = {aten.resize_.default, *(getattr(aten.set_, overload) for overload in aten.set_.overloads())}

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
    if func in _REFUSED:
        name = func._schema.name.removeprefix("aten::")
        raise RuntimeError(expected(name, "a tensor with storage of its own", "a LaneTensor (see lanes.to_plain)"))
    if func not in _EXPECTED and (unpacked := counter_of(args)) is not None:
        unpacked[func._schema.name.removeprefix("aten::")] += 1
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
