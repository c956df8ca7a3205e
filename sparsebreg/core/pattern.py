"""The sparsity pattern: which weights of a layer are active while a phase is static."""

from __future__ import annotations

import math
import sys
import weakref
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from sparsebreg.core import memory
from sparsebreg.core.errors import check_real, expected
from sparsebreg.core.extension import native

_INT32_MAX = 2**31 - 1

#: Patterns by where their index lies in memory: operators get a pattern as index tensors and find it here. An entry
#: lives as long as its pattern and thereby that memory, so that a place cannot mean another index.
_by_place: weakref.WeakValueDictionary[Any, SparsePattern] = weakref.WeakValueDictionary()

#: The same of index tensors that are no pattern's own, with these tensors; the latest ones.
_foreign: OrderedDict[Any, tuple[SparsePattern, torch.Tensor, torch.Tensor]] = OrderedDict()
_MOST_FOREIGN = 512


def _place(rowptr: torch.Tensor, col: torch.Tensor, shape: tuple[int, ...]) -> tuple[Any, ...]:
    return rowptr.data_ptr(), col.data_ptr(), len(col), tuple(shape)


def _int32(name: str, t: Any, size: int) -> torch.Tensor:
    if not isinstance(t, torch.Tensor) or t.dtype is not torch.int32 or t.device.type != "cpu":
        raise TypeError(expected(name, "an int32 tensor on the CPU", getattr(t, "dtype", type(t).__name__)))
    if t.shape != (size,):
        raise ValueError(expected(name, f"shape ({size},)", tuple(t.shape)))
    return t.contiguous()


