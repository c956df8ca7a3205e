"""Full gradients of linear layers that are computed when something asks for them."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sparsebreg as sb
from sparsebreg.core import extension
from sparsebreg.core.gradient import PendingGrad, resolve
from sparsebreg.ops import sparse_linear

if (C := extension.native()) is None:
    pytest.skip("needs the native extension", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("on_native")


def make(dtype=torch.float32):
    model = nn.Sequential(nn.Linear(70, 90), nn.ReLU(), nn.Linear(90, 130), nn.ReLU(), nn.Linear(130, 5)).to(dtype)
    return sb.sparse_init_(model, 0.15)


def batch(dtype=torch.float32, n=40):
    return torch.randn(n, 70, dtype=dtype), torch.randint(0, 5, (n,))


def backward(model, x, y):
    F.cross_entropy(model(x), y).backward()


def fine(model, make_optimizer=sb.LinBreg, reg=None, **options):
    """The optimizer and the cycle of a model, always in the fine phase."""
    optimizer = make_optimizer(sb.param_groups(model, reg or sb.L1(0.05)), **{"lr": 0.1, **options})
    return optimizer, sb.Multilevel(model, optimizer, 0, sb.SparsifyConfig(min_sparsity=0.6))


def twins(dtype=torch.float32):
    """A model in the fine phase after a backward pass, and the gradients of the same dense model."""
    model, data = make(dtype), batch(dtype)
    dense = copy.deepcopy(model)
    _, ml = fine(model)
    backward(model, *data)
    backward(dense, *data)
    return model, ml, data, [dense[i].weight.grad for i in (0, 2)]


def close(grad, wanted):
    limit = 1e-12 if wanted.dtype is torch.float64 else 1e-5
    torch.testing.assert_close(resolve(grad), wanted, rtol=limit, atol=limit)


def test_it_is_the_gradient(isa, dtype):
    model, _, _, wanted = twins(dtype)
    for i, grad in zip((0, 2), wanted, strict=True):
        pending = model[i].weight.grad
        assert type(pending) is PendingGrad
        assert pending.factors is not None
        assert (pending.shape, pending.dtype, pending.stride()) == (grad.shape, dtype, grad.stride())
        close(pending, grad)
        assert pending.factors is None


@pytest.mark.parametrize(
    ("make_optimizer", "options"),
    [
        (sb.LinBreg, {"momentum": 0.9}),
        (sb.LinBreg, {"weight_decay": 0.1, "maximize": True}),
        (sb.AdaBreg, {"lr": 1e-3}),
        (sb.ProxSGD, {"momentum": 0.9}),
    ],
)
def test_steps_are_those_of_the_computed_gradient(isa, dtype, make_optimizer, options):
    """To the bit: each weight's sum is made in the same order, wherever it goes."""
    models, data = [make(dtype)], batch(dtype)
    models.append(copy.deepcopy(models[0]))
    for computed, model in enumerate(models):
        optimizer, ml = fine(model, make_optimizer, **options)
        for _ in range(4):
            optimizer.zero_grad()
            backward(model, *data)
            grads = [model[i].weight.grad for i in (0, 2)]
            if computed:
                for i, grad in zip((0, 2), grads, strict=True):
                    model[i].weight.grad = grad.dense
            ml.step()
            assert all((g.factors is None) == bool(computed) for g in grads)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.any()


def test_what_happens_to_the_input_does_not_reach_it():
    model, _, (x, _), (wanted, _) = twins()
    with torch.no_grad():
        x.zero_()
    close(model[0].weight.grad, wanted)


def test_accumulation():
    model, _, data, (wanted, _) = twins()
    backward(model, *data)
    assert model[0].weight.grad.factors is None
    close(model[0].weight.grad, 2 * wanted)


