"""The report: numbers against a plain computation, one file without the network, folders with all kinds of content."""

import csv
import json
import re
import statistics
from html.parser import HTMLParser

import numpy as np
import pytest

from sparsebreg.errors import RunError
from sparsebreg.experiments import cli
from sparsebreg.experiments.report import report

CONFIG = {"data": "digits", "model": "mlp", "coarse_steps": None, "lam": None, "batch_size": 128}


def fake(
    folder, method="sgd", seed=0, accuracy=90.0, seconds=10.0, density=1.0, flops=1.0, layers=("1", "3"), **config
):
    """The files of a finished run."""
    folder.mkdir(parents=True)
    options = {**CONFIG, "method": method, "seed": seed, "out": str(folder), **config}
    coarse = method.startswith("ml-")
    phase = np.arange(40) % 10 != 0 if coarse else np.zeros(40, bool)
    result = {
        **{k: options[k] for k in ("method", "model", "data", "seed", "lam", "coarse_steps")},
        "test_accuracy": accuracy, "validation_accuracy": None, "density": density, "sparsity": 1 - density,
        "train_seconds": seconds, "fine_seconds": seconds / 2, "coarse_seconds": seconds / 2, "evaluation_seconds": 1.5,
        "checkpoint_seconds": 0.5, "seconds_per_fine_step": 0.02, "seconds_per_coarse_step": 0.005 if coarse else None,
        "flops_fraction_of_sgd": flops, "peak_rss_mb": 300.0, "config": options,
        "command": f"sparsebreg train --method {method} --seed {seed}",
        "info": {"cpu": "A <fast> & small CPU", "cpus": 2, "machine": "Linux x86_64", "threads": 2, "backend": "native",
                 "isa": "avx2", "torch": "2.13.0", "python": "3.11.7", "version": "0.1.0"},
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result))
    np.savez(folder / "steps.npz", phase=phase.astype(np.uint8), seconds=np.full(40, 0.01, np.float32))
    with open(folder / "history.csv", "w", newline="") as file:
        rows = [
            {"epoch": e, "steps": 20 * e, "train_loss": 1 / e, "test_accuracy": accuracy - 2 + e, "density": density,
             "train_seconds": seconds * e / 2, "flops": 1e13 * flops * e, **{f"density.{n}": density for n in layers}}
            for e in (1, 2)
        ]  # fmt: skip
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def runs(tmp_path):
    for seed, (a, s) in enumerate([(90.0, 10.0), (92.0, 14.0), (91.0, 12.0)]):
        fake(tmp_path / "a" / f"sgd-{seed}", seed=seed, accuracy=a, seconds=s)
    for seed, (a, s) in enumerate([(89.0, 3.0), (90.0, 5.0)]):
        fake(tmp_path / "a" / f"ml-{seed}", "ml-linbreg", seed, a, s, density=0.05, flops=0.07, coarse_steps=9, lam=0.1)
    return tmp_path


class Page(HTMLParser):
    """Tables, ids, references and tags of a page; checks that tags close in order."""

    VOID = ("meta", "br", "hr", "img", "link", "input")

    def __init__(self, text):
        super().__init__()
        self.rows, self.ids, self.references, self.tags, self.open = [], [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href"):
                self.references.append(value)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1].append(text)


