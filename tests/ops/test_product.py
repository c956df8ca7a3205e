"""Forward, input gradient and value gradient on every backend and instruction set against plain torch."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import BACKENDS, close, sparse_weight
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

import sparsebreg as sb
from sparsebreg.ops import Geometry, sparse_conv2d, sparse_linear

# name: (N, in, out, density)
LINEAR = {
    "small": (5, 30, 20, 0.3),
    "one_sample": (1, 7, 5, 0.5),
    "two_samples": (2, 70, 50, 0.2),
    "one_sample_long_rows": (1, 200, 90, 0.5),
    "two_samples_long_rows": (2, 90, 200, 0.5),
    "three_samples_long_rows": (3, 200, 90, 0.5),
    "one_lane_block": (16, 100, 40, 0.2),
    "not_a_multiple_of_the_lanes": (100, 64, 33, 0.3),
    "several_tiles": (300, 40, 70, 0.2),
    "wide": (20, 1200, 17, 0.1),
    "no_nonzeros": (8, 6, 5, 0.0),
    "full": (8, 6, 5, 1.0),
    "empty_batch": (0, 6, 5, 0.5),
    "one_output": (33, 50, 1, 0.5),
    "one_input": (33, 1, 50, 0.5),
}

# name: (N, IC, H, W, OC, kernel, stride, padding, dilation, groups, density)
CONV = {
    "3x3": (5, 3, 7, 9, 4, (3, 3), (1, 1), (1, 1), (1, 1), 1, 0.3),
    "3x3_wide": (3, 4, 6, 40, 5, (3, 3), (1, 1), (1, 1), (1, 1), 1, 0.3),
    "3x3_stride_2": (19, 8, 8, 8, 16, (3, 3), (2, 2), (1, 1), (1, 1), 1, 0.2),
    "3x3_stride_2_odd": (4, 3, 9, 11, 5, (3, 3), (2, 2), (1, 1), (1, 1), 1, 0.4),
    "1x1": (17, 6, 5, 6, 10, (1, 1), (1, 1), (0, 0), (1, 1), 1, 0.4),
    "1x1_stride_2": (17, 6, 7, 8, 10, (1, 1), (2, 2), (0, 0), (1, 1), 1, 0.4),
    "5x5_valid": (4, 2, 12, 12, 6, (5, 5), (1, 1), (0, 0), (1, 1), 1, 0.2),
    "7x7_stride_2": (2, 3, 17, 17, 8, (7, 7), (2, 2), (3, 3), (1, 1), 1, 0.2),
    "rectangular": (16, 4, 11, 6, 6, (5, 3), (2, 1), (2, 0), (1, 2), 2, 0.5),
    "dilated": (3, 4, 9, 9, 6, (3, 3), (1, 1), (2, 2), (2, 2), 1, 0.5),
    "dilated_and_strided": (3, 4, 13, 12, 6, (3, 3), (2, 3), (2, 1), (3, 2), 1, 0.5),
    "groups": (3, 6, 9, 9, 6, (3, 3), (1, 1), (1, 1), (1, 1), 3, 0.5),
    "depthwise": (5, 8, 6, 6, 8, (3, 3), (1, 1), (1, 1), (1, 1), 8, 0.5),
    "depthwise_multiplier": (5, 4, 6, 6, 12, (3, 3), (2, 2), (1, 1), (1, 1), 4, 0.5),
    "stride_beyond_kernel": (16, 4, 8, 8, 4, (2, 2), (3, 3), (0, 0), (1, 1), 1, 0.5),
    "padding_beyond_kernel": (2, 3, 4, 4, 4, (2, 2), (1, 1), (3, 3), (1, 1), 1, 0.5),
    "padding_beyond_kernel_strided": (2, 2, 6, 40, 3, (3, 5), (1, 3), (4, 5), (2, 1), 1, 0.9),
    "tiny_image": (33, 16, 4, 4, 40, (3, 3), (1, 1), (1, 1), (1, 1), 1, 0.3),
    "image_of_one": (3, 4, 1, 1, 5, (3, 3), (1, 1), (1, 1), (1, 1), 1, 0.5),
    "many_channels": (2, 70, 5, 5, 40, (3, 3), (1, 1), (1, 1), (1, 1), 1, 0.2),
    "one_long_row": (2, 4, 3, 300, 3, (3, 3), (1, 1), (1, 1), (1, 1), 1, 0.5),
    "no_nonzeros": (2, 3, 5, 5, 4, (3, 3), (1, 1), (1, 1), (1, 1), 1, 0.0),
    "full": (2, 3, 5, 5, 4, (3, 3), (1, 1), (1, 1), (1, 1), 1, 1.0),
    "empty_batch": (0, 3, 5, 5, 4, (3, 3), (1, 1), (1, 1), (1, 1), 1, 0.5),
    "batch_of_100": (100, 3, 6, 6, 4, (3, 3), (1, 1), (1, 1), (1, 1), 1, 0.5),
}


@pytest.fixture(params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def compare(x, weight, mask, bias, dense, sparse):
    """Output and all gradients of sparse(x, values, bias) against dense(x, weight, bias)."""
    pattern = sb.SparsePattern.from_mask(mask)
    ours = [t.clone().requires_grad_() for t in (x, weight[mask], bias)]
    theirs = [t.clone().requires_grad_() for t in (x, weight, bias)]
    y, expected = sparse(ours[0], pattern, ours[1], ours[2]), dense(*theirs)
    close(y, expected)
    grad = torch.randn_like(expected)
    y.backward(grad)
    expected.backward(grad)
    close(ours[0].grad, theirs[0].grad)
    close(ours[1].grad, theirs[1].grad[mask], scale=theirs[1].grad.abs().max().item() if mask.numel() else 1)
    close(ours[2].grad, theirs[2].grad)


@pytest.mark.parametrize("name", LINEAR)
def test_linear(name, engine, dtype, threads):
    n, i, o, density = LINEAR[name]
    weight, mask = sparse_weight((o, i), density, dtype)
    compare(torch.randn(n, i, dtype=dtype), weight, mask, torch.randn(o, dtype=dtype), F.linear, sparse_linear)


@pytest.mark.parametrize("name", CONV)
@pytest.mark.parametrize("formats", [(0, 0), (1, 1), (0, 1), (1, 0)], ids=["plain", "last", "x_plain", "y_plain"])
def test_conv2d_memory_formats(name, formats, engine):
    """x, and grad_y, in either memory format: the same numbers in the format that torch would return."""
    n, ic, h, w, oc, kernel, stride, padding, dilation, groups, density = CONV[name]
    weight, mask = sparse_weight((oc, ic // groups, *kernel), density)
    pattern, geometry = sb.SparsePattern.from_mask(mask), Geometry(stride, padding, dilation, groups)
    kinds = [torch.channels_last if f else torch.contiguous_format for f in formats]
    x = torch.randn(n, ic, h, w, dtype=torch.float64).contiguous(memory_format=kinds[0]).requires_grad_()
    values, bias = weight[mask].requires_grad_(), torch.randn(oc, dtype=torch.float64)
    y = sparse_conv2d(x, pattern, values, bias, geometry, channels_last=formats[1] == 1)
    if formats[1] or not x.is_contiguous():
        assert y.is_contiguous(memory_format=torch.channels_last)
    else:
        assert y.is_contiguous()
    grad = torch.randn_like(y).contiguous(memory_format=kinds[1])
    y.backward(grad)
    twin, dense = x.detach().clone().requires_grad_(), weight.clone().requires_grad_()
    expected = F.conv2d(twin, dense, bias, *geometry)
    expected.backward(grad)
    close(y.detach(), expected.detach())
    close(x.grad, twin.grad)
    close(values.grad, dense.grad[mask], scale=1 + dense.grad.abs().max().item() if mask.numel() else 1)


@pytest.mark.parametrize("name", CONV)
def test_conv2d(name, engine, dtype, threads):
    n, ic, h, w, oc, kernel, stride, padding, dilation, groups, density = CONV[name]
    weight, mask = sparse_weight((oc, ic // groups, *kernel), density, dtype)
    geometry = Geometry(stride, padding, dilation, groups)
    compare(
        torch.randn(n, ic, h, w, dtype=dtype),
        weight,
        mask,
        torch.randn(oc, dtype=dtype),
        lambda x, w, b: F.conv2d(x, w, b, *geometry),
        lambda x, p, v, b: sparse_conv2d(x, p, v, b, geometry),
    )


def test_large_layers(engine):
    """Sizes at which the work is chunked and shared out."""
    weight, mask = sparse_weight((700, 3000), 0.05, torch.float32)
    compare(torch.randn(130, 3000), weight, mask, torch.randn(700), F.linear, sparse_linear)
    weight, mask = sparse_weight((64, 64, 3, 3), 0.1, torch.float32)
    g = Geometry(padding=(1, 1))
    compare(
        torch.randn(20, 64, 20, 20), weight, mask, torch.randn(64),
        lambda x, w, b: F.conv2d(x, w, b, padding=1), lambda x, p, v, b: sparse_conv2d(x, p, v, b, g),
    )  # fmt: skip


@pytest.mark.parametrize("at_once", [False, True], ids=["in_turn", "at_once"])
def test_one_pattern_for_batches_of_several_sizes(at_once, engine):
    """The source is cut into as many chunks as the batch asks for; what a pattern keeps of one cut serves no other."""
    weight, mask = sparse_weight((1500, 2000), 0.05)
    pattern, values = sb.SparsePattern.from_mask(mask), weight[mask]
    batches = [torch.randn(n, 2000, dtype=torch.float64) for n in (128, 64, 16, 96, 128)]
    grads = [torch.randn(len(x), 1500, dtype=torch.float64) for x in batches]

    def run(x, grad):
        x, v = x.clone().requires_grad_(), values.clone().requires_grad_()
        y = sparse_linear(x, pattern, v)
        y.backward(grad)
        return y.detach(), x.grad, v.grad

    with ThreadPoolExecutor(len(batches) if at_once else 1) as pool:
        results = list(pool.map(run, batches, grads))
    for (y, grad_x, grad_values), x, grad in zip(results, batches, grads, strict=True):
        close(y, x @ weight.T)
        close(grad_x, grad @ weight)
        close(grad_values, (grad.T @ x)[mask])


@pytest.mark.parametrize("name", ["small", "one_sample", "one_output"])
def test_linear_gradcheck(name, backend):
    n, i, o, density = LINEAR[name]
    weight, mask = sparse_weight((o, i), density)
    pattern = sb.SparsePattern.from_mask(mask)
    inputs = [t.requires_grad_() for t in (torch.randn(n, i, dtype=torch.float64), weight[mask], weight.new_ones(o))]
    assert gradcheck(lambda x, v, b: sparse_linear(x, pattern, v, b), inputs)


@pytest.mark.parametrize(
    "name",
    ["3x3", "3x3_stride_2_odd", "1x1_stride_2", "rectangular", "dilated", "dilated_and_strided", "groups", "depthwise",
     "stride_beyond_kernel", "padding_beyond_kernel", "image_of_one"],
)  # fmt: skip
def test_conv2d_gradcheck(name, backend):
    _, ic, h, w, oc, kernel, stride, padding, dilation, groups, density = CONV[name]
    weight, mask = sparse_weight((oc, ic // groups, *kernel), density)
    pattern = sb.SparsePattern.from_mask(mask)
    geometry = Geometry(stride, padding, dilation, groups)
    inputs = [
        t.requires_grad_() for t in (torch.randn(2, ic, h, w, dtype=torch.float64), weight[mask], weight.new_ones(oc))
    ]
    assert gradcheck(lambda x, v, b: sparse_conv2d(x, pattern, v, b, geometry), inputs)


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


def test_parameters_with_strides(backend):
    weight, mask = sparse_weight((6, 4), 0.5)
    bias, x = torch.randn(12, dtype=torch.float64)[::2], torch.randn(5, 4, dtype=torch.float64)
    values = weight[mask].repeat_interleave(2)[::2]
    close(sparse_linear(x, sb.SparsePattern.from_mask(mask), values, bias), F.linear(x, weight, bias))


def test_transforms_of_functions(backend):
    weight, mask = sparse_weight((6, 4), 0.5)
    pattern, values, x = sb.SparsePattern.from_mask(mask), weight[mask], torch.randn(5, 4, dtype=torch.float64)
    leaked = []
    torch.func.grad(lambda t: leaked.append(t * 2) or t.sum())(x)
    close(sparse_linear(leaked[0], pattern, values), F.linear(2 * x, weight))

    def sparse(t):
        return sparse_linear(t, pattern, values).sin()

    def dense(t):
        return F.linear(t, weight).sin()

    for transform in (
        lambda f: torch.func.grad(lambda t: f(t).sum()),
        lambda f: torch.func.vmap(lambda t: f(t[None])),
        torch.func.jacrev,
        lambda f: torch.func.vmap(torch.func.grad(lambda t: f(t).sum())),
        lambda f: torch.func.jacrev(torch.func.grad(lambda t: f(t).sum())),
    ):
        close(transform(sparse)(x), transform(dense)(x))


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
    weight, mask = torch.ones(6, 4), torch.ones(6, 4, dtype=torch.bool)
    pattern = sb.SparsePattern.from_mask(mask)
    values = torch.ones(24)
    conv = sb.SparsePattern.from_mask(torch.ones(6, 4, 3, 3, dtype=torch.bool))

    @pytest.mark.parametrize(
        ("x", "error", "message"),
        [
            (torch.ones(3, 4, dtype=torch.float64), TypeError, "x: expected dtype torch.float32, got torch.float64"),
            (torch.ones(3, 4, device="meta"), ValueError, "x: expected a tensor on the CPU, got one on meta"),
            (torch.ones(3, 5), ValueError, r"x: expected shape \(..., 4\), got \(3, 5\)"),
            (torch.ones(3, 4).to_sparse(), ValueError, r"x: expected a dense \(strided\) tensor"),
            ([1.0], TypeError, "x: expected a tensor, got list"),
            (torch.tensor(1.0), ValueError, "x: expected shape"),
        ],
    )
    def test_linear_x(self, x, error, message):
        with pytest.raises(error, match=message):
            sparse_linear(x, self.pattern, self.values)

    @pytest.mark.parametrize(
        ("x", "message"),
        [
            (torch.ones(2, 5, 8, 8), r"x: expected shape \(N, 4, H, W\), got \(2, 5, 8, 8\)"),
            (torch.ones(4, 8), "x: expected shape"),
            (torch.ones(2, 4, 2, 8), r"x: expected an image that the kernel \(3, 3\) fits into"),
        ],
    )
    def test_conv_x(self, x, message):
        with pytest.raises(ValueError, match=message):
            sparse_conv2d(x, self.conv, torch.ones(self.conv.nnz))

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
