"""The lane layout through a model: every operation against the same one on ordinary tensors."""

import copy
import io
import pickle

import pytest
import torch
from conftest import ISAS
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import sparsebreg as sb
from sparsebreg import lanes
from sparsebreg.core import extension
from sparsebreg.lanes import LaneTensor
from sparsebreg.ops import Geometry, sparse_conv2d

pytestmark = pytest.mark.skipif(extension.native() is None, reason="tests of the native extension")


@pytest.fixture(autouse=True)
def native():
    with sb.use_backend("native"):
        yield


@pytest.fixture(params=ISAS)
def isa(request):
    before = extension.native().isa()
    extension.native().select_isa(request.param)
    yield request.param
    extension.native().select_isa(before)


def ordinary(x):
    return x.detach().plain if isinstance(x, LaneTensor) else x.detach()


def agree(f, *shape, dtype=torch.float64, packed=True, tol=1e-10):
    """f of a lane tensor is f of the ordinary one, and so are the gradients; returns the former."""
    x = torch.randn(shape, dtype=dtype)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, z = f(a), f(lanes.from_plain(b))
    assert isinstance(z, LaneTensor) == packed
    torch.testing.assert_close(ordinary(z), y.detach(), rtol=tol, atol=tol)
    w = torch.randn_like(y)
    y.backward(w)
    z.backward(w)
    torch.testing.assert_close(b.grad, a.grad, rtol=tol, atol=tol)
    return z


POINTWISE = {
    "relu": F.relu,
    "relu_inplace": lambda x: F.relu_(x * 1),
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "gelu": F.gelu,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "hardswish": F.hardswish,
    "relu6": F.relu6,
    "softplus": F.softplus,
    "mish": F.mish,
    "scalar": lambda x: (2 * x + 1) / 3 - 0.5,
    "scalar_inplace": lambda x: (x * 1).mul_(2).add_(1),
    "residual": lambda x: x + x * 2,
    "residual_inplace": lambda x: (x * 1).add_(x),
    "channel": lambda x: x * torch.linspace(1, 2, x.shape[1], dtype=x.dtype).view(1, -1, 1, 1),
    "channel_without_batch": lambda x: x + torch.linspace(1, 2, x.shape[1], dtype=x.dtype).view(-1, 1, 1),
    "ordinary_tensor": lambda x: x * torch.linspace(0, 1, x.numel(), dtype=x.dtype).view(x.shape),
    "reversed": lambda x: 1 - x,
    "ordinary_mask": lambda x: x * (torch.arange(x.numel()).view(x.shape) % 3 == 0),
    "where": lambda x: torch.where(x > 0, x, x * 0.1),
    "clamp": lambda x: x.clamp(-0.5, 0.5),
    "cat": lambda x: torch.cat([x, x * 2], 1),
    "clone": lambda x: x.clone(),
    "flatten": lambda x: x.flatten(1),
    "reshape": lambda x: x.reshape(x.shape[0], -1),
}


@pytest.mark.parametrize("n", [1, 16, 21])
@pytest.mark.parametrize("name", POINTWISE)
def test_pointwise(name, n, dtype):
    agree(POINTWISE[name], n, 5, 3, 4, dtype=dtype, tol=1e-10 if dtype == torch.float64 else 1e-5)


PLANEWISE = {
    "max": lambda x: F.max_pool2d(x, 2),
    "max_overlapping": lambda x: F.max_pool2d(x, 3, 2, 1),
    "max_rectangular": lambda x: F.max_pool2d(x, (2, 3), (1, 2)),
    "max_dilated": lambda x: F.max_pool2d(x, 2, 1, 1, dilation=2),
    "max_ceil": lambda x: F.max_pool2d(x, 2, 2, ceil_mode=True),
    "max_ceil_padded": lambda x: F.max_pool2d(x, 3, 2, 1, ceil_mode=True),
    "max_gaps": lambda x: F.max_pool2d(x, 2, 3),
    "avg": lambda x: F.avg_pool2d(x, 2),
    "avg_padded": lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
    "adaptive_avg": lambda x: F.adaptive_avg_pool2d(x, 2),
    "nearest": lambda x: F.interpolate(x, scale_factor=2),
    "bilinear": lambda x: F.interpolate(x, size=(9, 5), mode="bilinear", align_corners=False),
}


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("n", [1, 16, 21])
@pytest.mark.parametrize("name", PLANEWISE)
def test_planewise(name, n, dtype):
    agree(PLANEWISE[name], n, 5, 7, 6, dtype=dtype, tol=1e-10 if dtype == torch.float64 else 1e-5)


