"""The registered operators: what torch.library's own checks, compilers, transforms and counters make of them."""

import copy

import pytest
import torch
from helpers import close, sparse_weight
from torch import nn
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

import sparsebreg as sb

ops = torch.ops.sparsebreg
OPTIONS = [3, 2], [2, 1], [1, 0], [1, 2], 2, False  # kernel size, stride, padding, dilation, groups, channels_last


def leaf(*shape, dtype):
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def linear_inputs(dtype):
    _, mask = sparse_weight((6, 4), 0.5)
    pattern = sb.SparsePattern.from_mask(mask)
    return pattern, leaf(pattern.nnz, dtype=dtype), leaf(3, 4, dtype=dtype), leaf(6, dtype=dtype)


def conv2d_inputs(dtype, memory_format=torch.contiguous_format):
    _, mask = sparse_weight((4, 2, 3, 2), 0.5)
    pattern = sb.SparsePattern.from_mask(mask)
    x = torch.randn(2, 4, 5, 6, dtype=dtype).contiguous(memory_format=memory_format).requires_grad_()
    return pattern, leaf(pattern.nnz, dtype=dtype), x, leaf(4, dtype=dtype)


def check_linear(dtype):
    p, values, x, bias = linear_inputs(dtype)
    opcheck(ops.linear.default, (x, p.rowptr, p.col, values, bias, None))
    opcheck(ops.linear.default, (torch.empty(0, 4, dtype=dtype), p.rowptr, p.col, values, None, None))
    opcheck(ops.linear.default, (x, p.rowptr, p.col, values.detach(), None, leaf(6, 4, dtype=dtype)))


def check_linear_backward(dtype):
    p, values, x, _ = linear_inputs(dtype)
    grad_y = leaf(3, 6, dtype=dtype)
    opcheck(ops.linear_backward.default, (grad_y, x, p.rowptr, p.col, values, [3, 4], [True, True, True], ""))
    opcheck(ops.linear_backward.default, (grad_y, None, p.rowptr, p.col, values, [3, 4], [True, False, False], ""))


def check_linear_weight_grad(dtype):
    opcheck(ops.linear_weight_grad.default, (leaf(3, 6, dtype=dtype), leaf(3, 4, dtype=dtype), [6, 4], ""))


def check_conv2d(dtype):
    for memory_format in (torch.contiguous_format, torch.channels_last):
        p, values, x, bias = conv2d_inputs(dtype, memory_format)
        opcheck(ops.conv2d.default, (x, p.rowptr, p.col, values, bias, None, *OPTIONS))
    opcheck(ops.conv2d.default, (x, p.rowptr, p.col, values.detach(), None, leaf(4, 2, 3, 2, dtype=dtype), *OPTIONS))


def check_conv2d_backward(dtype):
    p, values, x, _ = conv2d_inputs(dtype)
    index = p.rowptr, p.col
    grad_y = torch.randn_like(ops.conv2d(x, *index, values, None, None, *OPTIONS)).requires_grad_()
    for given, needs in ((x, [True, True, True]), (None, [True, False, False])):
        opcheck(ops.conv2d_backward.default, (grad_y, given, *index, values, x.shape, needs, "", *OPTIONS))


def check_conv2d_weight_grad(dtype):
    p, values, x, _ = conv2d_inputs(dtype)
    grad_y = torch.randn_like(ops.conv2d(x, p.rowptr, p.col, values, None, None, *OPTIONS)).requires_grad_()
    opcheck(ops.conv2d_weight_grad.default, (grad_y, x, [4, 2, 3, 2], "", *OPTIONS))


def check_gather(dtype):
    p, *_ = linear_inputs(dtype)
    opcheck(ops.gather.default, (leaf(6, 4, dtype=dtype), p.rowptr, p.col))


def check_scatter(dtype):
    p, values, *_ = linear_inputs(dtype)
    opcheck(ops.scatter.default, (values, p.rowptr, p.col, [6, 4]))


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}


def test_every_operator_is_checked():
    registered = {n.partition("::")[2] for n in torch._C._dispatch_get_all_op_names() if n.startswith("sparsebreg::")}
    assert registered == CHECKS.keys()


@pytest.mark.parametrize("name", CHECKS)
def test_opcheck(name, dtype, backend):
    CHECKS[name](dtype)


