"""Measurements: every way to do what a case says, in turns, and what follows from their times."""

import math
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

import sparsebreg as sb
from sparsebreg.core.errors import RunError
from sparsebreg.experiments import timing
from sparsebreg.experiments.bench.breakdown import breakdown
from sparsebreg.experiments.bench.cases import FOREIGN, Candidate, Case, candidates, derived, work
from sparsebreg.experiments.runs.train import cpu_name

#: What a result is known by.
KEY = ("suite", "layer", "part", "batch", "threads", "density", "implementation")

Result = dict[str, Any]


def machine(peers: dict[str, str]) -> dict[str, Any]:
    """Facts that times and, to a lesser degree, ratios depend on."""
    caches = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((index / n).read_text().strip() for n in ("level", "type", "size"))
        caches[f"L{level} {kind.lower()}"] = size
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts = {**sb.info().as_dict(), "cpu": cpu_name(), "cores": cores, "caches": caches}
    return {**facts, "numpy": np.__version__, "peers": peers}


def fastest(timed: Iterable[tuple[Candidate, np.ndarray]]) -> dict[tuple[str, float | None], tuple[str, np.ndarray]]:
    """(variant, seconds of all rounds) of the variant with the smaller median, by implementation and density."""
    best: dict[tuple[str, float | None], tuple[str, np.ndarray]] = {}
    for candidate, seconds in timed:
        key = candidate.implementation, candidate.density
        if key not in best or np.median(seconds) < np.median(best[key][1]):
            best[key] = candidate.variant, seconds
    return best


def measure(
    case: Case,
    densities: Sequence[float],
    peers: Sequence[str] = (),
    budget: float = 2.0,
    roofs: dict[str, float] | None = None,
) -> tuple[list[Result], list[str]]:
    """Times all ways to do what the case says, in turns, with the present threads.

    Returns:
        Results, as in bench.json, and notes about packages that could not be measured.

    Raises:
        RunError: if a result of this package is wrong.
    """
    ways, steps, notes = [], [], []
    sb.memory.release()  # whether its blocks lie on huge pages is luck, and must not be that of all later cases
    for candidate in candidates(case, densities, peers):
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
                steps.append(candidate.prepare())
            ways.append(candidate)
        except Exception as error:
            if candidate.implementation not in FOREIGN[1:]:
                raise RunError(f"{case}, {candidate}: {error}") from error
            notes.append(f"{case}, {candidate}: left out: {error}")
    rounds = timing.interleave(steps, budget)
    times = derived(fastest(zip(ways, rounds.T, strict=True)))
    dense_format, dense = times.pop(("torch", None))
    parts = _parts(case, ways, steps)
    results = []
    for (implementation, density), (variant, seconds) in times.items():
        ratio, median = timing.quartiles(dense / seconds), float(np.median(seconds))
        todo = work(case, density)
        amounts = {"useful_gflops": todo.useful, "effective_gflops": todo.dense, "gbs": todo.bytes}
        rates = {name: amount and 1e-9 * amount / median for name, amount in amounts.items()}
        result = {
            **asdict(case),
            "threads": torch.get_num_threads(),
            "density": density,
            "implementation": implementation,
            "variant": variant,
            "dense_format": dense_format or "contiguous",
            "rounds": len(seconds),
            "ms": timing.quartiles(1e3 * seconds),
            "dense_ms": timing.quartiles(1e3 * dense),
            "ratio": ratio,
            "ratios": [ratio["median"]],
            **rates,
            "intensity": todo.useful and todo.useful / todo.bytes,
            **({"parts_ms": parts[implementation, density]} if (implementation, density) in parts else {}),
        }
        for name, of, roof in (("of_gemm", "useful_gflops", "gemm_gflops"), ("of_copy", "gbs", "copy_gbs")):
            result[name] = result[of] / roofs[roof] if roofs and result[of] else None
        results.append(result)
    return results, notes


def _parts(
    case: Case, ways: Sequence[Candidate], steps: Sequence[Callable[[], Any]]
) -> dict[tuple[str, float | None], dict[str, float]]:
    """Profiled parts of a network's coarse and fine steps; a fine step is a pair minus a coarse step."""
    if case.suite != "network":
        return {}
    profiled = {
        (way.implementation, way.density): breakdown(step)
        for way, step in zip(ways, steps, strict=True)
        if way.implementation in ("coarse", "pair")
    }
    found = {}
    for (name, density), parts in profiled.items():
        if name == "coarse":
            found[name, density] = parts
            pair = profiled["pair", density]
            found["fine", density] = {part: max(0.0, pair[part] - ms) for part, ms in parts.items()}
    return found


def key(result: Result) -> tuple[Any, ...]:
    return tuple(result[k] for k in KEY)


def merged(runs: Sequence[Result]) -> Result:
    """Several runs of one measurement: that with the median ratio (the higher one of two), and the ratios of all."""
    order = sorted(runs, key=lambda r: r["ratio"]["median"])
    return {**order[len(order) // 2], "ratios": [r["ratio"]["median"] for r in runs]}


def break_even(densities: Sequence[float], ratios: Sequence[float]) -> tuple[str, float]:
    """The density below which sparse is faster: ("=", d) where the ratio first crosses 1 from the sparse side.

    Interpolated in log density and log ratio. (">", highest density measured) where sparse is always faster, ("<",
    lowest one) where even that is slower.
    """
    points = sorted(zip(densities, ratios, strict=True))
    for i, (density, ratio) in enumerate(points):
        if ratio < 1:
            if i == 0:
                return "<", density
            (d, r) = points[i - 1]
            part = math.log(r) / (math.log(r) - math.log(ratio))
            return "=", math.exp(math.log(d) + part * (math.log(density) - math.log(d)))
    return ">", points[-1][0]


def break_evens(results: Sequence[Result]) -> list[Result]:
    """The break-even density of everything that was measured at two densities or more."""
    groups: dict[tuple[Any, ...], list[Result]] = {}
    for r in results:
        if r["density"] is not None and r["part"] != "swap":
            groups.setdefault(tuple(r[k] for k in KEY if k != "density"), []).append(r)
    out = []
    for name, group in groups.items():
        if len(group) > 1:
            relation, density = break_even([r["density"] for r in group], [r["ratio"]["median"] for r in group])
            names = [k for k in KEY if k != "density"]
            out.append({**dict(zip(names, name, strict=True)), "relation": relation, "density": density})
    return out
