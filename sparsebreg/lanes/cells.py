"""The storage of lane tensors: computed already, or when it is first wanted."""

from __future__ import annotations

import weakref
from collections import Counter

import torch

from sparsebreg.lanes.layout import pack, unpack


class Cell:
    """The storage that a lane tensor shares with its aliases.

    ``packed`` holds the data and ``plain`` at most a copy, until something takes a view with plain strides or writes in
    place through an unknown operation: from then on ``plain`` is the data (``exposed``). ``moments`` are mean and
    biased variance of the channels, where whoever computed the data took them along; ``sums`` those that a batch norm
    takes of the gradient of its result, and which result that is. ``unpacked`` counts, for the model that the tensor
    comes from, the operations that had to unpack one of its tensors, by name; None outside of a swapped model.
    """

    __slots__ = ("__weakref__", "exposed", "moments", "n", "packed", "plain", "readers", "sums", "unpacked")

    def __init__(self, packed: torch.Tensor | None, n: int, unpacked: Counter[str] | None = None) -> None:
        self.packed: torch.Tensor | None = packed
        self.moments: tuple[torch.Tensor, torch.Tensor] | None = None
        self.sums: tuple[Cell, torch.Tensor, torch.Tensor] | None = None
        self.plain: torch.Tensor | None = None
        self.exposed = False
        self.n, self.unpacked = n, unpacked
        self.readers: weakref.WeakSet[Cell] | None = None

    def get_packed(self) -> torch.Tensor:
        if self.packed is None:  # exposed: others may write to plain at any time, so nothing is kept
            return pack(self.plain)
        return self.packed

    def get_plain(self) -> torch.Tensor:
        if self.plain is None:
            self.plain = unpack(self.packed, self.n)
        return self.plain

    def expose(self) -> torch.Tensor:
        plain = self.get_plain()
        self._settle()
        self.packed, self.exposed = None, True
        return plain

    def get_writable(self) -> torch.Tensor:
        """The packed storage for writing; drops everything derived from it."""
        packed = self.get_packed()
        self._settle()
        self.plain = None
        return packed

    def _settle(self) -> None:
        """Lets pending readers compute their results before the storage is written to."""
        self.moments = self.sums = None
        for reader in list(self.readers or ()):
            reader.settle()
        self.readers = None


class Deferred(Cell):
    """Storage that is computed when it is first wanted: what follows may take the work over and do more in one pass.

    ``sources`` are the cells it is computed from; they have it computed before they are written to.
    """

    __slots__ = ("sources",)

    def __init__(self, *sources: Cell) -> None:
        super().__init__(None, sources[0].n, sources[0].unpacked)
        self.sources = sources
        for cell in sources:
            if cell.readers is None:
                cell.readers = weakref.WeakSet()
            cell.readers.add(self)

    def waiting(self) -> bool:
        return self.packed is None and not self.exposed

    def compute(self, sources: tuple[Cell, ...]) -> torch.Tensor:
        raise NotImplementedError

    def get_packed(self) -> torch.Tensor:
        sources = self.sources  # read first: another thread may be done at any time
        if self.waiting():
            self.finish(self.compute(sources))
        return super().get_packed()

    def finish(self, packed: torch.Tensor) -> None:
        """Sets the result, which another operation may have computed on its way."""
        self.packed, self.sources = packed, ()

    def settle(self) -> None:
        self.get_packed()

    def get_plain(self) -> torch.Tensor:
        if self.waiting():
            self.get_packed()
        return super().get_plain()
