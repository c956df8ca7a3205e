"""Comparisons: what is checked before the first run, runs that fail or are stopped, what is shown on the way."""

import io
import json
import multiprocessing
import shlex
import signal
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from rich.console import Console
from runs import TIMES, compare_inline, inline, sparsebreg, wait_for

from sparsebreg.core.errors import RunError
from sparsebreg.experiments import cli
from sparsebreg.experiments.runs import compare, progress, report
from sparsebreg.experiments.runs.config import Config, read_toml

pytestmark = pytest.mark.usefixtures("one_thread")


def main(*words):
    return cli.main(["compare", *map(str, words)])


@pytest.mark.parametrize("name", compare.PACKAGES)
def test_missing_packages_are_told_first(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    assert main("--out", tmp_path / "c") == 1
    assert f"compare: expected the package {name} (pip install 'sparsebreg[train]'), got" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


def test_unknown_backend_is_told_first(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SPARSEBREG_BACKEND", "cuda")
    assert main("--out", tmp_path / "c") == 1
    assert "SPARSEBREG_BACKEND: expected one of" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


def test_data_is_checked_once(tmp_path, monkeypatch):
    asked = []
    load = compare.load
    monkeypatch.setattr(compare, "load", lambda *words: (asked.append(words), load(*words))[1])
    base = Config(out=str(tmp_path), validation=0.1)
    compare.check_tasks(compare.plan(base, ["sgd", "rigl"], [0, 1], ["mlp", "resnet18"], ["digits"]).values())
    assert asked == [("digits", None, 0.1)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seeds = [0, 1.5]", "seeds: expected an integer, got 1.5"),
        ("seeds = 2.0", "seeds: expected an integer, got 2.0"),
        ("seeds = [true]", "seeds: expected an integer, got True"),
        ("seeds = [1, 1]", "seeds: expected every one once, got 1, 1"),
        ("seeds = []", "seeds: expected at least one, got none"),
        ('methods = ["sgd", 3]', "methods: expected one of sgd, "),
    ],
)
def test_bad_lists_in_files(text, message, tmp_path, capsys):
    (tmp_path / "c.toml").write_text(text)
    assert main("--config", tmp_path / "c.toml", "--out", tmp_path / "c") == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("options", "methods", "data"),
    [
        ({"lam": 0.2, "augment": True}, ["sgd", "ml-linbreg"], ["mnist", "cifar10"]),
        ({}, ["ml-linbreg", "rigl"], ["cifar10"]),  # a target sparsity that only one of them has
        ({"target_sparsity": 0.9, "lr": 0.3, "threads": 3}, ["ml-adabreg", "sgd"], ["digits"]),
        ({"schedule": "step"}, ["adabreg"], ["mnist"]),
    ],
)
def test_saved_options_are_the_comparison(options, methods, data, tmp_path, monkeypatch):
    base = Config(out=str(tmp_path / "a folder"), data_dir="files", **options)
    configs = compare.plan(base, methods, [3, 0], ["convnet", "mlp"], data)
    path = tmp_path / "comparison.toml"
    compare._save_options(path, compare.options(base, configs))
    saved = read_toml(path, (*cli.LISTS, "command"))
    assert (saved["methods"], saved["seeds"], saved["models"]) == (methods, [3, 0], ["convnet", "mlp"])
    assert saved.get("lr") == options.get("lr", 2e-3 if methods == ["adabreg"] else None)
    planned = []

    def plan(base, methods, seeds, models, data, progress, restart):
        planned.append(compare.plan(base, methods, seeds, models, data))
        return [], {}

    monkeypatch.setattr(compare, "compare", plan)
    assert cli.main(["compare", "--config", str(path)]) == 0
    assert cli.main(shlex.split(saved["command"])[1:]) == 0
    assert planned == [configs, configs]
    assert [list(p) for p in planned] == [list(configs)] * 2  # in the same order


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo a warning >&2; echo 'sparsebreg: error: out of luck' >&2; exit 1", "out of luck"),
        ("echo a warning >&2; kill -9 $$", "killed by signal 9"),
        ("exit 3", "exit status 3"),
    ],
)
def test_how_a_run_failed(script, message, tmp_path, capsys, monkeypatch):
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\necho progress 3 12\necho something else\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    steps = []
    with pytest.raises(RunError, match=f"^{message}$"):
        compare._run(Config(), False, lambda *k: steps.append(k))
    assert steps == [(3, 12)]
    printed = capsys.readouterr()
    assert printed.out == ""
    assert ("a warning\n" in printed.err) == ("warning" in script)