@dataclass(frozen=True, eq=False, repr=False)
class SparsePattern:
    """The places of the active weights of one layer, without their values.

    The dense weight of ``shape`` is seen as a matrix: a row is an output feature or channel, a column an input
    feature or, for a convolution, an (input channel within the group, ky, kx). Weight number k of the ``nnz`` active
    ones, counted row by row, is ``values[k]``.

    Args:
        shape: shape of the dense weight, two dimensions or more.
        rowptr: (rows + 1,) int32, start of each row in ``col``.
        col: (nnz,) int32, columns, strictly ascending inside each row.

    Attributes:
        rows, cols, nnz: sizes of the matrix, and how many weights are active.
        colptr, row, csc_to_csr: the transposed index: column c holds the rows ``row[colptr[c]:colptr[c + 1]]``, and the
            k-th entry in column order is number ``csc_to_csr[k]`` in row order. Made when first asked for; int32.

    Raises:
        TypeError, ValueError: for an index that is not a valid CSR index of that shape.
    """

    shape: tuple[int, ...]
    rowptr: torch.Tensor
    col: torch.Tensor
    rows: int = field(init=False)
    cols: int = field(init=False)
    nnz: int = field(init=False)
    _cache: dict[Any, Any] = field(init=False)

    def __post_init__(self) -> None:
        shape = tuple(int(s) for s in self.shape)
        if len(shape) < 2 or min(shape) < 0:
            raise ValueError(expected("shape", "two or more sizes of at least 0", shape))
        rows, cols = shape[0], math.prod(shape[1:])
        if max(rows, cols) > _INT32_MAX:
            raise ValueError(expected("shape", f"at most {_INT32_MAX} rows and columns", shape))
        put = object.__setattr__
        put(self, "shape", shape)
        put(self, "rowptr", _int32("rowptr", self.rowptr, rows + 1))
        nnz = len(self.col) if isinstance(self.col, torch.Tensor) else 0
        if nnz > _INT32_MAX:
            raise ValueError(expected("col", f"at most {_INT32_MAX} nonzeros", nnz))
        put(self, "col", _int32("col", self.col, nnz))
        ptr, col = self.rowptr.numpy(), self.col.numpy()
        if ptr[0] != 0 or ptr[-1] != len(col) or (ptr[1:] < ptr[:-1]).any():
            raise ValueError(expected("rowptr", f"values that never fall, from 0 to {len(col)}", "others"))
        if len(col) and (col.min() < 0 or col.max() >= cols):
            raise ValueError(expected("col", f"indices from 0 to {cols - 1}", f"{col.min()} to {col.max()}"))
        rising = np.diff(col) > 0
        starts = ptr[1:-1]
        rising[starts[(starts > 0) & (starts < len(col))] - 1] = True  # a new row may start lower
        if not rising.all():
            raise ValueError(expected("col", "strictly ascending indices inside each row", "others"))
        self._settle({})

    def _settle(self, cache: dict[Any, Any]) -> None:
        sizes = {"rows": self.shape[0], "cols": math.prod(self.shape[1:]), "nnz": len(self.col), "_cache": cache}
        for name, value in sizes.items():
            object.__setattr__(self, name, value)
        _by_place[_place(self.rowptr, self.col, self.shape)] = self

    @classmethod
    def from_mask(cls, mask: torch.Tensor) -> SparsePattern:
        """The pattern of a boolean mask of the dense weight's shape (two dimensions or more).

        Raises:
            TypeError: for a mask that is not a boolean tensor.
            ValueError: for fewer than two dimensions, or more than 2**31 - 1 active weights.
        """
        if not isinstance(mask, torch.Tensor) or mask.dtype is not torch.bool:
            raise TypeError(expected("mask", "a boolean tensor", getattr(mask, "dtype", type(mask).__name__)))
        if mask.dim() < 2:
            raise ValueError(expected("mask", "two or more dimensions", mask.dim()))
        return cls._of_nonzeros(mask)

    @classmethod
    def of_index(cls, rowptr: torch.Tensor, col: torch.Tensor, shape: tuple[int, ...]) -> SparsePattern:
        """The pattern with this index, not made anew where there is one over the same memory.

        Raises:
            TypeError, ValueError: as the class, for tensors that are not a pattern's own.
        """
        place = _place(rowptr, col, shape)
        if (pattern := _by_place.get(place)) is not None:
            return pattern
        # Checked anew where somebody wrote to them.
        key = place, *((0, 0) if rowptr.is_inference() else (rowptr._version, col._version))
        if key not in _foreign:
            _foreign[key] = cls(tuple(shape), rowptr.clone(), col.clone()), rowptr, col
            if len(_foreign) > _MOST_FOREIGN:
                _foreign.popitem(last=False)
        return _foreign[key][0]

    @classmethod
    def from_nonzeros(cls, weight: torch.Tensor) -> SparsePattern:
        """The pattern of the nonzero entries of a dense weight (two dimensions or more).

        Raises:
            ValueError: for fewer than two dimensions, or more than 2**31 - 1 nonzeros.
        """
        if weight.dim() < 2:
            raise ValueError(expected("weight", "two or more dimensions", weight.dim()))
        known = weight.dtype in (torch.float32, torch.float64, torch.bool)
        return cls._of_nonzeros(weight if known else weight != 0)

    @classmethod
    def _of_nonzeros(cls, dense: torch.Tensor) -> SparsePattern:
        return cls.of_at_most(dense, sys.maxsize)  # type: ignore[return-value]  # with no bound there is one

    @classmethod
    def of_at_most(cls, dense: torch.Tensor, most: int, beyond: float = 0.0) -> SparsePattern | None:
        """The pattern of the nonzeros of ``dense``: float32, float64 or boolean. None for more of them than ``most``.

        Args:
            beyond: of numbers, only those whose magnitude is larger than this, at least 0.

        Raises:
            ValueError: for more than 2**31 - 1 nonzeros, or a ``beyond`` below 0.
        """
        check_real("beyond", beyond, low=0)
        shape, rows = tuple(dense.shape), dense.shape[0]
        flat = dense.detach().cpu().reshape(rows, math.prod(shape[1:])).contiguous().numpy()
        if (C := native()) is not None:
            index = C.Index.beyond(flat, beyond, most, torch.get_num_threads())
            return None if index is None else cls._adopt(shape, index)
        if beyond and flat.dtype != bool:
            flat = ~(np.abs(flat) <= beyond)  # NaN counts
        counts = np.count_nonzero(flat, axis=1)
        if counts.sum() > min(most, _INT32_MAX):
            if counts.sum() <= most:
                raise ValueError(expected("mask", f"at most {_INT32_MAX} nonzeros", counts.sum()))
            return None
        rowptr = np.zeros(rows + 1, dtype=np.int32)
        np.cumsum(counts, out=rowptr[1:])
        return cls(shape, torch.from_numpy(rowptr), torch.from_numpy(np.nonzero(flat)[1].astype(np.int32)))

    @classmethod
    def _adopt(cls, shape: tuple[int, ...], index: Any) -> SparsePattern:
        """A pattern over an index that the extension made, which is valid by construction."""
        pattern = object.__new__(cls)
        put = object.__setattr__
        for name, array in zip(("rowptr", "col"), index.arrays(), strict=True):
            put(pattern, name, torch.from_numpy(array))
        put(pattern, "shape", shape)
        pattern._settle({"native": index})
        return pattern

    @property
    def density(self) -> float:
        """Active weights as a fraction of all; 0 for an empty shape."""
        return self.nnz / max(1, self.rows * self.cols)

    @property
    def empty_rows(self) -> int:
        """Rows without an active weight: output features or channels that could be left out."""
        return self.cached("empty", self._count_empty)[0]

    @property
    def empty_channels(self) -> int:
        """Input features or channels (within the group) without an active weight."""
        return self.cached("empty", self._count_empty)[1]

    def _count_empty(self) -> tuple[int, int]:
        channels = self.shape[1]
        if self.cols and native() is not None:
            return self.native_index().empty(self.cols // channels, torch.get_num_threads())
        used = np.zeros(self.cols, dtype=bool)
        used[self.col.numpy()] = True
        full = int(used.reshape(channels, -1).any(axis=1).sum()) if self.cols else 0
        return int((self.rowptr.diff() == 0).sum()), channels - full

    def cached(self, key: Any, make: Any) -> Any:
        """A per-pattern cache: ``make()`` is called once per key. Backends keep derived data here."""
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]

    def native_index(self) -> Any:
        """The extension's validated copy of the index."""
        found = self._cache.get("native")  # asked for at every pass of a layer
        return found if found is not None else self.cached("native", self._make_native)

    def _make_native(self) -> Any:
        return native().Index(self.rows, self.cols, self.rowptr.numpy(), self.col.numpy())  # type: ignore[union-attr]

    @property
    def colptr(self) -> torch.Tensor:
        return self.cached("transposed", self._make_transposed)[0]

    @property
    def row(self) -> torch.Tensor:
        return self.cached("transposed", self._make_transposed)[1]

    @property
    def csc_to_csr(self) -> torch.Tensor:
        return self.cached("transposed", self._make_transposed)[2]

    def _make_transposed(self) -> tuple[torch.Tensor, ...]:
        if native() is not None:
            return tuple(torch.from_numpy(a) for a in self.native_index().transposed(torch.get_num_threads()))
        # A stable sort by column keeps the rows of a column ascending.
        col, rows = self.col.numpy(), np.arange(self.rows, dtype=np.int32)
        order = np.argsort(col, kind="stable").astype(np.int32)
        colptr = np.zeros(self.cols + 1, dtype=np.int32)
        np.cumsum(np.bincount(col, minlength=self.cols), out=colptr[1:])
        row = np.repeat(rows, np.diff(self.rowptr.numpy()))[order]
        return tuple(torch.from_numpy(np.ascontiguousarray(a)) for a in (colptr, row, order))

    def flat_index(self) -> torch.Tensor:
        """(nnz,) int64: places of the active weights in the flattened dense weight."""
        return self.cached("flat", self._make_flat)

    def _make_flat(self) -> torch.Tensor:
        counts = self.rowptr.diff().long()
        return torch.repeat_interleave(torch.arange(self.rows), counts) * self.cols + self.col.long()

    def gather(self, dense: torch.Tensor) -> torch.Tensor:
        """(nnz,) values of a dense tensor of the pattern's shape, at the active places. A copy, without autograd."""
        dense = self._fitting(dense)
        if (C := native()) is not None and dense.dtype in (torch.float32, torch.float64):
            values = memory.empty_array((self.nnz,), dense.dtype)
            C.gather(self.native_index(), dense.numpy(), values, torch.get_num_threads())
            return torch.from_numpy(values)
        return dense.reshape(-1)[self.flat_index()]

    def gather_all(self, dense: torch.Tensor) -> torch.Tensor | None:
        """As :meth:`gather`; None where ``dense`` has a nonzero outside of the pattern."""
        dense = self._fitting(dense)
        if (C := native()) is not None and dense.dtype in (torch.float32, torch.float64):
            array = memory.empty_array((self.nnz,), dense.dtype)
            inside = C.gather_all(self.native_index(), dense.numpy(), array, torch.get_num_threads())
            return torch.from_numpy(array) if inside else None
        values = self.gather(dense)
        return values if values.count_nonzero() == dense.count_nonzero() else None

    def _fitting(self, dense: torch.Tensor) -> torch.Tensor:
        if tuple(dense.shape) != self.shape:
            raise ValueError(expected("dense", f"shape {self.shape}", tuple(dense.shape)))
        return dense.detach().contiguous()

    def scatter(self, values: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """The dense tensor that holds ``values`` at the active places.

        Args:
            values: (nnz,) tensor.
            out: contiguous dense tensor of the pattern's shape to write into; its other places keep what they hold.
                Without it a new tensor, zero elsewhere.
        """
        if tuple(values.shape) != (self.nnz,):
            raise ValueError(expected("values", f"shape ({self.nnz},)", tuple(values.shape)))
        values = values.detach().contiguous()
        anew = out is None
        if anew:
            out = memory.empty(self.shape, values.dtype)
        elif tuple(out.shape) != self.shape or not out.is_contiguous() or out.dtype is not values.dtype:
            raise ValueError(
                expected(
                    "out",
                    f"a contiguous {values.dtype} tensor of shape {self.shape}",
                    f"{out.dtype} {tuple(out.shape)}",
                )
            )
        if (C := native()) is not None and values.dtype in (torch.float32, torch.float64):
            C.scatter(self.native_index(), values.numpy(), out.detach().numpy(), anew, torch.get_num_threads())
        else:
            if anew:
                out.zero_()
            out.detach().view(-1)[self.flat_index()] = values
        return out

    def mask(self) -> torch.Tensor:
        """Boolean mask of the dense weight's shape."""
        mask = torch.zeros(self.shape, dtype=torch.bool)
        mask.view(-1)[self.flat_index()] = True
        return mask

    def state_dict(self) -> dict[str, Any]:
        """Plain data from which ``from_state_dict`` makes the same pattern."""
        return {"shape": list(self.shape), "rowptr": self.rowptr, "col": self.col}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> SparsePattern:
        """The pattern that :meth:`state_dict` described. Raises TypeError or ValueError for anything else."""
        if not isinstance(state, dict) or not state.keys() >= {"shape", "rowptr", "col"}:
            got = sorted(state) if isinstance(state, dict) else type(state).__name__
            raise ValueError(expected("state", "a dictionary with shape, rowptr and col", got))
        shape = state["shape"]
        if not isinstance(shape, (list, tuple)) or not all(type(s) is int for s in shape):
            raise TypeError(expected("shape", "a list of integers", repr(shape)))
        return cls(tuple(shape), state["rowptr"], state["col"])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SparsePattern):
            return NotImplemented
        return self.shape == other.shape and torch.equal(self.rowptr, other.rowptr) and torch.equal(self.col, other.col)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"SparsePattern(shape={self.shape}, nnz={self.nnz}, density={self.density:.2%})"

    def __deepcopy__(self, memo: dict[int, Any]) -> SparsePattern:
        return self  # frozen: a copy may share it

    def __reduce__(self) -> tuple[Any, ...]:
        return SparsePattern, (self.shape, self.rowptr, self.col)
