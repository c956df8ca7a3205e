"""The README's Python blocks run, one after another."""

import re
from pathlib import Path

import torch


def test_examples_run(monkeypatch):
    text = (Path(__file__).parent.parent / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 2
    scope = {}
    for block in blocks:
        exec(block.replace("range(100)", "range(3)"), scope)  # the same code, three batches
    assert isinstance(scope["model"][1], torch.nn.Linear)
    assert len(scope["report"].layers) == 3
