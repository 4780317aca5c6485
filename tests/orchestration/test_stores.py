"""Ray Train on a run in an object store: a worker that is killed costs no step."""

import os
import signal
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY, TINY, names, tiny_settings
from tests.orchestration.clusters import newest_worker
from tests.training.worlds import losses, records, run_world, weights
from tests.waiting import wait_until

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
    wait_until(lambda: "checkpoints/step-50/manifest.json" in names(s3), process)
    os.kill(newest_worker(), signal.SIGKILL)
    printed, complaints = process.communicate(timeout=180)
    assert process.returncode == 0, complaints
    assert "best checkpoint: s3://runs/team/run/checkpoints/step-" in printed
    assert printed.count("!!! worker") == 1
    run_world(2, tiny_settings(corpus_dir, tmp_path / "local", *FLAGS))
    run = tmp_path / "copy"
    for name in names(s3):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        s3.download_file("runs", f"team/run/{name}", str(run / name))
    assert losses(run) == losses(tmp_path / "local")
    assert weights(run, 120) == weights(tmp_path / "local", 120)
    assert len(records(run, "start")) == 2
    left = {path.name for path in run.iterdir()}
    assert left == {"checkpoints", "errors.log", "loss.png", "metrics.jsonl", "settings.yaml"}
