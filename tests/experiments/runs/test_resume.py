"""Runs that were stopped or killed, and go on."""

import errno
import json
import resource
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datafiles import FILES, idx, write
from helpers import assert_same
from runs import TIMES, sparsebreg, wait_for

import sparsebreg.experiments.runs.train as module
from sparsebreg.core.errors import RunError
from sparsebreg.experiments import cli
from sparsebreg.experiments.data import datasets
from sparsebreg.experiments.files import locked
from sparsebreg.experiments.runs import checkpoint
from sparsebreg.experiments.runs.config import Config
from sparsebreg.experiments.runs.train import PARENT, Run, Stopped, choose_format, train

pytestmark = pytest.mark.usefixtures("one_thread")


class StopAt:
    """A progress bar that does something after a step."""

    def __init__(self, step, action=lambda: signal.raise_signal(signal.SIGINT)):
        self.left, self.action = step, action

    def __call__(self, **options):
        self.left -= options["initial"]
        return self

    def update(self):
        self.left -= 1
        if self.left == 0:
            self.action()

    def set_postfix_str(self, text, refresh):
        pass

    def close(self):
        pass


def state(folder):
    """What must not depend on stops: all of the checkpoint but times."""
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    for row in saved["history"]:
        row.pop("train_seconds")
        row.pop("evaluation_seconds")
    return {k: v for k, v in saved.items() if k not in ("config", "seconds", "aside", "data_seconds", "peak_mb")}


def result(folder):
    facts = json.loads((folder / "result.json").read_text())
    return {k: v for k, v in facts.items() if not any(t in k for t in TIMES)}


@pytest.fixture(scope="module")
def mnist(tmp_path_factory):
    return str(write(tmp_path_factory.mktemp("mnist")))


def task(kind, mnist):
    options = {"mlp": {}, "target": {"target_sparsity": 0.9}, "two_threads": {"threads": 2}}
    if kind in options:
        return Config(epochs=2, coarse_steps=4, checkpoint_minutes=60, **options[kind])
    # Augmented batches, weights that are not contiguous, layers that stay dense.
    return Config(data="mnist", data_dir=mnist, model="convnet", epochs=2, batch_size=10, coarse_steps=4, augment=True,
                  memory_format="channels_last")  # fmt: skip


# Of digits an epoch is 12 steps, of the small MNIST 5; fine steps are 1, 6, 11, ...
MOMENTS = {
    "first_step": (1,), "at_the_freeze": (6,), "inside_coarse_steps": (8,), "at_the_thaw": (5,), "last_of_epoch": (12,),
    "last_of_all": (24,), "three_times": (2, 9, 10),
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory, mnist):
    """Runs that were not stopped, by (kind, method); made once."""
    made = {}

    def run(kind, method):
        if (kind, method) not in made:
            folder = tmp_path_factory.mktemp("whole")
            torch.set_num_threads(1)
            config = task(kind, mnist)
            config = replace(config, coarse_steps=config.coarse_steps if method.startswith("ml-") else None)
            train(replace(config, method=method, out=str(folder)))
            made[kind, method] = config, folder
        return made[kind, method]

    return run


@pytest.mark.parametrize(
    ("kind", "method", "moment"),
    [
        *(("mlp", "ml-linbreg", m) for m in MOMENTS),
        *(("convnet", "ml-linbreg", m) for m in ("at_the_freeze", "inside_coarse_steps", "at_the_thaw")),
        ("mlp", "sgd", "three_times"),
        ("mlp", "linbreg", "inside_coarse_steps"),
        *(("target", "ml-linbreg", m) for m in ("at_the_freeze", "inside_coarse_steps", "at_the_thaw")),
        *(
            ("target", m, "three_times")
            for m in ("linbreg", "adabreg", "proxsgd", "ml-adabreg", "rigl", "set", "prune")
        ),
        ("two_threads", "ml-linbreg", "inside_coarse_steps"),
    ],
)
def test_stopped_run_is_the_whole_run(kind, method, moment, tmp_path, whole):
    config, folder = whole(kind, method)
    config = replace(config, method=method, out=str(tmp_path))
    for step in MOMENTS[moment]:
        with pytest.raises(Stopped, match=f"after step {step} of"):
            train(config, StopAt(step))
        saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
        assert len(saved["seconds"]) == step
        if method.startswith("ml-"):
            assert saved["cycle"]["phase"] == ("fine" if step % 5 == 0 else "coarse")
            assert saved["cycle"]["coarse_done"] == (0 if step % 5 == 0 else step % 5 - 1)
        assert not (tmp_path / "result.json").exists()
    resumed = train(config)
    assert_same(state(tmp_path), state(folder))
    assert result(tmp_path) == result(folder)
    assert resumed["steps"] == len(torch.load(tmp_path / "checkpoint.pt", weights_only=True)["seconds"])
    assert (tmp_path / "history.csv").read_text().count("\n") == 3


