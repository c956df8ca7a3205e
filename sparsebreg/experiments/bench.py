"""The benchmark: how much faster than dense torch, at which density it begins to pay, and whether that got worse.

What travels between machines is the ratio to the dense baseline, which is measured in the same process, with the same
threads, in turns: the better of torch's memory formats.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tabulate import tabulate

import sparsebreg as sb
from sparsebreg.core.errors import RunError, check_choice, check_int, check_real, expected
from sparsebreg.experiments import plots, timing
from sparsebreg.experiments.breakdown import PARTS as STEP_PARTS
from sparsebreg.experiments.breakdown import REST, breakdown
from sparsebreg.experiments.cases import FOREIGN, PARTS, Candidate, Case, candidates, derived, installed, work
from sparsebreg.experiments.files import prepare_folder, write
from sparsebreg.experiments.shapes import REPRESENTATIVE, SUITES
from sparsebreg.experiments.train import cpu_name

#: Version of bench.json.
SCHEMA = 1

#: What a result is known by.
KEY = ("suite", "layer", "part", "batch", "threads", "density", "implementation")

#: The grid of --full, and the small one.
FULL = {"densities": (0.5, 0.2, 0.1, 0.05, 0.02, 0.01), "batches": (1, 32, 128, 512), "parts": PARTS}
SMALL = {"densities": (0.1, 0.05, 0.01), "batches": (128,), "parts": ("forward", "step")}

#: How often what seems worse is measured again before it counts.
AGAIN = 3

#: Entries listed that only one of two files has.
LISTED = 20

Result = dict[str, Any]


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


def machine(peers: dict[str, str]) -> dict[str, Any]:
    """Facts that times and, to a lesser degree, ratios depend on."""
    caches = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((index / n).read_text().strip() for n in ("level", "type", "size"))
        caches[f"L{level} {kind.lower()}"] = size
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts = {**sb.info().as_dict(), "cpu": cpu_name(), "cores": cores, "caches": caches}
    return {**facts, "numpy": np.__version__, "peers": peers}


def fastest(
    timed: Iterable[tuple[Candidate, np.ndarray]],
) -> dict[tuple[str, float | None], tuple[str, np.ndarray]]:
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
    """Where the time of a network's coarse and fine steps goes; a fine one is what a pair has more."""
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


def _fixed(value: float | None, digits: int = 1, scale: float = 1.0) -> str:
    return "-" if value is None else f"{scale * value:.{digits}f}"


def _density(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.3g}%"


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
    align = ["left"] * left + ["right"] * (len(head) - left)
    return tabulate(rows, head, tablefmt="github", disable_numparse=True, colalign=align)


def table(results: Sequence[Result]) -> str:
    """Every measurement as text; batch and threads are columns where they vary."""
    vary = [k for k in ("batch", "threads") if len({r[k] for r in results}) > 1]
    head = (
        "layer", "part", "by", *vary, "density", "dense ms", "ms", "speed-up", "quartiles", "useful GF/s",
        "effective GF/s", "% of GEMM", "% of copy",
    )  # fmt: skip
    rows = [
        (
            r["layer"],
            r["part"],
            r["implementation"],
            *(str(r[k]) for k in vary),
            _density(r["density"]),
            _fixed(r["dense_ms"]["median"], 3),
            _fixed(r["ms"]["median"], 3),
            _fixed(r["ratio"]["median"], 2),
            f"{r['ratio']['q1']:.2f}-{r['ratio']['q3']:.2f}",
            _fixed(r["useful_gflops"]),
            _fixed(r["effective_gflops"]),
            _fixed(r["of_gemm"], 0, 100),
            _fixed(r["of_copy"], 0, 100),
        )
        for r in results
    ]
    fixed = [f"{k} {results[0][k]}" for k in ("batch", "threads") if k not in vary]
    return "\n\n".join(filter(None, (", ".join(fixed), _rows(head, rows, 3))))


