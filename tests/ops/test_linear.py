"""The sparse linear product: output and gradients on every backend and instruction set against plain torch."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import close, compare_products, sparse_weight
from torch.autograd import gradcheck
from torch.nn import functional as F

import sparsebreg as sb
from sparsebreg.ops import sparse_linear

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


@pytest.mark.parametrize("name", LINEAR)
def test_linear(name, engine, dtype, threads):
    n, i, o, density = LINEAR[name]
    weight, mask = sparse_weight((o, i), density, dtype)
    compare_products(torch.randn(n, i, dtype=dtype), weight, mask, torch.randn(o, dtype=dtype), F.linear, sparse_linear)


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


class TestBadInput:
    pattern = sb.SparsePattern.from_mask(torch.ones(6, 4, dtype=torch.bool))
    values = torch.ones(24)

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
