"""The command line, end to end on digits and on small IDX files."""

import csv
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from datafiles import write

import sparsebreg as sb
from sparsebreg.experiments import cli
from sparsebreg.experiments.data import datasets as data
from sparsebreg.experiments.runs import methods, train
from sparsebreg.experiments.runs.compare import plan
from sparsebreg.experiments.runs.config import Config, read_toml
from sparsebreg.experiments.runs.methods import METHODS
from sparsebreg.swap.inspect import iter_weights

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


@pytest.mark.parametrize("method", METHODS)
def test_train_on_digits(method, tmp_path, capsys):
    out = tmp_path / "a" / "run"
    assert main("train", "--data", "digits", "--method", method, "--epochs", 6, "--out", out) == 0
    result = json.loads((out / "result.json").read_text())
    assert all(key in result for key in KEYS)
    assert result["test_accuracy"] > (80 if method in ("sgd", "linbreg", "ml-linbreg") else 40)  # ten classes
    assert result["train_seconds"] > 0
    assert result["sparsity"] == pytest.approx(1 - result["density"])
    assert result["peak_rss_mb"] > 50
    assert result["threads"] == torch.get_num_threads()
    assert result["backend"] == sb.info().backend
    if method == "sgd":
        assert result["density"] == 1
        assert result["flops_fraction_of_sgd"] == 1
    else:
        assert result["sparsity"] > (0.1 if method == "proxsgd" else 0.5)
        assert result["flops_fraction_of_sgd"] < 0.9
    if method in ("rigl", "set", "prune"):
        assert result["sparsity"] == pytest.approx(0.95, abs=0.005)
    frozen = method.startswith("ml-") or method in ("rigl", "set", "prune")
    assert (result["seconds_per_coarse_step"] is not None) == frozen
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
    files = tmp_path / "data"
    files.mkdir()
    write(files, zipped=True)
    out = tmp_path / "run"
    assert main("train", "--data", "mnist", "--data-dir", files, "--model", "convnet", "--epochs", 2, "--out", out) == 0
    assert json.loads((out / "result.json").read_text())["model"] == "convnet"


def test_compare(tmp_path, capsys):
    out = tmp_path / "c"
    words = ("compare", "--methods", "sgd,ml-linbreg", "--seeds", "0,1", "--epochs", 1, "--lam", 0.1,
             "--coarse-steps", 5, "--out", out)  # fmt: skip
    assert main(*words) == 0
    printed = capsys.readouterr()
    for part in ("sgd", "ml-linbreg", "sparsity", "of sgd", " ± ", str(out / "curves.png"), str(out / "report.html")):
        assert part in printed.out
    assert "run 4 of 4: digits mlp ml-linbreg seed 1" in printed.err
    assert not any(part in printed.err for part in ("Traceback", "\r", "\x1b"))
    rows = json.loads((out / "comparison.json").read_text())
    assert [r["runs"] for r in rows] == [2, 2]
    runs = out / "digits-mlp"
    results = [json.loads((runs / f"ml-linbreg-seed{k}" / "result.json").read_text()) for k in (0, 1)]
    assert (results[1]["lam"], results[1]["coarse_steps"], results[1]["seed"]) == (0.1, 5, 1)
    accuracy = [r["test_accuracy"] for r in results]
    assert rows[1]["test_accuracy"] == pytest.approx(sum(accuracy) / 2)
    assert rows[1]["test_accuracy_std"] == pytest.approx(abs(accuracy[0] - accuracy[1]) / 2**0.5)
    assert json.loads((runs / "sgd-seed0" / "result.json").read_text())["lam"] is None
    assert (out / "curves.png").exists()
    # Once more: what is finished is not repeated, what is missing is made.
    (runs / "sgd-seed1" / "result.json").unlink()
    times = {p: p.stat().st_mtime_ns for p in runs.glob("*/result.json")}
    assert main(*words) == 0
    assert len(times) == 3
    assert all(p.stat().st_mtime_ns == t for p, t in times.items())
    assert json.loads((out / "comparison.json").read_text())[1] == rows[1]


