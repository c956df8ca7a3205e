"""Benchmarks run on all processors that torch takes, in float32, batch 128, forward and backward together."""

import pytest
import torch

import sparsebreg as sb

BATCH = 128


@pytest.fixture(params=[0.1, 0.05, 0.01], ids=lambda d: f"density={d:g}")
def density(request):
    return request.param


@pytest.fixture
def run(benchmark):
    """Times forward + backward of a layer; checks the sparse result against the dense one first."""

    def go(dense, x, implementation, density):
        torch.manual_seed(0)
        with torch.no_grad():
            dense.weight.mul_(torch.rand_like(dense.weight) < density)
        if implementation == "channels_last":
            layer, x = dense.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
        elif implementation == "sparse":
            cls = sb.nn.SparseLinear if isinstance(dense, torch.nn.Linear) else sb.nn.SparseConv2d
            layer = cls.from_dense(dense)
            assert torch.allclose(layer(x), dense(x), atol=1e-4)
        else:
            layer = dense
        x.requires_grad_()
        grad = torch.randn_like(layer(x))

        def step():
            x.grad = None
            layer.zero_grad()
            layer(x).backward(grad)

        benchmark.extra_info["backend"] = sb.info().backend
        benchmark.pedantic(step, rounds=11, warmup_rounds=2)

    return go
