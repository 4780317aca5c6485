"""A command on an embedded Ray, interrupted: what it says, and that nothing stays behind."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, TINY
from tests.training.worlds import losses
from yuzogpt.orchestration import cluster

pytestmark = pytest.mark.slow


def start(corpus_dir: Path, out_dir: Path) -> "subprocess.Popen[str]":
    """Start a long run, and wait until it has a checkpoint."""
    flags = ["train", *TINY, f"--data_dir={corpus_dir}", f"--out_dir={out_dir}", "--num_workers=1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "yuzogpt", *flags, "--max_iters=100000", "--eval_interval=10"],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    assert process.stdout.readline() == "starting Ray ...\n"
    for line in process.stdout:
        if line.startswith("step 2"):
            break
    return process


def rays_of(process: "subprocess.Popen[str]") -> list[Path]:
    """Return the directories of the embedded Rays of a command."""
    owners = Path("/tmp").glob(f"{cluster.PREFIX}*/{cluster.OWNER}")
    return [
        path.parent for path in owners if json.loads(path.read_text())["process"] == process.pid
    ]


def test_ctrl_c_is_one_line_and_a_kill_is_swept_up(corpus_dir, tmp_path):
    process = start(corpus_dir, tmp_path / "run")
    (directory,) = rays_of(process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.strip().splitlines()[-1] == "yuzogpt: interrupted; the same command goes on"
    assert not directory.exists()
    assert cluster.processes_of(directory) == []

    process = start(corpus_dir, tmp_path / "run")  # goes on
    (directory,) = rays_of(process)
    process.kill()
    process.communicate(timeout=60)
    assert cluster.processes_of(directory)  # Ray's agents outlive a killed driver
    cluster.sweep()  # what the next command does first
    assert not directory.exists()
    wait = threading.Event()
    while cluster.processes_of(directory):  # a killed process takes a moment to go
        wait.wait(0.05)
    steps = losses(tmp_path / "run")
    assert sorted(steps) == list(range(1, len(steps) + 1))