def test_timed_checkpoints_and_seconds(tmp_path, monkeypatch):
    """A checkpoint after every step; a kill then loses one step at most, and no second is counted twice."""
    config = Config(epochs=1, checkpoint_minutes=0, out=str(tmp_path))
    kept = []
    save = checkpoint.save
    monkeypatch.setattr(
        checkpoint, "save", lambda folder, c, s: (kept.append(s["seconds"].tolist()), save(folder, c, s))
    )
    facts = train(config)
    assert [len(k) for k in kept] == [*range(13), 12]
    assert facts["train_seconds"] == pytest.approx(sum(kept[-1]))
    assert facts["checkpoint_seconds"] > 0


def test_memory_format_of_a_run_killed_in_its_first_step(tmp_path, monkeypatch, mnist):
    """It was timed; timed again it might come out another, and other kernels round otherwise."""
    config = Config(data="mnist", data_dir=mnist, model="convnet", method="sgd", epochs=1, out=str(tmp_path))
    asked = []
    monkeypatch.setattr(module, "choose_format", lambda config, data: asked.append(config) or "channels_last")

    def kill(run, x, y):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "warm_up", lambda *args: None)
        patch.setattr(Run, "step", kill)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                train(config)
    assert len(asked) == 1
    assert train(config)["memory_format"] == "channels_last"


def test_memory_format(mnist):
    config = Config(data="mnist", data_dir=mnist, model="convnet").resolved()
    data = datasets.load(config.data, config.data_dir, config.validation)
    assert choose_format(config, data) == "contiguous"  # sparse: not timed, so that it is the same in every run
    assert choose_format(replace(config, memory_format="channels_last"), data) == "channels_last"
    sgd = replace(config, method="sgd", lam=None, coarse_steps=None, init_density=None, init_distribution=None)
    fast = {"contiguous": 0.0, "channels_last": 0.0}

    def step(run, x, y):
        assert x.is_contiguous(memory_format=run.format)
        time.sleep(fast[run.memory_format])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "step", step)
        for name in fast:
            fast = dict.fromkeys(fast, 0.004) | {name: 0.0}
            assert choose_format(sgd, data) == name


def test_killed_run_goes_on(tmp_path, whole):
    config, folder = whole("mlp", "ml-linbreg")
    config = replace(config, checkpoint_minutes=0, threads=1, out=str(tmp_path))
    run = sparsebreg("train", *config.arguments(), "--quiet")
    wait_for(tmp_path / "checkpoint.pt")
    run.kill()
    run.communicate()
    assert not (tmp_path / "result.json").exists()
    train(config)
    assert_same(state(tmp_path), state(folder))


def test_second_run_in_a_folder_is_refused_and_ctrl_c_saves(tmp_path, capsys):
    words = ("train", "--epochs", 1000, "--threads", 1, "--checkpoint-minutes", 0, "--quiet", "--out", tmp_path)
    run = sparsebreg(*words)
    wait_for(tmp_path / "checkpoint.pt")
    assert cli.main([str(w) for w in words]) == 1
    assert "out: expected a folder that no other run is writing to" in capsys.readouterr().err
    run.send_signal(signal.SIGINT)
    _, error = run.communicate()
    assert run.returncode == 130
    assert "the same command goes on from there" in error
    assert "Traceback" not in error


def test_run_of_a_killed_comparison_saves_and_stops(tmp_path):
    words = ("train", "--epochs", 1000, "--quiet", "--out", tmp_path)
    run = sparsebreg(*words, env={PARENT: "1"})  # no child of that process
    _, error = run.communicate()
    assert run.returncode == 128 + signal.SIGTERM
    assert "stopped after step 1 of 12000" in error
    assert (tmp_path / "checkpoint.pt").exists()


