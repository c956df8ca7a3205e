"""The sparse convolution: output and gradients on every backend and instruction set against plain torch."""

import pytest
import torch
from helpers import close, compare_products, sparse_weight
from torch import nn
from torch.autograd import gradcheck
from torch.nn import functional as F

import sparsebreg as sb
from sparsebreg.ops import Geometry, sparse_conv2d

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
    compare_products(
        torch.randn(n, ic, h, w, dtype=dtype),
        weight,
        mask,
        torch.randn(oc, dtype=dtype),
        lambda x, w, b: F.conv2d(x, w, b, *geometry),
        lambda x, p, v, b: sparse_conv2d(x, p, v, b, geometry),
    )


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


class TestBadInput:
    conv = sb.SparsePattern.from_mask(torch.ones(6, 4, 3, 3, dtype=torch.bool))

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


@pytest.mark.parametrize(("kernel", "stride", "size"), [(16, 16, 64), (7, 11, 40), (1, 9, 30)])
def test_large_strides(kernel, stride, size, backend):
    """As of the patches of a vision transformer."""
    weight, mask = sparse_weight((24, 3, kernel, kernel), 0.2)
    pattern, values = sb.SparsePattern.from_mask(mask), weight[mask].requires_grad_()
    x = torch.randn(2, 3, size, size, dtype=torch.float64, requires_grad=True)
    geometry = Geometry((stride, stride))
    w = weight.clone().requires_grad_()
    y, wanted = sparse_conv2d(x, pattern, values, None, geometry), F.conv2d(x, w, None, stride)
    close(y, wanted)
    g = torch.randn_like(wanted)
    grads, dense = torch.autograd.grad(y, (x, values), g), torch.autograd.grad(wanted, (x, w), g)
    close(grads[0], dense[0])
    close(grads[1], dense[1][mask])


def test_the_patches_of_a_vision_transformer():
    layer = nn.Conv2d(3, 768, 16, 16)
    with torch.no_grad():
        layer.weight *= torch.rand_like(layer.weight) < 0.05
        x = torch.randn(16, 3, 224, 224)
        wanted = layer(x)
        sb.sparsify_(layer, sb.SparsifyConfig(decide="always"))
        torch.testing.assert_close(layer(x) + 0, wanted, rtol=1e-4, atol=1e-4)