def test_tasks_of_a_comparison(tmp_path):
    base = Config(out=str(tmp_path), data_dir="files", lam=0.2, target_sparsity=None)
    configs = plan(base, ["sgd", "ml-linbreg"], [0, 3], ["mlp", "convnet"], ["mnist", "cifar10"])
    assert len(configs) == 16
    c = configs["cifar10", "convnet", "ml-linbreg", 3]
    assert c.out == str(tmp_path / "cifar10-convnet" / "ml-linbreg-seed3")
    assert c.data_dir == str(Path("files") / "cifar10")
    assert (c.epochs, c.batch_size, c.coarse_steps, c.augment, c.lam) == (200, 128, 99, True, 0.2)
    assert (configs["mnist", "mlp", "sgd", 0].lam, configs["mnist", "mlp", "sgd", 0].epochs) == (None, 5)
    # Every run's own words give the same run again.
    for config in configs.values():
        args = cli._parser().parse_args(["train", *config.arguments()])
        assert Config(**cli._options(args)).resolved() == config


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--methods", "sgd,adam"), "methods: expected one of sgd, .*, got 'adam'"),
        (("--model", "mlp,gpt"), "models: expected one of mlp, .*, got 'gpt'"),
        (("--seeds", "0,x"), r"seeds: expected numbers, got \['0', 'x'\]"),
        (("--seeds", ""), "seeds: expected at least one, got none"),
        (("--seeds", "0,-1"), "seeds: expected an integer of at least 0, got -1"),
        (("--seeds", "0,0,1"), "seeds: expected every one once, got 0, 0, 1"),
        (("--methods", "sgd,rigl,sgd"), "methods: expected every one once, got sgd, rigl, sgd"),
        (("--model", "mlp,mlp"), "models: expected every one once, got mlp, mlp"),
        (("--model", "mlp,convnet"), r"models: expected some for the images of digits, got convnet \(in_shape"),
        (("--data", "digits,mnist", "--data-dir", "nowhere"), "data_dir: expected a folder, got nowhere/mnist"),
        (("--coarse-steps", "-1"), "coarse_steps: expected an integer of at least 0"),
    ],
)
def test_bad_comparisons_are_told(words, message, tmp_path, capsys):
    assert main("compare", "--quiet", "--out", tmp_path / "c", *words) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "c").exists()


def test_config_file(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(f'method = "sgd"\nepochs = 2\nlr = 0.02\nbatch-size = 64\nout = "{tmp_path / "run"}"\n')
    assert main("train", "--config", file, "--quiet", "--lr", 0.03, "--schedule", "step") == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["method"], result["epochs"], result["config"]["lr"]) == ("sgd", 2, 0.03)
    assert result["config"]["batch_size"] == 64
    with open(tmp_path / "run" / "history.csv", newline="") as rows:
        assert [int(r["steps"]) for r in csv.DictReader(rows)] == [23, 46]  # 1438 images
    # The file that the run wrote is the whole of it.
    saved = Config(**read_toml(tmp_path / "run" / "config.toml"))
    assert asdict(saved) == result["config"]
    assert main("train", "--config", tmp_path / "run" / "config.toml", "--quiet", "--out", tmp_path / "again") == 0
    again = json.loads((tmp_path / "again" / "result.json").read_text())
    assert again["train_loss"] == result["train_loss"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs = ", "config: expected a readable TOML file, got"),
        ("epoch = 3", "config: option in .*: expected one of data, .*, got 'epoch'"),
        ('epochs = "3"', "epochs: expected an integer, got '3'"),
        ('lam = "a"', "lam: expected a real number, got 'a'"),
        ("epochs = 3", "out: expected a folder for the results .--out., got none"),
        ('augment = 3\nout = "x"', "augment: expected true or false, got 3"),
        ('data = 3\nout = "x"', "data: expected one of digits, .*, got 3"),
        ("out = 3", "out: expected a path, got 3"),
    ],
)
def test_bad_config_files_are_told(text, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("c.toml").write_text(text)
    words = () if "out" in message or "out = " in text else ("--out", "x")
    assert main("train", "--quiet", "--config", "c.toml", *words) == 1
    assert re.search(message, capsys.readouterr().err)
    assert os.listdir() == ["c.toml"]


def test_missing_config_file(tmp_path, capsys):
    assert main("train", "--config", tmp_path / "no.toml", "--out", tmp_path / "x") == 1
    assert "config: expected a readable TOML file, got" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("schedule", "factor"),
    [
        ("constant", lambda t: 1),
        ("cosine", lambda t: (1 + math.cos(math.pi * t)) / 2),
        ("step", lambda t: 1 if t < 0.5 else 0.1 if t < 0.75 else 0.01),
    ],
)
def test_schedules(schedule, factor):
    config = Config(method="sgd", epochs=3, schedule=schedule, lr=0.2).resolved()
    run = train.Run(config, data.load("digits"))
    assert run.steps == 36
    for i in range(36):
        assert run.optimizer.param_groups[0]["lr"] == pytest.approx(0.2 * factor(i / 36))
        run.optimizer.step()
        run.schedule.step()


