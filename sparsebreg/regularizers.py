"""Sparsity-inducing convex functions J: value, proximal map and a subgradient. Plain, immutable and picklable."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from sparsebreg.errors import check_choice, check_real, expected

__all__ = ["L1", "NoReg", "Regularizer"]


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
        raise TypeError(expected("reg", "a regularizer with a lam", type(self).__name__))

    def state_dict(self) -> dict[str, Any]:
        """Plain data, for checkpoints that load with ``weights_only=True``."""
        return {"name": type(self).__name__, **asdict(self)}


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

    def with_lam(self, lam: float) -> L1:
        return replace(self, lam=lam)


_KNOWN: dict[str, type[Regularizer]] = {c.__name__: c for c in (NoReg, L1)}


def from_state_dict(state: dict[str, Any]) -> Regularizer:
    """The regularizer that ``state_dict`` described. Raises ValueError for an unknown name."""
    fields = dict(state)
    return _KNOWN[check_choice("reg", fields.pop("name"), _KNOWN)](**fields)