def break_even_table(evens: Sequence[Result]) -> str:
    """Implementations side by side."""
    names = list(dict.fromkeys(e["implementation"] for e in evens))
    groups: dict[tuple[str, ...], dict[str, str]] = {}
    for e in evens:
        where = e["layer"], e["part"], str(e["batch"]), str(e["threads"])
        text = _density(e["density"])
        groups.setdefault(where, {})[e["implementation"]] = text if e["relation"] == "=" else f"{e['relation']} {text}"
    rows = [(*where, *(found.get(n, "-") for n in names)) for where, found in groups.items()]
    return _rows(("layer", "part", "batch", "threads", *names), rows, 2)


def parts_table(results: Sequence[Result]) -> str:
    """Where the time of steps goes, in ms, as text; empty where that was not measured."""
    rows = [
        (
            r["layer"],
            r["implementation"],
            str(r["batch"]),
            str(r["threads"]),
            _density(r["density"]),
            *(_fixed(r["parts_ms"][part]) for part in (*STEP_PARTS, REST)),
        )
        for r in results
        if "parts_ms" in r
    ]
    return _rows(("layer", "step", "batch", "threads", "density", *STEP_PARTS, REST), rows, 2) if rows else ""


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
            return f"{layer} {part} batch={batch} threads={threads} density={_density(density)} {by}"

        lines = []
        for title, found in (("worse", self.worse), ("better", self.better)):
            if found:
                rows = [
                    (name(k), _fixed(a, 2), _fixed(b, 2), f"{100 * (b / a - 1):+.0f}%")
                    for k, (a, b) in sorted(found.items(), key=lambda item: item[1][1] / item[1][0])
                ]
                lines += [_rows((title, "before", "now", "change"), rows, 1), ""]
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


def run(
    options: Options, progress: Callable[..., Any] | None = None, echo: Callable[[str], Any] = print
) -> Comparison | None:
    """Measures, prints tables and writes the files; compares where a file to compare with is given.

    What seems worse is measured again up to three times; the run with the median ratio of all counts.

    Raises:
        ValueError: for a file to compare with that is none, or has nothing in common with what is to be measured.
        RunError: for a result that is wrong, an output folder that cannot be written, nothing to be measured on this
        backend, or without matplotlib.
    """
    cases, counts = options.cases(), options.thread_counts()
    old = load(options.compare) if options.compare else None
    if old is not None:
        todo = {(c.suite, c.layer, c.part, c.batch, n) for c in cases for n in counts}
        if not any(key(r)[:5] in todo for r in old["results"]):
            got = ", ".join(sorted({str(r["threads"]) for r in old["results"]})) or "no"
            wanted = f"results of what is to be measured now ({', '.join(map(str, counts))} threads)"
            raise ValueError(expected("compare", wanted, f"others ({got} threads)"))
    plots.pyplot()  # before the work, where it is missing
    folder = prepare_folder(options.out)
    peers = installed()
    facts = machine(peers)
    roofs: dict[int, dict[str, float]] = {}
    runs: dict[tuple[Any, ...], list[Result]] = {}
    notes: dict[str, None] = {}
    plan = [(n, case) for _ in range(options.repeats) for n in counts for case in cases]

    def carry_out(plan: Sequence[tuple[int, Case]], what: str) -> None:
        bar = progress(total=len(plan), unit="case", desc=what) if progress else None
        for n, case in plan:
            if bar is not None:
                bar.set_postfix_str(str(case), refresh=False)
            with timing.threads(n):
                if n not in roofs:
                    roofs[n] = timing.roofs()
                results, said = measure(case, options.grid("densities"), tuple(peers), options.budget, roofs[n])
            notes.update(dict.fromkeys(said))
            for result in results:
                runs.setdefault(key(result), []).append(result)
            if bar is not None:
                bar.update()
        if bar is not None:
            bar.close()

    def results() -> list[Result]:
        return [merged(r) for r in runs.values()]

    carry_out(plan, "measuring")
    if not runs:
        wanted = "batches of at least 16 and the native backend for norms"
        raise RunError(expected("batches", wanted, f"{options.grid('batches')} and {facts['backend']}"))
    found = None
    if old is not None:
        found = compare(old["results"], results(), options.tolerance)
        for _ in range(AGAIN):
            if not found.worse:
                break
            carry_out([(k[4], Case(*k[:4])) for k in {k[:5]: k for k in found.worse}.values()], "measuring again")
            found = compare(old["results"], results(), options.tolerance)
    evens = break_evens(results())
    content = {
        "schema": SCHEMA,
        "machine": facts,
        "options": asdict(options),
        "roofs": [{"threads": n, **r} for n, r in roofs.items()],
        "results": results(),
        "break_even": evens,
        "notes": list(notes),
    }
    write(folder / "bench.json", json.dumps(content, indent=1, allow_nan=False) + "\n")
    text = _report(content, old, found)
    write(folder / "bench.md", text)
    own = [r for r in content["results"] if r["implementation"] not in FOREIGN]
    drawn = [folder / "speedup.png"] if plots.speedup(folder / "speedup.png", own) else []
    plots.roofline(folder / "roofline.png", own, roofs)
    echo(text)
    echo(f"results: {folder / 'bench.json'}\nplots: {', '.join(map(str, [*drawn, folder / 'roofline.png']))}")
    return found


