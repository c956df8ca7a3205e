"""The report: numbers against a plain computation, one file without the network, folders with all kinds of content."""

import csv
import json
import re
import statistics
from html.parser import HTMLParser

import numpy as np
import pytest

from sparsebreg.core.errors import RunError
from sparsebreg.experiments import cli
from sparsebreg.experiments.runs import plots
from sparsebreg.experiments.runs.report import comparisons, report
from sparsebreg.experiments.runs.summary import HEAD, SHARED, cells, row, table

CONFIG = {"data": "digits", "model": "mlp", "coarse_steps": None, "lam": None, "batch_size": 128}


def fake(
    folder,
    method="sgd",
    seed=0,
    accuracy=90.0,
    seconds=10.0,
    density=1.0,
    flops=1.0,
    layers=("1", "3"),
    data_seconds=None,
    **config,
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
        "memory_format": "channels_last" if seed else "contiguous",
        "command": f"sparsebreg train --method {method} --seed {seed}",
        "info": {"cpu": "A <fast> & small CPU", "cpus": 2, "machine": "Linux x86_64", "threads": 2, "backend": "native",
                 "isa": "avx2", "torch": "2.13.0", "python": "3.11.7", "version": "0.1.0"},
    }  # fmt: skip
    if data_seconds is not None:
        result["data_seconds"] = data_seconds
    (folder / "result.json").write_text(json.dumps(result))
    np.savez(folder / "steps.npz", phase=phase.astype(np.uint8), seconds=np.full(40, 0.01, np.float32))
    kind = "validation" if options.get("validation") else "test"
    with open(folder / "history.csv", "w", newline="") as file:
        rows = [
            {"epoch": e, "steps": 20 * e, "train_loss": 1 / e, f"{kind}_accuracy": accuracy - 2 + e, "density": density,
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
        self.rows, self.ids, self.references, self.tags, self.open, self.drawings = [], [], [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "svg":
            self.drawings.append(dict(attrs))
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
    assert all(d["role"] == "img" and ": " in d["aria-label"] for d in page.drawings)
    assert page.drawings[0]["aria-label"] == "test accuracy (%) against training time (s): sgd, ml-linbreg"
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
    labels = [row[0] for row in Page(text).rows if len(row) == len(HEAD)]
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
    whole = json.loads((path / "result.json").read_text())
    damaged = (b"{", b"{}", b"[]", b"null", b"3", json.dumps({**whole, "config": None}).encode())
    for name, content in (*(("result.json", d) for d in damaged), ("history.csv", b""), ("steps.npz", b"PK")):
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


def test_time_of_the_data_is_a_part_of_its_own(tmp_path):
    fake(tmp_path / "sgd")  # of before it was measured
    fake(tmp_path / "ml", "ml-linbreg", density=0.05, coarse_steps=9, data_seconds=2.0)
    report(tmp_path)
    text = (tmp_path / "report.html").read_text()
    rows = [r for r in Page(text).rows if len(r) == 6][:3]
    # 36 of 40 steps are coarse.
    assert rows == [
        ["method", "fine steps s", "coarse steps s", "data s", "evaluation s", "checkpoints s"],
        ["sgd", "5.00", "5.00", "-", "1.50", "0.50"],
        ["ml-linbreg", "4.80", "3.20", "2.00", "1.50", "0.50"],
    ]
    assert "wall-clock time (s): fine steps, coarse steps, data, evaluation, checkpoints" in text
    for page in (text, (tmp_path / "report.md").read_text()):
        assert "taken out of fine and coarse steps in equal shares" in page


def test_runs_one_by_one(runs):
    report(runs)
    page = Page((runs / "report.html").read_text())
    assert ["sgd", "0", "90.00", "0.0", "10.00", "contiguous"] in page.rows
    assert ["ml-linbreg", "1", "90.00", "95.0", "5.00", "channels_last"] in page.rows
    text = (runs / "report.md").read_text()
    assert re.search(r"\| ml-linbreg +\| +1 +\| +90.00 +\| +95.0 +\| +5.00 +\| +channels_last +\|", text)
    assert "equal shares" not in text  # nothing is known of the data's time
    assert "curves.png" not in text


def svg_texts(svg):
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


def test_colours_that_begin_again_come_with_other_lines():
    rows = [{"epoch": 1, "y": 2}, {"epoch": 2, "y": 1}]

    def draw(n):
        runs = {f"m{i}": [rows] for i in range(n)}
        return plots.lines("x", runs, lambda r: r["epoch"], lambda r: r["y"], xlabel="epoch", ylabel="y")

    assert "stroke-dasharray" not in draw(7)
    assert "stroke-dasharray" in draw(8)
    assert set(svg_texts(draw(16))) >= {f"m{i}" for i in range(16)}


def history(**density):
    """Rows of history.csv; densities of a layer at the ends of the epochs."""
    return [
        {"epoch": str(e + 1), **{f"density.{n}": str(v) for n, v in zip(density, values, strict=True)}}
        for e, values in enumerate(zip(*density.values(), strict=True))
    ]


def test_layers_can_be_told_apart():
    few = {f"conv{i}": (0.5, 0.1) for i in range(10)}  # all end at the same height
    drawing = plots.layers("x", history(**few))
    assert set(svg_texts(drawing)) >= set(few)
    heights = sorted(float(y) for y in re.findall(r'<text[^>]*? y="([\d.]+)"[^>]*>conv\d</text>', drawing))
    assert min(np.diff(heights)) > 8  # the size of the letters
    many = {f"layer{i}": (0.5, 0.1 + i / 100) for i in range(21)}
    drawing = plots.layers("x", history(**many))
    assert [t for t in svg_texts(drawing) if t.startswith("layer")] == ["layer0", "layer20"]
    assert {"(first layer)", "(last layer)"} <= set(svg_texts(drawing))
    assert "<image" not in drawing


@pytest.mark.parametrize("n", [3, 12])
def test_layers_that_died_out_are_named(n):
    densities = {f"layer{i}": (0.5, 0.1, 0.05) for i in range(n)}
    assert not {"none"} & set(svg_texts(plots.layers("x", history(**densities))))
    densities |= {"layer1": (0.5, 0.0, 0.0), "layer2": (0.5, 0.0, 0.2)}
    drawing = plots.layers("x", history(**densities))
    assert {"none", "no active weight at the end: layer1"} <= set(svg_texts(drawing))
    nothing = plots.layers("x", history(a=(0.0, 0.0), b=(0.0, 0.0)))
    assert "no active weight at the end: a, b" in svg_texts(nothing)


@pytest.mark.parametrize("key", SHARED)
def test_baseline_is_an_sgd_run_of_the_same_kind(tmp_path, key):
    options = {"epochs": 5, "batch_size": 128, "threads": 2, "augment": False, "validation": 0.0}
    other = {"epochs": 6, "batch_size": 64, "threads": 1, "augment": True, "validation": 0.1}
    fake(tmp_path / "sgd", seconds=10, **options)
    fake(tmp_path / "ml", "ml-linbreg", seconds=4, density=0.05, **options)
    fake(tmp_path / "adabreg", "adabreg", seconds=4, density=0.05, **{**options, key: other[key]})
    results = [json.loads((tmp_path / m / "result.json").read_text()) for m in ("sgd", "ml", "adabreg")]
    assert [c[5] for c in cells([row([r]) for r in results])] == ["1.00", "0.40", "-"]


def test_baseline_is_the_fastest_and_old_rows_have_one(tmp_path):
    fake(tmp_path / "a", seconds=10, lr=0.1)
    fake(tmp_path / "b", seconds=8, lr=0.05)
    fake(tmp_path / "c", "ml-linbreg", seconds=4)
    rows = [row([json.loads((tmp_path / m / "result.json").read_text())]) for m in "abc"]
    assert [c[5] for c in cells(rows)] == ["1.25", "1.00", "0.50"]
    old = [{k: v for k, v in r.items() if k not in SHARED} for r in rows]
    assert table(old) == table(rows)


def test_command_of_the_comparison(runs):
    fake(runs / "b" / "x", "sgd", data="mnist", model="convnet")
    command = 'sparsebreg compare --methods sgd,ml-linbreg --out "a b"'
    (runs / "a" / "comparison.toml").write_text(f"command = '{command}'\nepochs = 5\n")
    report(runs)
    text = (runs / "report.md").read_text()
    digits, mnist = text.split("## mnist")
    assert f"# all runs\n{command}\n# one by one\nsparsebreg train --method sgd --seed 0\n" in digits
    assert command not in mnist
    assert "--out &#34;a b&#34;" in (runs / "report.html").read_text()
    (runs / "a" / "comparison.toml").write_text("epochs = 5\n")  # says nothing of it
    assert comparisons(runs) == {}
    (runs / "a" / "comparison.toml").write_bytes(b"command = ")
    with pytest.raises(RunError, match="comparison.toml: expected a readable TOML file"):
        report(runs)


def test_accuracy_of_other_splits_is_not_mixed_up(tmp_path):
    fake(tmp_path / "ml", "ml-linbreg", density=0.05, validation=0.1)
    report(tmp_path)
    assert "validation accuracy (%)" in (tmp_path / "report.html").read_text()
    fake(tmp_path / "sgd")
    report(tmp_path)
    page = Page((tmp_path / "report.html").read_text())
    for drawing in page.drawings[:2]:
        assert drawing["aria-label"].startswith("accuracy (%) against ")
        assert drawing["aria-label"].endswith(": sgd, test, ml-linbreg, validation")
    assert page.drawings[2]["aria-label"] == "training loss against epoch: sgd, ml-linbreg"


def test_markdown_shows_the_picture_that_is_there(runs):
    (runs / "curves.png").write_bytes(b"")
    report(runs)
    assert "](curves.png)" in (runs / "report.md").read_text()
