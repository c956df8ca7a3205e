"""What tests of the lane layout share: the same operation on ordinary tensors, and small models."""

import copy

import torch
from torch import nn
from torch.nn import functional as F

import sparsebreg as sb
from sparsebreg import lanes
from sparsebreg.lanes import LaneTensor


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


def lane(*shape):
    x = torch.randn(shape)
    return x, lanes.from_plain(x)


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


FORMATS = {
    "plain": torch.Tensor.contiguous,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "lanes": lanes.from_plain,
}
