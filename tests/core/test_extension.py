"""What the extension refuses: arrays and tensors are checked before memory is touched."""

import numpy as np
import pytest
import torch
from native_arguments import GEOMETRY, LANES, POOL, C, arrays, codes, conv, cx, ix, linear

from sparsebreg import lanes
from sparsebreg.core import extension

norm = (3, LANES * 4)  # a block of images, three channels of four positions

# name: (call with arrays and threads, valid arrays, those written to)
CALLS = {
    "linear_forward": (
        lambda a, t: C.linear_forward(ix, 5, a["x"], 0, a["values"], a["bias"], t),
        arrays(x=(5, 6), values=linear.nnz, bias=4),
        set(),
    ),
    "linear_backward": (
        lambda a, t: C.linear_backward(ix, 5, a["grad_y"], 1, a["x"], 0, a["values"], True, True, True, t),
        arrays(grad_y=(4, LANES), x=(5, 6), values=linear.nnz),
        set(),
    ),
    "weight_grad": (
        lambda a, t: C.weight_grad(C.Gradient.of(5, 4, 6, a["grad_y"], a["x"], 1.0, t), a["grad_weight"], t),
        arrays(grad_y=(5, 4), x=(5, 6), grad_weight=(4, 6)),
        {"grad_weight"},
    ),
    "conv2d_forward": (
        lambda a, t: C.conv2d_forward(cx, 2, GEOMETRY, a["x"], 0, None, a["values"], a["bias"], a["y"], 1, None, t),
        arrays(x=(2, 6, 5, 7), values=conv.nnz, bias=4, y=(4, 5, 7, LANES)),
        {"y"},
    ),
    "conv2d_forward of a norm": (
        lambda a, t: C.conv2d_forward(
            cx,
            2,
            GEOMETRY,
            a["x"],
            1,
            (a["scale"], a["shift"], True),
            a["values"],
            None,
            a["y"],
            1,
            (a["mean"], a["var"]),
            t,
        ),
        arrays(x=(6, 5, 7, LANES), scale=6, shift=6, values=conv.nnz, y=(4, 5, 7, LANES), mean=4, var=4),
        {"y", "mean", "var"},
    ),
    "conv2d_backward": (
        lambda a, t: C.conv2d_backward(
            cx,
            2,
            GEOMETRY,
            a["grad_y"],
            2,
            None,
            a["x"],
            0,
            None,
            None,
            a["values"],
            a["grad_x"],
            a["grad_values"],
            a["grad_bias"],
            t,
        ),
        arrays(
            grad_y=(2, 5, 7, 4), x=(2, 6, 5, 7), values=conv.nnz, grad_x=(2, 6, 5, 7), grad_values=conv.nnz, grad_bias=4
        ),
        {"grad_x", "grad_values", "grad_bias"},
    ),
    "conv2d_weight_grad": (
        lambda a, t: C.conv2d_weight_grad(
            2,
            GEOMETRY,
            a["grad_y"],
            2,
            None,
            a["x"],
            1,
            (a["scale"], a["shift"], True),
            a["grad_weight"],
            a["grad_bias"],
            t,
        ),
        arrays(grad_y=(2, 5, 7, 4), x=(6, 5, 7, LANES), scale=6, shift=6, grad_weight=(4, 6, 3, 3), grad_bias=4),
        {"grad_weight", "grad_bias"},
    ),
    "pack": (
        lambda a, t: C.repack(True, 5, 3, 4, a["src"], a["dst"], t),
        arrays(src=(5, 3, 4), dst=(3, 4, LANES)),
        {"dst"},
    ),
    "unpack": (
        lambda a, t: C.repack(False, 5, 3, 4, a["src"], a["dst"], t),
        arrays(src=(3, 4, LANES), dst=(5, 3, 4)),
        {"dst"},
    ),
    "linbreg_step": (
        lambda a, t: C.linbreg_step(
            a["p"], a["g"], a["v"], a["m"], a["active"], 0.1, 0.9, 1.0, 0.1, 0.0, False, (ix, a["values"]), t
        ),
        {**arrays(p=24, g=24, v=24, m=24, values=linear.nnz), "active": np.ones(24, dtype=bool)},
        {"p", "v", "m", "values"},
    ),
    "l1_shift": (
        lambda a, t: C.l1_shift(a["p"], a["v"], 1.0, 0.1, (ix, a["values"]), t),
        arrays(p=24, v=24, values=linear.nnz),
        {"p", "v", "values"},
    ),
    "proxsgd_step": (
        lambda a, t: C.proxsgd_step(
            a["p"], a["g"], a["m"], a["active"], 0.1, 0.9, 0.1, 0.0, False, (ix, a["values"]), t
        ),
        {**arrays(p=24, g=24, m=24, values=linear.nnz), "active": np.ones(24, dtype=bool)},
        {"p", "m", "values"},
    ),
    "adabreg_step": (
        lambda a, t: C.adabreg_step(
            a["p"],
            a["g"],
            a["v"],
            a["m"],
            a["s"],
            a["active"],
            0.1,
            0.9,
            0.99,
            1e-8,
            0.1,
            0.01,
            1.0,
            0.1,
            0.0,
            False,
            False,
            (ix, a["values"]),
            t,
        ),
        {**arrays(p=24, g=24, v=24, m=24, s=24, values=linear.nnz), "active": np.ones(24, dtype=bool)},
        {"p", "v", "m", "s", "values"},
    ),
    "max_pool_forward": (
        lambda a, t: C.max_pool(2, POOL, a["x"], a["y"], a["codes"], None, None, t),
        {**arrays(x=(2, 8, 6, LANES), y=(2, 4, 3, LANES)), "codes": codes},
        {"y", "codes"},
    ),
    "max_pool_backward": (
        lambda a, t: C.max_pool(2, POOL, None, None, a["codes"], a["grad_y"], a["grad_x"], t),
        {**arrays(grad_y=(2, 4, 3, LANES), grad_x=(2, 8, 6, LANES)), "codes": codes},
        {"grad_x"},
    ),
    "norm_stats": (
        lambda a, t: C.norm_stats(5, 3, 4, a["x"], a["mean"], a["var"], t),
        arrays(x=norm, mean=3, var=3),
        {"mean", "var"},
    ),
    "norm_apply": (
        lambda a, t: C.norm_apply(
            5,
            3,
            4,
            a["x"],
            a["scale"],
            a["shift"],
            a["residual"],
            (a["residual_scale"], a["residual_shift"]),
            True,
            a["y"],
            t,
        ),
        arrays(x=norm, scale=3, shift=3, residual=norm, residual_scale=3, residual_shift=3, y=norm),
        {"y"},
    ),
    "norm_reduce": (
        lambda a, t: C.norm_reduce(
            5, 3, 4, a["x"], a["grad_y"], a["more"], a["result"], a["mean"], a["sum_g"], a["sum_gx"], a["grad"], t
        ),
        arrays(x=norm, grad_y=norm, more=norm, result=norm, mean=3, sum_g=3, sum_gx=3, grad=norm),
        {"sum_g", "sum_gx", "grad"},
    ),
    "norm_grad": (
        lambda a, t: C.norm_grad(
            5,
            3,
            4,
            a["grad_y"],
            (a["x"], (a["relu_scale"], a["relu_shift"]), a["mean"], a["scale"], a["slope"], a["shift"]),
            a["grad_x"],
            t,
        ),
        arrays(x=norm, grad_y=norm, relu_scale=3, relu_shift=3, mean=3, scale=3, slope=3, shift=3, grad_x=norm),
        {"grad_x"},
    ),
    "gather": (
        lambda a, t: C.gather(ix, a["dense"], a["values"], t),
        arrays(dense=(4, 6), values=linear.nnz),
        {"values"},
    ),
    "gather_all": (
        lambda a, t: C.gather_all(ix, a["dense"], a["values"], t),
        arrays(dense=(4, 6), values=linear.nnz),
        {"values"},
    ),
    "scatter": (
        lambda a, t: C.scatter(ix, a["values"], a["dense"], False, t),
        arrays(values=linear.nnz, dense=(4, 6)),
        {"dense"},
    ),
}


