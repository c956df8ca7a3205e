"""What to measure: the options of a benchmark, and the cases that they mean."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sparsebreg.core.errors import check_choice, check_int, check_real, expected
from sparsebreg.experiments.bench.cases import PARTS, Case
from sparsebreg.experiments.bench.shapes import REPRESENTATIVE, SUITES

#: The grid of --full, and the small one.
FULL = {"densities": (0.5, 0.2, 0.1, 0.05, 0.02, 0.01), "batches": (1, 32, 128, 512), "parts": PARTS}
SMALL = {"densities": (0.1, 0.05, 0.01), "batches": (128,), "parts": ("forward", "step")}

#: The grid of --full, and the small one.
FULL = {"densities": (0.5, 0.2, 0.1, 0.05, 0.02, 0.01), "batches": (1, 32, 128, 512), "parts": PARTS}
SMALL = {"densities": (0.1, 0.05, 0.01), "batches": (128,), "parts": ("forward", "step")}


@dataclass(frozen=True)
class Options:
    """What to measure. Lists that are not given are those of the small grid, or of the full one.

    Args:
        out: folder of bench.json, bench.md, speedup.png and roofline.png.
        suite: linear, conv, norm, network or all.
        layers, densities, batches, threads, parts: names (see ``shapes`` and ``cases``), and numbers.
        full: all of them.
        budget: seconds for each case, whose ways take turns; at least five rounds.
        repeats: runs of the whole grid, of which the median ratio counts.
        compare: a bench.json of before.
        tolerance: percent by which a ratio may fall.

    Raises:
        TypeError, ValueError: naming the option.
    """

    out: str
    suite: str = "all"
    layers: Sequence[str] | None = None
    densities: Sequence[float] | None = None
    batches: Sequence[int] | None = None
    threads: Sequence[int] | None = None
    parts: Sequence[str] | None = None
    full: bool = False
    budget: float = 2.0
    repeats: int = 1
    compare: str | None = None
    tolerance: float = 10.0

    def __post_init__(self) -> None:
        check_choice("suite", self.suite, (*SUITES, "all"))
        for name in ("layers", "densities", "batches", "threads", "parts"):
            if getattr(self, name) is not None and not len(getattr(self, name)):
                raise ValueError(expected(name, "at least one", "none"))
        for name in self.layers or ():
            check_choice("layers", name, [n for s in self.suites() for n in SUITES[s]])
        for density in self.densities or ():
            check_real("densities", density, low=0, strict=True, high=1)
        for name in ("batches", "threads"):
            for n in getattr(self, name) or ():
                check_int(name, n, low=1)
        for part in self.parts or ():
            check_choice("parts", part, PARTS)
        check_real("budget", self.budget, low=0, strict=True)
        check_int("repeats", self.repeats, low=1)
        check_real("tolerance", self.tolerance, low=0, high=100)

    def suites(self) -> list[str]:
        return list(SUITES) if self.suite == "all" else [self.suite]

    def grid(self, name: str) -> Sequence[Any]:
        """The values of a list: those given, or those of the small or the full grid."""
        return getattr(self, name) or (FULL if self.full else SMALL)[name]

    def cases(self) -> list[Case]:
        """What is measured, in order; of norms and networks, whole steps. Raises ValueError where that is nothing."""
        out = []
        for suite in self.suites():
            known = {"linear": [p for p in PARTS if p != "grad_weight"], "conv": PARTS}.get(suite, ["step"])
            parts = [p for p in self.grid("parts") if p in known]
            for layer in SUITES[suite]:
                if layer in (self.layers or (SUITES[suite] if self.full else REPRESENTATIVE)):
                    out += [Case(suite, layer, part, batch) for batch in self.grid("batches") for part in parts]
        if not out:
            wanted = "step for norms and networks, no grad_weight for linear layers"
            raise ValueError(expected("parts", wanted, ", ".join(self.grid("parts"))))
        return out

    def thread_counts(self) -> list[int]:
        if self.threads:
            return list(self.threads)
        n = torch.get_num_threads()
        return sorted({2**k for k in range(n.bit_length())} | {n}) if self.full else [n]
