"""Norms that wait for a ReLU, a residual or a convolution against those that are computed at once."""

import copy

import pytest
import torch
from helpers import agree, ordinary
from torch import nn
from torch.nn import functional as F

import sparsebreg as sb
from sparsebreg import lanes
from sparsebreg.lanes import LaneTensor
from sparsebreg.ops import Geometry, sparse_conv2d

pytestmark = pytest.mark.usefixtures("on_native")

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


def norms(channels, count):
    """Batch norms in evaluation mode that are no identities."""
    made = [nn.BatchNorm2d(channels).double().eval() for _ in range(count)]
    for norm in made:
        for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            nn.init.uniform_(t, 0.5, 1.5)
    return made


@torch.no_grad()
def test_what_waits_for_a_sum_is_not_changed_by_a_relu_in_place():
    """A later sum still reads the sum before its ReLU."""
    a, b, c = torch.randn(3, 20, 4, 3, 3, dtype=torch.float64)
    first, second = norms(4, 2)

    def run(convert):
        y = first(convert(a)) + convert(b)
        z = second(convert(c)) + y
        y.relu_()
        return ordinary(z), ordinary(y)

    torch.testing.assert_close(run(lanes.from_plain), run(torch.clone))


class Both(torch.autograd.Function):
    """The first tensor; its gradient goes to the second one, too."""

    @staticmethod
    def forward(ctx, a, b):
        return a.view_as(a)

    @staticmethod
    def backward(ctx, grad):
        return grad, grad


def test_sums_of_another_norm_are_not_taken():
    """What a convolution gathers for the norm before it is of no use to another norm that gets the same gradient."""
    torch.manual_seed(1)
    u, w = torch.randn(2, 20, 4, 5, 5, dtype=torch.float64)
    first, second = nn.BatchNorm2d(4).double(), nn.BatchNorm2d(4).double()
    conv = nn.Conv2d(4, 3, 3, bias=False).double()
    twins = copy.deepcopy((first, second, conv))
    with torch.no_grad():
        for c in (conv, twins[2]):
            c.weight[:, ::2] = 0
    sb.sparsify_(conv, sb.SparsifyConfig(decide="always"))
    grads = []
    for (f, s, c), convert in (((first, second, conv), lanes.from_plain), (twins, lambda t: t)):
        a, b = u.clone().requires_grad_(), w.clone().requires_grad_()
        x, y = torch.relu(f(convert(a))), torch.relu(s(convert(b)))
        c(Both.apply(x, y)).square().sum().backward()
        grads.append([a.grad, b.grad, *(p.grad for m in (f, s) for p in m.parameters())])
    torch.testing.assert_close(*grads)