def test_failed_run_does_not_stop_the_others(tmp_path, capsys, monkeypatch):
    def run(config, *more):
        if (config.method, config.seed) == ("sgd", 0):
            config = replace(config, lr=1e6)
        return inline(config, *more)

    words = ("--methods", "sgd,ml-linbreg", "--seeds", "0,1", "--epochs", 1, "--threads", 1, "--out", tmp_path)
    monkeypatch.setattr(compare, "_run", run)
    assert main(*words) == 1
    printed = capsys.readouterr()
    said = "loss: expected a finite number"
    assert f"failed: digits mlp sgd seed 0: {said}" in printed.out
    assert f"run 1 of 4: digits mlp sgd seed 0 failed: {said}" in printed.err
    assert "run 4 of 4: digits mlp ml-linbreg seed 1 done: test accuracy " in printed.err
    end = "sparsebreg: error: runs: expected every one to finish, got failures of digits mlp sgd seed 0; the same "
    assert printed.err.splitlines()[-1].startswith(end)
    rows = json.loads((tmp_path / "comparison.json").read_text())
    assert [(r["method"], r["runs"]) for r in rows] == [("sgd", 1), ("ml-linbreg", 2)]
    assert (tmp_path / "report.html").exists()
    times = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("result.json")}
    assert len(times) == 3
    # Again, without what made it fail.
    (tmp_path / "digits-mlp" / "sgd-seed0" / "checkpoint.pt").unlink()
    monkeypatch.setattr(compare, "_run", inline)
    assert main(*words, "--quiet") == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "failed:" not in printed.out
    assert [r["runs"] for r in json.loads((tmp_path / "comparison.json").read_text())] == [2, 2]
    assert all(p.stat().st_mtime_ns == t for p, t in times.items())


def test_method_without_a_finished_run_is_left_out(tmp_path, capsys, monkeypatch):
    def run(config, *more):
        if config.method in failing:
            raise RunError("out of luck")
        return inline(config, *more)

    monkeypatch.setattr(compare, "_run", run)
    words = ("--methods", "sgd,ml-linbreg", "--epochs", 1, "--threads", 1, "--quiet", "--out", tmp_path)
    failing = ("sgd", "ml-linbreg")
    assert main(*words) == 1
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [f"failed: digits mlp {method} seed 0: out of luck" for method in failing]
    assert "failures of digits mlp sgd seed 0, digits mlp ml-linbreg seed 0;" in printed.err
    assert not (tmp_path / "comparison.json").exists()
    failing = ("sgd",)
    assert main(*words) == 1
    assert [r["method"] for r in json.loads((tmp_path / "comparison.json").read_text())] == ["ml-linbreg"]
    assert "\nml-linbreg" in capsys.readouterr().out


