"""Lane tensors on their way through a model against the dense model on ordinary tensors."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import sparsebreg as sb
from sparsebreg import lanes
from sparsebreg.lanes import LaneTensor

pytestmark = pytest.mark.usefixtures("on_native")


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
