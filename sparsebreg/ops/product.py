"""The product of an input and a sparse weight: autograd, and operators for what traces, counts or transforms.

A linear layer and a convolution are bilinear in input and weight, so their derivatives of any order are written once.
What they differ in says a :class:`Kind`.

With ordinary tensors the ``autograd.Function`` s below call the backend at once. Where a dispatch mode or a compiler
looks on, they go through operators: ``sparsebreg::linear``, ``linear_backward``, ``linear_weight_grad``, and the same
of ``conv2d``. Both ways end in the methods of the kind.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch

from sparsebreg import backends
from sparsebreg.core.errors import check_input, expected
from sparsebreg.core.pattern import SparsePattern
from sparsebreg.ops import library
from sparsebreg.ops.library import Operation, Places

Grads = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


class Kind(Protocol):
    """A product: what it is called, over which pattern, with which options, on which backend."""

    name: str
    pattern: SparsePattern | Places
    backend: Any

    def options(self) -> tuple[Any, ...]:
        """The operators' last arguments."""

    def output_size(self, x_shape: tuple[int, ...]) -> tuple[int, ...]: ...

    def dense(self, x: torch.Tensor) -> torch.Tensor:
        """x in a memory format that the backends read."""

    def formatted(self, t: torch.Tensor, like: torch.Tensor, result: bool = False) -> torch.Tensor:
        """t in the memory format that an operator's result (or grad_x) has for an input ``like``."""

    def check(self, x: Any, values: Any, bias: Any, weight: Any) -> None:
        """Raises TypeError or ValueError, naming the argument."""

    def forward(self, x: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor: ...

    def backward(
        self, grad_y: torch.Tensor, x: torch.Tensor | None, values: torch.Tensor, x_shape: Any, needs: list[bool]
    ) -> Grads:
        """(grad_x, grad_values, grad_bias), None for what ``needs`` does not name."""

    def weight_grad(
        self, grad_y: torch.Tensor, x: torch.Tensor, needs: tuple[bool, bool]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Gradients of the dense weight and, where the kernel has it, of the bias; ``needs``: see ``Backend``."""


class Product(Operation):
    """The product that ``kind`` describes, of x and values.

    ``weight``, where it is given, is the dense weight that ``values`` were gathered from: it gets a full gradient, and
    the values none. ``seen``: whether PyTorch has to see the operator (``library.observed``).
    """

    @staticmethod
    def forward(x, values, bias, weight, kind, seen):
        return _call(kind, "", x, *_index(kind), values, bias, weight) if seen else kind.forward(x, values, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs, output) -> None:
        x, values, _, _, ctx.kind, ctx.seen = inputs
        needs = ctx.needs_input_grad
        ctx.x_shape = x.shape
        ctx.save_for_backward(library.readable(x, ctx.kind.backend) if needs[1] or needs[3] else None, values)

    @staticmethod
    def backward(ctx: Any, grad_y):
        x, values = ctx.saved_tensors
        *needs, needs_weight = ctx.needs_input_grad[:4]
        seen, kind = ctx.seen or library.observed(grad_y), ctx.kind
        grads, grad_weight, grad_bias = (None, None, None), None, None
        if needs_weight and (seen or library.traced()):
            grad_weight = WeightGrad.apply(grad_y, x, kind)
        elif needs_weight:
            grad_weight, grad_bias = kind.weight_grad(grad_y, x, (needs[0], needs[2]))
            needs[2] = needs[2] and grad_bias is None
        if True in needs:
            gradients = Gradients.apply if library.traced() else Gradients.forward
            grads = gradients(grad_y, x, values, kind, ctx.x_shape, needs, seen)
        return *grads[:2], grads[2] if grad_bias is None else grad_bias, grad_weight, None, None


class Gradients(Operation):
    """(grad_x, grad_values, grad_bias), None for what ``needs`` does not name. Linear in grad_y, x and values."""

    @staticmethod
    def forward(grad_y, x, values, kind, x_shape, needs, seen):
        if not seen:
            return kind.backward(grad_y, x, values, x_shape, needs)
        made = _call(kind, "_backward", grad_y, x, *_index(kind), values, x_shape, needs, kind.backend.name)
        return tuple(g if need else None for g, need in zip(made, needs, strict=True))

    @staticmethod
    def setup_context(ctx: Any, inputs, output) -> None:
        grad_y, x, values, ctx.kind, ctx.x_shape, ctx.needs, ctx.seen = inputs
        ctx.save_for_backward(grad_y, x, values)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, of_x, of_values, of_bias):
        grad_y, x, values = ctx.saved_tensors
        kind, rest = ctx.kind, (ctx.kind, ctx.x_shape)
        terms = [None if of_bias is None else of_bias.view(1, -1, *[1] * (grad_y.dim() - 2)).expand(grad_y.shape)]
        grad_x = grad_values = None
        if of_values is not None:
            of_values = of_values.contiguous()
            terms.append(Product.apply(x, of_values, None, None, kind, ctx.seen))
            grad_x = Gradients.apply(grad_y, None, of_values, *rest, [True, False, False], ctx.seen)[0]
        if of_x is not None:
            of_x = kind.dense(of_x)
            terms.append(Product.apply(of_x, values, None, None, kind, ctx.seen))
            grad_values = Gradients.apply(grad_y, of_x, values, *rest, [False, True, False], ctx.seen)[1]
        terms = [library.plain(t) for t in terms if t is not None]
        return sum(terms[1:], terms[0]) if terms else None, grad_x, grad_values, *[None] * 4


class WeightGrad(Operation):
    """The gradient of the dense weight, as a tensor that PyTorch sees."""

    @staticmethod
    def forward(grad_y, x, kind):
        return _call(kind, "_weight_grad", grad_y, x, kind.pattern.shape, kind.backend.name)

    @staticmethod
    def setup_context(ctx: Any, inputs, output) -> None:
        grad_y, x, ctx.kind = inputs
        ctx.save_for_backward(grad_y, x)

    @staticmethod
    def backward(ctx: Any, grad):
        return *ctx.kind.weight_grad_grads(*ctx.saved_tensors, grad), None


def _index(kind: Kind) -> tuple[torch.Tensor, torch.Tensor]:
    return kind.pattern.rowptr, kind.pattern.col


def _call(kind: Kind, suffix: str, *args: Any) -> Any:
    return library.below_autograd(getattr(torch.ops.sparsebreg, kind.name + suffix), *args, *kind.options())


def register(
    name: str,
    options: str,
    make: Callable[..., Kind],
    weight_shape: Callable[..., tuple[int, ...]],
    flops: Callable[..., int],
) -> None:
    """Registers the operators of a kind.

    Args:
        options: their part of the schemas.
        make: the kind, from (pattern, backend, options).
        weight_shape: that of the dense weight, from (rows, shape of x, options).
        flops: of one product, from the shapes of values and y.
    """

    def of(x_shape, rowptr, col, opts, backend="", real=False) -> Kind:
        places = Places(rowptr, col, weight_shape(rowptr.shape[0] - 1, x_shape, opts))
        return make(places.pattern() if real else places, backends.by_name(backend), opts)

    def kernel(x, rowptr, col, values, bias, weight, *opts):
        kind = of(x.shape, rowptr, col, opts, real=True)
        kind.check(x, values, bias, weight)
        return kind.forward(kind.dense(x), values.contiguous(), None if bias is None else bias.contiguous())

    def fake(x, rowptr, col, values, bias, weight, *opts):
        kind = of(x.shape, rowptr, col, opts)
        return kind.formatted(x.new_empty(kind.output_size(x.shape)), x, True)

    def autograd(x, rowptr, col, values, bias, weight, *opts):
        kind = of(x.shape, rowptr, col, opts)
        return Product.apply(kind.dense(x), values, bias, weight, kind, True)

    def backward_kernel(grad_y, x, rowptr, col, values, x_shape, needs, backend, *opts):
        kind = of(x_shape, rowptr, col, opts, backend, real=True)
        kind.check(grad_y.new_empty(0, *x_shape[1:]), values, None, None)
        check_input("grad_y", grad_y, values.dtype)
        if grad_y.shape != (size := kind.output_size(tuple(x_shape))):
            raise ValueError(expected("grad_y", f"shape {tuple(size)}", tuple(grad_y.shape)))
        if needs[1] and (x is None or list(x.shape) != list(x_shape)):
            raise ValueError(expected("x", f"shape {tuple(x_shape)}", x if x is None else tuple(x.shape)))
        x = None if x is None else kind.dense(library.readable(x, kind.backend))
        grads = kind.backward(grad_y, x, values.contiguous(), torch.Size(x_shape), needs)
        grad_x = None if grads[0] is None else kind.formatted(grads[0], grad_y if x is None else x)
        return empties((grad_x, *grads[1:]), values)

    def backward_fake(grad_y, x, rowptr, col, values, x_shape, needs, backend, *opts):
        kind = of(x_shape, rowptr, col, opts)
        grad_x = kind.formatted(values.new_empty(x_shape), grad_y if x is None else x)
        made = grad_x, torch.empty_like(values), values.new_empty(kind.pattern.rows)
        return empties([g if need else None for g, need in zip(made, needs, strict=True)], values)

    def backward_autograd(grad_y, x, rowptr, col, values, x_shape, needs, backend, *opts):
        kind = of(x_shape, rowptr, col, opts, backend)
        return empties(Gradients.apply(grad_y, x, values, kind, tuple(x_shape), needs, True), values)

    def empties(grads: Any, like: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """An operator's result has no None: an empty tensor stands for what is not wanted."""
        return tuple(like.new_empty(0) if g is None else g for g in grads)

    def weight_kind(shape, opts, backend="") -> Kind:
        return make(Places(None, None, tuple(shape)), backends.by_name(backend), opts)

    def weight_kernel(grad_y, x, shape, backend, *opts):
        kind = weight_kind(shape, opts, backend)
        grad = kind.weight_grad(grad_y, kind.dense(library.readable(x, kind.backend)), (True, False))[0]
        return getattr(grad, "dense", grad)

    def weight_autograd(grad_y, x, shape, backend, *opts):
        return WeightGrad.apply(grad_y, x, weight_kind(shape, opts, backend))

    library.register(
        f"{name}(Tensor x, Tensor rowptr, Tensor col, Tensor values, Tensor? bias, Tensor? weight{options}) -> Tensor",
        kernel, fake, autograd,
        lambda x, rowptr, col, values, *_, out_shape, **__: flops(values, out_shape),
    )  # fmt: skip
    library.register(
        f"{name}_backward(Tensor grad_y, Tensor? x, Tensor rowptr, Tensor col, Tensor values, SymInt[] x_shape, "
        f"bool[] needs, str backend{options}) -> (Tensor, Tensor, Tensor)",
        backward_kernel, backward_fake, backward_autograd,
        lambda grad_y, x, rowptr, col, values, shape, needs, *_, **__: sum(needs[:2]) * flops(values, grad_y),
    )  # fmt: skip
    library.register(
        f"{name}_weight_grad(Tensor grad_y, Tensor x, SymInt[] shape, str backend{options}) -> Tensor",
        weight_kernel, lambda grad_y, x, shape, *_: x.new_empty(shape), weight_autograd,
        lambda grad_y, x, shape, *_, **__: flops([torch.Size(shape).numel()], grad_y),
    )  # fmt: skip


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
    for name, t, shape in (("bias", bias, (pattern.rows,)), ("weight", weight, pattern.shape)):
        if t is not None:
            check_input(name, t, values.dtype)
            if tuple(t.shape) != shape:
                raise ValueError(expected(name, f"shape {shape}", tuple(t.shape)))
    if len(pattern.shape) != dims:
        raise ValueError(expected("pattern", f"the shape of a {kind} weight ({dims} sizes)", pattern.shape))
