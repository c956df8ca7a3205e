"""What linear products and convolutions have in common: chunks, derivatives, inputs of all kinds, refusals."""

import subprocess
import sys

import pytest
import torch
from helpers import BACKENDS, close, compare_products, sparse_weight
from torch.autograd import gradgradcheck
from torch.nn import functional as F

import sparsebreg as sb
from sparsebreg.ops import Geometry, sparse_conv2d, sparse_linear


def test_large_layers(engine):
    """Sizes at which the work is chunked and shared out."""
    weight, mask = sparse_weight((700, 3000), 0.05, torch.float32)
    compare_products(torch.randn(130, 3000), weight, mask, torch.randn(700), F.linear, sparse_linear)
    weight, mask = sparse_weight((64, 64, 3, 3), 0.1, torch.float32)
    g = Geometry(padding=(1, 1))
    compare_products(
        torch.randn(20, 64, 20, 20), weight, mask, torch.randn(64),
        lambda x, w, b: F.conv2d(x, w, b, padding=1), lambda x, p, v, b: sparse_conv2d(x, p, v, b, g),
    )  # fmt: skip


@pytest.mark.parametrize("wanted", ["x", "values", "bias"])
def test_one_gradient_alone(wanted, backend):
    weight, mask = sparse_weight((6, 4, 3, 3), 0.4)
    pattern = sb.SparsePattern.from_mask(mask)
    tensors = {"x": torch.randn(3, 4, 6, 6, dtype=torch.float64), "values": weight[mask], "bias": weight.new_ones(6)}
    tensors[wanted].requires_grad_()
    y = sparse_conv2d(tensors["x"], pattern, tensors["values"], tensors["bias"], Geometry(padding=(1, 1)))
    (grad,) = torch.autograd.grad(y.square().sum(), tensors[wanted])
    w = weight.clone().requires_grad_() if wanted == "values" else weight
    twin = {**tensors, "values": w}
    twin[wanted] = twin[wanted].detach().clone().requires_grad_()
    expected = F.conv2d(twin["x"], twin["values"], twin["bias"], padding=1).square().sum()
    (expected_grad,) = torch.autograd.grad(expected, twin[wanted])
    close(grad, expected_grad[mask] if wanted == "values" else expected_grad)


def test_backward_runs_on_the_forwards_backend(monkeypatch):
    weight, mask = sparse_weight((6, 4), 0.5)
    pattern = sb.SparsePattern.from_mask(mask)
    with sb.use_backend("reference") as used:
        called = []
        original = type(used).linear_backward
        monkeypatch.setattr(type(used), "linear_backward", lambda *a: called.append(1) or original(*a))
        y = sparse_linear(torch.randn(3, 4, dtype=torch.float64), pattern, weight[mask].requires_grad_())
    with sb.use_backend(BACKENDS[0]):
        y.sum().backward()
    assert called == [1]