def results(made):
    """What a call returned, as arrays."""
    return [
        np.asarray(r) for r in (made if isinstance(made, tuple) else (made,)) if not isinstance(r, (bool, type(None)))
    ]


EACH = [(name, array) for name, (_, valid, _) in CALLS.items() for array in valid]


def test_every_kernel_is_here():
    starts = ("linear_", "weight_", "conv2d_", "norm_", "max_pool")
    kernels = {n for n in dir(C) if n.startswith(starts) or n.endswith("_step")}
    assert kernels <= {*CALLS, "max_pool", "linear_takes"}


def test_where_a_step_gathers():
    p, v, values = (np.zeros(n, np.float32) for n in (23, 23, linear.nnz))
    with pytest.raises(ValueError, match="gather: expected an index of 23 places, got 24"):
        C.l1_shift(p, v, 1.0, 0.1, (ix, values), 1)
    with pytest.raises(TypeError, match="gather: expected an Index and an array, got None"):
        C.l1_shift(p, v, 1.0, 0.1, (None, values), 1)
    assert C.l1_shift(p, v, 1.0, 0.1, None, 1)


@pytest.mark.parametrize("name", CALLS)
def test_threads(name):
    call, valid, _ = CALLS[name]
    call(valid, 1)
    call(valid, 2)
    with pytest.raises(ValueError, match="threads: expected at least 1, got 0"):
        call(valid, 0)


