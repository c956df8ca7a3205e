"""A benchmark against the results of an older one."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsebreg.core.errors import check_real, expected
from sparsebreg.experiments.bench.cases import FOREIGN
from sparsebreg.experiments.bench.measure import Result, key
from sparsebreg.experiments.bench.tables import as_table, fixed, percent

#: Version of bench.json.
SCHEMA = 1

#: Entries listed that only one of two files has.
LISTED = 20


def load(path: str | Path) -> dict[str, Any]:
    """A bench.json. Raises ValueError naming the option for anything else."""

    def wrong(got: Any) -> ValueError:
        return ValueError(expected("compare", f"a bench.json of this program (schema {SCHEMA})", got))

    try:
        found = json.loads(Path(path).read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise wrong(error) from None
    if not isinstance(found, dict) or not isinstance(found.get("results"), list) or "machine" not in found:
        raise wrong(f"another file: {path}")
    if found.get("schema") != SCHEMA:
        raise wrong(f"schema {found.get('schema')}")
    try:
        for r in found["roofs"]:
            hash(r["threads"])
            for name in ("gemm_gflops", "copy_gbs"):
                check_real(name, r[name], low=0, strict=True)
    except (KeyError, TypeError, ValueError) as error:
        raise wrong(f"roofs with {type(error).__name__}: {error}") from None
    for i, result in enumerate(found["results"]):
        try:
            check_real("ratio", result["ratio"]["median"], low=0, strict=True)
            hash(key(result))
        except (KeyError, TypeError, ValueError) as error:
            raise wrong(f"results[{i}] with {type(error).__name__}: {error}") from None
    return found


@dataclass(frozen=True)
class Comparison:
    """What became of the ratios: keys with (old, new), and keys that only one side has."""

    worse: dict[tuple[Any, ...], tuple[float, float]]
    better: dict[tuple[Any, ...], tuple[float, float]]
    same: int
    missing: list[tuple[Any, ...]]
    additional: list[tuple[Any, ...]]

    def __str__(self) -> str:
        def name(k: tuple[Any, ...]) -> str:
            _, layer, part, batch, threads, density, by = k
            return f"{layer} {part} batch={batch} threads={threads} density={percent(density)} {by}"

        lines = []
        for title, found in (("worse", self.worse), ("better", self.better)):
            if found:
                rows = [
                    (name(k), fixed(a, 2), fixed(b, 2), f"{100 * (b / a - 1):+.0f}%")
                    for k, (a, b) in sorted(found.items(), key=lambda item: item[1][1] / item[1][0])
                ]
                lines += [as_table((title, "before", "now", "change"), rows, 1), ""]
        for title, keys in (("missing now", self.missing), ("not measured before", self.additional)):
            if keys:
                more = [f"  and {len(keys) - LISTED} more"] if len(keys) > LISTED else []
                lines += [f"{title}:", *(f"  {name(k)}" for k in keys[:LISTED]), *more, ""]
        lines.append(
            f"{len(self.worse)} worse, {len(self.better)} better, {self.same} the same within tolerance and noise"
        )
        return "\n".join(lines)


def _own(results: Iterable[Result]) -> dict[tuple[Any, ...], Result]:
    """This package's implementations by key."""
    return {key(r): r for r in results if r["implementation"] not in FOREIGN}


def _notch(result: Result) -> float:
    """Half the 95 % interval of a median ratio (McGill, Tukey, Larsen, The American Statistician 32, 1978)."""
    return 1.57 * (result["ratio"]["q3"] - result["ratio"]["q1"]) / math.sqrt(result["rounds"])


def compare(old: Sequence[Result], new: Sequence[Result], tolerance: float) -> Comparison:
    """Compares ratios to dense, not times: ``worse`` fell by more than ``tolerance`` percent, ``better`` rose so.

    The whole 95 % interval of the new median has to be beyond. Peers do not count. Machines may differ, but ratios of
    another one are a hint only.
    """
    before, now = _own(old), _own(new)
    common = [k for k in now if k in before]
    worse, better = {}, {}
    for k in common:
        a, b = (side[k]["ratio"]["median"] for side in (before, now))
        if b + _notch(now[k]) < a * (1 - tolerance / 100):
            worse[k] = a, b
        elif b - _notch(now[k]) > a * (1 + tolerance / 100):
            better[k] = a, b
    same = len(common) - len(worse) - len(better)
    missing, additional = [k for k in before if k not in now], [k for k in now if k not in before]
    return Comparison(worse, better, same, missing, additional)
