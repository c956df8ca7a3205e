"""Checkpoints of a run: written whole or not at all, and refused by any other run."""

import json
import pickle
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import sparsebreg as sb
from sparsebreg.core.errors import RunError, expected
from sparsebreg.experiments.files import atomic
from sparsebreg.experiments.runs.config import Config

NAME = "checkpoint.pt"


def facts() -> dict[str, str]:
    """What a run must have in common with the one it goes on with, besides its options: else bits and times differ."""
    info = sb.info()
    return {"version": info.version, "backend": info.backend, "isa": info.isa}


def save(folder: Path, config: Config, state: dict[str, Any]) -> None:
    """Writes checkpoint.pt. Raises RunError where there is no room; the old checkpoint stays then."""
    try:
        with atomic(folder / NAME) as file:
            torch.save({"facts": facts(), "config": asdict(config), **state}, file)
    except RuntimeError as error:  # torch turns some of the system's errors into those; RunError is one, too
        raise RunError(
            expected(str(folder / NAME), "room to write it", f"{error} (an older checkpoint was kept)")
        ) from error


def _check(path: Path, saved: dict[str, Any], config: Config) -> None:
    try:
        known, options = dict(saved["facts"]), dict(saved["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(expected(str(path), "a file of this version", "another one (see --restart)")) from error
    differs = config.same_run(options)
    for name, value in facts().items():
        if known.get(name) != value:
            differs = expected(name, f"{known.get(name)}, as in that run", value)
    if differs:
        raise RunError(
            f"{differs}. {path} is of another run: give its options, another --out, or --restart to begin anew"
        )


def load(folder: Path, config: Config) -> dict[str, Any] | None:
    """The checkpoint in a folder, or None. Raises RunError for one that is damaged or of another run."""
    path = folder / NAME
    if not path.exists():
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            if (member := archive.testzip()) is not None:  # torch itself does not look at the checksums
                raise ValueError(f"{member} is damaged")
        saved = torch.load(path, weights_only=True)
    except (OSError, RuntimeError, EOFError, KeyError, ValueError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        raise RunError(
            expected(str(path), "a readable checkpoint", f"{type(error).__name__} (see --restart)")
        ) from error
    _check(path, saved, config)
    return saved


def finished(config: Config) -> dict[str, Any] | None:
    """The result of this very run where it is complete, or None. Raises RunError for the result of another run."""
    path = Path(config.out) / "result.json"
    try:
        result = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise RunError(expected(str(path), "a readable result", f"{error} (see --restart)")) from error
    _check(path, result, config)
    return result
