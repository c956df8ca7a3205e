"""One page about all runs in a folder: report.html, which needs no network, report.md and report.csv."""

from __future__ import annotations

import csv
import io
import json
import statistics
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from sparsebreg.errors import RunError, expected
from sparsebreg.experiments import checkpoint, plots
from sparsebreg.experiments.compare import HEAD, cells, row
from sparsebreg.experiments.config import FREE
from sparsebreg.experiments.files import write
from sparsebreg.experiments.train import PHASES

#: Facts about the machine and their names on the page.
FACTS = {
    "cpu": "processor", "cpus": "logical processors", "machine": "system", "threads": "threads", "backend": "backend",
    "isa": "instruction set", "torch": "torch", "python": "Python", "version": "sparsebreg",
}  # fmt: skip


@dataclass
class Run:
    """A finished run as its folder tells it."""

    result: dict[str, Any]
    history: list[dict[str, Any]]
    coarse: np.ndarray
    seconds: np.ndarray

    @property
    def task(self) -> tuple[str, str]:
        return self.result["data"], self.result["model"]

    @property
    def options(self) -> dict[str, Any]:
        """What runs have in common that differ by their seed alone."""
        return {k: v for k, v in self.result["config"].items() if k not in FREE and k != "seed"}


def read(folder: Path) -> tuple[list[Run], list[str]]:
    """The finished runs below a folder, and the names of unfinished ones. Raises RunError."""
    if not folder.is_dir():
        raise RunError(expected("folder", "a folder with results of train or compare", folder))
    runs = []
    for path in sorted(folder.rglob("result.json")):
        try:
            result = json.loads(path.read_text())
            with open(path.with_name("history.csv"), newline="") as file:
                history = list(csv.DictReader(file))
            with np.load(path.with_name("steps.npz")) as steps:
                coarse, seconds = steps["phase"] == PHASES.index("coarse"), steps["seconds"]
            run = Run(result, history, coarse, seconds)
            # Each raises for a result that is not whole.
            _ = row([result]), run.options, _breakdown([run]), result["command"], result["info"], history[-1]["flops"]
            runs.append(run)
        except (OSError, ValueError, KeyError, IndexError, zipfile.BadZipFile) as error:
            raise RunError(expected(str(path.parent), "the files of a finished run", repr(error))) from error
    unfinished = [
        str(p.parent.relative_to(folder))
        for p in sorted(folder.rglob(checkpoint.NAME))
        if not p.with_name("result.json").exists()
    ]
    if not runs:
        raise RunError(expected("folder", "a result.json somewhere below", f"none in {folder}"))
    return runs, unfinished


def grouped(runs: list[Run]) -> dict[str, list[Run]]:
    """Runs of a task that differ by their seed alone, by label: the method, and options where a method has several."""
    groups: list[list[Run]] = []
    for run in runs:
        for group in groups:
            if group[0].options == run.options:
                group.append(run)
                break
        else:
            groups.append([run])
    groups.sort(key=lambda g: g[0].result["method"] != "sgd")  # the baseline first
    labels: dict[str, list[Run]] = {}
    for group in groups:
        own = group[0].options
        rivals = [g[0].options for g in groups if g is not group and g[0].options["method"] == own["method"]]
        differing = [k for k in own if any(r.get(k) != own[k] for r in rivals)]
        text = ", ".join(f"{k} {own[k]}" for k in differing)
        labels[own["method"] + (f" ({text})" if text else "")] = group
    return labels


def _power(exponent: int) -> str:
    return "10" + str(exponent).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _breakdown(runs: list[Run]) -> dict[str, float]:
    """Mean seconds of a run by what they were spent on."""
    keys = {"fine steps": "fine", "coarse steps": "coarse", "evaluation": "evaluation", "checkpoints": "checkpoint"}
    return {k: statistics.mean(r.result[f"{v}_seconds"] for r in runs) for k, v in keys.items()}