def test_warmup():
    config = Config(method="sgd", epochs=3, lr=0.2, warmup=0.5).resolved()
    run = train.Run(config, data.load("digits"))
    rates = []
    for _ in range(36):
        rates.append(run.optimizer.param_groups[0]["lr"])
        run.optimizer.step()
        run.schedule.step()
    full = [0.1 * (1 + math.cos(math.pi * i / 36)) for i in range(36)]
    assert rates == pytest.approx([f * min(1, (i + 1) / 6) for i, f in enumerate(full)])


def test_learning_rate_of_sparse_weights():
    config = Config(method="ml-linbreg", lr=0.5, sparse_lr=3.0).resolved()
    run = train.Run(config, data.load("digits"))
    for group in run.optimizer.param_groups:
        assert group["lr"] == (1.5 if group["reg"].sparse else 0.5)


def test_ramp_of_the_target():
    """From the sparsity of the start to the target in the first half of the run, evenly."""
    config = Config(method="ml-linbreg", target_sparsity=0.95, init_density=0.25, ramp=0.5, epochs=2).resolved()
    run = train.Run(config, data.load("digits"))
    assert run.lam.ramp_steps == run.steps // 2 > 1
    (start,) = run.lam.goals()
    assert start == pytest.approx(0.75, abs=0.02)
    for done in range(1, run.steps):
        run.lam.step()
        share = min(1, done / run.lam.ramp_steps)
        assert run.lam.goals() == pytest.approx([start + share * (0.95 - start)])
    assert train.Run(replace(config, ramp=0.0), data.load("digits")).lam.goals() == [0.95]


def test_targets_follow_the_distribution():
    """Layers too small for a pattern of their own have no λ."""
    options = {"model": "resnet18", "target_sparsity": 0.95, "data": "synthetic", "init_distribution": "erk"}
    config = Config(**options).resolved()
    run = train.Run(config, data.load("synthetic"))
    wanted = methods.layer_targets(run.model, config)
    assert set(wanted) == {n for n, _, _ in iter_weights(run.model)} - {"0", "13"}
    assert wanted["3.conv1"] < 0.8 < 0.95 < wanted["10.conv2"]
    sizes = {n: t for n, _, t in iter_weights(run.model)}
    active = sum((1 - s) * sizes[n] for n, s in wanted.items())
    assert active / sum(sizes[n] for n in wanted) == pytest.approx(0.05, rel=1e-3)
    assert run.lam.goals() == [wanted[n.removesuffix(".weight")] for n in run.lam._names]


