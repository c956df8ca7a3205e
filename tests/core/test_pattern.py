"""SparsePattern: construction, validation, the crossings between dense and sparse."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsebreg as sb
from sparsebreg import SparsePattern
from sparsebreg.core import extension, pattern

MASKS = {
    "some": torch.tensor([[1, 0, 1], [0, 1, 0]], dtype=torch.bool),
    "empty_rows_in_middle": torch.tensor([[1, 1], [0, 0], [0, 0], [0, 1]], dtype=torch.bool),
    "all_rows_empty": torch.zeros(3, 4, dtype=torch.bool),
    "full": torch.ones(3, 4, dtype=torch.bool),
    "one_long_row": torch.cat([torch.ones(1, 1000), torch.zeros(5, 1000)]).bool(),
    "one_column": torch.ones(7, 1, dtype=torch.bool),
    "first_and_last_row_empty": torch.tensor([[0, 0], [1, 0], [0, 0]], dtype=torch.bool),
    "no_rows": torch.zeros(0, 4, dtype=torch.bool),
    "no_columns": torch.zeros(4, 0, dtype=torch.bool),
    "conv": torch.rand(4, 3, 3, 2, generator=torch.Generator().manual_seed(1)) < 0.4,
    "word_boundaries": torch.rand(5, 67, generator=torch.Generator().manual_seed(2)) < 0.1,
}


@pytest.fixture(params=["native", "numpy"])
def builder(request, monkeypatch):
    """The extension builds patterns where it is there; the NumPy code must build the same ones."""
    if request.param == "numpy":
        monkeypatch.setattr(pattern, "native", lambda: None)


@pytest.mark.parametrize("name", MASKS)
def test_index_is_scipys(name, builder):
    mask = MASKS[name]
    p = SparsePattern.from_mask(mask)
    flat = mask.reshape(mask.shape[0], -1).numpy() if mask.numel() else np.zeros((mask.shape[0], p.cols), bool)
    csr = scipy.sparse.csr_matrix(flat)
    csc = scipy.sparse.csc_matrix(flat)
    assert p.shape == tuple(mask.shape)
    assert p.nnz == int(mask.sum())
    assert np.array_equal(p.rowptr, csr.indptr)
    assert np.array_equal(p.col, csr.indices)
    assert np.array_equal(p.colptr, csc.indptr)
    assert np.array_equal(p.row, csc.indices)
    assert np.array_equal(p.col[p.csc_to_csr.long()], np.repeat(np.arange(p.cols), np.diff(csc.indptr)))
    assert torch.equal(p.mask(), mask)


@pytest.mark.skipif(extension.native() is None, reason="needs the extension")
def test_transpose_is_made_once_and_only_when_asked_for():
    model = torch.nn.Sequential(torch.nn.Conv2d(16, 16, 3), torch.nn.Flatten(), torch.nn.Linear(16, 40))
    for m in (model[0], model[2]):
        m.weight.data *= torch.rand_like(m.weight) < 0.1
    report = sb.sparsify_(model, sb.SparsifyConfig(decide="always"))
    assert len(report.sparse) == 2
    model(torch.randn(16, 16, 3, 3)).sum().backward()
    assert not any("transposed" in m.pattern._cache for m in (model[0], model[2]))
    mask = torch.rand(300, 400, generator=torch.Generator().manual_seed(3)) < 0.5
    index, known = SparsePattern.from_mask(mask).native_index(), SparsePattern.from_mask(mask)
    with ThreadPoolExecutor(8) as pool:
        for made in pool.map(lambda _: index.transposed(2), range(8)):
            for ours, theirs in zip(made, (known.colptr, known.row, known.csc_to_csr), strict=True):
                assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.bool])
def test_gather_scatter(name, dtype, builder):
    mask = MASKS[name]
    p = SparsePattern.from_mask(mask)
    dense = torch.arange(1, mask.numel() + 1).reshape(mask.shape).to(dtype)
    values = p.gather(dense)
    assert torch.equal(values, dense[mask])
    assert torch.equal(p.scatter(values), dense * mask)
    out = torch.full(mask.shape, 7).to(dtype)
    assert p.scatter(values, out) is out
    assert torch.equal(out, torch.where(mask, dense, torch.full_like(dense, 7)))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.floats(0, 1), st.integers(0, 10**6))
def test_round_trip(rows, cols, density, seed):
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, cols, generator=g) < density
    p = SparsePattern.from_mask(mask)
    assert torch.equal(p.mask(), mask)
    dense = torch.randn(rows, cols, generator=g)
    assert torch.equal(p.scatter(p.gather(dense)), dense * mask)
    assert SparsePattern.from_state_dict(p.state_dict()) == p


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.bfloat16])
def test_from_nonzeros(name, dtype, builder):
    mask = MASKS[name]
    weight = (torch.rand(mask.shape) + 1).mul(mask).to(dtype)
    assert SparsePattern.from_nonzeros(weight) == SparsePattern.from_mask(mask)


@pytest.mark.parametrize("name", MASKS)
def test_of_at_most(name, builder):
    mask = MASKS[name]
    count = int(mask.sum())
    assert SparsePattern.of_at_most(mask.float(), count) == SparsePattern.from_mask(mask)
    if count:
        assert SparsePattern.of_at_most(mask.float(), count - 1) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_of_at_most_beyond(dtype, builder):
    dense = torch.rand(9, 70, dtype=dtype) - 0.5
    dense[0, :4] = torch.tensor([0.25, -0.25, float("nan"), 0.26])
    wanted = ~(dense.abs() <= 0.25)
    assert wanted[0, :4].tolist() == [False, False, True, True]
    count = int(wanted.sum())
    assert SparsePattern.of_at_most(dense, count, 0.25) == SparsePattern.from_mask(wanted)
    assert SparsePattern.of_at_most(dense, count - 1, 0.25) is None
    strided = dense.t().contiguous().t()
    assert SparsePattern.of_at_most(strided, count, 0.25) == SparsePattern.from_mask(wanted)
    assert torch.equal(SparsePattern.from_nonzeros(dense).gather_all(strided).nan_to_num(), dense.view(-1).nan_to_num())
    assert SparsePattern.of_at_most(wanted, count, 2.0) == SparsePattern.from_mask(wanted)  # a mask has no magnitudes
    with pytest.raises(ValueError, match="beyond: expected"):
        SparsePattern.of_at_most(dense, count, -1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("name", MASKS)
def test_gather_all(name, dtype, builder):
    mask = MASKS[name]
    pattern = SparsePattern.from_mask(mask)
    weight = torch.rand(mask.shape).add(1).mul(mask).to(dtype)
    assert torch.equal(pattern.gather_all(weight), weight[mask])
    for place in mask.nonzero()[:1]:
        weight[tuple(place)] = 0  # a zero more is inside of it
        assert torch.equal(pattern.gather_all(weight), weight[mask])
    for place in mask.logical_not().nonzero()[-1:]:
        for one in (1e-7, float("nan")):
            weight[tuple(place)] = one
            assert pattern.gather_all(weight) is None


@pytest.mark.parametrize("gather", [SparsePattern.gather, SparsePattern.gather_all])
def test_gather_of_another_shape(gather, builder):
    with pytest.raises(ValueError, match=r"dense: expected shape \(2, 3\), got \(3, 4\)"):
        gather(SparsePattern.from_mask(MASKS["some"]), torch.ones(3, 4))


def test_nan_is_a_nonzero():
    weight = torch.zeros(2, 3)
    weight[1, 1] = float("nan")
    assert SparsePattern.from_nonzeros(weight).col.tolist() == [1]


def test_active_zero_stays():
    p = SparsePattern.from_mask(MASKS["some"])
    values = torch.zeros(p.nnz)
    assert p.gather(p.scatter(values)).shape == (3,)
    assert p.nnz == 3


def test_noncontiguous_dense_and_channels_last():
    mask = MASKS["conv"]
    p = SparsePattern.from_mask(mask)
    dense = torch.randn(mask.shape).contiguous(memory_format=torch.channels_last)
    assert torch.equal(p.gather(dense), dense[mask])
    strided = torch.randn(4, 3, 3, 4)[..., ::2]
    assert torch.equal(p.gather(strided), strided[mask])


def test_copies():
    p = SparsePattern.from_mask(MASKS["conv"])
    assert copy.deepcopy(p) is p
    assert pickle.loads(pickle.dumps(p)) == p
    assert p != SparsePattern.from_mask(~MASKS["conv"])


def test_frozen():
    p = SparsePattern.from_mask(MASKS["some"])
    with pytest.raises(AttributeError):
        p.col = p.row


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("shape", "rowptr", "col", "error", "message"),
    [
        ((2, 3), int32(0, 1), int32(0), ValueError, r"rowptr: expected shape \(3,\), got \(2,\)"),
        ((2, 3), int32(0, 1, 1).long(), int32(0), TypeError, "rowptr: expected an int32 tensor"),
        ((2, 3), int32(0, 2, 1), int32(0), ValueError, "rowptr: expected values that never fall"),
        ((2, 3), int32(0, 1, 2), int32(0), ValueError, "rowptr: expected values"),
        ((2, 3), int32(0, 1, 1), int32(3), ValueError, "col: expected indices from 0 to 2, got 3 to 3"),
        ((2, 3), int32(0, 1, 1), int32(-1), ValueError, "col: expected indices"),
        ((2, 3), int32(0, 2, 2), int32(1, 0), ValueError, "col: expected strictly ascending"),
        ((2, 3), int32(0, 2, 2), int32(1, 1), ValueError, "col: expected strictly ascending"),
        ((3,), int32(0), int32(), ValueError, "shape: expected two or more sizes"),
        ((2, 2**31), int32(0, 0, 0), int32(), ValueError, "shape: expected at most 2147483647"),
    ],
)
def test_invalid_index(shape, rowptr, col, error, message):
    with pytest.raises(error, match=message):
        SparsePattern(shape, rowptr, col)


def test_more_nonzeros_than_int32(monkeypatch):
    """Refused before anything of that size is made."""
    many = torch.zeros(1, dtype=torch.int32).expand(2**31)
    with pytest.raises(ValueError, match="col: expected at most 2147483647 nonzeros, got 2147483648"):
        SparsePattern((1, 2**31 - 1), int32(0, 1), many)
    monkeypatch.setattr(pattern, "native", lambda: None)
    monkeypatch.setattr(np, "count_nonzero", lambda *_, **__: np.array([2**31 - 1, 1]))
    with pytest.raises(ValueError, match="mask: expected at most 2147483647 nonzeros, got 2147483648"):
        SparsePattern.from_mask(MASKS["some"])


def test_invalid_mask_and_values():
    with pytest.raises(TypeError, match="mask: expected a boolean tensor, got torch.float32"):
        SparsePattern.from_mask(torch.ones(2, 2))
    with pytest.raises(ValueError, match="mask: expected two or more dimensions, got 1"):
        SparsePattern.from_mask(torch.ones(2, dtype=torch.bool))
    p = SparsePattern.from_mask(MASKS["some"])
    with pytest.raises(ValueError, match=r"values: expected shape \(3,\), got \(2,\)"):
        p.scatter(torch.zeros(2))
    with pytest.raises(ValueError, match=r"dense: expected shape \(2, 3\), got \(3, 2\)"):
        p.gather(torch.zeros(3, 2))
    with pytest.raises(ValueError, match="out: expected a contiguous"):
        p.scatter(torch.zeros(3), torch.zeros(2, 3, dtype=torch.float64))


@pytest.mark.skipif(extension.native() is None, reason="needs the extension")
class TestNativeChecks:
    """The extension checks for itself: it is the last line before memory is touched."""

    def arrays(self, **changes):
        p = SparsePattern.from_mask(MASKS["some"])
        arrays = {n: getattr(p, n).numpy().copy() for n in ("rowptr", "col")}
        arrays.update(changes)
        return list(arrays.values())

    def test_accepts(self):
        extension.native().Index(2, 3, *self.arrays())

    @pytest.mark.parametrize(
        ("name", "value"),
        [("rowptr", [0, 3, 2]), ("rowptr", [1, 2, 3]), ("col", [0, 3, 1]), ("col", [-1, 2, 1]), ("col", [2, 0, 1])],
    )
    def test_refuses_index(self, name, value):
        with pytest.raises(ValueError, match="expected"):
            extension.native().Index(2, 3, *self.arrays(**{name: np.array(value, dtype=np.int32)}))


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("shape", [(40, 200), (7, 65), (5, 30, 3, 3), (3, 70, 1, 1)])
def test_what_is_empty(shape, native, monkeypatch):
    if not native:
        monkeypatch.setattr("sparsebreg.core.pattern.native", lambda: None)
    mask = torch.rand(shape) < 0.03
    mask[1], mask[:, -1] = False, False
    pattern = sb.SparsePattern.from_mask(mask)
    assert pattern.empty_rows == int((~mask.flatten(1).any(1)).sum()) > 0
    assert pattern.empty_channels == int((~mask.transpose(0, 1).flatten(1).any(1)).sum()) > 0


def test_differences_that_wrap_around_are_no_valid_index():
    rowptr = torch.tensor([0, 2**31 - 1, -(2**31), -1, 2], dtype=torch.int32)
    with pytest.raises(ValueError, match="rowptr: expected values that never fall"):
        SparsePattern((4, 4), rowptr, torch.tensor([0, 1], dtype=torch.int32))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"shape": None}, TypeError, "shape: expected a list of integers, got None"),
        ({"shape": [2.5, 3]}, TypeError, "shape: expected a list of integers"),
        ({"col": [0]}, TypeError, "col: expected an int32 tensor"),
    ],
)
def test_states_that_are_none(change, error, message):
    state = SparsePattern.from_mask(MASKS["some"]).state_dict()
    with pytest.raises(error, match=message):
        SparsePattern.from_state_dict({**state, **change})
    with pytest.raises(ValueError, match=r"a dictionary with shape, rowptr and col, got \['rowptr', 'shape'\]"):
        SparsePattern.from_state_dict({k: v for k, v in state.items() if k != "col"})