@pytest.mark.parametrize(("name", "array"), EACH)
def test_arrays(name, array):
    call, valid, written = CALLS[name]
    a = valid[array]
    with pytest.raises(TypeError, match=f"({array}|values): expected dtype"):
        call({**valid, array: a.astype(np.int32)}, 1)
    for size in (a.size - 1, a.size + 1, 0):
        # What decides the number of weights says so of the others.
        with pytest.raises(ValueError, match=r"\w+: expected \d+ elements, got \d+"):
            call({**valid, array: np.zeros(size, a.dtype)}, 1)
    with pytest.raises(ValueError, match=f"{array}: expected a C-contiguous array, got a strided one"):
        call({**valid, array: np.repeat(a[..., None], 2, -1)[..., 0]}, 1)
    frozen = a.copy()
    frozen.flags.writeable = False
    if array in written:
        with pytest.raises(ValueError, match=f"{array}: expected a writable array, got a read-only one"):
            call({**valid, array: frozen}, 1)
    else:
        call({**valid, array: frozen}, 1)


@pytest.mark.skipif(not extension.TENSORS, reason="this torch does not hand its tensors to C")
@pytest.mark.parametrize(("name", "array"), EACH)
def test_tensors(name, array):
    call, valid, written = CALLS[name]
    rng = np.random.default_rng(0)
    ours = {n: rng.integers(0, 2, a.shape).astype(a.dtype) for n, a in valid.items()}
    tensors = {n: torch.from_numpy(a.copy()) for n, a in ours.items()}
    for got, wanted in zip(results(call(tensors, 1)), results(call(ours, 1)), strict=True):
        assert np.array_equal(got, wanted, equal_nan=True)
    for n in written:
        assert np.array_equal(tensors[n].numpy(), ours[n], equal_nan=True)
    t = tensors[array]
    with pytest.raises(TypeError, match=f"({array}|values): expected dtype .*, got torch.bfloat16"):
        call({**tensors, array: t.bfloat16()}, 1)
    for wrong in (t.flatten()[1:], t.flatten()[:0]):
        with pytest.raises(ValueError, match=r"\w+: expected \d+ elements, got \d+"):
            call({**tensors, array: wrong}, 1)
    with pytest.raises(ValueError, match=f"{array}: expected a C-contiguous array, got a strided one"):
        call({**tensors, array: t[..., None].repeat_interleave(2, -1)[..., 0]}, 1)
    for elsewhere in (t.to("meta"), t.to_sparse()):
        with pytest.raises((TypeError, RuntimeError)):
            call({**tensors, array: elsewhere}, 1)


