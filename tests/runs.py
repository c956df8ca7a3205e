"""Runs of the command line in processes of their own."""

import os
import signal
import subprocess
import sys
import time

from sparsebreg.experiments import cli
from sparsebreg.experiments.runs import compare
from sparsebreg.experiments.runs.train import train

#: In result.json, and different in every run.
TIMES = ("seconds", "peak", "command", "config")


def sparsebreg(*words, env=None):
    return subprocess.Popen(
        [sys.executable, "-m", "sparsebreg", *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **(env or {})},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored below a background job
    )  # fmt: skip


def wait_for(path, seconds=120):
    for _ in range(100 * seconds):
        if path.exists():
            return
        time.sleep(0.01)
    raise AssertionError(f"{path} did not come")


def inline(config, restart, progress):
    """A run in this process: no time to start one."""
    return train(config, None, restart)


def compare_inline(*words):
    """A comparison, and its runs, in this process. Here because a forked process can import this module by its name."""
    compare._run = inline
    sys.exit(cli.main(["compare", *map(str, words)]))