def test_validation(tmp_path):
    out = tmp_path / "run"
    assert main("train", "--method", "sgd", "--epochs", 2, "--validation", 0.2, "--quiet", "--out", out) == 0
    result = json.loads((out / "result.json").read_text())
    with open(out / "history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert "test_accuracy" not in rows[0]
    assert float(rows[-1]["validation_accuracy"]) == result["validation_accuracy"]
    split = data.load("digits", validation=0.2)
    model = sb.models.mlp((1, 8, 8))
    model.load_state_dict(torch.load(out / "checkpoint.pt", weights_only=True)["model"])
    for name, part in (("validation", split.validation), ("test", split.test)):
        right = (model(split.standardise(part.images)).argmax(1) == part.labels).float().mean().item()
        assert result[f"{name}_accuracy"] == pytest.approx(100 * right)


def test_history_and_steps(tmp_path):
    out = tmp_path / "run"
    assert main("train", "--epochs", 2, "--coarse-steps", 5, "--quiet", "--out", out) == 0
    result = json.loads((out / "result.json").read_text())
    with np.load(out / "steps.npz") as steps:
        phase, seconds, loss = steps["phase"], steps["seconds"], steps["loss"]
    assert phase.tolist() == [int(i % 6 != 0) for i in range(24)]
    assert seconds.sum() == pytest.approx(result["train_seconds"], rel=1e-5)
    assert seconds[phase == 0].sum() == pytest.approx(result["fine_seconds"], rel=1e-5)
    assert result["train_seconds"] == pytest.approx(result["fine_seconds"] + result["coarse_seconds"])
    assert (result["steps"], result["fine_steps"]) == (24, 4)
    with open(out / "history.csv", newline="") as file:
        last = list(csv.DictReader(file))[-1]
    sizes = {"1": 64 * 1024, "3": 1024 * 1024, "5": 1024 * 10}
    density = sum(float(last[f"density.{n}"]) * size for n, size in sizes.items()) / sum(sizes.values())
    assert density == pytest.approx(result["density"])
    with open(out / "history.csv", newline="") as file:
        first = next(csv.DictReader(file))
    changes = 0
    for n, size in sizes.items():
        before, after = (round(float(row[f"density.{n}"]) * size) for row in (first, last))
        assert after - before == int(last[f"woke.{n}"]) - int(last[f"died.{n}"])
        changes += int(last[f"woke.{n}"]) + int(last[f"died.{n}"])
    assert changes == int(last["woke"]) + int(last["died"]) > 0
    assert last["gap"] == ""  # no target
    assert float(last["train_loss"]) == pytest.approx(
        sum(l * n for l, n in zip(loss[12:], [128] * 11 + [30], strict=True)) / 1438, rel=1e-5
    )


def test_target_sparsity(tmp_path, capsys):
    words = ("train", "--epochs", 1, "--quiet", "--target-sparsity", 0.9, "--out", tmp_path / "run")
    assert main(*words, "--method", "sgd") == 1
    assert "target_sparsity: expected no value for the method sgd" in capsys.readouterr().err
    for value, message in ((1.5, "a number below 1"), (0, "a finite number above 0")):
        assert main(*words[:-3], value, *words[-2:]) == 1
        assert f"target_sparsity: expected {message}" in capsys.readouterr().err
    assert main(*words, "--coarse-steps", 3) == 0
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert saved["lam"]
    with open(tmp_path / "run" / "history.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert float(row["gap"]) == pytest.approx(saved["lam"]["sparsity"] - 0.9)


def test_info_as_a_module():
    done = subprocess.run([sys.executable, "-m", "sparsebreg", "info"], capture_output=True, text=True, check=True)
    assert f"sparsebreg:      {sb.__version__}" in done.stdout
    assert "backend:" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--method", "adam"), "method: expected one of sgd, linbreg, .*, got 'adam'"),
        (("--model", "gpt"), "model: expected one of mlp, convnet.*, got 'gpt'"),
        (("--data", "svhn"), "data: expected one of digits, fashion-mnist, mnist.*, got 'svhn'"),
        (("--data", "mnist", "--data-dir", "nowhere"), "data_dir: expected a folder, got nowhere"),
        (("--epochs", "0"), "epochs: expected an integer of at least 1, got 0"),
        (("--lam", "nan"), "lam: expected a finite number of at least 0, got nan"),
        (("--lr", "inf"), "lr: expected a finite number"),
        (("--coarse-steps", "-3"), "coarse_steps: expected an integer of at least 0, got -3"),
        (
            ("--method", "linbreg", "--no-keep-momentum"),
            "keep_momentum: expected no value for the method linbreg, got F",
        ),
        (("--method", "sgd", "--lam", "0.1"), "lam: expected no value for the method sgd, got 0.1"),
        (("--init-density", "0"), "init_density: expected a finite number above 0"),
        (("--ramp", "1.5", "--target-sparsity", "0.9"), "ramp: expected a finite number of at least 0 and at most 1"),
        (("--ramp", "0.5"), "ramp: expected no value without a target sparsity, got 0.5"),
        (("--model", "convnet"), "in_shape: expected images of at least 16 x 16, got 8 x 8"),
        (("--threads", "0"), "threads: expected an integer of at least 1"),
    ],
)
def test_bad_options_are_told_and_write_nothing(words, message, tmp_path, capsys):
    out = tmp_path / "run"
    assert main("train", "--quiet", "--out", out, *words) == 1
    error = capsys.readouterr().err
    assert error.startswith("sparsebreg: error: ")
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


