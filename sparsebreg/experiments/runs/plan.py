"""What a comparison consists of: its runs by data, model, method and seed, and the options that they share."""

from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from sparsebreg.core.errors import check_choice, check_int, expected
from sparsebreg.experiments.data.datasets import DATASETS
from sparsebreg.experiments.runs.config import Config
from sparsebreg.experiments.runs.methods import METHODS, special
from sparsebreg.models import MODELS

#: A run of a comparison: data, model, method, seed.
Key = tuple[str, str, str, int]


def run_name(key: Key) -> str:
    """The name of a run in messages."""
    return f"{' '.join(key[:3])} seed {key[3]}"


def by_method(keys: Iterable[Key]) -> dict[tuple[str, str, str], list[Key]]:
    """Runs that differ by their seed alone, by (data, model, method)."""
    groups: dict[tuple[str, str, str], list[Key]] = {}
    for key in keys:
        groups.setdefault(key[:3], []).append(key)
    return groups


def plan(
    base: Config, methods: Sequence[str], seeds: Sequence[int], models: Sequence[str], data: Sequence[str]
) -> dict[Key, Config]:
    """The resolved configuration of every run, in order; runs live in ``out/<data>-<model>/<method>-seed<k>``.

    Options that only some methods take (``lam``) are left out for the others. With several data sets, each has its
    files in a folder of its name below ``data_dir``.

    Raises:
        TypeError, ValueError: for a wrong option, or one that is listed twice.
    """
    for name, values, known in (("methods", methods, METHODS), ("models", models, MODELS), ("data", data, DATASETS)):
        for value in values:
            check_choice(name, value, known)
    seeds = [check_int("seeds", seed, low=0) for seed in seeds]
    for name, values in (("methods", methods), ("models", models), ("data", data), ("seeds", seeds)):
        if len(set(values)) < len(values):
            raise ValueError(expected(name, "every one once", ", ".join(map(str, values))))
    configs = {}
    for task in data:
        folder = str(Path(base.data_dir) / task) if base.data_dir and len(data) > 1 else base.data_dir
        for model in models:
            for seed in seeds:  # methods inside: their times are compared, and a machine's speed drifts
                for method in methods:
                    config = replace(
                        base, **dict.fromkeys(special() - set(METHODS[method].defaults)), data=task,
                        data_dir=folder, model=model, method=method, seed=seed,
                        out=str(Path(base.out) / f"{task}-{model}" / f"{method}-seed{seed}"),
                    )  # fmt: skip
                    configs[task, model, method, seed] = config.resolved()
    return configs


def options(base: Config, configs: dict[Key, Config]) -> dict[str, Any]:
    """The planned comparison in the words of its command: its lists, and the options that all of its runs share.

    The same comparison is planned from them. Options in which runs differ are those that ``base`` left open.
    """
    lists = zip(("data", "models", "methods", "seeds"), zip(*configs, strict=True), strict=True)
    out: dict[str, Any] = {name: list(dict.fromkeys(values)) for name, values in lists}
    out |= {"out": base.out, "data_dir": base.data_dir}
    own = {"data", "model", "method", "seed", *out}
    for name in (f.name for f in fields(Config) if f.name not in own):
        taken = [c for c in configs.values() if name not in special() or name in METHODS[c.method].defaults]
        values = {getattr(c, name) for c in taken}
        out[name] = values.pop() if len(values) == 1 else None
    return {k: v for k, v in out.items() if v is not None}
