"""One page about all runs in a folder: report.html, which needs no network, report.md and report.csv."""

import csv
import io
import json
import math
import statistics
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from sparsebreg.core.errors import RunError, expected
from sparsebreg.experiments.files import write
from sparsebreg.experiments.runs import checkpoint, plots
from sparsebreg.experiments.runs.config import FREE
from sparsebreg.experiments.runs.run import PHASES
from sparsebreg.experiments.runs.summary import HEAD, cells, row

#: Facts about the machine and their names on the page.
FACTS = {
    "cpu": "processor", "cpus": "logical processors", "machine": "system", "threads": "threads", "backend": "backend",
    "isa": "instruction set", "torch": "torch", "python": "Python", "version": "sparsebreg",
}  # fmt: skip

#: Of the table of runs.
RUN_HEAD = ("method", "seed", "test accuracy %", "sparsity %", "train s", "memory format")

#: How the data's time was told from the steps.
DATA_NOTE = (
    "Data: batches and augmentation, a part of the training time. It is measured as a whole and taken out of fine and "
    "coarse steps in equal shares, since every step takes one batch; where “-” stands, the steps contain it."
)


@dataclass
class Run:
    """A finished run as its folder tells it."""

    folder: Path
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

    @property
    def split(self) -> str:
        """What the history's accuracy is of."""
        return "validation" if "validation_accuracy" in self.history[0] else "test"


def read(folder: Path) -> tuple[list[Run], list[str]]:
    """The finished runs below a folder, and the names of unfinished ones. Raises RunError."""
    if not folder.is_dir():
        raise RunError(expected("folder", "a folder with results of train or compare", folder))
    runs = []
    for path in sorted(folder.rglob("result.json")):
        try:
            result = json.loads(path.read_text())
            if not isinstance(result, dict):
                raise TypeError(expected("result.json", "an object", type(result).__name__))
            with open(path.with_name("history.csv"), newline="") as file:
                history = list(csv.DictReader(file))
            with np.load(path.with_name("steps.npz")) as steps:
                coarse, seconds = steps["phase"] == PHASES.index("coarse"), steps["seconds"]
            run = Run(path.parent, result, history, coarse, seconds)
            # Each raises for a result that is not whole.
            _ = row([result]), run.options, _breakdown([run]), _run_cells("", run), result["command"], result["info"]
            _ = history[-1]["flops"]
            runs.append(run)
        except (
            OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, zipfile.BadZipFile,
        ) as error:  # fmt: skip
            raise RunError(expected(str(path.parent), "the files of a finished run", repr(error))) from error
    unfinished = [
        str(p.parent.relative_to(folder))
        for p in sorted(folder.rglob(checkpoint.NAME))
        if not p.with_name("result.json").exists()
    ]
    if not runs:
        raise RunError(expected("folder", "a result.json somewhere below", f"none in {folder}"))
    return runs, unfinished


def comparisons(folder: Path) -> dict[Path, str]:
    """The commands of the comparisons in a folder and below, by the comparison's folder. Raises RunError."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    commands = {}
    for path in sorted(folder.rglob("comparison.toml")):
        try:
            command = tomllib.loads(path.read_text(encoding="utf-8")).get("command")
        except (OSError, ValueError) as error:
            raise RunError(expected(str(path), "a readable TOML file", error)) from error
        if isinstance(command, str):
            commands[path.parent] = command
    return commands


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


def _entry(row: dict[str, Any], key: str) -> float:
    """Of a row of history.csv: a number, or NaN where it has none."""
    return float(row[key]) if row.get(key) not in (None, "") else math.nan


def _breakdown(runs: list[Run]) -> dict[str, float]:
    """Mean seconds of a run by what they were spent on (see ``plots.PARTS``); "data" where all runs know it."""
    keys = {"fine steps": "fine", "coarse steps": "coarse", "evaluation": "evaluation", "checkpoints": "checkpoint"}
    parts = {k: statistics.mean(r.result[f"{v}_seconds"] for r in runs) for k, v in keys.items()}
    if all(r.result.get("data_seconds") is not None for r in runs):
        # Measured over all steps alone. Every step, fine or coarse, takes one batch, so every step gives the same.
        coarse = statistics.mean(r.result["data_seconds"] * float(r.coarse.mean()) for r in runs)
        parts["data"] = statistics.mean(r.result["data_seconds"] for r in runs)
        parts["coarse steps"] = max(0.0, parts["coarse steps"] - coarse)
        parts["fine steps"] = max(0.0, parts["fine steps"] - (parts["data"] - coarse))
    return parts


def _time_table(times: dict[str, dict[str, float]]) -> tuple[list[str], list[list[str]]]:
    """Head and lines of the table of mean seconds."""
    parts = [p for p in plots.PARTS if any(p in t for t in times.values())]
    lines = [[label] + [f"{t[p]:.2f}" if p in t else "-" for p in parts] for label, t in times.items()]
    return ["method", *(f"{p} s" for p in parts)], lines


def _run_cells(label: str, run: Run) -> list[str]:
    """A line of the table of runs, under ``RUN_HEAD``."""
    r = run.result
    numbers = (f"{r['test_accuracy']:.2f}", f"{100 * r['sparsity']:.1f}", f"{r['train_seconds']:.2f}")
    return [label, str(r["seed"]), *numbers, str(r.get("memory_format", "-"))]


def _commands(groups: dict[str, list[Run]], compared: dict[Path, str]) -> list[str]:
    """The commands of a task's runs, after those of the comparisons that they are of."""
    runs = [r for g in groups.values() for r in g]
    whole = [command for path, command in compared.items() if any(path in r.folder.parents for r in runs)]
    single = [r.result["command"] for r in runs]
    return ["# all runs", *whole, "# one by one", *single] if whole else single