@pytest.mark.parametrize("model", ["mlp", "convnet"])
@pytest.mark.parametrize("method", METHODS)
def test_defaults(method, model):
    """What is given wins over a model's needs, these over those of a target sparsity, these over the method's own."""
    data = {"data": "fashion-mnist", "method": method, "model": model}
    plain, known = Config(**data).resolved(), METHODS[method]
    for name, value in {**known.defaults, **known.for_model.get(model, {})}.items():
        assert getattr(plain, name) == value
    if "target_sparsity" not in known.defaults:
        return
    aimed = Config(**data, target_sparsity=0.9).resolved()
    wanted = {**known.defaults, **known.for_model.get(model, {})}
    if known.bregman:
        wanted = {**known.defaults, "init_density": 0.08, "init_distribution": "erk"}
        wanted = {**wanted, **known.for_target, **known.for_model.get(model, {}), **known.for_both.get(model, {})}
    for name, value in {**wanted, "target_sparsity": 0.9}.items():
        assert getattr(aimed, name) == value
    assert Config(**data, target_sparsity=0.9, lr=0.7).resolved().lr == 0.7


def test_weight_decay_is_nobodys_without_a_reason():
    for method in METHODS:
        c = Config(data="fashion-mnist", method=method).resolved()
        assert c.weight_decay == 0
    c = Config(data="fashion-mnist", method="ml-adabreg", model="convnet", target_sparsity=0.95).resolved()
    assert (c.weight_decay, c.ramp, c.init_density) == (1e-4, 0.7, 0.25)
    c = Config(method="ml-adabreg", model="convnet", data="fashion-mnist", target_sparsity=0.95, weight_decay=0.0)
    assert c.resolved().weight_decay == 0


def test_settled_defaults():
    """Without a target sparsity ML-LinBreg starts as it always did."""
    c = Config(data="fashion-mnist", method="ml-linbreg").resolved()
    assert (c.lr, c.lam, c.coarse_steps, c.init_density, c.init_distribution) == (3.0, 0.07, 39, 0.02, "erk")
    c = Config(data="fashion-mnist", method="ml-linbreg", model="convnet").resolved()
    assert (c.lr, c.lam, c.coarse_steps, c.init_density, c.init_distribution) == (1.5, 0.18, 9, 0.08, "erk")