def _task(number: int, runs: list[Run]) -> dict[str, Any]:
    """What the page shows of a task."""
    groups = grouped(runs)
    rows = [{**row([r.result for r in g]), "label": label} for label, g in groups.items()]
    histories = {label: [r.history for r in g] for label, g in groups.items()}
    kind = "validation" if runs[0].result["validation_accuracy"] is not None else "test"
    most = max(float(r.history[-1]["flops"]) for r in runs)
    power = int(np.log10(max(most, 1))) // 3 * 3
    figures = [
        ("Accuracy against time",
         plots.lines(f"time{number}", histories, lambda r: float(r["train_seconds"]), plots.accuracy,
                     xlabel="training time (s)", ylabel=f"{kind} accuracy (%)")),
        ("Accuracy against work",
         plots.lines(f"flops{number}", histories, lambda r: float(r["flops"]) / 10**power, plots.accuracy,
                     xlabel=f"floating-point operations ({_power(power)})", ylabel=f"{kind} accuracy (%)")),
        ("Training loss",
         plots.lines(f"loss{number}", histories, lambda r: float(r["epoch"]), lambda r: float(r["train_loss"]),
                     xlabel="epoch", ylabel="training loss", log=True)),
        ("Density",
         plots.lines(f"density{number}", histories, lambda r: float(r["epoch"]), lambda r: 100 * float(r["density"]),
                     xlabel="epoch", ylabel="active weights (%)", log=True)),
        ("Where the time went",
         plots.breakdown(f"parts{number}", {label: _breakdown(g) for label, g in groups.items()})),
    ]  # fmt: skip
    for i, (label, group) in enumerate(groups.items()):
        first = group[0]
        seed = f", seed {first.result['seed']}"
        if first.result["density"] < 1:
            figures.append((f"Density by layer: {label}{seed}", plots.layers(f"layers{number}-{i}", first.history)))
        if first.coarse.any():
            drawn = plots.timeline(f"steps{number}-{i}", first.coarse, first.seconds)
            figures.append((f"Steps in the middle of the run: {label}{seed}", drawn))
    return {
        "name": " · ".join(runs[0].task),
        "rows": rows,
        "cells": cells(rows),
        "figures": figures,
        "commands": [r.result["command"] for g in groups.values() for r in g],
    }


def _facts(runs: list[Run]) -> list[tuple[str, str]]:
    """Facts about the machine; several values where runs differ."""
    out = []
    for key, name in FACTS.items():
        values = dict.fromkeys(str(r.result["info"][key]) for r in runs if key in r.result["info"])
        out.append((name, ", ".join(values)))
    return out


def report(folder: Path) -> list[Path]:
    """Writes report.html, report.md and report.csv about all runs below a folder; returns their paths.

    Raises:
        RunError: for a folder without finished runs, a damaged result, or where jinja2 or matplotlib is missing.
    """
    try:
        import jinja2
    except ImportError as error:
        raise RunError(expected("report", "jinja2 (pip install 'sparsebreg[train]')", error)) from error
    runs, unfinished = read(folder)
    tasks = [
        _task(i, [r for r in runs if r.task == task]) for i, task in enumerate(dict.fromkeys(r.task for r in runs))
    ]
    facts = _facts(runs)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    page = environment.get_template("report.html").render(
        title=folder.resolve().name, tasks=tasks, head=HEAD, facts=facts, unfinished=unfinished
    )
    write(folder / "report.html", page)
    write(folder / "report.md", _markdown(folder.resolve().name, tasks, facts, unfinished))
    text = io.StringIO()
    rows = [r for t in tasks for r in t["rows"]]
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write(folder / "report.csv", text.getvalue())
    return [folder / f"report.{end}" for end in ("html", "md", "csv")]


def _markdown(title: str, tasks: list[dict[str, Any]], facts: list[tuple[str, str]], unfinished: list[str]) -> str:
    align = ("left",) + ("right",) * (len(HEAD) - 1)
    parts = [f"# {title}"]
    for task in tasks:
        table = tabulate(task["cells"], HEAD, tablefmt="github", disable_numparse=True, colalign=align)
        parts += [f"## {task['name']}", table, "```\n" + "\n".join(task["commands"]) + "\n```"]
    if unfinished:
        parts.append("Not finished: " + ", ".join(unfinished))
    parts += ["## Machine", tabulate(facts, ("fact", "value"), tablefmt="github", disable_numparse=True)]
    return "\n\n".join(parts) + "\n"