def test_max_pool_indices_are_those_of_torch():
    x = torch.randn(21, 3, 7, 6)
    y, indices = F.max_pool2d(lanes.from_plain(x), 3, 2, 1, return_indices=True)
    want, want_indices = F.max_pool2d(x, 3, 2, 1, return_indices=True)
    assert torch.equal(ordinary(y), want)
    assert torch.equal(indices + 0, want_indices)


@pytest.mark.usefixtures("isa")
def test_max_pool_of_nan_and_of_ties():
    x = torch.zeros(3, 2, 4, 4)
    x[0, 0, 1, 1] = float("nan")
    x[1] = -float("inf")
    y, indices = F.max_pool2d(lanes.from_plain(x), 2, return_indices=True)
    want, want_indices = F.max_pool2d(x, 2, return_indices=True)
    torch.testing.assert_close(ordinary(y), want, equal_nan=True)
    assert torch.equal(indices + 0, want_indices)


REDUCTIONS = {
    "global_pool": lambda x: F.adaptive_avg_pool2d(x, 1),
    "mean": lambda x: x.mean((2, 3)),
    "mean_keepdim": lambda x: x.mean((-1, -2), keepdim=True),
    "sum_over_all_but_channels": lambda x: x.sum((0, 2, 3)),
    "mean_over_all_but_channels": lambda x: x.mean((0, 2, 3), keepdim=True),
    "sum": lambda x: x.sum(),
    "batch": lambda x: x.mean(0),
    "max": lambda x: x.amax((2, 3)),
    "softmax": lambda x: x.softmax(1),
    "slice": lambda x: x[:, 1:3],
    "to_plain": lanes.to_plain,
    "permute": lambda x: x.permute(0, 2, 3, 1),
    "regrouped": lambda x: x.view(-1, 4),
    "other_dtype": lambda x: x.to(torch.bfloat16).double(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("n", [1, 16, 21])
@pytest.mark.parametrize("name", REDUCTIONS)
def test_what_leaves_the_layout(name, n):
    agree(REDUCTIONS[name], n, 5, 3, 4, packed=False)


NORMS = {
    "batch": lambda: nn.BatchNorm2d(5),
    "cumulative": lambda: nn.BatchNorm2d(5, momentum=None),
    "plain": lambda: nn.BatchNorm2d(5, affine=False),
    "untracked": lambda: nn.BatchNorm2d(5, track_running_stats=False),
    "group": lambda: nn.GroupNorm(5, 5),
    "instance": lambda: nn.InstanceNorm2d(5, affine=True),
    "layer": lambda: nn.LayerNorm([5, 3, 4]),
}


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("n", [1, 16, 21])
@pytest.mark.parametrize("name", NORMS)
def test_norms_and_their_running_statistics(name, n, training, dtype):
    a = NORMS[name]().to(dtype).train(training)
    for p in a.parameters():
        nn.init.uniform_(p, 0.5, 2)
    b = copy.deepcopy(a)
    tol = 1e-10 if dtype == torch.float64 else 2e-4
    modules = iter([a, b])
    agree(lambda x: next(modules)(x) * 2 + x, n, 5, 3, 4, dtype=dtype, tol=tol)
    packed = name in ("batch", "cumulative", "plain", "untracked") or (name, n) == ("instance", 1)
    x = torch.randn(n, 5, 3, 4, dtype=dtype)
    y, z = a(x), b(lanes.from_plain(x))
    assert isinstance(z, LaneTensor) == packed
    torch.testing.assert_close(ordinary(z), y.detach(), rtol=tol, atol=tol)
    torch.testing.assert_close(b.state_dict(), a.state_dict(), rtol=tol, atol=tol)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=tol, atol=tol)


@pytest.mark.usefixtures("isa")
def test_running_statistics_do_not_see_the_padding(dtype):
    a = nn.BatchNorm2d(5).to(dtype)
    b = copy.deepcopy(a)
    for n in (21, 3, 16):
        x = torch.randn(n, 5, 3, 4, dtype=dtype) * 3 + 100
        torch.testing.assert_close(ordinary(b(lanes.from_plain(x) + 7)), a(x + 7).detach(), rtol=1e-4, atol=1e-4)
        for name, value in a.state_dict().items():
            torch.testing.assert_close(b.state_dict()[name], value, rtol=1e-5, atol=1e-5)


FUSED = {
    "relu": lambda n, x: F.relu(n[0](x)),
    "relu_inplace": lambda n, x: F.relu(n[0](x), inplace=True),
    "residual": lambda n, x: F.relu(n[0](x) + x),
    "residual_first": lambda n, x: F.relu(x + n[0](x)),
    "residual_inplace": lambda n, x: F.relu(n[0](x).add_(x), inplace=True),
    "two_norms": lambda n, x: F.relu(n[0](x) + n[1](x)),
    "two_norms_read": lambda n, x: (lambda y, z: F.relu(y + z) * y - z)(n[0](x), n[1](x * 2)),
    "two_norms_written": lambda n, x: (lambda y, s: (y.mul_(3), F.relu(s), F.relu_(y))[1] + y)(
        *(lambda y: (y, n[1](x * 2) + y))(n[0](x))
    ),
    "relu_of_a_norm_added": lambda n, x: F.relu(n[0](x) + F.relu(n[1](x))),
    "chain": lambda n, x: F.relu(n[1](F.relu(n[0](x)) * 2) + x),
    "chain_inplace": lambda n, x: F.relu(n[1](F.relu(n[0](x), inplace=True) * 2).add_(x), inplace=True),
    "relu_twice": lambda n, x: F.relu(F.relu(n[0](x)) - 0.1),
    "norm_read_twice": lambda n, x: (lambda y: F.relu(y) * y + y)(n[0](x)),
    "sum_read_twice": lambda n, x: (lambda y: F.relu(y + x) * F.relu(y - x))(n[0](x)),
    "input_written_later": lambda n, x: (lambda t: (F.relu(n[0](t)), t.mul_(2))[0] + t)(x * 1),
    "input_viewed_and_written_later": lambda n, x: (lambda t: (F.relu(n[0](t)), t[:, :2].mul_(2))[0] + t)(x * 1),
    "input_viewed_and_written_to_later": lambda n, x: (
        lambda t: (lambda view: (n[0](t), view.mul_(2))[0] + t)(t[:, :2])
    )(x * 1),
    "result_viewed": lambda n, x: (lambda t: (t[:, :2].mul_(2), t)[1])(F.relu(n[0](x)) * 1),
    "other_threshold": lambda n, x: F.threshold(n[0](x), 0.1, 0.0),
    "no_weight_gradient": lambda n, x: F.relu(n[0].requires_grad_(False)(x) + x),
}


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("n", [16, 21])
@pytest.mark.parametrize("name", FUSED)
def test_norm_relu_and_residual(name, n, training):
    def make():
        norms = nn.ModuleList([nn.BatchNorm2d(5), nn.BatchNorm2d(5)]).double().train(training)
        for i, p in enumerate(norms.parameters()):
            p.data = torch.linspace(0.5 + i, -0.5 + i, 5, dtype=torch.float64)
        return norms

    norms = [make(), make()]
    order = iter(norms)
    if "later" in name:  # autograd refuses: the norm's input is needed for its gradient
        x = torch.randn(n, 5, 3, 4, dtype=torch.float64)
        with torch.no_grad():
            want = FUSED[name](norms[0], x)
            torch.testing.assert_close(ordinary(FUSED[name](norms[1], lanes.from_plain(x))), want)
        return
    agree(lambda x: FUSED[name](next(order), x), n, 5, 3, 4)
    for p, q in zip(*(m.parameters() for m in norms), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-9, atol=1e-9)


# n: a norm; c: a convolution, sparse and on the lane layout, or dense. What a norm gives to a convolution alone is
# never computed for itself, and gradients that meet are added by the norm before.
CONVOLVED = {
    "norm": lambda n, c, x: c(n(x)),
    "relu": lambda n, c, x: c(F.relu(n(x))),
    "relu_inplace": lambda n, c, x: c(F.relu(n(x), inplace=True)),
    "twice": lambda n, c, x: (lambda y: c(y) - c(2 * c(y)))(F.relu(n(x))),
    "and_read": lambda n, c, x: (lambda y: c(y) + y.exp())(F.relu(n(x))),
    "residual": lambda n, c, x: (lambda y: c(y) + y)(F.relu(n(c(x)) + x)),
    "three_gradients": lambda n, c, x: (lambda y: c(y) + c(-y) * c(y + 1))(F.relu(n(c(x)) + x)),
    "three_gradients_of_a_relu": lambda n, c, x: (lambda y: c(y) + c(-y) * c(y + 1))(F.relu(n(x))),
    "sum": lambda n, c, x: c(n(x) + x),
    "other_rows": lambda n, c, x: c(F.relu(n(x.view(-1, 6, 10, 3))).view(-1, 6, 5, 6)),
    "more_channels": lambda n, c, x: c(F.relu(n(torch.cat([x, x], 1).view(-1, 6, 10, 6))).view(-1, 12, 5, 6)),
    "as_channels": lambda n, c, x: c(F.relu(n(x).view(-1, 12, 5, 3)).view(-1, 6, 5, 6)),
    # A norm behind a convolution finds its statistics ready, and leaves its gradient to the convolution.
    "behind": lambda n, c, x: F.relu(n(c(x))),
    "behind_twice": lambda n, c, x: (lambda y: n(y) * F.relu(n(y)))(c(x)),
    "behind_and_read": lambda n, c, x: (lambda y: n(y) + y.exp())(c(x)),
    "behind_a_view": lambda n, c, x: n(c(x).view(-1, 6, 10, 3)).view(-1, 6, 5, 6),
    "behind_a_write": lambda n, c, x: n(c(x).mul_(2)),
    "behind_a_hidden_write": lambda n, c, x: (lambda y: (y.data.add_(3), F.relu(n(y)))[1])(c(x)),
    "input_written_later": lambda n, c, x: (lambda t: (lambda y: (t.mul_(2), c(y))[1] + t)(F.relu(n(t))))(x * 1),
}  # fmt: skip


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("size", [16, 21])
@pytest.mark.parametrize("name", CONVOLVED)
def test_norm_before_a_convolution(name, size, training):
    weight = torch.randn(6, 6, 3, 3, dtype=torch.float64) * (torch.rand(6, 6, 3, 3) < 0.4)
    pattern = sb.SparsePattern.from_mask(weight != 0)
    norms, kernels = [], [weight.clone().requires_grad_(), pattern.gather(weight).requires_grad_()]
    for _ in range(2):
        norms.append(nn.BatchNorm2d(6).double().train(training))
        for i, p in enumerate(norms[-1].parameters()):
            p.data = torch.linspace(1.5 - i, -0.5 + i, 6, dtype=torch.float64)
        for b in norms[-1].buffers():
            b += 1

    def run(x):
        if isinstance(x, LaneTensor):

            def conv(x):
                geometry = Geometry((1, 1), (1, 1), (1, 1), x.shape[1] // 6)
                return sparse_conv2d(x, pattern, kernels[1], geometry=geometry)

            return CONVOLVED[name](norms[1], conv, x)
        return CONVOLVED[name](norms[0], lambda x: F.conv2d(x, kernels[0], padding=1, groups=x.shape[1] // 6), x)

    if "later" in name:  # autograd refuses: the norm's input is needed for its gradient
        x = torch.randn(size, 6, 5, 6, dtype=torch.float64)
        with torch.no_grad():
            torch.testing.assert_close(ordinary(run(lanes.from_plain(x))), run(x))
        return
    agree(run, size, 6, 5, 6)
    torch.testing.assert_close(kernels[1].grad, pattern.gather(kernels[0].grad), rtol=1e-9, atol=1e-9)
    for p, q in zip(*(m.parameters() for m in norms), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("written", ["result", "input"])
def test_whole_writes_behind_autograds_back(written):
    """What .data writes is what the backward pass sees, as in torch."""
    x = torch.randn(16, 3, 4, 4, dtype=torch.float64)
    grads = []
    for make in (torch.clone, lanes.from_plain):
        norm = nn.BatchNorm2d(3).double()
        a = x.clone().requires_grad_()
        h = make(a) * 1
        y = F.relu(norm(h))
        z = y * 1
        (y if written == "result" else h).data.mul_(-1 if written == "result" else 0.5)
        z.sum().backward()
        grads.append([a.grad, norm.weight.grad, norm.bias.grad])
    for p, q in zip(*grads, strict=True):
        torch.testing.assert_close(q, p)


@pytest.mark.parametrize("n", [16, 21])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "groups"),
    [(1, 1, 0, 1), (1, 2, 0, 1), (1, 2, 1, 1), (1, 2, 0, 2), (3, 1, 1, 1), (3, 2, 0, 2)],
)
def test_full_gradient_of_a_weight(kernel, stride, padding, groups, n):
    geometry = Geometry((stride, stride), (padding, padding), (1, 1), groups)
    weight = torch.randn(16, 8 // groups, kernel, kernel)
    weight = (weight * (torch.rand_like(weight) < 0.3)).requires_grad_()
    pattern = sb.SparsePattern.from_nonzeros(weight)
    x = torch.randn(n, 8, 64, 64)
    y = F.conv2d(x, weight, None, *geometry)
    w = torch.randn_like(y)
    (want,) = torch.autograd.grad(y, weight, w)
    z = sparse_conv2d(lanes.from_plain(x), pattern, pattern.gather(weight), geometry=geometry, weight=weight)
    (got,) = torch.autograd.grad(z, weight, lanes.from_plain(w))
    assert got.stride() == want.stride()
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-2)


FORMATS = {
    "plain": torch.Tensor.contiguous,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "lanes": lanes.from_plain,
}


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("needs_x", [True, False])
@pytest.mark.parametrize("n", [7, 16, 37])
@pytest.mark.parametrize("of_grad", FORMATS)
@pytest.mark.parametrize("of_x", FORMATS)
def test_full_gradients_in_every_layout(of_x, of_grad, n, needs_x):
    weight = torch.randn(9, 5, 3, 2, dtype=torch.float64)
    weight = (weight * (torch.rand_like(weight) < 0.3)).requires_grad_()
    bias = torch.randn(9, dtype=torch.float64, requires_grad=True)
    pattern, geometry = sb.SparsePattern.from_nonzeros(weight), Geometry((1, 2), (1, 0))
    x = torch.randn(n, 5, 6, 11, dtype=torch.float64)
    w = torch.randn(n, 9, 6, 5, dtype=torch.float64)
    grads = []
    for sparse in (False, True):
        a = x.clone().requires_grad_(needs_x)
        if sparse:
            values, last = pattern.gather(weight.detach()), of_x == "channels_last"
            y = sparse_conv2d(FORMATS[of_x](a), pattern, values, bias, geometry, last, of_grad == "lanes", weight)
        else:
            y = F.conv2d(a, weight, bias, *geometry)
        grad = FORMATS[of_grad](w) if sparse and (isinstance(y, LaneTensor) or of_grad != "lanes") else w
        grads.append(torch.autograd.grad(y, [weight, bias, a] if needs_x else [weight, bias], grad))
    torch.testing.assert_close([ordinary(g) for g in grads[1]], list(grads[0]), rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("n", [16, 21])
@pytest.mark.parametrize("density", [0.3, 0.8])
def test_values_of_a_dense_pattern(density, n, monkeypatch):
    """Without grad_x they are part of a full gradient, which takes the norm behind the convolution along."""
    dense = nn.Sequential(nn.Conv2d(3, 20, 3, 2, 1), nn.BatchNorm2d(20), nn.ReLU(), nn.Conv2d(20, 4, 3)).double()
    sb.sparse_init_(dense, density)
    sparse = copy.deepcopy(dense)
    sb.sparsify_(sparse, sb.SparsifyConfig(decide="always"))
    full, kind = [], type(sb.backends.current())
    product = kind.conv2d_weight_grad
    monkeypatch.setattr(kind, "conv2d_weight_grad", lambda self, *a: (full.append(a[2]), product(self, *a))[1])
    x = torch.randn(n, 3, 9, 9, dtype=torch.float64)
    for model in (dense, sparse):
        model(x).square().sum().backward()
    assert full == ([(20, 3, 3, 3)] if density > 0.5 else [])
    for a, b in zip(dense, sparse, strict=True):
        if isinstance(b, sb.nn.SparseConv2d):
            torch.testing.assert_close(b.values.grad, b.pattern.gather(a.weight.grad), rtol=1e-9, atol=1e-9)
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            if p.dim() == 1:
                torch.testing.assert_close(q.grad, p.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("n", [16, 21])
def test_a_gradient_written_after_a_norm_has_read_it(n):
    weight = torch.randn(4, 3, 3, 3, dtype=torch.float64) * (torch.rand(4, 3, 3, 3) < 0.4)
    pattern = sb.SparsePattern.from_mask(weight != 0)
    values = pattern.gather(weight)
    x = torch.randn(n, 3, 5, 5, dtype=torch.float64)
    grads = []
    for conv, make in (
        (lambda t: F.conv2d(t, weight, padding=1), torch.clone),
        (lambda t: sparse_conv2d(t, pattern, values, geometry=Geometry(padding=(1, 1))), lanes.from_plain),
    ):
        norm, of_norm = nn.BatchNorm2d(4).double(), []
        a = x.clone().requires_grad_()
        y = conv(make(a))
        z = norm(y)
        z.register_hook(lambda g, kept=of_norm: kept.append(g))
        y.register_hook(lambda g, kept=of_norm: (kept[0].zero_(), None)[1])
        (z * torch.linspace(-1, 2, 5, dtype=torch.float64)).sum().backward()
        grads.append(a.grad)
    assert grads[0].abs().max() > 0.1
    torch.testing.assert_close(grads[1], grads[0])


def test_many_gradients_meet():
    x = torch.randn(16, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    h = F.relu(nn.BatchNorm2d(2).double()(lanes.from_plain(x)))
    sum((h * 1 for _ in range(1500)), torch.zeros(())).sum().backward()
    assert x.grad.isfinite().all()
    with torch.no_grad():
        total = h
        for _ in range(1500):
            total = total + h
        torch.testing.assert_close(ordinary(total), 1501 * ordinary(h))


@pytest.mark.usefixtures("isa")
def test_gradcheck():
    norm = nn.BatchNorm2d(2).double()
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64, requires_grad=True)

    def f(x):
        return F.max_pool2d(F.silu(norm(lanes.from_plain(x))), 2).mean((2, 3))

    assert torch.autograd.gradcheck(f, x)


# What a tensor must be able to do besides computing.


def lane(*shape):
    x = torch.randn(shape)
    return x, lanes.from_plain(x)


def test_writes_through_views_arrive():
    x, t = lane(20, 4, 3, 3)
    view = t[:, 1:3]
    view.zero_()
    x[:, 1:3].zero_()
    assert torch.equal(ordinary(t), x)
    assert torch.equal(F.relu(t) + 0, F.relu(x))
    t.mul_(2)
    assert torch.equal(view + 0, x[:, 1:3] * 2)


def test_writes_through_views_reach_the_gradient():
    x = torch.randn(20, 4, 3, 3, requires_grad=True)
    t = lanes.from_plain(x) * 1
    t[:, 1:3] *= 3
    (t * t).sum().backward()
    want = x.detach().clone()
    want[:, 1:3] *= 9
    torch.testing.assert_close(x.grad, 2 * want)


def test_unknown_operations_in_place_and_with_out():
    x, t = lane(20, 4, 3, 3)
    assert t.erf_() is t
    torch.testing.assert_close(ordinary(t), x.erf())
    out = lanes.from_plain(x.clone())
    assert torch.erf(lanes.from_plain(x), out=out) is out
    torch.testing.assert_close(ordinary(out), x.erf())


def test_data_and_detach_share_the_storage():
    x, t = lane(20, 4, 3, 3)
    t.data.add_(1)
    t.detach().add_(1)
    torch.testing.assert_close(ordinary(t), x + 2)


def test_leaves_as_an_ordinary_tensor():
    x, t = lane(20, 4, 3, 3)
    assert (t.numpy() == x.numpy()).all()
    assert t.tolist() == x.tolist()
    assert t.sum().item() == pytest.approx(x.sum().item(), rel=1e-4)
    assert torch.equal(pickle.loads(pickle.dumps(t)), x)
    file = io.BytesIO()
    torch.save(t, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True), x)
    assert torch.equal(ordinary(copy.deepcopy(t)), x)
    assert repr(x)[7:-1] in repr(t)
    assert torch.equal(t.double() + 0, x.double())
    with pytest.raises(RuntimeError, match="requires grad"):
        lanes.from_plain(x.clone().requires_grad_()).numpy()


def test_mixed_batches_and_shapes():
    x, t = lane(20, 4, 3, 3)
    one, row = torch.randn(1, 4, 3, 3), torch.randn(20, 1, 1, 1)
    torch.testing.assert_close(ordinary(t * one), x * one)
    torch.testing.assert_close(ordinary(t * row), x * row)
    torch.testing.assert_close(ordinary(t + lanes.from_plain(one)), x + one)
    with pytest.raises(RuntimeError, match="size"):
        t + torch.randn(20, 4, 3, 2)


def test_dimensions_out_of_range():
    _, t = lane(20, 4, 3, 3)
    for call in (
        lambda: torch.cat([t, t], 4),
        lambda: t.sum(4),
        lambda: t.mean((2, -5)),
        lambda: torch.cat([t, t], -5),
    ):
        with pytest.raises(IndexError, match="out of range"):
            call()


def test_bad_input():
    with pytest.raises(TypeError, match="x: expected a float32 or float64 tensor"):
        lanes.from_plain(torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="x: expected two dimensions or more, got 1"):
        lanes.from_plain(torch.zeros(2))


# In a model.


class Odd(nn.Module):
    """A user's own model: shared layers, residuals, operations that are not known."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.wide = nn.Conv2d(16, 8, (1, 3), groups=2)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)), inplace=True)
        y = self.norm(self.conv(x)) + x
        y = F.relu(self.conv(y)).cumsum(2) * 0.1
        y = self.wide(torch.cat([x, y], 1))
        return self.head(F.dropout(y, 0.0).mean((2, 3)))


def models(dtype=torch.float64):
    dense = Odd().to(dtype)
    for m in dense.modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            m.weight.data.mul_(torch.rand_like(m.weight) < 0.3)
    sparse = copy.deepcopy(dense)
    sb.sparsify_(sparse, sb.SparsifyConfig(decide="always"))
    return dense, sparse


def step(model, x, run=None):
    x = x.clone().requires_grad_()
    y = (run or model)(x)
    y.square().sum().backward()
    return y.detach(), x.grad


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("n", [1, 7, 16, 100])
def test_model_is_the_masked_dense_one(n, training, dtype):
    dense, sparse = models(dtype)
    dense.train(training)
    sparse.train(training)
    x = torch.randn(n, 3, 6, 6, dtype=dtype)
    tol = 1e-9 if dtype == torch.float64 else 1e-3
    torch.testing.assert_close(step(sparse, x), step(dense, x), rtol=tol, atol=tol)
    masks = {name: p != 0 for name, p in dense.named_parameters()}
    sb.densify_(sparse)
    for (name, p), q in zip(dense.named_parameters(), sparse.parameters(), strict=True):
        grad = p.grad * masks[name] if p.dim() > 1 else p.grad
        torch.testing.assert_close(q.grad, grad, rtol=tol, atol=tol)
    for p, q in zip(dense.buffers(), sparse.buffers(), strict=True):
        torch.testing.assert_close(q, p, rtol=tol, atol=tol)


def test_unknown_operations_are_counted_by_name():
    _, sparse = models()
    sb.densify_(sparse)
    report = sb.sparsify_(sparse, sb.SparsifyConfig(decide="always"))
    sparse(torch.randn(16, 3, 6, 6, dtype=torch.float64))
    assert report.unpacked["cumsum"] == 1


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant):
    dense, sparse = models()
    dense.eval(), sparse.eval()
    x = torch.randn(20, 3, 6, 6, dtype=torch.float64)
    got = step(sparse, x, lambda x: checkpoint(sparse, x, use_reentrant=reentrant))
    torch.testing.assert_close(got, step(dense, x), rtol=1e-9, atol=1e-9)


def test_checkpointing_inside_of_the_layout():
    conv = sb.nn.SparseConv2d.from_dense(nn.Conv2d(3, 4, 3).double())
    x = torch.randn(20, 3, 6, 6, dtype=torch.float64)

    def inner(t):
        return F.relu(conv(t)).square()

    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    inner(a).sum().backward()
    checkpoint(inner, lanes.from_plain(b), use_reentrant=True).sum().backward()
    torch.testing.assert_close(b.grad, a.grad)


def test_hooks_see_and_change_gradients():
    dense, sparse = models()
    x = torch.randn(20, 3, 6, 6, dtype=torch.float64)
    for model in (dense, sparse):
        model.stem.register_forward_hook(lambda m, i, o: o * 2)
        model.conv.register_full_backward_hook(lambda m, gi, go: tuple(g * 3 for g in gi))
        model.norm.register_forward_hook(lambda m, i, o: o.register_hook(lambda g: g * 0.5) and None)
    torch.testing.assert_close(step(sparse, x), step(dense, x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode):
    dense, sparse = models()
    x = torch.randn(20, 3, 6, 6, dtype=torch.float64)
    with mode():
        torch.testing.assert_close(sparse.eval()(x), dense.eval()(x))


def test_retained_gradient_of_an_intermediate():
    _, sparse = models()
    seen = []

    def keep(module, inputs, output):
        output.retain_grad()
        seen.append(output)

    sparse.conv.register_forward_hook(keep)
    sparse(torch.randn(20, 3, 6, 6, dtype=torch.float64)).sum().backward()
    assert all(o.grad is not None and o.grad.shape == o.shape for o in seen)


def test_the_layout_stays_between_sparse_layers():
    _, sparse = models()
    kinds = []
    for m in (sparse.stem, sparse.norm, sparse.conv):
        m.register_forward_hook(lambda m, i, o: kinds.append(type(o)) and None)
    sparse(torch.randn(20, 3, 6, 6, dtype=torch.float64))
    assert set(kinds) == {LaneTensor}


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(
    ("sizes", "stride", "groups", "density"),
    [((64, 64, 3), 1, 1, 0.2), ((48, 64, 3), 2, 1, 0.3), ((64, 64, 1), 1, 1, 0.5), ((64, 96, 5), 1, 2, 0.1)],
    ids=["chunks", "strided", "pointwise", "groups"],
)
def test_large_convolutions(sizes, stride, groups, density):
    """Large enough for several chunks a sum, several bands an image, and results that are written past the caches."""
    i, o, k = sizes
    dense = nn.Conv2d(i, o, k, stride, k // 2, groups=groups)
    dense.weight.data.mul_(torch.rand_like(dense.weight) < density)
    sparse = sb.nn.SparseConv2d.from_dense(dense)
    x = torch.randn(40, i, 32, 32)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, z = dense(a), sparse(lanes.from_plain(b))
    torch.testing.assert_close(ordinary(z), y.detach(), rtol=1e-4, atol=1e-4)
    w = torch.randn_like(y)
    y.backward(w)
    z.backward(lanes.from_plain(w))
    torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-4)
    want = sparse.pattern.gather(dense.weight.grad)
    torch.testing.assert_close(sparse.values.grad, want, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(sparse.bias.grad, dense.bias.grad, rtol=1e-3, atol=1e-2)