def test_clipped_gradients_are_what_a_step_takes():
    model, ml, _, wanted = twins(torch.float64)
    before = model[0].weight.detach().clone(), ml.optimizer.state[model[0].weight].get("dual")
    assert before[1] is None
    total = nn.utils.clip_grad_norm_([model[0].weight, model[2].weight], 1e-3)
    assert total.item() == pytest.approx(torch.cat([g.flatten() for g in wanted]).norm().item(), rel=1e-4)
    ml.step()
    start = before[0] + sb.L1(0.05).subgradient(before[0])
    moved = ml.optimizer.state[model[0].weight]["dual"] - start
    torch.testing.assert_close(moved, -0.1 * 1e-3 / total * wanted[0], rtol=1e-3, atol=1e-8)


def test_zero_grad():
    model, ml, data, (wanted, _) = twins()
    ml.optimizer.zero_grad(set_to_none=False)
    assert not model[0].weight.grad.any()
    backward(model, *data)
    close(model[0].weight.grad, wanted)
    ml.optimizer.zero_grad()
    assert model[0].weight.grad is None


def test_hooks_see_it():
    model, seen = make(), []
    fine(model)
    model[0].weight.register_hook(lambda grad: 2 * grad)
    model[2].weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.abs().sum().item()))
    data = batch()
    backward(model, *data)
    for m in (model[0], model[2]):
        m.weight._backward_hooks = None
    again = model[0].weight.grad.clone()
    model.zero_grad()
    backward(model, *data)
    torch.testing.assert_close(again, 2 * model[0].weight.grad.dense)
    assert seen[0] == pytest.approx(model[2].weight.grad.abs().sum().item())


def test_regularizers_without_a_native_step():
    models, data = [make()], batch()
    models.append(copy.deepcopy(models[0]))
    for computed, model in enumerate(models):
        _, ml = fine(model, reg=sb.GroupL2(0.02))
        backward(model, *data)
        if computed:
            model[0].weight.grad = model[0].weight.grad.dense
        ml.step()
    assert torch.equal(models[0][0].weight, models[1][0].weight)


def test_other_optimizers_take_it():
    model, _, _, (wanted, _) = twins()
    before = model[0].weight.detach().clone()
    torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9).step()
    torch.testing.assert_close(model[0].weight, before - 0.5 * wanted)


def test_operations():
    model, _, _, (wanted, second) = twins()
    grad, other = (model[i].weight.grad for i in (0, 2))
    assert grad.numel() == 70 * 90
    assert "PendingGrad(tensor(" in repr(grad)
    assert grad.mul_(2) is grad
    close(grad, 2 * wanted)
    close(grad.t()[3:5], 2 * wanted.t()[3:5])
    view = grad.view(-1)
    view.zero_()
    assert not grad.any()
    torch._foreach_mul_([grad, other], [1.0, 3.0])
    close(other, 3 * second)
    assert other.numpy().shape == (130, 90)
    assert other.tolist() == other.dense.tolist()
    for made in (copy.deepcopy(other), pickle.loads(pickle.dumps(other)), other.clone()):
        assert type(made) is torch.Tensor
        assert torch.equal(made, other.dense)


def test_its_memory_is_that_of_the_computed_gradient():
    model, _, _, (wanted, second) = twins()
    grad, other = (model[i].weight.grad for i in (0, 2))
    close(torch.from_dlpack(grad), wanted)
    assert grad.data_ptr() == grad.dense.data_ptr() != 0
    assert grad.untyped_storage().nbytes() >= wanted.untyped_storage().nbytes()
    other.apply_(lambda v: 2 * v)
    close(other, 2 * second)
    model.share_memory()
    assert other.is_shared()
    close(other, 2 * second)


def test_data():
    model, ml, _, (wanted, _) = twins()
    grad = model[0].weight.grad
    grad.data.mul_(2)
    close(grad, 2 * wanted)
    grad.data = torch.ones_like(wanted)
    assert torch.equal(grad + 0, torch.ones_like(wanted))
    assert grad.factors is None
    ml.step()


