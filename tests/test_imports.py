"""Imports run one way: the contracts of pyproject.toml hold, and what breaks them is refused."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("importlinter")
ROOT = Path(__file__).parents[1]


def lint(folder):
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    return subprocess.run([sys.executable, "-c", code, "--no-cache"], cwd=folder, capture_output=True, text=True)


@pytest.fixture
def copy(tmp_path):
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(ROOT / "sparsebreg", tmp_path / "sparsebreg", ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_contracts_hold(copy):
    done = lint(copy)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [
        ("core/errors.py", "import sparsebreg.training", "Packages import those below them only BROKEN"),
        ("optim/base.py", "import sparsebreg.nn.layer", "Packages import those below them only BROKEN"),
        ("core/errors.py", "import sparsebreg.core.pattern", "No import circle inside of a package BROKEN"),
    ],
    ids=["upwards", "sideways", "circle"],
)
def test_breaches_are_refused(copy, file, line, contract):
    path = copy / "sparsebreg" / file
    path.write_text(path.read_text() + f"\n{line}\n")
    done = lint(copy)
    assert done.returncode != 0
    assert contract in done.stdout