def test_a_wrong_fake_kernel_would_be_noticed():
    p, values, x, _ = linear_inputs(torch.float32)
    with torch.library._scoped_library("sparsebreg_test", "FRAGMENT") as library:
        library.define("linear(Tensor x, Tensor rowptr, Tensor col, Tensor values) -> Tensor")
        library.impl("linear", lambda *a: ops.linear(*a, None, None), "CompositeExplicitAutograd")
        torch.library.register_fake("sparsebreg_test::linear", lambda x, *_: torch.empty_like(x), lib=library)
        with pytest.raises(Exception, match="test_faketensor failed"):
            opcheck(torch.ops.sparsebreg_test.linear.default, (x.detach(), p.rowptr, p.col, values.detach()))


def test_index_tensors_that_are_no_patterns_own():
    p, values, x, bias = linear_inputs(torch.float64)
    rowptr, col = p.rowptr.clone(), p.col.clone()
    wanted = nn.functional.linear(x, p.scatter(values), bias)
    for _ in range(2):
        close(ops.linear(x, rowptr, col, values, bias, None), wanted)
    col[0] = 4  # out of range: not taken for the pattern that was there before
    with pytest.raises(ValueError, match="col: expected indices from 0 to 3, got 0 to 4"):
        ops.linear(x, rowptr, col, values, bias, None)
    with pytest.raises(TypeError, match="rowptr: expected an int32 tensor"):
        ops.linear(x, rowptr.long(), p.col, values, bias, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": torch.randn(3)}, r"values: expected shape \(\d+,\), got \(3,\)"),
        ({"x": torch.randn(3, 4).double()}, "x: expected dtype torch.float32"),
        ({"bias": torch.randn(5)}, r"bias: expected shape \(6,\), got \(5,\)"),
    ],
)
def test_bad_arguments_of_operators_are_named(change, message):
    p, values, x, bias = linear_inputs(torch.float32)
    arguments = {"x": x, "rowptr": p.rowptr, "col": p.col, "values": values, "bias": bias, "weight": None, **change}
    with pytest.raises((TypeError, ValueError), match=message):
        ops.linear(**arguments)


def swapped(convolutions):
    if convolutions:
        layers = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3, 2)
    else:
        layers = nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10)
    model = nn.Sequential(*layers).double()
    sb.sparse_init_(model, 0.2)
    sb.sparsify_(model, sb.SparsifyConfig(decide="always"))
    return model, torch.randn(20, 3, 8, 8).double() if convolutions else torch.randn(20, 20).double()


@pytest.mark.parametrize("convolutions", [False, True], ids=["linear", "conv2d"])
def test_compiled_and_exported(convolutions):
    """Without a break in the graph; results and gradients are those of the eager model."""
    model, x = swapped(convolutions)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    y, wanted = compiled(x), twin(x)
    close(y, wanted.as_strided(wanted.shape, wanted.stride()))
    y.square().sum().backward()
    wanted.square().sum().backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        close(p.grad, q.grad)
    program = torch.export.export(model.eval(), (x,))
    assert any("sparsebreg" in str(node.target) for node in program.graph.nodes)
    with torch.no_grad():
        close(program.module()(x), twin.eval()(x) + 0 * y.detach())


@pytest.mark.parametrize("convolutions", [False, True], ids=["linear", "conv2d"])
def test_under_a_counter_results_and_layouts_stay_the_same(convolutions, backend):
    model, x = swapped(convolutions)
    wanted = model(x)
    wanted.square().sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with FlopCounterMode(display=False) as counter:
        y = model(x)
        y.square().sum().backward()
    assert type(y) is type(wanted)
    assert counter.get_total_flops() > 0
    close(y.detach() + 0, wanted.detach() + 0)
    for p, grad in zip(model.parameters(), grads, strict=True):
        close(p.grad, grad)


def test_the_weight_of_a_frozen_layer_is_differentiable(backend):
    layer = nn.Linear(5, 4).double()
    with torch.no_grad():
        layer.weight *= torch.rand_like(layer.weight) < 0.5
    dense, x = copy.deepcopy(layer), torch.randn(3, 5, dtype=torch.float64)
    sb.sparsify_(layer, sb.SparsifyConfig(decide="always"))
    for m in (layer, dense):  # used by a model itself, and as a penalty
        (nn.functional.linear(x, m.weight, m.bias).square().sum() + m.weight.abs().sum()).backward()
    close(layer.values.grad, layer.pattern.gather(dense.weight.grad))
