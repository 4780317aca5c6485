"""Ray Train on a run in an object store: a worker that is killed costs no step."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from tests.conftest import REPOSITORY, TINY, tiny_settings
from tests.orchestration.clusters import newest_worker
from tests.training.worlds import losses, records, run_world, weights

pytestmark = pytest.mark.slow

FLAGS = ("--dropout=0.1", "--max_iters=120", "--eval_interval=25", "--num_workers=2")


def test_a_worker_killed_gives_the_same_bits(s3, corpus_dir, tmp_path):
    s3.create_bucket(Bucket="runs")
    command = [sys.executable, "-m", "yuzogpt", "train", *TINY, *FLAGS]
    process = subprocess.Popen(
        [*command, f"--data_dir={corpus_dir}", "--out_dir=s3://runs/team/run"],
        env={
            **os.environ,
            "PYTHONPATH": str(REPOSITORY),
            "XDG_CACHE_HOME": str(tmp_path / "cache"),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait, deadline = threading.Event(), time.monotonic() + 120
    while not any("step-50/manifest.json" in name for name in names(s3)):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        wait.wait(0.05)
    os.kill(newest_worker(), signal.SIGKILL)
    printed, complaints = process.communicate(timeout=180)
    assert process.returncode == 0, complaints
    assert "best checkpoint: s3://runs/team/run/checkpoints/step-" in printed
    assert printed.count("!!! worker") == 1
    run_world(2, tiny_settings(corpus_dir, tmp_path / "local", *FLAGS))
    for name in names(s3):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        s3.download_file("runs", name, str(tmp_path / name))
    run = tmp_path / "team" / "run"
    assert losses(run) == losses(tmp_path / "local")
    assert weights(run, 120) == weights(tmp_path / "local", 120)
    assert len(records(run, "start")) == 2
    left = {path.name for path in run.iterdir()}
    assert left == {"checkpoints", "errors.log", "loss.png", "metrics.jsonl", "settings.yaml"}


def names(s3):
    """Return the files in the bucket, without the marks of empty folders."""
    found = s3.list_objects_v2(Bucket="runs").get("Contents", [])
    return [item["Key"] for item in found if not item["Key"].endswith("/")]
