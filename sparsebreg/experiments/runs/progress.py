"""How far a comparison is: a table that is redrawn on a terminal, a line for every event elsewhere."""

from __future__ import annotations

import statistics
import time
from datetime import timedelta
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sparsebreg.experiments.runs.config import Config
from sparsebreg.experiments.runs.plan import Key, by_method, run_name


def clock(seconds: float) -> str:
    """Hours, minutes and seconds: ``0:02:10``."""
    return str(timedelta(seconds=round(seconds)))


def epoch_seconds(key: Key, finished: dict[Key, float], running: dict[Key, float]) -> float | None:
    """Seconds that an epoch of a run may take, from those of other runs; None where there are none.

    By finished runs that differ by their seed alone, else by the running one if it does, else by what the runs of the
    same data and model took on average, or all runs.
    """
    known = {**running, **finished}
    for alike, seconds in ((3, finished), (3, running), (2, known), (0, known)):
        if values := [s for k, s in seconds.items() if k[:alike] == key[:alike]]:
            return statistics.mean(values)
    return None


class Progress:
    """Shows the runs of a comparison on a console; as a context on a terminal, it keeps its table up to date.

    Args:
        configs: of all runs, in their order.
        results: of the finished runs; the caller adds to them.
        failed: what failed runs said; the caller adds to them.
    """

    def __init__(
        self, configs: dict[Key, Config], results: dict[Key, dict[str, Any]], failed: dict[Key, str], console: Console
    ) -> None:
        self.configs, self.results, self.failed, self.console = configs, results, failed, console
        self.running: Key | None = None
        self.step = self.steps = 0
        self._begun = self._run_begun = time.perf_counter()
        self._first: tuple[float, int] | None = None  # of the running one: when it began to train, at which step
        self._starts: list[float] = []  # seconds that runs needed before they trained
        # Once a second: the runs are timed, and the table takes a core for some milliseconds.
        self._live = Live(get_renderable=self.table, console=console, refresh_per_second=1)

    def __enter__(self) -> Progress:
        if self.console.is_interactive:
            self._live.start(refresh=True)
        return self

    def __exit__(self, *error: Any) -> None:
        self._live.stop()

    def begin(self, key: Key) -> None:
        """A run starts."""
        self._first, self.step, self.steps = None, 0, 0
        self._run_begun = time.perf_counter()
        self.running = key
        self._say(f"{self._number(key)} started, {self._times()}")

    def update(self, step: int, steps: int) -> None:
        """The running one has taken so many steps of so many."""
        if self._first is None:
            self._first = time.perf_counter(), step
            self._starts.append(self._first[0] - self._run_begun)
        self.step, self.steps = step, steps

    def end(self) -> None:
        """The running one has finished, or failed."""
        key, self.running = self.running, None
        if key in self.failed:
            self._say(f"{self._number(key)} failed: {self.failed[key]}")
        else:
            r = self.results[key]
            self._say(
                f"{self._number(key)} done: test accuracy {r['test_accuracy']:.2f} %, "
                f"{r['train_seconds']:.2f} s of training steps"
            )

    def _say(self, text: str) -> None:
        if self.console.is_interactive:
            self._live.refresh()
        else:
            self.console.out(text, highlight=False)

    def _number(self, key: Key) -> str:
        return f"run {list(self.configs).index(key) + 1} of {len(self.configs)}: {run_name(key)}"

    def line(self) -> str:
        """The present run, the time since the beginning, and what may be left."""
        key = self.running
        text = self._number(key) if key else f"{len(self.results)} of {len(self.configs)} runs done"
        return f"{text}, {self._times()}"

    def _times(self) -> str:
        text = f"{clock(time.perf_counter() - self._begun)} elapsed"
        if len(self.results) + len(self.failed) == len(self.configs):
            return text
        left = self.seconds_left()
        return text + (", time left not known yet" if left is None else f", about {clock(left)} left")

    def seconds_left(self) -> float | None:
        """Seconds that the running and the waiting runs may take; None before anything is known."""
        present, begun, step, steps = self.running, self._first, self.step, self.steps  # the table is drawn by a thread
        running = {}
        if present and begun and step > begun[1]:
            one = (time.perf_counter() - begun[0]) / (step - begun[1])
            running[present] = one * steps / self.configs[present].epochs
        finished = {k: _seconds(self.results[k]) / c.epochs for k, c in self.configs.items() if k in self.results}
        start = statistics.mean(self._starts) if self._starts else 0.0
        left = 0.0
        for key, config in self.configs.items():
            if key in self.results or key in self.failed:
                continue
            seconds = epoch_seconds(key, finished, running)
            if seconds is None:
                return None
            if key == present and begun and steps:
                left += (1 - step / steps) * config.epochs * seconds
            else:
                left += start + config.epochs * seconds
        return left

    def table(self) -> Group:
        """The line, and a row for every data set, model and method."""
        groups = by_method(self.configs)
        several = len({task[:2] for task in groups}) > 1
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for head in ("data, model", "method") if several else ("method",):
            table.add_column(head, no_wrap=True)
        for head in ("runs", "test accuracy %", "train s"):
            table.add_column(head, justify="right", no_wrap=True)
        table.add_column("state")
        for (data, model, method), keys in groups.items():
            done = [self.results[k] for k in keys if k in self.results]
            table.add_row(
                *((f"{data}, {model}", method) if several else (method,)),
                f"{len(done)} of {len(keys)}",
                _spread([r["test_accuracy"] for r in done]),
                _spread([r["train_seconds"] for r in done]),
                self._state(keys),
            )
        return Group(Text(self.line()), table)

    def _state(self, keys: list[Key]) -> Text:
        present, steps = self.running, self.steps
        failed = [str(k[3]) for k in keys if k in self.failed]
        text = Text("waiting", "dim")
        if present in keys:
            at = f"step {self.step} of {steps}" if steps else "starting"
            text = Text(f"seed {present[3]}: {at}, {clock(time.perf_counter() - self._run_begun)}", "bold")
        elif all(k in self.results for k in keys):
            text = Text("done", "green")
        elif all(k in self.results or k in self.failed for k in keys):
            text = Text()
        if failed:
            text.append(f"{', ' if text else ''}failed: seed {', '.join(failed)}", "red")
        return text


def _seconds(result: dict[str, Any]) -> float:
    """Of a whole run, however often it was stopped."""
    return sum(result[f"{part}_seconds"] for part in ("train", "evaluation", "checkpoint"))


def _spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    if not values:
        return "-"
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")
