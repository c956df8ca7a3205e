"""The paper's models on tiny files in the published formats, from the files to the report; the README about it."""

import csv
import math
import re
import shlex
from functools import partial
from pathlib import Path

import pytest
from datafiles import write_cifar, write_tiny

from sparsebreg.experiments.runs.config import Config, read_toml
from sparsebreg.experiments.runs.methods import METHODS
from sparsebreg.experiments.runs.report import report
from sparsebreg.experiments.runs.train import train
from sparsebreg.models import MODELS

#: A data set of 30 training images in a form as published: its name and what --data-dir is told.
FORMS = {
    "cifar10-python": lambda root: ("cifar10", write_cifar(root, "archive", False)),
    "cifar10-binary": lambda root: ("cifar10", write_cifar(root, "folder", True)),
    "tiny-imagenet": lambda root: ("tiny-imagenet", write_tiny(root, size=64, each=10)),
}

CASES = [(form, model, "ml-linbreg", False) for form in FORMS for model in ("resnet18", "vgg16")]
CASES += [("cifar10-python", "resnet18", "sgd", True)]


@pytest.mark.parametrize(("form", "model", "method", "augment"), CASES)
def test_from_the_files_to_the_report(form, model, method, augment, tmp_path, one_thread, monkeypatch):
    monkeypatch.setitem(MODELS, model, partial(MODELS[model], channels=8))  # narrow: seconds instead of minutes
    data, data_dir = FORMS[form](tmp_path)
    config = Config(
        data=data, data_dir=str(data_dir), model=model, method=method, out=str(tmp_path / "runs" / method), epochs=1,
        batch_size=16, augment=augment, threads=1, memory_format="contiguous",
    )  # fmt: skip
    result = train(config)
    assert math.isfinite(result["train_loss"])
    done = (result["steps"], result["fine_steps"], result["coarse_steps"])
    if method == "sgd":
        assert done == (2, 2, None)
        assert result["density"] > 0.99
    else:
        assert done == (2, 1, 99)
        assert 0 < result["density"] < 0.1
    page, text, table = report(tmp_path / "runs")
    assert f"{data} · {model}" in page.read_text()
    assert f"{data} · {model}" in text.read_text()
    assert result["command"] in text.read_text()
    with open(table, newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["method"], float(row["test_accuracy"])) == (method, result["test_accuracy"])


@pytest.mark.parametrize(("model", "default"), [("mlp", False), ("convnet", True)])
@pytest.mark.parametrize("keep", [None, True, False])
def test_momentum_of_sleeping_weights(keep, model, default):
    config = Config(method="ml-linbreg", model=model, keep_momentum=keep).resolved()
    optimizer, _ = METHODS["ml-linbreg"].build(MODELS[model]((1, 28, 28)), config, 10)
    assert [group["keep_momentum"] for group in optimizer.param_groups] == [default if keep is None else keep] * 2


def test_models_with_batch_norm_start_alike():
    models = ("resnet18", "vgg16", "wide_resnet28_10")
    for target, lam, start in ((None, 0.2, 0.02), (0.9, 0.01, 0.095)):
        found = [Config(model=m, method="ml-linbreg", target_sparsity=target).resolved() for m in models]
        wanted = {(0.5, 4.0, lam, 99, start, True)}
        assert {(c.lr, c.sparse_lr, c.lam, c.coarse_steps, c.init_density, c.per_layer) for c in found} == wanted


def test_readme_on_the_experiment(tmp_path):
    """The command and the file there are one comparison, with the numbers that the text gives."""
    text = (Path(__file__).parents[3] / "README.md").read_text()
    section = text.split("## The paper's experiment, your data\n")[1].split("\n## ")[0]
    command, toml = (re.search(rf"```{kind}\n(.*?)```", section, re.DOTALL)[1] for kind in ("sh", "toml"))
    words = shlex.split(command.replace("\\\n", ""))
    assert words[:2] == ["sparsebreg", "compare"]
    pairs = zip(words[2::2], words[3::2], strict=True)
    told = {flag.removeprefix("--").replace("-", "_"): value for flag, value in pairs}
    (tmp_path / "file.toml").write_text(toml)
    saved = read_toml(tmp_path / "file.toml", ("methods", "seeds"))
    assert {k: ",".join(map(str, v)) if isinstance(v, list) else v for k, v in saved.items()} == told
    shared = {k: v for k, v in saved.items() if k not in ("methods", "seeds")}
    for method in saved["methods"]:
        c = Config(**shared, method=method).resolved()
        assert (c.epochs, c.batch_size, c.augment, c.schedule) == (200, 128, True, "cosine")
        assert c.coarse_steps == (99 if method == "ml-linbreg" else None)