def _task(number: int, runs: list[Run], compared: dict[Path, str]) -> dict[str, Any]:
    """What the page shows of a task."""
    groups = grouped(runs)
    rows = [{**row([r.result for r in g]), "label": label} for label, g in groups.items()]
    histories = {label: [r.history for r in g] for label, g in groups.items()}
    times = {label: _breakdown(g) for label, g in groups.items()}
    splits = {r.split for r in runs}
    measured, kind = histories, f"{runs[0].split} accuracy (%)"
    if len(splits) > 1:  # a line says itself what it is of
        measured, kind = {f"{k}, {g[0].split}": histories[k] for k, g in groups.items()}, "accuracy (%)"
    most = max(float(r.history[-1]["flops"]) for r in runs)
    power = int(np.log10(max(most, 1))) // 3 * 3
    figures = [
        ("Accuracy against time",
         plots.lines(f"time{number}", measured, lambda r: float(r["train_seconds"]), plots.accuracy,
                     xlabel="training time (s)", ylabel=kind)),
        ("Accuracy against work",
         plots.lines(f"flops{number}", measured, lambda r: float(r["flops"]) / 10**power, plots.accuracy,
                     xlabel=f"floating-point operations ({_power(power)})", ylabel=kind)),
        ("Training loss",
         plots.lines(f"loss{number}", histories, lambda r: float(r["epoch"]), lambda r: float(r["train_loss"]),
                     xlabel="epoch", ylabel="training loss", log=True)),
        ("Density",
         plots.lines(f"density{number}", histories, lambda r: float(r["epoch"]), lambda r: 100 * float(r["density"]),
                     xlabel="epoch", ylabel="active weights (%)", log=True)),
        ("Where the time went",
         plots.breakdown(f"parts{number}", times)),
    ]  # fmt: skip
    for title, key, label, log in (
        ("λ", "lam", "λ", True),
        ("Sparsity minus its target", "gap", "sparsity - target", False),
        ("Weights that woke", "woke", "weights in an epoch", False),
        ("Weights that died", "died", "weights in an epoch", False),
    ):
        if any(_entry(r, key) > 0 or _entry(r, key) < 0 for seeds in histories.values() for h in seeds for r in h):
            drawn = plots.lines(
                f"{key}{number}", histories, lambda r: float(r["epoch"]), lambda r, key=key: _entry(r, key),
                xlabel="epoch", ylabel=label, log=log,
            )  # fmt: skip
            figures.append((title, drawn))
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
        "times": _time_table(times),
        "data_known": any("data" in t for t in times.values()),
        "runs": [_run_cells(label, r) for label, g in groups.items() for r in g],
        "commands": _commands(groups, compared),
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
    compared = comparisons(folder)
    tasks = [
        _task(i, [r for r in runs if r.task == task], compared)
        for i, task in enumerate(dict.fromkeys(r.task for r in runs))
    ]
    facts = _facts(runs)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    title = folder.resolve().name
    page = environment.get_template("report.html").render(
        title=title, tasks=tasks, head=HEAD, run_head=RUN_HEAD, facts=facts, unfinished=unfinished, note=DATA_NOTE
    )
    write(folder / "report.html", page)
    picture = "curves.png" if (folder / "curves.png").exists() else None
    write(folder / "report.md", _markdown(title, tasks, facts, unfinished, picture))
    text = io.StringIO()
    rows = [r for t in tasks for r in t["rows"]]
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write(folder / "report.csv", text.getvalue())
    return [folder / f"report.{end}" for end in ("html", "md", "csv")]


def _markdown(
    title: str, tasks: list[dict[str, Any]], facts: list[tuple[str, str]], unfinished: list[str], picture: str | None
) -> str:
    def table(head: Sequence[str], lines: list[Sequence[str]]) -> str:
        align = ("left",) + ("right",) * (len(head) - 1)
        return tabulate(lines, head, tablefmt="github", disable_numparse=True, colalign=align)

    parts = [f"# {title}"]
    if picture:
        parts.append(f"![loss against epochs, accuracy against time, density against epochs]({picture})")
    for task in tasks:
        parts += [f"## {task['name']}", table(HEAD, task["cells"]), "Mean seconds of a run:", table(*task["times"])]
        if task["data_known"]:
            parts.append(DATA_NOTE)
        parts += ["Runs:", table(RUN_HEAD, task["runs"]), "```\n" + "\n".join(task["commands"]) + "\n```"]
    if unfinished:
        parts.append("Not finished: " + ", ".join(unfinished))
    parts += ["## Machine", tabulate(facts, ("fact", "value"), tablefmt="github", disable_numparse=True)]
    return "\n\n".join(parts) + "\n"