#: Facts whose change moves ratios.
_MACHINE = ("cpu", "cores", "isa", "backend", "torch", "python", "version")


def _report(content: dict[str, Any], old: dict[str, Any] | None, found: Comparison | None) -> str:
    """bench.md, which is printed, too."""
    facts = content["machine"]
    caches = ", ".join(f"{k} {v}" for k, v in facts["caches"].items()) or "unknown caches"
    parts = [
        "# sparsebreg bench",
        f"{facts['cpu']}, {facts['cores']} cores, {caches}; {facts['backend']} {facts['isa']}, torch {facts['torch']}, "
        f"numpy {facts['numpy']}, python {facts['python']}, sparsebreg {facts['version']}"
        + "".join(f", {n} {v}" for n, v in facts["peers"].items()),
        *(
            f"{r['threads']} threads: product of {timing.GEMM} x {timing.GEMM} matrices {r['gemm_gflops']:.0f} GF/s, "
            f"copy {r['copy_gbs']:.1f} GB/s"
            for r in content["roofs"]
        ),
        "float32, medians; dense is the better of torch's memory formats, measured in turns with the others; "
        "speed-up is the median over rounds of dense / sparse in a round.",
        table(content["results"]),
    ]
    if content["break_even"]:
        parts += ["Sparse is faster than dense below this density:", break_even_table(content["break_even"])]
    if steps := parts_table(content["results"]):
        parts += ["Where the time of a step goes, in ms, under the profiler:", steps]
    parts += ["\n".join(f"- {note}" for note in content["notes"])] if content["notes"] else []
    if old is not None:
        parts.append("## Compared with before")
        before = old["machine"] if isinstance(old["machine"], dict) else {}
        differ = [f"{k}: {before.get(k)} before, {facts[k]} now" for k in _MACHINE if before.get(k) != facts[k]]
        roofs = {r["threads"]: r for r in old["roofs"]}
        for r in content["roofs"]:
            for k, unit in (("gemm_gflops", "GF/s of a product"), ("copy_gbs", "GB/s of a copy")):
                was = roofs[r["threads"]][k] if r["threads"] in roofs else r[k]
                if not 0.8 < r[k] / was < 1.25:  # a busy machine slows sparse and dense layers unequally
                    differ.append(f"{was:.0f} {unit} before, {r[k]:.0f} now")
        if differ:
            parts.append("Not the same conditions: " + "; ".join(differ))
        parts.append(str(found))
    return "\n\n".join(parts) + "\n"
