"""Measurements as tables of text."""

from collections.abc import Sequence

from tabulate import tabulate

from sparsebreg.experiments.bench.breakdown import PARTS as STEP_PARTS
from sparsebreg.experiments.bench.breakdown import REST
from sparsebreg.experiments.bench.measure import Result


def fixed(value: float | None, digits: int = 1, scale: float = 1.0) -> str:
    return "-" if value is None else f"{scale * value:.{digits}f}"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.3g}%"


def as_table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
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
            percent(r["density"]),
            fixed(r["dense_ms"]["median"], 3),
            fixed(r["ms"]["median"], 3),
            fixed(r["ratio"]["median"], 2),
            f"{r['ratio']['q1']:.2f}-{r['ratio']['q3']:.2f}",
            fixed(r["useful_gflops"]),
            fixed(r["effective_gflops"]),
            fixed(r["of_gemm"], 0, 100),
            fixed(r["of_copy"], 0, 100),
        )
        for r in results
    ]
    same = [f"{k} {results[0][k]}" for k in ("batch", "threads") if k not in vary]
    return "\n\n".join(filter(None, (", ".join(same), as_table(head, rows, 3))))


def break_even_table(evens: Sequence[Result]) -> str:
    """Implementations side by side."""
    names = list(dict.fromkeys(e["implementation"] for e in evens))
    groups: dict[tuple[str, ...], dict[str, str]] = {}
    for e in evens:
        where = e["layer"], e["part"], str(e["batch"]), str(e["threads"])
        text = percent(e["density"])
        groups.setdefault(where, {})[e["implementation"]] = text if e["relation"] == "=" else f"{e['relation']} {text}"
    rows = [(*where, *(found.get(n, "-") for n in names)) for where, found in groups.items()]
    return as_table(("layer", "part", "batch", "threads", *names), rows, 2)


def parts_table(results: Sequence[Result]) -> str:
    """Where the time of steps goes, in ms, as text; empty where that was not measured."""
    rows = [
        (
            r["layer"],
            r["implementation"],
            str(r["batch"]),
            str(r["threads"]),
            percent(r["density"]),
            *(fixed(r["parts_ms"][part]) for part in (*STEP_PARTS, REST)),
        )
        for r in results
        if "parts_ms" in r
    ]
    return as_table(("layer", "step", "batch", "threads", "density", *STEP_PARTS, REST), rows, 2) if rows else ""