def test_second_derivatives(backend):
    weight, mask = sparse_weight((6, 4), 0.5)
    x, bias = torch.randn(3, 4, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    pattern, inputs = sb.SparsePattern.from_mask(mask), (x, weight[mask], bias)
    assert gradgradcheck(lambda x, v, b: sparse_linear(x, pattern, v, b).pow(3), [t.requires_grad_() for t in inputs])
    weight, mask = sparse_weight((4, 2, 3, 2), 0.5)
    x, bias = torch.randn(2, 4, 5, 6, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    pattern, inputs = sb.SparsePattern.from_mask(mask), (x, weight[mask], bias)
    geometry = Geometry((2, 1), (1, 0), (1, 2), 2)
    assert gradgradcheck(
        lambda x, v, b: sparse_conv2d(x, pattern, v, b, geometry).pow(3), [t.requires_grad_() for t in inputs]
    )


def test_second_derivatives_of_a_whole_weight(backend):
    """Where the dense weight gets a full gradient, that one's gradients are those of the dense layer, too."""
    w, mask = sparse_weight((6, 4), 0.5)
    x, pattern = torch.randn(3, 4, dtype=torch.float64, requires_grad=True), sb.SparsePattern.from_mask(mask)
    values = w[mask]
    w.requires_grad_()
    image = torch.randn(2, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    kernel, kernel_mask = sparse_weight((4, 2, 3, 2), 0.5)
    kernel_values, kernel_pattern = kernel[kernel_mask], sb.SparsePattern.from_mask(kernel_mask)
    geometry = Geometry((2, 1), (1, 0), (1, 2), 2)
    kernel.requires_grad_()
    for sparse, dense, inputs in (
        (sparse_linear(x, pattern, values, None, w), F.linear(x, w), (w, x)),
        (
            sparse_conv2d(image, kernel_pattern, kernel_values, None, geometry, weight=kernel),
            F.conv2d(image, kernel, None, *geometry),
            (kernel, image),
        ),
    ):
        second = []
        for y in (sparse, dense):
            (grad,) = torch.autograd.grad(y.pow(3).sum(), inputs[0], create_graph=True)
            second.append((grad.detach(), *torch.autograd.grad(grad.square().sum(), inputs)))
        for got, wanted in zip(*second, strict=True):
            close(got, wanted)


def test_leading_dimensions_and_strides(backend):
    weight, mask = sparse_weight((6, 4), 0.5)
    pattern, values = sb.SparsePattern.from_mask(mask), weight[mask]
    for x in (torch.randn(4), torch.randn(2, 3, 4), torch.randn(2, 0, 4), torch.randn(4, 8).t()[:, :4]):
        x = x.double()
        close(sparse_linear(x, pattern, values), F.linear(x, weight))
    weight, mask = sparse_weight((6, 4, 3, 3), 0.5)
    pattern, values = sb.SparsePattern.from_mask(mask), weight[mask]
    image = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    for x in (image[0], image.contiguous(memory_format=torch.channels_last), image[:, :, ::2, 1:]):
        close(sparse_conv2d(x, pattern, values), F.conv2d(x, weight))


def test_tensors_that_torch_negates_when_it_reads_them(backend):
    weight, mask = sparse_weight((6, 4), 0.5)
    pattern, values, x = sb.SparsePattern.from_mask(mask), weight[mask], torch.randn(5, 4, dtype=torch.float64)
    seen = torch._neg_view(-x)
    assert seen.is_neg()
    close(sparse_linear(seen, pattern, values), F.linear(x, weight))
    weight, mask = sparse_weight((6, 4, 3, 3), 0.5)
    pattern, values = sb.SparsePattern.from_mask(mask), weight[mask]
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 4, 8, 8, dtype=torch.float64).contiguous(memory_format=memory_format)
        close(sparse_conv2d(torch._neg_view(-x), pattern, values), F.conv2d(x, weight))


WITHOUT_TENSORS = """
import torch
getattr(torch.Tensor, "__dlpack_c_exchange_api__", None) and delattr(torch.Tensor, "__dlpack_c_exchange_api__")
import sparsebreg as sb
from sparsebreg.core import extension
from sparsebreg import lanes
assert not extension.TENSORS
for dense, shape in ((torch.nn.Linear(4, 6), (20, 4)), (torch.nn.Conv2d(4, 6, 3, padding=1), (20, 4, 8, 8))):
    cls = sb.nn.SparseLinear if len(shape) == 2 else sb.nn.SparseConv2d
    for p in dense.parameters():
        p.data = torch.randint(-3, 4, p.shape).float()  # sums of whole numbers do not depend on their order
    layer = cls.from_dense(dense, torch.rand(dense.weight.shape) < 0.4)
    same = layer.to_dense()
    plain = torch.randint(-3, 4, shape).float()
    kinds = [plain, lanes.from_plain(plain)]
    if len(shape) == 4:
        kinds.append(plain.contiguous(memory_format=torch.channels_last))
    for x in kinds:
        results = []
        for module in (layer, same):
            module.zero_grad()
            source = x.detach().clone().requires_grad_()
            y = module(source)
            y.square().sum().backward()
            weight = layer.pattern.gather(module.weight.grad) if module is same else module.values.grad
            results.append([y, source.grad, weight, module.bias.grad.clone()])
        for a, b in zip(*results):
            assert torch.equal(*(t.plain if isinstance(t, lanes.LaneTensor) else t for t in (a, b)))
print("same")
"""


def test_torch_that_does_not_hand_its_tensors_to_c(on_native):
    done = subprocess.run([sys.executable, "-c", WITHOUT_TENSORS], capture_output=True, text=True)
    assert done.stdout == "same\n", done.stderr


class TestBadInput:
    pattern = sb.SparsePattern.from_mask(torch.ones(6, 4, dtype=torch.bool))
    values = torch.ones(24)
    conv = sb.SparsePattern.from_mask(torch.ones(6, 4, 3, 3, dtype=torch.bool))

    def test_parameters(self):
        x = torch.ones(3, 4)
        with pytest.raises(ValueError, match=r"values: expected shape \(24,\), got \(23,\)"):
            sparse_linear(x, self.pattern, self.values[1:])
        with pytest.raises(TypeError, match="values: expected a float32 or float64 tensor, got torch.bfloat16"):
            sparse_linear(x, self.pattern, self.values.bfloat16())
        with pytest.raises(ValueError, match=r"bias: expected shape \(6,\), got \(4,\)"):
            sparse_linear(x, self.pattern, self.values, torch.ones(4))
        with pytest.raises(TypeError, match="bias: expected dtype torch.float32"):
            sparse_linear(x, self.pattern, self.values, torch.ones(6).double())
        with pytest.raises(ValueError, match="pattern: expected the shape of a linear weight"):
            sparse_linear(x, self.conv, torch.ones(self.conv.nnz))
        with pytest.raises(ValueError, match="pattern: expected the shape of a 2-D convolution"):
            sparse_conv2d(torch.ones(1, 4, 8, 8), self.pattern, self.values)


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_autocast_casts_the_input(kind, backend):
    """As to every float32 operation: in the weights' dtype, in forward and backward passes."""
    shape, weight_shape = ((20, 6), (5, 6)) if kind == "linear" else ((20, 4, 6, 6), (5, 4, 3, 3))
    weight, mask = sparse_weight(weight_shape, 0.5, torch.float32)
    pattern, product = sb.SparsePattern.from_mask(mask), sparse_linear if kind == "linear" else sparse_conv2d
    x = torch.randn(shape).bfloat16().requires_grad_()
    values, exact = weight[mask].requires_grad_(), x.detach().float().requires_grad_()
    with pytest.raises(TypeError, match="x: expected dtype torch.float32, got torch.bfloat16"):
        product(x, pattern, values)
    with torch.autocast("cpu", torch.bfloat16):
        y = product(x, pattern, values)
        (grad,) = torch.autograd.grad(y.sum(), values)
    wanted = product(exact, pattern, values)
    (wanted_grad,) = torch.autograd.grad(wanted.sum(), values)
    assert y.dtype is torch.float32
    close(y.detach(), wanted.detach())
    close(grad, wanted_grad)
