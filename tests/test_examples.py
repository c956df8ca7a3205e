"""The scripts in examples/ run as they are and do what they say."""

import runpy
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda name: runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_own_training_loop(run, capsys):
    scope = run("own_training_loop.py")
    assert scope["accuracy"] > 0.8
    assert scope["sparsity"] > 0.85
    assert isinstance(scope["model"][2], torch.nn.Linear)
    assert "test accuracy" in capsys.readouterr().out


def test_finetune_pruned_model(run):
    scope = run("finetune_pruned_model.py")
    assert scope["sparsity"] == pytest.approx(0.95, abs=1e-3)  # no zero moved
    assert scope["tuned"] > scope["pruned"]
    assert scope["tuned"] > 0.85
    assert len(scope["report"].sparse) == 3


def test_swap_pretrained_model(run, tmp_path):
    scope = run("swap_pretrained_model.py")
    assert [r.action for r in scope["report"].layers] == ["sparse"] * 4 + ["dense"]
    saved = torch.load(tmp_path / "model.pt", weights_only=True)
    assert saved.keys() == scope["model"].state_dict().keys()
    assert (saved["0.up.weight"] != 0).float().mean() == pytest.approx(0.05, abs=1e-3)
    assert type(scope["model"][0].up) is torch.nn.Linear


def test_every_example_is_run():
    text = Path(__file__).read_text()
    assert all(f'"{p.name}"' in text for p in EXAMPLES.glob("*.py"))