def test_numbers(runs):
    paths = report(runs)
    assert [p.name for p in paths] == ["report.html", "report.md", "report.csv"]
    with open(runs / "report.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["label"], r["runs"]) for r in rows] == [("sgd", "3"), ("ml-linbreg", "2")]
    assert float(rows[0]["test_accuracy"]) == statistics.mean([90, 92, 91])
    assert float(rows[0]["test_accuracy_std"]) == pytest.approx(statistics.stdev([90, 92, 91]))
    assert float(rows[1]["train_seconds"]) == statistics.mean([3, 5])
    page = Page((runs / "report.html").read_text())
    assert page.rows[0][:3] == ["method", "runs", "test accuracy %"]
    assert page.rows[1] == ["sgd", "3", "91.00 ± 1.00", "0.0 ± 0.0", "12.00 ± 2.00", "1.00", "1.00", "20.00", "-"]
    assert page.rows[2] == [
        "ml-linbreg", "2", "89.50 ± 0.71", "95.0 ± 0.0", "4.00 ± 1.41", "0.33", "0.07", "20.00", "5.00",
    ]  # fmt: skip
    text = (runs / "report.md").read_text()
    for cell in page.rows[2]:
        assert f" {cell} |" in text
    assert "sparsebreg train --method ml-linbreg --seed 1" in text


def test_page_stands_alone(runs):
    report(runs)
    text = (runs / "report.html").read_text()
    page = Page(text)
    assert page.tags.count("svg") == 7  # five of the task, layers and steps of ml-linbreg
    assert 'name="viewport" content="width=device-width' in text
    assert "@media print" in text
    assert "prefers-color-scheme: dark" in text
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert all(r.startswith("#") for r in page.references)
    assert "@import" not in text
    assert all(u.startswith("#") for u in re.findall(r"url\(([^)]*)\)", text))
    # Drawings share one page: ids differ, and every reference finds its own.
    assert len(set(page.ids)) == len(page.ids)
    assert {r[1:] for r in page.references} <= set(page.ids)
    assert {u[1:] for u in re.findall(r"url\(([^)]*)\)", text)} <= set(page.ids)
    assert "A &lt;fast&gt; &amp; small CPU" in text
    for axis in ("training time (s)", "test accuracy (%)", "floating-point operations (10¹²)", "time of the step (ms)",
                 "active weights (%)", "wall-clock time (s)", "fine step", "coarse step", "evaluation"):  # fmt: skip
        assert axis in text
    first = text
    report(runs)
    assert (runs / "report.html").read_text() == first  # the same runs, the same page


def test_several_tasks_and_options(runs):
    fake(runs / "b" / "x", "ml-linbreg", 0, 80.0, 2.0, density=0.1, coarse_steps=19, lam=0.1)
    fake(runs / "b" / "y", "sgd", 0, data="mnist", model="convnet", layers=[str(i) for i in range(20)], density=0.5)
    (runs / "c").mkdir()
    (runs / "c" / "checkpoint.pt").write_bytes(b"")
    report(runs)
    text = (runs / "report.html").read_text()
    labels = [row[0] for row in Page(text).rows]
    assert labels[:6] == [
        "method",
        "sgd",
        "ml-linbreg (coarse_steps 9)",
        "ml-linbreg (coarse_steps 19)",
        "method",
        "sgd",
    ]
    assert "digits · mlp" in text
    assert "mnist · convnet" in text
    assert re.search(r"Not finished</h2>\s*<p>c</p>", text)
    assert "Not finished: c" in (runs / "report.md").read_text()


def test_without_a_baseline(tmp_path):
    fake(tmp_path / "run", "ml-linbreg", density=0.05, flops=0.1)
    report(tmp_path / "run")  # the folder of one run
    assert Page((tmp_path / "run" / "report.html").read_text()).rows[1][5] == "-"


def test_bad_folders(runs, tmp_path, capsys):
    assert cli.main(["report", str(tmp_path / "nowhere")]) == 1
    assert "folder: expected a folder with results of train or compare" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match="folder: expected a result.json somewhere below, got none"):
        report(tmp_path / "empty")
    path = runs / "a" / "sgd-1"
    for name, content in (("result.json", b"{"), ("result.json", b"{}"), ("history.csv", b""), ("steps.npz", b"PK")):
        before = (path / name).read_bytes()
        (path / name).write_bytes(content)
        with pytest.raises(RunError, match="sgd-1: expected the files of a finished run"):
            report(runs)
        (path / name).write_bytes(before)
    (path / "steps.npz").unlink()
    with pytest.raises(RunError, match="sgd-1: expected the files of a finished run"):
        report(runs)
    assert not list(runs.glob("report.*"))


def test_report_of_real_runs(tmp_path, capsys):
    for method in ("sgd", "ml-linbreg"):
        words = ["train", "--method", method, "--epochs", "1", "--quiet", "--out", str(tmp_path / method)]
        assert cli.main(words) == 0
    assert cli.main(["report", str(tmp_path)]) == 0
    assert str(tmp_path / "report.html") in capsys.readouterr().out
    page = Page((tmp_path / "report.html").read_text())
    results = [json.loads((tmp_path / m / "result.json").read_text()) for m in ("sgd", "ml-linbreg")]
    for line, result in zip(page.rows[1:3], results, strict=True):
        assert line[0] == result["method"]
        assert line[2] == f"{result['test_accuracy']:.2f}"
        assert line[5] == f"{result['train_seconds'] / results[0]['train_seconds']:.2f}"
