"""How long a pattern stays frozen, and levels inside of it: for :class:`sparsebreg.Multilevel`.

A schedule of its ``coarse_steps`` is called with the number of the cycle, from 0, when its pattern is frozen, and
returns its coarse steps.
"""

import math
from dataclasses import dataclass
from typing import Any

from sparsebreg.core.errors import check_int, check_real, expected


@dataclass(frozen=True)
class LinearCoarse:
    """From ``start`` coarse steps in the first cycle to ``end`` in cycle number ``cycles`` and all later ones.

    Raises:
        TypeError, ValueError: naming the option.
    """

    start: int
    end: int
    cycles: int

    def __post_init__(self) -> None:
        check_int("start", self.start, low=0)
        check_int("end", self.end, low=0)
        check_int("cycles", self.cycles, low=1)

    def __call__(self, cycle: int) -> int:
        return round(self.start + (self.end - self.start) * min(1.0, cycle / max(1, self.cycles - 1)))


@dataclass(frozen=True)
class Level:
    """A level inside the frozen pattern: after every ``every`` steps on the level above, ``steps`` steps on this one.

    It holds the ``keep`` largest weights by magnitude of each layer, as a fraction of those on the level above, chosen
    anew whenever it is entered. The other active weights stand still meanwhile, dual variables and momentum too, but go
    on taking part in output and input gradient: the loss is the same function, restricted to fewer variables, so
    gradients need no correction and every step keeps the descent of the method.

    Source: Lunk, Scott, Bungert, arXiv 2602.03535, for the idea; levels inside the nonzero weights are this package's.

    Args:
        every, steps: at least 1.
        keep: in (0, 1].

    Raises:
        TypeError, ValueError: naming the option.
    """

    every: int
    steps: int
    keep: float = 0.5

    def __post_init__(self) -> None:
        check_int("every", self.every, low=1)
        check_int("steps", self.steps, low=1)
        check_real("keep", self.keep, low=0, strict=True, high=1)


class PlateauCoarse:
    """Thaws once the loss on the frozen pattern stops falling, after ``most`` coarse steps at the latest.

    The losses of a phase are averaged with weights that fall by the factor ``smoothing`` a step into the past. The
    pattern thaws when this average has not been below (1 − ``threshold``) times its least value for ``patience`` steps.
    Hand the loss over: ``ml.step(loss=loss)``, or a closure that returns it.

    Args:
        most: at least 1.
        patience: at least 1.
        threshold: in [0, 1).
        smoothing: in [0, 1); 0: the loss itself.

    Raises:
        TypeError, ValueError: naming the option.
    """

    def __init__(self, most: int = 99, patience: int = 10, threshold: float = 0.01, smoothing: float = 0.9) -> None:
        self.most = check_int("most", most, low=1)
        self.patience = check_int("patience", patience, low=1)
        self.threshold = check_real("threshold", threshold, low=0)
        self.smoothing = check_real("smoothing", smoothing, low=0)
        for name in ("threshold", "smoothing"):
            if getattr(self, name) >= 1:
                raise ValueError(expected(name, "a number below 1", getattr(self, name)))
        self(0)

    def __call__(self, cycle: int) -> int:
        self._sum = self._weight = 0.0
        self._least, self._waited = math.inf, 0
        return self.most

    def stalled(self, loss: float) -> bool:
        """Takes the loss of a coarse step; says whether it has stopped falling."""
        self._sum = self.smoothing * self._sum + (1 - self.smoothing) * loss
        self._weight = self.smoothing * self._weight + (1 - self.smoothing)
        average = self._sum / self._weight
        if average < self._least - self.threshold * abs(self._least if math.isfinite(self._least) else 0.0):
            self._least, self._waited = average, 0
        else:
            self._waited += 1
        return self._waited >= self.patience

    def state_dict(self) -> dict[str, Any]:
        return {"sum": self._sum, "weight": self._weight, "least": self._least, "waited": self._waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sum, self._weight = float(state["sum"]), float(state["weight"])
        self._least, self._waited = float(state["least"]), check_int("waited", state["waited"], low=0)

    def __repr__(self) -> str:
        return f"PlateauCoarse({self.most}, {self.patience}, {self.threshold}, {self.smoothing})"
