"""The pool of large blocks."""

import gc
import os
import subprocess
import sys

import pytest
import torch

import sparsebreg as sb
from sparsebreg.core import extension, memory

pooled = pytest.mark.skipif(extension.native() is None, reason="the pool belongs to the extension")


@pytest.fixture(autouse=True)
def _empty_pool():
    gc.collect()
    sb.memory.release()
    yield
    sb.memory.set_limit(2 << 30)


@pytest.mark.parametrize("shape", [(3,), (700, 900), (4, 8, 64, 512), (2, 3, 4, 5), (0, 5), (512, 1, 64, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_like_torch_empty(shape, dtype, memory_format):
    if memory_format is torch.channels_last and len(shape) != 4:
        memory_format = torch.contiguous_format
    ours = memory.empty(shape, dtype, memory_format)
    theirs = torch.empty(shape, dtype=dtype, memory_format=memory_format)
    assert (ours.shape, ours.dtype, ours.stride()) == (theirs.shape, theirs.dtype, theirs.stride())
    ours.fill_(3.0)
    assert (ours == 3).all()


@pooled
def test_block_comes_back_when_the_last_tensor_dies():
    a = memory.empty((1 << 20,), torch.float32)
    place = a.data_ptr()
    assert place % (2 << 20) == 0
    part = a[5:]
    del a
    assert sb.memory.held() == 0
    del part
    assert sb.memory.held() == 4 << 20
    b = memory.empty((1 << 20,), torch.float32)
    assert b.data_ptr() == place
    assert sb.memory.held() == 0
    del b
    assert sb.memory.release() == 4 << 20
    assert sb.memory.held() == 0


@pooled
def test_of_equal_blocks_the_last_comes_back_first():
    """It is still in the caches, perhaps."""
    tensors = [memory.empty((1 << 19,), torch.float32) for _ in range(3)]
    places = [t.data_ptr() for t in tensors]
    for _ in places:
        del tensors[0]
    tensors = [memory.empty((1 << 19,), torch.float32) for _ in range(3)]
    assert [t.data_ptr() for t in tensors] == places[::-1]


@pooled
def test_two_living_tensors_never_share():
    a, b = (memory.empty((1 << 19,), torch.float32).fill_(i) for i in (1.0, 2.0))
    assert a.data_ptr() != b.data_ptr()
    assert (a == 1).all()


@pooled
def test_limit_and_off_switch():
    sb.memory.set_limit(3 << 20)
    a, b = (memory.empty((1 << 19,), torch.float32) for _ in range(2))
    del a, b
    assert sb.memory.held() == 2 << 20
    sb.memory.set_limit(0)
    assert sb.memory.held() == 0
    a = memory.empty((1 << 19,), torch.float32)
    del a
    assert sb.memory.held() == 0
    with pytest.raises(ValueError, match="size: expected an integer of at least 0, got -1"):
        sb.memory.set_limit(-1)


@pooled
@pytest.mark.parametrize(("value", "text"), [("0", "0"), ("8", "4194304"), ("much", "SPARSEBREG_POOL_MB: expected")])
def test_environment(value, text):
    code = (
        "import torch, sparsebreg as sb\nt = sb.memory.empty((1 << 20,), torch.float32); del t; print(sb.memory.held())"
    )
    env = {**os.environ, "SPARSEBREG_POOL_MB": value}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert text in done.stdout + done.stderr


def test_results_can_be_changed_in_place():
    """An activation with inplace=True after a large sparse layer, as most models have it."""
    mask = torch.rand(64, 8, 3, 3) < 0.1
    layer = torch.nn.Conv2d(8, 64, 3, padding=1)
    layer.weight.data *= mask
    sparse = sb.nn.SparseConv2d.from_dense(layer)
    x = torch.randn(16, 8, 32, 32)
    outputs = []
    for m in (sparse, layer):
        y = torch.nn.functional.relu(m(x), inplace=True)
        y.sum().backward()
        outputs.append(y)
    assert torch.allclose(*outputs, atol=1e-5)
    assert torch.allclose(sparse.values.grad, layer.weight.grad[mask], rtol=1e-3, atol=1e-2)


@pooled
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the address space as Linux counts it")
@pytest.mark.parametrize("wanted", ["forward", "x", "values"])
def test_running_out_of_memory_is_an_error(wanted):
    """Kernels take their working memory, 30 MB a thread here, where an exception can be raised."""
    code = """
import resource, sys, torch
import sparsebreg as sb
from sparsebreg.core import extension

torch.set_num_threads(2)
wanted = sys.argv[1]
weight = torch.zeros(8, 512, 3, 3)
weight[:, ::7, 1, 1] = 1.0
pattern = sb.SparsePattern.from_nonzeros(weight)
values = pattern.gather(weight).requires_grad_(wanted != "x")
x = torch.randn(1, 512, 8, 256).requires_grad_(wanted != "values")

def run():
    y = sb.nn.functional.sparse_conv2d(x, pattern, values, None, sb.nn.functional.Geometry(padding=(1, 1)))
    if wanted == "forward":
        limit()
        return sb.nn.functional.sparse_conv2d(x, pattern, values, None, sb.nn.functional.Geometry(padding=(1, 1)))
    limit()
    y.sum().backward()

def limit():
    if limited:
        extension.native().release_scratch()
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (24 << 20), before[1]))

before, limited = resource.getrlimit(resource.RLIMIT_AS), False
run()  # threads are made
limited = True
try:
    run()
except MemoryError:
    print("refused")
resource.setrlimit(resource.RLIMIT_AS, before)
limited = False
x.grad = values.grad = None
y = run()
if wanted == "forward":
    assert torch.allclose(y, torch.nn.functional.conv2d(x, weight, padding=1), atol=1e-4)
elif wanted == "x":
    assert torch.equal(x.grad, weight[:, :, 1, 1].sum(0)[None, :, None, None].expand_as(x))
else:
    wide = x.sum((0, 2, 3))[pattern.col.long() // 9]
    assert torch.allclose(values.grad, wide, atol=1e-2)
print("and right afterwards")
"""
    env = {**os.environ, "SPARSEBREG_BACKEND": "native"}
    done = subprocess.run([sys.executable, "-c", code, wanted], env=env, capture_output=True, text=True, check=False)
    assert done.stdout == "refused\nand right afterwards\n", done.stdout + done.stderr
