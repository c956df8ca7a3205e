"""Sparsity-inducing convex functions J: value, proximal map and a subgradient. Plain, immutable and picklable.

A regularizer takes a dense weight. :meth:`Regularizer.restrict` makes the one that takes the active weights of a frozen
pattern instead: the same function of the dense weight that is zero elsewhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from sparsebreg.core.errors import check_choice, check_real, expected
from sparsebreg.core.pattern import SparsePattern

__all__ = ["L1", "GroupL2", "L1GroupL2", "L1NonNegative", "NoReg", "NuclearNorm", "Regularizer"]

#: What shares a norm, by name: the dimensions of the dense weight to sum over.
GROUPS = {
    "rows": lambda dims: tuple(range(1, dims)),
    "channels": lambda dims: (0, *range(2, dims)),
    "kernels": lambda dims: tuple(range(2, dims)),
}


@dataclass(frozen=True)
class Regularizer:
    """Base class. ``sparse`` says whether the proximal map can make weights exactly zero."""

    sparse = False

    def value(self, w: torch.Tensor) -> torch.Tensor:
        """J(w), a scalar tensor."""
        raise NotImplementedError

    def prox(self, w: torch.Tensor, step: float) -> torch.Tensor:
        """argmin over z of ``‖z − w‖² / 2 + step · J(z)``; shape of w."""
        raise NotImplementedError

    def subgradient(self, w: torch.Tensor) -> torch.Tensor:
        """One element of ∂J(w); shape of w."""
        raise NotImplementedError

    def with_lam(self, lam: float) -> Regularizer:
        """The same regularizer with another ``lam``; further strengths change in proportion. Raises as the class."""
        if not hasattr(self, "lam"):
            raise TypeError(expected("reg", "a regularizer with a lam", type(self).__name__))
        return replace(self, lam=lam)

    def restrict(self, pattern: SparsePattern) -> Regularizer:
        """The regularizer of the (nnz,) active weights: J of the dense weight that is zero outside of ``pattern``."""
        return self  # a sum over single weights does not see the pattern

    def state_dict(self) -> dict[str, Any]:
        """Plain data, for checkpoints that load with ``weights_only=True``; a restriction is not part of it."""
        options = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "pattern"}
        return {"name": type(self).__name__, **options}


@dataclass(frozen=True)
class NoReg(Regularizer):
    """J = 0."""

    def value(self, w: torch.Tensor) -> torch.Tensor:
        return w.new_zeros(())

    def prox(self, w: torch.Tensor, step: float) -> torch.Tensor:
        return w

    def subgradient(self, w: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(w)


@dataclass(frozen=True)
class L1(Regularizer):
    """J(w) = lam · ‖w‖₁. Its proximal map is soft-thresholding at ``step · lam``.

    Raises:
        TypeError, ValueError: for a ``lam`` that is not a finite number of at least 0.
    """

    lam: float
    sparse = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "lam", check_real("lam", self.lam, low=0))

    def value(self, w: torch.Tensor) -> torch.Tensor:
        return self.lam * w.abs().sum()

    def prox(self, w: torch.Tensor, step: float) -> torch.Tensor:
        return torch.nn.functional.softshrink(w, self.lam * step)

    def subgradient(self, w: torch.Tensor) -> torch.Tensor:
        return self.lam * w.sign()


@dataclass(frozen=True)
class L1NonNegative(L1):
    """J(w) = lam · ‖w‖₁ for w ≥ 0, infinite elsewhere. The proximal map is max(w − step · lam, 0).

    Weights below zero have no subgradient; it is 0 there, so that an optimizer that starts from such weights sets them
    to zero at its first step.

    Raises:
        TypeError, ValueError: for a ``lam`` that is not a finite number of at least 0.
    """

    def value(self, w: torch.Tensor) -> torch.Tensor:
        return torch.where((w < 0).any(), math.inf, super().value(w))

    def prox(self, w: torch.Tensor, step: float) -> torch.Tensor:
        return (w - self.lam * step).clamp(min=0)

    def subgradient(self, w: torch.Tensor) -> torch.Tensor:
        return self.lam * (w > 0).to(w.dtype)


@dataclass(frozen=True)
class GroupL2(Regularizer):
    """J(w) = lam · Σ √n ‖w_g‖₂ over the groups g of n weights each; whole groups become zero.

    With a pattern (see :meth:`restrict`), norms are those of the active weights and n stays the size of the full group.

    Source: Bungert, Roith, Tenbrinck, Burger, JMLR 23 (2022), the group norm ℓ₁,₂.

    Args:
        lam: at least 0.
        over: what a group is: "rows" (output features or channels, ``w[o]``), "channels" (input features or channels,
            ``w[:, i]``; for a grouped convolution i counts within its group) or "kernels" (``w[o, i]``; the single
            weights of a linear layer).

    Raises:
        TypeError, ValueError: naming the option; ValueError for a tensor that has no such groups.
    """

    lam: float
    over: str = "rows"
    pattern: SparsePattern | None = field(default=None, repr=False, kw_only=True)
    sparse = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "lam", check_real("lam", self.lam, low=0))
        check_choice("over", self.over, GROUPS)

    def value(self, w: torch.Tensor) -> torch.Tensor:
        return self.lam * self._root_size(w) * self._norms(w).sum()

    def prox(self, w: torch.Tensor, step: float) -> torch.Tensor:
        return self._shrink(w, self.lam * step)

    def subgradient(self, w: torch.Tensor) -> torch.Tensor:
        return self.lam * self._root_size(w) * self._directions(w)

    def restrict(self, pattern: SparsePattern) -> GroupL2:
        return replace(self, pattern=pattern)

    def _shrink(self, w: torch.Tensor, by: float) -> torch.Tensor:
        """Every group shortened by ``by · √n``, to zero at most."""
        norms, by = self._norms(w), by * self._root_size(w)
        return w * self._spread(torch.where(norms > by, 1 - by / norms, 0))

    def _directions(self, w: torch.Tensor) -> torch.Tensor:
        """w_g / ‖w_g‖, and 0 where that is 0/0."""
        norms = self._norms(w)
        return w / self._spread(torch.where(norms > 0, norms, 1))

    def _dims(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if len(shape) < 2:
            wanted = f"two or more dimensions for groups over {self.over} (see param_groups)"
            raise ValueError(expected("w", wanted, len(shape)))
        return GROUPS[self.over](len(shape))

    def _root_size(self, w: torch.Tensor) -> float:
        """√n, with n counting weights outside of the pattern too."""
        shape = w.shape if self.pattern is None else self.pattern.shape
        return math.sqrt(math.prod(shape[d] for d in self._dims(shape)))

    def _norms(self, w: torch.Tensor) -> torch.Tensor:
        if self.pattern is None:
            dims = self._dims(w.shape)
            return torch.linalg.vector_norm(w, dim=dims, keepdim=True) if dims else w.abs()
        index = self._group_index()
        count = int(index.max()) + 1 if len(index) else 0
        return w.new_zeros(count).index_add_(0, index, w.square()).sqrt_()

    def _spread(self, of_groups: torch.Tensor) -> torch.Tensor:
        """One number per group to one per weight."""
        return of_groups if self.pattern is None else of_groups[self._group_index()]

    def _group_index(self) -> torch.Tensor:
        """(nnz,) int64: the group of each active weight."""
        return self.pattern.cached(("groups", self.over), self._make_group_index)

    def _make_group_index(self) -> torch.Tensor:
        cols, kernel = max(1, self.pattern.cols), max(1, math.prod(self.pattern.shape[2:]))
        flat = self.pattern.flat_index()
        if self.over == "channels":
            return flat % cols // kernel
        # In row order, so equal ones stand together: groups without active weights need no number.
        return torch.unique_consecutive(flat // (cols if self.over == "rows" else kernel), return_inverse=True)[1]


@dataclass(frozen=True)
class L1GroupL2(GroupL2):
    """J(w) = lam · ‖w‖₁ + lam_group · Σ √n ‖w_g‖₂: whole groups become zero, and single weights inside of the others.

    The proximal map is that of the group norm after soft-thresholding (Yu, NeurIPS 2013, Theorem 4). Also known as the
    sparse group lasso; groups, their weights and patterns as in :class:`GroupL2`.

    Args:
        lam: of the ℓ₁ norm, at least 0.
        over: as in :class:`GroupL2`.
        lam_group: of the group norm, at least 0; default: always ``lam``.

    Raises:
        TypeError, ValueError: naming the option.
    """

    lam_group: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lam_group is not None:
            object.__setattr__(self, "lam_group", check_real("lam_group", self.lam_group, low=0))

    def value(self, w: torch.Tensor) -> torch.Tensor:
        return self.lam * w.abs().sum() + self._group_lam * self._root_size(w) * self._norms(w).sum()

    def prox(self, w: torch.Tensor, step: float) -> torch.Tensor:
        return self._shrink(torch.nn.functional.softshrink(w, self.lam * step), self._group_lam * step)

    def subgradient(self, w: torch.Tensor) -> torch.Tensor:
        return self.lam * w.sign() + self._group_lam * self._root_size(w) * self._directions(w)

    def with_lam(self, lam: float) -> L1GroupL2:
        if self.lam_group is None:
            return replace(self, lam=lam)
        if self.lam == 0:
            raise ValueError(expected("reg", "a lam above 0, or no lam_group of its own, to scale", repr(self)))
        return replace(self, lam=lam, lam_group=check_real("lam", lam, low=0) / self.lam * self.lam_group)

    @property
    def _group_lam(self) -> float:
        return self.lam if self.lam_group is None else self.lam_group


@dataclass(frozen=True)
class NuclearNorm(Regularizer):
    """J(w) = lam · Σ singular values of the weight as a matrix (rows, all else). Makes weights of low rank, not zeros.

    The proximal map soft-thresholds the singular values: a full SVD per weight and step. A low rank has no pattern, so
    such weights are not frozen.

    Raises:
        TypeError, ValueError: for a ``lam`` that is not a finite number of at least 0; ValueError for a tensor with
        fewer than two dimensions.
    """

    lam: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "lam", check_real("lam", self.lam, low=0))

    def value(self, w: torch.Tensor) -> torch.Tensor:
        return self.lam * torch.linalg.svdvals(self._matrix(w)).sum()

    def prox(self, w: torch.Tensor, step: float) -> torch.Tensor:
        u, s, vh = torch.linalg.svd(self._matrix(w), full_matrices=False)
        return (u * (s - self.lam * step).clamp(min=0) @ vh).view(w.shape)

    def subgradient(self, w: torch.Tensor) -> torch.Tensor:
        matrix = self._matrix(w)
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        # Rank as in torch.linalg.matrix_rank: what rounding left of a zero has no direction.
        rank = s > max(matrix.shape) * torch.finfo(s.dtype).eps * s.amax() if s.numel() else s > 0
        return (self.lam * (u * rank @ vh)).view(w.shape)

    def _matrix(self, w: torch.Tensor) -> torch.Tensor:
        if w.dim() < 2:
            raise ValueError(expected("w", "two or more dimensions for a nuclear norm (see param_groups)", w.dim()))
        return w.reshape(w.shape[0], math.prod(w.shape[1:]))


_KNOWN: dict[str, type[Regularizer]] = {
    c.__name__: c for c in (NoReg, L1, L1NonNegative, GroupL2, L1GroupL2, NuclearNorm)
}


def from_state_dict(state: dict[str, Any]) -> Regularizer:
    """The regularizer that ``state_dict`` described. Raises ValueError for an unknown name."""
    options = dict(state)
    return _KNOWN[check_choice("reg", options.pop("name"), _KNOWN)](**options)
