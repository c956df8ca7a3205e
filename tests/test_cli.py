"""The command line, end to end on digits and on small IDX files."""

import csv
import json
import subprocess
import sys

import pytest
import torch
from test_data import write

import sparsebreg as sb
from sparsebreg.experiments import cli, train

KEYS = [
    "method",
    "model",
    "data",
    "seed",
    "epochs",
    "coarse_steps",
    "lam",
    "test_accuracy",
    "density",
    "sparsity",
    "train_seconds",
    "seconds_per_coarse_step",
    "seconds_per_fine_step",
    "flops_fraction_of_sgd",
    "backend",
    "isa",
    "threads",
    "peak_rss_mb",
]


def main(*words):
    return cli.main([str(w) for w in words])


@pytest.mark.parametrize("method", train.METHODS)
def test_train_on_digits(method, tmp_path, capsys):
    out = tmp_path / "a" / "run"
    assert main("train", "--data", "digits", "--method", method, "--epochs", 6, "--out", out) == 0
    result = json.loads((out / "result.json").read_text())
    assert all(key in result for key in KEYS)
    assert result["test_accuracy"] > 80
    assert result["train_seconds"] > 0
    assert result["sparsity"] == pytest.approx(1 - result["density"])
    assert result["peak_rss_mb"] > 50
    assert result["threads"] == torch.get_num_threads()
    assert result["backend"] == sb.info().backend
    if method == "sgd":
        assert result["density"] == 1
        assert result["flops_fraction_of_sgd"] == 1
    else:
        assert result["sparsity"] > 0.5
        assert result["flops_fraction_of_sgd"] < 1 or method == "linbreg"
    assert (result["seconds_per_coarse_step"] is not None) == method.startswith("ml-")
    with open(out / "history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(r["epoch"]) for r in rows] == [1, 2, 3, 4, 5, 6]
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    assert (out / "curves.png").read_bytes()[:4] == b"\x89PNG"
    checkpoint = torch.load(out / "checkpoint.pt", weights_only=True)
    model = sb.models.mlp((1, 8, 8))
    model.load_state_dict(checkpoint["model"])
    printed = capsys.readouterr().out
    assert f"{result['test_accuracy']:.2f} %" in printed
    assert str(out / "curves.png") in printed


def test_same_seed_same_run(tmp_path, one_thread):
    for name in ("a", "b"):
        assert main("train", "--epochs", 2, "--coarse-steps", 5, "--quiet", "--out", tmp_path / name) == 0
    a, b = (torch.load(tmp_path / n / "checkpoint.pt", weights_only=True)["model"] for n in ("a", "b"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_convnet_on_idx_files(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    write(data, zipped=True)
    out = tmp_path / "run"
    assert main("train", "--data", "mnist", "--data-dir", data, "--model", "convnet", "--epochs", 2, "--out", out) == 0
    assert json.loads((out / "result.json").read_text())["model"] == "convnet"


def test_compare(tmp_path, capsys):
    out = tmp_path / "c"
    assert main("compare", "--methods", "sgd,ml-linbreg", "--seeds", "0,1", "--epochs", 2, "--lam", 0.1,
                "--coarse-steps", 5, "--quiet", "--out", out) == 0  # fmt: skip
    printed = capsys.readouterr().out
    for part in ("sgd", "ml-linbreg", "sparsity", "of sgd", " ± ", str(out / "curves.png")):
        assert part in printed
    rows = json.loads((out / "comparison.json").read_text())
    assert [r["runs"] for r in rows] == [2, 2]
    result = json.loads((out / "ml-linbreg-seed1" / "result.json").read_text())
    assert (result["lam"], result["coarse_steps"], result["seed"]) == (0.1, 5, 1)
    assert json.loads((out / "sgd-seed0" / "result.json").read_text())["lam"] is None
    assert (out / "curves.png").exists()


def test_info_as_a_module():
    done = subprocess.run([sys.executable, "-m", "sparsebreg", "info"], capture_output=True, text=True, check=True)
    assert f"sparsebreg:      {sb.__version__}" in done.stdout
    assert "backend:" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--method", "adam"), "method: expected one of sgd, linbreg, ml-linbreg.*, got 'adam'"),
        (("--model", "gpt"), "model: expected one of mlp, convnet.*, got 'gpt'"),
        (("--data", "svhn"), "data: expected one of digits, fashion-mnist, mnist.*, got 'svhn'"),
        (("--data", "mnist", "--data-dir", "nowhere"), "data_dir: expected a folder, got nowhere"),
        (("--epochs", "0"), "epochs: expected an integer of at least 1, got 0"),
        (("--lam", "nan"), "lam: expected a finite number of at least 0, got nan"),
        (("--lr", "inf"), "lr: expected a finite number"),
        (("--coarse-steps", "-3"), "coarse_steps: expected an integer of at least 0, got -3"),
        (("--method", "sgd", "--lam", "0.1"), "lam: expected no value for the method sgd, got 0.1"),
        (("--init-density", "0"), "init_density: expected a finite number above 0"),
        (("--model", "convnet"), "in_shape: expected images of at least 16 x 16, got 8 x 8"),
        (("--threads", "0"), "threads: expected an integer of at least 1"),
    ],
)
def test_bad_options_are_told_and_write_nothing(words, message, tmp_path, capsys):
    out = tmp_path / "run"
    assert main("train", "--quiet", "--out", out, *words) == 1
    error = capsys.readouterr().err
    assert error.startswith("sparsebreg: error: ")
    import re

    assert re.search(message, error)
    assert not out.exists()


def test_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert main("train", "--quiet", "--out", tmp_path / "file" / "run") == 1
    assert "out: expected a folder that can be written" in capsys.readouterr().err


def test_unknown_backend_is_told(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SPARSEBREG_BACKEND", "cuda")
    assert main("train", "--quiet", "--out", tmp_path / "run") == 1
    assert "SPARSEBREG_BACKEND: expected one of native, numba, reference, got 'cuda'" in capsys.readouterr().err


def test_diverging_run_stops(tmp_path, capsys):
    assert main("train", "--quiet", "--method", "sgd", "--lr", "1e6", "--epochs", 3, "--out", tmp_path / "run") == 1
    assert "loss: expected a finite number" in capsys.readouterr().err
    assert not (tmp_path / "run" / "result.json").exists()
