"""The benchmark: how much faster than dense torch, at which density it begins to pay, and whether that got worse.

What travels between machines is the ratio to the dense baseline, which is measured in the same process, with the same
threads, in turns: the better of torch's memory formats.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from sparsebreg.core.errors import RunError, expected
from sparsebreg.experiments import timing
from sparsebreg.experiments.bench import plots
from sparsebreg.experiments.bench.against import SCHEMA, Comparison, compare, load
from sparsebreg.experiments.bench.cases import FOREIGN, Case, installed
from sparsebreg.experiments.bench.measure import Result, break_evens, key, machine, measure, merged
from sparsebreg.experiments.bench.options import Options
from sparsebreg.experiments.bench.tables import break_even_table, parts_table, table
from sparsebreg.experiments.files import prepare_folder, write

#: How often what seems worse is measured again before it counts.
AGAIN = 3


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
