"""Lane tensors through models and autograd."""

import pytest
import torch
from lanetests import lane, models, ordinary, step
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import sparsebreg as sb
from sparsebreg import lanes
from sparsebreg.lanes import LaneTensor


@pytest.mark.usefixtures("isa")
def test_gradcheck():
    norm = nn.BatchNorm2d(2).double()
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64, requires_grad=True)

    def f(x):
        return F.max_pool2d(F.silu(norm(lanes.from_plain(x))), 2).mean((2, 3))

    assert torch.autograd.gradcheck(f, x)


def test_unknown_operations_in_place_and_with_out():
    x, t = lane(20, 4, 3, 3)
    assert t.erf_() is t
    torch.testing.assert_close(ordinary(t), x.erf())
    out = lanes.from_plain(x.clone())
    assert torch.erf(lanes.from_plain(x), out=out) is out
    torch.testing.assert_close(ordinary(out), x.erf())


def test_bad_input():
    with pytest.raises(TypeError, match="x: expected a float32 or float64 tensor"):
        lanes.from_plain(torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="x: expected two dimensions or more, got 1"):
        lanes.from_plain(torch.zeros(2))


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