def test_a_model_changes_its_dtype_with_its_gradients():
    model, ml, (x, y), (wanted, _) = twins()
    model.double()
    assert (model[0].weight.grad + 0).dtype is torch.float64
    torch.testing.assert_close(resolve(model[0].weight.grad), wanted.double(), rtol=1e-4, atol=1e-6)
    backward(model, x.double(), y)
    torch.testing.assert_close(resolve(model[0].weight.grad), 2 * wanted.double(), rtol=1e-4, atol=1e-6)
    ml.step()


def test_factors_that_are_larger_than_the_gradient_do_not_wait():
    model = make()
    dense = copy.deepcopy(model)
    fine(model)
    data = batch(n=300)
    backward(model, *data)
    backward(dense, *data)
    assert type(model[0].weight.grad) is torch.Tensor
    close(model[0].weight.grad, dense[0].weight.grad)


def test_it_may_come_back_as_the_gradient_of_an_output():
    inner, outer = (sb.SparsePattern.from_mask(torch.rand(*s) < 0.3) for s in ((60, 50), (70, 60)))
    x, a, results = torch.randn(40, 60), torch.randn(70, 50), []
    values = torch.randn(inner.nnz)
    for backend in ("native", "reference"):
        v = values.clone().requires_grad_()
        with sb.use_backend(backend):
            weight = sparse_linear(a, inner, v)
            y = sparse_linear(x, outer, outer.gather(weight), None, weight)
        y.relu().sum().backward()
        results.append(v.grad)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_negative_views():
    w = nn.Parameter(torch.zeros(4, 6))
    w.grad = torch._neg_view(torch.ones(4, 6))
    sb.LinBreg([w], lr=1.0).step()
    assert torch.equal(w.detach(), torch.ones(4, 6))


def test_autograd_grad():
    model, data = make(torch.float64), batch(torch.float64)
    dense = copy.deepcopy(model)
    fine(model)
    got, wanted = (torch.autograd.grad(F.cross_entropy(m(data[0]), data[1]), m[0].weight)[0] for m in (model, dense))
    close(got, wanted)


def test_the_extension_refuses_what_does_not_fit():
    g, x = torch.zeros(8, 4), torch.randn(8, 6)
    factors = C.Gradient.of(8, 4, 6, g, x, 0.5, 1)
    assert C.Gradient.of(8, 4, 6, torch.ones(8, 4), x, 0.5, 1) is None
    assert C.Gradient.of(0, 4, 6, g[:0], x[:0], 0.5, 1) is None
    p, v = torch.zeros(24), torch.zeros(24)
    C.linbreg_step(p, factors, v, None, None, 0.1, 0.0, 1.0, 0.1, 0.0, False, None, 1)
    with pytest.raises(ValueError, match="g: expected 23 elements, got 24"):
        C.linbreg_step(p[1:], factors, v[1:], None, None, 0.1, 0.0, 1.0, 0.1, 0.0, False, None, 1)
    with pytest.raises(TypeError, match="g: expected an array or a Gradient, got None"):
        C.linbreg_step(p, None, v, None, None, 0.1, 0.0, 1.0, 0.1, 0.0, False, None, 1)
    with pytest.raises(TypeError, match="g: expected dtype float64, got float32"):
        C.linbreg_step(p.double(), factors, v.double(), None, None, 0.1, 0.0, 1.0, 0.1, 0.0, False, None, 1)
    with pytest.raises(ValueError, match="grad_y: expected 40 elements, got 32"):
        C.Gradient.of(8, 5, 6, g, x, 0.5, 1)
    with pytest.raises(ValueError, match="x: expected 56 elements, got 48"):
        C.Gradient.of(8, 4, 7, g, x, 0.5, 1)
    with pytest.raises(ValueError, match="N: expected at least 0, got -1"):
        C.Gradient.of(-1, 4, 6, g, x, 0.5, 1)