@pytest.mark.parametrize("moment", ["run", "report"])
def test_ctrl_c_between_runs_and_in_the_report(moment, tmp_path, capsys, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "_run", inline)
    words = ("--methods", "sgd", "--epochs", 1, "--threads", 1, "--out", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(*((compare, "_run", stop) if moment == "run" else (report, "report", stop)))
        assert main(*words) == 130
    assert "\nsparsebreg: stopped; the same command goes on from there\n" in capsys.readouterr().err
    assert (tmp_path / "digits-mlp" / "sgd-seed0" / "result.json").exists() == (moment == "report")
    assert main(*words) == 0
    assert (tmp_path / "report.html").exists()


def test_ctrl_c_while_a_run_starts(tmp_path):
    run = sparsebreg("compare", "--methods", "sgd", "--epochs", 300, "--threads", 1, "--out", tmp_path)
    wait_for(tmp_path / "comparison.toml")
    time.sleep(0.3)
    run.send_signal(signal.SIGINT)
    out, error = run.communicate()
    assert run.returncode == 130
    assert "sparsebreg: stopped; the same command goes on from there" in error
    assert "Traceback" not in out + error


@pytest.fixture
def processes():
    """Makes processes that need no time to import what a comparison needs."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(
        [
            "sparsebreg.experiments.runs.compare",
            "sparsebreg.experiments.runs.report",
            "sklearn.datasets",
            "torch._dynamo",
        ]
    )
    return made


def test_killed_three_times(tmp_path, processes, monkeypatch):
    words = ("--methods", "sgd,ml-linbreg", "--seeds", "0,1", "--epochs", 4, "--coarse-steps", 4, "--threads", 1)
    words, killed = (*words, "--quiet", "--out"), tmp_path / "killed"
    for run, file in (
        ("sgd-seed0", "checkpoint.pt"),
        ("ml-linbreg-seed0", "history.csv"),
        ("sgd-seed1", "history.csv"),
    ):
        process = processes.Process(target=compare_inline, args=(*words, killed))
        process.start()
        wait_for(killed / "digits-mlp" / run / file)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert not (killed / "digits-mlp" / run / "result.json").exists()
    assert len(list(killed.rglob("result.json"))) == 2
    monkeypatch.setattr(compare, "_run", inline)
    assert main(*words, killed) == 0
    assert main(*words, tmp_path / "whole") == 0
    rows = [json.loads((tmp_path / name / "comparison.json").read_text()) for name in ("killed", "whole")]
    for row in rows[0] + rows[1]:
        for key in [k for k in row if any(t in k for t in TIMES)]:
            del row[key]
    assert rows[0] == rows[1]
    assert [(r["method"], r["runs"]) for r in rows[0]] == [("sgd", 2), ("ml-linbreg", 2)]


def test_estimates_by_method():
    a0, a1, b0, c0 = (("d", "m", method, seed) for method, seed in (("a", 0), ("a", 1), ("b", 0), ("c", 0)))
    other = ("d", "n", "a", 0)
    assert progress.epoch_seconds(a1, {}, {}) is None
    assert progress.epoch_seconds(a1, {a0: 2.0, b0: 8.0}, {c0: 1.0}) == 2
    assert progress.epoch_seconds(a1, {b0: 8.0}, {a1: 3.0}) == 3
    assert progress.epoch_seconds(a1, {a0: 2.0}, {a1: 3.0}) == 2
    assert progress.epoch_seconds(a1, {b0: 8.0, other: 90.0}, {c0: 4.0}) == 6  # same data and model
    assert progress.epoch_seconds(other, {b0: 8.0}, {c0: 4.0}) == 6


def shown(terminal, monkeypatch):
    """A display of four runs, its clock and its output."""
    monkeypatch.setenv("TERM", "xterm")
    now, out = [100.0], io.StringIO()
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    configs = compare.plan(Config(epochs=10), ["sgd", "ml-linbreg"], [0, 1], ["mlp"], ["digits"])
    console = Console(file=out, force_terminal=terminal, width=100, color_system=None)
    return progress.Progress(configs, {}, {}, console), now, out


def test_time_left(monkeypatch):
    show, now, _ = shown(False, monkeypatch)
    sgd, sparse, _, last = show.configs
    show.begin(sgd)
    assert show.seconds_left() is None
    now[0] += 3  # to start
    show.update(20, 120)  # it goes on from there
    assert show.seconds_left() is None
    now[0] += 5
    show.update(30, 120)  # 60 s a run
    assert show.seconds_left() == pytest.approx(45 + 3 * 63)
    show.results[sgd] = {
        "train_seconds": 30, "evaluation_seconds": 8, "checkpoint_seconds": 2, "test_accuracy": 91.234,
    }  # fmt: skip
    show.end()
    show.begin(sparse)
    assert show.seconds_left() == pytest.approx(3 * 43)
    now[0] += 1
    show.update(0, 120)
    now[0] += 2
    show.update(60, 120)  # 4 s a run
    assert show.seconds_left() == pytest.approx(2 + (2 + 40) + (2 + 4))
    show.failed[sparse] = "out of luck"
    show.end()
    assert show.seconds_left() == pytest.approx((2 + 40) + (2 + 40))  # the other one of sgd, all that is known
    show.begin(last)
    assert "run 4 of 4: digits mlp ml-linbreg seed 1, 0:00:11 elapsed, about 0:01:24 left" in show.line()


def test_log(monkeypatch):
    show, now, out = shown(False, monkeypatch)
    sgd, sparse, *_ = show.configs
    with show:
        show.begin(sgd)
        now[0] += 62
        show.update(60, 120)
        show.results[sgd] = {
            "train_seconds": 30, "evaluation_seconds": 8, "checkpoint_seconds": 2, "test_accuracy": 91.234,
        }  # fmt: skip
        show.end()
        show.begin(sparse)
        show.failed[sparse] = "loss: expected [this], " + 200 * "x"
        show.end()
    assert out.getvalue().splitlines() == [
        "run 1 of 4: digits mlp sgd seed 0 started, 0:00:00 elapsed, time left not known yet",
        "run 1 of 4: digits mlp sgd seed 0 done: test accuracy 91.23 %, 30.00 s of training steps",
        "run 2 of 4: digits mlp ml-linbreg seed 0 started, 0:01:02 elapsed, about 0:05:06 left",
        "run 2 of 4: digits mlp ml-linbreg seed 0 failed: loss: expected [this], " + 200 * "x",
    ]


def test_live_table(monkeypatch):
    show, now, out = shown(True, monkeypatch)
    sgd, sparse, again, last = show.configs
    with show:
        assert "ml-linbreg  0 of 2                -        -  waiting" in out.getvalue()
        show.begin(sgd)
        assert "sgd         0 of 2                -        -  seed 0: starting, 0:00:00" in out.getvalue()
        show.update(60, 120)
        print("a word of the run", file=sys.stderr)  # stands above the table
        now[0] += 62
        for key, accuracy in ((sgd, 91.0), (again, 93.0)):
            show.begin(key)
            show.update(60, 120)
            show._live.refresh()
            show.results[key] = {
                "train_seconds": 30, "evaluation_seconds": 8, "checkpoint_seconds": 2, "test_accuracy": accuracy,
            }  # fmt: skip
            show.end()
        for key in (sparse, last):
            show.begin(key)
            show.failed[key] = "out of luck"
            show.end()
    text = out.getvalue()
    assert "a word of the run" in text
    assert "seed 1: step 60 of 120, 0:00:00" in text
    *_, line, head, first, second = text.rstrip("\x1b[?25h\n").splitlines()
    assert line.endswith("2 of 4 runs done, 0:01:02 elapsed")
    assert head.split() == ["method", "runs", "test", "accuracy", "%", "train", "s", "state"]
    assert first.split() == ["sgd", "2", "of", "2", "92.00", "±", "1.41", "30.00", "±", "0.00", "done"]
    assert second.split() == ["ml-linbreg", "0", "of", "2", "-", "-", "failed:", "seed", "0,", "1"]


def test_live_table_of_several_tasks(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    configs = compare.plan(Config(), ["sgd"], [0], ["mlp"], ["digits", "synthetic"])
    console = Console(file=io.StringIO(), width=100, color_system=None)
    show = progress.Progress(configs, {}, {}, console)
    console.print(show.table())
    text = console.file.getvalue()
    assert "0 of 2 runs done, 0:00:00 elapsed, time left not known yet" in text
    assert "synthetic, mlp  sgd" in text