def test_finished_run_is_not_repeated(tmp_path, capsys):
    words = [str(w) for w in ("train", "--epochs", 1, "--quiet", "--method", "sgd", "--out", tmp_path)]
    assert cli.main(words) == 0
    assert "not repeated" not in capsys.readouterr().out
    before = (tmp_path / "result.json").read_text()
    assert cli.main(words) == 0
    assert "finished before, not repeated" in capsys.readouterr().out
    assert (tmp_path / "result.json").read_text() == before
    assert cli.main([*words, "--restart"]) == 0
    assert "not repeated" not in capsys.readouterr().out
    assert (tmp_path / "result.json").read_text() != before  # other seconds


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that stopped after its third step, and one that is finished."""
    torch.set_num_threads(1)
    folders = []
    for progress in (StopAt(3), None):
        out = tmp_path_factory.mktemp("stopped")
        config = Config(epochs=1, coarse_steps=4, out=str(out))
        if progress:
            with pytest.raises(Stopped):
                train(config, progress)
        else:
            train(config)
        folders.append(out)
    return folders


def test_other_files_of_a_data_set_are_refused(tmp_path):
    """Files of the same name with other images, or a part of them."""
    config = Config(data="mnist", method="sgd", epochs=3, out=str(tmp_path / "run"))
    for name, n in (("few", 30), ("more", 50)):
        (tmp_path / name).mkdir()
        images, labels = (idx(FILES[f"train-{kind}-ubyte"][:n]) for kind in ("images-idx3", "labels-idx1"))
        write(tmp_path / name, train_images_idx3=images, train_labels_idx1=labels)
    with pytest.raises(Stopped):
        train(replace(config, data_dir=str(tmp_path / "few")), StopAt(1))
    with pytest.raises(RunError, match=r"data: expected images, classes and shape \[30, .* got \[50, .*--restart"):
        train(replace(config, data_dir=str(tmp_path / "more")))


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "sgd", "coarse_steps": None}, "method: expected ml-linbreg, as in that run, got sgd"),
        ({"model": "convnet", "data": "synthetic"}, "data: expected digits, as in that run, got synthetic"),
        ({"coarse_steps": 5}, "coarse_steps: expected 4, as in that run, got 5"),
        ({"epochs": 2}, "epochs: expected 1, as in that run, got 2"),
        ({"seed": 1}, "seed: expected 0, as in that run, got 1"),
        ({"threads": 2}, "threads: expected 1, as in that run, got 2"),
    ],
)
def test_another_run_is_refused(stopped, finished, change, message):
    before = {p.name: p.read_bytes() for p in stopped[finished].iterdir()}
    config = Config(**{"epochs": 1, "coarse_steps": 4, "out": str(stopped[finished]), **change})
    with pytest.raises(RunError, match=rf"{message}\. .* is of another run: .* --restart"):
        train(config)
    assert {p.name: p.read_bytes() for p in stopped[finished].iterdir()} == before


def test_another_version_is_refused(stopped, monkeypatch):
    monkeypatch.setattr(checkpoint, "facts", lambda: {"version": "9.0", "backend": "native", "isa": "avx2"})
    with pytest.raises(RunError, match="version: expected .*, as in that run, got 9.0|isa: expected"):
        train(Config(epochs=1, coarse_steps=4, out=str(stopped[0])))


def test_damaged_checkpoints(stopped, tmp_path):
    raw = (stopped[0] / "checkpoint.pt").read_bytes()
    path = tmp_path / "checkpoint.pt"
    config = Config(epochs=1, coarse_steps=4, out=str(tmp_path)).resolved()
    for damaged in (raw[: len(raw) // 2], b"", b"no checkpoint", raw[:5000] + bytes(200) + raw[5200:]):
        path.write_bytes(damaged)
        with pytest.raises(RunError, match=r"checkpoint.pt: expected a (readable checkpoint|file of this version)"):
            checkpoint.load(tmp_path, config)
    torch.save([1], path)
    with pytest.raises(RunError, match="checkpoint.pt: expected a file of this version, got another one"):
        checkpoint.load(tmp_path, config)
    path.unlink()
    assert checkpoint.load(tmp_path, config) is None


def test_full_disk_keeps_the_old_checkpoint(tmp_path, whole):
    config, folder = whole("mlp", "ml-linbreg")
    config = replace(config, checkpoint_minutes=60, out=str(tmp_path))
    with pytest.raises(Stopped):
        train(config, StopAt(3))
    before = (tmp_path / "checkpoint.pt").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
        signal.raise_signal(signal.SIGINT)

    try:
        with pytest.raises(
            RunError, match=r"checkpoint.pt: expected room to write it, got .*older checkpoint was kept"
        ):
            train(config, StopAt(7, fill))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert not list(tmp_path.glob("*.part"))
    train(config)
    assert_same(state(tmp_path), state(folder))


@pytest.mark.parametrize("name", ["history.csv", "steps.npz", "curves.png", "result.json"])
def test_full_disk_elsewhere(name, tmp_path, monkeypatch):
    """The run says which file, and goes on from its checkpoint once there is room."""
    config = Config(method="sgd", epochs=1, out=str(tmp_path))
    with monkeypatch.context() as patch:
        replace_ = Path.replace

        def full(path, target):
            if path.name == f"{name}.part":
                raise OSError(errno.ENOSPC, "No space left on device")
            return replace_(path, target)

        patch.setattr(Path, "replace", full)
        with pytest.raises(RunError, match=rf"{name}: expected room to write it, got .*No space left"):
            train(config)
    assert not (tmp_path / "result.json").exists()
    assert not list(tmp_path.glob("*.part"))
    assert train(config)["steps"] == 12


def test_bad_loss_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    config = Config(method="sgd", epochs=2, out=str(tmp_path))
    step = module.Run.step

    def broken(run, x, y):
        loss = step(run, x, y)
        return float("nan") if len(run.seconds) == 14 else loss

    monkeypatch.setattr(module.Run, "step", broken)
    with pytest.raises(
        RunError, match=r"loss: expected a finite number, got nan in epoch 2, step 15, a fine one .*pt is"
    ):
        train(config)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["epoch"] == 1
    assert not (tmp_path / "result.json").exists()
    monkeypatch.setattr(module.Run, "step", step)
    assert train(config)["steps"] == 24


def test_weights_that_are_not_finite_are_not_saved(tmp_path, monkeypatch):
    step = module.Run.step

    def broken(run, x, y):
        loss = step(run, x, y)
        if len(run.seconds) == 11:  # the loss of this step was still good
            run.model[1].bias.data[0] = float("inf")
        return loss

    monkeypatch.setattr(module.Run, "step", broken)
    with pytest.raises(RunError, match=r"weights of '1.bias': expected finite numbers, got others after step 12"):
        train(Config(method="sgd", epochs=1, out=str(tmp_path)))
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert len(saved["seconds"]) == 0
    assert all(w.isfinite().all() for w in saved["model"].values())


def test_killed_comparison_goes_on(tmp_path):
    folder = tmp_path / "digits-mlp" / "sgd-seed0"
    words = ("compare", "--methods", "sgd", "--epochs", 300, "--threads", 1, "--out", tmp_path)

    def steps():
        return len(torch.load(folder / "checkpoint.pt", weights_only=True)["seconds"])

    run = sparsebreg(*words)
    wait_for(folder / "history.csv")  # written after every epoch, before the checkpoint
    run.send_signal(signal.SIGINT)
    _, error = run.communicate()
    assert run.returncode == 130
    assert "sparsebreg: stopped; the same command goes on from there" in error
    assert "Traceback" not in error
    first = steps()
    assert first >= 12
    before = (folder / "checkpoint.pt").stat().st_mtime_ns
    run = sparsebreg(*words)
    while (folder / "checkpoint.pt").stat().st_mtime_ns == before:
        time.sleep(0.01)
    run.kill()  # not its run, which notices, saves and stops
    run.wait()
    with locked(folder, 60):
        second = steps()
    assert first < second < 3600
    assert not (folder / "result.json").exists()
    run = sparsebreg(*words)
    while steps() <= second:
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    run.communicate()
    assert run.returncode == 130