def test_count_nonzeros():
    x = np.array([[0, 1, np.nan], [-0.0, 0, 2]])
    assert C.count_nonzeros(x, 2) == C.count_nonzeros(x.astype(np.float32), 1) == 3
    assert C.count_nonzeros(x[:0], 1) == 0
    assert C.count_nonzeros(np.ones(100_003), 2) == 100_003
    with pytest.raises(ValueError, match="x: expected a C-contiguous array, got a strided one"):
        C.count_nonzeros(x.T, 1)
    with pytest.raises(TypeError, match="expected dtype float32 or float64, got int32"):
        C.count_nonzeros(np.ones(3, np.int32), 1)
    with pytest.raises(ValueError, match="threads: expected at least 1, got 0"):
        C.count_nonzeros(x, 0)


@pytest.mark.parametrize("wrong", [3, "x", [1.0], np.zeros((4, 6), ">f4"), np.zeros((4, 6), object)])
def test_no_array(wrong):
    with pytest.raises(TypeError):
        C.gather(ix, wrong, np.zeros(linear.nnz, np.float32), 1)


@pytest.mark.skipif(not extension.TENSORS, reason="this torch does not hand its tensors to C")
def test_what_the_linear_kernel_takes():
    x, values, bias = torch.zeros(3, 6), torch.zeros(linear.nnz), torch.zeros(4)
    parameters = torch.nn.Parameter(values), torch.nn.Parameter(bias)
    for good in (
        (x, values, bias),
        (x, *parameters),
        (x[:0], values, None),
        (x.double(), values.double(), bias.double()),
        (x.requires_grad_() * 1, values, bias),
    ):
        assert C.linear_takes(ix, *good)
    leaked = []
    torch.func.grad(lambda t: leaked.append(t * 1) or t.sum())(x.detach())
    for i, wrong in (
        (0, x.double()),
        (0, x.int()),
        (0, x[:, :5]),
        (0, x[None]),
        (0, torch.zeros(3, 12)[:, ::2]),
        (0, x.to("meta")),
        (0, x.detach().to_sparse()),
        (0, x.detach().numpy()),
        (0, lanes.from_plain(x.detach())),
        (0, leaked[0]),
        (0, None),
        (1, values.double()),
        (1, values.bfloat16()),
        (1, values[1:]),
        (1, values[None]),
        (1, None),
        (2, bias[1:]),
        (2, bias.double()),
        (2, 3.0),
    ):
        arguments = [x, values, bias]
        arguments[i] = wrong
        assert not C.linear_takes(ix, *arguments)


def test_environment(monkeypatch):
    monkeypatch.setenv("SPARSEBREG_TEST", "ö")
    assert C.environment("SPARSEBREG_TEST") == "ö"
    monkeypatch.delenv("SPARSEBREG_TEST")
    assert C.environment("SPARSEBREG_TEST") is None


@pytest.mark.skipif(not extension.TENSORS, reason="this torch does not hand its tensors to C")
def test_tensors_without_memory():
    with pytest.raises(TypeError):
        C.gather(ix, lanes.wrap(torch.zeros(1, 6, LANES), 4), np.zeros(linear.nnz, np.float32), 1)


def test_only_types_whose_tensors_can_be_read_are_accepted():
    assert not C.accept_tensors(int, int)
    with pytest.raises(TypeError, match="type: expected a type"):
        C.accept_tensors(3, int)
    with pytest.raises(TypeError, match="parameter: expected a type"):
        C.accept_tensors(int, 3)


@pytest.mark.parametrize("name", CALLS)
def test_one_dtype_for_all(name):
    call, valid, _ = CALLS[name]
    double = {n: a.astype(np.float64) if a.dtype == np.float32 else a for n, a in valid.items()}
    call(double, 1)
    for array in double.keys() - {"codes", "active"}:
        with pytest.raises(TypeError, match="expected dtype float(32|64), got float(64|32)"):
            call({**double, array: valid[array]}, 1)
